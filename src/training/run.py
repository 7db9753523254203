"""A run, from models to ``job.done``: reads like a table of contents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from drrho_clip.reference import CachedReference, Reference
from training import preflight
from training.cache import precompute
from training.checkpoint import best, catalog
from training.checkpoint.remote_sync import HURRY, remote_sync
from training.checkpoint.run_folder import RunFolder, checkpoint_to_resume, choose_folder
from training.checkpoint.run_state import RunState
from training.checkpoint.saver import Saver
from training.config.params import Config
from training.data.bad_samples import Skips
from training.data.build import TrainData, build_train
from training.distributed import process_group
from training.distributed.process_group import World
from training.distributed.signals import Agreement, listen, requeue
from training.distributed.watchdog import SAVE, Watchdog
from training.evaluation.evaluate import Evaluation, open_evaluation, open_sets
from training.evaluation.zero_shot import ClassificationSet
from training.logger import EarlyRecords, RunLog, held_meters, open_run
from training.loop.build import build_distillation, build_loss, build_selection, constant_scale
from training.loop.checkpointer import Safekeeping
from training.loop.optimizer import LearningRates, create_optimizer, horizon
from training.loop.profiler import open_profiler
from training.loop.speed_monitor import DataWait
from training.loop.step import Stepper
from training.loop.task import Task
from training.loop.trainer import Trainer
from training.models import precision
from training.models.build import BuiltModel, build_reference, build_target, start_temperature


@dataclass(frozen=True)
class Start:
    """What a run begins with, checked before anything is built or written.

    ``sets``: what zero-shot accuracy is measured on. ``checkpoint``: where it goes on; None at its beginning.
    """

    config: Config
    world: World
    folder: RunFolder
    sets: dict[str, ClassificationSet]
    checkpoint: Path | None


@dataclass(frozen=True)
class Ended:
    """How a run ended. ``complete``: nothing is left to do. ``requeue``: Slurm is to start it again."""

    complete: bool = True
    requeue: bool = False


def launch(config: Config) -> None:
    """Join the other ranks and do what ``config`` asks for. ValueError: what the user can mend."""
    with EarlyRecords() as early:
        world = process_group.start(config.distributed)
        config = config.on_ranks(world.world_size)
        remarks = preflight.check(config, world)
        folder = choose_folder(config, world)
        if config.cache.writes:
            write_cache(config, world, folder, remarks)
            return
        start = Start(config, world, folder, open_sets(config), checkpoint_to_resume(config, folder))
        with open_run(config, world, folder) as log:
            early.hand_over()
            _run(start, log, remarks)


def _run(start: Start, log: RunLog, remarks: list[str]) -> None:
    config, world = start.config, start.world
    with remote_sync(config.run, start.folder.path) as copying:
        if start.folder.restarted and start.checkpoint is None:
            log.info("restarted before the first checkpoint: starts at the beginning")
        for remark in (*config.notes, *remarks):
            log.info(remark)
        _set_numerics(config, world, log)
        with Watchdog(world, config.run.step_timeout) as watchdog:
            ended = train(start, log, watchdog) if config.trains else evaluate(start, log)
        if ended.complete:
            log.done()
        if ended.requeue:
            copying.patience = HURRY
    if ended.requeue:
        requeue()


def write_cache(config: Config, world: World, folder: RunFolder, remarks: list[str]) -> None:
    """Go through the training data once and keep what the flags ask for."""
    with open_run(config, world, folder) as log:
        for remark in (*config.notes, *remarks):
            log.info(remark)
        _set_numerics(config, world, log)
        precompute.write(config, world, log)
        log.done()


def evaluate(start: Start, log: RunLog) -> Ended:
    """Evaluate the model, as built or as ``--resume`` has it, without training."""
    target = build_target(start.config, start.world)
    evaluation = open_evaluation(target, start.config, start.world, log, start.sets)
    state = RunState(name=start.folder.name, model=target.module)
    if start.checkpoint is not None:
        catalog.resume(start.checkpoint, state, steps_per_epoch=0, global_batch=0)
    evaluation(target.module, state.epoch, state.step, final=True)
    return Ended()


def train(start: Start, log: RunLog, watchdog: Watchdog) -> Ended:
    """Train epoch by epoch, from the beginning or from a checkpoint."""
    config, world, folder = start.config, start.world, start.folder
    target = build_target(config, world)
    reference = build_reference(config, world)
    evaluation = open_evaluation(target, config, world, log, start.sets)
    train_data = build_train(config, world, target, reference)
    task = _build_task(config, world, target, reference)
    trainer = _build_trainer(config, world, folder, log, task, train_data)
    state = RunState(
        name=folder.name,
        model=task.bare,
        optimizer=trainer.stepper.optimizer,
        scaler=trainer.stepper.scaler,
        sample_state=task.loss.state,
        flags={name: str(value) for name, value in config.flags.items()},
        data_sizes=config.data.data_sizes,
    )
    log.info(_describe(config, world))
    if start.checkpoint is not None:
        _resume(start, log, state, trainer)
    if config.run.debug:
        log.watch(task.bare)
    with (
        trainer.profiler,
        Saver(folder.checkpoints, config.run, initial_tau=config.loss.temperature or 0.07) as saver,
        listen() as interrupts,
        Agreement() as agreement,
    ):
        keeping = Safekeeping(config.run, trainer, state, saver, interrupts, agreement, watchdog)
        if start.checkpoint is not None and _evaluation_is_missing(start, state, trainer):
            _evaluate(log, trainer, state, evaluation)
        _train_epochs(log, trainer, state, keeping, evaluation, watchdog)
        with watchdog.paused(SAVE):
            requeue_wanted = keeping.stopped and keeping.leave(log, folder.checkpoints)
            saver.close()
    return Ended(complete=not keeping.stopped, requeue=requeue_wanted)


def _describe(config: Config, world: World) -> str:
    """What is trained on what, in one line."""
    margins = " with reference margins" if "ref" in config.reference.usage else ""
    micro = f" in {config.run.accum_freq} micro-batches" if config.run.accum_freq > 1 else ""
    return (
        f"loss {config.loss.name} ({config.loss.decided_by}){margins}; {world.world_size} x {world.device.type}, "
        f"{config.run.precision}, {config.run.batch_size} samples per rank and step{micro}; "
        f"{config.optim.optimizer}"
    )


def _set_numerics(config: Config, world: World, log: RunLog) -> None:
    if world.device.type == "cuda":
        # TF32 for the towers' float32 products; the losses ask for exact ones themselves.
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    elif config.run.precision == "amp":
        log.info("--precision amp on the CPU is float32; amp_bf16 works there too")
    torch.manual_seed(config.run.seed + world.rank)


def _build_task(config: Config, world: World, target: BuiltModel, reference: BuiltModel | None) -> Task:
    run_precision = precision.resolve(config.run.precision, world.device)
    model = process_group.wrap(
        target.module,
        world,
        static_graph=config.distributed.ddp_static_graph,
        sync_bn=config.model.use_bn_sync,
    )
    frozen = CachedReference() if config.cache.cached_ref_features_dir else None
    if reference is not None:
        pixels = reference.preprocess
        frozen = Reference(reference.module, pixels.mean, pixels.std, run_precision.autocast_dtype)
    if config.model.torchcompile:
        model = torch.compile(model)
        frozen = frozen and frozen.compile()
    return Task(
        model=model,
        bare=target.module,
        mean=target.preprocess.mean,
        std=target.preprocess.std,
        precision=run_precision,
        loss=build_loss(config, world.device),
        loss_weight=config.loss.loss_weight,
        reference=frozen,
        margins="ref" in config.reference.usage or config.loss.name == "distill",
        constant_scale=constant_scale(config),
        distillation=build_distillation(config),
        selection=build_selection(config),
        seed=config.run.seed,
    )


def _build_trainer(
    config: Config, world: World, folder: RunFolder, log: RunLog, task: Task, train_data: TrainData
) -> Trainer:
    length = horizon(config.schedule, train_data.steps_per_epoch)
    schedule = config.schedule
    if not schedule.skip_scheduler and schedule.warmup >= length.total_steps and world.is_main:
        log.warning(
            f"--warmup {schedule.warmup}: the run has {length.total_steps} steps, so the full learning rate is "
            "never reached; give fewer steps of warm-up"
        )
    optimizer = create_optimizer(task.bare, config.optim, world.device)
    stepper = Stepper(
        task,
        optimizer,
        accum=config.run.accum_freq,
        scaler=task.precision.scaler(),
        grad_clip_norm=config.optim.grad_clip_norm,
        logit_scale_bound=config.loss.logit_scale_bound,
        max_skipped_steps=config.optim.max_skipped_steps,
    )
    return Trainer(
        stepper,
        LearningRates(optimizer, config.optim, config.schedule, length.total_steps, length.cooldown_steps),
        train_data,
        length,
        world,
        log,
        open_profiler(config.run.profile, folder.path, world),
        DataWait(config.data.workers, world.local_world_size),
        log_every=config.run.log_every_n_steps,
    )


def _resume(start: Start, log: RunLog, state: RunState, trainer: Trainer) -> None:
    config, per_epoch = start.config, trainer.data.steps_per_epoch
    if config.model.pretrained:
        log.info(f"--resume comes before --pretrained {config.model.pretrained}: weights are the checkpoint's")
    global_batch = config.run.batch_size * trainer.world.world_size
    resumed = catalog.resume(
        start.checkpoint,
        state,
        steps_per_epoch=per_epoch,
        global_batch=global_batch,
        u_format=config.run.u_format,
    )
    if not resumed:
        start_temperature(state.model, config.loss)
    begun = trainer.data.resume(state.stream, state.epoch, state.epoch_step)
    trainer.step = state.step = state.epoch * per_epoch + begun
    trainer.meters = held_meters(state.meters) if begun else {}
    if state.skipped:
        trainer.stepper.skipped.load_state_dict(state.skipped)
    for result in _own_evaluations(start) or ():  # the one that followed the checkpoint is not in it
        if result.get("step") == state.step:
            state.best = best.update(state.best, result, result["epoch"])
    log.goes_on(trainer.step)


def _evaluation_is_missing(start: Start, state: RunState, trainer: Trainer) -> bool:
    """Whether this run was ended between a checkpoint and the evaluation that follows it."""
    results = _own_evaluations(start)
    follows = state.epoch_step == 0 or trainer.finished
    return results is not None and follows and state.step not in {result.get("step") for result in results}


def _own_evaluations(start: Start) -> list[dict[str, Any]] | None:
    """What this run has measured so far; None where the checkpoint is not its own. Collective."""
    own = start.checkpoint.resolve().parent == start.folder.checkpoints.resolve()
    return process_group.on_main(start.folder.evaluations) if own else None


def _evaluate(log: RunLog, trainer: Trainer, state: RunState, evaluation: Evaluation) -> None:
    metrics = evaluation(state.model, state.epoch, state.step, final=trainer.finished)
    if metrics:
        state.best = best.update(state.best, metrics, state.epoch)
        log.info(best.describe(state.best))


def _train_epochs(
    log: RunLog,
    trainer: Trainer,
    state: RunState,
    keeping: Safekeeping,
    evaluation: Evaluation,
    watchdog: Watchdog,
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
            _evaluate(log, trainer, state, evaluation)
    log.info(f"trained {trainer.step} steps")


def _report_skips(log: RunLog, train_data: TrainData, epoch: int) -> None:
    """What all ranks have left out since the last call, after ``epoch`` epochs. All ranks call it together."""
    total = Skips()
    for skips in process_group.gather_object(train_data.skips.take_epoch()):
        total.merge(skips)
    by_reason = {f"data/skipped/{reason.replace(' ', '_')}": float(n) for reason, n in total.counts.items()}
    log.info(f"samples left out since the last epoch: {total}")
    log.scalars(epoch, {"data/skipped": float(total.counts.total()), **by_reason}, "epoch")
