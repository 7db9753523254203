"""The sample state on disk: a folder of ``torch.distributed.checkpoint``, to which each rank writes its own rows.

Any number of ranks can read it again, also into a table with more rows, or one that keeps its values in another
way. A column in 16 bits is int16, and its code stands beside it (``SampleState.state_dict``). ``Files`` describes
what was written, name -> [bytes, CRC-32], and is kept in the checkpoint that names the folder: a file that is
missing, cut short or has a flipped bit is noticed before anything of it is used.

The format's index, ``.metadata``, is a pickle, and torch would run what it says. Here only the few classes are
known that torch writes into it; anything else is an error. The tensors are read by torch with
``weights_only=True``.
"""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from drrho_clip.collectives import world_size
from drrho_clip.sample_state import CODE, SampleState, code_in, never_seen, value_of
from drrho_clip.state.fixed_point import FixedPoint
from training.checkpoint import pt_file
from training.distributed.collectives import Group, PeerFailed, gather_object, on_main, rank_in
from training.files import checksum, sync_folder

Files = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class SavedState:
    """A sample state that a checkpoint names: its folder beside the checkpoint, and what was written there."""

    folder: Path
    files: Files

    @classmethod
    def named_in(cls, held: Mapping[str, Any], path: Path) -> SavedState | None:
        """What the checkpoint ``path``, whose content is ``held``, names; None where it names none."""
        named = held.get("sample_state")
        if not named:
            return None
        files = {str(name): (int(size), int(crc)) for name, (size, crc) in named["files"].items()}
        return cls(path.parent / Path(named["folder"]).name, files)


# torch.distributed.checkpoint warns in a run of one process, where nothing is wrong. The filter is process-wide,
# because Python cannot silence a warning in one thread.
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def write(folder: Path, columns: Mapping[str, Tensor], group: Group = None) -> Files:
    """Write ``columns`` (column -> [N], DTensor or plain) into the new ``folder``; the files it then has.

    All ranks call it together, with a separate ``group`` if it runs during training. OSError on rank 0,
    PeerFailed on the others: a rank could not write, or the ranks do not see the same folder.
    """
    with _exchanged(folder, group):
        # All is on the CPU already. With GPUs, copying ahead would create a stream and a context on the first one.
        writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
        dcp.save(dict(columns), storage_writer=writer, process_group=group)
    parts = gather_object(_written(folder, rank_in(group)), group)
    failure = next((part for part in parts if isinstance(part, OSError)), None)
    files = {} if failure else {name: found for part in parts for name, found in sorted(part.items())}

    def check() -> None:
        if failure:
            raise failure
        unseen = missing(folder, files)
        if unseen:
            raise OSError(
                f"rank 0 does not see what another rank wrote ({unseen}); all nodes need one shared --logs"
            )
        sync_folder(folder)

    on_main(check, group)
    return files


def read(folder: Path, state: SampleState) -> str | None:
    """Fill ``state``, a new one, from ``folder``; rows beyond those saved are never seen. Collective.

    Returns what changed on the way, for the log; None: every value is the one that was saved.
    ValueError: a column is missing, there are more rows than ``state`` has, or the files are not a sample state.
    """
    reader = _Reader(folder)
    saved = reader.read_metadata()
    columns = saved.state_dict_metadata
    for name in state.columns:
        if name not in columns:
            raise ValueError(f"sample state {folder} lacks the column {name!r}; it has {_names(saved)}")
        rows = _column(saved, name).size[0]
        if rows > state.num_samples:
            raise ValueError(
                f"--data_size {state.num_samples}: the sample state {folder} has {rows} rows, and "
                f"none may be lost; give at least {rows}"
            )
    try:
        codes = {name: _code(folder, saved, name) for name in state.columns}
        into, local = {}, state.local()
        for name, code in codes.items():
            same = code == state.codes.get(name)
            into[name] = local[name] if same else never_seen(len(state.rows), code)
        with _exchanged(folder):
            dcp.load(dict(into), storage_reader=reader, planner=_Planner(state.rows))
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        raise ValueError(f"sample state {folder} cannot be read ({pt_file.reason(cause)})") from error
    changed = [name for name, code in codes.items() if code != state.codes.get(name)]
    beyond = sum(gather_object(sum(state.fill(name, into[name], codes[name]) for name in changed)))
    return _told(changed[0], codes, state, beyond) if changed else None


def _told(name: str, codes: Mapping[str, FixedPoint | None], state: SampleState, beyond: int) -> str:
    """That columns such as ``name`` are kept in another way from now on, in words."""
    then, now = codes[name], state.codes.get(name)
    was = "float32" if then is None else f"16 bits with an error of at most {then.bound:.3g}"
    if now is None:
        return f"log u was saved in {was}, and is kept in float32 from here on"
    told = f"log u was saved in {was}; from here on 16 bits keep it, with an error of at most {now.bound:.3g}"
    if beyond:
        told += f"; {beyond:,} values beyond {now.least:.4g} and {now.most:.4g} have become these"
    return told


def blocks(folder: Path, names: Sequence[str], rows: int) -> Iterator[dict[str, Tensor]]:
    """The columns ``names``, as far as ``folder`` has them, in blocks of at most ``rows`` rows, in their order.

    Float32 each, NaN for rows that were not saved. Read by one process, which keeps one block in memory; nothing
    where ``folder`` has none of them. ValueError: the files are not a sample state, or cannot be read.
    """
    saved = _Reader(folder).read_metadata()
    pieces = {name: _pieces(folder, saved, name) for name in names if name in saved.state_dict_metadata}
    total = max((_column(saved, name).size[0] for name in pieces), default=0)
    try:
        codes = {name: _code(folder, saved, name) for name in pieces}
        for start in range(0, total, rows):
            wanted = range(start, min(start + rows, total))
            yield {
                name: value_of(_read_rows(places, wanted, codes[name]), codes[name])
                for name, places in pieces.items()
            }
    except OSError as error:
        raise ValueError(f"sample state {folder} cannot be read ({error})") from error


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a column, which stand in ``file`` from the byte ``offset`` on."""

    rows: range
    file: Path
    offset: int


def _pieces(folder: Path, saved: Metadata, name: str) -> list[_Piece]:
    """Where the rows of a column are. ValueError: not where torch puts them."""
    found, size = [], _column(saved, name).properties.dtype.itemsize
    for chunk in _column(saved, name).chunks:
        (first,), (length,) = chunk.offsets, chunk.sizes
        place = saved.storage_data.get(MetadataIndex(name, chunk.offsets))
        if length and place is not None:
            file = folder / place.relative_path
            try:
                offset = _values_in(file, place.offset, place.length, size * length)
            except (OSError, ValueError, struct.error, zipfile.BadZipFile) as error:
                raise ValueError(f"sample state {folder}: {file.name} cannot be read ({error})") from error
            found.append(_Piece(range(first, first + length), file, offset))
    return found


def _values_in(file: Path, offset: int, length: int, size: int) -> int:
    """Where the ``size`` bytes of a tensor's values begin, which torch.save has written at ``offset``.

    It writes a zip archive, in which they are not compressed.
    """
    with file.open("rb") as whole, zipfile.ZipFile(_Window(whole, offset, length)) as archive:
        members = {Path(member.filename).name: member for member in archive.infolist()}
        values = [member for member in archive.infolist() if Path(member.filename).parent.name == "data"]
        order = archive.read(members["byteorder"]) if "byteorder" in members else b"little"
        if len(values) != 1 or values[0].compress_type != zipfile.ZIP_STORED or values[0].file_size != size:
            raise ValueError("it holds something else than the column's values")
        if order != b"little":
            raise ValueError("it was written on a machine of another byte order")
        start = offset + values[0].header_offset
        whole.seek(start + 26)  # of the two lengths in the header before the values, whose 30 bytes are fixed
        return start + 30 + sum(struct.unpack("<HH", whole.read(4)))


class _Window(io.RawIOBase):
    """``length`` bytes of an open file from ``offset`` on, as a file."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, at: int, whence: int = io.SEEK_SET) -> int:
        self._at = at + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        data = self._file.read(min(len(buffer), max(self._length - self._at, 0)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _code(folder: Path, saved: Metadata, name: str) -> FixedPoint | None:
    """How the column is kept in 16 bits; None: it is float32."""
    if _column(saved, name).properties.dtype is not torch.int16:
        return None
    code = code_in(_read_rows(_pieces(folder, saved, name + CODE), range(2), None))
    if code is None:
        raise ValueError(f"sample state {folder}: {name + CODE} is no code of 16 bits, as {name} needs it")
    return code


def _read_rows(pieces: Sequence[_Piece], rows: range, code: FixedPoint | None) -> Tensor:
    """[len(rows)] as they are kept."""
    found = never_seen(len(rows), code).numpy()
    size = found.itemsize
    for piece in pieces:
        start, stop = max(rows.start, piece.rows.start), min(rows.stop, piece.rows.stop)
        if start < stop:
            with piece.file.open("rb") as file:
                file.seek(piece.offset + size * (start - piece.rows.start))
                values = np.fromfile(file, found.dtype.newbyteorder("<"), stop - start)
            if len(values) < stop - start:
                raise OSError(f"{piece.file} is cut short")
            found[start - rows.start : stop - rows.start] = values
    return torch.from_numpy(found)


def whole(state: SampleState) -> dict[str, Tensor]:
    """Column -> float32 [N] on the CPU of rank 0; empty on the others. Collective."""
    columns = {}
    k, n = world_size(), state.num_samples
    for name in state.columns:
        local = torch.cat([block.cpu() for block in state.blocks(name)])
        if k == 1:
            columns[name] = local
            continue
        padded = torch.full((-(-n // k),), torch.nan)
        padded[: len(local)] = local
        pieces = [torch.empty_like(padded) for _ in range(k)] if dist.get_rank() == 0 else None
        dist.gather(padded, pieces)
        if pieces is not None:
            columns[name] = torch.cat(pieces)[:n]
    return columns


def missing(folder: Path, files: Files) -> str | None:
    """What is wrong with the first of ``files`` that is not there completely; None: all are."""
    for name, (size, _) in files.items():
        file = folder / Path(name).name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
    return None


def damaged(folder: Path, files: Files, part: int = 0, parts: int = 1) -> str | None:
    """What is wrong with the first damaged file; None: all checksums agree.

    Only every ``parts``-th of ``files``, sorted by name, is read, starting with number ``part``.
    """
    for name in sorted(files)[part::parts]:
        file = folder / Path(name).name
        try:
            crc = checksum(file)
        except OSError as error:
            return f"{file} cannot be read ({error})"
        if crc != files[name][1]:
            return f"{file} is damaged: its checksum is not the one that was written"
    return None


def _written(folder: Path, rank: int) -> Files | OSError:
    """The files that ``rank`` has written into ``folder``."""
    try:
        files = [f for f in folder.iterdir() if f.name.startswith(f"__{rank}_")]
        files += [folder / ".metadata"] if rank == 0 else []
        return {f.name: [f.stat().st_size, checksum(f)] for f in files}
    except OSError as error:
        return error


class _Unpickler(pickle.Unpickler):
    """Reads a ``.metadata`` of torch 2.6 or newer, and calls nothing but the classes that are stored there."""

    _KNOWN: Mapping[str, Any] = {
        **{
            f"torch.distributed.checkpoint.metadata.{name}": getattr(metadata, name)
            for name in (*metadata.__all__, "_MEM_FORMAT_ENCODING")
        },
        "torch.distributed.checkpoint.filesystem._StorageInfo": filesystem._StorageInfo,
        "torch.Size": torch.Size,
        "torch.float32": torch.float32,
        "torch.int16": torch.int16,
        "torch.serialization._get_layout": lambda _: torch.strided,
        **dict.fromkeys(("pathlib.PosixPath", "pathlib._local.PosixPath"), PurePosixPath),  # of the folder, unused
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[f"{module}.{name}"]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it names {module}.{name}, which is no part of a sample state; no code in it was run"
            ) from None

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it refers to other files")


class _Reader(dcp.FileSystemReader):
    """Reads a folder without running code from it. ValueError: its index is not that of a sample state."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._folder = folder

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            found = _Unpickler(io.BytesIO((self._folder / ".metadata").read_bytes())).load()
            whole = _is_index(found)
        except OSError as error:
            raise ValueError(f"sample state {self._folder}: its index cannot be read ({error})") from error
        except Exception as error:  # the unpickler can fail in any way on foreign bytes
            reason = str(error) if isinstance(error, pickle.UnpicklingError) else "it is cut short"
            raise ValueError(f"sample state {self._folder}: .metadata is not its index ({reason})") from error
        if not whole:
            raise ValueError(f"sample state {self._folder}: .metadata is the index of something else")
        found.planner_data = None
        return found


def _is_index(found: Any) -> bool:
    """Whether ``found`` is the index of columns whose pieces lie in files of the same folder."""
    if type(found) is not Metadata:
        return False
    columns = found.state_dict_metadata
    for name, column in columns.items():
        if (
            type(name) is not str
            or type(column) is not TensorStorageMetadata
            or type(column.size) is not torch.Size
            or len(column.size) != 1
        ):
            return False
        if column.properties.dtype is torch.int16:
            if name.endswith(CODE) or name + CODE not in columns:
                return False
        elif column.properties.dtype is not torch.float32 or (name.endswith(CODE) and column.size[0] != 2):
            return False
        for chunk in column.chunks:
            (offset,), (length,) = chunk.offsets, chunk.sizes
            if type(chunk) is not ChunkStorageMetadata or not 0 <= offset <= offset + length <= column.size[0]:
                return False
    for index, place in found.storage_data.items():
        if type(index) is not MetadataIndex or type(place) is not filesystem._StorageInfo:
            return False
        if place.relative_path != Path(place.relative_path).name or min(place.offset, place.length) < 0:
            return False
    return True


def _names(saved: Metadata) -> list[str]:
    return sorted(name for name in saved.state_dict_metadata if not name.endswith(CODE))


def _column(saved: Metadata, name: str) -> TensorStorageMetadata:
    column = saved.state_dict_metadata[name]
    assert isinstance(column, TensorStorageMetadata), "the reader has checked it"
    return column


class _Planner(dcp.DefaultLoadPlanner):
    """Reads the rows ``rows`` of every column, as far as they were saved, into plain tensors [len(rows)]."""

    def __init__(self, rows: range) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._rows = rows

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None  # torch sets the planner up before it asks for a plan
        items: list[ReadItem] = []
        for name in self.state_dict:
            saved = _column(self.metadata, name)
            stop = min(self._rows.stop, saved.size[0])
            if stop > self._rows.start:
                wanted = ChunkStorageMetadata(
                    torch.Size([self._rows.start]), torch.Size([stop - self._rows.start])
                )
                items += create_read_items_for_chunk_list(name, saved, [wanted])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


@contextmanager
def _exchanged(folder: Path, group: Group = None) -> Iterator[None]:
    """Turn the error of torch.distributed.checkpoint, which repeats what all ranks report, into one message."""
    try:
        yield
    except dcp.CheckpointException as error:
        rank, (cause, _) = min(error.failures.items(), key=lambda failure: failure[0])
        if rank_in(group) > 0:
            raise PeerFailed(f"rank {rank} failed; rank 0 reports why") from None
        raise OSError(f"sample state {folder}, rank {rank}: {cause}") from cause
