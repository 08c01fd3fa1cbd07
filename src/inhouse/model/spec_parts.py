"""Parts of a decoder that have a spec of their own: mixtures of experts, and attention over a compressed cache.

Numbers alone, like `model.spec`; what they compute is in `model.moe` and `model.mla`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MoeSpec:
    """A mixture of experts in place of the MLP. How `route` chooses is told by the attributes that it has there."""

    layers: tuple[int, ...]  # that have it
    experts: int
    top_k: int
    ffn: int  # of one expert
    activation: str = "silu"
    scoring: str = "softmax"  # softmax | sigmoid | softmax_after | sparsemixer
    normalize: bool = True  # weights of the chosen experts divided by their sum
    scale: float = 1.0  # of those weights
    groups: int = 0  # experts are in so many runs, 0: one
    top_groups: int = 0  # runs that experts are chosen from
    group_score: str = "max"  # what a run counts as: its best expert (max), its two best (top2)
    correction: bool = False  # a number for each expert that is added for the choice alone
    jitter: float = 0.0  # sparsemixer alone
    router_bias: bool = False
    expert_bias: bool = False
    limit: float = 0.0  # of gate and up, 0: none (gpt-oss: 7)
    offset: float = 0.0  # added to up (gpt-oss: 1)
    shared_ffn: int = 0  # of the expert that every token takes; 0: none
    shared_gate: bool = False  # its output times the sigmoid of a number that the token gives


@dataclass(frozen=True, slots=True)
class MlaSpec:
    """Multi-head latent attention (arXiv 2405.04434)."""

    q_rank: int  # 0: q is not compressed
    kv_rank: int
    nope_dim: int  # of a head's q and k, not rotated
    rope_dim: int  # rotated; its k is shared by all heads
    v_dim: int
    norm_eps: float = 1e-6  # of the compressed q and kv
    bias: bool = False  # of the projections that compress, and of the output's
    mscale: float = 1.0  # what YaRN multiplies the scores' scale by
