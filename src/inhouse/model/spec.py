"""What a model is, as numbers: shapes and switches. Knows no file format, no names of tensors and no operations."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from inhouse.core.errors import FormatError
from inhouse.model.pooling import Pooling
from inhouse.model.spec_parts import MlaSpec, MoeSpec

NORMS = ("rms", "layer")
ROPE_SCALINGS = ("none", "linear", "dynamic", "llama3", "yarn", "factors", "longrope")
ROPE_SOURCES = ("positions", "two_part")

# Above these a config is damaged or hostile; each is ten times what the largest published model has.
LIMITS = {"layers": 2048, "hidden": 1 << 19, "ffn": 1 << 21, "heads": 1 << 14, "head_dim": 1 << 14,
          "vocab_size": 1 << 23, "context_length": 1 << 28}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding (RoFormer, arXiv 2104.09864) and how its frequencies are stretched.

    linear: positions divided by `factor`. dynamic: NTK-aware base, fixed from the context length. llama3: by wave
    length between `low_freq_factor` and `high_freq_factor` (Llama 3.1). yarn: arXiv 2309.00071, between
    `beta_slow` and `beta_fast` rotations. factors: each frequency divided by its own number. longrope: by `factors`, or
    by `long_factors` where the context is longer than the original (arXiv 2402.13753); fixed from the context length.
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
    long_factors: tuple[float, ...] = ()  # [dim / 2]
    source: str = "positions"  # two_part: half of the angles by the position within the prefix, half beyond it


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only transformer: embedding, layers of attention and MLP, final norm, head.

    The defaults are Llama's: RMS norms before each part, a gated MLP, one rotary table, nothing scaled. A family is the
    switches that differ.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab_size: int
    context_length: int  # positions 0..context_length-1
    rope: RopeSpec | None  # None: no layer rotates
    norm_eps: float
    activation: str = "silu"  # of the gate, or of the plain MLP
    gated: bool = True  # act(gate) * up; else act(up)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False  # norm of each head of q and k, before the rotation
    qk_norm_width: bool = False  # norm of q and k over all heads at once, before the rotation
    tied: bool = False  # the head is the embedding
    windows: tuple[int, ...] = field(
        default=()
    )  # [layers] positions that attention sees, 0: all; (): all in every layer
    window_sink: int = 0  # of layers with a window: the first positions, whole blocks of 16, are seen as well,
    window_stride: int = 0  # and every stride-th block; 0: none
    norm: str = "rms"  # rms | layer; of every norm
    norm_bias: bool = False  # layer norms alone
    norm_offset: float = 0.0  # added to the weight of an RMS norm (Gemma: 1)
    pre_norm: bool = True  # a norm before attention and before the MLP
    post_norm: bool = False  # a norm after each, before the residual takes it
    parallel_norms: int = 0  # 0: the MLP reads what attention made; 1 or 2: both read x, by one norm or one each
    carry: float = 0.0  # 0: the residual is x; else the normalised input, times this (ChatGLM-6B, BLOOM's variant)
    embed_norm: bool = False  # a norm of the embedding (BLOOM)
    ropes: tuple[RopeSpec, ...] = ()  # further rotary tables
    rope_layers: tuple[int, ...] = ()  # [layers] 0: `rope`, j: ropes[j - 1], -1: none; (): `rope` in every layer
    learned_positions: int = 0  # rows of the table of positions; 0: none
    position_offset: int = 0  # row of position 0
    alibi: float = 0.0  # what the ALiBi slopes (arXiv 2108.12409) are multiplied by; 0: none
    prefix_token: int = -1  # positions before the first of it in a prompt see each other (ChatGLM-6B); -1: none do
    embed_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and the MLP add
    logit_scale: float = 1.0
    logit_softcap: float = 0.0  # 0: none
    attention_scale: float = 0.0  # of the scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # 0: none
    sinks: bool = False  # a learned score in the softmax of each head that carries no value
    moe: MoeSpec | None = None  # layers whose MLP is a mixture of experts
    pooling: Pooling = Pooling("last")  # of Program `embed`
    headless: bool = False  # the checkpoint brings no head: it embeds, and generates nothing
    mla: MlaSpec | None = None  # attention over a compressed cache
    kv_cache: str = ""  # what K and V are kept as unless the user says otherwise (KV_TYPES); "": by the weights

    @property
    def q_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def scale(self) -> float:
        """What attention scores are multiplied by."""
        return self.attention_scale or float(self.head_dim**-0.5)

    def window(self, layer: int) -> int:
        """Positions that attention of `layer` sees; 0: all."""
        return self.windows[layer] if self.windows else 0

    def static(self, window: int) -> dict[str, int]:
        """What layers of that window see beside it: `sink` and `stride`."""
        return {"sink": self.window_sink, "stride": self.window_stride} if window else {}

    def rope_of(self, layer: int) -> RopeSpec | None:
        """How `layer` rotates q and k; None: not at all."""
        which = self.rope_layers[layer] if self.rope_layers else 0
        return self.rope if which == 0 else self.ropes[which - 1] if which > 0 else None


def check_spec(spec: ModelSpec) -> ModelSpec:
    """`spec` itself if its numbers fit one another; raises FormatError naming the number that does not."""
    check_limits(spec)
    need(1 <= spec.kv_heads <= spec.heads, f"kv_heads is {spec.kv_heads}, allowed 1..{spec.heads}")
    need(spec.heads % spec.kv_heads == 0, f"{spec.heads} heads are no multiple of {spec.kv_heads} key-value heads")
    need(not spec.windows or len(spec.windows) == spec.layers, f"{len(spec.windows)} windows for {spec.layers} layers")
    need(all(w >= 0 for w in spec.windows), f"a sliding window is negative: {min(spec.windows, default=0)}")
    _check_static(spec)
    need(0.0 < spec.norm_eps < 1.0, f"norm_eps is {spec.norm_eps}, allowed above 0 and below 1")
    need(spec.norm in NORMS, f"unknown norm {spec.norm!r}")
    need(spec.norm == "rms" or not spec.norm_offset, "a layer norm has no offset")
    need(spec.norm == "layer" or not spec.norm_bias, "an RMS norm has no bias")
    need(spec.parallel_norms in (0, 1, 2), f"{spec.parallel_norms} norms feed attention and the MLP, allowed 0..2")
    need(not (spec.parallel_norms and not spec.pre_norm), "parallel parts need a norm before them")
    need(spec.mla is None or all(spec.rope_of(i) for i in range(spec.layers)), "latent attention needs a rotation")
    need(not (spec.qk_norm and spec.qk_norm_width), "q and k are normalised by the head or by their width, not both")
    need(spec.norm == "rms" or not spec.qk_norm, "heads of q and k are normalised by RMS alone")
    for name in ("embed_scale", "residual_scale", "logit_scale"):
        need(0.0 < abs(getattr(spec, name)) < 1e9, f"{name} is {getattr(spec, name)}, must be finite and not 0")
    for name in ("logit_softcap", "attention_softcap", "attention_scale", "alibi", "carry"):
        need(0.0 <= getattr(spec, name) < 1e9, f"{name} is {getattr(spec, name)}, must be finite and not negative")
    need(not spec.head_bias or spec.logit_scale == 1.0, "a head with a bias has no scale")
    _check_positions(spec)
    return spec


def _check_static(spec: ModelSpec) -> None:
    sink, stride = spec.window_sink, spec.window_stride
    need(sink >= 0 and sink % 16 == 0, f"the sink of a window is {sink} positions, must be a multiple of 16")
    need(stride >= 0, f"the stride of a window is {stride}, must be 0 or more")
    if sink or stride:
        need(any(spec.windows), "a sink or a stride goes with a window")
        need(not spec.alibi and spec.mla is None, "ALiBi and latent attention take no sink and no stride")


def check_limits(spec: object) -> None:
    """Raises FormatError for a size among LIMITS, where the spec has it, that is damaged or hostile."""
    for name, most in LIMITS.items():
        value = getattr(spec, name, 1)
        need(1 <= value <= most, f"{name} is {value}, allowed 1..{most}")


def _check_positions(spec: ModelSpec) -> None:
    for rope in (spec.rope, *spec.ropes):
        if rope is not None:
            check_rope(rope, spec.mla.rope_dim if spec.mla else spec.head_dim)
    which = spec.rope_layers
    need(not which or len(which) == spec.layers, f"{len(which)} rotary choices for {spec.layers} layers")
    need(all(-1 <= j <= len(spec.ropes) for j in which), f"a layer has no such rotary table: {which}")
    need(spec.learned_positions >= 0 and spec.position_offset >= 0, "learned positions are counted from 0")
    room = spec.learned_positions - spec.position_offset
    need(
        not spec.learned_positions or spec.context_length <= room,
        f"a table of {spec.learned_positions} positions does not reach {spec.context_length}",
    )


def check_rope(rope: RopeSpec, head_dim: int) -> None:
    """Raises FormatError for a rotation that heads of `head_dim` cannot have."""
    need(2 <= rope.dim <= head_dim and rope.dim % 2 == 0, f"rotary width is {rope.dim} for heads of {head_dim}")
    need(rope.scaling in ROPE_SCALINGS, f"unknown rope scaling {rope.scaling!r}")
    _positive(rope, ("theta", "factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow",
                     "attention_factor"))  # fmt: skip
    need(rope.theta > 1.0, f"rope theta is {rope.theta}, must be above 1")
    if rope.scaling in ("dynamic", "llama3", "yarn", "longrope"):
        need(rope.original_context >= 1, f"rope scaling {rope.scaling} needs the original context length")
    if rope.scaling == "dynamic":
        need(rope.dim > 2, f"dynamic rope scaling needs a rotary width above 2, not {rope.dim}")
        need(rope.factor >= 1.0, f"dynamic rope scaling has the factor {rope.factor}, must be 1 or more")
    if rope.scaling == "llama3":
        need(rope.high_freq_factor > rope.low_freq_factor, "rope high_freq_factor must exceed low_freq_factor")
    if rope.scaling in ("factors", "longrope"):
        for factors in (rope.factors, rope.long_factors)[: 1 + (rope.scaling == "longrope")]:
            need(len(factors) == rope.dim // 2, f"{len(factors)} rope factors for {rope.dim // 2} frequencies")
            need(all(0.0 < f < 1e9 for f in factors), "rope factors must be positive and finite")
    need(rope.source in ROPE_SOURCES, f"unknown source of rotary positions {rope.source!r}")
    need(rope.source == "positions" or rope.dim % 4 == 0, f"two-part rotary needs a multiple of 4, not {rope.dim}")


def _positive(rope: RopeSpec, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(rope, name)
        need(0.0 < value < 1e12, f"rope {name} is {value}, must be positive and finite")


def need(condition: bool, message: str) -> None:
    """Raises FormatError with `message` unless `condition` holds."""
    if not condition:
        raise FormatError(f"the model's config does not hold together: {message}", remedy="Check config.json")
