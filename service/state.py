"""The decoder's state: named buffers with rows on axis 0, allocated, grown, moved and freed by description only.

Rows are dense at the front, so n rows are the prefix of each buffer. The axis named `source_capacity` or
`target_capacity` has one length for all rows, which climbs a ladder; climbing is a copy, and is counted. With no row
left both fall back to their first rung and the memory is given back. Memory is asked for in `reserve` (and where a
device moves rows for the first time), so that nothing else fails for want of it.

What a row holds beyond its own length along a capacity is undefined (finite, never NaN): a graph has to mask it, and
moves leave it behind. This module knows nothing of attention, of ONNX Runtime, or of what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from service.artifact import StateTensor
from service.ladder import Ladder

Array = npt.NDArray[Any]
Rows = npt.NDArray[np.int64]


class Block(Protocol):
    """Contiguous memory of one tensor, on the host or on a device, zeros at first."""

    @property
    def pointer(self) -> int:
        """Address of the first element."""

    def read(self) -> Array:
        """The contents as an array on the host: the memory itself if it is there, else a copy."""

    def write(self, contents: Array) -> None:
        """Put an array of the block's shape in its place; nothing to do if it is what `read` gave on the host."""


Allocate = Callable[[tuple[int, ...], np.dtype[Any]], Block]


class HostBlock:
    """A block in the process's own memory."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._array: Array = np.zeros(shape, dtype)  # zeroed pages: no NaN, and no memory used until touched
        self.pointer: int = self._array.ctypes.data

    def read(self) -> Array:
        """The memory itself."""
        return self._array

    def write(self, contents: Array) -> None:
        """Copy, unless it is in place already."""
        if contents is not self._array:
            self._array[...] = contents


@dataclass(slots=True)
class _Buffer:
    tensor: StateTensor
    dtype: np.dtype[Any]
    row_shape: tuple[int, ...]
    lent: Block | None  # None until memory is asked for
    spare: Block | None = None  # where a gather writes, on devices

    @property
    def row_nbytes(self) -> int:
        return math.prod(self.row_shape) * self.dtype.itemsize

    @property
    def block(self) -> Block:
        assert self.lent is not None, "reserve comes before use"
        return self.lent


class State:
    """The state of all running rows.

    `gather(state, rows_from, names)` moves rows of these tensors where the host cannot: it reads each one's `pointer`
    and writes its `spare_pointer`. Without it rows are moved in place, by numpy.
    """

    def __init__(
        self,
        tensors: list[tuple[StateTensor, np.dtype[Any]]],
        *,
        max_rows: int,
        source: Ladder,
        target: Ladder,
        allocate: Allocate = HostBlock,
        gather: Callable[[State, Rows, list[str]], None] | None = None,
    ) -> None:
        self.max_rows = max_rows
        self.rows = 0
        self.growths = 0
        """How often a capacity was climbed with rows to copy."""
        self._ladders = {"source_capacity": source, "target_capacity": target}
        self._capacity = {symbol: ladder.first for symbol, ladder in self._ladders.items()}
        self._allocate = allocate
        self._gather = gather
        self._generation = 0
        self._swapped = (False, False)  # of tensors of kind source, of the others
        self._buffers: dict[str, _Buffer] = {}
        for tensor, dtype in tensors:
            row_shape = _row_shape(tensor, self._capacity)
            self._buffers[tensor.name] = _Buffer(tensor, dtype, row_shape, allocate((max_rows, *row_shape), dtype))

    # ---- what is there ----

    @property
    def source_capacity(self) -> int:
        """Length of the axis of source positions."""
        return self._capacity["source_capacity"]

    @property
    def target_capacity(self) -> int:
        """Length of the axis of target positions."""
        return self._capacity["target_capacity"]

    @property
    def layout(self) -> tuple[int, tuple[bool, bool]]:
        """Equal as long as every pointer and shape is; what was bound under another layout is stale."""
        return self._generation, self._swapped

    @property
    def names(self) -> list[str]:
        """The tensors' names."""
        return list(self._buffers)

    @property
    def nbytes(self) -> int:
        """Memory of the buffers now, in bytes."""
        buffers = self._buffers.values()
        return self.max_rows * sum(buffer.row_nbytes * (1 if buffer.spare is None else 2) for buffer in buffers)

    @property
    def max_nbytes(self) -> int:
        """Memory that the buffers can ever take, in bytes: all at the last rung, one old block of the largest beside
        its new one while it is copied, and all twice where rows are moved by gathering."""
        largest = {symbol: ladder.last for symbol, ladder in self._ladders.items()}
        sizes = [
            self.max_rows * math.prod(_row_shape(buffer.tensor, largest)) * buffer.dtype.itemsize
            for buffer in self._buffers.values()
        ]
        return sum(sizes) * (1 if self._gather is None else 2) + max(sizes, default=0)

    def shape(self, name: str, rows: int) -> tuple[int, ...]:
        """The shape of a prefix, or of any run, of rows."""
        return (rows, *self._buffers[name].row_shape)

    def dtype(self, name: str) -> np.dtype[Any]:
        """The element type."""
        return self._buffers[name].dtype

    def pointer(self, name: str, row: int = 0) -> int:
        """Address of a row."""
        buffer = self._buffers[name]
        return buffer.block.pointer + row * buffer.row_nbytes

    def spare_pointer(self, name: str) -> int:
        """Address of the second block, into which a gather writes."""
        spare = self._buffers[name].spare
        assert spare is not None
        return spare.pointer

    def read(self, name: str) -> Array:
        """The rows in use, on the host."""
        return self._buffers[name].block.read()[: self.rows]

    # ---- what changes it ----

    def reserve(self, *, source: int = 1, target: int = 1) -> None:
        """Make the capacities at least so long, and have memory for all rows. Rows keep what they hold.

        If it raises (no memory), the buffers are unsound until `renew`.
        """
        for symbol, length in (("source_capacity", source), ("target_capacity", target)):
            if length > self._capacity[symbol]:
                self._grow(symbol, self._ladders[symbol].rung(length))
        for buffer in self._buffers.values():
            if buffer.lent is None:
                buffer.lent = self._allocate((self.max_rows, *buffer.row_shape), buffer.dtype)

    def append(self, count: int) -> None:
        """Take `count` more rows into use. The encoder wrote their source tensors; recurrent ones become zero."""
        if self.rows + count > self.max_rows:
            raise ValueError(f"{self.rows} rows and {count} more are above {self.max_rows}")
        for buffer in self._buffers.values():
            if buffer.tensor.kind == "recurrent":
                contents = buffer.block.read()
                contents[self.rows : self.rows + count] = 0
                buffer.block.write(contents)
        self.rows += count

    def rearrange(self, rows_from: Rows, *, strangers: Set[int], source: int, target: int) -> None:
        """Row i becomes what row `rows_from[i]` was, and these rows are in use from now on.

        No row that is written may be named for another place. Tensors of kind source are moved only to the rows in
        `strangers`: the others hold the same source already. `source` and `target` say how long the rows that move are
        at most; positions beyond need not be moved.
        """
        if len(rows_from) > self.max_rows:
            raise ValueError(f"{len(rows_from)} rows are above {self.max_rows}")
        moves = [(new, old) for new, old in enumerate(rows_from.tolist()) if new != old]
        if moves and self._gather is not None:
            self._swap(rows_from, with_sources=bool(strangers))
        elif moves:
            self._move(moves, strangers, {"source_capacity": source, "target_capacity": target})
        self.rows = len(rows_from)

    def wipe(self, rows: list[int]) -> None:
        """Make these rows zero. They may hold what is no number, and whoever gets their place masks by multiplying."""
        for buffer in self._buffers.values():
            contents = buffer.block.read()
            contents[rows] = 0
            buffer.block.write(contents)

    def clear(self) -> None:
        """Drop all rows, fall back to the first rungs, and give memory back."""
        self.rows = 0
        first = {symbol: ladder.first for symbol, ladder in self._ladders.items()}
        if self._capacity != first:
            self._capacity = first
            self.renew()

    def renew(self) -> None:
        """Give back the memory of every buffer; the next `reserve` asks for fresh one. After a failure nobody knows
        what they hold."""
        self.rows = 0
        self._generation += 1
        for buffer in self._buffers.values():
            buffer.lent = buffer.spare = None
            buffer.row_shape = _row_shape(buffer.tensor, self._capacity)

    def _move(self, moves: list[tuple[int, int]], strangers: Set[int], used: dict[str, int]) -> None:
        """Copy rows on the host, up to the length in use. One by one: twice as fast as in one call."""
        foreign = [(new, old) for new, old in moves if new in strangers]
        for buffer in self._buffers.values():
            contents, axis = buffer.block.read(), buffer.tensor.capacity_axis
            if axis is not None:
                contents = contents[(slice(None),) * axis + (slice(used[str(buffer.tensor.shape[axis])]),)]
            for new, old in foreign if buffer.tensor.kind == "source" else moves:
                contents[new] = contents[old]

    def _grow(self, symbol: str, capacity: int) -> None:
        self.growths += self.rows > 0
        self._capacity = {**self._capacity, symbol: capacity}
        self._generation += 1
        for buffer in self._buffers.values():
            if symbol not in buffer.tensor.shape:
                continue
            buffer.spare = None
            old, buffer.lent = buffer.lent, None
            buffer.row_shape = _row_shape(buffer.tensor, self._capacity)
            if self.rows:
                assert old is not None
                buffer.lent = self._allocate((self.max_rows, *buffer.row_shape), buffer.dtype)
                former, contents = old.read()[: self.rows], buffer.block.read()
                contents[tuple(map(slice, former.shape))] = former
                buffer.block.write(contents)

    def _swap(self, rows_from: Rows, *, with_sources: bool) -> None:
        assert self._gather is not None
        buffers = {
            name: buffer for name, buffer in self._buffers.items() if with_sources or buffer.tensor.kind != "source"
        }
        for buffer in buffers.values():
            if buffer.spare is None:
                buffer.spare = self._allocate((self.max_rows, *buffer.row_shape), buffer.dtype)
        self._gather(self, rows_from, list(buffers))
        for buffer in buffers.values():
            assert buffer.spare is not None
            buffer.lent, buffer.spare = buffer.spare, buffer.lent
        sources, others = self._swapped
        self._swapped = (sources != with_sources, not others)

    def __repr__(self) -> str:
        return (
            f"<State {self.rows} of {self.max_rows} rows, source {self.source_capacity}, target {self.target_capacity}>"
        )


def _row_shape(tensor: StateTensor, capacity: dict[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else capacity[size] for size in tensor.shape[1:])
