"""The one place that makes executors, by name. torch is imported when the torch executor is asked for, never before."""

from collections.abc import Mapping
from importlib import import_module
from typing import cast

from inhouse.core.errors import UnavailableError, UnsupportedError, UsageError
from inhouse.runtime.executor import Executor, Weight
from inhouse.runtime.kv_codes import KV_TYPES
from inhouse.runtime.program import ProgramSet

NAMES = ("native", "torch")


def create(
    name: str,
    programs: ProgramSet,
    weights: Mapping[str, Weight],
    *,
    kv_dtype: str,
    threads: int | None = None,
    device: str = "cpu",
) -> Executor:
    """An executor over a model's weights.

    Args:
        name: `native` or `torch`.
        kv_dtype: one of KV_TYPES (runtime/kv_codes.py).
        threads: of the native executor; None: what the machine or its cgroup grants.
        device: of the torch executor.

    Raises:
        UsageError: an unknown name or type. UnsupportedError: a device for the native executor.
        UnavailableError: torch is not installed, or the native library lacks.
    """
    if name not in NAMES:
        raise UsageError(f"unknown executor {name!r}", remedy=f"Use {' or '.join(NAMES)}.", param="executor")
    if kv_dtype not in KV_TYPES:
        raise UsageError(f"unknown KV type {kv_dtype!r}", remedy=f"Use {', '.join(KV_TYPES)}.", param="kv_dtype")
    if name == "native":
        if device != "cpu":
            raise UnsupportedError(
                f"the native executor runs on the CPU, not on {device!r}",
                remedy="Use --executor torch.",
                param="device",
            )
        native = import_module("inhouse.runtime.native")
        return cast(Executor, native.NativeExecutor(programs, weights, threads=threads, kv_dtype=kv_dtype))
    try:
        module = import_module("inhouse.runtime.torch_executor")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise UnavailableError(
            "torch is not installed", remedy="Install the extra: pip install 'inhouse[torch]'.", param="executor"
        ) from None
    return cast(Executor, module.TorchExecutor(programs, weights, device=device, kv_dtype=kv_dtype))
