"""What is where in a tar file of samples, so that any of them can be read alone.

A member's name is parted at the first dot behind the folder, as webdataset parts it: ``a/7.seg.png`` is the part
``seg.png`` of the sample ``a/7``. Names with a dot more, ``1.5.jpg`` with ``1.5.cls``, are parted at the last one
where that makes a sample of several parts.
"""

from __future__ import annotations

import tarfile
from dataclasses import dataclass, field
from pathlib import Path

# In the order in which the first that is there is taken.
SHARD_PICTURES = (".webp", ".png", ".jpg", ".jpeg")


@dataclass
class ShardSample:
    """The parts of a sample: extension, in lower case and with its dot, -> (offset, size) in ``shard``.

    ``contents``: the bytes of the parts that were asked for.
    """

    shard: str
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    contents: dict[str, bytes] = field(default_factory=dict)

    @property
    def picture(self) -> tuple[int, int] | None:
        """Where its picture is; None: it has none."""
        return next((self.parts[kind] for kind in SHARD_PICTURES if kind in self.parts), None)


def index_shard(shard: Path, said: str, read: tuple[str, ...]) -> list[ShardSample]:
    """The samples of a tar file in their order, with the contents of the parts ``read`` (such as ``.cls``).

    ValueError, beginning with ``said``: it cannot be read.
    """
    samples: dict[str, ShardSample] = {}
    dotted: dict[str, ShardSample] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                if not member.isfile() or name.startswith("._"):  # macOS writes the latter beside each file
                    continue
                stem, dot, extension = name.partition(".")
                place = (member.offset_data, member.size)
                content = None
                if f".{name.rpartition('.')[2].lower()}" in read and (file := tar.extractfile(member)) is not None:
                    content = file.read()
                for index, key, kind in (
                    (samples, f"{folder}{slash}{stem}", f"{dot}{extension}".lower()),
                    (dotted, f"{folder}{slash}{name.rpartition('.')[0]}", f".{name.rpartition('.')[2]}".lower()),
                ):
                    if index is dotted and "." not in extension:
                        continue
                    sample = index.setdefault(key, ShardSample(str(shard), key))
                    sample.parts[kind] = place
                    if content is not None and kind in read:
                        sample.contents[kind] = content
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{said}: {shard} cannot be read as a tar file ({error}); copy it again") from error
    known = {*SHARD_PICTURES, *read}
    found = {key: sample for key, sample in samples.items() if known & sample.parts.keys()}
    for key, sample in dotted.items():
        folder, slash, name = key.rpartition("/")
        is_alone = f"{folder}{slash}{name.partition('.')[0]}" not in found
        if (sample.picture and sample.contents) or (is_alone and known & sample.parts.keys()):
            found[key] = sample
    return list(found.values())
