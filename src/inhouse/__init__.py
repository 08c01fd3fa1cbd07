"""Run large language models on your own machines. `inhouse.Engine` is for programs; the command is for people."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inhouse.api import Answer, Engine

__all__ = ["Answer", "Engine"]


def __getattr__(name: str) -> Any:
    """Imports the library's face when it is first asked for, so that `import inhouse.core` stays cheap."""
    if name in __all__:
        from inhouse import api

        return getattr(api, name)
    raise AttributeError(f"module 'inhouse' has no attribute {name!r}")
