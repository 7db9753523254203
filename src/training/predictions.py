"""What an evaluation keeps of a set beside its metrics, so that people can see what a model gets right and wrong.

Each set has one file, ``RUN/eval_results/predictions/epoch_N/SET.npz``: arrays, and one text of JSON. No pickles.
Of a checkpoint inside an epoch it is in ``step_S/``. A file has two bits per picture or caption, and of the rest
so much that it stays below half a megabyte:

* classification: pictures and right ones of each class, the ``CONFUSED`` most frequent pairs of a class and
  another one that was taken for it, and of ``EXAMPLES`` pictures the most similar classes and where they are;
* retrieval: of ``QUERIES`` pictures and as many captions what was found for them, and the rank of the right one.

Examples are evenly spaced over the set, so they are the same ones for every model.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from training.files import replacing

_log = logging.getLogger(__name__)

Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
Floats = NDArray[np.float64]
# Where a picture is, as ``evaluation.benchmark.sets.read_picture`` reads it: values that JSON has.
Place = Sequence[str | int]

FOLDER = "predictions"
TOP = 5
EXAMPLES, CONFUSED, QUERIES = 2000, 1000, 200
LEFT_OUT = -2  # in the place of a class: the picture could not be decoded
_CAPTION = 300  # characters
_FORMAT = 1
_ABOUT = "about"


@dataclass(frozen=True)
class Classified:
    """Predictions of C ``classes`` for N pictures, of which E are examples.

    ``used``, ``right`` bool [N]: the picture could be decoded; its class was the most similar one.
    ``class_pictures``, ``class_right`` int64 [C]: used and right pictures. ``confused`` int64 [P, 3]: class, other
    class that was the most similar one, pictures; most pictures first. Of the examples: ``number`` [E] in the set,
    ``label`` [E], ``top`` [E, k] the most similar classes, -1 where similarities are not numbers; ``probability``
    [E, k] of these, by a softmax over all classes at the model's temperature; ``places``.
    """

    kind: ClassVar[str] = "classes"

    key: str
    name: str
    classes: Sequence[str]
    used: Booleans
    right: Booleans
    class_pictures: Integers
    class_right: Integers
    confused: Integers
    number: Integers
    label: Integers
    top: Integers
    probability: Floats
    places: Sequence[Place]


@dataclass(frozen=True)
class Retrieved:
    """What was found for N pictures and T captions, of which Q each are examples.

    ``image_right`` bool [N], ``text_right`` bool [T]: a right answer was the most similar one. Of the examples:
    ``image_query`` [Q] and ``text_query`` [Q], their numbers; ``…_top`` [Q, k] and ``…_score`` [Q, k], the most
    similar captions or pictures and their cosines; ``…_rank`` [Q] of the best right answer, from 1, and ``…_own``
    [Q], its number. ``pictures`` and ``captions``: number -> place, and text, of all of these.
    """

    kind: ClassVar[str] = "retrieval"

    key: str
    name: str
    image_right: Booleans
    text_right: Booleans
    image_query: Integers
    image_top: Integers
    image_score: Floats
    image_rank: Integers
    image_own: Integers
    image_hits: Booleans
    text_query: Integers
    text_top: Integers
    text_score: Floats
    text_rank: Integers
    text_own: Integers
    pictures: dict[int, Place]
    captions: dict[int, str]


Kept = Classified | Retrieved


def evenly(n: int, most: int) -> Integers:
    """``most`` of the numbers 0 to n - 1, evenly spaced; all of them where there are no more."""
    count = min(n, most)
    return np.arange(count, dtype=np.int64) * n // max(count, 1)


def classified(
    key: str,
    name: str,
    classes: Sequence[str],
    labels: Integers,
    top: Integers,
    probability: Floats,
    place: Callable[[int], Place],
) -> Classified:
    """From all pictures: ``labels`` [N], ``top`` and ``probability`` [N, k]; ``LEFT_OUT`` in ``top`` as said."""
    used = top[:, 0] != LEFT_OUT
    right = top[:, 0] == labels
    examples = evenly(len(labels), EXAMPLES)
    examples = examples[used[examples]]
    return Classified(
        key=key,
        name=name,
        classes=list(classes),
        used=used,
        right=right,
        class_pictures=np.bincount(labels[used], minlength=len(classes)),
        class_right=np.bincount(labels[right], minlength=len(classes)),
        confused=_most_confused(labels[used], top[used, 0]),
        number=examples,
        label=labels[examples],
        top=top[examples, :TOP],
        probability=probability[examples, :TOP],
        places=[place(number) for number in examples.tolist()],
    )


def _most_confused(labels: Integers, predicted: Integers) -> Integers:
    """[P, 3]: class, another one, pictures; the most frequent ``CONFUSED`` pairs, first those of most pictures."""
    wrong = (labels != predicted) & (predicted >= 0)
    pairs, counts = np.unique(np.stack([labels[wrong], predicted[wrong]], 1), axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:CONFUSED]
    return np.concatenate([pairs[order], counts[order, None]], 1).astype(np.int64).reshape(-1, 3)


def shortened(caption: str) -> str:
    """A caption as it is kept."""
    return caption[:_CAPTION]


def folder_of(results: Path) -> Path:
    """Where the predictions lie that belong to the file ``results``, ``epoch_N_eval_results.jsonl``."""
    return results.parent / FOLDER / results.stem.removesuffix("_eval_results")


def save(folder: Path, kept: Kept) -> Path:
    """Write ``kept`` into ``folder``, which is made. OSError: it cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kept.key.replace('/', '-')}.npz"
    about: dict[str, Any] = {"format": _FORMAT, "kind": kept.kind}
    arrays: dict[str, NDArray[Any]] = {}
    for field in fields(kept):
        value = getattr(kept, field.name)
        if isinstance(value, np.ndarray):
            arrays[field.name] = _packed(value)
            about[field.name] = list(value.shape) if value.dtype == np.bool_ else None
        elif isinstance(value, dict):  # JSON would make texts of its numbers
            about[field.name] = [list(value), list(value.values())]
        else:
            about[field.name] = value
    text = json.dumps(about, separators=(",", ":")).encode()
    with replacing(path) as file:
        np.savez_compressed(file, allow_pickle=False, **arrays, **{_ABOUT: np.frombuffer(text, np.uint8)})
    return path


def keep(folder: Path, kept: Kept) -> None:
    """``save``; a folder that cannot be written is told, and ends nothing: metrics matter more."""
    try:
        save(folder, kept)
    except OSError as error:
        _log.warning("%s: predictions of %s cannot be written (%s)", folder, kept.name, error.strerror or error)


def load(path: Path) -> Kept:
    """What ``save`` has written. ValueError: it is something else, or damaged."""
    try:
        with np.load(path, allow_pickle=False) as file:
            about = json.loads(file[_ABOUT].tobytes())
            if about["format"] != _FORMAT:
                raise ValueError(f"its format is {about['format']}, known is {_FORMAT}")
            made = Classified if about["kind"] == Classified.kind else Retrieved
            values = {field.name: _value(field.name, about, file) for field in fields(made)}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # zip files, arrays and JSON fail in many ways
        raise ValueError(f"{path}: no predictions, or damaged ({error})") from error
    return made(**values)


def _packed(values: NDArray[Any]) -> NDArray[Any]:
    if values.dtype == np.bool_:
        return np.packbits(values)
    return values.astype(np.float16 if values.dtype.kind == "f" else np.int32)


def _value(name: str, about: dict[str, Any], file: Any) -> Any:
    if name not in file:
        value = about[name]
        return dict(zip(*value, strict=True)) if name in ("pictures", "captions") else value
    array: NDArray[Any] = file[name]
    if about[name] is not None:
        return np.unpackbits(array, count=int(np.prod(about[name]))).astype(np.bool_).reshape(about[name])
    return array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
