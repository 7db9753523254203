"""Values per sample on disk, written once and read by row: the layout of cached features and synthetic captions.

    DIR/index.json              what the store contains; written last, so that a reader finds all of it or nothing
    DIR/table-DIGEST.npy        uint32 [rows, 2]: 1 + position of each row (0: missing), checksum of its caption
    DIR/parts/N.rows.npy        int64 [n, 2]: the rows of a part in ascending order, and the same checksums
    DIR/parts/N.VALUES.npy      [n, ...]: their values, in this order
    DIR/parts/N.CONSTANTS.npy   what all rows of the part share, where its values are packed
    DIR/parts/N.json            what the part contains; written last, so that a part is complete or not there

How it scales (DFN: 255M rows, of which 192M exist; 2 vectors of 512 float16 are 2 KiB per row, 390 GB):

- Writers need no lock. A part has one writer, is complete before its name appears, and contains the values of
  several training shards, about 256 MB or what some minutes give: a few thousand files in all, so that a process
  may map every one.
- Rows may come in any order and with gaps; neither costs space. A dense array would compute the position of a row;
  the table stores it, in 8 bytes per row (2 GB for DFN, mapped once per node): position p of all parts laid end to
  end is in the part whose range contains p. A lookup is one read of the table and one of the values.
- The files are ``.npy`` files whose header fills a page, so that a row of 2 or 4 KiB lies in one page and needs
  one read. They are mapped with ``MADV_RANDOM``: otherwise the kernel reads 128 KiB around every row. The pages
  of a batch are requested before the first is used (``MADV_WILLNEED``), so that the disk gets all requests at
  once.
- A reader that knows what it will look up says so (``RowStore.expect``), and later the pages are there.
- At the start only the sizes of files are checked, not their bytes. Every lookup compares the caption's
  checksum, so that values of another data set, of other rows or of rewritten captions are an error and not a bad
  model. ``python -m training.check_cache DIR`` verifies the checksums of all files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from training.data.bad_samples import WrongRow
from training.files import digest, replacing
from training.machine.mapped import MappedFile

# Formats: of plain values; of values for which each part has facts that tell how to unpack them; of rows with
# several values each, of which a reader takes one (``SEVERAL`` is among their facts).
FORMAT, PACKED, MULTIPLE = 1, 2, 3
SEVERAL = "several"
_PAGE = 4096
_BLOCK = 2**24  # bytes that are written at a time
_NAMED = 8  # parts named one by one


class StoredPart(NamedTuple):
    """One part, as in its json.

    ``shards``  [number, name] of each training shard that is completely in it.
    ``facts``   what tells how its values are to be read; empty where they are plain.
    """

    name: str
    rows: int
    shards: list[tuple[int, str]]
    files: dict[str, dict[str, Any]]
    identity: dict[str, Any]
    facts: dict[str, Any]


class PartValues(NamedTuple):
    """What ``StoreWriter.write`` gets for a part: ``values`` by name, [n, ...], ``constants`` and ``facts``."""

    values: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray] = {}
    facts: Mapping[str, Any] = {}


def caption_checksum(text: str) -> int:
    """CRC-32 of a caption, which shows whether a row still belongs to the same sample."""
    return zlib.crc32(text.encode(errors="surrogatepass"))


# ---------------------------------------------------------------------------------------------------- writing


class StoreWriter:
    """Writes parts of a store of ``kind`` whose values were made as ``identity`` says (plain values, for json).

    Processes that write at the same time must have different shards: the lowest shard number is the part's name.
    """

    def __init__(self, folder: Path, kind: str, identity: Mapping[str, Any]) -> None:
        self.folder, self.kind, self.identity = folder, kind, dict(identity)

    def done(self) -> dict[int, str]:
        """The training shards that are in the store, number -> name.

        ValueError: the store is of another kind, or was made in another way, or its folder cannot be written; a
        shard is in two parts.
        """
        with self._writing():
            (self.folder / "parts").mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder / "parts") as probe:
                probe.write(bytes(_PAGE))
                probe.flush()
        self._indexed_table()
        shards: dict[int, str] = {}
        parts = _parts(self.folder, self.kind)
        _check_shards(self.folder, parts)
        for part in parts:
            _compare(self.folder, part.identity, self.identity)
            shards.update(part.shards)
        return shards

    def write(
        self,
        shards: Sequence[tuple[int, str]],
        rows: np.ndarray,
        checksums: np.ndarray,
        *,
        constants: Mapping[str, np.ndarray] = {},
        facts: Mapping[str, Any] = {},
        **values: np.ndarray,
    ) -> None:
        """Write one part, of ``shards``: ``rows`` int64 [n], their captions' checksums, ``values`` [n, ...].

        ``constants``, arrays that all rows share, and ``facts``, for json, tell how values are packed.
        ValueError: the folder cannot be written any more.
        """
        folder, name = self.folder / "parts", f"{min(shards)[0]:08d}"
        order = np.argsort(rows, kind="stable")
        arrays = {"rows": np.stack([rows, checksums.astype(np.int64)], 1), **values}
        arrays = {key: array[order] for key, array in arrays.items()} | dict(constants)
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            files = {key: _write_array(folder / f"{name}.{key}.npy", array) for key, array in arrays.items()}
            part = {"shards": sorted(shards), "rows": len(rows), "files": files, "identity": self.identity}
            if facts:
                part["facts"] = dict(facts)
            _write_json(folder / f"{name}.json", {"format": _format([facts]), "kind": self.kind, **part})

    def index(self) -> int:
        """Make all finished parts readable, those of other writers too. Returns the number of rows.

        ValueError: two parts have the same shard or row, or the folder cannot be written any more.
        """
        with self._writing():
            return self._index()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be written ({error.strerror or error}): make room there, or give a folder "
                "that can be written; the parts that are complete are kept"
            ) from error

    def _index(self) -> int:
        while True:
            parts = _parts(self.folder, self.kind)
            _check_shards(self.folder, parts)
            before, table = self._indexed_table(), self._write_table(parts)
            listed = [part._asdict() | {"shards": len(part.shards)} for part in parts]
            for part in listed:
                del part["identity"]
                if not part["facts"]:
                    del part["facts"]
            form = _format(part.facts for part in parts)
            index = {"format": form, "kind": self.kind, "identity": self.identity, "table": table}
            _write_json(self.folder / "index.json", index | {"parts": listed})
            if before not in (None, table["name"]):
                (self.folder / before).unlink(missing_ok=True)
            # Another writer may have finished a part, and its index, in between: this index is then out of date.
            if [part.name for part in _parts(self.folder, self.kind)] == [part.name for part in parts]:
                break
        return sum(part.rows for part in parts)

    def _indexed_table(self) -> str | None:
        """The table that readers use now. Only this one may be deleted: another one may be about to be indexed."""
        index = self.folder / "index.json"
        if not index.exists():
            return None
        held = json.loads(index.read_text(encoding="utf-8"))
        _check_format(self.folder, held, self.kind)
        return held["table"]["name"]

    def _write_table(self, parts: list[StoredPart]) -> dict[str, Any]:
        listed = [_open_array(self.folder / f"parts/{part.name}.rows.npy") for part in parts]
        height = max((int(rows[-1, 0]) + 1 for rows in listed if len(rows)), default=0)
        if sum(map(len, listed)) >= 2**32:
            raise ValueError(f"{self.folder}: more than 2^32 - 1 rows; split the data into several stores")
        table = np.zeros((height, 2), np.uint32)
        position = 1
        for part, rows in zip(parts, listed, strict=True):
            places = rows[:, 0]
            taken = table[places, 0] != 0
            taken[1:] |= places[1:] == places[:-1]
            if taken.any():
                raise ValueError(
                    f"{self.folder}: row {places[taken.argmax()]} occurs twice, the second time in "
                    f"{part.shards[0][1]} or a later shard; every sample needs a row of its own"
                )
            table[places, 0] = np.arange(position, position + len(rows))
            table[places, 1] = rows[:, 1]
            position += len(rows)
        names = "\n".join(f"{part.name} {part.files['rows']['blake2b']}" for part in parts)
        name = f"table-{hashlib.blake2b(names.encode(), digest_size=8).hexdigest()}.npy"
        return {"name": name, **_write_array(self.folder / name, table)}


def _parts(folder: Path, kind: str) -> list[StoredPart]:
    """The finished parts in ``folder``, by name."""
    parts = []
    for file in sorted((folder / "parts").glob("*.json")):
        held = json.loads(file.read_text(encoding="utf-8"))
        _check_format(folder, held, kind)
        shards = [tuple(shard) for shard in held["shards"]]
        identity, facts = held["identity"], held.get("facts", {})
        parts.append(StoredPart(file.stem, held["rows"], shards, held["files"], identity, facts))
    return parts


def _check_shards(folder: Path, parts: Sequence[StoredPart]) -> None:
    """ValueError: a shard is in two parts; it names parts whose removal mends that."""
    holders = Counter(shard for part in parts for shard in part.shards)
    twice = [shard for shard, held in holders.items() if held > 1]
    if not twice:
        return
    surplus: list[str] = []
    # First those that cost nothing, since all their shards are in others too; then the later one of two.
    for enough, order in ((all, parts), (any, parts[::-1])):
        for part in order:
            if part.name not in surplus and part.shards and enough(holders[s] > 1 for s in part.shards):
                surplus.append(part.name)
                holders.subtract(part.shards)
    files = " ".join(f"{folder}/parts/{name}.*" for name in surplus[:_NAMED])
    more = f" (and {len(surplus) - _NAMED} more parts, which are named then)" if len(surplus) > _NAMED else ""
    raise ValueError(
        f"{folder}: {len(twice)} shards are in two parts, the first is {min(twice)[1]}: two runs have written "
        f"them at the same time. Delete {files}{more} and run the same command again: it writes what is missing"
    )


def _format(facts: Iterable[Mapping[str, Any]]) -> int:
    """That of parts with these facts. Older versions, which could not read them, say that they know it not."""
    known = [part for part in facts if part]
    if not known:
        return FORMAT
    return MULTIPLE if any(SEVERAL in part for part in known) else PACKED


def _compare(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key in {**wanted, **held} if held.get(key) != wanted.get(key)]
    if different:
        was, now = (
            ", ".join(f"{key} {made[key]}" if key in made else f"no {key}" for key in different)
            for made in (held, wanted)
        )
        raise ValueError(f"{folder} was begun with {was}, and this run has {now}: give this run another folder")


def _write_array(path: Path, array: np.ndarray) -> dict[str, Any]:
    """Write ``array`` as .npy, completely or not at all. Returns its size in bytes and its checksum."""
    array = np.ascontiguousarray(array)
    described = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    magic = np.lib.format.magic(1, 0)
    text = repr(described).encode().ljust(_PAGE - len(magic) - 3) + b"\n"
    header = memoryview(magic + len(text).to_bytes(2, "little") + text)
    data = array.data.cast("B") if array.size else memoryview(b"")
    blocks = (data[i : i + _BLOCK] for i in range(0, len(data), _BLOCK))
    written = hashlib.blake2b(digest_size=16)
    with replacing(path) as file:
        for block in (header, *blocks):
            written.update(block)
            file.write(block)
    return {"bytes": path.stat().st_size, "blake2b": written.hexdigest()}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode())


# ---------------------------------------------------------------------------------------------------- reading


class RowStore:
    """A store that ``StoreWriter.index`` has made readable. Every process maps the files that it needs."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.identity = folder, index["identity"]
        self.parts = [part["name"] for part in index["parts"]]
        self.facts = [part.get("facts", {}) for part in index["parts"]]
        self.files = {f"parts/{p['name']}.{key}.npy": f for p in index["parts"] for key, f in p["files"].items()}
        self.files[index["table"]["name"]] = index["table"]
        self._table = index["table"]["name"]
        self._ends = np.cumsum([part["rows"] for part in index["parts"]], dtype=np.int64)
        self._maps: dict[str, _Mapped] = {}
        # Rows whose entries of the table are on their way, and of which of their values the numbers are known.
        self._expected: tuple[np.ndarray, dict[str, np.ndarray]] = np.empty(0, np.int64), {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": {}}  # another process maps for itself

    def __len__(self) -> int:
        """The number of rows in the store."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def paths(self, keys: Sequence[str]) -> list[Path]:
        """The files that lookups of ``keys`` read: the table, in which each row is looked up, and the values."""
        names = [self._table, *(f"parts/{part}.{key}.npy" for part in self.parts for key in keys)]
        return [self.folder / name for name in names if name in self.files]  # a part may have no rows

    def expect(self, rows: np.ndarray, keys: Sequence[str], which: Mapping[str, np.ndarray] = {}) -> None:
        """Values ``keys`` of ``rows``, int64 [n], will be gathered later: let the disk fetch them meanwhile.

        First come the rows' entries of the table, and with the next call, when they are there, the values.
        ``which``: for keys of which a row has several values, the numbers of those that are wanted, where they are
        known; int64 [n].
        """
        table = self._map(self._table)
        within = (rows >= 0) & (rows < len(table.array))
        coming = rows[within], {key: numbers[within] for key, numbers in which.items()}
        table.expect(coming[0])
        (rows, known), self._expected = self._expected, coming
        entries = table.array[rows, 0].astype(np.int64)
        there = entries > 0
        if there.any():
            for key in keys:
                self.pieces(key, entries[there] - 1, known[key][there] if key in known else None)

    def find(self, rows: np.ndarray, checksums: np.ndarray, name_of: Callable[[int], str]) -> np.ndarray:
        """The positions of ``rows`` (int64 [n]) with these captions, for ``gather``.

        WrongRow: a row is missing or has another caption; ``name_of(i)`` names the i-th sample in the message.
        """
        table = self._map(self._table)
        within = (rows >= 0) & (rows < len(table.array))
        if not within.all():
            raise WrongRow(f"{name_of(int(within.argmin()))} is not in {self.folder}")
        table.expect(rows)
        entries = table.array[rows]
        good = entries[:, 0] > 0
        if not good.all():
            raise WrongRow(f"{name_of(int(good.argmin()))} is not in {self.folder}")
        good = entries[:, 1] == checksums
        if not good.all():
            raise WrongRow(
                f"{name_of(int(good.argmin()))} has another caption than in {self.folder}: that store belongs to "
                "other data, or rows or captions have been changed since"
            )
        return entries[:, 0].astype(np.int64) - 1

    def gather(self, key: str, positions: np.ndarray, which: np.ndarray | None = None) -> np.ndarray:
        """Values ``key`` at ``positions`` (int64 [n]), of one shape in all parts, as one array [n, ...].

        ``which`` int64 [n]: of rows with several values, the number of the one that is wanted.
        """
        pieces = self.pieces(key, positions, which)
        out = np.empty((len(positions), *pieces[0].array.shape[1:]), pieces[0].array.dtype)
        for piece in pieces:
            out[piece.target] = piece.array[piece.source]
        return out

    def pieces(self, key: str, positions: np.ndarray, which: np.ndarray | None = None) -> list[Portion]:
        """Where values ``key`` at ``positions`` (int64 [n]) are, part by part; their pages are on their way.

        ``which``: as for ``gather``.
        """
        order = np.argsort(positions, kind="stable")
        places = positions[order]
        part_of = np.searchsorted(self._ends, places, side="right")
        cuts = np.flatnonzero(np.diff(part_of)) + 1
        pieces = []
        for piece in np.split(np.arange(len(places)), cuts):
            if len(piece):
                part = int(part_of[piece[0]])
                mapped, start = self._values(key, part)
                array: np.ndarray = mapped.array
                source = places[piece] - start
                if which is not None:
                    each, wanted = array.shape[1], which[order[piece]]
                    if wanted.max() >= each:
                        raise ValueError(
                            f"{self.folder}/parts/{self.parts[part]}.{key}.npy has {each} values per row, and "
                            f"number {wanted.max()} is wanted; copy the store again, or write it again"
                        )
                    array, source = array.reshape(-1, *array.shape[2:]), source * each + wanted
                mapped.expect(source, len(array))
                pieces.append(Portion(part, array, source, order[piece]))
        return pieces

    def constant(self, key: str, part: int) -> np.ndarray:
        """What all rows of a part share."""
        return self._values(key, part)[0].array

    def one(self, key: str, position: int) -> np.ndarray:
        """Values ``key`` at one position."""
        mapped, start = self._values(key, int(np.searchsorted(self._ends, position, side="right")))
        return mapped.array[position - start]

    def shape(self, key: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Type and shape of one row's values, from the first part that has rows."""
        array = self._values(key, int(np.searchsorted(self._ends, 0, side="right")))[0].array
        return array.dtype, array.shape[1:]

    def _values(self, key: str, part: int) -> tuple[_Mapped, int]:
        start = int(self._ends[part - 1]) if part else 0
        return self._map(f"parts/{self.parts[part]}.{key}.npy"), start

    def _map(self, name: str) -> _Mapped:
        if name not in self._maps:
            self._maps[name] = _Mapped(self.folder / name)
        return self._maps[name]


class Portion(NamedTuple):
    """Values of one part: ``array[source]`` belong to the entries ``target`` of what was asked for."""

    part: int
    array: np.ndarray
    source: np.ndarray
    target: np.ndarray


def open_store(folder: str | Path, kind: str, flag: str) -> RowStore:
    """The store of ``kind`` in ``folder``. ValueError, with ``flag``: there is none, or a file is incomplete."""
    folder = Path(folder)
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        begun = (folder / "parts").is_dir()
        cure = "; caching was begun and not finished, run the same command again to finish it" if begun else ""
        raise ValueError(f"{flag} {folder}: there is no index.json{cure}") from None
    except ValueError as error:
        raise ValueError(f"{flag} {folder}: index.json cannot be read ({error})") from None
    _check_format(folder, index, kind)
    store = RowStore(folder, index)
    if not len(store):
        raise ValueError(f"{flag} {folder}: the store contains no rows")
    for name, file in store.files.items():
        path = folder / name
        size = path.stat().st_size if path.exists() else None
        if size != file["bytes"]:
            state = "is missing" if size is None else f"has {size} bytes instead of {file['bytes']}"
            raise ValueError(f"{flag} {folder}: {name} {state}; copy the store again, or write it again")
    return store


def damaged(store: RowStore) -> list[str]:
    """The files whose contents are not what was written. All files are read."""
    return [name for name, file in store.files.items() if digest(store.folder / name) != file["blake2b"]]


def _check_format(folder: Path, held: Any, kind: str) -> None:
    if not isinstance(held, dict) or "kind" not in held or held.get("format") not in (FORMAT, PACKED, MULTIPLE):
        raise ValueError(f"{folder} is not a store of this program, or was written by another version of it")
    if held["kind"] != kind:
        raise ValueError(f"{folder} holds {held['kind']}, not {kind}: give the folder of {kind}")


class _Mapped:
    """A .npy file, mapped into memory and read at random positions.

    Python objects in it, which numpy can keep as a pickle, are never unpickled. ValueError: the file is no array
    of plain values, or shorter than its header says.
    """

    def __init__(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
                if dtype.hasobject:
                    raise ValueError("it holds Python objects in place of numbers; no code in it was run")
                self._start = file.tell()
            self._file = MappedFile(path)
            self._file.advise(mmap.MADV_RANDOM)
            self.array = self._file.array(dtype, shape, self._start)
        except (ValueError, TypeError, SyntaxError) as error:  # numpy parses the header as Python's literals
            raise ValueError(
                f"{path} cannot be read ({error}); copy the store again, or write it again"
            ) from error

    def expect(self, rows: np.ndarray, of: int | None = None) -> None:
        """Let the kernel fetch the pages of ``rows`` together; reading them one by one would wait for each.

        ``of``: the number of equal pieces of the array that ``rows`` counts; None: its rows.
        """
        size = self.array.nbytes // max(len(self.array) if of is None else of, 1)
        begin = self._start + rows * size
        first, last = begin // mmap.PAGESIZE, (begin + size - 1) // mmap.PAGESIZE
        pages = np.unique(np.concatenate([first, last]))
        starts = np.flatnonzero(np.diff(pages, prepend=-2) > 1)
        begins = pages[starts] * mmap.PAGESIZE
        lengths = np.diff(starts, append=len(pages)) * mmap.PAGESIZE
        for begin, length in zip(begins.tolist(), lengths.tolist()):
            self._file.advise(mmap.MADV_WILLNEED, begin, length)


def _open_array(path: Path) -> np.ndarray:
    return _Mapped(path).array
