"""Whether a run whose ranks are killed again and again ends as one that nothing disturbs.

    python benchmarks/kill.py [--kills 30 --ranks 2 --seed 0 --json]

The program runs twice under ``torchrun --max-restarts``: a small model, FastCLIP-v3 with its sample state in 16
bits, shards made on the spot, a loader process per rank, a checkpoint every other step. The second run's ranks are
killed with SIGKILL, one launch after the other, by turns in these phases and by turns one rank and the next:

forward pass         between the towers
between two shards   of the sample state: another rank's is there, this rank's is not
before the marker    the checkpoint's .pt, which rank 0 is about to put in place; after it: when it just has
loader process       that of the rank is killed instead; the rank has to notice
while resuming       model and optimizer are read, the sample state is not
while starting       a random instant between the rank's first line of Python and its first step
while training       a random instant of the first steps; all ranks at once: the same, with all of them

torchrun starts all ranks again, they find their folder and go on from the last complete checkpoint. At the end
weights, optimizer, sample state and counters must be those of the undisturbed run, bit for bit; else, or where a
checkpoint that had its marker was skipped as incomplete, or a kill was missed, the exit code is 1.

``killed``                how often, by phase
``steps``, ``steps_again``  of the run; of them trained more than once, counted each time
``seconds_per_restart``   median from a kill to the next launch's first step
``seconds``, ``seconds_undisturbed``  of the whole runs
``skipped``               what later launches said of checkpoints that they could not use
``differing``             names of what is not as in the undisturbed run
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import numpy as np
import torch
from PIL import Image

import report
from training.checkpoint.pt_file import read
from victim import AFTER, ALL, BEFORE, BETWEEN, PHASES, RESUMING, STARTING, TRAINING, Events, Kill

SAMPLES, SHARDS, GLOBAL_BATCH = 60, 3, 8
STEPS_PER_EPOCH = -(-SAMPLES // GLOBAL_BATCH)
# Up to how often a phase may have come in a launch: steps, saves (one in two steps), or once.
_TURNS = dict.fromkeys(PHASES, 6) | dict.fromkeys((BETWEEN, BEFORE, AFTER), 3) | {RESUMING: 1, STARTING: 1}
_SILENCE = 120.0  # seconds without an event after which a run counts as stuck
_POLL = 0.005
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@dataclass(frozen=True)
class Options:
    kills: int
    ranks: int
    seed: int

    @property
    def epochs(self) -> int:
        """Enough that the run is not over before the last kill: a launch gets 5 steps ahead on average."""
        return -(-6 * self.kills // STEPS_PER_EPOCH) + 3


class Stuck(RuntimeError):
    """A run that says nothing any more, or ended otherwise than it should."""


def make_plan(options: Options) -> list[Kill]:
    """One kill per launch: phases by turns, and in each of them ranks by turns."""
    rng = random.Random(options.seed)
    plan = []
    for number in range(options.kills):
        turn, index = divmod(number, len(PHASES))
        after, instant = rng.randrange(_TURNS[PHASES[index]]), rng.random()
        plan.append(Kill(PHASES[index], (turn + index) % options.ranks, after, instant))
    return plan


def write_data(folder: Path) -> None:
    """Shards of pictures that differ, and the model's configuration."""
    (folder / "model.json").write_text(json.dumps(MODEL))
    rng = np.random.default_rng(0)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for key in range(shard, SAMPLES, SHARDS):
                file = io.BytesIO()
                pixels = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
                pixels.resize((48, 36), Image.Resampling.BICUBIC).save(file, "jpeg")
                about = json.dumps({"key": f"{key:09d}"}).encode()
                members = {"jpg": file.getvalue(), "txt": f"picture number {key}".encode(), "json": about}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key:09d}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


class Run:
    """The program under torchrun, and what its ranks say of themselves."""

    def __init__(self, lab: Path, name: str, options: Options, plan: list[Kill]) -> None:
        self.folder, self.plan, self._ranks = lab / name, plan, options.ranks
        self.folder.mkdir()
        (self.folder / "plan.json").write_text(json.dumps([asdict(kill) for kill in plan]))
        self.checkpoints = lab / "logs" / name / "checkpoints"
        self.last = self.checkpoints / f"epoch_{options.epochs}.pt"
        self.events: list[dict[str, Any]] = []
        self.seconds = 0.0
        self._read = 0
        launcher = f"""-m torch.distributed.run --standalone --nproc_per_node={options.ranks}
            --max-restarts={len(plan)} --monitor-interval=0.1 {Path(__file__).with_name("victim.py")} --"""
        flags = f"""--model {lab}/model.json --train-data {lab}/{{0..{SHARDS - 1}}}.tar
            --train-num-samples {SAMPLES} --data_size {SAMPLES} --global_batch_size {GLOBAL_BATCH}
            --epochs {options.epochs} --workers 1 --precision fp32 --deterministic
            --lr 1e-3 --warmup 2 --force-patch-dropout 0.25 --aug-cfg scale=(0.3,1.0)
            --fastclip --multiply_tau --temperature 0.07 --gamma 0.6 --rho 6.5 --lr_tau 1e-4 --seed 5
            --sample_state_dtype bound
            --save_every_n_steps 2 --save_published_state --logs {lab}/logs --name {name}"""
        self._command = [sys.executable, *launcher.split(), *flags.split()]

    def run(self, startup: float = 0.0, step: float = 0.0) -> None:
        """To its end, with kills at random instants where the plan has some.

        ``startup``, ``step``: how long these take when nothing disturbs. Stuck: it did not end by itself.
        """
        inherited = {name: value for name, value in os.environ.items() if name not in _LAUNCHED}
        env = inherited | {"OMP_NUM_THREADS": "1", "KILL_FOLDER": str(self.folder)}
        started = heard = time.monotonic()
        with (self.folder / "output").open("wb") as output:
            process = subprocess.Popen(self._command, env=env, stdout=output, stderr=subprocess.STDOUT)
            instants = self._instants(startup, step)
            try:
                while process.poll() is None:
                    if self._listen():
                        heard = time.monotonic()
                    if time.monotonic() - heard > _SILENCE:
                        raise Stuck(f"{self.folder.name}: nothing happens any more\n{self.tail()}")
                    next(instants)
                    time.sleep(_POLL)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        self._listen()
        self.seconds = time.monotonic() - started
        if process.returncode:
            raise Stuck(f"{self.folder.name}: torchrun ended with {process.returncode}\n{self.tail()}")

    def tail(self) -> str:
        return "\n".join(self.output().splitlines()[-60:])

    def output(self) -> str:
        """What torchrun and all ranks have printed."""
        return (self.folder / "output").read_text(errors="replace")

    def times(self, what: str, launch: int) -> list[float]:
        """When a launch's events of that kind were."""
        return [event["time"] for event in self.events if (event["what"], event["launch"]) == (what, launch)]

    def _listen(self) -> bool:
        """Take in new events; whether there were some."""
        path = self.folder / "events.jsonl"
        with path.open() if path.exists() else io.StringIO() as file:
            file.seek(self._read)
            lines = "".join(file.read().rpartition("\n")[:2])  # the last line may not be whole yet
        self._read += len(lines)
        new = [json.loads(line) for line in lines.splitlines()]
        self.events += new
        for event in new:
            if event["what"] == "killed":
                report.say(f"launch {event['launch']}: rank {event['victim']}, {event['phase']}")
        return bool(new)

    def _instants(self, startup: float, step: float) -> Iterator[None]:
        """Kills at random instants; waits by yielding."""
        for launch, kill in enumerate(self.plan):
            if kill.phase not in (STARTING, TRAINING, ALL):
                continue
            while len(self.times("started", launch)) < self._ranks:
                yield
            begun, delay = max(self.times("started", launch)), kill.instant * startup
            if kill.phase != STARTING:
                while len(self.times("step", launch)) < (kill.after + 1) * self._ranks:
                    yield
                begun, delay = max(self.times("step", launch)), kill.instant * 2 * step
            while time.time() < begun + delay:
                yield
            victims = range(self._ranks) if kill.phase == ALL else [kill.rank]
            processes = [int((self.folder / f"pid-{launch}-{rank}").read_text()) for rank in victims]
            Events(self.folder, launch, kill.rank).add("killed", phase=kill.phase, victim=kill.rank)
            for process in processes:
                os.kill(process, signal.SIGKILL)
        while True:
            yield


def measure(options: Options, lab: Path) -> dict[str, Any]:
    write_data(lab)
    calm = Run(lab, "calm", options, [])
    calm.run()
    steps = calm.times("step", 0)
    startup, step = min(steps) - min(calm.times("started", 0)), median(np.diff(steps[:: options.ranks]))
    killed = Run(lab, "killed", options, make_plan(options))
    killed.run(startup, step)
    kills = [event for event in killed.events if event["what"] == "killed"]
    restarts = [min(killed.times("step", k["launch"] + 1), default=None) for k in kills]
    waits = [back - kill["time"] for kill, back in zip(kills, restarts) if back]
    taken = Counter(e["step"] for e in killed.events if e["what"] == "step" and e["rank"] == 0)
    return {
        "benchmark": "kill",
        "machine": report.machine(torch.device("cpu"), threads=1),
        **asdict(options),
        "killed": Counter(kill["phase"] for kill in kills),
        "launches": 1 + max(event["launch"] for event in killed.events),
        "steps": len(taken),
        "steps_again": taken.total() - len(taken),
        "seconds_per_restart": median(waits) if waits else None,
        "seconds": killed.seconds,
        "seconds_undisturbed": calm.seconds,
        "skipped": [line for line in killed.output().splitlines() if "skipped: " in line],
        "differing": differing(read(calm.last), read(killed.last)),
    }


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Names of what two checkpoints do not share, but for when, where and under which name they were saved."""
    ours, theirs = dict(leaves(a)), dict(leaves(b))
    names = sorted(ours.keys() | theirs.keys())
    apart = (".name", ".saved_at", ".flags.name", ".sample_state.files..metadata")
    assert ".u_im" in ours and ".state_dict.visual.proj" in ours, "not the checkpoint that was expected"
    return [n for n in names if not n.startswith(apart) and not same(ours.get(n), theirs.get(n))]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


def leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree) if isinstance(tree, list) else None
    if items is None:
        yield name, tree
        return
    for key, value in items:
        yield from leaves(value, f"{name}.{key}")


def verdict(result: Mapping[str, Any]) -> list[str]:
    """What is wrong; nothing where the run was the undisturbed one."""
    wrong = []
    if result["differing"]:
        wrong.append(f"the runs differ in {len(result['differing'])} things, {result['differing'][0]} among them")
    if result["skipped"]:
        wrong.append(f"a checkpoint with its marker was not complete: {result['skipped'][0]}")
    if sum(result["killed"].values()) != result["kills"]:
        wrong.append(f"{sum(result['killed'].values())} of {result['kills']} kills took place")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2, help="1, 2, 4 or 8, which share 8 samples among them")
    parser.add_argument("--seed", type=int, default=0, help="of the random instants")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    given = vars(parser.parse_args(argv))
    as_json = given.pop("json")
    options = Options(**given)
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    rows = [[phase, str(result["killed"][phase])] for phase in PHASES]
    rows += [
        ["steps of the run", str(result["steps"])],
        ["steps trained again", str(result["steps_again"])],
        ["seconds per restart", f"{result['seconds_per_restart']:.1f}"],
        ["seconds, whole run", f"{result['seconds']:.0f}"],
        ["seconds, undisturbed", f"{result['seconds_undisturbed']:.0f}"],
        ["checkpoints skipped", str(len(result["skipped"]))],
        ["tensors and counters that differ", str(len(result["differing"]))],
    ]
    title = f"{options.kills} kills of {options.ranks} ranks ({result['machine']})"
    report.emit(result, report.table(title, ["killed", "times"], rows), as_json)
    for wrong in verdict(result):
        report.say(wrong)
    return 1 if verdict(result) else 0


if __name__ == "__main__":
    sys.exit(main())
