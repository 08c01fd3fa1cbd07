"""The key `inhouse_attention` of a config.json: attention narrowed by a recipe, beside what the family itself says.

{"window": W, "sink": S, "stride": K}: every layer sees the last W positions (one that sees fewer stays), the first S
(whole blocks of 16) and every K-th block of 16; sink and stride may be left out.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inhouse.core.errors import FormatError, UnsupportedError
from inhouse.model.build import Spec
from inhouse.model.spec import ModelSpec, check_spec

KEY = "inhouse_attention"
PARTS = ("window", "sink", "stride")


def attention_key(window: int, sink: int = 0, stride: int = 0) -> dict[str, dict[str, int]]:
    """What a config.json says so."""
    return {KEY: {"window": window, "sink": sink, "stride": stride}}


def split_key(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], Any]:
    """The config without the key, and what it held; None where it is absent."""
    if KEY not in config:
        return config, None
    return {name: value for name, value in config.items() if name != KEY}, config[KEY]


def narrow(spec: Spec, said: Any) -> Spec:
    """The spec with its attention narrowed. Raises FormatError for a key that is damaged, UnsupportedError for a model
    that cannot be narrowed so."""
    if said is None:
        return spec
    if not isinstance(said, dict) or set(said) - set(PARTS) or not all(_is_size(value) for value in said.values()):
        raise FormatError(f"config.json has {KEY} = {said!r}, expected sizes of {', '.join(PARTS)}", param=KEY)
    window, sink, stride = (int(said.get(name, 0)) for name in PARTS)
    if window < 1:
        raise FormatError(f"config.json has {KEY} with window {window}, expected 1 or more", param=KEY)
    if not isinstance(spec, ModelSpec) or spec.mla is not None or spec.prefix_token >= 0:
        raise UnsupportedError(f"{KEY} is for decoders whose attention is causal and not latent", param=KEY)
    if any(spec.windows) and (sink or stride):
        raise UnsupportedError(f"{KEY}: a model whose own layers slide takes no sink and no stride", param=KEY)
    windows = tuple(min(spec.window(i) or window, window) for i in range(spec.layers))
    return check_spec(replace(spec, windows=windows, window_sink=sink, window_stride=stride))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
