"""Several checkpoints as one: the tensors of the first, and those of others behind a prefix. Knows no format."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from inhouse.core.errors import NotFoundError
from inhouse.core.tensors import TensorInfo, TensorSource
from inhouse.store.mapping import MappedSource


class JoinedSource(MappedSource):
    """A TensorSource over sources that it owns.

    Args:
        main: gives format and metadata. others: prefix of the names -> source.
    """

    def __init__(self, main: TensorSource, others: Mapping[str, TensorSource]) -> None:
        self._sources = (main, *others.values())
        self._main = main
        self._places = {name: (main, name) for name in main}
        for prefix, source in others.items():
            self._places |= {prefix + name: (source, name) for name in source}
        mapped = [source for source in self._sources if isinstance(source, MappedSource)]
        self.mappings = tuple(mapping for source in mapped for mapping in source.mappings)

    @property
    def format(self) -> str:
        return self._main.format

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self._main.metadata

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def info(self, name: str) -> TensorInfo:
        """See TensorSource."""
        source, inner = self._find(name)
        return replace(source.info(inner), name=name)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """See TensorSource."""
        source, inner = self._find(name)
        return source.raw(inner)

    def close(self) -> None:
        """See TensorSource."""
        for source in self._sources:
            source.close()

    def _find(self, name: str) -> tuple[TensorSource, str]:
        if name not in self._places:
            raise NotFoundError(f"the checkpoint has no tensor {name!r}", param=name)
        return self._places[name]
