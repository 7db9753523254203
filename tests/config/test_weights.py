"""What a file of weights is, and what is none, is known before anything is built."""

from __future__ import annotations

import gzip
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tests.support.commands import DATA, FASTCLIP, config
from training.config.given import Refusal
from training.config.inputs.weights import NotWeights, kind_of

WEIGHTS = {"a.weight": torch.arange(600.0).reshape(20, 30), "logit_scale": torch.tensor(2.0)}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 605143316\n"


def write_torch(file: Path) -> None:
    torch.save(WEIGHTS, file)


def write_old_torch(file: Path) -> None:
    torch.save(WEIGHTS, file, _use_new_zipfile_serialization=False)


def write_script(file: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(file)


def write_safetensors(file: Path) -> None:
    save_file(WEIGHTS, file)


def write_npz(file: Path) -> None:
    with file.open("wb") as writing:
        np.savez(writing, a=np.ones(300))


def write_index(file: Path) -> None:
    file.write_text(json.dumps({"metadata": {}, "weight_map": {"a.weight": "model-00001-of-00001.safetensors"}}))


KINDS: dict[str, Callable[[Path], None]] = {
    "torch": write_torch,
    "torchscript": write_script,
    "safetensors": write_safetensors,
    "npz": write_npz,
    "index": write_index,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["x.pt", "x.safetensors", "x"])
def test_the_content_decides_and_not_the_name(tmp_path, kind, name):
    KINDS[kind](tmp_path / name)
    assert kind_of(tmp_path / name) == kind


def test_files_of_older_torch_and_folders(tmp_path):
    write_old_torch(tmp_path / "x.pt")
    assert kind_of(tmp_path / "x.pt") == "torch"
    assert kind_of(tmp_path) == "folder"


def refusal(file: Path) -> str:
    with pytest.raises(NotWeights) as refused:
        kind_of(file)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["torch", "torchscript", "safetensors", "npz"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_download_that_was_cut_is_told_as_such(tmp_path, kind, share):
    file = tmp_path / "x.pt"
    KINDS[kind](file)
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(file).startswith("it is cut short") and refusal(file).endswith("get the file again")
    file.write_bytes(
        whole[: int(len(whole) * share)].ljust(len(whole), b"\0")
    )  # as some programs reserve the space
    if kind != "safetensors":  # which has nothing at its end by which this could be seen
        assert refusal(file).startswith("it is cut short")


@pytest.mark.parametrize("name", ["x.pt", "x.bin", "x.safetensors", "x.npz", "x.ckpt"])
def test_a_pointer_of_git_lfs_is_told_as_such_whatever_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    assert refusal(tmp_path / name).startswith("it is a pointer of Git LFS")
    assert "git lfs pull" in refusal(tmp_path / name)


def packed(tmp_path: Path, kind: str) -> bytes:
    inner = tmp_path / "inner.pt"
    write_torch(inner)
    if kind == "gzip":
        return gzip.compress(inner.read_bytes())
    with tarfile.open(tmp_path / "o", "w") if kind == "tar" else zipfile.ZipFile(tmp_path / "o", "w") as archive:
        (archive.add if isinstance(archive, tarfile.TarFile) else archive.write)(inner, "inner.pt")
    return (tmp_path / "o").read_bytes()


@pytest.mark.parametrize("kind, said", [("gzip", "with gzip"), ("tar", "a tar archive"), ("zip", "of inner.pt")])
def test_an_archive_around_the_weights_is_to_be_unpacked(tmp_path, kind, said):
    (tmp_path / "x.pt").write_bytes(packed(tmp_path, kind))
    assert said in refusal(tmp_path / "x.pt") and "unpack it" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "the file is empty"),
        (bytes(5000), "begins with zeros"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page in place of the file"),
        (b"\n <html lang='en'>", "a web page"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "an answer of a server"),
        (b'{"error": "Repository not found"}', "begins with '{\"error\": \"Repository not found\"}'"),
        (b"Invalid username or password.", "begins with 'Invalid username or password.'"),
        (json.dumps({"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}}).encode(), "it is the config of a model"),
        (pickle.dumps(WEIGHTS), "a pickle that torch.save did not write"),
        (b"\x89HDF\r\n\x1a\n" + bytes(2000), "it is HDF5"),
        (b"GGUF" + bytes(2000), "it is GGUF"),
        (b"\x93NUMPY\x01\0" + bytes(2000), "a single numpy array"),
        (bytes(range(200, 255)) * 40, "of no format that is read here"),
    ],
)  # fmt: skip
def test_what_lies_in_place_of_weights_is_named(tmp_path, content, said):
    (tmp_path / "x.pt").write_bytes(content)
    assert said in refusal(tmp_path / "x.pt")


def test_what_is_not_there_or_cannot_be_read(tmp_path):
    assert "there is no such file on this machine; check the path" in refusal(tmp_path / "x.pt")
    assert "write out the ~" in refusal(Path("~/weights/x.pt"))
    (tmp_path / "x.pt").symlink_to(tmp_path / "blobs" / "abc")  # as in a cache of the hub that was copied in part
    assert f"a link to {tmp_path}/blobs/abc, which is not there" in refusal(tmp_path / "x.pt")


MODELS = {
    "--pretrained": DATA,
    "--resume": DATA,
    "--ref_model_checkpoint": f"{FASTCLIP} --ref_model ViT-B-32",
    "--ref_model_pretrained": f"{FASTCLIP} --ref_model ViT-B-32",
    "--distill-pretrained": f"{DATA} --distill-model RN50",
    "--cap_model_pretrained": f"{DATA} --data_size 9 --cached_syn_texts_dir x --cache_syn_texts"
    " --cap_model coca_ViT-B-32",
}


@pytest.mark.parametrize("flag", MODELS)
def test_every_flag_that_takes_weights_refuses_what_is_none(tmp_path, flag):
    file = tmp_path / "ViT-B-32.safetensors"
    file.write_bytes(POINTER)
    with pytest.raises(Refusal, match=rf"^{flag} {file}: it is a pointer of Git LFS"):
        config(f"{MODELS[flag]} {flag} {file}")
    with pytest.raises(Refusal, match=rf"^{flag} {tmp_path}/none/x.bin: there is no such file"):
        config(f"{MODELS[flag]} {flag} {tmp_path}/none/x.bin")


def test_weights_from_elsewhere_say_how_to_get_them():
    with pytest.raises(Refusal, match=r"--pretrained hf://a/b.pt: this is a URL.*download it first"):
        config(f"{DATA} --pretrained hf://a/b.pt")
    with pytest.raises(
        Refusal, match=r"--pretrained laion/CLIP-ViT-B-32: .*give --model hf-hub:laion/CLIP-ViT-B-32"
    ):
        config(f"{DATA} --pretrained laion/CLIP-ViT-B-32")
    assert config(f"{DATA} --pretrained laion2b_s34b_b79k").model.pretrained == "laion2b_s34b_b79k"
    assert config(f"{DATA} --resume s3://bucket/epoch_1.pt").run.resume == "s3://bucket/epoch_1.pt"


def test_resume_of_a_folder_names_the_newest_file_in_it(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    write_torch(tmp_path / "checkpoints/epoch_3.pt")
    with pytest.raises(Refusal, match=rf"this is a folder; .* such as {tmp_path}/checkpoints/epoch_3.pt"):
        config(f"{DATA} --resume {tmp_path}")


def test_a_restarted_job_does_not_need_the_file_any_more(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert config(f"{DATA} --resume gone.pt").run.resume == "gone.pt"
