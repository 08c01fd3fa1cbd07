"""LoRA against PEFT itself, on both executors: alone, many in one batch, on packed weights, and what is refused."""

import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from inhouse.core.errors import ConflictError, FormatError, InhouseError, NotFoundError, UnsupportedError, UsageError
from inhouse.core.settings import load_settings
from inhouse.engine.request import Finished, SamplingParams, TokenEvent, make_request
from inhouse.engine.session import Session
from tests.adapters.making import gguf_file, peft_folder

pytestmark = [pytest.mark.native, pytest.mark.torch]

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = [1, 403, 407, 261, 378, 300, 44, 12, 90, 7]


def session(path: Path, **settings: Any) -> Session:
    return Session.open(str(path), load_settings({"max_sequences": 8, **settings}, environ={}))


def logits(opened: Session, adapter: str | None = None, ids: list[int] = IDS) -> np.ndarray:
    """Logits of every row of a prompt."""
    rows: list[np.ndarray] = []
    request = make_request(f"r-{adapter}", ids, SamplingParams(temperature=0.0), 0, 0,
                           adapter=opened.adapter_slot(adapter))  # fmt: skip
    request = type(request)(**{f: getattr(request, f) for f in request.__dataclass_fields__} | {
        "tap": lambda first, part: rows.append(part.copy())})  # fmt: skip
    for event in opened.engine.stream(request):
        if isinstance(event, Finished):
            break
    return np.concatenate(rows)[: len(ids)]


def expected(model: Any, ids: list[int] = IDS) -> np.ndarray:
    torch.set_num_threads(1)
    with torch.no_grad():
        out: np.ndarray = model(torch.tensor([ids])).logits[0].numpy()
    return out


def close(ours: np.ndarray, theirs: np.ndarray, tolerance: float = 1e-4) -> bool:
    theirs = theirs[: len(ours)]
    return bool(np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max())


def emptied(opened: Session) -> None:
    """Waits until unloaded adapters have left their slots."""
    for _ in range(500):
        if not opened.engine.adapters.held:
            return
        time.sleep(0.01)
    raise AssertionError("a slot is held for ever")


@pytest.mark.parametrize("executor", ["native", "torch"])
def test_adapters_equal_peft(stories: Path, tmp_path: Path, executor: str) -> None:
    model = peft_folder(stories / "hf", tmp_path / "a", r=4, lora_alpha=10, target_modules=ALL)
    rs = peft_folder(stories / "hf", tmp_path / "b", 1, r=8, lora_alpha=3, use_rslora=True,
                     target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 3},
                     alpha_pattern={"layers.1.self_attn.v_proj": 20})  # fmt: skip
    with session(stories / "hf", executor=executor) as opened:
        plain = logits(opened)
        opened.load_adapter("a", tmp_path / "a")
        opened.load_adapter("b", tmp_path / "b")
        assert np.array_equal(logits(opened), plain), "slot 0 keeps its bits"
        for name, oracle in (("a", model), ("b", rs)):
            ours = logits(opened, name)
            assert close(ours, expected(oracle)), name
            assert not close(ours, plain, 0.05), "the adapter does something"


def test_many_adapters_in_one_batch_have_their_bits_alone(stories: Path, tmp_path: Path) -> None:
    """On Q4_0 weights: no unpacking, every sequence with an adapter of its own or none."""
    for i in range(3):
        peft_folder(stories / "hf", tmp_path / f"a{i}", i, r=2 + i, lora_alpha=4, target_modules=ALL)
    prompts = [IDS[: 4 + i] * (1 + i % 2) for i in range(8)]
    slots = [i % 4 for i in range(8)]

    def run(opened: Session, which: list[int]) -> list[list[int]]:
        import queue

        events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        out: dict[str, list[int]] = {}
        for i in which:
            request = make_request(f"{i}", prompts[i], SamplingParams(temperature=0.0, ignore_eos=True), 12,
                                   adapter=slots[i])  # fmt: skip
            out[request.id] = []
            opened.engine.submit(request, events.put)
        left = len(which)
        while left:
            for event in events.get():
                if isinstance(event, TokenEvent):
                    out[event.request_id].extend(event.tokens)
                left -= isinstance(event, Finished)
        return [out[f"{i}"] for i in which]

    with session(stories / "stories260K-Q4_0.gguf", prefix_cache=False) as opened:
        for i in range(3):
            assert opened.load_adapter(f"a{i}", tmp_path / f"a{i}").slot == i + 1
        together = run(opened, list(range(8)))
        alone = [run(opened, [i])[0] for i in range(8)]
        assert together == alone
        assert len({tuple(t) for t in together}) > 4


def test_prefixes_are_not_shared_across_adapters(stories: Path, tmp_path: Path) -> None:
    long = IDS * 8
    peft_folder(stories / "hf", tmp_path / "a", 0, r=4, lora_alpha=8, target_modules=ALL)
    peft_folder(stories / "hf", tmp_path / "b", 1, r=4, lora_alpha=8, target_modules=ALL)

    def text(opened: Session, name: str | None) -> list[int]:
        events = opened.stream(long, SamplingParams(temperature=0.0, ignore_eos=True), 8, adapter=name)
        return [t for event in events for t in getattr(event, "tokens", ())]

    with session(stories / "hf") as opened, session(stories / "hf", prefix_cache=False) as fresh:
        for each in (opened, fresh):
            each.load_adapter("a", tmp_path / "a")
        for _ in range(2):
            assert text(opened, None) == text(fresh, None)
            assert text(opened, "a") == text(fresh, "a")
        for each in (opened, fresh):
            each.unload_adapter("a")
            emptied(each)
            assert each.load_adapter("a", tmp_path / "b").slot == 1, "the slot is used again"
        assert text(opened, "a") == text(fresh, "a")


@pytest.mark.parametrize("base", ["hf", "stories260K-F32.gguf"])
def test_gguf_and_peft_go_on_bases_of_either_format(stories: Path, tmp_path: Path, base: str) -> None:
    model = peft_folder(stories / "hf", tmp_path / "a", r=4, lora_alpha=10, target_modules=ALL)
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
             "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}  # fmt: skip
    gguf_file(tmp_path / "a", tmp_path / "a.gguf", names, {"attn_q": 8, "attn_k": 4}, 10.0)
    with session(stories / base) as opened:
        opened.load_adapter("peft", tmp_path / "a")
        opened.load_adapter("gguf", tmp_path / "a.gguf")
        assert close(logits(opened, "peft"), expected(model))
        assert close(logits(opened, "gguf"), expected(model))


def test_what_is_refused_and_that_nothing_is_left_behind(stories: Path, tmp_path: Path) -> None:
    peft_folder(stories / "hf", tmp_path / "good", r=4, lora_alpha=8, target_modules=["q_proj"])

    def broken(name: str, change: Any = None, config: dict[str, Any] | None = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(tmp_path / "good", folder)
        if config is not None:
            path = folder / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        if change is not None:
            tensors = load_file(folder / "adapter_model.safetensors")
            save_file(change(dict(tensors)), folder / "adapter_model.safetensors")
        return folder

    def renamed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key.replace("q_proj", "z_proj"): value for key, value in tensors.items()}

    def cut(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: v[:, :-1].copy() if "lora_A" in k else v for k, v in tensors.items()}

    def poisoned(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: np.full_like(v, np.nan) for k, v in tensors.items()}

    def half(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {k: v for k, v in tensors.items() if "lora_A" in k}

    cases: list[tuple[Path, type[InhouseError], str]] = [
        (broken("dora", config={"use_dora": True}), UnsupportedError, "use_dora"),
        (broken("saved", config={"modules_to_save": ["lm_head"]}), UnsupportedError, "modules_to_save"),
        (broken("type", config={"peft_type": "IA3"}), UnsupportedError, "IA3"),
        (broken("key", config={"sparkle": 3}), UnsupportedError, "sparkle"),
        (broken("rank", config={"r": 5}), FormatError, "rank 5"),
        (broken("alpha", config={"lora_alpha": "x"}), FormatError, "lora_alpha"),
        (broken("names", renamed), FormatError, "z_proj"),
        (broken("shape", cut), FormatError, "matrix"),
        (broken("nan", poisoned), FormatError, "finite"),
        (broken("half", half), FormatError, "do not go together"),
        (tmp_path / "nothing", NotFoundError, "no adapter at"),
        (stories / "stories260K-F32.gguf", FormatError, "not a LoRA adapter"),
    ]
    with session(stories / "hf") as opened:
        plain = logits(opened)
        for path, kind, said in cases:
            with pytest.raises(kind, match=said):
                opened.load_adapter("x", path)
        with pytest.raises(NotFoundError):
            opened.adapter_slot("x")
        assert opened.load_adapter("x", tmp_path / "good").slot == 1
        assert opened.load_adapter("x", tmp_path / "good").slot == 1, "again the same is no error"
        with pytest.raises(ConflictError):
            opened.load_adapter("x", broken("other", lambda t: {k: v * 2 for k, v in t.items()}))
        with pytest.raises(UsageError):
            opened.load_adapter(opened.name, tmp_path / "good")
        opened.unload_adapter("x")
        with pytest.raises(NotFoundError):
            opened.unload_adapter("x")
        assert np.array_equal(logits(opened), plain)


def test_unloading_waits_for_those_who_use_it(stories: Path, tmp_path: Path) -> None:
    peft_folder(stories / "hf", tmp_path / "a", r=4, lora_alpha=8, target_modules=ALL)
    with session(stories / "hf") as opened:
        opened.load_adapter("a", tmp_path / "a")
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        whole = [t for e in opened.stream(IDS, params, 60, adapter="a") for t in getattr(e, "tokens", ())]
        events = opened.stream(IDS, params, 60, adapter="a")
        first = next(events)
        opened.unload_adapter("a")
        with pytest.raises(NotFoundError):
            next(opened.stream(IDS, params, 4, adapter="a"))
        rest = [t for e in [first, *events] for t in getattr(e, "tokens", ())]
        assert rest == whole
        emptied(opened)
        assert opened.load_adapter("again", tmp_path / "a").slot == 1
