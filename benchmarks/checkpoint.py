"""How long a checkpoint stops training, and how long a resume takes.

    python benchmarks/checkpoint.py [--model ViT-B-32 --data-size 10000000 --repeats 3 --folder DIR --json]

A model (ViT-B-32 has 151M parameters) with AdamW's moments and a sample state of ``--data-size`` rows is saved,
in turns, by ``training.checkpoint.saver.Saver`` and by a plain synchronous save of the same: the file with its
checksums, the rows with theirs, fsync. While the saver's thread writes, steps go on (matrix products on all
threads but one).

``stall_seconds``         for which ``save`` holds the loop, best of the saves after the first
``synchronous_seconds``   of the plain save, best
``stall_ratio``           the one by the other; at most 0.5
``written_seconds``       from the call until the checkpoint is complete, steps going on meanwhile
``step_ratio``            how long steps take while it is being written, by how long they take else
``check_seconds``, ``resume_seconds``  reading all checksums; filling model, optimizer and sample state
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import open_clip
import torch

import report
from drrho_clip.sample_state import SampleState
from training.checkpoint import catalog, pt_file, sample_state_io
from training.checkpoint import resume as resuming
from training.checkpoint.run_state import RunState
from training.checkpoint.saver import Saver
from training.config.optim import OptimConfig
from training.config.params import parse
from training.loop.optimizer import create_optimizer
from training.models import pretrained

CPU = torch.device("cpu")
COLUMNS = ("log_u_image", "log_u_text")


@dataclass(frozen=True)
class Options:
    model: str
    data_size: int
    repeats: int
    folder: str | None


def main() -> None:
    options, as_json = parse_arguments()
    state = build(options)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = measure(options, state, Path(folder))
    result |= vars(options) | {"machine": report.machine(CPU)}
    report.emit(result, table(result), as_json)


def parse_arguments() -> tuple[Options, bool]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-32", help="an open_clip name or the path of a config JSON")
    parser.add_argument("--data-size", type=int, default=10_000_000, help="rows of the sample state")
    parser.add_argument("--repeats", type=int, default=3, help="saves of each kind that count")
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    return Options(**given), as_json


def build(options: Options) -> RunState:
    """A state as after some steps; how the numbers came about does not matter to who writes them."""
    report.say(f"building {options.model} with moments and {options.data_size:,} rows")
    model = open_clip.create_model(pretrained.open_clip_name(options.model, "--model"), load_weights=False)
    settings = OptimConfig("adamw", 1e-3, 0.9, 0.98, 1e-6, 0.2, 0.9, 1e-3, None)
    optimizer = create_optimizer(model, settings, CPU)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    optimizer.zero_grad()
    table = SampleState(options.data_size, COLUMNS)
    for column in table.local().values():
        column.normal_()
    return RunState("benchmark", model, optimizer, sample_state=table)


def measure(options: Options, state: RunState, folder: Path) -> dict:
    config = parse(["--dataset-type", "synthetic", "--train-num-samples", "8", "--keep_last", "1"]).run
    stalls, plain, written, beside = [], [], [], []
    idle = steps_for(2.0)
    with Saver(folder / "ours", config) as saver:
        (folder / "ours").mkdir()
        for turn in range(options.repeats + 1):
            report.say(f"save {turn + 1} of {options.repeats + 1}, of each kind")
            seconds = synchronous(state, folder / "plain")
            started = time.perf_counter()
            saver.save(state, [f"step_{turn}"])
            stall = time.perf_counter() - started
            path = folder / "ours" / f"step_{turn}.pt"
            steps = steps_while(lambda path=path: not path.exists())
            saver.wait()
            if turn:  # the first save makes the buffers
                stalls.append(stall)
                plain.append(seconds)
                written.append(time.perf_counter() - started)
                beside += steps
    checked, resumed = resume(path, state)
    return {
        "stall_ratio": min(stalls) / min(plain),
        "stall_seconds": min(stalls),
        "synchronous_seconds": min(plain),
        "written_seconds": min(written),
        "step_ratio": median(beside) / median(idle),
        "check_seconds": checked,
        "resume_seconds": resumed,
        "bytes": sum(file.stat().st_size for file in (folder / "ours").rglob("*") if file.is_file()),
        "parameters": sum(p.numel() for p in state.model.parameters()),
    }


def synchronous(state: RunState, folder: Path) -> float:
    """Seconds for the same content, with checksums and fsync, while training waits."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    started = time.perf_counter()
    sample_state_io.write(folder / "rows", state.sample_state.state_dict())
    pt_file.write(folder / "file.pt", state.held())
    return time.perf_counter() - started


def resume(path: Path, state: RunState) -> tuple[float, float]:
    """Seconds to read all checksums, and to fill ``state``. What was read is what had been written."""
    weights = [parameter.detach().clone() for parameter in state.model.parameters()]
    before = {name: column.clone() for name, column in state.sample_state.local().items()}
    started = time.perf_counter()
    fault = catalog.problem(path)
    checked = time.perf_counter() - started
    if fault:
        sys.exit(fault)
    with torch.no_grad():
        for tensor in (*state.model.parameters(), *state.sample_state.local().values()):
            tensor.zero_()
    started = time.perf_counter()
    resuming.resume(path, state, steps_per_epoch=1, global_batch=1)
    resumed = time.perf_counter() - started
    same = all(map(torch.equal, state.model.parameters(), weights))
    if not same or not all(torch.equal(state.sample_state.local()[n], before[n]) for n in before):
        sys.exit("what was read is not what had been written")
    return checked, resumed


def one_step() -> float:
    """Seconds of a product that stands for a part of a training step."""
    started = time.perf_counter()
    _A @ _A
    return time.perf_counter() - started


def steps_for(seconds: float) -> list[float]:
    until = time.perf_counter() + seconds
    return steps_while(lambda: time.perf_counter() < until)


def steps_while(condition) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads - 1, 1))
    taken = [one_step()]
    while condition():
        taken.append(one_step())
    torch.set_num_threads(threads)
    return taken


def table(r: dict) -> str:
    title = (
        f"Checkpoint: {r['model']}, {r['parameters'] / 1e6:.0f}M parameters with AdamW, {r['data_size']:,} rows, "
        f"{r['bytes'] / 1e9:.2f} GB; {r['machine']}"
    )
    lines = [
        ("training waits for a save", f"{r['stall_seconds']:.2f} s"),
        ("complete after", f"{r['written_seconds']:.2f} s"),
        ("steps take, meanwhile", f"{r['step_ratio']:.2f} x"),
        ("a synchronous save", f"{r['synchronous_seconds']:.2f} s"),
        ("waits / synchronous", f"{r['stall_ratio']:.2f}"),
        ("resume: checksums", f"{r['check_seconds']:.2f} s"),
        ("resume: reading", f"{r['resume_seconds']:.2f} s"),
    ]
    return report.table(title, ("", ""), lines)


_A = torch.randn(512, 512)

if __name__ == "__main__":
    main()
