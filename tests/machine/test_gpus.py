"""A run on the CPU of a machine with GPUs is told, or refused where it is a mistake."""

from __future__ import annotations

import pytest

from training.machine.gpus import without_gpu
from training.machine.prepare import Unfit


@pytest.fixture
def devices(tmp_path):
    """A machine with four GPUs."""
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidia3", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    return tmp_path


def test_a_machine_without_gpus_needs_no_remark(tmp_path):
    for env in ({}, {"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": ""}):
        assert without_gpu(env, tmp_path) is None


@pytest.mark.parametrize("hidden", ["", "-1", " "])
def test_hidden_gpus_are_a_remark(devices, hidden):
    remark = without_gpu({"CUDA_VISIBLE_DEVICES": hidden}, devices)
    assert remark is not None and "hides the 4 GPUs" in remark and "on the CPU" in remark


def test_gpus_that_torch_cannot_use_are_a_remark(devices):
    remark = without_gpu({}, devices)
    assert remark is not None and "4 NVIDIA GPUs" in remark and "nvidia-smi" in remark


@pytest.mark.parametrize("wrong", ["4", "cuda:0", "GPU-none"])
def test_gpus_that_are_not_there_are_refused(devices, wrong):
    with pytest.raises(Unfit, match=rf"CUDA_VISIBLE_DEVICES='{wrong}' names no GPU.*from 0 to 3"):
        without_gpu({"CUDA_VISIBLE_DEVICES": wrong}, devices)
