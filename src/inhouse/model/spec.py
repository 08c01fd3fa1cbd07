"""What a model is, as numbers: shapes and switches. Knows no file format, no names of tensors and no operations."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from inhouse.core.errors import FormatError

ROPE_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "factors")

# Above these a config is damaged or hostile; each is ten times what the largest published model has.
LIMITS = {"layers": 2048, "hidden": 1 << 19, "ffn": 1 << 21, "heads": 1 << 14, "head_dim": 1 << 14,
          "vocab_size": 1 << 23, "context_length": 1 << 28}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how its frequencies are stretched.

    linear: positions divided by `factor`. dynamic: NTK-aware base, fixed from the context length. llama3: by wave
    length between `low_freq_factor` and `high_freq_factor` (Llama 3.1). yarn: arXiv 2309.00071, between
    `beta_slow` and `beta_fast` rotations. factors: each frequency divided by its own number.
    """

    dim: int  # leading elements of each head that are rotated; even
    theta: float = 10000.0
    interleaved: bool = False  # pairs (2i, 2i + 1); else (i, i + dim / 2)
    scaling: str = "none"  # one of ROPE_SCALINGS
    factor: float = 1.0
    original_context: int = 0  # positions of pre-training, before stretching
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin
    truncate: bool = True  # yarn: round the ends of its ramp to whole dimensions
    factors: tuple[float, ...] = ()  # [dim / 2]


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: embedding, layers of attention and MLP with pre-normalisation, final norm, head."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    context_length: int  # positions 0..context_length-1
    rope: RopeSpec
    norm_eps: float
    activation: str = "silu"  # of the gate
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head of q and k, before the rotation
    tied: bool = False  # the head is the embedding
    windows: tuple[int, ...] = field(
        default=()
    )  # [layers] positions that attention sees, 0: all; (): all in every layer

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return float(self.head_dim**-0.5)

    def window(self, layer: int) -> int:
        """Positions that attention of `layer` sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer, norms and biases included."""
        attention = 2 * self.hidden * (self.q_width + self.kv_width) + 2 * self.hidden
        attention += self.qkv_bias * (self.q_width + 2 * self.kv_width) + self.o_bias * self.hidden
        attention += self.qk_norm * 2 * self.head_dim
        return attention + 3 * self.hidden * self.ffn + self.mlp_bias * (2 * self.ffn + self.hidden)

    @property
    def parameters(self) -> int:
        """Parameters in all; a tied embedding counts once."""
        tables = self.vocab_size * self.hidden * (1 if self.tied else 2)
        return tables + self.layers * self.layer_parameters + self.hidden

    def kv_bytes_per_token(self, element_bytes: int) -> int:
        """Bytes of K and V that one position takes over all layers, with `element_bytes` an element."""
        return 2 * self.layers * self.kv_width * element_bytes


def check_spec(spec: ModelSpec) -> ModelSpec:
    """`spec` itself if its numbers fit one another; raises FormatError naming the number that does not."""
    for name, most in LIMITS.items():
        value = getattr(spec, name)
        _need(1 <= value <= most, f"{name} is {value}, allowed 1..{most}")
    _need(1 <= spec.kv_heads <= spec.heads, f"kv_heads is {spec.kv_heads}, allowed 1..{spec.heads}")
    _need(spec.heads % spec.kv_heads == 0, f"{spec.heads} heads are no multiple of {spec.kv_heads} key-value heads")
    _need(not spec.windows or len(spec.windows) == spec.layers, f"{len(spec.windows)} windows for {spec.layers} layers")
    _need(all(w >= 0 for w in spec.windows), f"a sliding window is negative: {min(spec.windows, default=0)}")
    _need(0.0 < spec.norm_eps < 1.0, f"norm_eps is {spec.norm_eps}, allowed above 0 and below 1")
    _check_rope(spec.rope, spec.head_dim)
    return spec


def _check_rope(rope: RopeSpec, head_dim: int) -> None:
    _need(2 <= rope.dim <= head_dim and rope.dim % 2 == 0, f"rotary width is {rope.dim} for heads of {head_dim}")
    _need(rope.scaling in ROPE_SCALINGS, f"unknown rope scaling {rope.scaling!r}")
    _positive(rope, ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "attention_factor"))  # fmt: skip
    _need(rope.theta > 1.0, f"rope theta is {rope.theta}, must be above 1")
    if rope.scaling in ("dynamic", "llama3", "yarn"):
        _need(rope.original_context >= 1, f"rope scaling {rope.scaling} needs the original context length")
    if rope.scaling == "dynamic":
        _need(rope.dim > 2, f"dynamic rope scaling needs a rotary width above 2, not {rope.dim}")
        _need(rope.factor >= 1.0, f"dynamic rope scaling has the factor {rope.factor}, must be 1 or more")
    if rope.scaling == "llama3":
        _need(rope.high_freq_factor > rope.low_freq_factor, "rope high_freq_factor must exceed low_freq_factor")
    if rope.scaling == "factors":
        _need(len(rope.factors) == rope.dim // 2, f"{len(rope.factors)} rope factors for {rope.dim // 2} frequencies")
        _need(all(0.0 < f < 1e9 for f in rope.factors), "rope factors must be positive and finite")


def _positive(rope: RopeSpec, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(rope, name)
        _need(0.0 < value < 1e12, f"rope {name} is {value}, must be positive and finite")


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise FormatError(f"the model's config does not hold together: {message}", remedy="Check config.json")
