"""A run, from models to ``job.done``: reads like a table of contents."""

from __future__ import annotations

import socket
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from drrho_clip.losses.registry import LOG_U, TAU
from training import preflight
from training.cache import precompute
from training.cache.resident import Resident
from training.checkpoint import resume
from training.checkpoint.remote_sync import HURRY, remote_sync
from training.checkpoint.resume import checkpoint_to_resume
from training.checkpoint.run_folder import RunFolder, claim_folder
from training.checkpoint.run_state import RunState, of_a_run
from training.checkpoint.saver import Saver
from training.config.params import Config
from training.data.bad_samples import Skips
from training.data.build import build_train
from training.data.loader import TrainData
from training.distributed import collectives, process_group
from training.distributed.process_group import World
from training.distributed.signals import Agreement, listen, requeue
from training.distributed.watchdog import SAVE, Watchdog
from training.evaluation import best
from training.evaluation.evaluate import Evaluation, open_evaluation
from training.logger import EarlyRecords, RunLog, open_run
from training.loop.build import build_task, build_trainer, describe
from training.loop.checkpointer import Checkpointer
from training.loop.metrics import distributions, held_meters
from training.loop.task import Task
from training.loop.trainer import Trainer
from training.machine import limits
from training.models.build import build_target, start_temperature
from training.models.frozen import build_reference
from training.numerics import set_numerics
from training.preflight import Opened


@dataclass(frozen=True)
class Start:
    """What a run begins with, checked before anything is built or written.

    ``checkpoint``: what it resumes from; None: it starts at the beginning.
    """

    config: Config
    world: World
    opened: Opened
    folder: RunFolder
    checkpoint: Path | None

    @property
    def remarks(self) -> tuple[str, ...]:
        """What is logged before anything else."""
        return (*self.config.remarks, *self.opened.remarks)


@dataclass(frozen=True)
class Ended:
    """How a run ended. ``complete``: nothing is left to do. ``requeue``: Slurm should start it again."""

    complete: bool = True
    requeue: bool = False


def launch(config: Config) -> None:
    """Join the other ranks and do what ``config`` asks for. ValueError: an error that the user can fix."""
    with EarlyRecords() as early:
        world = process_group.start(config.distributed, config.run.step_timeout)
        config = config.on_ranks(world.world_size)
        opened = preflight.check(config, world)
        with claim_folder(config, world) as folder:
            checkpoint = None if config.cache.writes else checkpoint_to_resume(config, folder)
            start = Start(config, world, opened, folder, checkpoint)
            with open_run(config, world, folder) as log:
                early.hand_over()
                if config.cache.writes:
                    write_cache(start, log)
                else:
                    # Outside of the run, as letting go of features takes time: requeuing comes first.
                    with _features_in_memory(start):
                        _run(start, log)


def _run(start: Start, log: RunLog) -> None:
    config, world = start.config, start.world
    with remote_sync(config.run, start.folder.path) as copying:
        if start.folder.restarted and start.checkpoint is None:
            log.info("restarted before the first checkpoint: starts at the beginning")
        _begin(start, log)
        with Watchdog(world, config.run.step_timeout) as watchdog:
            ended = train(start, log, watchdog) if config.trains else evaluate(start, log)
        if ended.complete:
            log.done()
        if ended.requeue:
            copying.patience = HURRY
    if ended.requeue:
        requeue()


def _features_in_memory(start: Start) -> AbstractContextManager[object]:
    features, kept = start.opened.features, start.opened.kept
    if features is None or not kept or not start.world.is_local_main:
        return nullcontext()
    return Resident(features.paths, kept)


def _begin(start: Start, log: RunLog) -> None:
    log.info(_hardware(start.world))
    for remark in start.remarks:
        log.info(remark)
    _set_numerics(start.config, start.world, log)


def _hardware(world: World) -> str:
    """The line of the log about the machines and cards of all ranks. Collective."""
    cuda = world.device.type == "cuda"
    card = torch.cuda.get_device_name(world.device) if cuda else f"{world.device.type} with {limits.cores()} cores"
    kinds = Counter(collectives.gather_object((socket.gethostname(), card)))
    cards = ", ".join(f"{n} x {kind} on {host}" for (host, kind), n in kinds.items())
    return f"hardware: {cards}; torch {torch.__version__}"


def write_cache(start: Start, log: RunLog) -> None:
    """Go through the training data once and write the cache that the flags ask for."""
    _begin(start, log)
    precompute.write(start.config, start.world, log, start.opened.table, start.opened.captions)
    log.done()


def evaluate(start: Start, log: RunLog) -> Ended:
    """Evaluate the model without training, as it is built or as ``--resume`` loads it."""
    config, world, opened = start.config, start.world, start.opened
    target = build_target(config, world, start.checkpoint)
    evaluation = open_evaluation(target, config, world, log, opened.sets, opened.val_table, opened.benchmark)
    state = RunState(name=start.folder.name, model=target.module)
    if start.checkpoint is not None:
        resume.resume(start.checkpoint, state, steps_per_epoch=0, global_batch=0)
    evaluation(target.module, state.epoch, state.step, stem=state.stem, final=True)
    return Ended()


def train(start: Start, log: RunLog, watchdog: Watchdog) -> Ended:
    """Train epoch by epoch, from the beginning or from a checkpoint."""
    config, world, folder, opened = start.config, start.world, start.folder, start.opened
    target = build_target(config, world, start.checkpoint)
    reference = build_reference(config, world)
    evaluation = open_evaluation(target, config, world, log, opened.sets, opened.val_table, opened.benchmark)
    train_data = build_train(config, world, target, reference, opened.features, opened.captions, opened.table)
    task = build_task(config, world, target, reference)
    if task.loss.state is not None:
        train_data.announce = task.loss.state.announce
    trainer = build_trainer(config, world, folder, log, task, train_data)
    state = RunState(
        name=folder.name,
        model=task.bare,
        optimizer=trainer.stepper.optimizer,
        compression=task.compression,
        scaler=trainer.stepper.scaler,
        sample_state=task.loss.state,
        flags={name: str(value) for name, value in config.flags.items()},
        data_sizes=config.data.data_sizes,
        description=target.description,
    )
    log.info(describe(config, world))
    if start.checkpoint is not None:
        _resume(start, start.checkpoint, log, state, trainer)
    if config.run.debug:
        log.watch(task.bare)
    _draw_by_virtual_rank(log, task, train_data, config.run.batch_size)
    with (
        trainer.profiler,
        Saver(folder.checkpoints, config.run, initial_tau=config.loss.initial_tau) as saver,
        listen() as interrupts,
        Agreement() as agreement,
    ):
        keeping = Checkpointer(config.run, trainer, state, saver, interrupts, agreement, watchdog)
        if start.checkpoint is not None and _evaluation_is_missing(folder, start.checkpoint, state, trainer):
            _evaluate(log, trainer, state, evaluation)
        _train_epochs(log, trainer, state, keeping, evaluation, watchdog, config.run.report_to)
        with watchdog.paused(SAVE):
            requeue_wanted = keeping.stopped and keeping.leave(log, folder.checkpoints)
            saver.close()
    return Ended(complete=not keeping.stopped, requeue=requeue_wanted)


def _set_numerics(config: Config, world: World, log: RunLog) -> None:
    set_numerics(world.device, seed=config.run.seed + world.rank, deterministic=config.run.deterministic)
    if world.device.type == "cpu" and config.run.precision == "amp":
        log.info("--precision amp on the CPU is float32; amp_bf16 works there too")


def _resume(start: Start, checkpoint: Path, log: RunLog, state: RunState, trainer: Trainer) -> None:
    config, per_epoch = start.config, trainer.data.steps_per_epoch
    if config.model.pretrained:
        log.info(f"--pretrained {config.model.pretrained} has no effect: the weights are those of the checkpoint")
    global_batch = config.run.batch_size * trainer.world.world_size
    resumed = resume.resume(
        checkpoint,
        state,
        steps_per_epoch=per_epoch,
        global_batch=global_batch,
        u_format=config.run.u_format,
    )
    if not resumed:
        start_temperature(state.model, config.loss)
    with of_a_run(checkpoint):
        if state.sample_state is not None:
            trainer.data.check_rows(state.stream)
        begun = trainer.data.resume(state.stream, state.epoch, state.epoch_step)
        trainer.step = state.step = state.epoch * per_epoch + begun
        trainer.meters = held_meters(state.meters) if begun else {}
        if state.skipped:
            trainer.stepper.skipped.load_state_dict(state.skipped)
    # The evaluation that followed the checkpoint is not in it.
    for result in _own_evaluations(start.folder, checkpoint) or ():
        if result.get("step") == state.step:
            state.best = best.update(state.best, result, result["epoch"])
    log.goes_on(trainer.step)


def _draw_by_virtual_rank(log: RunLog, task: Task, data: TrainData, batch_size: int) -> None:
    """Batch selection draws from each virtual rank's samples, and so keeps the same on any number of ranks."""
    if task.selection is None:
        return
    draw = task.kept(batch_size) // task.selection.n_chunks
    if draw % data.parts:
        log.warning(
            f"batch selection draws {draw} samples per rank at a time, which the {data.parts} virtual ranks of a "
            "rank (--lanes) do not divide: it draws from all of a rank's samples, and keeps others than it would "
            "on another number of ranks"
        )
    else:
        task.parts = data.parts


def _evaluation_is_missing(folder: RunFolder, checkpoint: Path, state: RunState, trainer: Trainer) -> bool:
    """Whether this run ended between a checkpoint and the evaluation that follows it."""
    results = _own_evaluations(folder, checkpoint)
    follows = state.epoch_step == 0 or trainer.finished
    return results is not None and follows and state.step not in {result.get("step") for result in results}


def _own_evaluations(folder: RunFolder, checkpoint: Path) -> list[dict[str, Any]] | None:
    """The evaluations of this run so far; None: the checkpoint is not its own. Collective."""
    own = checkpoint.resolve().parent == folder.checkpoints.resolve()
    return collectives.on_main(folder.evaluations) if own else None


def _evaluate(log: RunLog, trainer: Trainer, state: RunState, evaluation: Evaluation) -> None:
    metrics = evaluation(state.model, state.epoch, state.step, stem=state.stem, final=trainer.finished)
    if metrics:
        state.best = best.update(state.best, metrics, state.epoch)
        log.info(best.describe(state.best))


def _train_epochs(
    log: RunLog,
    trainer: Trainer,
    state: RunState,
    keeping: Checkpointer,
    evaluation: Evaluation,
    watchdog: Watchdog,
    report_to: frozenset[str],
) -> None:
    def after_step() -> bool:
        watchdog.beat(trainer.step)
        return keeping.after_step()

    watchdog.beat(trainer.step)
    while not trainer.finished and not keeping.stopped:
        trainer.train_epoch(after_step)
        if keeping.stopped:
            return
        with watchdog.paused(SAVE):
            keeping.after_epoch()
        with watchdog.paused():
            _report_skips(log, train_data=trainer.data, epoch=state.epoch)
            if keeping.asked_to_stop():
                return
            _report_sample_state(log, state, report_to)
            _evaluate(log, trainer, state, evaluation)
    log.info(f"trained {trainer.step} steps")


def _report_skips(log: RunLog, train_data: TrainData, epoch: int) -> None:
    """Log what all ranks have left out since the last call, after ``epoch`` epochs. All ranks call it together."""
    total = Skips()
    for skips in collectives.gather_object(train_data.skips.take_epoch()):
        total.merge(skips)
    by_reason = {f"data/skipped/{reason.replace(' ', '_')}": float(n) for reason, n in total.counts.items()}
    log.info(f"samples left out since the last epoch: {total}")
    log.scalars(epoch, {"data/skipped": float(total.counts.total()), **by_reason}, "epoch")


def _report_sample_state(log: RunLog, state: RunState, report_to: frozenset[str]) -> None:
    """Send how u, and each sample's temperature where it has one, are spread. All ranks call it together."""
    if state.sample_state is None or not report_to:
        return
    table = state.sample_state
    columns = {name: partial(table.blocks, name) for name in table.columns if name in LOG_U + TAU}
    log.histograms(state.epoch, {f"sample_state/{name}": d for name, d in distributions(columns).items()})
