"""Runs in miniature, for tests of checkpoints: a few hundred numbers that train on data which the step decides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.fixed_point import FixedPoint
from tests.support.stepping import OPTIM
from training.checkpoint.resume import resume
from training.checkpoint.run_state import RunState
from training.checkpoint.saver import Saver
from training.config.run import RunConfig
from training.distributed import ddp
from training.distributed.process_group import World
from training.loop.optimizer import create_optimizer

CPU = torch.device("cpu")
ROWS = 11
COLUMNS = ("log_u_image", "log_u_text")
IN_16_BITS = dict.fromkeys(COLUMNS, FixedPoint.of_bound(1e-3, -33, 89))
RUN = RunConfig(
    batch_size=4,
    global_batch_size=None,
    accum_freq=1,
    precision="fp32",
    seed=0,
    logs="logs",
    name=None,
    log_local=False,
    log_every_n_steps=1,
    report_to=frozenset(),
    wandb_notes="",
    wandb_project_name="",
    save_frequency=1,
    save_every_n_steps=None,
    save_every_minutes=None,
    keep_last=2,
    save_most_recent=False,
    save_published_state=False,
    delete_previous_checkpoint=False,
    resume=None,
    requeue_on_preempt=False,
    step_timeout=0.0,
    remote_sync=None,
    remote_sync_frequency=300,
    remote_sync_protocol="fsspec",
    copy_codebase=False,
    debug=False,
    profile=False,
    dry_run=False,
)


def save(paths: list[Path], state: RunState) -> None:
    """Save ``state`` under each of ``paths``, and wait until it is done."""
    with Saver(paths[0].parent, RUN) as saver:
        saver.save(state, [path.stem for path in paths])


def save_by_flags(folder: Path, state: RunState, config: RunConfig, *, final: bool) -> None:
    with Saver(folder, config) as saver:
        saver.save_epoch(state, final=final)


class Model(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.tower(x).square().mean() * self.logit_scale.exp()


class Run:
    """A run in miniature: each step trains on data that the step number decides, and writes rows."""

    def __init__(
        self, seed: int, optimizer: str = "adamw", rows: int = ROWS, scaler: bool = False, codes=None
    ) -> None:
        torch.manual_seed(seed)
        model = Model()
        self.rank, self.size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        world = World(self.rank, self.rank, self.size, self.size, CPU)
        self.wrapped = ddp.wrap(model, world, static_graph=False, sync_bn=False)
        self.state = RunState(
            name="run",
            model=model,
            optimizer=create_optimizer(model, replace(OPTIM, optimizer=optimizer), CPU),
            scaler=torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaler else None,
            sample_state=SampleState(rows, COLUMNS, codes=codes),
        )

    def train(self, steps: int) -> Run:
        s = self.state
        for _ in range(steps):
            generator = torch.Generator().manual_seed(s.step)
            index = torch.randperm(ROWS, generator=generator)[:4]
            data = torch.randn(4 * self.size, 3, generator=generator)[4 * self.rank :][:4]
            s.optimizer.zero_grad()
            loss = self.wrapped(data)
            if s.scaler is None:
                loss.backward()
                s.optimizer.step()
            else:
                s.scaler.scale(loss).backward()
                s.scaler.step(s.optimizer)
                s.scaler.update()
            values = {name: index * 0.5 - s.step + k for k, name in enumerate(COLUMNS)}
            s.sample_state.commit(StateUpdate(index, values))
            s.step += 1
        return self

    def epochs(self, n: int) -> Run:
        """Complete ``n`` epochs of 3 steps."""
        self.train(3 * n)
        self.state.epoch += n
        self.state.samples_seen = 12 * self.state.step
        return self

    def resumed(self, path: Path) -> Run:
        resume(path, self.state, steps_per_epoch=3, global_batch=12)
        return self

    def everything(self) -> dict[str, Tensor]:
        """All tensors of the run, the sample state whole."""
        s = self.state
        found = {f"model.{n}": t.clone() for n, t in s.model.state_dict().items()}
        for index, values in s.optimizer.state_dict()["state"].items():
            found |= {f"optimizer.{index}.{k}": torch.as_tensor(v).clone() for k, v in values.items()}
        for n, t in s.sample_state.sharded(s.sample_state.values()).items():
            found[f"rows.{n}"] = (t.full_tensor() if isinstance(t, DTensor) else t).clone()
        found["counters"] = torch.tensor([s.epoch, s.epoch_step, s.step, s.samples_seen])
        return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


def save_run(folder: str) -> dict[str, Tensor]:
    run = Run(0).epochs(2)
    save([Path(folder, "epoch_2.pt")], run.state)
    return run.everything()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def run_by_flags(folder: Path, epochs: int, *, last_steps: int = 0, **flags) -> Run:
    run = Run(0)
    for epoch in range(1, epochs + 1):
        run.epochs(1)
        save_by_flags(folder, run.state, replace(RUN, **flags), final=epoch == epochs and not last_steps)
    if last_steps:
        run.train(last_steps)
        run.state.epoch_step = last_steps
        save_by_flags(folder, run.state, replace(RUN, **flags), final=True)
    return run


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 16
    file.write_bytes(content)
