"""``--dry_run``: what a run would do, found out without data, weights, process group or folder.

how long    an epoch is ceil(samples / global batch) steps; the schedules' length and where this run ends
how large   parameters, counted on torch's meta device; the sample state, 4 N columns / K bytes per rank, or
            2 N / K for a column in 16 bits
where       the run's folder and what appears in it
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from drrho_clip.schedules import Horizon
from training import preflight
from training.cache.captions import open_captions
from training.cache.features import check_captions, open_features
from training.checkpoint import resume, run_folder
from training.config.params import Config
from training.data.build import samples_per_epoch, steps_of
from training.data.samples import FeatureSource
from training.distributed.process_group import World
from training.loop.learning_rates import horizon
from training.models.described import reference_name
from training.models.pretrained import count_parameters


@dataclass(frozen=True)
class StateSize:
    """The sample state: ``columns`` numbers for each of ``rows`` samples, divided among the ranks.

    ``coded``: how many of them are kept in 16 bits; the others are float32.
    """

    rows: int
    columns: int
    world_size: int
    coded: int = 0

    @property
    def bytes_per_rank(self) -> int:
        return (4 * self.columns - 2 * self.coded) * math.ceil(self.rows / self.world_size)


def describe(config: Config, world_size: int | None = None) -> str:
    """The plan for ``world_size`` ranks (default: as launched, else ``--world_size``), a few lines of text.

    ValueError: an error with which the run itself would be refused, such as a folder that holds another run.
    """
    ranks = launched_ranks(config, os.environ) if world_size is None else world_size
    config = config.on_ranks(ranks)
    preflight.check_models(config)
    features = open_features(config)
    sections = [*_models(config, features)]
    if config.trains:
        preflight.check_batch(config, ranks)
        preflight.check_teachers(config, features)
        sections = [("loss", _loss(config)), *sections, *_training(config, ranks, features)]
    sections += [*(_caching(config) if config.cache.writes else _evaluation(config)), *_files(config)]
    width = max(len(name) for name, _ in sections) + 2
    what = "Training" if config.trains else "Caching" if config.cache.writes else "Evaluation"
    title = f"{what} on {_count(ranks, 'rank')} (dry run: nothing is done)"
    lines = [f"  {name:<{width}}{text}" for name, text in sections]
    return "\n".join([title, *lines, *(f"  remark: {remark}" for remark in config.remarks)])


def launched_ranks(config: Config, env: Mapping[str, str]) -> int:
    """The ranks that torchrun or srun started, else ``--world_size``: one process can plan for K ranks."""
    started = env.get("WORLD_SIZE") or env.get("SLURM_STEP_NUM_TASKS")
    return int(started) if started else config.distributed.world_size


def state_size(config: Config, world_size: int) -> StateSize:
    """How large the sample state is; no columns where the loss keeps none."""
    columns = len(config.loss.state_columns)
    rows = config.data.data_size if columns else 0
    return StateSize(rows, columns, world_size, len(config.loss.state_codes))


def _loss(config: Config) -> str:
    usage = config.reference.usage
    used = ["a distillation term"] if "distill" in usage and not config.loss.spec.distills else []
    used += ["batches selected by the reference"] if "select" in usage else []
    margins = "reference margins" if "ref" in usage else ""
    return ", ".join(filter(None, [f"{config.loss.name} ({config.loss.decided_by})", margins, *used]))


def _models(config: Config, features: FeatureSource | None) -> Iterator[tuple[str, str]]:
    c, r = config.model, config.reference
    forced = {"force_image_size": c.force_image_size, "force_custom_text": c.force_custom_text}
    if config.cache.writes == "captions":
        model = config.cache.cap_model
        yield (
            "captions by",
            _model(model, count_parameters(model, "--cap_model"), config.cache.cap_model_pretrained),
        )
    elif not config.cache.writes:
        yield "target", _model(c.model, count_parameters(c.model, "--model", **forced), c.pretrained)
    if features is not None:
        yield "reference", f"not built, its features are on disk: {features.describe()}"
    elif config.reads_features:
        yield "reference", "not built, its features are in the shards"
    elif r.named:
        weights = r.ref_model_checkpoint or r.ref_model_pretrained
        name = reference_name(r)[0]
        yield "reference", _model(r.ref_model or name, count_parameters(name, r.model_flag), weights)


def _model(name: str, parameters: int | None, weights: str) -> str:
    size = "size unknown before its download" if parameters is None else f"{parameters:,} parameters"
    return f"{name}, {size}, {f'weights {weights}' if weights else 'random weights'}"


def _training(config: Config, ranks: int, features: FeatureSource | None) -> Iterator[tuple[str, str]]:
    run = config.run
    samples = samples_per_epoch(config)
    steps = steps_of(samples, config, ranks)
    yield "data", f"{config.data.dataset_type} {config.data.train_data or ''}".rstrip()
    captions = open_captions(config)
    check_captions(features, captions)
    if captions is not None:
        yield "captions", f"the samples' own or synthetic ones: {captions.describe()}"
    per_rank = f"{run.batch_size}" + (f" in {run.accum_freq} micro-batches" if run.accum_freq > 1 else "")
    yield "global batch", f"{run.batch_size * ranks:,} samples: {_count(ranks, 'rank')} with {per_rank} each"
    yield "epoch", f"{samples:,} samples in {_count(steps, 'step')}"
    yield "steps", _steps(config, horizon(config.schedule, steps))
    state = state_size(config, ranks)
    coded = f" ({state.coded} in 16 bits)" if state.coded else ""
    what = f"{state.rows:,} rows of {state.columns} numbers{coded}, {state.bytes_per_rank / 1e6:,.3g} MB per rank"
    yield "sample state", what if state.columns else "none"


def _caching(config: Config) -> Iterator[tuple[str, str]]:
    c = config.cache
    yield "data", f"{config.data.dataset_type} {config.data.train_data or ''}".rstrip()
    what = "the reference's features" if c.writes == "features" else f"{c.num_syn_texts} captions"
    if c.writes == "features" and c.ref_features_views:
        what += f" of {c.ref_features_views} views"
    if c.writes == "features" and c.cached_syn_texts_dir:
        what += f" and of the captions in {c.cached_syn_texts_dir}"
    if c.ref_features_dtype:
        what += f" in {c.ref_features_dtype}"
    if c.ref_features_error_bound:
        what += f" with errors of at most {c.ref_features_error_bound:g}"
    job = f", as job {c.cache_rank + 1} of {c.cache_group_size}" if c.cache_group_size > 1 else ""
    folder = c.cached_ref_features_dir if c.writes == "features" else c.cached_syn_texts_dir
    yield "writes", f"{what} of each sample to {folder}/{job}"


def _steps(config: Config, length: Horizon) -> str:
    warmup = config.schedule.warmup
    parts = [f"{length.total_steps:,} in {_count(config.schedule.epochs, 'epoch')}"]
    if config.schedule.iters > 0:
        parts = [f"{length.total_steps:,} by --iters"]
    if not config.schedule.skip_scheduler:
        parts.append(f"{warmup:,} of warm-up")
        if warmup >= length.total_steps:
            parts.append("so the full learning rate is never reached")
    if length.end_step < length.total_steps:
        parts.append(f"this run stops after {length.end_step:,}")
    return ", ".join(parts)


def _evaluation(config: Config) -> Iterator[tuple[str, str]]:
    e = config.evaluation
    sets = [(e.val_data, "retrieval on", e.val_frequency)]
    sets += [(folder, "zero-shot on", e.zeroshot_frequency) for _, folder in e.zero_shot.values()]
    for path, what, frequency in sets:
        if path and (frequency or not config.trains):
            when = f", every {_count(frequency, 'epoch')} and at the end" if config.trains else ""
            yield "evaluation", f"{what} {path}{when}"


def _files(config: Config) -> Iterator[tuple[str, str]]:
    chosen = run_folder.choose_folder(config, World(0, 0, 1, 1, torch.device("cpu")))
    yield "folder", f"{chosen.path}/" + ("" if config.run.name else " (with the time of the start)")
    names = ["params.txt", "out.log"]
    if config.trains:
        names.append("checkpoints/epoch_N.pt")
        if config.run.save_every_n_steps or config.run.save_every_minutes:
            names.append("checkpoints/step_S.pt")
    if "tensorboard" in config.run.report_to:
        names.append("tensorboard/")
    yield "files", ", ".join(names)
    resumes = resume.locate_checkpoint(config, chosen)
    if resumes:
        yield "resumes", str(resumes)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
