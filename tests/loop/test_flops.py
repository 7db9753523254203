"""Operations per sample against published figures, and the utilization that a run reports."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest
import torch

from drrho_clip.reference import Reference
from tests.support.stepping import HALF, build, make_batch, make_loss, make_task
from training.loop.flops import Utilization, forward_flops, peak_flops, step_flops, training_flops
from training.loop.task import Selection


@pytest.fixture(scope="module")
def vit_b_32():
    with torch.device("meta"):  # shapes are all that is counted, and 151 million random weights take seconds
        return open_clip.create_model("ViT-B-32", device="meta", load_weights=False, output_dict=True)


def test_a_published_model(vit_b_32):
    """open_clip's own table of models gives 14.78 GFLOPs for ViT-B-32."""
    image, text = torch.zeros(2, 3, 224, 224), torch.zeros(2, 77, dtype=torch.int64)
    forward = forward_flops(vit_b_32, image, text)
    assert forward == pytest.approx(14.78e9, rel=2e-3)
    assert training_flops(vit_b_32, image, text) == pytest.approx(3 * forward)
    vit_b_32.set_grad_checkpointing(True)
    assert training_flops(vit_b_32, image, text) == pytest.approx(3 * forward)
    assert vit_b_32.transformer.grad_checkpointing
    vit_b_32.lock_image_tower()
    locked = training_flops(vit_b_32, image, text)
    assert locked == pytest.approx(8.8e9 + 3 * 5.98e9, rel=0.01)  # the towers' shares in the same table


def test_a_step_counts_the_reference_and_the_scores_of_a_selection():
    batch, target, reference = make_batch(), build("drrho"), build("reference")
    own = training_flops(target, batch.image, batch.text)
    scores, others = (forward_flops(m, batch.image, batch.text) for m in (target, reference))
    plain = make_task(target, make_loss("drrho"), "clip")
    assert step_flops(plain, batch) == own
    chosen = make_task(target, make_loss("drrho"), "drrho", selection=Selection(0.25, 1, topk=False))
    chosen.reference = Reference(reference, HALF, HALF)
    assert step_flops(chosen, batch) == pytest.approx(scores + 0.25 * own + others)
    assert Utilization(1e9).of(plain, batch, 50.0) == pytest.approx(50.0 * own / 1e9)
    assert Utilization(None).of(plain, batch, 50.0) is None


def test_a_model_with_batch_norm_is_counted_on_one_sample_and_stays_as_it_is():
    """Its last map is 1 x 1, of which one sample has no statistics; synchronized ones refuse the meta device."""
    file = Path(__file__).parents[2] / "assets" / "models" / "study-small.json"
    open_clip.add_model_config(file)
    model = open_clip.create_model(file.stem, load_weights=False, output_dict=True).train()
    image, text = torch.zeros(8, 3, 32, 32), torch.zeros(8, 8, dtype=torch.int64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plain = training_flops(model, image, text)
    assert plain > 1e6 and all(module.training for module in model.modules())
    for synchronized in (False, True):
        if synchronized:
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert training_flops(model, image, text) == plain
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_model_that_cannot_be_counted_is_told_once_and_has_no_utilization(caplog):
    target = build("drrho")
    task = make_task(target, make_loss("drrho"), "clip")
    target.encode_image = lambda *given, **more: torch.zeros(1).item() / 0
    used = Utilization(1e12)
    assert [used.of(task, make_batch(), 50.0) for _ in range(2)] == [None, None]
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "no MFU is reported, because the model's operations could not be counted"
    ]


@pytest.mark.parametrize(
    "card, flops",
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_the_peak_of_a_card(monkeypatch, card, flops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: card)
    assert peak_flops(torch.device("cuda"), "amp_bf16") == flops
    assert peak_flops(torch.device("cuda"), "fp32") == (flops and flops / 2)
    assert peak_flops(torch.device("cpu"), "amp_bf16") is None


def test_a_run_reports_its_utilization_where_the_card_is_known(lab, monkeypatch):
    words = lab.words("--report-to tensorboard --train-num-samples 8 --epochs 1 --seed 3")
    assert "MFU" not in lab.run(words).log
    monkeypatch.setattr("training.loop.build.peak_flops", lambda device, precision: 1e12)
    run = lab.run([*words, "--log-every-n-steps", "1"])
    assert "epoch 0: " in run.log and "of the cards' peak (MFU)" in run.log
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = run.folder.rglob("events*")
    events = EventAccumulator(str(file)).Reload()
    rates = [e.value for e in events.Scalars("train/samples_per_second_per_gpu")]
    shares = [e.value for e in events.Scalars("train/mfu")]
    ratios = [share / rate for share, rate in zip(shares, rates, strict=True)]
    assert len(ratios) == 4 and ratios == pytest.approx([ratios[0]] * 4, rel=1e-3)
