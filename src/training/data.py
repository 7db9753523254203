"""Which data a run trains and validates on, as the flags say: shards, a csv file, or synthetic samples."""

from __future__ import annotations

import logging
import math
from typing import Protocol

import torch
from open_clip.transform import PreprocessCfg

from training.distributed import World
from training.images import TrainView, eval_transform
from training.loader import Tokenizer, TrainData, TrainStream, ValData, ValStream, prefetch
from training.params import Config
from training.samples import Source, allowance
from training.tabular import SyntheticSource, open_csv
from training.webdata import open_shards, open_val_shards

__all__ = ["TrainData", "ValData", "build_train", "build_val", "prefetch", "same_tokens", "steps_per_epoch"]

log = logging.getLogger(__name__)

_PROBE = ["", "a photo of a cat", "Ünïcode, CAPITALS & (punctuation)!", "1234567890 🙂", "many words " * 100]


class Model(Protocol):
    """What the data path asks of a model (``models.BuiltModel``)."""

    preprocess: PreprocessCfg
    tokenizer: Tokenizer


def build_train(config: Config, world: World, target: Model, reference: Model | None) -> TrainData:
    """The training data of this rank. All ranks call it together. ValueError names the flag that is wrong."""
    data, run = config.data, config.run
    source = _open(config, world, target)
    samples = data.train_num_samples or source.count()
    own_shards = data.dataset_type == "webdataset" and data.skip_webdataset_split_by_node
    needs_ref_text = reference is not None and not same_tokens(target.tokenizer, reference.tokenizer)
    stream = TrainStream(
        source,
        TrainView(
            target.preprocess,
            None if reference is None else reference.preprocess,
            data.aug_cfg,
            data.rand_augment,
        ),
        target.tokenizer,
        reference.tokenizer if needs_ref_text else None,
        seed=run.seed,
        batch_size=run.batch_size,
        steps=_steps(samples, config, world.world_size),
        allowed=allowance(data.max_bad_fraction, samples // world.world_size),
        rank=0 if own_shards else world.rank,
        ranks=1 if own_shards else world.world_size,
    )
    train = TrainData(stream, world_size=world.world_size, workers=data.workers, device=world.device)
    log.info(
        "training data: %s; an epoch is %d samples in %d steps of %d, whose last %d places go on in the order",
        source.describe(stream.ranks * max(data.workers, 1)),
        samples,
        train.steps_per_epoch,
        run.batch_size * world.world_size,
        train.samples_per_epoch - samples,
    )
    return train


def build_val(config: Config, world: World, target: Model) -> ValData | None:
    """The pairs of ``--val-data`` for this rank, None without them. ValueError names the flag that is wrong."""
    val = config.evaluation
    if val.val_data is None:
        return None
    if val.val_dataset_type == "csv":
        source = open_csv(val.val_data, config.data, config.run.seed)
    else:
        source = open_val_shards(val.val_data)
    stream = ValStream(
        source,
        eval_transform(target.preprocess),
        target.tokenizer,
        batch_size=config.run.batch_size // config.run.accum_freq,
        limit=val.val_num_samples,
        rank=world.rank,
        ranks=world.world_size,
    )
    return ValData(stream, workers=config.data.workers, device=world.device)


def samples_per_epoch(config: Config) -> int:
    """What an epoch is to see: ``--train-num-samples``, or all rows of the csv file (which is read for it)."""
    data = config.data
    if data.train_num_samples is not None:
        return data.train_num_samples
    assert data.dataset_type == "csv", "the parser asks for --train-num-samples"
    return open_csv(data.train_data, data, config.run.seed).count()


def steps_per_epoch(config: Config, world_size: int) -> int:
    """ceil(samples / global batch), known without opening shards."""
    return _steps(samples_per_epoch(config), config, world_size)


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, and as many, for a probe of texts: then one serves both models."""
    ours, theirs = a(_PROBE), b(_PROBE)
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def _steps(samples: int, config: Config, world_size: int) -> int:
    return math.ceil(samples / (config.run.batch_size * world_size))


def _open(config: Config, world: World, target: Model) -> Source:
    data, seed = config.data, config.run.seed
    if data.dataset_type == "webdataset":
        return open_shards(data, seed, world)
    if data.dataset_type == "csv":
        source = open_csv(data.train_data, data, seed)
        if 0 < data.data_size < source.count():
            raise ValueError(
                f"--data_size {data.data_size}: {data.train_data} has {source.count()} rows, and "
                "each has its place in the sample state; give at least as many"
            )
        return source
    size = target.preprocess.size
    samples = data.train_num_samples if data.data_size < 0 else min(data.train_num_samples, data.data_size)
    return SyntheticSource(samples, (size, size) if isinstance(size, int) else tuple(size), seed)
