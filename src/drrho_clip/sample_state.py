"""Values that are kept per sample between steps, sharded by row over the ranks.

Row ``i`` of the table belongs to rank ``i // ceil(N / K)``. A step reads the old values of the ``B`` samples of
its global batch and writes new ones:

* ``fetch`` gathers the indices. Every rank fills in the rows that it owns and zeros elsewhere, and the result is
  summed over the ranks.
* ``commit`` needs no exchange: every rank has all ``B`` indices and new values, and writes the rows that it owns.

``NaN`` means "never seen". It survives the sum, because all other ranks add zero. The table takes
``4 * N * columns / K`` bytes per rank. Nothing here waits for the device.

A column may be kept in 16 bits per value instead (``FixedPoint``), each wrong by at most E. For log u, errors of
many visits do not add up to more than the moving average forgets. With f_t the new estimate of visit t,

    u <- ((1 - gamma) u + gamma f) exp(e),  |e| <= E,    gives

    u_T = sum_t gamma f_t (1 - gamma)^(T - t) exp(e_t + ... + e_T),

so what is kept lies between the averages that keep (1 - gamma) exp(-E) and (1 - gamma) exp(E) of the old, times
exp(-E) and exp(E). Where estimates stay as they are, log u is wrong by at most E / gamma to first order. This
needs E < -log(1 - gamma): otherwise a value that falls could be rounded back to where it came from, and stay.
Values are rounded to the nearest code, the same on all ranks. Rounding at random would be right on average, but
could err by a whole step, and so need a step half as large for the same bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from drrho_clip import collectives
from drrho_clip.state.fixed_point import FixedPoint

_AT_ONCE = 2**22  # values that are converted at once, to need little memory
CODE = ".code"  # "log_u_image.code" in ``state_dict``: how the column "log_u_image" is kept in 16 bits


@dataclass(frozen=True)
class StateUpdate:
    """New rows for the sample state, which are written only if the optimizer step is taken.

    ``index``   int64 [B], the samples of the whole global batch.
    ``values``  column name -> float32 [B]. Equal indices must have equal values.
    """

    index: Tensor
    values: dict[str, Tensor]


class SampleState:
    """A table of ``num_samples`` rows with one value per named column.

    ``columns``  names, for example ``("log_u_image", "log_u_text")``; all values start as NaN.
    ``device``   where the rows are kept. If they are on the CPU and the model is on a GPU, each commit waits for
                 the step, because it copies the new values to the CPU; a ``HostSampleState`` does not.
    ``codes``    column -> how it is kept in 16 bits; the others are float32.
    ValueError: ``num_samples`` is less than 1.
    """

    def __init__(
        self,
        num_samples: int,
        columns: Sequence[str],
        device: torch.device | str = "cpu",
        codes: Mapping[str, FixedPoint] | None = None,
    ) -> None:
        if num_samples < 1:
            raise ValueError(f"a sample state needs num_samples >= 1, got {num_samples}")
        self.num_samples = num_samples
        self.device = torch.device(device)
        self.codes = {name: code for name, code in (codes or {}).items() if name in columns}
        k, self._rank = collectives.world_size(), collectives.rank()
        self._rows_per_rank = -(-num_samples // k)
        self._first = min(self._rank * self._rows_per_rank, num_samples)
        self._meshes: dict[str, DeviceMesh] = {}
        self._rows = min(self._first + self._rows_per_rank, num_samples) - self._first
        # One spare row takes the reads and writes of rows that other ranks own. Otherwise the host would have to
        # wait for the device to learn which rows those are.
        self._table = {name: never_seen(self._rows + 1, self.codes.get(name), self.device) for name in columns}

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
        return sum(column.element_size() * self._rows for column in self._table.values())

    def announce(self, index: Tensor) -> None:
        """A training loop may tell the rows of each batch to come, this rank's int64 [b] on the CPU. Collective.

        ``fetch`` of this very tensor then finds them ready, where rows are far from the step.
        """

    def choose_from(self, index: Tensor) -> None:
        """The next ``fetch`` is of some of these rows, int64 on the CPU. IndexError: as ``check``."""
        self.check(index)

    def fetch(self, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The global batch's indices, int64 [B], and its values, column -> float32 [B], on the table's device.

        ``index`` is this rank's int64 [b]. On the CPU it is checked as ``check`` does, before anything is
        exchanged. On a GPU the host would have to wait for that: an index outside 0..N-1 has the values +inf
        instead, so that no loss is finite. ValueError: it is of another type.
        """
        _require_int64(index)
        if index.device.type == "cpu":
            self.check(index)
        index = collectives.all_gather(index.to(self.device, non_blocking=True))
        position, owned = self._locate(index)
        zero = torch.zeros((), device=self.device)
        read = [value_of(column[position], self.codes.get(name)) for name, column in self._table.items()]
        values = torch.stack([torch.where(owned, value, zero) for value in read])
        values = collectives.all_reduce_sum(values)
        values = values.masked_fill(self._outside(index), torch.inf)
        return index, dict(zip(self._table, values, strict=True))

    def check(self, index: Tensor) -> None:
        """IndexError: one of ``index``, int64 [b] on the CPU, is outside 0..N-1; the message names it.

        ValueError: it is of another type.
        """
        _require_int64(index)
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
            column = self._table[name]
            value = kept_as(value.to(self.device, torch.float32), self.codes.get(name))
            if taken is not None:
                value = torch.where(taken.to(self.device), value, column[position])
            column.index_copy_(0, position, value)

    def state_dict(self) -> dict[str, Tensor]:
        """Column -> [N]: with several ranks a DTensor sharded by row, else a plain tensor.

        It shares memory with the table. A column in 16 bits is int16, which gloo and NCCL do not exchange, and
        beside it stands its code under the column's name + ``CODE``, float32 [2]: step and first integer of its
        ``FixedPoint``.
        """
        return self.sharded(self.local())

    def local(self) -> dict[str, Tensor]:
        """Column -> [len(rows)], this rank's rows as they are kept. It shares memory with the table."""
        return {name: column[: self._rows] for name, column in self._table.items()}

    def values(self) -> dict[str, Tensor]:
        """Column -> float32 [len(rows)], the rows that this rank owns; copies of those in 16 bits."""
        return {name: value_of(column, self.codes.get(name)) for name, column in self.local().items()}

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A column of ``values()`` in blocks, so that it need not be there as a whole."""
        for kept in self.local()[name].split(_AT_ONCE):
            yield value_of(kept, self.codes.get(name))

    def sharded(self, local: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``local()``, or copies of it on another device, as in ``state_dict``. It shares their memory."""
        codes = {name + CODE: torch.tensor([code.step, code.first]) for name, code in self.codes.items()}
        if collectives.world_size() == 1:
            return {**local, **codes}
        columns: dict[str, Tensor] = {
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
        return {**columns, **codes}

    def _mesh(self, device: str) -> DeviceMesh:
        """All ranks in one dimension. Made once per device type, as each may create a process group."""
        if device not in self._meshes:
            self._meshes[device] = init_device_mesh(device, (collectives.world_size(),))
        return self._meshes[device]

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in columns of shape [N], which may be plain tensors or DTensors, in 16 bits or not.

        ``torch.distributed.checkpoint`` fills the tensors of ``state_dict`` in place instead, if they are kept in
        the same way.
        ValueError: a column is missing, has another number of rows, or is int16 without its code.
        """
        missing = sorted(set(self._table) - set(state))
        if missing:
            raise ValueError(f"the saved sample state lacks the columns {missing}; it has {sorted(state)}")
        for name in self._table:
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
            code = code_in(state[name + CODE]) if name + CODE in state else None
            if (code is None) != (local.dtype != torch.int16):
                raise ValueError(f"column {name!r} is {local.dtype}: a column in 16 bits has its code beside it")
            self.fill(name, local, code)

    def fill(self, name: str, local: Tensor, code: FixedPoint | None) -> int:
        """Copy ``local``, [len(rows)], kept as ``code`` says, into a column.

        Returns how many values are beyond the ends of the column's own code, and are therefore less exact.
        """
        column, own = self.local()[name], self.codes.get(name)
        if code == own:
            column.copy_(local)
            return 0
        beyond = 0
        for part, into in zip(local.split(_AT_ONCE), column.split(_AT_ONCE)):
            values = value_of(part, code)
            beyond += int(own.outside(values).sum()) if own else 0
            into.copy_(kept_as(values, own))
        return beyond

    def _outside(self, index: Tensor) -> Tensor:
        return (index < 0) | (index >= self.num_samples)

    def _locate(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Positions in this rank's table (rows of other ranks are at the spare row), and which rows it owns."""
        local = index - self._first
        owned = (local >= 0) & (local < self._rows)
        return torch.where(owned, local, self._rows), owned


def never_seen(rows: int, code: FixedPoint | None, device: torch.device | str = "cpu") -> Tensor:
    """[rows] of NaN, as they are kept."""
    return kept_as(torch.full((1,), torch.nan), code).to(device).repeat(rows)


def kept_as(values: Tensor, code: FixedPoint | None) -> Tensor:
    """float32 values as they are kept: float32, or int16 with a code."""
    return values if code is None else code.encode(values)


def value_of(kept: Tensor, code: FixedPoint | None) -> Tensor:
    """The float32 values of what is kept."""
    return kept if code is None else code.decode(kept)


def code_in(pair: Tensor) -> FixedPoint | None:
    """The code that stands in a ``state_dict``, float32 [2]; None: there is none with these numbers."""
    step, first = pair.tolist()
    if not (0 < step < math.inf and abs(first) <= 2**17 and first == int(first)):
        return None
    return FixedPoint(step, int(first))


def _require_int64(index: Tensor) -> None:
    # Narrower integers would be looked up, and refused only when new values are written.
    if index.dtype != torch.int64:
        raise ValueError(f"the samples' rows are {index.dtype}: give int64 (index.long())")
