"""What a file of weights is, by its first and last bytes.

So a file that holds none, such as a page that was saved in its place or half a download, is refused at once and by
name, before torch is imported. ``kind_of`` is what decides how a file is read; its name does not matter.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from training.config.given import Given, Refusal

TORCH, TORCHSCRIPT, SAFETENSORS, NPZ, INDEX, FOLDER = (
    "torch",
    "torchscript",
    "safetensors",
    "npz",
    "index",
    "folder",
)

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before 1.6
_AGAIN = "get the file again"
_UNPACK = "unpack it, and give the file of weights in it"
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a pointer of Git LFS in place of the file: run git lfs pull in its "
     "repository, or download it from there"),
    (b"\x1f\x8b", f"compressed with gzip: {_UNPACK}"),
    (b"BZh", f"compressed with bzip2: {_UNPACK}"),
    (b"\xfd7zXZ", f"compressed with xz: {_UNPACK}"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd: {_UNPACK}"),
    (b"7z\xbc\xaf", f"a 7z archive: {_UNPACK}"),
    (b"Rar!", f"a rar archive: {_UNPACK}"),
    (b"\x89HDF", "HDF5, as Keras writes it: convert it to a dict of torch tensors and save that with torch.save"),
    (b"GGUF", "GGUF, as llama.cpp reads it: give the weights that it was made of"),
    (b"\x93NUMPY", "a single numpy array: give a file of named weights"),
)  # fmt: skip


class NotWeights(ValueError):
    """Why a file cannot be weights, and what to do: the end of a sentence about the file."""


def kind_of(path: str | os.PathLike[str]) -> str:
    """The kind of the weights at ``path``, one of the names above.

    ``INDEX`` is the list of files among which Hugging Face divides a large model. NotWeights: it is of no such
    kind.
    """
    path = Path(path)
    if path.is_symlink() and not path.exists():
        raise NotWeights(f"it is a link to {os.readlink(path)}, which is not there: {_AGAIN}")
    if path.is_dir():
        return FOLDER
    try:
        with path.open("rb") as file:
            start = file.read(1024)
            size = os.fstat(file.fileno()).st_size
            return _kind(path, start, size)
    except FileNotFoundError:
        cure = "write out the ~, which no shell has replaced" if str(path).startswith("~") else "check the path"
        raise NotWeights(f"there is no such file on this machine; {cure}") from None
    except OSError as error:
        raise NotWeights(f"it cannot be read ({error.strerror or error})") from None


def check_weights(given: Given, key: str) -> None:
    """Refusal: the value of the flag ``key`` is a file without weights. What is no file is a tag of open_clip."""
    value = given.values[key] or ""
    if "://" in value:
        raise Refusal(f"{given.say(key)}: this is a URL, and weights are read from files: download it first")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.pt)", value) and not os.path.exists(value):
        raise Refusal(
            f"{given.say(key)}: there is no such file on this machine; check the path, or, for a repository of "
            f"the Hugging Face hub, give --model hf-hub:{value}"
        )
    if os.path.isfile(value) or re.search(r"/|\.(pt|pth|bin|ckpt|safetensors|npz)$", value):
        check_weights_file(given, key)


def check_weights_file(given: Given, key: str) -> None:
    """Refusal: the value of the flag ``key``, where it has one, is not the path of weights."""
    if given.values[key]:
        try:
            kind_of(given.values[key])
        except NotWeights as error:
            raise Refusal(f"{given.say(key)}: {error}") from None
        except OSError as error:
            raise Refusal(f"{given.say(key)}: it cannot be used ({error.strerror}); check the path") from None


def check_checkpoint(given: Given, key: str, env: Mapping[str, str] = os.environ) -> None:
    """Refusal: the value of the flag ``key`` is not the path of a checkpoint. URLs are not looked at here.

    A job that its launcher has started again goes on from its own checkpoints, and the file may be gone since.
    """
    value = given.values[key]
    again = any(env.get(name, "0") != "0" for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    if again or "://" in value:
        return
    check_weights_file(given, key)
    folder = Path(value)
    if folder.is_dir():
        files = [file for place in (folder, folder / "checkpoints") for file in place.glob("*.pt")]
        newest = max(files, key=lambda file: file.stat().st_mtime, default=folder / "epoch_1.pt")
        raise Refusal(
            f"{given.say(key)}: this is a folder; give a file in it, such as {newest}, or latest with --name"
        )


def _kind(path: Path, start: bytes, size: int) -> str:
    if not start:
        raise NotWeights(f"the file is empty, as after a download that failed or on a full disk: {_AGAIN}")
    if not start.strip(b"\0"):
        raise NotWeights(f"the file begins with zeros, as a download that was not finished: {_AGAIN}")
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header < 10**8:
        _check_safetensors(path, header, size)
        return SAFETENSORS
    if start.startswith(b"PK"):
        return _kind_of_zip(path, size)
    for beginning, what in _BEGINNINGS:
        if start.startswith(beginning):
            raise NotWeights(f"it is {what}")
    if start[257:262] == b"ustar":
        raise NotWeights(f"it is a tar archive: {_UNPACK}")
    if start.startswith(_LEGACY):
        return TORCH
    if start[0] == 0x80 and start[1] < 6:
        raise NotWeights(
            "it is a pickle that torch.save did not write, and reading it could run code: save its weights as a "
            "dict of tensors with torch.save"
        )
    text = _as_text(start)
    if text is None:
        raise NotWeights(
            "it is of no format that is read here (torch.save, TorchScript, safetensors, big_vision's npz): check "
            f"that it is the right file, or {_AGAIN}"
        )
    return _kind_of_text(path, text)


def _kind_of_zip(path: Path, size: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError):
        raise NotWeights(f"it is cut short after {size:,} bytes, as a broken download: {_AGAIN}") from None
    entries = {name.partition("/")[2] for name in names}
    if "data.pkl" in entries:
        return TORCHSCRIPT if "constants.pkl" in entries else TORCH
    if names and all(name.endswith(".npy") for name in names):
        return NPZ
    raise NotWeights(f"it is a zip archive of {_some(names) or 'nothing'}: {_UNPACK}")


def _check_safetensors(path: Path, header: int, size: int) -> None:
    """NotWeights: the file is shorter than its header says."""
    try:
        with path.open("rb") as file:
            file.seek(8)
            tensors = json.loads(file.read(header))
        ends = [held["data_offsets"][1] for name, held in tensors.items() if name != "__metadata__"]
        expected = 8 + header + max(ends, default=0)
    except (ValueError, LookupError, TypeError, AttributeError):
        if size < 8 + header:
            raise NotWeights(f"it is cut short inside its header, after {size:,} bytes: {_AGAIN}") from None
        raise NotWeights(f"it begins as safetensors do, but its header cannot be read: {_AGAIN}") from None
    if size < expected:
        raise NotWeights(f"it is cut short after {size:,} of {expected:,} bytes, as a broken download: {_AGAIN}")


def _kind_of_text(path: Path, text: str) -> str:
    shown = " ".join(text.split())[:60]
    if re.match(r"<(!doctype|html|head|body|script|meta)\b", text, re.IGNORECASE):
        raise NotWeights(
            "it is a web page in place of the file, such as one to log in at, or an error: look at it in a "
            f"browser, and {_AGAIN} with your access token or by its direct link"
        )
    if text.startswith("<?xml"):
        raise NotWeights(f"it is an answer of a server in place of the file ({shown} ...): {_AGAIN}")
    if text.startswith("{"):
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            held = {}
        if isinstance(held, dict) and "weight_map" in held:
            return INDEX
        if isinstance(held, dict) and {"embed_dim", "model_cfg", "model_type"} & held.keys():
            raise NotWeights("it is the config of a model, and not its weights, which lie in another file")
    raise NotWeights(f"it is text in place of the file, and begins with {shown!r}: {_AGAIN}")


def _as_text(start: bytes) -> str | None:
    """``start`` as text; None: it is none. Its last character may be cut."""
    try:
        text = start.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(start) - error.start > 3:  # bytes of the longest character, but the last
            return None
        text = start[: error.start].decode("utf-8-sig")
    text = text.lstrip()
    return text if text and re.sub(r"\s", "", text).isprintable() else None


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
