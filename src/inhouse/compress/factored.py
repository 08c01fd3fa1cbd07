"""Low-rank matrices while they learn: the factors stand in the matrix's place, and it is they that are trained.

Knows two factors; the loop is `compress.fit`.
"""

from collections.abc import Mapping

from torch import Tensor

from inhouse.compress.pack_as import pack_as
from inhouse.runtime.form import Form


class Factors:
    """A `fit.WeightHook`: b a [out, in] instead of the weight, with a [k, in] and b [out, k] learned."""

    def __init__(self, a: Tensor, b: Tensor) -> None:
        self.a, self.b = (factor.detach().clone().float().requires_grad_() for factor in (a, b))

    def parameters(self) -> Mapping[str, Tensor]:
        return {"a": self.a, "b": self.b}

    def __call__(self, weight: Tensor) -> Tensor:
        return self.b @ self.a

    def form(self, factors: str = "bf16") -> Form:
        """How the factors are stored as they now are."""
        return Form(None, (pack_as(self.a.detach(), factors), pack_as(self.b.detach(), factors)))
