"""What K and V are kept as while a model runs, as a checkpoint says it: the key `inhouse_kv_cache` of a config.json,
{"k": "int8", "v": "int4"}, or `inhouse.kv_cache` of a GGUF file, one of `runtime.kv_codes.KV_TYPES`.

A recipe's stage `kv` writes it; `--kv` goes before it. Other programs do not know it and choose for themselves.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.spec import ModelSpec
from inhouse.runtime.kv_codes import KV_TYPES

KEY = "inhouse_kv_cache"
GGUF_KEY = "inhouse.kv_cache"


def kv_type(k: str, v: str) -> str:
    """The KV type of element types for K and for V, as `--kv` writes it; "" where there is none of them."""
    found = k if k == v else f"k={k},v={v}"
    return found if found in KV_TYPES else ""


def kv_parts(kind: str) -> tuple[str, str]:
    """The element types of K and of V."""
    if kind.startswith("k="):
        k, _, v = kind.partition(",")
        return k.removeprefix("k="), v.removeprefix("v=")
    return kind, kind


def kv_key(spec: Spec) -> dict[str, dict[str, str]]:
    """What a config.json says of the spec's KV type: {} where it names none."""
    if not isinstance(spec, ModelSpec) or not spec.kv_cache:
        return {}
    k, v = kv_parts(spec.kv_cache)
    return {KEY: {"k": k, "v": v}}


def split_kv(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """The config without the key, and the KV type that it named, "" where it is absent. Raises FormatError."""
    if KEY not in config:
        return config, ""
    said = config[KEY]
    whole = isinstance(said, Mapping) and set(said) == {"k", "v"} and all(isinstance(one, str) for one in said.values())
    kind = kv_type(said["k"], said["v"]) if whole else ""
    if not kind:
        raise FormatError(f"config.json has {KEY} = {said!r:.80}, expected k and v of {', '.join(KV_TYPES)}", param=KEY)
    return {name: value for name, value in config.items() if name != KEY}, kind


def gguf_kv(config: Mapping[str, Any]) -> str:
    """The KV type that a GGUF file names; "" where it names none. Raises FormatError."""
    said = config.get(GGUF_KEY, "")
    if said and said not in KV_TYPES:
        raise FormatError(f"{GGUF_KEY} is {said!r:.80}, expected one of {', '.join(KV_TYPES)}", param=GGUF_KEY)
    return str(said)


def with_kv(spec: Spec, kind: str) -> Spec:
    """The spec with that KV type. Raises UnsupportedError for a model without K and V of decoded positions."""
    if not kind:
        return spec
    if not isinstance(spec, ModelSpec) or spec.headless:
        raise UnsupportedError(f"{spec.family} writes no text and keeps no K and V", param=KEY)
    return replace(spec, kv_cache=kind)


def without_kv(spec: Spec) -> Spec:
    """The spec with no KV type: what is computed, whatever it is kept as."""
    return replace(spec, kv_cache="") if isinstance(spec, ModelSpec) else spec
