"""The stage `attention`: spec, stored config and engine mean the same narrowed attention; equal to masked dense."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inhouse.compress.recipe import parse_recipe
from inhouse.core.errors import FormatError, UnsupportedError, UsageError
from inhouse.engine.blocks import Blocks
from inhouse.engine.engine import Engine
from inhouse.engine.request import EngineConfig, SamplingParams, make_request
from inhouse.load.model import open_model
from inhouse.model.build import build
from inhouse.model.families.config_change import changed_config
from inhouse.model.families.sparse_attention import KEY, attention_key
from inhouse.model.families.table import resolve
from inhouse.model.spec import ModelSpec
from inhouse.plan import memory
from inhouse.runtime.torch_attention import Mask, attend, visible
from tests.engine.driving import run_all

pytestmark = [pytest.mark.native, pytest.mark.torch, pytest.mark.realdata]


def narrowed(stories: Path, folder: Path, window: int, sink: int = 0, stride: int = 0) -> Path:
    """stories260K with the key in its config.json."""
    folder.mkdir()
    for file in (stories / "hf").iterdir():
        if file.name != "config.json":
            (folder / file.name).symlink_to(file)
    config = json.loads((stories / "hf" / "config.json").read_text()) | attention_key(window, sink, stride)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def rows(folder: Path, executor: str, tokens: list[int], step_tokens: int = 64) -> list[float]:
    model = open_model(str(folder), executor=executor, threads=1, kv_dtype="f32", activations="float", cache=False)
    engine = Engine(model.executor, EngineConfig(step_tokens=step_tokens, max_running=2), digest=model.digest)
    found = [one.logprob for one in engine.score(tokens)]
    engine.close()
    model.close()
    return found


def dense(folder: Path, tokens: list[int]) -> list[float]:
    """Log-probabilities by the whole-sequence form, which masks a dense matrix of scores."""
    model = open_model(str(folder), executor="torch", activations="float", cache=False)
    with torch.inference_mode():
        logits = model.executor.forward("step", torch.tensor([tokens]))["logits"][0]  # type: ignore[attr-defined]
    chosen = torch.log_softmax(logits[:-1].double(), -1)[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]
    model.close()
    return chosen.tolist()


@pytest.mark.parametrize("pattern", [(40, 0, 0), (33, 16, 0), (20, 32, 5)])
def test_engine_is_masked_dense(stories: Path, tmp_path: Path, pattern: tuple[int, int, int]) -> None:
    tokens = [1, *np.random.default_rng(0).integers(3, 512, 399).tolist()]
    folder = narrowed(stories, tmp_path / "m", *pattern)
    wanted = dense(folder, tokens)
    assert np.abs(np.array(wanted) - dense(stories / "hf", tokens)).max() > 0.05, "the mask does something"
    for executor in ("native", "torch"):
        np.testing.assert_allclose(rows(folder, executor, tokens), wanted, atol=2e-4)


def test_a_window_as_long_as_the_context_is_full_attention(stories: Path, tmp_path: Path) -> None:
    tokens = [1, *np.random.default_rng(1).integers(3, 512, 299).tolist()]
    assert rows(narrowed(stories, tmp_path / "m", 512), "native", tokens) == rows(stories / "hf", "native", tokens)
    assert rows(narrowed(stories, tmp_path / "n", 512, 64, 2), "native", tokens) == rows(
        stories / "hf", "native", tokens
    )


def test_masks_by_hand() -> None:
    at = torch.arange(100)[None]
    seen = visible(at, at, Mask(window=10, sink=16, stride=3))[0]
    for p in range(100):
        wanted = {k for k in range(p + 1) if p - k < 10 or k < 16 or k // 16 % 3 == 0}
        assert set(seen[p].nonzero()[:, 0].tolist()) == wanted
    assert torch.equal(visible(at, at, Mask(window=100)), visible(at, at, Mask()))
    q, k, v = (torch.randn(1, 2, 100, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    full = attend(q, k, v, visible(at, at, Mask(window=1000, sink=16)), scale=0.3)
    assert torch.equal(full, attend(q, k, v, visible(at, at, Mask()), scale=0.3))


def test_masked_blocks_are_given_back(stories: Path, tmp_path: Path) -> None:
    """A sequence of 400 in a pool of 12 blocks: 3 of the sink, strided ones, window and step."""
    folder = str(narrowed(stories, tmp_path / "m", 30, 48, 8))
    params = SamplingParams(temperature=0, ignore_eos=True)
    answers = []
    for count in (12, 40):
        model = open_model(folder, cache=False)
        (group,) = model.executor.programs.groups
        assert memory.blocks_per_sequence(group, 400, 16) == 3 + 3 + 4
        config = EngineConfig(blocks={group.name: count}, step_tokens=16, prefix_cache=False)
        engine = Engine(model.executor, config, digest=model.digest, start=False)
        (result,) = run_all(engine, [make_request("long", range(1, 100), params, 300)])
        assert not result.failed
        answers.append(result.tokens[0])
        engine.close()
        model.close()
    assert answers[0] == answers[1]


def test_static_blocks_stay_lent(stories: Path) -> None:
    config = json.loads((stories / "hf" / "config.json").read_text()) | attention_key(32, 16, 4)
    spec, _ = resolve(config)
    (group,) = build(spec).groups
    blocks = Blocks((group,), {group.name: 40})
    tables = blocks.empty_tables()
    for first in range(0, 512, 16):
        assert blocks.extend(tables, first, first + 16) == []
        blocks.check([tables])
    lent = [i for i, block in enumerate(tables[group.name]) if block >= 0]
    assert lent == [0, 4, 8, 12, 16, 20, 24, 28, 29, 30, 31]
    blocks.release(tables)
    blocks.check([])


def test_the_key_survives_a_change(stories: Path) -> None:
    config = json.loads((stories / "hf" / "config.json").read_text())
    spec, family = resolve(config)
    assert isinstance(spec, ModelSpec)
    narrow = replace(spec, windows=(64,) * 5, window_sink=16, window_stride=0)
    written = changed_config(config, narrow, family)
    assert written[KEY] == {"window": 64, "sink": 16, "stride": 0}
    assert resolve(written)[0] == narrow
    assert resolve(changed_config({}, narrow, family))[0].windows == narrow.windows  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"window": 0}, FormatError),
        ({"window": 64, "sink": 8}, FormatError),
        ({"window": 64, "strid": 8}, FormatError),
        ({"window": "64"}, FormatError),
        ([64], FormatError),
    ],
)
def test_a_damaged_key_is_refused(stories: Path, said: object, error: type[Exception]) -> None:
    config = json.loads((stories / "hf" / "config.json").read_text())
    with pytest.raises(error, match=r"inhouse_attention|sink"):
        resolve(config | {KEY: said})


def test_a_model_that_slides_takes_no_sink() -> None:
    config = {
        "architectures": ["MistralForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5, "rope_theta": 1e4, "sliding_window": 64, "hidden_act": "silu",
        "tie_word_embeddings": False,
    }  # fmt: skip
    with pytest.raises(UnsupportedError, match="slide"):
        resolve(config | attention_key(32, 16))
    assert resolve(config | attention_key(32))[0].windows == (32, 32)  # type: ignore[union-attr]


def test_the_stage_in_a_recipe() -> None:
    recipe = parse_recipe({"stages": [{"attention": {"window": 64, "sink": 16}}]})
    assert recipe.stages[0].options.window == 64
    with pytest.raises(UsageError, match="multiple of 16|a sink of 8"):
        parse_recipe({"stages": [{"attention": {"window": 64, "sink": 8}}]})
    with pytest.raises(UsageError, match="stride"):
        parse_recipe({"stages": [{"attention": {"window": 64, "strid": 8}}]})
