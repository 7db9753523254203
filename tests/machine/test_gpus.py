"""A run on the CPU of a machine with GPUs is told, or refused where it is a mistake."""

from __future__ import annotations

import pytest

from training.machine.gpus import idle_gpus, without_gpu
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


def test_a_slurm_job_without_a_gpu_is_a_remark_where_torch_could_use_one(tmp_path):
    env = {"SLURM_JOB_ID": "71"}
    assert "job 71 has no GPU" in (without_gpu(env, tmp_path, built_for_gpus=True) or "")
    assert without_gpu(env, tmp_path) is None
    assert without_gpu({}, tmp_path, built_for_gpus=True) is None


def test_gpus_that_no_rank_uses_are_a_remark():
    assert idle_gpus(8, 8) is None and idle_gpus(9, 8) is None
    remark = idle_gpus(4, 8)
    assert remark is not None and remark.startswith("8 GPUs are visible on this node and 4 of them are used")
    assert "--ntasks-per-node=8" in remark
