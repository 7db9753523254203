"""The tensors of a TorchScript archive, such as OpenAI's files, read without running it.

``torch.jit.load`` compiles the code in the archive, and calls its ``__setstate__`` methods, which may write
files. The tensors need neither: ``data.pkl`` is a pickle of nested modules, whose attributes are tensors and
modules. It is unpickled here with all classes of the archive as plain holders of attributes, and with no other
classes.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage

# What OpenAI's archives hold besides weights.
OPENAI_SIZES = frozenset({"input_resolution", "context_length", "vocab_size"})

_HEADER = 30  # bytes before a file's name in a zip archive
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read(path: Path) -> dict[str, Tensor]:
    """Name -> tensor, as ``state_dict()`` of the module names them; mapped from the file, read when they are used.

    ValueError, or any error of a pickle: the archive holds something else than modules and tensors.
    """
    with zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        content = archive.read(f"{root}data.pkl")
        module = _Unpickler(io.BytesIO(content), _Storages(path, archive, f"{root}data/")).load()
    return dict(_tensors(module, ""))


class _Module:
    """An object of the archive: its attributes."""

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _Storages:
    """The values in the files ``data/N`` of the archive, mapped into memory where they are not compressed."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, folder: str) -> None:
        self._path, self._archive, self._folder = path, archive, folder
        self._mapped = UntypedStorage.from_file(str(path), False, path.stat().st_size)

    def __call__(self, key: str) -> UntypedStorage:
        """The bytes of ``data/key``."""
        found = self._archive.getinfo(f"{self._folder}{key}")
        if found.compress_type != zipfile.ZIP_STORED:
            return torch.frombuffer(bytearray(self._archive.read(found)), dtype=torch.uint8).untyped_storage()
        with self._path.open("rb") as file:
            file.seek(found.header_offset)
            header = file.read(_HEADER)
        start = (
            found.header_offset + _HEADER + sum(struct.unpack("<HH", header[-4:]))
        )  # behind name and extra field
        return self._mapped[start : start + found.file_size]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, storages: _Storages) -> None:
        super().__init__(file)
        self._storages = storages

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "__torch__":
            return _Module
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if module == "torch.jit._pickle":  # typed lists, with their values as the only argument
            return lambda values, *_: values
        known = {"torch._utils._rebuild_tensor_v2": _tensor, "collections.OrderedDict": dict}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it holds {module}.{name}; no code in it was run")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: Any) -> tuple[torch.dtype, UntypedStorage]:
        _, dtype, key, _, _ = pid
        return dtype, self._storages(str(key))


def _tensor(
    storage: tuple[torch.dtype, UntypedStorage], offset: int, size: Sequence[int], stride: Sequence[int], *_: Any
) -> Tensor:
    dtype, values = storage
    flat = torch.empty(0, dtype=dtype).set_(values)
    return flat.as_strided(tuple(size), tuple(stride), offset)  # which refuses what lies outside


def _tensors(module: Any, prefix: str) -> Any:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
