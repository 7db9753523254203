"""In-run evaluation, on all ranks at once: retrieval on ``--val-data``, zero-shot accuracy on ``--imagenet-val``
and ``--imagenet-v2``.

Every rank embeds its share of the samples, each sample once. For retrieval the features are then gathered and the
ranks share out the M x M comparisons; for zero-shot they share out the class prompts, and counts are summed. So K
ranks report what one would. Whatever fails is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from open_clip import build_zero_shot_classifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from drrho_clip import collectives
from drrho_clip.losses.baselines import caption_loss
from drrho_clip.normalize import normalize
from training.config.params import Config
from training.data.transforms import eval_transform
from training.distributed.collectives import all_reduce_sum, gather_object
from training.distributed.process_group import World
from training.evaluation.pairs import ValData, build_val
from training.evaluation.retrieval import count_pairs, merge, normalized, summarize
from training.evaluation.zero_shot import ClassificationSet, Pictures, accuracies, hits, open_set
from training.logger import RunLog
from training.models import precision
from training.models.build import BuiltModel

CLASSES_AT_ONCE = 10


@dataclass(frozen=True)
class Evaluation:
    """What a run evaluates on, opened and checked once.

    ``sets``: result prefix -> labelled pictures. ``val``: pairs for retrieval.
    """

    built: BuiltModel
    config: Config
    world: World
    log: RunLog
    val: ValData | None
    sets: dict[str, ClassificationSet]

    def __call__(self, model: nn.Module, epoch: int, step: int = 0, *, final: bool = False) -> dict[str, float]:
        """Evaluate ``model`` (not wrapped) after ``epoch`` whole epochs and ``step`` steps, on what is due then.

        Metric name -> value, the names of the published code; also logged, sent to the writers as ``val/NAME`` and
        appended to ``eval_results.jsonl``. Empty where nothing is due.
        """
        metrics: dict[str, float] = {}
        with evaluating(model):
            if self.sets and self._due(self.config.evaluation.zeroshot_frequency, epoch, final):
                for name, pictures in self.sets.items():
                    found = self._zero_shot(model, name, pictures)
                    metrics |= {f"{name}-zeroshot-val-{key}": value for key, value in found.items()}
            if self.val is not None and self._due(self.config.evaluation.val_frequency, epoch, final):
                metrics |= self._retrieval(model)
        if metrics:
            self.log.info(f"Eval Epoch: {epoch} " + "\t".join(f"{k}: {round(v, 4)}" for k, v in metrics.items()))
            self.log.eval_result({"epoch": epoch, "step": step, **metrics})
        return metrics

    def _due(self, frequency: int, epoch: int, final: bool) -> bool:
        """0: never. Else every ``frequency`` epochs, after the last one, and where the run only evaluates."""
        epochs = self.config.schedule.epochs
        return frequency > 0 and (final or epochs == 0 or epoch == epochs or epoch % frequency == 0)

    def _retrieval(self, model: nn.Module) -> dict[str, float]:
        run = self._precision
        image, text, tokens = [], [], torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with self.log.progress(len(self.val), "validation", unit="batch") as progress, torch.no_grad():
            for pixels, captions in self.val:
                captions = captions.to(self.world.device, non_blocking=True)
                pixels = self._pixels(pixels)
                with run.autocast():
                    outputs = model(pixels, captions)
                image.append(normalized(outputs["image_features"]))
                text.append(normalized(outputs["text_features"]))
                if "logits" in outputs:
                    sums = caption_loss(outputs, getattr(model, "pad_id", 0))
                    tokens += torch.stack([part.double() for part in sums])
                progress.update()
            scale = model.logit_scale.exp().item()
        image, text = gather_rows(image, self.world), gather_rows(text, self.world)
        tokens = all_reduce_sum(tokens).tolist()
        if not len(image):
            raise ValueError(f"--val-data {self.config.evaluation.val_data}: no samples in it")
        with self.log.progress(len(image) // self.world.world_size, "ranking", unit="row") as progress:
            share = (self.world.rank, self.world.world_size)
            counts = merge(gather_object(count_pairs(image, text, scale, share=share, update=progress.update)))
        metrics = summarize(counts, image, text, scale)
        if tokens[1]:
            metrics["val_generative_loss"] = tokens[0] / tokens[1]
        return {**metrics, "num_samples": len(image)}

    def _zero_shot(self, model: nn.Module, name: str, pictures: ClassificationSet) -> dict[str, float]:
        run, world = self._precision, self.world
        classifier = self._classifier(model, name, pictures)
        counts = torch.zeros(3, len(pictures.classnames), dtype=torch.float64, device=world.device)
        loader = self._loader(pictures)
        with self.log.progress(len(loader), name, unit="batch") as progress, torch.no_grad():
            for pixels, labels in loader:
                pixels = self._pixels(pixels)
                with run.autocast():
                    features = model.encode_image(pixels, normalize=True)
                counts += hits(normalized(features), labels.to(world.device, non_blocking=True), classifier)
                progress.update()
        return accuracies(all_reduce_sum(counts))

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

    def _loader(self, pictures: ClassificationSet) -> DataLoader:
        """This rank's share: every K-th picture."""
        share = pictures.pictures[self.world.rank :: self.world.world_size]
        return DataLoader(
            Pictures(share, eval_transform(self.built.preprocess)),
            batch_size=self.config.run.batch_size // self.config.run.accum_freq,
            num_workers=self.config.data.workers,
            pin_memory=self.world.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed, not from the generator of training
        )

    def _pixels(self, pixels: Tensor) -> Tensor:
        cfg = self.built.preprocess
        moved = pixels.to(self.world.device, non_blocking=True)
        return normalize(moved, cfg.mean, cfg.std, self._precision.pixel_dtype)

    @property
    def _precision(self) -> precision.Precision:
        return precision.resolve(self.config.run.precision, self.world.device)


def open_sets(config: Config) -> dict[str, ClassificationSet]:
    """The sets for zero-shot accuracy that the flags name; ValueError where one is not what it should be."""
    return {name: open_set(folder, flag) for name, (flag, folder) in config.evaluation.zero_shot.items()}


def open_evaluation(
    built: BuiltModel, config: Config, world: World, log: RunLog, sets: dict[str, ClassificationSet]
) -> Evaluation:
    """With ``sets`` from ``open_sets``, and ``--val-data``; ValueError where that is not what it should be."""
    return Evaluation(built, config, world, log, build_val(config, world, built), sets)


def gather_rows(parts: list[Tensor], world: World) -> Tensor:
    """The rows [n, d] of all ranks, in rank order; n may differ, or be 0."""
    sizes = gather_object([sum(map(len, parts)), parts[0].shape[1] if parts else 0])
    most, width = max(n for n, _ in sizes), max(d for _, d in sizes)
    mine = torch.cat(parts) if parts else torch.zeros(0, width, device=world.device)
    padded = F.pad(mine, (0, 0, 0, most - len(mine)))
    gathered = collectives.all_gather(padded).view(len(sizes), most, width)
    return torch.cat([rows[:n] for rows, (n, _) in zip(gathered, sizes, strict=True)])


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
