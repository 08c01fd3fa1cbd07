"""Run large language models on your own machines. `inhouse.Engine` is for programs; the command is for people."""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from inhouse.api import Answer, Engine

__all__ = ["Answer", "Engine"]


def __getattr__(name: str) -> Any:
    """Imports the library's face when it is first asked for, so that `import inhouse.core` stays cheap."""
    if name in __all__:
        from inhouse import api

        return getattr(api, name)
    if name == "compress":
        return importlib.import_module("inhouse.compress")
    raise AttributeError(f"module 'inhouse' has no attribute {name!r}")


class _Verb(ModuleType):
    """`inhouse.compress` is a room of the house, and called it is `inhouse.api.compress`."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from inhouse import api

        return api.compress(*args, **options)


class _Face(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "compress" and isinstance(value, ModuleType):  # the import system binds the room
            value.__class__ = _Verb
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
