"""Which data a run trains on, according to the flags: shards, a csv file, or synthetic samples."""

from __future__ import annotations

import logging
import math
from typing import Protocol

import torch
from open_clip.transform import PreprocessCfg

from training.config.params import Config
from training.data.bad_samples import allowance
from training.data.lanes import Layout, default_layout
from training.data.loader import TrainData
from training.data.samples import CaptionSource, FeatureSource, Source
from training.data.sources.reinforcement import Reinforcement
from training.data.sources.tables import CsvSource, SyntheticSource, open_csv
from training.data.sources.webdataset import ShardSource, open_shards
from training.data.tokenizer import Tokenizer
from training.data.transforms import TrainView
from training.data.worker import TrainStream
from training.distributed.process_group import World

log = logging.getLogger(__name__)

_PROBE = ["", "a photo of a cat", "Ünïcode, CAPITALS & (punctuation)!", "1234567890 🙂", "many words " * 100]


class Model(Protocol):
    """What the data path needs of a model (``models.BuiltModel``)."""

    @property
    def preprocess(self) -> PreprocessCfg:
        """Size, mean, std, interpolation and resize mode of its images."""

    @property
    def tokenizer(self) -> Tokenizer:
        """List of n captions -> token ids, int64 [n, L]."""


def build_train(
    config: Config,
    world: World,
    target: Model,
    reference: Model | None,
    features: FeatureSource | None = None,
    captions: CaptionSource | None = None,
    table: CsvSource | None = None,
) -> TrainData:
    """The training data of this rank. All ranks call it together. ValueError: the message names the wrong flag.

    ``features``, ``captions``: the reference's embeddings and additional captions, where they are stored on disk.
    ``table``: the csv files, where they have been read already (``open_table``).
    """
    data, run = config.data, config.run
    if data.dataset_type == "csv" and table is None:
        table = open_table(config)
    samples = samples_per_epoch(config, table)
    steps = steps_of(samples, config, world.world_size)
    layout = _layout(config, world)
    source = _open(config, world, target, steps) if table is None else table
    ref_tokenizer = None
    if reference is not None and not same_tokens(target.tokenizer, reference.tokenizer):
        ref_tokenizer = reference.tokenizer
    reinforcement = None
    if data.dataset_reinforcement:
        reinforcement = Reinforcement(config.cache.num_syn_texts, config.cache.syn_texts_ratio)
    stream = TrainStream(
        source,
        TrainView(
            target.preprocess,
            None if reference is None else reference.preprocess,
            data.aug_cfg,
            data.rand_augment,
        ),
        target.tokenizer,
        ref_tokenizer,
        features,
        captions,
        reinforcement,
        seed=run.seed,
        batch_size=run.batch_size,
        steps=steps,
        layout=layout,
        allowed=allowance(data.max_bad_fraction, samples // world.world_size),
        rank=world.rank,
        ranks=world.world_size,
        own_shards=_own_shards(config),
    )
    if samples < run.batch_size * world.world_size and world.is_main:
        log.warning(
            "an epoch of %d samples does not fill one global batch of %d: each batch contains samples several "
            "times, and a contrastive loss treats copies as pairs that do not match; give a smaller --batch-size",
            *(samples, run.batch_size * world.world_size),
        )
    train = TrainData(
        stream,
        world_size=world.world_size,
        workers=data.workers,
        device=world.device,
        fixed=data.lanes is not None,
        bounds=source.bounds if isinstance(source, ShardSource) else (),
    )
    log.info(
        "training data: %s; lanes %s (virtual ranks, workers); an epoch has %d samples in %d steps of %d, %s",
        *(source.describe(stream.lanes), layout, samples, steps, run.batch_size * world.world_size),
        _remainder(train.samples_per_epoch - samples),
    )
    return train


def open_table(config: Config) -> CsvSource:
    """The csv files of ``--train-data``. ValueError: they cannot be read, or do not fit the other flags."""
    data = config.data
    assert data.train_data is not None, "the parser asks for --train-data"
    table = open_csv(data.train_data, data, config.run.seed)
    rows = table.count()
    if config.trains and 0 < data.data_size < rows:
        raise ValueError(
            f"--data_size {data.data_size}: {data.train_data} has {rows} rows, and "
            f"each needs a row of its own in the sample state; give at least {rows}"
        )
    if config.trains and data.epoch_policy == "exact" and (data.train_num_samples or 0) > rows:
        raise ValueError(
            f"--train-num-samples {data.train_num_samples}: {data.train_data} has {rows} rows, and "
            f"--epoch_policy exact takes none twice; give at most {rows}"
        )
    return table


def samples_per_epoch(config: Config, table: CsvSource | None = None) -> int:
    """Samples of an epoch: ``--train-num-samples``, or all rows of the csv files, which ``table`` has, if read."""
    data = config.data
    if data.train_num_samples is not None:
        return data.train_num_samples
    assert data.dataset_type == "csv", "the parser asks for --train-num-samples"
    return (table or open_table(config)).count()


def steps_per_epoch(config: Config, world_size: int) -> int:
    """Steps of an epoch; known without opening shards."""
    return steps_of(samples_per_epoch(config), config, world_size)


def same_tokens(a: Tokenizer, b: Tokenizer) -> bool:
    """Whether two tokenizers give the same ids, and as many, for some test texts: then one serves both models."""
    ours, theirs = a(_PROBE), b(_PROBE)
    return ours.shape == theirs.shape and torch.equal(ours, theirs)


def steps_of(samples: int, config: Config, world_size: int) -> int:
    """Steps of an epoch of ``samples``, each of one global batch: ceil(samples / global batch).

    With ``--epoch_policy exact`` floor, since the last batch would not be full.
    """
    batch = config.run.batch_size * world_size
    if config.data.epoch_policy != "exact":
        return math.ceil(samples / batch)
    if samples < batch:
        raise ValueError(
            f"--epoch_policy exact: an epoch of {samples} samples does not fill a batch of {batch}; give a "
            "smaller --batch-size, or --epoch_policy wrap"
        )
    return samples // batch


def _remainder(beyond: int) -> str:
    """What happens to the samples that do not fill a batch; ``beyond``: places in batches minus samples."""
    if beyond < 0:
        return f"{-beyond} left out (different ones in each epoch)"
    return f"{beyond} repeated to fill the last batch" if beyond else "none repeated, none left out"


def _own_shards(config: Config) -> bool:
    return config.data.dataset_type == "webdataset" and config.data.skip_webdataset_split_by_node


def _layout(config: Config, world: World) -> Layout:
    """The lanes of ``--lanes``, or one for each loader process."""
    lanes, ranks = config.data.lanes, world.world_size
    if lanes is None:
        return default_layout(ranks, config.data.workers)
    layout = Layout(*lanes)
    misfit = layout.misfit(ranks, config.data.workers, config.run.batch_size * ranks)
    if misfit is None and _own_shards(config) and layout.ranks != ranks:
        misfit = f"--skip_webdataset_split_by_node needs as many virtual ranks as there are ranks, {ranks}"
    if misfit:
        raise ValueError(f"--lanes {layout}: {misfit}; give multiples of the number of ranks and of --workers")
    return layout


def _open(config: Config, world: World, target: Model, steps: int) -> Source:
    data, seed = config.data, config.run.seed
    if data.dataset_type == "webdataset":
        return open_shards(data, seed, world, steps)
    size, samples = target.preprocess.size, data.train_num_samples
    assert samples is not None, "the parser asks for --train-num-samples"
    if data.data_size >= 0:
        samples = min(samples, data.data_size)
    shape = (size, size) if isinstance(size, int) else tuple(size)
    return SyntheticSource(samples, shape, seed, resampled=data.epoch_policy == "resample")
