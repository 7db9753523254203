"""The checks that need the number of ranks, the device or the files, before anything is built or written.

The parser has checked the flags by themselves. What is expensive to open is opened here, once, and passed on.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.cache import resident
from training.cache.captions import Captions, open_captions
from training.cache.features import check_captions, open_features
from training.config.params import Config
from training.data.batch_memory import BLOCKS
from training.data.build import open_table
from training.data.samples import FeatureSource
from training.data.sources.paths import look_for_shards
from training.data.sources.tables import CsvSource, look_for_pictures
from training.distributed import ddp
from training.distributed.collectives import on_main
from training.distributed.loader_processes import shared_memory, shared_memory_is_short
from training.distributed.process_group import World
from training.evaluation.benchmark.sets import FoundSet
from training.evaluation.evaluate import find_benchmark, open_sets
from training.evaluation.pairs import open_val_table
from training.evaluation.zero_shot import ClassificationSet
from training.machine import prepare
from training.machine.compiler import check_compiler
from training.machine.gpus import idle_gpus, without_gpu
from training.machine.limits import check_open_files, check_sockets, cores
from training.models import described, precision, pretrained
from training.models.frozen import look_for_weights


@dataclass(frozen=True)
class Opened:
    """What a run reads besides its data, and remarks on it for the log.

    ``features``: the reference's embeddings, ``captions``: synthetic ones; None where the run reads none.
    ``sets``: prefix of a result's name -> data set for zero-shot accuracy. ``table``, ``val_table``: the csv files
    of ``--train-data`` and ``--val-data``. ``benchmark``: the sets of ``--eval_data_dir``. ``kept``: bytes of
    ``features`` that each node keeps in memory.
    """

    features: FeatureSource | None
    captions: Captions | None
    sets: dict[str, ClassificationSet]
    table: CsvSource | None = None
    val_table: CsvSource | None = None
    remarks: tuple[str, ...] = ()
    benchmark: Sequence[FoundSet] = ()
    kept: int = 0


def check(config: Config, world: World) -> Opened:
    """Check the run and open what it reads. Collective. ValueError: the first thing that is wrong."""
    remarks = check_machine(config, world)
    check_models(config)
    features = open_features(config)
    captions = open_captions(config)
    check_captions(features, captions)
    kept = 0
    if config.trains:
        check_batch(config, world.world_size)
        check_shared_memory(config, world)
        check_teachers(config, features)
        if features is not None:
            views = features.views
            seen = (
                "one fixed view of each image, whatever augmentation the target sees"
                if views is None
                else f"{views.count} random views of each image, and the target sees the one that is used"
            )
            remarks.append(
                f"the reference's features are read from disk: {features.describe()}. They are of {seen}"
            )
            if config.cache.ref_features_cache_mb:
                size = on_main(lambda: sum(path.stat().st_size for path in features.paths))
                kept, remark = resident.plan(config.cache.ref_features_cache_mb, size)
                remarks.append(remark)
        if config.data.dataset_reinforcement:
            remarks.append(
                "the reference's features, synthetic captions and crops are those beside each sample of the shards"
            )
        if captions is not None:
            remarks.append(f"captions are the samples' own or synthetic ones: {captions.describe()}")
        if config.model.use_bn_sync:
            ddp.check_sync_bn(world)
            if not world.distributed:
                remarks.append(
                    "--use-bn-sync: no effect in a single process, whose BatchNorm sees the whole batch"
                )
        if config.loss.gather_error_bound is not None and not world.distributed:
            remarks.append("--gather_error_bound: no effect in a single process, which sends nothing")
    data, val = config.data, config.evaluation
    table = val_table = None
    if (config.trains or config.cache.writes) and data.train_data is not None:
        if data.dataset_type == "webdataset":
            remarks += _shards(data.train_data, "--train-data", data.max_bad_fraction)
        elif data.dataset_type == "csv":
            table = open_table(config)
            remarks += look_for_pictures(table, data.train_data, "--train-data", data.max_bad_fraction)
    if val.val_data is not None:
        if val.val_dataset_type == "webdataset":
            remarks += _shards(val.val_data, "--val-data")
        elif not config.cache.writes:
            val_table = open_val_table(config)
            remarks += look_for_pictures(val_table, val.val_data, "--val-data")
    sets = {} if config.cache.writes else on_main(lambda: open_sets(config))
    remarks += [remark for found in sets.values() for remark in found.remarks]
    benchmark = () if config.cache.writes else on_main(lambda: find_benchmark(config))
    return Opened(features, captions, sets, table, val_table, tuple(remarks), benchmark, kept)


def _shards(shards: str, flag: str, allowed: float = 1.0) -> list[str]:
    """Remarks on the shards. Rank 0 looks for all: many listings at once slow a shared file system down."""
    return on_main(lambda: look_for_shards(shards, flag, allowed))


def check_machine(config: Config, world: World) -> list[str]:
    """Remarks on how the run fits this machine. ValueError: it cannot work here."""
    found = prepare.remarks()
    if world.device.type == "cpu":
        found += filter(None, [without_gpu(built_for_gpus=torch.version.cuda is not None)])
    elif not config.distributed.no_set_device_rank:
        found += filter(None, [idle_gpus(world.local_world_size, torch.cuda.device_count())])
    if config.model.torchcompile:
        check_compiler(world.device.type)
    found += filter(None, [precision.remark(config.run.precision, world.device)])
    workers, available = config.data.workers, cores()
    if workers:
        check_sockets()
        check_open_files(workers)
    # A launcher may have given this rank cores of its own.
    on_node = min(os.cpu_count() or 1, available * world.local_world_size)
    if workers * world.local_world_size > on_node:
        found.append(
            f"--workers {workers}: {workers * world.local_world_size} loader processes on this machine share "
            f"{on_node} cores; more than "
            f"{max(1, on_node // world.local_world_size)} per rank need memory and save no time"
        )
    return found


def check_models(config: Config) -> None:
    """ValueError: open_clip cannot build a model from a model config file, or there are no such weights for it."""
    reference = config.reference
    for flag, model in (("--model", config.model.model), (reference.model_flag, reference.ref_model)):
        if model and pretrained.is_config_file(model):
            pretrained.try_to_build(pretrained.open_clip_name(model, flag), f"{flag} {model}")
    look_for_weights(config)


def check_batch(config: Config, ranks: int) -> None:
    """ValueError: a global batch in which a compositional loss has no negatives."""
    spec, batch = config.loss.spec, config.run.batch_size
    if not spec.sample_state:
        return
    said = f"--batch-size {batch} on {ranks} rank"
    kept = config.selected(batch, said)
    if kept * ranks < 2:
        why = (
            f"the loss {spec.name!r} compares a sample with the others of its global batch, which needs at least 2"
        )
        if kept < batch:
            ratio = config.reference.ref_filter_ratio
            raise ValueError(
                f"--ref_filter_ratio {ratio:g} keeps {kept} sample of {said}: {why}; give a lower ratio, or a "
                "larger batch"
            )
        raise ValueError(f"{said}: {why}")


def check_shared_memory(config: Config, world: World) -> None:
    """ValueError: /dev/shm is smaller than the images that the loader processes of this node keep in it at least.

    A model whose config would have to be downloaded first is not checked; its processes say what is wrong.
    """
    available, size = shared_memory(), config.model.force_image_size
    if available is None or not config.data.workers:
        return
    if size is None:
        name = pretrained.open_clip_name(config.model.model, "--model")
        if ":" in name:  # hf-hub: and the like
            return
        size = (
            pretrained.architecture(name, f"--model {config.model.model}")
            .get("vision_cfg", {})
            .get("image_size", 224)
        )
    height, width = (size, size) if isinstance(size, int) else (size[0], size[-1])
    needed = config.run.batch_size * 3 * height * width * BLOCKS * config.data.workers * world.local_world_size
    if needed > available:
        raise ValueError(shared_memory_is_short(config.data.workers, needed))


def check_teachers(config: Config, features: FeatureSource | None) -> None:
    """ValueError: the teachers' widths do not add up to the reference's, whose ``features`` may be on disk.

    The loss checks a reference whose config would have to be downloaded first, and features in the shards.
    """
    reference, widths = config.reference, config.loss.distill_teacher_dimension
    spec = config.loss.spec
    if "distill" not in reference.usage or widths == (-1,):
        return
    if spec.distills and not spec.takes("distill_teacher_dimension"):
        return  # a loss of its own
    if config.data.dataset_reinforcement:
        return  # the loss sees the first of them
    if features is not None:
        width, source = features.width, "--cached_ref_features_dir"
    else:
        name, source = described.reference_name(reference)
        if ":" in name:  # hf-hub: and the like
            return
        width = pretrained.architecture(name, source)["embed_dim"]
    if sum(widths) != width:
        raise ValueError(
            f"--distill_teacher_dimension {' '.join(map(str, widths))}: these widths add up to {sum(widths)}, but "
            f"the embeddings of {source} are {width} wide; give widths that add up to it"
        )
