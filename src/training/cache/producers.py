"""What a run that writes a cache computes for samples: the reference's embeddings, or another model's captions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from drrho_clip.batch import Batch
from drrho_clip.normalize import normalize
from drrho_clip.reference import Reference
from training.cache import captioner, captions, features
from training.cache.captions import Captions
from training.cache.row_store import PartValues
from training.cache.storage import Storage
from training.config.params import Config
from training.data.samples import CaptionSource
from training.data.tokenizer import Tokenizer
from training.data.transforms import KeptViews, describe_augmentation
from training.distributed.process_group import World
from training.models import precision, pretrained
from training.models.frozen import build_captioner, build_reference


class Work(Protocol):
    """A model that computes values to store. ``tokenizer`` is None where the model does not read captions.

    ``captions``: synthetic ones that the model reads beside the samples' own.
    """

    views: KeptViews

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer of the captions that the model reads."""

    @property
    def captions(self) -> CaptionSource | None:
        """Synthetic captions that the model reads beside the samples' own."""

    def __call__(self, images: Tensor, texts: Tensor | None, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Values [n, ...] by name; ``images`` [n, views, 3, H, W] and token ids [n, captions, L] on the device."""

    def pack(self, values: dict[str, np.ndarray], checksums: np.ndarray) -> PartValues:
        """The values of a part as they are stored; ``checksums``: of its captions, uint32 [n, captions]."""


@dataclass(frozen=True)
class Job:
    """What is written to ``folder``: values of ``kind``, made as ``identity`` says. ``begin`` builds the model."""

    kind: str
    folder: str
    identity: dict[str, str | int]
    begin: Callable[[], Work]


def job(config: Config, world: World, synthetic: Captions | None) -> Job:
    """What the flags ask for, with the ``synthetic`` captions that are embedded too; nothing is built yet."""
    cache = config.cache
    made: dict[str, str | int] = {"precision": config.run.precision}
    if cache.writes == "captions":
        count = cache.num_syn_texts
        assert count is not None, "the parser has a default for runs that write"
        made |= pretrained.identity(
            pretrained.open_clip_name(cache.cap_model, "--cap_model"), cache.cap_model_pretrained
        )
        made |= {"captions per sample": count, "seed": config.run.seed}
        return Job(captions.KIND, cache.cached_syn_texts_dir, made, lambda: CaptionWork(config, world, count))
    storage = Storage(cache.ref_features_dtype or _feature_type(config, world), cache.ref_features_error_bound)
    made |= features.model_identity(config.reference) | storage.identity()
    if cache.ref_features_views:
        augmentation = describe_augmentation(config.data.aug_cfg, config.data.rand_augment)
        made |= {features.VIEWS: cache.ref_features_views, features.SEED: config.run.seed}
        made |= {features.AUGMENTATION: augmentation}
    if synthetic is not None:
        made |= {features.CAPTIONS: synthetic.origin}
    begin = partial(FeatureWork, config, world, storage, synthetic)
    return Job(features.KIND, cache.cached_ref_features_dir, made, begin)


def _feature_type(config: Config, world: World) -> str:
    """float32 where the model runs in it, else float16, which suffices for bfloat16 and float16 models."""
    chosen = precision.resolve(config.run.precision, world.device)
    return "float32" if (chosen.autocast_dtype or chosen.pixel_dtype) == torch.float32 else "float16"


class FeatureWork:
    """Embeddings by the frozen reference, kept as ``storage`` says: [n, 2, d], or several views and captions."""

    def __init__(self, config: Config, world: World, storage: Storage, synthetic: Captions | None) -> None:
        built, self.storage, self.captions = build_reference(config, world), storage, synthetic
        assert built is not None, "a run that writes features has a reference"
        pixels, autocast = built.preprocess, precision.resolve(config.run.precision, world.device).autocast_dtype
        self.reference = Reference(built.module, pixels.mean, pixels.std, autocast)
        if config.model.torchcompile:
            self.reference.compile()
        data, views = config.data, config.cache.ref_features_views
        self.views = KeptViews(pixels, views, config.run.seed, data.aug_cfg, data.rand_augment)
        self.tokenizer = built.tokenizer
        self._several = bool(views) or synthetic is not None

    def __call__(self, images: Tensor, texts: Tensor | None, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Work``."""
        assert texts is not None, "this model reads captions"
        batch = Batch(images.flatten(0, 1), texts.flatten(0, 1), torch.from_numpy(rows))
        image, text = (side.to(self.storage.brought).cpu().numpy() for side in self.reference.features(batch))
        if not self._several:
            return {"features": np.stack([image, text], 1)}
        n = len(rows)
        return {"images": image.reshape(n, -1, image.shape[1]), "texts": text.reshape(n, -1, text.shape[1])}

    def pack(self, values: dict[str, np.ndarray], checksums: np.ndarray) -> PartValues:
        """See ``Work``."""
        if not self._several:
            return self.storage.pack(values["features"])
        return self.storage.pack_several(values["images"], values["texts"], checksums)


class CaptionWork:
    """Captions by a CoCa, strings of bytes [n, captions per sample]."""

    tokenizer = captions = None

    def __init__(self, config: Config, world: World, count: int) -> None:
        built = build_captioner(config, world)
        if not isinstance(built.tokenizer, SimpleTokenizer):
            raise ValueError(
                f"--cap_model {config.cache.cap_model}: captions are decoded with open_clip's own tokenizer, and "
                "this model has another one; choose a coca model without a Hugging Face text tower"
            )
        self.model, self.words, self.views = built.module, built.tokenizer, KeptViews(built.preprocess)
        self.mean, self.std = built.preprocess.mean, built.preprocess.std
        self.precision = precision.resolve(config.run.precision, world.device)
        self.count, self.seed = count, config.run.seed
        self.tokens = min(captioner.LONGEST, built.context_length) - 1

    def __call__(self, images: Tensor, texts: Tensor | None, rows: np.ndarray) -> dict[str, np.ndarray]:
        """See ``Work``."""
        pixels = normalize(images.flatten(0, 1), self.mean, self.std, self.precision.pixel_dtype)
        uniform = captioner.random_numbers(rows, self.count, self.tokens, self.seed).to(images.device)
        with self.precision.autocast():
            written = captioner.sample_captions(self.model, pixels, uniform, self.words)
        return {"captions": captioner.packed(written)}

    def pack(self, values: dict[str, np.ndarray], checksums: np.ndarray) -> PartValues:
        """See ``Work``."""
        return PartValues(values)
