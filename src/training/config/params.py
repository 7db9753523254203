"""The run's configuration: frozen, grouped, checked once; nothing writes to it afterwards.

``flags`` declares the command line, ``parser`` reads it, and each group resolves its own part. ``parse`` returns
one ``Config`` or refuses with one sentence. Fields have the names of their flags.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from training.config import cache, data, evaluation, model, objective, optim, reference, run
from training.config.cache import CacheConfig
from training.config.data import DataConfig
from training.config.evaluation import EvalConfig
from training.config.given import FrozenMapping, Given, Refusal, frozen
from training.config.model import ModelConfig
from training.config.objective import LossConfig
from training.config.optim import OptimConfig, ScheduleConfig
from training.config.parser import check_values, read
from training.config.reference import ReferenceConfig
from training.config.remarks import Setting, collect
from training.config.run import DistributedConfig, RunConfig

GROUPS = (run, objective, reference, cache, data, optim, model, evaluation)  # in the order of their remarks


@dataclass(frozen=True)
class Config:
    """The complete configuration of a run.

    ``flags`` holds the value of every flag as given, which a resumed run compares with those of its checkpoint.
    ``remarks`` are sentences for the log, about flags that have no effect in this combination. Remarks that depend
    on the device come from the trainer.
    """

    data: DataConfig
    evaluation: EvalConfig
    model: ModelConfig
    reference: ReferenceConfig
    cache: CacheConfig
    loss: LossConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    run: RunConfig
    distributed: DistributedConfig
    flags: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def recorded_flags(self) -> dict[str, Any]:
        """``flags`` with the optimizer's values as they act, by which runs are compared: params.txt and W&B."""
        return {**self.flags, **asdict(self.optim)}

    @property
    def trains(self) -> bool:
        """Whether there is anything to train, rather than only to evaluate."""
        return self.schedule.epochs > 0

    @property
    def reads_features(self) -> bool:
        """Whether a reference's features come with the data, so that no reference is built."""
        stored = self.cache.cached_ref_features_dir or self.data.dataset_reinforcement
        return bool(stored) and not self.cache.writes

    def on_ranks(self, ranks: int) -> Config:
        """The configuration for ``ranks`` ranks: ``--global_batch_size`` sets the batch and its micro-batches.

        ValueError: the global batch cannot be divided evenly.
        """
        run, total = self.run, self.run.global_batch_size
        if total is None:
            return self
        share, rest = divmod(total, ranks)
        if rest:
            raise ValueError(
                f"--global_batch_size {total}: {ranks} ranks cannot share it evenly; give a multiple of {ranks}"
            )
        trained = self.selected(share, f"--global_batch_size {total} on {ranks} ranks")
        micro = -(-trained // run.batch_size)
        if trained % micro:
            raise ValueError(
                f"--global_batch_size {total}: the {trained} samples of each of {ranks} ranks cannot be split "
                f"into {micro} equal micro-batches of at most --batch-size {run.batch_size}; choose one "
                f"that divides {trained}"
            )
        if share % micro:  # selection embeds all of them, in as many parts
            raise ValueError(
                f"--global_batch_size {total}: the {share} samples of each of {ranks} ranks, of which selection "
                f"keeps {trained}, cannot be split into the {micro} equal micro-batches that --batch-size "
                f"{run.batch_size} asks for; give --batch-size {trained}, or another global batch"
            )
        if micro > 1 and self.distributed.ddp_static_graph:
            raise ValueError(
                f"--ddp-static-graph does not work with the {micro} micro-batches that {ranks} ranks need for "
                f"--global_batch_size {total}: leave it out, or give --batch-size {share}"
            )
        return replace(self, run=replace(run, batch_size=share, accum_freq=micro))

    def selected(self, share: int, said: str) -> int:
        """Of a rank's ``share`` samples, how many it trains on. ValueError: selection cannot draw them equally."""
        reference = self.reference
        if "select" not in reference.usage:
            return share
        exact, draws = share * (1 - reference.ref_filter_ratio), reference.ref_filter_n_chunks
        kept = round(exact)
        if kept < 1 or not math.isclose(kept, exact, abs_tol=1e-6) or kept % draws:
            raise ValueError(
                f"{said}: --ref_filter_ratio {reference.ref_filter_ratio:g} would keep {exact:g} of the {share} "
                f"samples of a rank, in --ref_filter_n_chunks {draws} equal draws; choose values that keep a "
                "whole number in each draw"
            )
        return kept


def parse(argv: Sequence[str] | None = None) -> Config:
    """The configuration that ``argv`` (default: the command line) asks for. Refusal: as ``configure``."""
    return configure(read(sys.argv[1:] if argv is None else argv))


def configure(given: Given) -> Config:
    """``given`` checked and grouped. Refusal: the first thing that is wrong with it."""
    check_values(given)
    kind = data.kind_of_data(given, "train_data")
    writes = cache.writes(given)
    trains = given.epochs > 0 and kind != "none" and not writes
    _check_something_to_do(given, trains or bool(writes))
    model_config = model.resolve_model(given)
    optim_config = optim.resolve_optimizer(given)
    schedule_config = optim.resolve_schedule(given, optim_config.lr, trains)
    data_config = data.resolve_data(given, kind, trains)
    data.check_file(given, "train_data")
    evaluation_config = evaluation.resolve_evaluation(given)
    run_config = run.resolve_run(given)
    cache_config = cache.resolve_cache(given, kind, trains)
    chosen = objective.resolve_objective(given)
    stored = ("cached_ref_features_dir", "dataset_reinforcement")
    reads = next((key for key in stored if given.values[key]), "") if not writes else ""
    reference_config = reference.resolve_reference(given, chosen.spec, reads=reads, writes=writes)
    loss_config = objective.resolve_loss(given, chosen, trains)
    if trains:
        run.check_batch(given, reference_config.usage)
        objective.check_weight(given, chosen.spec, reference_config.usage)
    setting = Setting(
        given=given,
        loss=chosen.spec,
        temperature_scheme=chosen.temperature_scheme,
        usage=reference_config.usage,
        kinds=frozenset({kind, evaluation_config.val_dataset_type}),
        report_to=run_config.report_to,
        trains=trains,
        writes_cache=bool(writes),
    )
    return Config(
        data=data_config,
        evaluation=evaluation_config,
        model=model_config,
        reference=reference_config,
        cache=cache_config,
        loss=loss_config,
        optim=optim_config,
        schedule=schedule_config,
        run=run_config,
        distributed=given.group(DistributedConfig),
        flags=FrozenMapping({key: frozen(value) for key, value in given.values.items()}),
        remarks=collect(
            setting,
            [idle for group in GROUPS for idle in group.IDLE],
            [pitfall for group in (reference, cache, objective, run) for pitfall in group.PITFALLS],
        ),
    )


def _check_something_to_do(given: Given, works: bool) -> None:
    """Refusal: the run would neither train nor write a cache nor evaluate."""
    if works or evaluation.evaluates(given):
        return
    if given.epochs == 0:
        raise Refusal(f"--epochs 0 only evaluates: give {evaluation.any_of(evaluation.DATA)}")
    raise Refusal(
        "--train-data is missing: give data to train on, or data to evaluate on (--imagenet-val, --val-data)"
    )
