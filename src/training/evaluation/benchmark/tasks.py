"""The tasks of the DataComp benchmark (https://arxiv.org/abs/2304.14108), and the groups that are averaged.

Keys, names, main metrics and sizes are those of its list of tasks. Of the 40 tasks 38 have a main metric.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

IMAGENET, SHIFTS, VTAB, RETRIEVAL = "ImageNet", "ImageNet dist. shifts", "VTAB", "Retrieval"
GROUPS = (IMAGENET, SHIFTS, VTAB, RETRIEVAL)


@dataclass(frozen=True)
class BenchmarkTask:
    """One task. ``metric``: its main one, None: it has none. ``columns``: the integers in its ``.npy`` files."""

    key: str
    name: str
    metric: str | None
    size: int
    group: str | None = None
    columns: str = ""

    @property
    def is_retrieval(self) -> bool:
        return self.key.startswith("retrieval/")

    @property
    def is_winogavil(self) -> bool:
        return self.key == "misc/winogavil"

    @property
    def stem(self) -> str:
        """The last part of its key, the name of its table where it is a table."""
        return self.key.rpartition("/")[2]

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders that it may be in, below that of all sets; the first is the benchmark's own."""
        shards = [f"wds_{name.replace('/', '-')}_test" for name in (self.key.removeprefix("fairness/"), self.key)]
        if self.is_retrieval or self.is_winogavil:
            known = [f"wds_{self.stem}_test", *_OTHER_NAMES.get(self.stem, ())]
            return (f"nlphuji/{self.stem}", *shards[:1], *known)
        return tuple(dict.fromkeys(shards))


# As clip_benchmark's own webdatasets of these are called.
_OTHER_NAMES = {
    "flickr_1k_test_image_text_retrieval": ("wds_flickr30k_test", "wds_flickr30k"),
    "mscoco_2014_5k_test_image_text_retrieval": ("wds_mscoco_captions_test", "wds_mscoco_captions"),
}

TASKS: tuple[BenchmarkTask, ...] = (
    BenchmarkTask("vtab/caltech101", "Caltech-101", "mean_per_class_recall", 6_085, group=VTAB),
    BenchmarkTask("cifar10", "CIFAR-10", "acc1", 10_000),
    BenchmarkTask("vtab/cifar100", "CIFAR-100", "acc1", 10_000, group=VTAB),
    BenchmarkTask("vtab/clevr_count_all", "CLEVR Counts", "acc1", 15_000, group=VTAB),
    BenchmarkTask("vtab/clevr_closest_object_distance", "CLEVR Distance", "acc1", 15_000, group=VTAB),
    BenchmarkTask("country211", "Country211", "acc1", 21_100),
    BenchmarkTask("vtab/dtd", "Describable Textures", "acc1", 1_880, group=VTAB),
    BenchmarkTask("vtab/eurosat", "EuroSAT", "acc1", 5_400, group=VTAB),
    BenchmarkTask("fgvc_aircraft", "FGVC Aircraft", "mean_per_class_recall", 3_333),
    BenchmarkTask("food101", "Food-101", "acc1", 25_250),
    BenchmarkTask("gtsrb", "GTSRB", "acc1", 12_630),
    BenchmarkTask("imagenet1k", "ImageNet 1k", "acc1", 50_000, group=IMAGENET),
    BenchmarkTask("imagenet_sketch", "ImageNet Sketch", "acc1", 50_889, group=SHIFTS),
    BenchmarkTask("imagenetv2", "ImageNet v2", "acc1", 10_000, group=SHIFTS),
    BenchmarkTask("imagenet-a", "ImageNet-A", "acc1", 7_500, group=SHIFTS),
    BenchmarkTask("imagenet-o", "ImageNet-O", "acc1", 2_000, group=SHIFTS),
    BenchmarkTask("imagenet-r", "ImageNet-R", "acc1", 30_000, group=SHIFTS),
    BenchmarkTask("vtab/kitti_closest_vehicle_distance", "KITTI Vehicle Distance", "acc1", 711, group=VTAB),
    BenchmarkTask("mnist", "MNIST", "acc1", 10_000),
    BenchmarkTask("objectnet", "ObjectNet", "acc1", 18_574, group=SHIFTS),
    BenchmarkTask("vtab/flowers", "Oxford Flowers-102", "mean_per_class_recall", 6_149, group=VTAB),
    BenchmarkTask("vtab/pets", "Oxford-IIIT Pet", "mean_per_class_recall", 3_669, group=VTAB),
    BenchmarkTask("voc2007", "Pascal VOC 2007", "acc1", 14_976),
    BenchmarkTask("vtab/pcam", "PatchCamelyon", "acc1", 32_768, group=VTAB),
    BenchmarkTask("renderedsst2", "Rendered SST2", "acc1", 1_821),
    BenchmarkTask("vtab/resisc45", "RESISC45", "acc1", 6_300, group=VTAB),
    BenchmarkTask("cars", "Stanford Cars", "acc1", 8_041),
    BenchmarkTask("stl10", "STL-10", "acc1", 8_000),
    BenchmarkTask("sun397", "SUN397", "acc1", 108_754, group=VTAB),
    BenchmarkTask("vtab/svhn", "SVHN", "acc1", 26_032, group=VTAB),
    BenchmarkTask(
        "retrieval/flickr_1k_test_image_text_retrieval", "Flickr", "mean_recall@1", 1_000, group=RETRIEVAL
    ),
    BenchmarkTask(
        "retrieval/mscoco_2014_5k_test_image_text_retrieval", "MSCOCO", "mean_recall@1", 5_000, group=RETRIEVAL
    ),
    BenchmarkTask("misc/winogavil", "WinoGAViL", "jaccard_score_10-12", 3_563, group=RETRIEVAL),
    BenchmarkTask(
        "wilds/iwildcam",
        "iWildCam",
        "F1-macro_all",
        42_791,
        columns="location sequence year month day hour minute second y",
    ),
    BenchmarkTask("wilds/camelyon17", "Camelyon17", "acc1", 85_054, columns="hospital slide y"),
    BenchmarkTask("wilds/fmow", "FMoW", "acc_worst_region", 22_108, columns="region year y"),
    BenchmarkTask(
        "fairness/dollar_street", "Dollar Street", "acc_top5_wg", 3_503, columns="income_ds income_meta region"
    ),
    BenchmarkTask("fairness/geode", "GeoDE", "acc_wg", 12_488, columns="region country"),
    BenchmarkTask("fairness/fairface", "FairFace", None, 10_954, columns="age gender race race_binary"),
    BenchmarkTask("fairness/utkface", "UTKFace", None, 23_703, columns="age gender race race_binary"),
)
WITH_MAIN_METRIC = tuple(task for task in TASKS if task.metric)


def chosen(words: str) -> tuple[list[BenchmarkTask], list[str]]:
    """What ``words``, the value of ``--tasks``, names: tasks of the table, and names of further sets.

    Tasks are named by their key, its last part, their name or their folder. ``all``: every task, and every further
    set.
    """
    if words.strip() == "all":
        return list(TASKS), []
    tasks: list[BenchmarkTask] = []
    further: list[str] = []
    for word in filter(None, (part.strip() for part in words.split(","))):
        task = _BY_WORD.get(word.casefold())
        if task is None:
            further.append(word)
        elif task not in tasks:
            tasks.append(task)
    return tasks, further


def near(word: str) -> str:
    """The end of a sentence that refuses ``word``, which names no task."""
    found = get_close_matches(word.casefold(), _BY_WORD, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(dict.fromkeys(_BY_WORD[name].key for name in found))}?" if found else ""


_BY_WORD = {
    word.casefold(): task
    for task in TASKS
    for word in (task.key, task.name, task.stem, *task.folders, task.folders[0].rpartition("/")[2])
}
