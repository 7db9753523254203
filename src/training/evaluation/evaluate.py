"""In-run evaluation, on all ranks at once: retrieval on ``--val-data``, zero-shot accuracy on ``--imagenet-val``
and ``--imagenet-v2``, and the benchmark's sets in ``--eval_data_dir``.

Every rank embeds its share of the samples, each sample once. For retrieval the features are then gathered, and
the ranks share the M x M comparisons; for zero-shot they share the class prompts, and the counts are summed. So
K ranks report the same values as one. Errors are raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drrho_clip import collectives
from drrho_clip.losses.baselines import caption_loss
from drrho_clip.normalize import normalize
from training.config.params import Config
from training.data.bad_samples import Skips
from training.data.sources.tables import CsvSource
from training.data.transforms import eval_transform
from training.distributed.collectives import all_reduce_sum, gather_object, on_main
from training.distributed.loader_processes import Loader, start_method, start_worker
from training.distributed.process_group import World
from training.evaluation.benchmark.benchmark import evaluate_sets
from training.evaluation.benchmark.encoder import Encoder
from training.evaluation.benchmark.results import averages, digest_of, headline, open_results
from training.evaluation.benchmark.sets import FoundSet, find_sets
from training.evaluation.benchmark.sources import file_place
from training.evaluation.captions import count_ranks, merge_ranks, of_pairs, rank_metrics
from training.evaluation.neighbours import neighbours
from training.evaluation.pairs import ValData, build_val
from training.evaluation.retrieval import count_pairs, merge, normalized, summarize
from training.evaluation.zero_shot import (
    ClassificationSet,
    PictureBatch,
    PictureBatches,
    Pictures,
    accuracies,
    hits,
    nearest,
    open_set,
)
from training.logger import RunLog
from training.models import precision
from training.models.create import BuiltModel
from training.models.open_clip_model import with_labels
from training.predictions import LEFT_OUT, Place, classified, folder_of, keep

CLASSES_AT_ONCE = 10
KEPT_PAIRS = 100_000  # of more pairs, it is not kept what was found, since rank 0 would hold all captions


@dataclass(frozen=True)
class Evaluation:
    """What a run evaluates on, opened and checked once.

    ``sets``: result prefix -> labelled pictures. ``val``: pairs for retrieval. ``benchmark``: sets of
    ``--eval_data_dir``, which are opened one after another.
    """

    built: BuiltModel
    config: Config
    world: World
    log: RunLog
    val: ValData | None
    sets: dict[str, ClassificationSet]
    benchmark: Sequence[FoundSet] = ()

    def __call__(
        self, model: nn.Module, epoch: int, step: int = 0, *, stem: str = "", final: bool = False
    ) -> dict[str, float]:
        """Evaluate ``model`` (not wrapped) after ``epoch`` complete epochs and ``step`` steps, on all that is due.

        ``stem``: what a checkpoint of ``model`` is called (``RunState.stem``), and so what is kept of it in
        ``eval_results/``; '': ``epoch_N``. Returns metric name -> value, under the names of the published code;
        empty if nothing is due. They are also logged, sent to the writers as ``val/NAME`` and appended to
        ``eval_results.jsonl``.
        """
        metrics: dict[str, float] = {}
        results = self.log.folder.path / "eval_results" / f"{stem or f'epoch_{epoch}'}_eval_results.jsonl"
        with evaluating(model):
            if self.sets and self._due(self.config.evaluation.zeroshot_frequency, epoch, final):
                for name, pictures in self.sets.items():
                    found = self._zero_shot(model, name, pictures, results)
                    metrics |= {f"{name}-zeroshot-val-{key}": value for key, value in found.items()}
            if self.benchmark and self._due(self.config.evaluation.zeroshot_frequency, epoch, final):
                metrics |= self._benchmark(model, results)
            if self.val is not None and self._due(self.config.evaluation.val_frequency, epoch, final):
                metrics |= self._retrieval(model, self.val, results)
        if metrics:
            inside = f"(step {step}) " if stem.startswith("step_") else ""
            values = "\t".join(f"{name}: {round(value, 4)}" for name, value in metrics.items())
            self.log.info(f"Eval Epoch: {epoch} {inside}{values}")
            self.log.eval_result({"epoch": epoch, "step": step, **metrics})
        return metrics

    def _due(self, frequency: int, epoch: int, final: bool) -> bool:
        """With 0 never; else every ``frequency`` epochs, after the last one, and where the run only evaluates."""
        epochs = self.config.schedule.epochs
        return frequency > 0 and (final or epochs == 0 or epoch == epochs or epoch % frequency == 0)

    def _retrieval(self, model: nn.Module, val: ValData, results: Path) -> dict[str, float]:
        run, logit_scale = self._precision, self._logit_scale(model)
        images: list[Tensor] = []
        texts: list[Tensor] = []
        further: list[Tensor] = []
        owners: list[int] = []
        places: list[Place] = []
        own_captions: list[tuple[str, ...]] = []
        tokens = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with self.log.progress(len(val), "validation", unit="batch") as progress, torch.no_grad():
            for batch in val:
                captions = batch.text.to(self.world.device, non_blocking=True)
                pixels = self._pixels(batch.image)
                if len(batch.more):
                    owners += [sum(map(len, images)) + i for i in batch.owner.tolist()]
                    further.append(self._texts(model, batch.more))
                with run.autocast():
                    outputs = with_labels(model(pixels, captions), captions)
                places += batch.places
                own_captions += batch.captions
                images.append(normalized(outputs["image_features"]))
                texts.append(normalized(outputs["text_features"]))
                if "logits" in outputs:
                    sums = caption_loss(outputs, getattr(model, "pad_id", 0))
                    tokens += torch.stack([part.double() for part in sums])
                progress.update()
        image, text = gather_rows(images, self.world), gather_rows(texts, self.world)
        owner = gather_owners(owners, sum(map(len, images)))
        caption_loss_sum, caption_tokens = all_reduce_sum(tokens).tolist()
        if not len(image):
            problem = f"--val-data {self.config.evaluation.val_data}: it contains no usable sample"
            if not self.config.trains:
                raise ValueError(problem)
            if self.world.is_main:
                self.log.warning(f"{problem}, no retrieval is computed")
            return {}
        with self.log.progress(len(image) // self.world.world_size, "ranking", unit="row") as progress:
            share = (self.world.rank, self.world.world_size)
            counted = count_pairs(image, text, logit_scale, share=share, update=progress.update)
            counts = merge(gather_object(counted))
        metrics = summarize(counts, image, text, logit_scale)
        every, ranked, more = text, of_pairs(counts), len(owner) > 0
        owner = torch.cat([torch.arange(len(image), dtype=torch.int64), owner]).to(self.world.device)
        if more:
            every = torch.cat([text, gather_rows(further, self.world)])
            of_images, of_texts = (
                range(share[0] * n // share[1], (share[0] + 1) * n // share[1]) for n in (len(image), len(every))
            )
            ranked = merge_ranks(gather_object(count_ranks(image, every, owner, of_images, of_texts)))
            metrics |= rank_metrics(ranked)
            metrics["num_captions"] = len(every)
        if len(image) <= KEPT_PAIRS:
            parts = gather_object((places, own_captions))
            if self.world.is_main:
                # In the order of the features: of all ranks, first captions and then further ones.
                all_places = [place for part, _ in parts for place in part]
                first = [some[0] for _, part in parts for some in part]
                others = [caption for _, part in parts for some in part for caption in some[1:]]
                held = image, every, owner, ranked, all_places, [*first, *others]
                keep(folder_of(results), neighbours("val-data", "--val-data", *held))
        if caption_tokens:
            metrics["val_generative_loss"] = caption_loss_sum / caption_tokens
        return {**metrics, "num_samples": len(image)}

    def _texts(self, model: nn.Module, captions: Tensor) -> Tensor:
        encode_text = model.encode_text
        assert callable(encode_text), "open_clip's models have a text encoder"
        with self._precision.autocast():
            return normalized(encode_text(captions.to(self.world.device, non_blocking=True)))

    def _zero_shot(
        self, model: nn.Module, name: str, pictures: ClassificationSet, results: Path
    ) -> dict[str, float]:
        run, world = self._precision, self.world
        encode_image = model.encode_image
        assert callable(encode_image), "open_clip's models have an image encoder"
        classifier = self._classifier(model, name, pictures)
        counts = torch.zeros(3, len(pictures.classnames), dtype=torch.float64, device=world.device)
        loader, own_skips, scale = self._loader(pictures), Skips(), self._logit_scale(model)
        nearest_ones: list[tuple[Tensor, Tensor, Tensor]] = []
        with self.log.progress(len(loader), name, unit="batch") as progress, torch.no_grad():
            for batch in loader:
                own_skips.merge(batch.skips)
                if len(batch.label):
                    pixels = self._pixels(batch.image)
                    with run.autocast():
                        features = encode_image(pixels, normalize=True)
                    labels = batch.label.to(world.device, non_blocking=True)
                    unit = normalized(features)
                    counts += hits(unit, labels, classifier)
                    top, probability = nearest(unit.double() @ classifier.double(), scale)
                    # This rank has every K-th picture.
                    numbers = world.rank + world.world_size * batch.number
                    nearest_ones.append((numbers, top, probability))
                progress.update()
        skips = self._report_skips(own_skips, name, len(pictures.pictures))
        left_out = skips.counts.total()
        if left_out == len(pictures.pictures):
            if not self.config.trains:
                flag, folder = self.config.evaluation.zero_shot[name]
                raise ValueError(f"{flag} {folder}: it contains no usable picture; left out: {skips}")
            return {}
        found = [tuple(part.cpu() for part in batch) for batch in nearest_ones]
        self._keep(name, pictures, results, gather_object(found))
        used = len(pictures.pictures) - left_out
        counted = {"num_samples": used, **({"left_out": left_out} if left_out else {})}
        return {**accuracies(all_reduce_sum(counts)), **counted}

    def _keep(
        self,
        name: str,
        pictures: ClassificationSet,
        results: Path,
        found: list[list[tuple[Tensor, ...]]],
    ) -> None:
        """Keep the predictions for a set: of each rank and batch numbers [n], classes [n, k], probabilities."""
        if not self.world.is_main:
            return
        each = [batch for part in found for batch in part]
        numbers, top, probability = (torch.cat([batch[i] for batch in each]).numpy() for i in range(3))
        all_top = np.full((len(pictures.pictures), top.shape[1]), LEFT_OUT, dtype=np.int64)
        all_probability = np.zeros(all_top.shape)
        all_top[numbers], all_probability[numbers] = top, probability
        labels = np.array([one.label for one in pictures.pictures], dtype=np.int64)

        def place(number: int) -> Place:
            one = pictures.pictures[number]
            return file_place(one.path, one.offset, one.size)

        kept = classified(name, name, pictures.classnames, labels, all_top, all_probability, place)
        keep(folder_of(results), kept)

    def _logit_scale(self, model: nn.Module) -> float:
        scale = model.logit_scale
        assert isinstance(scale, Tensor), "open_clip's models have a logit scale"
        return scale.exp().item()

    def _benchmark(self, model: nn.Module, path: Path) -> dict[str, float]:
        """The main metrics of ``self.benchmark``; all go to ``path`` as ``training.evaluate`` writes them."""
        run = self._precision
        digest = on_main(lambda: digest_of(model, run.name, self.built.preprocess))
        results, remark = on_main(lambda: open_results(path, digest, folder_of(path)))
        if remark and self.world.is_main:
            self.log.warning(remark)
        size = self.config.run.batch_size // self.config.run.accum_freq
        encoder = Encoder(
            model,
            self.built,
            self.world,
            run,
            self.log.progress,
            batch_size=size,
            workers=self.config.data.workers,
        )
        evaluate_sets(encoder, [one for one in self.benchmark if one.key not in results.lines], results.keep)
        lines = on_main(lambda: {one.key: results.lines.get(one.key) for one in self.benchmark})
        found = {}
        for key, line in lines.items():
            if line is not None:
                metric, value = headline(key, line["metrics"])
                found[f"{key}-{metric}"] = float("nan") if value is None else value
                found |= {
                    f"{key}-{count}": line[count] for count in ("num_samples", "num_captions") if count in line
                }
        if average := averages({key: line for key, line in lines.items() if line is not None}).get("Average"):
            found["datacomp-average"], found["datacomp-num_sets"] = average[0], float(average[1])
        return found

    def _report_skips(self, own: Skips, name: str, pictures: int) -> Skips:
        """What all ranks have left out of the ``pictures`` of a set, which is logged."""
        skips = Skips()
        for part in gather_object(own):
            skips.merge(part)
        left_out = skips.counts.total()
        if left_out and self.world.is_main:
            what = "no accuracy is computed" if left_out == pictures else "accuracies are of the others"
            self.log.warning(f"{name}: {left_out} of {pictures} pictures are left out, {what}: {skips}")
        return skips

    def _classifier(self, model: nn.Module, name: str, pictures: ClassificationSet) -> Tensor:
        """[d, C], unit columns, float32; each rank embeds a slice of the classes."""
        names, world = pictures.classnames, self.world
        mine = names[
            world.rank * len(names) // world.world_size : (world.rank + 1) * len(names) // world.world_size
        ]
        run, columns = self._precision, []
        with self.log.progress(len(mine), f"{name} prompts", unit="class") as progress:
            for start in range(0, len(mine), CLASSES_AT_ONCE):
                chunk = mine[start : start + CLASSES_AT_ONCE]
                with run.autocast():
                    built = build_zero_shot_classifier(
                        model, self.built.tokenizer, chunk, pictures.templates, None, world.device
                    )
                columns.append(normalized(built.T).cpu())
                progress.update(len(chunk))
        return torch.cat([rows for part in gather_object(columns) for rows in part]).T.to(world.device)

    def _loader(self, pictures: ClassificationSet) -> Loader[PictureBatch]:
        """This rank's share: every K-th picture."""
        share = pictures.pictures[self.world.rank :: self.world.world_size]
        size = self.config.run.batch_size // self.config.run.accum_freq
        return Loader(
            DataLoader(
                PictureBatches(Pictures(share, eval_transform(self.built.preprocess)), size),
                batch_size=None,
                num_workers=self.config.data.workers,
                pin_memory=self.world.device.type == "cuda",
                worker_init_fn=start_worker,
                multiprocessing_context=start_method(self.config.data.workers),
                generator=torch.Generator(),  # otherwise it would draw a seed from the generator of training
            )
        )

    def _pixels(self, pixels: Tensor) -> Tensor:
        cfg = self.built.preprocess
        moved = pixels.to(self.world.device, non_blocking=True)
        return normalize(moved, cfg.mean, cfg.std, self._precision.pixel_dtype)

    @property
    def _precision(self) -> precision.Precision:
        return precision.resolve(self.config.run.precision, self.world.device)


def open_sets(config: Config) -> dict[str, ClassificationSet]:
    """The sets for zero-shot accuracy that the flags name. ValueError: one of them is not valid."""
    return {name: open_set(folder, flag) for name, (flag, folder) in config.evaluation.zero_shot.items()}


def find_benchmark(config: Config) -> Sequence[FoundSet]:
    """The sets in ``--eval_data_dir``. ValueError: it has none, or not those of ``--eval_tasks``."""
    given = config.evaluation
    if given.eval_data_dir is None:
        return ()
    return find_sets(given.eval_data_dir, given.eval_tasks, "--eval_data_dir", "--eval_tasks").found


def open_evaluation(
    built: BuiltModel,
    config: Config,
    world: World,
    log: RunLog,
    sets: dict[str, ClassificationSet],
    val_table: CsvSource | None = None,
    benchmark: Sequence[FoundSet] = (),
) -> Evaluation:
    """The evaluation on ``sets`` (from ``open_sets``) and ``--val-data``. ValueError: the latter is not valid.

    ``val_table``: the csv files of ``--val-data``, where they have been read already. ``benchmark``: from
    ``find_benchmark``.
    """
    return Evaluation(built, config, world, log, build_val(config, world, built, val_table), sets, benchmark)


def gather_rows(parts: list[Tensor], world: World) -> Tensor:
    """The rows [n, d] of all ranks, in rank order; n may differ, or be 0."""
    sizes = gather_object([sum(map(len, parts)), parts[0].shape[1] if parts else 0])
    most, width = max(n for n, _ in sizes), max(d for _, d in sizes)
    mine = torch.cat(parts) if parts else torch.zeros(0, width, device=world.device)
    padded = F.pad(mine, (0, 0, 0, most - len(mine)))
    gathered = collectives.all_gather(padded).view(len(sizes), most, width)
    return torch.cat([rows[:n] for rows, (n, _) in zip(gathered, sizes, strict=True)])


def gather_owners(owners: list[int], samples: int) -> Tensor:
    """int64: the samples of all ranks, in rank order, that ``owners`` of each rank's ``samples`` are."""
    found, before = [], 0
    for own, n in gather_object((owners, samples)):
        found += [before + i for i in own]
        before += n
    return torch.tensor(found, dtype=torch.int64)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module is back in the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
