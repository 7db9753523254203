"""Nothing that is read of a stranger's checkpoint, weights or cached values runs code.

Each test first shows, or an ordinary loader does, that the trap is a real one.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from tests.support.small_runs import Run, assert_same, save
from training.cache.features import PublishedFeatures, StoredFeatures
from training.cache.row_store import StoreWriter, open_store
from training.checkpoint import catalog, pt_file
from training.files import checksum

pytestmark = pytest.mark.usefixtures("one_thread")


class Malice:
    """Creates a folder when an ordinary loader unpickles it."""

    def __init__(self, trace: Path) -> None:
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "trace"


# --- the sample state


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A whole checkpoint."""
    save([tmp_path / "epoch_1.pt"], Run(0).epochs(1).state)
    return tmp_path / "epoch_1.pt"


def replace(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file of the sample state, with the checksum that the .pt has of it, as a stranger could."""
    folder = checkpoint.with_suffix(".state")
    (folder / name).write_bytes(content)
    held = pt_file.read(checkpoint)
    held["sample_state"]["files"][name] = [len(content), checksum(folder / name)]
    pt_file.write(checkpoint, held)
    assert catalog.problem(checkpoint) is None


def change_index(checkpoint: Path, change: Callable[[Metadata], Any]) -> None:
    """Change the index of the sample state; ``change`` may return another object in its place."""
    index = dcp.FileSystemReader(checkpoint.with_suffix(".state")).read_metadata()
    replace(checkpoint, ".metadata", pickle.dumps(change(index) or index))


def refusal(checkpoint: Path) -> str:
    with pytest.raises(ValueError) as refused:
        Run(1).resumed(checkpoint)
    assert "\n" not in str(refused.value)
    return str(refused.value)


PLACES: dict[str, Callable[[Metadata, Malice], Any]] = {
    "all of it": lambda index, malice: malice,
    "a list of it": lambda index, malice: [index, malice],
    "its plan": lambda index, malice: setattr(index, "planner_data", malice),
    "a column": lambda index, malice: index.state_dict_metadata.update(log_u_text=malice),
    "a place": lambda index, malice: index.storage_data.update({next(iter(index.storage_data)): malice}),
    "a name": lambda index, malice: index.state_dict_metadata.update({malice: None}),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_index_with_code_in_it_is_refused_and_nothing_of_it_runs(checkpoint, trace, place):
    change_index(checkpoint, lambda index: PLACES[place](index, Malice(trace)))
    assert "it names posix.mkdir, which is no part of a sample state; no code in it was run" in refusal(checkpoint)
    assert not trace.exists()
    with suppress(AttributeError):
        dcp.FileSystemReader(checkpoint.with_suffix(".state")).read_metadata()  # torch runs it
    assert trace.exists()


def test_an_index_written_by_hand_reaches_no_function(checkpoint, trace):
    """Opcodes that a pickler would not write: a function's name in parts, and by copyreg's table."""
    for opcodes in (b"cos\nmkdir\n(V%s\ntR.", b"(ios\nmkdir\n.", b"(cbuiltins\neval\nVNone\no.", b"\x82\x01."):
        replace(checkpoint, ".metadata", opcodes.replace(b"%s", bytes(trace)))
        assert ".metadata is not its index" in refusal(checkpoint)
    assert not trace.exists()


def test_an_index_of_other_things_than_columns_is_refused(checkpoint, tmp_path):
    """torch would unpickle a column that is called bytes, and read files elsewhere."""

    def as_bytes(index: Metadata) -> None:
        index.state_dict_metadata["log_u_text"] = BytesStorageMetadata()

    def elsewhere(index: Metadata) -> None:
        for place in index.storage_data.values():
            place.relative_path = "../../secret"

    original = (checkpoint.with_suffix(".state") / ".metadata").read_bytes()
    for change in (as_bytes, elsewhere):
        replace(checkpoint, ".metadata", original)
        change_index(checkpoint, change)
        assert ".metadata is the index of something else" in refusal(checkpoint)
    for content in (original[:40], b"", b"no pickle"):
        replace(checkpoint, ".metadata", content)
        assert ".metadata is not its index" in refusal(checkpoint)


def test_columns_with_code_in_them_are_refused(checkpoint, trace):
    """The index is right, and the values are an object in place of a tensor."""
    folder = checkpoint.with_suffix(".state")
    data = next(file for file in folder.iterdir() if file.suffix == ".distcp")
    trap = io.BytesIO()
    torch.save(Malice(trace), trap)

    def point_there(index: Metadata) -> None:
        for place in index.storage_data.values():
            place.offset, place.length = 0, len(trap.getvalue())

    change_index(checkpoint, point_there)
    replace(checkpoint, data.name, trap.getvalue())
    assert "no code in it was run" in refusal(checkpoint)
    assert not trace.exists()
    torch.load(io.BytesIO(trap.getvalue()), weights_only=False)
    assert trace.exists()


def test_what_torch_writes_into_an_index_is_known(checkpoint):
    """So an honest checkpoint still loads, also where torch has put its plan beside the index."""
    change_index(checkpoint, lambda index: None)
    assert_same(Run(1).resumed(checkpoint).everything(), Run(0).epochs(1).everything())


# --- weights


class ObjectScalar:
    """A numpy scalar of Python objects, or of records of them."""

    def __init__(self, kind: np.dtype, trace: Path) -> None:
        self.kind, self.held = kind, pickle.dumps(Malice(trace))

    def __reduce__(self):
        function, _ = np.float64(0).__reduce__()
        return function, (self.kind, self.held)


@pytest.mark.parametrize("kind", [np.dtype(object), np.dtype([("a", object)]), np.dtype("V8"), np.dtype("U2")])
@pytest.mark.parametrize("zipped", [True, False])
def test_numpy_values_that_are_no_numbers_are_refused(tmp_path, trace, kind, zipped):
    file = tmp_path / "x.pt"
    held = {"state_dict": {"w": torch.ones(2, 2)}, "epoch": ObjectScalar(kind, trace)}
    torch.save(held, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        ValueError, match=r"x\.pt: cannot be read \(it holds a numpy value of type .*, which is no"
    ):
        pt_file.read(file)
    assert not trace.exists()


class Writing(nn.Module):
    """Writes a file when TorchScript loads it."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self.path = path
        self.weight = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[str, torch.Tensor, bool]:
        return self.path, self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]) -> None:
        self.path, self.training = state[0], state[2]
        self.weight = torch.from_file(state[0], shared=True, size=4).reshape(2, 2)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_code_of_a_torchscript_archive_is_not_run(tmp_path, trace):
    file = tmp_path / "x.pt"
    torch.jit.script(Writing(str(trace))).save(file)
    with pytest.raises(ValueError, match="holds neither a state_dict nor bare weights"):
        pt_file.load_weights(file)  # which of its values is the weight only its code could say
    assert not trace.exists()
    torch.jit.load(file)
    assert trace.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_torchscript_archive_that_names_a_function_is_refused(tmp_path, trace):
    file = tmp_path / "x.pt"
    torch.jit.script(nn.Linear(2, 2)).save(file)
    with zipfile.ZipFile(file) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    for opcodes in (pickle.dumps(Malice(trace)), b"cbuiltins\neval\n(VNone\ntR."):
        with zipfile.ZipFile(file, "w") as archive:
            for name, content in contents.items():
                archive.writestr(name, opcodes if name.endswith("/data.pkl") else content)
        with pytest.raises(ValueError, match=r"cannot be read \(it holds (posix.mkdir|builtins.eval); no code"):
            pt_file.read(file)
    assert not trace.exists()


# --- cached values


def test_published_features_with_code_in_them_are_refused(tmp_path, trace):
    file = tmp_path / "00000000.pt"
    torch.save([torch.ones(4, 2, 3), Malice(trace)], file)
    with pytest.raises(
        ValueError, match=r"00000000\.pt cannot be read \(it holds posix.mkdir, .* no code in it was run"
    ):
        PublishedFeatures({0: str(file)}, per_shard=4)
    assert not trace.exists()
    torch.load(file, weights_only=False)
    assert trace.exists()


def test_a_feature_store_with_objects_in_it_is_refused(tmp_path, trace):
    writer = StoreWriter(tmp_path, "features", {"model": "m", "weights": "w"})
    rows = np.arange(1)
    writer.write([(0, "0.tar")], rows, rows.astype(np.uint32), features=np.ones((1, 2, 3), np.float32))
    writer.index()
    file = tmp_path / "parts/00000000.features.npy"
    np.save(file, np.array([Malice(trace)], object), allow_pickle=True)
    index = json.loads((tmp_path / "index.json").read_text())
    index["parts"][0]["files"]["features"]["bytes"] = file.stat().st_size
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"features\.npy cannot be read \(it holds Python objects .* no code in it"
    ):
        StoredFeatures(open_store(tmp_path, "features", "--flag"))
    assert not trace.exists()
    np.load(file, allow_pickle=True)
    assert trace.exists()


def test_a_store_whose_arrays_are_cut_or_strange_is_a_sentence(tmp_path):
    writer = StoreWriter(tmp_path, "features", {"model": "m", "weights": "w"})
    rows = np.arange(3)
    writer.write([(0, "0.tar")], rows, rows.astype(np.uint32), features=np.ones((3, 2, 3), np.float32))
    writer.index()
    file = tmp_path / "parts/00000000.features.npy"
    whole = file.read_bytes()
    for content in (b"\0" * len(whole), whole.replace(b"(3, 2, 3)", b"(9, 2, 3)"), whole.replace(b"<f4", b"bad")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"features\.npy cannot be read .*copy the store again"):
            StoredFeatures(open_store(tmp_path, "features", "--flag"))
