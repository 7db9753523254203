"""The sample state: ours, sharded over the ranks, beside a full table on each of them; and where it is kept.

    python benchmarks/sample_state.py --data-size 255020000 --ranks 8 [--batch 5120 --steps 20 --json]

``--ranks`` gloo processes on this machine go through the same global batches with one scheme, then with the other.
A step reads the old log u of its samples and writes new ones that every rank has gathered:

sharded     ``SampleState``: gather indices, each rank fills in the rows it owns, sum; gather values, owners write
replicated  each rank reads its own samples' rows; gather indices, gather values, every rank writes all

``bytes_per_rank``  of the table on each rank; ``replicated_bytes_per_rank``: of the full one once all samples were
                    seen (here the system hands out its pages as they are touched).
``ms_per_step``     best block of steps, between barriers; ``replicated_ms_per_step`` likewise.

Afterwards both must hold the same values for every sample that was visited, and "never seen" for others.

Then one process takes steps of an estimator on a device, with the table in three places:

device         beside the model
host, at once  in host memory, written at the end of each step
host           in host memory, fetched ahead and written behind (``--sample_state_device cpu``)

``waits``  how often the host waits for the device per step, and ``late``: how often it reads what the device has
           copied to it some steps before; ``milliseconds``: best block of steps.

On a GPU waits are those of torch's synchronization debug mode, and each step has ``--load`` products of matrices
in place of a model. Without a GPU a stand-in counts (``stand_in.py``), and no times are taken. All three must hold
the same values; the program fails where the device or the host's two levels wait.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import report
from drrho_clip import collectives
from drrho_clip.losses.compositional import moving_average
from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.host_state import HostSampleState
from drrho_clip.state.readback import Readback
from plain import ReplicatedTable
from stand_in import StandIn
from waits import Watch, counted_on_gpu

COLUMNS = ("log_u_image", "log_u_text")
STEPS = 16  # different batches of the steps on a device
BATCHES = 4  # visited in turn: a table's pages are touched in the warm-up, not while time is taken


@dataclass(frozen=True)
class Options:
    """``batch`` is the global batch; ``repeats`` blocks of ``steps`` steps, of which the best counts.

    ``load``: products of matrices in each step on a GPU.
    """

    data_size: int
    ranks: int
    batch: int
    steps: int
    repeats: int
    load: int


def new_values(old: Tensor, index: Tensor) -> Tensor:
    """Something like an update of log u: [b, 2] from old values, NaN for never seen, and the samples."""
    fresh = torch.stack([(index % 7919) / 1000 - 8, (index % 104729) / 10000 - 11], 1).float()
    return torch.where(old.isnan(), fresh, 0.5 * old + 0.5 * fresh)


class Sharded:
    """The framework's scheme, as its losses use it."""

    def __init__(self, options: Options) -> None:
        self.state = SampleState(options.data_size, COLUMNS)

    def step(self, own: Tensor) -> None:
        index, values = self.state.fetch(own)
        first = collectives.rank() * len(own)
        old = torch.stack(list(values.values()), 1)[first : first + len(own)]
        new = collectives.all_gather(new_values(old, own))
        self.state.commit(StateUpdate(index, dict(zip(COLUMNS, new.unbind(1), strict=True))))

    def read(self, own: Tensor) -> Tensor:
        """[b, 2] of this rank's samples, NaN for never seen."""
        _, values = self.state.fetch(own)
        first = collectives.rank() * len(own)
        return torch.stack(list(values.values()), 1)[first : first + len(own)]


class Replicated:
    """The published scheme, with one gather of indices and one of values."""

    def __init__(self, options: Options) -> None:
        self.table = ReplicatedTable(options.data_size)

    def step(self, own: Tensor) -> None:
        new = collectives.all_gather(new_values(self.read(own), own))
        self.table.write(collectives.all_gather(own), new)

    def read(self, own: Tensor) -> Tensor:
        """[b, 2] of this rank's samples, NaN for never seen."""
        old = self.table.read(own)
        return torch.where(old == 0.0, torch.nan, old)


def draw_batches(options: Options) -> list[Tensor]:
    """This rank's share, int64 [b], of each global batch."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCHES, options.ranks, options.batch // options.ranks)
    return list(torch.randint(options.data_size, shape, generator=generator)[:, collectives.rank()])


def measure_scheme(scheme: Sharded | Replicated, options: Options) -> tuple[list[float], Tensor]:
    """Seconds per step of each block, and afterwards the values of the visited samples and of some others."""
    batches, seconds = draw_batches(options), []
    for block in range(options.repeats + 1):
        steps = BATCHES if block == 0 else options.steps
        dist.barrier()
        started = time.perf_counter()
        for i in range(steps):
            scheme.step(batches[i % BATCHES])
        dist.barrier()
        if block > 0:
            seconds.append((time.perf_counter() - started) / steps)
    others = torch.arange(len(batches[0])) * (options.data_size // len(batches[0]))
    return seconds, torch.stack([scheme.read(own) for own in [*batches, others]])


def serve(rank: int, options: Options, folder: str) -> None:
    """One rank: both schemes one after the other; rank 0 saves what was found as ``folder/result.pt``."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=options.ranks)
    if rank == 0:
        report.say("sharded")
    sharded = Sharded(options)
    size = torch.tensor(sharded.state.bytes_per_rank)
    dist.all_reduce(size, dist.ReduceOp.MAX)
    sharded_seconds, ours = measure_scheme(sharded, options)
    del sharded
    if rank == 0:
        report.say("replicated")
    replicated_seconds, theirs = measure_scheme(Replicated(options), options)
    same = torch.tensor(int(torch.equal(ours.nan_to_num(torch.inf), theirs.nan_to_num(torch.inf))))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if rank == 0:
        result = {"bytes": size.item(), "sharded": sharded_seconds, "replicated": replicated_seconds}
        torch.save(result | {"values_agree": bool(same)}, f"{folder}/result.pt")
    dist.destroy_process_group()


PLACES = ("device", "host, at once", "host")


class Steps:
    """Steps of an estimator on ``device`` with a table in one of ``PLACES``."""

    def __init__(self, place: str, options: Options, device: torch.device) -> None:
        self._device, self._load = device, options.load if device.type == "cuda" else 0
        kind, there = (HostSampleState, device) if place == "host" else (SampleState, "cpu")
        self.state = kind(options.data_size, COLUMNS, device if place == "device" else there)
        generator = torch.Generator().manual_seed(0)
        # A third of each batch is among a hundred rows, which come again in the next steps.
        few = torch.rand(STEPS, options.batch, generator=generator) < 1 / 3
        rows = torch.randint(options.data_size, (STEPS, options.batch), generator=generator)
        self._batches = list(torch.where(few, rows % 100, rows).unbind())
        if device.type == "cuda":
            self._batches = [batch.pin_memory() for batch in self._batches]
            self._matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
        self._next = 0

    def take(self, steps: int) -> None:
        """The first batch of a block of steps is not announced, as after an evaluation."""
        gamma = torch.full((), 0.5, device=self._device)
        for step in range(steps):
            index, following = self._batch(step), self._batch(step + 1)
            if step + 1 < steps:
                self.state.announce(following)
            index, values = self.state.fetch(index)
            index = index.to(self._device, non_blocking=True)
            old = torch.stack([value.to(self._device, non_blocking=True) for value in values.values()], 1)
            for _ in range(self._load):
                self._matrix @ self._matrix
            new = moving_average(new_values(old, index), old, gamma, 1e-14)
            update = StateUpdate(index, dict(zip(COLUMNS, new.unbind(1), strict=True)))
            self.state.commit(update, new.isfinite().all())
        self._next += steps

    def _batch(self, step: int) -> Tensor:
        return self._batches[(self._next + step) % STEPS]


def measure_places(options: Options) -> dict[str, dict[str, float | None]]:
    """``waits``, ``late`` and ``milliseconds`` per step of each of ``PLACES``."""
    device = torch.device("cuda") if torch.cuda.is_available() else StandIn.name
    found, tables = {}, []
    for place in PLACES:
        report.say(f"table: {place}")
        found[place], table = (on_gpu if device.type == "cuda" else on_stand_in)(place, options, device)
        tables.append(table.nan_to_num(torch.inf))
    assert all(torch.equal(table, tables[0]) for table in tables), "the places hold different values"
    for place in ("device", "host"):
        assert found[place]["waits"] == 0, f"the host waits {found[place]['waits']} times per step: {place}"
    return found


def on_stand_in(place: str, options: Options, device: torch.device) -> tuple[dict[str, float | None], Tensor]:
    with StandIn() as stand_in:
        steps = Steps(place, options, device)
        steps.take(options.steps)
        stand_in.waits = stand_in.late = 0
        steps.take(options.steps)
        counts = {"waits": stand_in.waits / options.steps, "late": stand_in.late / options.steps}
        table = torch.stack([column.cpu() for column in steps.state.values().values()])
    return {**counts, "milliseconds": None}, table


def on_gpu(place: str, options: Options, device: torch.device) -> tuple[dict[str, float | None], Tensor]:
    steps, seconds, watch = Steps(place, options, device), [], Watch()
    steps.take(options.steps)
    torch.cuda.synchronize()
    watch.active, value = True, Readback.value

    def read(readback: Readback) -> Tensor:
        watch.late += 1
        return value(readback)

    with mock.patch.object(Readback, "value", read), counted_on_gpu(watch):
        steps.take(options.steps)
    for _ in range(options.repeats):
        torch.cuda.synchronize()
        started = time.perf_counter()
        steps.take(options.steps)
        torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / options.steps)
    counts = {"waits": sum(watch.places.values()) / options.steps, "late": watch.late / options.steps}
    table = torch.stack([column.cpu() for column in steps.state.values().values()])
    return {**counts, "milliseconds": 1e3 * min(seconds)}, table


def main() -> None:
    options, as_json = parse()
    with tempfile.TemporaryDirectory() as folder:
        report.say(f"starting {options.ranks} ranks")
        mp.spawn(serve, args=(options, folder), nprocs=options.ranks)
        found = torch.load(f"{folder}/result.pt", weights_only=True)
    assert found["values_agree"], "the schemes hold different values for the same samples"
    result = {
        "bytes_per_rank": found["bytes"],
        "replicated_bytes_per_rank": ReplicatedTable.bytes_per_rank(options.data_size),
        "ms_per_step": 1e3 * min(found["sharded"]),
        "replicated_ms_per_step": 1e3 * min(found["replicated"]),
        "values_agree": found["values_agree"],
        "places": measure_places(options),
        **asdict(options),
        "machine": report.machine(torch.device("cpu"), threads=1),
    }
    report.emit(result, describe(result, found), as_json)


def describe(r: dict, found: dict) -> str:
    def row(name: str, size: int, seconds: list[float]) -> tuple[str, ...]:
        median = sorted(seconds)[len(seconds) // 2]
        return name, f"{size / 1e6:.1f} MB", f"{min(seconds) * 1e3:.1f} ms", f"{median * 1e3:.1f} ms"

    rows = [
        row("sharded (ours)", r["bytes_per_rank"], found["sharded"]),
        row("replicated", r["replicated_bytes_per_rank"], found["replicated"]),
    ]
    title = (
        f"Sample state: {r['data_size']:,} samples, {r['ranks']} gloo ranks, steps of {r['batch']:,} samples; "
        f"{r['machine']}"
    )
    agreement = "both schemes hold the same values for the samples visited, and none for others"
    whose = "a GPU" if torch.cuda.is_available() else "a stand-in for a GPU, which has no times"
    places = []
    for place, p in r["places"].items():
        milliseconds = "-" if p["milliseconds"] is None else f"{p['milliseconds']:.2f}"
        places.append((place, f"{p['waits']:g}", f"{p['late']:g}", milliseconds))
    parts = [
        report.table(title, ("", "per rank", "step, best", "median"), rows),
        agreement,
        report.table(f"Where the table is, with {whose}", ("", "waits per step", "late reads", "ms"), places),
    ]
    return "\n".join(parts)


def parse() -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-size", type=int, default=255_020_000, help="rows of the table")
    parser.add_argument("--ranks", type=int, default=8, help="gloo processes on this machine")
    parser.add_argument("--batch", type=int, default=5120, help="samples of one step, over all ranks")
    parser.add_argument("--steps", type=int, default=20, help="steps of one timed block")
    parser.add_argument("--repeats", type=int, default=5, help="timed blocks; the best counts")
    parser.add_argument("--load", type=int, default=16, help="products of 4096 x 4096 in a step on a GPU")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, the table on stderr")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    if given["batch"] % given["ranks"]:
        parser.error(f"--batch {given['batch']}: must be a multiple of --ranks {given['ranks']}")
    return Options(**given), as_json


if __name__ == "__main__":
    main()
