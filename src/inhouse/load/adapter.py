"""Reading LoRA adapters: a PEFT folder or a GGUF adapter file to what executors add to canonical linears.

Knows both file forms and how families name their tensors; does not know engines. A base may be of the other format than
its adapter. What cannot be honoured (DoRA, trained embeddings, biases, whole modules) is an error, never left out.
"""

import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.model.build import Spec
from inhouse.model.families.family import Derive, Family
from inhouse.runtime.adapters import Adapter, LowRank
from inhouse.store.source import materialise, open_source, read_json

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
CONFIG_BYTES = 1 << 20
F32 = npt.NDArray[np.float32]

# Keys of adapter_config.json that describe training or bookkeeping and never what is added.
_INERT = frozenset(
    "auto_mapping base_model_name_or_path revision task_type inference_mode peft_version lora_dropout target_modules "
    "exclude_modules layers_to_transform layers_pattern init_lora_weights loftq_config eva_config corda_config "
    "lora_ga_config megatron_config megatron_core runtime_config qalora_group_size arrow_config "
    "ensure_weight_tying peft_type fan_in_fan_out r lora_alpha rank_pattern alpha_pattern use_rslora".split()
)
# Keys that would change it, with the values at which they do not.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "bias": ("none",), "use_dora": (False,), "use_qalora": (False,), "lora_bias": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}), "layer_replication": (None, []), "alora_invocation_tokens": (None, []),
    "target_parameters": (None, []), "use_bdlora": (None, False), "velora_config": (None,),
    "monteclora_config": (None,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter that fits a model."""

    adapter: Adapter
    digest: str  # of its tensors and scales, as they are applied
    rank: int  # the largest
    format: str  # peft | gguf

    @property
    def nbytes(self) -> int:
        return sum(low.nbytes for low in self.adapter.values())


@dataclass(frozen=True, slots=True)
class _Pair:
    """What the file has for one of its modules: a [rank, in], b [out, rank], and the scale of their product."""

    a: F32
    b: F32
    scale: float


_Target = tuple[str, Derive]


def read_adapter(path: Path, family: Family, spec: Spec, derived: Mapping[str, Derive]) -> LoadedAdapter:
    """Reads an adapter for a model.

    Args:
        path: a PEFT folder, or a GGUF file of `general.type` adapter.
        family, spec: of the base.
        derived: canonical name -> where the base's own checkpoint has it.

    Raises:
        NotFoundError: there is none. FormatError: it is damaged or belongs to another model.
        UnsupportedError: it does more than add low-rank products to linear layers; the message names what.
    """
    if path.is_dir():
        pairs, kind = _peft(path), "peft"
    elif path.suffix == ".gguf" and path.is_file():
        pairs, kind = _gguf(path), "gguf"
    else:
        raise NotFoundError(
            f"no adapter at {path}", remedy=f"Name a PEFT folder (with {CONFIG}) or a GGUF adapter file", param="path"
        )
    adapter = _place(pairs, _tables(family, spec, derived, gguf=kind == "gguf"))
    return LoadedAdapter(adapter, _digest(adapter), max(low.a.shape[0] for low in adapter.values()), kind)


def _tables(family: Family, spec: Spec, derived: Mapping[str, Derive], *, gguf: bool) -> list[dict[str, list[_Target]]]:
    """Names under which the adapter's format may know modules: as the base's checkpoint has them, else as the family
    names them in that format."""
    return [
        _by_source(derived.items(), family.prefix),
        _by_source(family.places(spec, gguf=gguf).items(), family.prefix),
    ]


def _by_source(derived: Iterable[_Target], prefix: str) -> dict[str, list[_Target]]:
    out: dict[str, list[_Target]] = {}
    for name, derive in derived:
        if len(derive.shape) == 2:
            source = derive.source.removesuffix(".weight")
            for alias in {source, source.removeprefix(prefix), prefix + source}:
                out.setdefault(alias, []).append((name, derive))
    return out


def _place(pairs: Mapping[str, _Pair], tables: list[dict[str, list[_Target]]]) -> dict[str, LowRank]:
    """Each module's pair at the canonical weights that lie in its tensor."""
    out: dict[str, LowRank] = {}
    for module, pair in pairs.items():
        targets = next((table[module] for table in tables if module in table), None)
        if targets is None:
            raise FormatError(
                f"the adapter changes {module}, which this model does not have",
                remedy="The adapter belongs to another model", param=module,
            )  # fmt: skip
        for name, derive in targets:
            rows = _rows(derive, module)
            total = derive.source_shape[1 if derive.transpose else 0]
            if pair.b.shape[0] != total or pair.a.shape[1] != derive.shape[1]:
                raise FormatError(
                    f"the adapter of {module} is for a matrix {(pair.b.shape[0], pair.a.shape[1])}, the model's is "
                    f"{(total, derive.shape[1])}",
                    remedy="The adapter belongs to another model", param=module,
                )  # fmt: skip
            b = pair.b if rows is None else pair.b[rows]
            out[name] = LowRank(pair.a, np.ascontiguousarray(b * np.float32(pair.scale)))
    return out


def _rows(derive: Derive, module: str) -> npt.NDArray[np.int64] | None:
    """Outputs of the file's matrix that are the weight's rows, in order; None for all as they are."""
    if derive.heads or (derive.transpose and derive.part is not None) or len(derive.source_shape) > 2:
        raise UnsupportedError(f"an adapter cannot change {module}: its matrix is taken apart", param=module)
    return derive.outputs()


def _digest(adapter: Adapter) -> str:
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(adapter):
        state.update(name.encode() + adapter[name].a.tobytes() + adapter[name].b.tobytes())
    return state.hexdigest()


# ---- PEFT ------------------------------------------------------------------------------------------------------------

_PEFT_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")


def _peft(folder: Path) -> dict[str, _Pair]:
    config = read_json(folder / CONFIG, CONFIG_BYTES)
    _check_config(config)
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise NotFoundError(f"{folder} has no {' or '.join(WEIGHTS)}", remedy="Fetch the whole adapter again")
    with_sides = _sides(open_source(weights), _PEFT_NAME)
    return {module: _Pair(a, b, _peft_scale(config, module, a.shape[0])) for module, (a, b) in with_sides.items()}


def _check_config(config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(
            f"the adapter is of type {config.get('peft_type')!r}, only LORA is known", param="peft_type"
        )
    for key, value in config.items():
        if key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                raise UnsupportedError(f"{CONFIG} has {key} = {value!r}, which is not supported", param=key)
        elif key not in _INERT and value not in (None, False, [], {}, ""):
            raise UnsupportedError(f"{CONFIG} has the unknown key {key} = {value!r}", param=key)


def _peft_scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """lora_alpha / r, or / sqrt(r) with use_rslora; patterns name modules by the end of their names."""
    stated = _pattern(config, "rank_pattern", module, config.get("r"))
    alpha = _pattern(config, "alpha_pattern", module, config.get("lora_alpha"))
    if isinstance(stated, bool) or stated != rank:
        raise FormatError(f"{CONFIG} says rank {stated} for {module}, its tensors have {rank}", param="r")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise FormatError(f"{CONFIG} has lora_alpha = {alpha!r}, expected a number", param="lora_alpha")
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def _pattern(config: Mapping[str, Any], key: str, module: str, default: Any) -> Any:
    for pattern, value in (config.get(key) or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", module):
                return value
        except re.error as error:
            raise FormatError(f"{CONFIG} has the ill-formed pattern {pattern!r} in {key}", param=key) from error
    return default


# ---- GGUF ------------------------------------------------------------------------------------------------------------

_GGUF_NAME = re.compile(r"(?P<module>.+)\.weight\.lora_(?P<side>[ab])")


def _gguf(path: Path) -> dict[str, _Pair]:
    source = open_source(path)
    kind, form = source.metadata.get("general.type"), source.metadata.get("adapter.type")
    if (kind, form) != ("adapter", "lora"):
        source.close()
        raise FormatError(f"{path.name} is a GGUF of type {kind!r} / {form!r}, not a LoRA adapter")
    alpha = source.metadata.get("adapter.lora.alpha", 0.0)
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        source.close()
        raise FormatError(f"{path.name} has adapter.lora.alpha = {alpha!r}, expected a number")
    pairs = _sides(source, _GGUF_NAME)
    return {m: _Pair(a, b, float(alpha) / a.shape[0] if alpha else 1.0) for m, (a, b) in pairs.items()}


def _sides(source: TensorSource, pattern: re.Pattern[str]) -> dict[str, tuple[F32, F32]]:
    """Module -> its two matrices; closes the source. Raises what makes an adapter more than that."""
    found: dict[str, dict[str, F32]] = {}
    try:
        for name in source:
            match = pattern.fullmatch(name)
            if match is None:
                raise UnsupportedError(f"the adapter has the tensor {name}, which is no part of plain LoRA", param=name)
            values = materialise(source, name)
            if values.ndim != 2 or not np.isfinite(values).all():
                raise FormatError(f"the adapter's tensor {name} is no finite matrix", param=name)
            found.setdefault(match["module"], {})[match["side"].upper()] = np.ascontiguousarray(values, np.float32)
    finally:
        source.close()
    if not found:
        raise FormatError("the adapter has no tensors", remedy="Fetch the whole adapter again")
    for module, sides in found.items():
        if set(sides) != {"A", "B"} or sides["A"].shape[0] != sides["B"].shape[1]:
            shapes = {side: m.shape for side, m in sides.items()}
            raise FormatError(f"the adapter's matrices of {module} do not go together: {shapes}", param=module)
    return {module: (sides["A"], sides["B"]) for module, sides in found.items()}
