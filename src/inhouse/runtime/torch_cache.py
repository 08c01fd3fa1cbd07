"""Paged K and V in torch, and the rows of a step over them. Engines name blocks; only this file knows their bytes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from inhouse.core.errors import UsageError
from inhouse.runtime.program import Axis, Op, StateGroup, StateKind
from inhouse.runtime.step import BLOCK_SIZE, I32, Step
from inhouse.runtime.torch_attention import Mask, attend_op, visible
from inhouse.runtime.torch_coded import decode_block, encode_block, plane_shapes
from inhouse.runtime.torch_ops import QuantRows, quantize_rows
from inhouse.runtime.torch_program import TorchValue

I64 = npt.NDArray[np.int64]


class _Planes:
    """Tensors [layers, blocks, ...] that together are the blocks of one state group."""

    def __init__(self, group: StateGroup) -> None:
        self.group = group
        self.layers = {layer: i for i, layer in enumerate(group.layers)}
        self._planes: list[Tensor] = []

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Block source[i] onto target[i], all layers; reads everything before it writes."""
        for plane in self._planes:
            plane[:, target] = plane[:, source].clone()

    def save(self, blocks: Tensor) -> npt.NDArray[np.uint8]:
        """uint8 [n, block bytes]: each plane of all layers in turn."""
        parts = [plane[:, blocks].movedim(0, 1).reshape(len(blocks), -1) for plane in self._planes]
        return torch.cat([part.contiguous().view(torch.uint8) for part in parts], dim=1).cpu().numpy()

    def restore(self, blocks: Tensor, data: npt.NDArray[np.uint8]) -> None:
        """What `save` gave; raises UsageError if its size is not that of the blocks."""
        sizes = [plane[:, 0].numel() * plane.element_size() for plane in self._planes]
        expected = (len(blocks), sum(sizes))
        if data.dtype != np.uint8 or data.shape != expected:
            raise UsageError(f"saved blocks are {data.dtype} {list(data.shape)}, expected uint8 {list(expected)}")
        rows = torch.from_numpy(np.array(data))
        for plane, part in zip(self._planes, torch.split(rows, sizes, dim=1), strict=True):
            values = part.contiguous().view(plane.dtype).to(plane.device)
            plane[:, blocks] = values.reshape(len(blocks), plane.shape[0], *plane.shape[2:]).movedim(1, 0)


class CodedCache(_Planes):
    """The blocks of a group of codes: whole blocks only, made from the group of recent positions."""

    def __init__(self, group: StateGroup, blocks: int, device: torch.device) -> None:
        super().__init__(group)
        for shape, dtype in plane_shapes(group):
            self._planes.append(torch.zeros(len(group.layers), blocks, *shape, dtype=dtype, device=device))

    def encode(self, layer: int, blocks: Tensor, k: Tensor, v: Tensor) -> None:
        """Stores blocks k [n, 16, kv_heads, head_dim], v [n, 16, kv_heads, v_dim] as codes."""
        for plane, made in zip(self._planes, encode_block(self.group, k, v), strict=True):
            plane[self.layers[layer]].index_put_((blocks,), made)

    def read(self, layer: int, blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """As GroupCache.read."""
        held = tuple(plane[self.layers[layer]][blocks.flatten()] for plane in self._planes)
        k, v = (x.reshape(len(blocks), -1, *x.shape[2:]) for x in decode_block(self.group, held))
        k, v = (x.masked_fill(~valid[..., None, None], 0.0).transpose(1, 2) for x in (k, v))
        return k, v


class GroupCache(_Planes):
    """The blocks of one state group: K [layers, blocks, BLOCK_SIZE, kv_heads, head_dim], V likewise (a latent group
    keeps none: there V is the first v_dim elements of K); int8: with scales, the last axis 1, behind each of them."""

    def __init__(self, group: StateGroup, blocks: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(group)
        self._latent = group.kind is StateKind.LATENT
        shape = (len(group.layers), blocks, BLOCK_SIZE, group.kv_heads)
        self._codes = dtype is torch.int8
        for width in (group.head_dim,) if self._latent else (group.head_dim, group.v_dim):
            self._planes.append(torch.zeros(*shape, width, dtype=dtype, device=device))
            if self._codes:
                self._planes.append(torch.zeros(*shape, 1, dtype=torch.float32, device=device))

    def write(self, layer: int, blocks: Tensor, slots: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Stores rows k, v [n, width] at (block, slot) [n], rounded to the cache's type; latent: v is None."""
        i = self.layers[layer]
        values = [x for rows in ((k,) if v is None else (k, v)) for x in self._stored(rows)]
        for plane, value in zip(self._planes, values, strict=True):
            plane[i].index_put_((blocks, slots), value)

    def whole(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Blocks [n] as they are kept: K, V [n, BLOCK_SIZE, kv_heads, D]."""
        k, v = (plane[self.layers[layer]][blocks] for plane in self._planes)
        return k, v

    def _stored(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Rows [n, width] as the planes keep them: [n, kv_heads, D] in the cache's type, for int8 with the scales."""
        heads = rows.reshape(rows.shape[0], self.group.kv_heads, -1)
        if not self._codes:
            return (heads.to(self._planes[0].dtype),)
        quantized = quantize_rows(heads.flatten(0, 1))
        return quantized.codes.reshape(heads.shape), quantized.scales.reshape(*heads.shape[:2], 1)

    def read(self, layer: int, blocks: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """blocks [n, m], valid [n, m * BLOCK_SIZE] -> K, V [n, kv_heads, m * BLOCK_SIZE, D]; what is not valid is
        zero, because memory of a sequence that is gone may hold anything, NaN included."""
        i, found = self.layers[layer], []
        step = 2 if self._codes else 1
        for at in range(0, len(self._planes), step):
            rows = self._planes[at][i][blocks].flatten(1, 2)
            if self._codes:
                rows = rows.float() * self._planes[at + 1][i][blocks].flatten(1, 2)
            found.append(rows.masked_fill(~valid[..., None, None], 0.0).transpose(1, 2))
        return found[0], found[0][..., : self.group.v_dim] if self._latent else found[1]


@dataclass(frozen=True, slots=True)
class _Plan:
    """What n sequences with Q rows each attend: m blocks of keys."""

    rows: Tensor  # int64 [n, Q] rows of the step
    blocks: Tensor  # int64 [n, m]
    valid: Tensor  # bool [n, m * BLOCK_SIZE]: written, by this sequence
    seen: Tensor  # bool [n, Q, m * BLOCK_SIZE]
    positions: tuple[Tensor, Tensor]  # int64 of queries [n, Q] and keys [n, m * BLOCK_SIZE]


def _lent(group: str, blocks: I32) -> I32:
    if blocks.size and blocks.min() < 0:
        raise UsageError(f"the step lends no block of {group} where it stores")
    return blocks


class StepRows:
    """The rows of one step; implements `torch_program.Rows`. All index arithmetic is numpy, on the host."""

    def __init__(
        self,
        step: Step,
        caches: Mapping[str, GroupCache | CodedCache],
        device: torch.device,
        adapters: Mapping[int, Mapping[str, tuple[Tensor, Tensor]]] | None = None,
    ) -> None:
        self._step, self._caches, self._device = step, caches, device
        self._adapters = {slot: (adapters or {})[slot] for slot in set(step.adapters.tolist()) - {0}}
        self._counts = np.bincount(step.sequences, minlength=step.lengths.size)  # rows of each sequence
        self._starts = np.concatenate([[0], np.cumsum(self._counts)])[:-1]  # first row of each sequence
        self._stored: dict[str, tuple[Tensor, Tensor]] = {}
        self._planned: dict[tuple[str, Mask, bool], list[_Plan]] = {}

    def ids(self, source: str, axis: Axis) -> Tensor:
        if axis is not Axis.TOKENS:
            raise UsageError(f"a step has no ids of axis {axis}")
        if source == "prefixes":
            return self._to(self._step.prefixes[self._step.sequences])
        arrays = {"tokens": self._step.tokens, "positions": self._step.positions, "types": self._step.types}
        return self._to(arrays[source])

    def select(self, x: Tensor) -> Tensor:
        return x[self._to(self._step.sampled)]

    def sequences(self, axis: Axis) -> tuple[Tensor, int]:
        return self._to(self._step.sequences), self._step.lengths.size

    def attention(self, op: Op, inputs: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Tensor:
        cache = self._caches[str(op.attrs["recent"] or op.attrs["group"])]
        assert isinstance(cache, GroupCache)
        if not op.attrs["cross"]:
            v = None if op.attrs["v_from_k"] else inputs[2]
            cache.write(op.layer, *self._slots(cache.group.name), inputs[1], v)
        parts: list[GroupCache | CodedCache] = [cache]
        if op.attrs["recent"]:
            parts.insert(0, self._encode(op, cache))
        q, heads = inputs[0], int(op.attrs["heads"])
        out = q.new_empty(q.shape[0], heads * int(op.attrs["v_dim"]))
        for plans in zip(*(self._plans(op, part) for part in parts), strict=True):
            held = [part.read(op.layer, plan.blocks, plan.valid) for part, plan in zip(parts, plans, strict=True)]
            k, v = (torch.cat([pair[i].float() for pair in held], dim=2) if held[1:] else held[0][i] for i in (0, 1))
            rows, queries = plans[0].rows, plans[0].positions[0]
            seen = torch.cat([plan.seen for plan in plans], dim=2)
            at = (queries, torch.cat([plan.positions[1] for plan in plans], dim=1))
            mine = q[rows].reshape(*rows.shape, heads, -1).transpose(1, 2)
            y = attend_op(op, mine, k, v, seen, at, weights)
            out[rows] = y.transpose(1, 2).flatten(2)
        return out

    def _encode(self, op: Op, recent: GroupCache) -> CodedCache:
        """Blocks whose last position is a row of this step become codes."""
        cache = self._caches[str(op.attrs["group"])]
        assert isinstance(cache, CodedCache)
        rows = np.flatnonzero(self._step.positions % BLOCK_SIZE == BLOCK_SIZE - 1)
        if rows.size:
            at = (self._step.sequences[rows], self._step.positions[rows] // BLOCK_SIZE)
            source, target = (self._step.tables[part.group.name][at] for part in (recent, cache))
            k, v = recent.whole(op.layer, self._to(_lent(recent.group.name, source)))
            cache.encode(op.layer, self._to(_lent(cache.group.name, target)), k, v)
        return cache

    def write_cross(self, op: Op, k: Tensor, v: Tensor) -> None:
        cache = self._caches[str(op.attrs["group"])]
        assert isinstance(cache, GroupCache)
        cache.write(op.layer, *self._slots(cache.group.name), k, v)

    def adapt(self, op: Op, x: TorchValue, made: Sequence[Tensor]) -> Sequence[Tensor]:
        if not self._adapters:
            return made
        axis = op.inputs[0].axis
        owners = np.arange(self._step.lengths.size) if axis is Axis.SEQUENCES else self._step.sequences
        owners = owners[self._step.sampled] if axis is Axis.SAMPLED else owners
        slots = self._step.adapters[owners]
        floats = x.dequantize() if isinstance(x, QuantRows) else x.float()
        out = [y.clone() for y in made]
        for slot, held in self._adapters.items():
            rows = self._to(np.flatnonzero(slots == slot))
            for y, name in zip(out, op.weights, strict=False):
                if name in held:
                    a, b = held[name]
                    y[rows] += ((floats[rows] @ a.T) @ b.T).to(y.dtype)
        return out

    def _slots(self, group: str) -> tuple[Tensor, Tensor]:
        """(block, slot) [T] of each row of the step; the same for every layer of a group."""
        if group not in self._stored:
            positions = self._step.positions
            blocks = _lent(group, self._step.tables[group][self._step.sequences, positions // BLOCK_SIZE])
            self._stored[group] = self._to(blocks), self._to(positions % BLOCK_SIZE)
        return self._stored[group]

    def _plans(self, op: Op, cache: GroupCache | CodedCache) -> list[_Plan]:
        """Sequences with as many rows go together; the same for every layer of a group and mask."""
        cross, part = bool(op.attrs["cross"]), cache.group
        mask = Mask.of(op)
        if op.attrs["recent"]:
            mask = replace(mask, coded=bool(part.k_bits), recent=self._recent(op))
        key = (part.name, mask, cross)
        if key not in self._planned:
            counts = np.unique(self._counts[self._counts > 0]).tolist()
            self._planned[key] = [self._plan(part.name, count, mask, cross) for count in counts]
        return self._planned[key]

    def _recent(self, op: Op) -> int:
        return self._caches[str(op.attrs["recent"])].group.window - 1

    def _plan(self, group: str, count: int, mask: Mask, cross: bool) -> _Plan:
        which = np.flatnonzero(self._counts == count)
        rows = self._starts[which][:, None] + np.arange(count)
        positions = self._step.positions[rows]
        lengths = (self._step.encoder_lengths if cross else self._step.lengths)[which]
        blocks, keys, lent = self._key_blocks(group, which, positions[:, 0], lengths, mask)
        valid = self._to((keys < lengths[:, None]) & lent)
        at = (self._to(positions), self._to(keys))
        seen = valid[:, None, :].expand(-1, count, -1)
        if not cross:
            seen = seen & visible(*at, mask, self._to(self._step.prefixes[which]))
        return _Plan(self._to(rows), self._to(blocks), valid, seen, at)

    def _key_blocks(
        self, group: str, which: I64, first_query: I32, lengths: I32, mask: Mask
    ) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.integer], npt.NDArray[np.bool_]]:
        """(block ids [n, m], positions of their slots [n, m * BLOCK_SIZE], whether they are lent) from the first key
        that is seen on."""
        start = np.zeros_like(first_query)
        if mask.window and not (mask.sink or mask.stride):
            start = np.maximum(first_query - mask.window + 1, 0) // BLOCK_SIZE
        if mask.recent and not mask.coded:
            start = np.maximum(first_query - mask.recent, 0) // BLOCK_SIZE
        ends = -(-lengths // BLOCK_SIZE)
        columns = start[:, None] + np.arange(max(int((ends - start).max()), 1))
        table = self._step.tables[group]
        blocks = table[which[:, None], np.minimum(columns, table.shape[1] - 1)]
        keys = columns[..., None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)
        return np.maximum(blocks, 0), keys.reshape(which.size, -1), np.repeat(blocks >= 0, BLOCK_SIZE, axis=1)

    def _to(self, array: npt.NDArray[np.generic]) -> Tensor:
        """On the device; integers as int64, which indexing needs."""
        wide = array if array.dtype == np.bool_ else array.astype(np.int64)
        return torch.from_numpy(np.ascontiguousarray(wide)).to(self._device)
