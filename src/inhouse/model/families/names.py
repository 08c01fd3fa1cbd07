"""Names tables written from a short form: most families name the parts of a layer under one prefix, with weight and
bias of a part side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from inhouse.model.families.family import Fused, Place

_NORMS = ("attn_norm", "mlp_norm", "attn_post_norm", "mlp_post_norm", "final_norm", "embed_norm", "attn.q_norm",
          "attn.k_norm")  # fmt: skip


def names(
    layer: str, parts: Mapping[str, str | Fused | Sequence[str | Fused]], outer: Mapping[str, str]
) -> dict[str, Place]:
    """Canonical name -> tensor name, with the names of weights and of biases.

    Args:
        layer: the prefix of a layer's tensors, with {i} (`model.layers.{i}.`).
        parts: canonical part of a layer (`attn.q`) -> its name there, without `.weight`.
        outer: the same for what stands outside the layers (`embed`, `final_norm`, `head`).
    """
    table: dict[str, Place] = {}
    for part, place in parts.items():
        table |= _both(f"layers.{{i}}.{part}", part, layer, place)
    for part, place in outer.items():
        table |= _both(part, part, "", place)
    return table


def _both(canonical: str, part: str, prefix: str, place: str | Fused | Sequence[str | Fused]) -> dict[str, Place]:
    """The entries of a part's weight and bias."""
    norm = part in _NORMS
    weight, bias = (canonical, f"{canonical}_bias") if norm else (f"{canonical}.weight", f"{canonical}.bias")
    return {weight: _suffixed(prefix, place, ".weight"), bias: _suffixed(prefix, place, ".bias")}


def _suffixed(prefix: str, place: str | Fused | Sequence[str | Fused], suffix: str) -> Place:
    if isinstance(place, Fused):
        return replace(place, name=f"{prefix}{place.name}{suffix}")
    if isinstance(place, str):
        return f"{prefix}{place}{suffix}"
    made = [_suffixed(prefix, one, suffix) for one in place]
    return tuple(one for one in made if not isinstance(one, tuple))


QKV = ("attn.q", "attn.k", "attn.v")
GATE_UP = ("mlp.gate", "mlp.up")


def qkv(name: str, groups: str = "", transpose: bool = False) -> dict[str, str | Fused | Sequence[str | Fused]]:
    """q, k and v in one tensor."""
    return dict.fromkeys(QKV, Fused(name, QKV, groups, transpose))


def gate_up(name: str) -> dict[str, str | Fused | Sequence[str | Fused]]:
    """The gate's rows, then up's, in one tensor."""
    return dict.fromkeys(GATE_UP, Fused(name, GATE_UP))


def part(name: str) -> Fused:
    """A tensor that the file keeps as [in, out]."""
    return Fused(name, transpose=True)


GGUF_OUTER = {
    "embed": "token_embd", "positions": "position_embd", "embed_norm": "token_embd_norm", "final_norm": "output_norm",
    "head": "output",
}  # fmt: skip
GGUF_PARTS: Mapping[str, str] = {
    "attn_norm": "attn_norm", "attn.q": "attn_q", "attn.k": "attn_k", "attn.v": "attn_v", "attn.o": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm", "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
}  # fmt: skip


def gguf_names(**changes: str | Fused | Sequence[str | Fused]) -> dict[str, Place]:
    """The names of GGUF; `changes` by canonical part, with `__` for the dot."""
    parts = dict(GGUF_PARTS) | {key.replace("__", "."): value for key, value in changes.items()}
    return names("blk.{i}.", parts, GGUF_OUTER)


GGUF_QKV = {part.replace(".", "__"): (Fused("attn_qkv", QKV), GGUF_PARTS[part]) for part in QKV}  # or apart
GGUF_GATE_UP = {key.replace(".", "__"): value for key, value in gate_up("ffn_up").items()}
