"""Training through a stored form: a hook whose value in the forward pass is what the form will decode to.

Knows forms, grids and the straight-through estimator; knows no loop and no recipe.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from inhouse.compress.fake_quant import FakeQuant
from inhouse.compress.grids import Grid
from inhouse.core.errors import UnsupportedError, UsageError
from inhouse.runtime.form import Form
from inhouse.runtime.packed import Packed, is_float, pack_float
from inhouse.runtime.torch_ops import straight_through

_TYPES = {"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}


class Stores(Protocol):
    """What turns floats into a packed matrix and shows its values to the forward pass."""

    def parameters(self) -> Mapping[str, Tensor]: ...

    def __call__(self, weight: Tensor) -> Tensor: ...

    def pack(self, weight: Tensor) -> Packed: ...


class Narrow:
    """A float format: values rounded to it, gradients straight through."""

    def __init__(self, name: str) -> None:
        self._name = name

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def __call__(self, weight: Tensor) -> Tensor:
        return straight_through(weight, weight.detach().to(_TYPES[self._name]).float())

    def pack(self, weight: Tensor) -> Packed:
        return pack_float(weight.detach().contiguous().numpy(), self._name)


def stores(name: str, weight: Tensor, *, learn_steps: bool = True) -> Stores:
    """What a format makes of a matrix. Raises UnsupportedError for a format that has neither floats nor a grid."""
    return Narrow(name) if is_float(name) else FakeQuant(weight, Grid(name, weight.shape[1]), learn_steps=learn_steps)


class FormHook:
    """A `fit.WeightHook` over a Form: main y, order of columns, and the factors of the low-rank part.

    Args:
        form: where it starts.
        weight: f32 [out, in], the floats of main (what is trained); ignored where main is absent or held.
        learn_main: train main; else its values stay those of `form`, and only the factors learn.
        learn_steps: as of `FakeQuant`.

    Raises UsageError if nothing of it could learn, UnsupportedError as `stores`.
    """

    def __init__(self, form: Form, weight: Tensor, *, learn_main: bool = True, learn_steps: bool = True) -> None:
        if form.train or form.outer is not None:
            raise UnsupportedError(
                "tensor cores are not trained", remedy="Heal the model before they are made of it, or leave them out"
            )
        self._form = form
        self._order = None if form.columns is None else torch.from_numpy(form.columns.copy())
        self._main: Stores | None = None
        self._fixed: Tensor | None = None
        if form.main is not None and learn_main:
            self._main = stores(form.main.format, self._ordered(weight), learn_steps=learn_steps)
        elif form.main is not None:
            self._fixed = torch.from_numpy(Form(form.main, columns=form.columns).value())
        self._factors: dict[str, Tensor] = {}
        self._kept: dict[str, Stores] = {}
        if form.low_rank is not None:
            for key, packed in zip(("a", "b"), form.low_rank, strict=True):
                self._factors[key] = torch.from_numpy(packed.dequantize()).requires_grad_()
                self._kept[key] = stores(packed.format, self._factors[key].detach(), learn_steps=learn_steps)
        if self._main is None and not self._factors:
            raise UsageError("nothing of this form learns", remedy="Leave the weight out of the training")

    @property
    def main_learns(self) -> bool:
        """Whether the weight itself is trained."""
        return self._main is not None

    @property
    def format(self) -> str:
        """Main's format; "" where there is none."""
        return "" if self._form.main is None else self._form.main.format

    def parameters(self) -> Mapping[str, Tensor]:
        found = {} if self._main is None else {f"main.{key}": p for key, p in self._main.parameters().items()}
        for key, kept in self._kept.items():
            found |= {key: self._factors[key]} | {f"{key}.{name}": p for name, p in kept.parameters().items()}
        return found

    def __call__(self, weight: Tensor) -> Tensor:
        value = self._fixed
        if self._main is not None:
            value = self._main(self._ordered(weight))
            if self._order is not None:
                value = value[:, torch.argsort(self._order)]
        if self._factors:
            a, b = (self._kept[key](self._factors[key]) for key in ("a", "b"))
            value = b @ a if value is None else value + b @ a
        assert value is not None
        return value

    def form(self, weight: Tensor) -> Form:
        """The form as trained."""
        main = self._form.main if self._main is None else self._main.pack(self._ordered(weight.detach()))
        factors = None
        if self._factors:
            factors = (self._kept["a"].pack(self._factors["a"]), self._kept["b"].pack(self._factors["b"]))
        return Form(main, factors, self._form.columns)

    def _ordered(self, weight: Tensor) -> Tensor:
        return weight if self._order is None else weight[:, self._order]
