"""A sample state in host memory for steps on a device, which never wait: rows come ahead and are written behind.

Copies between the two memories take time, so what a step needs of the table is on its way before the step begins,
and what it writes arrives after it has ended:

ahead    ``announce`` tells the rows of a batch to come. The ranks start to exchange their indices. After the step
         before it (``commit``) the host reads the rows out of its table, while the device still computes.
behind   ``commit`` starts to copy a step's new rows into page-locked memory. They are written into the table
         ``behind`` steps later, when the copy has long arrived. Only a host that is so many steps ahead of its
         device waits for it, and the device then has work for as many steps.

Rows that were read ahead may lack the latest steps. So the new rows of these stay on the device too, and ``fetch``
puts them over what was read, in the order of the steps: every rank has them, and looks for rows that have come
again in a sorted list. So what a step sees is what it would see in a table that is written at once, bit for bit.

The ranks' collectives are one gather of indices for each announced batch and one sum for each fetch, in the order
of the calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from drrho_clip import collectives
from drrho_clip.sample_state import SampleState, StateUpdate, kept_as, value_of
from drrho_clip.state.fixed_point import FixedPoint
from drrho_clip.state.readback import Readback

_NO_ROW = -(2**62)


@dataclass
class _Rows:
    """The rows of one batch.

    ``index``   int64 [b] of this rank, as they were announced. ``gathered`` waits for those of all ranks.
    ``read``    float32 [columns, B] of the table, zeros for rows of other ranks; None: not read yet.
    ``number``  of the last update that was in the table then.
    """

    index: Tensor
    gathered: Callable[[], Tensor]
    everywhere: Tensor | None = None
    read: Tensor | None = None
    number: int = 0


class _Update:
    """New rows of one step, int64 [B] and float32 [columns, B], on the device and on their way to the host."""

    def __init__(self, number: int, index: Tensor, values: Tensor) -> None:
        self.number = number
        self._sorted, order = index.sort()
        self._values = values[:, order]
        self.index_copy, self.values_copy = Readback(index), Readback(values)

    def over(self, index: Tensor, values: Tensor) -> Tensor:
        """``values``, [columns, M] of the rows ``index``, with this step's where it has written them."""
        at, there = _find(self._sorted, index)
        return torch.where(there, self._values[:, at], values)


class HostSampleState(SampleState):
    """A ``SampleState`` on the CPU for steps on ``device``, where ``fetch`` gives its results.

    ``behind``  how many steps may be on their way to the table.

    A training loop calls ``announce`` with the next batch's rows, then takes its step (``fetch`` by the loss, and
    ``commit``). ``fetch`` waits for nothing if its ``index`` is the tensor that was announced, or on the device
    and chosen from rows that were announced (``choose_from``); else it works too. An update must have all columns.
    """

    def __init__(
        self,
        num_samples: int,
        columns: Sequence[str],
        device: torch.device | str,
        codes: Mapping[str, FixedPoint] | None = None,
        behind: int = 2,
    ) -> None:
        super().__init__(num_samples, columns, "cpu", codes)
        self._step_device, self._most_behind = torch.device(device), behind
        self._announced: deque[_Rows] = deque()
        self._updates: deque[_Update] = deque()
        self._written = self._number = 0  # the last update in the table, and the last one
        self._current: _Rows | None = None
        self._choice: _Rows | None = None

    def announce(self, index: Tensor) -> None:
        self._announced.append(self._gather(index))

    def choose_from(self, index: Tensor) -> None:
        self.check(index)
        self._choice = self._rows_of(index)

    def fetch(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        if self._choice is not None:
            self._current, self._choice = self._choice, None
            everywhere = collectives.all_gather(index.to(self._step_device, non_blocking=True))
            values = self._chosen(everywhere, self._current)
        else:
            index = index.cpu()
            self.check(index)
            self._current = self._rows_of(index)
            everywhere, values = self._on_device(self._current)
        values = collectives.all_reduce_sum(values)
        for update in self._updates:
            if update.number > self._current.number:
                values = update.over(everywhere, values)
        return everywhere, dict(zip(self.columns, values, strict=True))

    def commit(self, update: StateUpdate, taken: Tensor | None = None) -> None:
        index = update.index.to(self._step_device)
        if taken is not None:
            index = torch.where(taken.to(self._step_device), index, _NO_ROW)
        # As the table will keep them, so that it does not matter from where a step takes them.
        values = torch.stack([self._rounded(name, update.values[name]) for name in self.columns])
        self._number += 1
        self._updates.append(_Update(self._number, index, values))
        if self._current is not None and any(rows is self._current for rows in self._announced):
            while self._announced.popleft() is not self._current:
                pass
        self._current = None
        self._write(self._most_behind)
        if self._announced:
            self._read(self._announced[0])

    def local(self) -> dict[str, Tensor]:
        """As in ``SampleState``, with all steps written. It waits for the device; rows are read anew after it."""
        self._write(0)
        for rows in self._announced:
            rows.read = None
        return super().local()

    def _gather(self, index: Tensor) -> _Rows:
        # A copy: the batch's memory may be used again before another rank has read it.
        return _Rows(index, collectives.start_all_gather(self._in_host_memory(index)))

    def _rows_of(self, index: Tensor) -> _Rows:
        """The announced rows if ``index`` is the tensor that was announced, else new ones. They are read."""
        rows = next((rows for rows in self._announced if rows.index is index), None) or self._gather(index)
        if rows.read is None:
            self._read(rows)
        return rows

    def _read(self, rows: _Rows) -> None:
        if rows.everywhere is None:
            rows.everywhere = self._in_host_memory(rows.gathered())
        position, owned = self._locate(rows.everywhere)
        rows.read = self._host_memory((len(self._table), len(position)), torch.float32)
        for into, (name, column) in zip(rows.read, self._table.items(), strict=True):
            into.copy_(value_of(column[position], self.codes.get(name))).masked_fill_(~owned, 0.0)
        rows.read.masked_fill_(self._outside(rows.everywhere), torch.inf)
        rows.number = self._written

    def _on_device(self, rows: _Rows) -> tuple[Tensor, Tensor]:
        assert rows.everywhere is not None and rows.read is not None, "``_rows_of`` gives rows that are read"
        # The rows are copied also where both memories are one, since the ranks sum them in place.
        values = rows.read.to(self._step_device, non_blocking=True, copy=True)
        return rows.everywhere.to(self._step_device, non_blocking=True), values

    def _chosen(self, index: Tensor, rows: _Rows) -> Tensor:
        """[columns, B] of the rows ``index`` among ``rows``; +inf for others."""
        everywhere, values = self._on_device(rows)
        ordered, order = everywhere.sort()
        at, there = _find(ordered, index)
        return torch.where(there, values[:, order[at]], torch.inf)

    def _rounded(self, name: str, values: Tensor) -> Tensor:
        values = values.to(self._step_device, torch.float32)
        return self.codes[name].rounded(values) if name in self.codes else values

    def _write(self, behind: int) -> None:
        """Write all updates but the last ``behind`` into the table."""
        while len(self._updates) > behind:
            update = self._updates.popleft()
            position, _ = self._locate(update.index_copy.value())
            for (name, column), values in zip(self._table.items(), update.values_copy.value(), strict=True):
                column.index_copy_(0, position, kept_as(values, self.codes.get(name)))
            self._written = update.number
            for rows in self._announced:
                if rows.number < update.number:  # they would need this update, which is forgotten now
                    rows.read = None

    def _in_host_memory(self, tensor: Tensor) -> Tensor:
        return self._host_memory(tensor.shape, tensor.dtype).copy_(tensor)

    def _host_memory(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Page-locked for a GPU, which copies from there without the host."""
        return torch.empty(shape, dtype=dtype, pin_memory=self._step_device.type == "cuda")


def _find(ordered: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``index``, int64 [M], stands in ``ordered``, int64 [B], and whether it does."""
    at = torch.searchsorted(ordered, index).clamp_(max=len(ordered) - 1)
    return at, ordered[at] == index
