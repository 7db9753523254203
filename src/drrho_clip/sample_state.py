"""Values that are kept per sample between steps, sharded by row over the ranks.

Row ``i`` of the table belongs to rank ``i // ceil(N / K)``. A step reads the old values of the ``B`` samples of
its global batch and writes new ones:

* ``fetch`` gathers the indices. Every rank fills in the rows that it owns and zeros elsewhere, and the result is
  summed over the ranks.
* ``commit`` needs no exchange: every rank has all ``B`` indices and new values, and writes the rows that it owns.

``NaN`` means "never seen". It survives the sum, because all other ranks add zero. The table takes
``4 * N * columns / K`` bytes per rank. Nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from drrho_clip import collectives


@dataclass(frozen=True)
class StateUpdate:
    """New rows for the sample state, which are written only if the optimizer step is taken.

    ``index``   int64 [B], the samples of the whole global batch.
    ``values``  column name -> float32 [B]. Equal indices must have equal values.
    """

    index: Tensor
    values: dict[str, Tensor]


class SampleState:
    """A table of ``num_samples`` rows with one float32 value per named column.

    ``columns``  names, for example ``("log_u_image", "log_u_text")``; all values start as NaN.
    ``device``   where the rows are kept. If they are on the CPU and the model is on a GPU, each commit waits for
                 the step, because it copies the new values to the CPU.
    ValueError: ``num_samples`` is less than 1.
    """

    def __init__(self, num_samples: int, columns: Sequence[str], device: torch.device | str = "cpu") -> None:
        if num_samples < 1:
            raise ValueError(f"a sample state needs num_samples >= 1, got {num_samples}")
        self.num_samples = num_samples
        self.device = torch.device(device)
        k, self._rank = collectives.world_size(), collectives.rank()
        self._rows_per_rank = -(-num_samples // k)
        self._first = min(self._rank * self._rows_per_rank, num_samples)
        self._meshes: dict[str, DeviceMesh] = {}
        self._rows = min(self._first + self._rows_per_rank, num_samples) - self._first
        # One spare row takes the reads and writes of rows that other ranks own. Otherwise the host would have to
        # wait for the device to learn which rows those are.
        self._table = {
            name: torch.full((self._rows + 1,), torch.nan, dtype=torch.float32, device=self.device)
            for name in columns
        }

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns."""
        return tuple(self._table)

    @property
    def rows(self) -> range:
        """The rows that this rank owns."""
        return range(self._first, self._first + self._rows)

    @property
    def bytes_per_rank(self) -> int:
        """The size of this rank's rows in bytes, over all columns."""
        return 4 * self._rows * len(self._table)

    def fetch(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The global batch's indices, int64 [B], and its values, column -> float32 [B], on the table's device.

        ``index`` is this rank's int64 [b]. On the CPU it is checked as ``check`` does, before anything is
        exchanged. On a GPU the host would have to wait for that: an index outside 0..N-1 has the values +inf
        instead, so that no loss is finite.
        """
        if index.device.type == "cpu":
            self.check(index)
        index = collectives.all_gather(index.to(self.device, non_blocking=True))
        position, owned = self._locate(index)
        zero = torch.zeros((), device=self.device)
        values = torch.stack([torch.where(owned, column[position], zero) for column in self._table.values()])
        values = collectives.all_reduce_sum(values)
        values = values.masked_fill(self._outside(index), torch.inf)
        return index, dict(zip(self._table, values, strict=True))

    def check(self, index: Tensor) -> None:
        """IndexError: one of ``index``, int64 [b] on the CPU, is outside 0..N-1; the message names it."""
        outside = self._outside(index)
        if outside.any():
            bad = index[outside][0].item()
            raise IndexError(
                f"sample index {bad} is outside 0..{self.num_samples - 1}: give a num_samples (--data_size) above "
                "every key"
            )

    def commit(self, update: StateUpdate, taken: Tensor | None = None) -> None:
        """Write ``update``, unless ``taken`` (a 0-d bool) is False. The host does not wait for ``taken``."""
        index = update.index.to(self.device)
        position, _ = self._locate(index)
        for name, value in update.values.items():
            column, value = self._table[name], value.to(self.device, torch.float32)
            if taken is not None:
                value = torch.where(taken.to(self.device), value, column[position])
            column.index_copy_(0, position, value)

    def state_dict(self) -> dict[str, Tensor]:
        """Column -> [N]: with several ranks a DTensor sharded by row, else a plain tensor.

        It shares memory with the table.
        """
        return self.sharded(self.local())

    def local(self) -> dict[str, Tensor]:
        """Column -> [len(rows)], the rows that this rank owns. It shares memory with the table."""
        return {name: column[: self._rows] for name, column in self._table.items()}

    def sharded(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``local()``, or copies of its tensors on another device, as columns [N]. It shares their memory."""
        if collectives.world_size() == 1:
            return dict(local)
        return {
            name: DTensor.from_local(
                column,
                self._mesh(column.device.type),
                [Shard(0)],
                run_check=False,
                shape=torch.Size([self.num_samples]),
                stride=(1,),
            )
            for name, column in local.items()
        }

    def _mesh(self, device: str) -> DeviceMesh:
        """All ranks in one dimension. Made once per device type, as each may create a process group."""
        if device not in self._meshes:
            self._meshes[device] = init_device_mesh(device, (collectives.world_size(),))
        return self._meshes[device]

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy in columns of shape [N], which may be plain tensors or DTensors.

        ``torch.distributed.checkpoint`` fills the tensors of ``state_dict`` in place instead.
        ValueError: a column is missing, or has another number of rows.
        """
        missing = sorted(set(self._table) - set(state))
        if missing:
            raise ValueError(f"the saved sample state lacks the columns {missing}; it has {sorted(state)}")
        for name, column in self._table.items():
            value = state[name]
            if value.shape[0] != self.num_samples:
                raise ValueError(
                    f"column {name!r} has {value.shape[0]} rows, but num_samples (--data_size) is "
                    f"{self.num_samples}: give the one that the sample state was saved with"
                )
            if isinstance(value, DTensor):
                local = value.redistribute(placements=[Shard(0)]).to_local()
            else:
                local = value[self._first : self._first + self._rows]
            column[: self._rows].copy_(local)

    def _outside(self, index: Tensor) -> Tensor:
        return (index < 0) | (index >= self.num_samples)

    def _locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in this rank's table (rows of other ranks are at the spare row), and which rows it owns."""
        local = index - self._first
        owned = (local >= 0) & (local < self._rows)
        return torch.where(owned, local, self._rows), owned
