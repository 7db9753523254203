"""A training step where nodes have a slow network: what travels, how long a step takes, what compression buys.

    python benchmarks/network.py [--gbit 1 10] [--nodes 2] [--batch-size 4] [--steps 4] [--repeats 3] [--json]

Each node is a network namespace of this machine, with one rank of one thread. They are joined by pairs of virtual
Ethernet devices and a bridge, and ``tc ... tbf`` limits what each device sends and gets. That takes Linux, root,
``ip`` and ``tc`` (Debian: iproute2); elsewhere the script says so and ends.

The step is the trainer's own (``training.loop.step``), from a batch to new weights: DRRho-CLIP with stored
reference features, on a model of 21M parameters (``MODEL``). The settings take turns in blocks of ``--steps``
steps, and the best block of each counts. A CPU computes as slowly as a slow network sends, so the batch is small:
a GPU takes many more samples in the same time, and the gradients that travel meanwhile are the same.

``ms``        of a step.        ``speedup``  steps per second, beside no compression.
``megabytes`` that a rank sends per step, headers included, as its network device counts them:
              ``gradients``; ``embeddings``, with the log u that follow; ``reference``, with indices and old log u.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "src"))

import torch
import torch.distributed as dist

import report
from drrho_clip.batch import Batch
from training.config.params import parse
from training.distributed import process_group
from training.distributed.process_group import World
from training.loop.build import build_task
from training.loop.optimizer import create_optimizer
from training.loop.step import Stepper
from training.models.build import build_target

DEVICE = "eth0"
BOUND = "1e-3"
SETTINGS = {
    "none": [],
    "gradients bf16": ["--grad_compression", "bf16"],
    "gradients powersgd": ["--grad_compression", "powersgd"],
    f"embeddings {BOUND}": ["--gather_error_bound", BOUND],
    "powersgd, embeddings": ["--grad_compression", "powersgd", "--gather_error_bound", BOUND],
}
MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 384, "layers": 8, "head_width": 64},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2},
}
REFERENCE_WIDTH, DATA_SIZE = 512, 100_000
KINDS = ("gradients", "embeddings", "reference")


@dataclass(frozen=True)
class Options:
    """``repeats`` blocks of ``steps`` steps of each setting; ``batch_size`` samples per rank."""

    nodes: int
    batch_size: int
    steps: int
    repeats: int
    model: dict[str, Any]


# --------------------------------------------------------------------------------------- the network


def missing() -> str | None:
    """Why there can be no network here; None: there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces take Linux and root"
    if gone := [tool for tool in ("ip", "tc") if shutil.which(tool) is None]:
        return f"there is no {gone[0]} (Debian: iproute2)"
    return None


def tell(line: str) -> None:
    subprocess.run(line.split(), check=True, capture_output=True, text=True)


@contextmanager
def network(nodes: int, gbit: float) -> Iterator[list[str]]:
    """Namespaces that are joined at ``gbit`` Gbit/s in each direction; node i has the address 10.77.0.(i + 1)."""
    names = [f"drrho{os.getpid()}-{i}" for i in range(nodes)]
    hub = f"drrho{os.getpid()}-hub"
    # A bucket of 10 ms: small enough not to matter, large enough for the kernel's timers.
    shape = f"tbf rate {gbit}gbit burst {max(int(gbit * 1.25e6), 65536)} latency 50ms"
    with ExitStack() as cleanup:
        for name in (hub, *names):
            tell(f"ip netns add {name}")
            cleanup.callback(tell, f"ip netns del {name}")
            tell(f"ip -n {name} link set lo up")
        tell(f"ip -n {hub} link add bridge type bridge")
        tell(f"ip -n {hub} link set bridge up")
        for i, name in enumerate(names):
            tell(f"ip -n {hub} link add port{i} type veth peer name {DEVICE} netns {name}")
            tell(f"ip -n {hub} link set port{i} master bridge")
            tell(f"ip -n {name} address add 10.77.0.{i + 1}/24 dev {DEVICE}")
            for where, device in ((hub, f"port{i}"), (name, DEVICE)):
                tell(f"ip -n {where} link set {device} up")
                tell(f"ip netns exec {where} tc qdisc add dev {device} root {shape}")
        yield names


def run(options: Options, gbit: float) -> dict[str, Any]:
    """What rank 0 measured at ``gbit`` Gbit/s."""
    with tempfile.TemporaryDirectory() as scratch, network(options.nodes, gbit) as names:
        out = Path(scratch) / "result.json"
        ranks = []
        for i, name in enumerate(names):
            mine = {"RANK": i, "LOCAL_RANK": 0, "WORLD_SIZE": len(names), "LOCAL_WORLD_SIZE": 1}
            mine |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": DEVICE}
            mine |= {"OMP_NUM_THREADS": 1, "OMP_WAIT_POLICY": "PASSIVE", "CUDA_VISIBLE_DEVICES": ""}
            words = ["ip", "netns", "exec", name, sys.executable, __file__, "--rank", json.dumps(asdict(options))]
            environment = os.environ | {key: str(value) for key, value in mine.items()}
            ranks.append(subprocess.Popen([*words, "--out", str(out)], env=environment, stdout=sys.stderr))
        try:
            codes = [rank.wait() for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
        if any(codes):
            raise RuntimeError(f"ranks have ended with {codes}; their errors are above")
        return json.loads(out.read_text())


# -------------------------------------------------------------------------------------------- a rank


def sent() -> int:
    """Bytes that this node has sent."""
    return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text())


class Training:
    """The trainer's step under one setting, and what was sent meanwhile."""

    def __init__(self, options: Options, words: Sequence[str], scratch: Path) -> None:
        model = scratch / "model.json"
        model.write_text(json.dumps(options.model))
        config = parse(
            [
                *("--dataset-type", "synthetic", "--train-num-samples", str(DATA_SIZE)),
                *("--data_size", str(DATA_SIZE), "--batch-size", str(options.batch_size)),
                *("--model", str(model), "--cached_ref_features_dir", str(scratch), "--precision", "fp32"),
                *("--fastclip", "--multiply_tau", "--temperature_scheme", "global_learnable", "--gamma", "0.5"),
                *("--lr", "1e-4", "--warmup", "0", *words),
            ]
        )
        self.world: World = process_group.start(config.distributed) if not dist.is_initialized() else alone()
        target = build_target(config, self.world)
        task = build_task(config, self.world, target, None)
        task.model.train()
        task.loss.set_epoch(1)
        self.stepper = Stepper(task, create_optimizer(target.module, config.optim, self.world.device))
        self.sent, self.done = dict.fromkeys(KINDS, 0), 0
        generator = torch.Generator().manual_seed(self.world.rank)
        side, length = options.model["vision_cfg"]["image_size"], options.model["text_cfg"]["context_length"]
        shape = (options.batch_size, 3, side, side)
        self.batch = Batch(
            image=torch.randint(256, shape, dtype=torch.uint8, generator=generator),
            text=torch.randint(1, 49000, (options.batch_size, length), generator=generator),
            index=torch.randperm(DATA_SIZE, generator=generator)[: options.batch_size],
            ref_features=torch.nn.functional.normalize(
                torch.randn(options.batch_size, 2, REFERENCE_WIDTH, generator=generator), dim=2
            ),
        )
        task.prepare = self._counted("reference", task.prepare)  # type: ignore[method-assign]
        task.objective = self._counted("embeddings", task.objective)  # type: ignore[method-assign]
        self.stepper.settle(self.batch, 0)

    def _counted(self, kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function``, during which nothing else is sent: it comes before the backward pass."""

        def counted(*args: Any) -> Any:
            before = sent()
            result = function(*args)
            self.sent[kind] += sent() - before
            return result

        return counted

    def block(self, steps: int) -> tuple[float, dict[str, float]]:
        """Seconds of a step, and bytes by kind."""
        dist.barrier()
        self.sent = dict.fromkeys(KINDS, 0)
        before, begin = sent(), time.perf_counter()
        for _ in range(steps):
            self.stepper(self.batch, self.done)
            self.done += 1
        seconds = time.perf_counter() - begin
        self.sent["gradients"] = sent() - before - self.sent["embeddings"] - self.sent["reference"]
        return seconds / steps, {kind: value / steps for kind, value in self.sent.items()}


def alone() -> World:
    """This rank, whose process group was started before."""
    return World(dist.get_rank(), 0, dist.get_world_size(), 1, torch.device("cpu"))


def rank(options: Options, out: Path) -> int:
    """Measure all settings. Rank 0 writes the results to ``out``."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        trainings = {name: Training(options, words, Path(scratch)) for name, words in SETTINGS.items()}
        for training in trainings.values():
            training.block(2)  # sockets, buffers, the first thin matrices
        for _ in range(options.repeats):
            for name, training in trainings.items():
                seconds, bytes_sent = training.block(options.steps)
                if name not in found or seconds < found[name]["seconds"]:
                    found[name] = {"seconds": seconds, "bytes": bytes_sent}
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    return 0


# --------------------------------------------------------------------------------------- the results


def results(found: dict[str, Any]) -> dict[str, Any]:
    """``ms``, ``speedup`` and ``megabytes`` of each setting."""
    base = found["none"]["seconds"]
    return {
        name: {
            "ms": 1e3 * one["seconds"],
            "speedup": base / one["seconds"],
            "megabytes": {kind: one["bytes"][kind] / 1e6 for kind in KINDS},
        }
        for name, one in found.items()
    }


def text(gbit: float, shown: dict[str, Any], options: Options) -> str:
    rows = [
        [name, f"{one['ms']:.0f}", f"{one['speedup']:.2f}", *(f"{one['megabytes'][kind]:.3f}" for kind in KINDS)]
        for name, one in shown.items()
    ]
    title = f"{options.nodes} nodes, {gbit:g} Gbit/s, {options.batch_size} samples per rank"
    return report.table(title, ("compressed", "ms", "speedup", *(f"{kind} MB" for kind in KINDS)), rows)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gbit", type=float, nargs="+", default=[1.0, 10.0], help="of each node's link")
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4, help="samples per rank")
    parser.add_argument("--steps", type=int, default=4, help="of a block")
    parser.add_argument("--repeats", type=int, default=3, help="blocks of each setting")
    parser.add_argument("--model", type=Path, help="model config JSON (default: 21M parameters)")
    parser.add_argument("--json", action="store_true", help="print one JSON object, the tables go to stderr")
    parser.add_argument("--rank", type=lambda given: Options(**json.loads(given)), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank is not None:
        return rank(args.rank, args.out)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the network is taken down
    if (why := missing()) is not None:
        report.emit({"skipped": why}, f"not measured: {why}", args.json)
        return 0
    model = MODEL if args.model is None else json.loads(args.model.read_text())
    options = Options(args.nodes, args.batch_size, args.steps, args.repeats, model)
    found = {f"{gbit:g}": results(run(options, gbit)) for gbit in args.gbit}
    tables = [text(float(gbit), shown, options) for gbit, shown in found.items()]
    machine = report.machine(torch.device("cpu"), 1)
    report.emit({"machine": machine, **asdict(options), "gbit": found}, "\n\n".join([machine, *tables]), args.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
