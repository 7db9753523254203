"""A run that an earlier version started resumes as that version would have continued it.

``assets/run_0.1.tar.xz`` is a run of version 0.1 that was stopped after 6 of 12 steps: its data, its models, and
its folder with ``step_6.pt`` and the rows of two ranks. ``expected.pt`` is the end of the same run without a stop:
the weights, the sample state, and each rank's batches from the seventh on.
"""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
import torch

from drrho_clip.sample_state import SampleState
from tests.support.ranks import run_program
from tests.support.recording import record, tensors
from training.checkpoint import pt_file, sample_state_io

ARCHIVE = Path(__file__).parents[1] / "assets" / "run_0.1.tar.xz"
COMMAND = """--model @/tiny-vit.json --pretrained @/start.pt --train-data @/{00000..00004}.tar --data_size 30
    --train-num-samples 30 --batch-size 4 --epochs 3 --workers 0 --lanes 2,1 --precision fp32 --lr 1e-3 --warmup 2
    --seed 5 --force-patch-dropout 0.25 --aug-cfg scale=(0.3,1.0) --grad-clip-norm 0.5 --logs @/logs
    --log-every-n-steps 1 --fastclip --multiply_tau --temperature 0.07 --gamma 0.6 --rho 6.5 --lr_tau 1e-4
    --ref_model @/tiny-vit-reference.json --ref_model_checkpoint @/reference.pt"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    return folder


def run(folder: Path, *more: str) -> list[list]:
    """What each of two ranks has trained on."""
    results = run_program(2, [*COMMAND.replace("@", str(folder)).split(), *more], record)
    assert [code for code, _ in results] == [0, 0]
    return [[list(batch) for batch in seen] for _, seen in results]


@pytest.fixture(scope="module")
def rounds_alike(folder) -> bool:
    """Whether this machine reaches the same ``step_6.pt`` from the beginning as the machine that made it.

    Another processor or another release of torch may sum in another order.
    """
    run(folder, "--name", "again", "--stop_iters", "6")
    then, now = (
        tensors({key: held[key] for key in ("state_dict", "optimizer")})
        for held in (
            pt_file.read(folder / "logs" / name / "checkpoints/step_6.pt") for name in ("stopped", "again")
        )
    )
    assert then.keys() == now.keys()
    for name in then:
        torch.testing.assert_close(now[name], then[name], rtol=0, atol=1e-5)
    return all(torch.equal(now[name], then[name]) for name in then)


def test_a_run_of_version_0_1_goes_on_with_the_same_samples_to_the_same_weights(folder, rounds_alike):
    """Samples and pixels are the same; weights and u are too, bit for bit, if the machine rounds alike."""
    expected = torch.load(folder / "expected.pt", weights_only=True)
    assert run(folder, "--name", "stopped", "--resume", "latest") == expected["batches"]
    checkpoint = folder / "logs/stopped/checkpoints/epoch_3.pt"
    state = SampleState(30, ("log_u_image", "log_u_text"))
    sample_state_io.read(checkpoint.with_suffix(".state"), state)
    found = {**pt_file.load_weights(checkpoint), **state.local()}
    wanted = {**expected["state_dict"], **expected["u"]}
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=0 if rounds_alike else 1e-5)
