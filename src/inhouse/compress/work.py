"""The model in hand while it is compressed: every canonical weight as floats, a mask or a stored form, kept on disk.

Knows where each weight's current value lies: in the model that was opened (read when asked for, so that nothing of it
stays in anonymous memory) or in a file of the run that a stage wrote. `save` commits what was put since the last one,
whole or not at all. Does not know recipes or methods. A tied embedding is one weight, `embed.weight`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.compress.blobs import read_form, read_spec, spec_json, write_form
from inhouse.compress.journal import Blob, Journal, blobs_of
from inhouse.core.errors import UsageError
from inhouse.load.bind import Plan, plan_binding
from inhouse.load.describe import Described, describe, read_tokenizer
from inhouse.load.locate import Located, content_digest, locate
from inhouse.load.packing import Part
from inhouse.load.packing import floats as read_floats
from inhouse.model.build import Spec, build
from inhouse.model.spec import ModelSpec
from inhouse.model.tokens.tokenizer import Tokenizer
from inhouse.runtime.form import Form
from inhouse.runtime.program import Program, ProgramSet
from inhouse.store.home import Home
from inhouse.store.stored_source import StoredSource

FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True, slots=True)
class Held:
    """Where one weight lies: `base` is its name in the model that was opened, the others are blobs of the run."""

    base: str | None = None
    value: Mapping[str, Any] | None = None  # float32, of the weight's shape
    form: Mapping[str, Any] | None = None
    mask: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key in ("base", "value", "form", "mask") if (value := getattr(self, key)) is not None}


class Work:
    """A model being compressed, in a run folder. Not thread-safe.

    Attributes:
        folder: the run folder. reference: what was opened. digest: of its files.
        spec, programs: of the model as it now is; `programs` are plain (no quantised activations, no side branches).
        home: the model home of other models' names; None: the user's.
        config: config.json of the model that was opened, {} of a GGUF file. tokenizer: its own.
        notes: what the user should know of the source, one sentence each.
    """

    def __init__(self, located: Located, described: Described, folder: Path, home: Home | None = None) -> None:
        self.located, self.described, self.folder, self.home = located, described, folder, home
        self.reference, self.digest = located.name, content_digest(located)
        self.spec: Spec = described.spec
        self.programs: ProgramSet = build(described.spec)
        self.config: Mapping[str, Any] = {} if described.source.format == "gguf" else described.config
        self.tokenizer: Tokenizer = read_tokenizer(
            described, home.tokenizers if home is not None else None, located.identity if home is not None else None
        )
        self._plan: Plan = plan_binding(described.source, described.spec, described.family, described.programs())
        self._parts: dict[str, Part] = {part.spec.name: part for part in self._plan.parts}
        self._shapes = {name: weight.shape for name, weight in self.programs.weights.items()}
        self.notes = list(self._plan.notes) + _source_notes(self._plan.parts)
        self.journal = Journal(folder)
        self._held: dict[str, Held] = {name: Held(base=name) for name in self.programs.weights}
        self._before: dict[str, Held] = dict(self._held)
        self._changed: dict[str, Held | None] = {}
        self._new_spec: Spec | None = None
        self.kept_layers: list[int] | None = None  # numbers, in the opened model, of the layers that are left
        self._replay()

    @classmethod
    def open(cls, reference: str, folder: Path, *, home: Home | None = None) -> Self:
        """Opens a model of the store, a folder or a .gguf, in a run folder that may hold a run already.

        Raises what `locate`, `describe` and `plan_binding` raise; FormatError where the run's files are damaged.
        """
        located = locate(reference, home or Home.find())
        described = describe(located.path)
        try:
            return cls(located, described, folder, home)
        except BaseException:
            described.source.close()
            raise

    def close(self) -> None:
        """Closes the source; what was not saved is lost."""
        self.described.source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # What there is.

    @property
    def program(self) -> Program:
        """The Program that calibration and training run: `step`, or `embed` of a model without a head."""
        return self.programs.programs["step" if "step" in self.programs.programs else "embed"]

    @property
    def parent(self) -> str | None:
        """The version that was opened, if it is one of the store."""
        return f"{self.located.name}:{self.located.version}" if self.located.version else None

    def names(self, layer: int | None = None) -> list[str]:
        """Canonical names in the order of the forward pass; of one layer, those that its ops use (-1: outside)."""
        if layer is None:
            return list(self.programs.weights)
        used = dict.fromkeys(name for op in self.program.ops if op.layer == layer for name in op.weights)
        return [name for name in used if name in self.programs.weights]

    def matrices(self) -> list[str]:
        """Names of linears and embeddings, which have a Form in the end; tables and vectors stay floats."""
        return [name for name, spec in self.programs.weights.items() if spec.kind in ("linear", "embedding")]

    def shape(self, name: str) -> tuple[int, ...]:
        """The weight's shape. Raises UsageError for a name that the model does not have."""
        if name not in self.programs.weights:
            raise UsageError(f"the model has no weight {name!r}", param=name)
        return self.programs.weights[name].shape

    def source_dtype(self, name: str) -> str:
        """`f32`, `f16` or `bf16`: what the opened model keeps it as (f32 for quantised and changed weights)."""
        held = self._held[name]
        if held.value is not None or held.base is None:
            return "f32"
        part = self._parts.get(held.base)
        return {"F16": "f16", "BF16": "bf16"}.get(part.info.dtype, "f32") if part is not None else "f32"

    def is_changed(self, name: str) -> bool:
        """Whether any stage has put something for it."""
        held = self._held[name]
        return held.value is not None or held.form is not None or held.mask is not None

    # Reading.

    def value(self, name: str) -> Tensor:
        """float32 of the weight's shape: what its Form decodes to, where it has one. The caller's own copy, or a
        private mapping: writing into it changes nothing here."""
        return self._read(self._held[self._known(name)])

    def float_value(self, name: str) -> Tensor:
        """The floats that the Form was made of; `value` where there is no Form."""
        return self._read(replace(self._held[self._known(name)], form=None))

    def value_before(self, name: str) -> Tensor:
        """What `value` gave when the stage began."""
        return self._read(self._before[self._known(name)])

    def rows(self, name: str, start: int, stop: int, *, floats: bool = False) -> Tensor:
        """Rows start .. stop - 1 of `value` (of `float_value`), float32 [n, in], without the others where that can
        be."""
        last = min(stop, self.shape(name)[0])
        return self.gather(name, np.arange(start, last, dtype=np.int64), floats=floats)

    def gather(self, name: str, ids: npt.NDArray[np.int64], *, floats: bool = False) -> Tensor:
        """Rows `ids` (int64 [n]) of `value` (of `float_value`), float32 [n, in], without the others where that can
        be."""
        held = self._held[self._known(name)]
        held = replace(held, form=None) if floats else held
        if held.form is not None:
            form = read_form(self.journal.data / held.form["file"], held.form["parts"])
            whole = form.low_rank is None and form.columns is None and form.outer is None
            simple = form.main is not None and whole
            return torch.from_numpy(form.main.rows(ids) if simple and form.main is not None else form.value()[ids])
        side = isinstance(self.described.source, StoredSource)
        if held.value is None and held.base is not None and held.base not in self._plan.columns and not side:
            with self.described.guard():
                return torch.from_numpy(read_floats(self._parts[held.base], self.described.source, ids))
        return self._read(held)[torch.from_numpy(ids)]

    def form(self, name: str) -> Form | None:
        """Its stored form, views of a mapped file; None for one that is floats so far."""
        blob = self._held[self._known(name)].form
        return None if blob is None else read_form(self.journal.data / blob["file"], blob["parts"])

    def mask(self, name: str) -> Tensor | None:
        """bool of the weight's shape, True where it is kept; None: nothing is pruned."""
        blob = self._held[self._known(name)].mask
        if blob is None:
            return None
        shape = self.shape(name)
        bits = np.fromfile(self.journal.data / blob["file"], np.uint8)
        return torch.from_numpy(np.unpackbits(bits, count=int(np.prod(shape))).astype(bool).reshape(shape))

    def weights(self, layer: int | None = None, *, before: bool = False) -> dict[str, Tensor]:
        """Weights of a layer (-1: those outside layers; None: all), and every constant, for `torch_dense.forward`.
        `before`: as they were when the stage began."""
        read = self.value_before if before else self.value
        return {name: read(name) for name in self.names(layer)} | self.constants()

    def constants(self) -> dict[str, Tensor]:
        """What the builder computed: rotary frequencies, ALiBi slopes."""
        return {name: torch.from_numpy(np.array(array)) for name, array in self.programs.constants.items()}

    # Writing; nothing counts before `save`.

    def put(self, name: str, tensor: Tensor) -> None:
        """New floats of the weight's shape; its form is dropped, its mask stays. Raises UsageError for another shape or
        a value that is not finite."""
        array = tensor.detach().to("cpu", torch.float32).contiguous().numpy()
        if array.shape != self.shape(name):
            raise UsageError(f"{name} has the shape {self.shape(name)}, got {array.shape}", param=name)
        if not np.isfinite(array).all():
            raise UsageError(f"new values of {name} are not finite", param=name)
        blob = self.journal.write([array]).to_dict() | {"shape": list(array.shape)}
        held = self._held[name]
        mask = held.mask if held.mask is not None and held.mask["shape"] == list(array.shape) else None
        self._set(name, Held(value=blob, mask=mask))

    def put_mask(self, name: str, mask: Tensor | None) -> None:
        """Which elements are kept; None: all. Values are not touched."""
        blob = None
        if mask is not None:
            if tuple(mask.shape) != self.shape(name) or mask.dtype is not torch.bool:
                raise UsageError(f"a mask of {name} is bool {self.shape(name)}, got {mask.dtype} {tuple(mask.shape)}")
            blob = self.journal.write([np.packbits(mask.cpu().numpy())]).to_dict() | {"shape": list(mask.shape)}
        self._set(name, replace(self._held[name], mask=blob))

    def put_form(self, name: str, form: Form | None) -> None:
        """How it will be stored; the floats it was made of are kept beneath. None drops the form."""
        blob = None
        if form is not None:
            if form.shape != self.shape(name):
                raise UsageError(f"{name} has the shape {self.shape(name)}, its form {form.shape}", param=name)
            blob = write_form(self.journal, form)
        self._set(name, replace(self._held[name], form=blob))

    def replace_spec(self, spec: Spec, origin: Mapping[str, str] | None = None) -> None:
        """Another architecture (layers, widths or heads removed). `origin`: new name -> old name, of weights that
        moved; names that stay need none. Afterwards `put` every weight whose shape changed, before `save`."""
        programs = build(spec)
        old, moved = self._held, origin or {}
        self._held = {}
        for name in programs.weights:
            source = moved.get(name, name)
            self._held[name] = old.get(source, Held())
            if name not in old or source != name:
                self._changed[name] = self._held[name]
        self._changed |= dict.fromkeys(set(old) - set(self._held), None)
        if isinstance(spec, ModelSpec) and isinstance(self.spec, ModelSpec) and spec.layers != self.spec.layers:
            self.kept_layers = _kept_layers(self.kept_layers or list(range(self.spec.layers)), spec.layers, moved)
        self.spec, self.programs, self._new_spec = spec, programs, spec

    def begin(self, stage: str) -> None:
        """Marks where a stage begins: `value_before` gives what stands now. Once for each stage; a stage that the
        journal knows already is not begun again."""
        if any(line.get("stage") == stage for line in self.journal.lines):
            return
        self._before = dict(self._held)
        self.journal.append({"stage": stage})
        self._collect()

    def save(self, unit: str, **record: Any) -> None:
        """Commits everything put since the last `save` as `unit`. After a kill the unit is there whole or not at all.

        Raises UsageError if a weight's shape changed and nothing of that shape was put.
        """
        for name in self._held if self._new_spec is not None else ():
            self._check_shape(name)
        changes = {name: held.to_dict() if held is not None else None for name, held in self._changed.items()}
        line: dict[str, Any] = {"unit": unit, "changes": changes, **record}
        if self._new_spec is not None:
            line |= {"spec": spec_json(self._new_spec), "kept_layers": self.kept_layers}
        self.journal.append(line)
        self._changed, self._new_spec = {}, None
        self._collect()

    def units(self) -> dict[str, Mapping[str, Any]]:
        """Finished units and their records."""
        return {line["unit"]: line for line in self.journal.lines if "unit" in line}

    def _known(self, name: str) -> str:
        self.shape(name)
        return name

    def _check_shape(self, name: str) -> None:
        held, shape = self._held[name], self.shape(name)
        base = self._shapes[held.base] if held.base is not None else None
        if base != shape and (held.value is None or held.value["shape"] != list(shape)):
            raise UsageError(f"nothing of the new shape {shape} was put for {name}", param=name)

    def _set(self, name: str, held: Held) -> None:
        self._held[name] = self._changed[name] = held

    def _read(self, held: Held) -> Tensor:
        if held.form is not None:
            return torch.from_numpy(read_form(self.journal.data / held.form["file"], held.form["parts"]).value())
        if held.value is not None:
            flat: npt.NDArray[np.float32] = np.memmap(self.journal.data / held.value["file"], np.float32, mode="c")
            return torch.from_numpy(flat.reshape(held.value["shape"]))
        if held.base is None:
            raise UsageError("a weight was asked for that no stage has put yet")
        return torch.from_numpy(self._base(held.base))

    def _base(self, name: str) -> npt.NDArray[np.float32]:
        """From the opened model, columns in the model's own order, side branches added."""
        source = self.described.source
        with self.described.guard():
            if isinstance(source, StoredSource) and len(self._shapes[name]) == 2:
                return source.form(name).value()
            part = self._parts[name]
            value = read_floats(part, source)
        order = self._plan.columns.get(name)
        if order is None:
            return value
        plain = np.empty_like(value)
        plain[:, order] = value
        return plain

    def _replay(self) -> None:
        spec: Spec = self.spec
        for line in self.journal.lines:
            if "stage" in line:
                self._before = dict(self._held)
            if line.get("spec"):
                spec, self.kept_layers = read_spec(line["spec"], spec), line["kept_layers"]
            for name, held in line.get("changes", {}).items():
                if held is None:
                    self._held.pop(name, None)
                else:
                    self._held[name] = Held(**held)
        if spec is not self.spec:
            self.spec, self.programs = spec, build(spec)
            self._held = {name: self._held[name] for name in self.programs.weights}
        for held in self._alive():
            for blob in (held.value, held.form, held.mask):
                if blob is not None:
                    self.journal.check(blob)
        self._collect(sweep=True)

    def _alive(self) -> Iterable[Held]:
        yield from self._held.values()
        yield from self._before.values()

    def _collect(self, sweep: bool = False) -> None:
        """Removes blobs that neither the present state nor the stage's beginning needs."""
        keep = blobs_of([held.to_dict() for held in self._alive()])
        if sweep:
            self.journal.sweep(keep)
        else:
            self.journal.remove({path.name for path in self.journal.data.iterdir()} - keep)


def _kept_layers(before: Sequence[int], layers: int, moved: Mapping[str, str]) -> list[int]:
    """Numbers of the layers that `moved` (new name -> old name) leaves; layers that no name moves stay."""
    places = {int(new.split(".")[1]): int(old.split(".")[1]) for new, old in moved.items() if new.startswith("layers.")}
    return [before[places.get(layer, layer)] for layer in range(layers)]


def _source_notes(parts: Sequence[Part]) -> list[str]:
    coded = [part for part in parts if part.format != "vector" and (part.coding or part.info.dtype not in FLOAT_TYPES)]
    if not coded:
        return []
    types = ", ".join(sorted({part.coding.kind if part.coding else part.info.dtype for part in coded}))
    return [f"{len(coded)} matrices of the source are quantised already ({types}); they were decoded to floats first"]


__all__ = ["Blob", "Form", "Held", "Work"]
