"""``python -m training.evaluate``: from a checkpoint and a folder of sets to a file of results and a table."""

from __future__ import annotations

import argparse
import ast
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import open_clip

from training.checkpoint import catalog
from training.checkpoint.architecture import description_at
from training.config.flags import ALL
from training.config.model import brings_weights
from training.config.params import Config, parse
from training.distributed import process_group
from training.distributed.collectives import on_main
from training.distributed.process_group import World
from training.evaluation.benchmark.benchmark import Outcome, evaluate_sets
from training.evaluation.benchmark.encoder import Encoder
from training.evaluation.benchmark.results import Results, digest_of, open_results, table
from training.evaluation.benchmark.sets import Catalog, find_sets, needed
from training.evaluation.benchmark.tasks import TASKS
from training.logger import ProgressBar
from training.machine import console
from training.models import precision
from training.models.build import build_target
from training.models.create import BuiltModel
from training.models.frozen import build_saved
from training.predictions import folder_of

_log = logging.getLogger(__name__)

_CHECKPOINT = re.compile(r"epoch_(\d+)\.pt")
# What makes a model other than its name: flags that a run's params.txt holds.
_FORCING = ("force_quick_gelu", "force_custom_text", "force_image_size", "image_mean", "image_std", "siglip")
# The same of OpenCLIP's trainer alone, which has no flags here: field of the preprocess config -> key, and values.
_PIXELS = {
    "interpolation": ("image_interpolation", ("bicubic", "bilinear", "random")),
    "resize_mode": ("image_resize_mode", ("shortest", "longest", "squash")),
}


@dataclass(frozen=True)
class Chosen:
    """What is evaluated. ``model`` and ``weights``: as ``--model`` and ``--pretrained`` take them.

    ``run``: the folder of the run that it belongs to, None: it belongs to none. ``stem``: what its results are
    called by. ``flags``: those of the run that make its model another one than its name says. ``preprocess``,
    ``context_length``: the same, where there is no flag for it. ``describes``: the checkpoint says of which model
    it is, and ``model`` may be ''.
    """

    model: str
    weights: str
    stem: str
    run: Path | None = None
    flags: tuple[str, ...] = ()
    preprocess: Mapping[str, str] = field(default_factory=dict)
    context_length: int | None = None
    describes: bool = False


def evaluate(given: argparse.Namespace) -> int:
    """Evaluate what the command line says. Returns the exit code. Collective. ValueError: the command is wrong."""
    chosen = choose(given.checkpoint, given.model or "", given.epoch)
    path = results_path(chosen, given.out, given.checkpoint)
    config = configuration(chosen, given)
    world = process_group.start(config.distributed)
    with _lines_on_stderr(world):
        return _evaluate(given, chosen, path, config, world)


def _evaluate(given: argparse.Namespace, chosen: Chosen, path: Path, config: Config, world: World) -> int:
    catalog = on_main(lambda: find_sets(given.data_dir, given.tasks, "--data_dir", "--tasks"))
    built = build(chosen, config, world)
    digest = on_main(lambda: digest_of(built.module, given.precision, built.preprocess))
    # With --out, results are wanted in another place than the run's folder.
    predictions = folder_of(path) if given.out is None else None
    results, remark = on_main(lambda: open_results(path, digest, predictions))
    todo = [one for one in catalog.found if one.key not in results.lines]
    if world.is_main:
        if remark:
            _log.warning(remark)
        if done := len(catalog.found) - len(todo):
            _log.info("%d of %d sets have results of these weights already", done, len(catalog.found))
        if Path(given.checkpoint).expanduser().is_dir():
            _log.info("the checkpoint is %s", chosen.weights)
        _log.info("results go to %s", path)

    encoder = Encoder(
        built.module.eval(),
        built,
        world,
        precision.resolve(given.precision, world.device),
        partial(ProgressBar, shown=world.is_main, every=60.0),
        batch_size=given.batch_size,
        workers=given.workers,
    )
    outcome = evaluate_sets(encoder, todo, results.keep)
    if world.is_main:
        console.show(summary(results, catalog, outcome))
    return 1 if outcome.failed else 0


def choose(checkpoint: str, model: str, epoch: int | None) -> Chosen:
    """What the values of ``--checkpoint``, ``--model`` ('': not given) and ``--epoch`` name.

    ValueError: there is no such checkpoint, or it is not known of which model it is.
    """
    said, path = f"--checkpoint {checkpoint}", Path(checkpoint).expanduser()
    if path.is_dir():
        path = _of_run(path, epoch, said)
    elif epoch is not None:
        raise ValueError(f"--epoch {epoch}: {said} is not the folder of a run; give that folder, or leave it out")
    if not path.is_file():
        return _named(checkpoint, model, said)
    if description_at(path) is not None:  # then it says more than a name does
        return Chosen(model, str(path), path.stem, _folder_of_run(path), describes=True)
    run = _folder_of_run(path)
    held = _params(run / "params.txt") if run is not None else {}
    name = model or held.get("model", "")
    if not name:
        raise ValueError(
            f"{said}: it does not say of which model it is; give --model, a name or a model config JSON"
        )
    if name != held.get("model"):
        return Chosen(name, str(path), path.stem, run)
    tag = _tag(held, name)
    return Chosen(
        name, str(path), path.stem, run, _forcing(held, tag), _preprocess(held, tag), _context_length(held)
    )


def build(chosen: Chosen, config: Config, world: World) -> BuiltModel:
    """The model as its checkpoint says, or else as the flags of its run do. ValueError: it cannot be built."""
    if chosen.describes:
        return build_saved(chosen.weights, chosen.model, world, config.run.precision)
    with _in_our_words(chosen):
        return build_target(config, world, preprocess=chosen.preprocess, context_length=chosen.context_length)


def results_path(chosen: Chosen, out: str | None, checkpoint: str) -> Path:
    """The file of results. ValueError: no run says where, and neither does ``out``, the value of ``--out``."""
    if out is not None:
        path = Path(out).expanduser()
        if path.is_dir():
            raise ValueError(f"--out {out}: it is a folder; give a file, such as {path / 'eval_results.jsonl'}")
        return path
    if chosen.run is None:
        raise ValueError(
            f"--out is missing: --checkpoint {checkpoint} is not in the folder of a run, so give the file of "
            "results, such as results.jsonl"
        )
    return chosen.run / "eval_results" / f"{chosen.stem}_eval_results.jsonl"


def configuration(chosen: Chosen, given: argparse.Namespace) -> Config:
    """The trainer's configuration for building the model. Refusal: there is no such model, or no such weights."""
    named = [] if chosen.describes else ["--model", chosen.model]
    words = [*named, "--precision", given.precision, "--epochs", "0", *chosen.flags]
    words += ["--eval_data_dir", given.data_dir, "--batch-size", str(given.batch_size)]
    words += ["--workers", str(given.workers)]
    if chosen.weights and not chosen.describes:
        words += ["--pretrained", chosen.weights]
    with _in_our_words(chosen):
        return parse(words)


def summary(results: Results, catalog: Catalog, outcome: Outcome) -> str:
    """The table, and what has no result and why."""
    parts = [table({one.key: results.lines[one.key] for one in catalog.found if one.key in results.lines})]
    if outcome.failed:
        parts.append("\n".join(["not evaluated:", *(f"  {name}: {why}" for name, why in outcome.failed.items())]))
    if outcome.idle:
        parts.append("\n".join(["no sets:", *(f"  {name}: {why}" for name, why in outcome.idle.items())]))
    if catalog.missing:
        lines = [f"  {task.name}: {needed(task)}" for task in catalog.missing]
        parts.append("\n".join([f"missing, {len(lines)} of the benchmark's {len(TASKS)}:", *lines]))
    return "\n\n".join(parts)


def _named(checkpoint: str, model: str, said: str) -> Chosen:
    """open_clip's NAME:TAG, or a name that brings its weights."""
    if brings_weights(checkpoint):
        return Chosen(checkpoint, "", "results")
    name, colon, tag = checkpoint.partition(":")
    if not colon or not tag or "/" in tag:
        raise ValueError(
            f"{said}: there is no such file or folder; give a run's folder, a checkpoint, or NAME:TAG"
        )
    if model and model != name:
        raise ValueError(f"--model {model}: {said} names the model {name}; leave --model out")
    return Chosen(name, tag, "results")


def _of_run(folder: Path, epoch: int | None, said: str) -> Path:
    """The checkpoint in a run's folder, or in its folder of checkpoints.

    Without ``epoch`` it is where a complete run ended, also inside an epoch, and else the last epoch.
    """
    inner = folder / "checkpoints"
    place = inner if inner.is_dir() else folder
    epochs = {int(found[1]): file for file in place.iterdir() if (found := _CHECKPOINT.fullmatch(file.name))}
    if epoch is not None:
        if epoch not in epochs:
            there = ", ".join(map(str, sorted(epochs))) or "none"
            raise ValueError(f"--epoch {epoch}: {said} has no epoch_{epoch}.pt; its epochs are {there}")
        return epochs[epoch]
    if (place.parent / "job.done").exists() and (last := _inside_an_epoch(place)):
        return last
    if epochs:
        return epochs[max(epochs)]
    latest = place / "epoch_latest.pt"
    if latest.is_file():
        return latest
    raise ValueError(f"{said}: it has no checkpoint, checkpoints/epoch_N.pt; give the folder of a run, or a file")


def _inside_an_epoch(place: Path) -> Path | None:
    """The newest of all checkpoints in ``place`` if it is a step_S.pt, with which ``--iters`` may end a run."""
    if not any(place.glob("step_*.pt")):
        return None  # without a look into files, of which each may be large
    # epoch_latest.pt is the same once more, under a name that says less.
    found = [each for each in catalog.contents(place)[0] if each.path.name != "epoch_latest.pt"]
    newest = max(found, key=lambda each: each.order, default=None)
    return newest.path if newest and newest.path.name.startswith("step_") else None


def _folder_of_run(file: Path) -> Path | None:
    """The folder of the run whose checkpoint ``file`` is; None: it is none's."""
    folder = file.absolute().parent
    return folder.parent if folder.name == "checkpoints" else None


def _params(file: Path) -> dict[str, str]:
    """The flags of a run, ``name: value`` each; none where there is no such file."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    return {name: value for name, _, value in (line.partition(": ") for line in lines)}


def _tag(held: Mapping[str, str], model: str) -> Mapping[str, Any]:
    """What open_clip declares of the weights with which a run of ``model`` began; of a file nothing."""
    # open_clip replaces slashes in names (ViT-B/32) in the same way.
    return open_clip.get_pretrained_cfg(model.replace("/", "-"), held.get("pretrained", ""))


def _preprocess(held: Mapping[str, str], tag: Mapping[str, Any]) -> dict[str, str]:
    """How a run's images were resized: as its flags say, else as the tag of its weights does."""
    found = {}
    for part, (key, known) in _PIXELS.items():
        if held.get(key) in known:
            found[part] = held[key]
        elif part in tag:
            found[part] = tag[part]
    return found


def _context_length(held: Mapping[str, str]) -> int | None:
    """The tokens of a caption where a run's flags say it."""
    text = held.get("force_context_length", "")
    return int(text) if re.fullmatch(r"[1-9]\d{0,5}", text) else None


def _forcing(held: Mapping[str, str], tag: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of a run's flags, and of the ``tag`` of its weights, that make its model another one."""
    words: list[str] = []
    for key in _FORCING:
        text = held.get(key, "None")
        value = ast.literal_eval(text) if re.fullmatch(r"[\[\]()\d., eE+-]+|True|False|None", text) else None
        if value is True:
            words.append(ALL[key].name)
        elif value is not None and value is not False:
            values = value if isinstance(value, (list, tuple)) else [value]
            words += [ALL[key].name, *map(str, values)]
    if tag.get("quick_gelu") and ALL["force_quick_gelu"].name not in words:
        words.append(ALL["force_quick_gelu"].name)
    for key, part in (("image_mean", "mean"), ("image_std", "std")):
        if part in tag and ALL[key].name not in words:
            words += [ALL[key].name, *map(str, tag[part])]
    return tuple(words)


@contextmanager
def _in_our_words(chosen: Chosen) -> Iterator[None]:
    """Refusals name the flags of this program instead of the trainer's, and NAME:TAG as it was given."""
    words = {"--pretrained": "--checkpoint", "--eval_data_dir": "--data_dir"}
    if not Path(chosen.weights).exists():
        words = {f"--pretrained {chosen.weights}:": f"--checkpoint {chosen.model}:{chosen.weights}:"} | words
    try:
        yield
    except ValueError as error:
        told = str(error)
        for theirs, ours in words.items():
            told = told.replace(theirs, ours)
        raise ValueError(told) from error


@contextmanager
def _lines_on_stderr(world: World) -> Iterator[None]:
    """What is logged stands on stderr: of rank 0 all, of the others warnings."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(message)s", "%Y-%m-%d,%H:%M:%S"))
    handler.setLevel(logging.INFO if world.is_main else logging.WARNING)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
