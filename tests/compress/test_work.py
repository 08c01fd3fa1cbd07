"""Work: what was put and saved is there after a restart, what was not saved is gone, a torn line does not count."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from inhouse.compress.work import Work
from inhouse.core.errors import FormatError, UsageError
from inhouse.model.spec import ModelSpec
from inhouse.runtime.form import Form
from inhouse.runtime.packed import pack_float, quantize

pytestmark = [pytest.mark.torch, pytest.mark.realdata]

Q, K = "layers.0.attn.q.weight", "layers.0.attn.k.weight"


@pytest.fixture
def model(stories: Path) -> str:
    return str(stories / "hf")


def test_saved_is_kept_unsaved_is_gone(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        before, other = work.value(Q), work.value(K)
        work.begin("prune")
        work.put(Q, before * 2)
        mask = torch.rand(before.shape, generator=torch.Generator().manual_seed(1)) > 0.5
        work.put_mask(Q, mask)
        work.save("prune/0")
        work.put(K, other * 3)
    with Work.open(model, tmp_path / "run") as work:
        assert torch.equal(work.value(Q), before * 2)
        assert torch.equal(work.value_before(Q), before)
        found = work.mask(Q)
        assert found is not None
        assert torch.equal(found, mask)
        assert torch.equal(work.value(K), other)
        assert list(work.units()) == ["prune/0"]
        assert work.is_changed(Q)
        assert not work.is_changed(K)


def test_forms_come_back_and_floats_stay_beneath(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        value = work.value(Q)
        small = np.random.default_rng(0).standard_normal((64, 4)).astype(np.float32)
        form = Form(
            quantize([value.numpy()], "q4", shape=(64, 64)),
            (pack_float(np.ascontiguousarray(small.T), "f32"), pack_float(small, "f32")),
            np.arange(64, dtype=np.int64)[::-1].copy(),
        )
        work.put_form(Q, form)
        work.save("quantize/0")
    with Work.open(model, tmp_path / "run") as work:
        found = work.form(Q)
        assert found is not None
        assert np.array_equal(found.value(), form.value())
        assert np.array_equal(work.value(Q).numpy(), form.value())
        assert torch.equal(work.float_value(Q), value)
        work.put(Q, value)
        assert work.form(Q) is None


def test_a_torn_line_does_not_count(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        work.put(Q, work.value(Q) + 1)
        work.save("a")
        wanted = work.value(Q)
        work.put(Q, work.value(Q) + 1)
        work.save("b")
    journal = tmp_path / "run" / "journal.jsonl"
    raw = journal.read_bytes()
    first = raw.index(b"\n") + 1
    for cut in (first, first + 1, len(raw) - 1):
        # A kill before b's line leaves a's blob, which is collected only once b is durable.
        copy = tmp_path / f"cut{cut}"
        with Work.open(model, copy) as work:
            work.put(Q, wanted)
            work.save("a")
        with open(copy / "journal.jsonl", "ab") as file:
            file.write(raw[first:cut])
        with Work.open(model, copy) as work:
            assert torch.equal(work.value(Q), wanted)
            assert list(work.units()) == ["a"]


def test_a_damaged_blob_is_found(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        work.put(Q, work.value(Q))
        work.save("a")
    blob = next((tmp_path / "run" / "data").iterdir())
    raw = bytearray(blob.read_bytes())
    raw[100] ^= 1
    blob.write_bytes(raw)
    with pytest.raises(FormatError, match="not what its journal says"):
        Work.open(model, tmp_path / "run")


def test_a_new_spec_moves_layers(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        spec = work.spec
        assert isinstance(spec, ModelSpec)
        last = work.value("layers.4.mlp.down.weight")
        origin = {name.replace("layers.4.", "layers.3."): name for name in work.names(4)}
        work.replace_spec(replace(spec, layers=4, ffn=160), origin)
        with pytest.raises(UsageError, match="new shape"):
            work.save("too early")
        for name, weight in list(work.programs.weights.items()):
            if ".mlp." in name:
                old = last if name == "layers.3.mlp.down.weight" else torch.zeros(1)
                work.put(name, old[:, :160].contiguous() if len(old) > 1 else torch.zeros(weight.shape))
        work.save("drop")
    with Work.open(model, tmp_path / "run") as work:
        assert isinstance(work.spec, ModelSpec)
        assert work.spec == replace(spec, layers=4, ffn=160)
        assert torch.equal(work.value("layers.3.mlp.down.weight"), last[:, :160])
        assert "layers.4.attn.q.weight" not in work.names()


def test_what_cannot_be_put(model: str, tmp_path: Path) -> None:
    with Work.open(model, tmp_path / "run") as work:
        with pytest.raises(UsageError, match="no weight"):
            work.value("layers.9.attn.q.weight")
        with pytest.raises(UsageError, match="shape"):
            work.put(Q, torch.zeros(3, 3))
        with pytest.raises(UsageError, match="not finite"):
            work.put(Q, work.value(Q) * torch.inf)


def test_quantised_sources_are_decoded_with_a_note(stories: Path, tmp_path: Path) -> None:
    with (
        Work.open(str(stories / "stories260K-Q4_0.gguf"), tmp_path / "a") as work,
        Work.open(str(stories / "hf"), tmp_path / "b") as floats,
    ):
        assert any("quantised already" in note for note in work.notes)
        assert not floats.notes
        ours, theirs = work.value(Q), floats.value(Q)
        assert 0 < (ours - theirs).norm() / theirs.norm() < 0.15
