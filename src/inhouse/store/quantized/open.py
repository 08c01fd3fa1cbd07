"""The door to quantised Hugging Face checkpoints: quantization_config says which reader shows their linears."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from inhouse.core.errors import FormatError, NotFoundError, UnsupportedError
from inhouse.core.tensors import TensorSource
from inhouse.store.quantized.awq import open_awq
from inhouse.store.quantized.bnb import open_bnb
from inhouse.store.quantized.compressed import open_compressed
from inhouse.store.quantized.config import QuantConfig
from inhouse.store.quantized.float4 import open_mxfp4
from inhouse.store.quantized.float8 import open_float8
from inhouse.store.quantized.gptq import open_gptq
from inhouse.store.quantized.source import QuantizedSource
from inhouse.store.strict_json import read_json

_READERS: Mapping[str, Callable[[TensorSource, QuantConfig], QuantizedSource]] = {
    "gptq": open_gptq,
    "awq": open_awq,
    "compressed-tensors": open_compressed,
    "fp8": open_float8,
    "fbgemm_fp8": open_float8,
    "bitsandbytes": open_bnb,
    "mxfp4": open_mxfp4,
}
CONFIG_KEYS = ("quantization_config", "compression_config")  # the second is the older name
_SIDE_FILES = ("quantize_config.json", "quant_config.json")  # of AutoGPTQ and AutoAWQ, before config.json had the key
_CONFIG_BYTES = 16 << 20


def quant_config(config: Mapping[str, Any], folder: Path, names: Iterable[str]) -> Mapping[str, Any] | None:
    """What a model says of its quantisation, in config.json or, if tensors are named so, in a file beside it; None if
    nothing. Raises FormatError."""
    for key in CONFIG_KEYS:
        if config.get(key) is not None:
            if not isinstance(config[key], dict):
                raise FormatError(f"config.json has {key} = {str(config[key])[:60]!r}, expected an object", param=key)
            return dict(config[key])
    if not any(name.endswith(".qweight") for name in names):
        return None
    for name, method in zip(_SIDE_FILES, ("gptq", "awq"), strict=True):
        try:
            return {"quant_method": method, **read_json(folder / name, _CONFIG_BYTES)}
        except NotFoundError:
            continue
    return None


def open_quantized(source: TensorSource, values: Mapping[str, Any]) -> QuantizedSource:
    """A source that shows quantised linears as tensors [out, in].

    Raises UnsupportedError for a method or key that is not read, FormatError where the tensors do not fit the config.
    """
    method = values.get("quant_method")
    if method is None and (values.get("load_in_4bit") or values.get("load_in_8bit")):
        method = "bitsandbytes"
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise UnsupportedError(
            f"quantization_config has quant_method = {str(method)[:40]!r}, which is not read",
            remedy=f"Read are {', '.join(_READERS)}, and GGUF files.",
            param="quant_method",
        )
    return reader(source, QuantConfig(values))
