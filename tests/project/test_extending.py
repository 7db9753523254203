"""What docs/extending.md shows works as it stands there: a loss from outside, and a data source."""

from __future__ import annotations

import csv
import importlib.util
import inspect
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
import torch

from drrho_clip.losses import compositional, registry
from drrho_clip.losses.interface import Loss, LossInputs, LossOutput
from drrho_clip.losses.registry import LossSpec
from tests.support import shards, tiny_models
from tests.support.commands import DATA, config, refusal
from tests.support.ranks import run_program
from training.checkpoint.pt_file import load_weights
from training.config.given import Refusal
from training.data.lanes import Lane
from training.loop.build import build_loss

ROOT = Path(__file__).parents[2]
BUILT_IN = ["clip", "coca", "distill", "fastclip", "fastclip_individual", "siglip"]
SAMPLES, TOKENS, RHO = 8, 16, 6.5


def shown(first_line: str) -> str:
    """The code block of docs/extending.md that begins with ``first_line``."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/extending.md").read_text(), re.M | re.S)
    (block,) = (block for block in blocks if block.startswith(first_line))
    return block


# A loss from outside the package.


@dataclass(frozen=True)
class Ended:
    code: int
    error: str

    @property
    def losses(self) -> list[float]:
        """The totals that the lines about training give."""
        return [float(value) for value in re.findall(r"(?<!_)Loss: ([-\d.]+)", self.error)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The program, pairs that make one global batch, and a model with weights."""
    folder = tmp_path_factory.mktemp("extending")
    (folder / "train.py").write_text(shown('"""train.py'))
    with (folder / "pairs.csv").open("w", newline="") as file:
        rows = csv.writer(file, delimiter="\t")
        rows.writerow(["filepath", "title"])
        for i in range(SAMPLES):
            shards.picture(i, (32, 32)).save(folder / f"{i}.png")
            rows.writerow([folder / f"{i}.png", shards.caption(i)])
    tiny_models.path("tiny-vit", folder)
    torch.save(tiny_models.build("tiny-vit", seed=3).state_dict(), folder / "weights.pt")
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Ended]:
    """The program on one rank, on two, and with a loss that nobody knows, side by side."""
    flags = shlex.split(
        f"--loss robust_infonce --rho {RHO} --train-data {folder}/pairs.csv --model {folder}/tiny-vit.json "
        f"--pretrained {folder}/weights.pt --train-num-samples {SAMPLES} --epochs 3 --workers 0 --precision fp32 "
        f"--optimizer sgd --lr 0.3 --warmup 0 --log-every-n-steps 1 --aug-cfg scale=(1.0,1.0) ratio=(1.0,1.0) "
        f"--logs {folder}/logs"
    )
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    commands = {
        "one": ["train.py", *flags, "--name", "one", "--batch-size", str(SAMPLES)],
        "two": [*torchrun, "train.py", "--", *flags, "--name", "two", "--batch-size", str(SAMPLES // 2)],
        "unknown": ["train.py", *flags, "--loss", "unheard_of"],
    }
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    started = {
        name: subprocess.Popen([sys.executable, *words], cwd=folder, env=env, stderr=subprocess.PIPE, text=True)
        for name, words in commands.items()
    }
    errors = {name: process.communicate(timeout=120)[1] for name, process in started.items()}
    return {name: Ended(process.returncode, errors[name]) for name, process in started.items()}


def robust_infonce(folder: Path) -> float:
    """tau (InfoNCE + rho) of the eight pairs under the weights that a run starts with, in float64."""
    model = tiny_models.build("tiny-vit")
    model.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    model.double().eval()
    pixels = np.stack([np.asarray(shards.picture(i, (32, 32))) for i in range(SAMPLES)]) / 255
    pixels = (pixels - open_clip.OPENAI_DATASET_MEAN) / open_clip.OPENAI_DATASET_STD
    tokens = open_clip.tokenize([shards.caption(i) for i in range(SAMPLES)], TOKENS)
    with torch.no_grad():
        image = model.encode_image(torch.from_numpy(pixels).permute(0, 3, 1, 2)).numpy()
        text = model.encode_text(tokens).numpy()
        tau = 1 / model.logit_scale.exp().item()
    image /= np.linalg.norm(image, axis=1, keepdims=True)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    exponents = image @ text.T / tau
    own = np.diag(exponents)
    infonce = sum((np.log(np.exp(exponents).sum(axis)) - own).mean() for axis in (0, 1)) / 2
    return tau * (infonce + RHO)


def test_a_loss_from_outside_trains(folder, runs):
    """What is logged first is its value at the start."""
    one = runs["one"]
    assert one.code == 0, one.error
    assert len(one.losses) == 3
    assert one.losses[0] == pytest.approx(robust_infonce(folder), rel=1e-4)
    assert one.losses == sorted(one.losses, reverse=True)
    assert "loss robust_infonce (--loss robust_infonce)" in one.error
    assert "no effect" not in one.error


def test_it_is_the_same_on_two_ranks(runs):
    one, two = runs["one"], runs["two"]
    assert two.code == 0, two.error
    assert two.losses == pytest.approx(one.losses, rel=1e-4)


def test_an_unknown_loss_is_refused_with_those_there_are(runs, capsys):
    assert runs["unknown"].code == 2
    known = ", ".join(sorted([*BUILT_IN, "robust_infonce"]))
    assert runs["unknown"].error == f"error: --loss unheard_of: unknown, choose one of {known}\n"
    assert refusal(f"{DATA} --loss robust_infonce", capsys) == (
        f"--loss robust_infonce: unknown, choose one of {', '.join(BUILT_IN)}"
    )


class Triplet(Loss):
    """The hardest negative of each sample is to be less similar than its own by a margin. No temperature."""

    def forward(self, inputs: LossInputs) -> LossOutput:
        similarity = inputs.image @ inputs.text.T
        negatives = similarity.masked_fill(torch.eye(len(similarity), dtype=torch.bool), -1)
        return LossOutput({"triplet": (0.2 + negatives.amax(1) - similarity.diagonal()).relu().mean()})


def register_triplet() -> None:
    """Once, on a rank that lives on for other tests."""
    if "triplet" not in registry.names():
        registry.register(LossSpec("triplet", lambda environment: Triplet(), temperature="none"))


def test_a_loss_without_a_temperature_leaves_the_models_alone(folder):
    """DDP would wait for a gradient that never comes."""
    words = shlex.split(
        f"--loss triplet --train-data {folder}/pairs.csv --train-num-samples {SAMPLES} --epochs 2 --batch-size 2 "
        f"--model {folder}/tiny-vit.json --pretrained {folder}/weights.pt --lr 1e-3 --warmup 0 --workers 0 "
        f"--precision fp32 --logs {folder}/logs --name triplet"
    )
    assert [code for code, _ in run_program(2, words, register_triplet)] == [0, 0]
    before = load_weights(folder / "weights.pt")
    after = load_weights(folder / "logs/triplet/checkpoints/epoch_2.pt")
    assert torch.equal(before["logit_scale"], after["logit_scale"])
    assert not torch.equal(before["text_projection"], after["text_projection"])


# The losses that there are.

NEEDS = {
    "coca": "--model coca_ViT-B-32",
    "distill": "--distill-model ViT-B-32 --distill-pretrained openai",
    "fastclip": "--data_size 8",
    "fastclip_individual": "--data_size 8",
}


def keywords(function) -> set[str]:
    """The keywords that ``function`` takes."""
    taken = set()
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            taken.add(name)
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            assert name == "estimator", f"{function} hides what it takes"
            taken |= set(compositional.EstimatorSettings.__annotations__)
    return taken


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_settings_of_a_loss_are_what_its_builder_takes(name):
    spec = registry.get(name)
    assert set(spec.settings) == keywords(spec.builder())
    loss = build_loss(config(f"{DATA} --loss {name} {NEEDS.get(name, '')}"), torch.device("cpu"))
    assert isinstance(loss, Loss)
    assert (loss.state is not None) == spec.sample_state


def test_a_setting_that_no_flag_sets_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry.register(registry.LossSpec("wishful", "nowhere:build", {"margin": "wished_for"}))
    with pytest.raises(
        Refusal, match=r"--loss wishful: .* asks for the setting 'wished_for', but no flag sets it"
    ):
        config(f"{DATA} --loss wishful")


def test_all_losses_are_looked_at():
    assert registry.names() == BUILT_IN


# A data source.


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> tuple[ModuleType, str]:
    """The source's module, and a file of seven lines."""
    folder = tmp_path_factory.mktemp("lines")
    (folder / "jsonl.py").write_text(shown('"""Training samples from a .jsonl'))
    found = importlib.util.spec_from_file_location("jsonl", folder / "jsonl.py")
    module = importlib.util.module_from_spec(found)
    sys.modules["jsonl"] = module  # pickle looks it up there
    found.loader.exec_module(module)
    pairs = [{"image": f"{i}.png", "text": f"number {i}"} for i in range(7)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    yield module, str(folder / "pairs.jsonl")
    del sys.modules["jsonl"]


def batches(source, steps: int, ranks: int, workers: int) -> list[list[int]]:
    """The rows of global batches of four."""
    share = 4 // ranks
    lanes = {
        (p, q): (item.sample.row for item in source.stream(0, Lane(p, ranks, q, workers, share)) if item.sample)
        for p in range(ranks)
        for q in range(workers)
    }
    return [[row for p in range(ranks) for row in islice(lanes[p, t % workers], share)] for t in range(steps)]


def test_a_source_deals_every_sample_once_whatever_the_lanes(lines):
    module, path = lines
    source = module.JsonLines(path, seed=5)
    dealt = batches(source, 7, 1, 1)
    rows = list(chain(*dealt))
    for turn in range(4):
        assert sorted(rows[7 * turn : 7 * turn + 7]) == list(range(7))
    for ranks, workers in ((2, 1), (1, 2), (4, 2)):
        assert batches(source, 7, ranks, workers) == dealt
    assert batches(pickle.loads(pickle.dumps(source)), 7, 2, 2) == dealt
    assert batches(module.JsonLines(path, seed=6), 7, 1, 1) != dealt


def test_a_source_goes_on_from_every_place(lines):
    """Where a place lies at the end of a turn, that end need not be told again."""
    module, path = lines
    lane = Lane(1, 2, 0, 1, 2)
    items = list(islice(module.JsonLines(path, seed=5).stream(3, lane), 20))
    assert None in [item.sample for item in items]
    for i, item in enumerate(items):
        after = [later.sample for later in items[i + 1 :] if later.sample]
        again = module.JsonLines(path, seed=5).stream(3, lane, item.place)
        assert list(islice((later.sample for later in again if later.sample), len(after))) == after


def test_lines_that_are_no_pairs_are_refused(lines, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"image": "0.png"}\n')
    with pytest.raises(ValueError, match=r"--train-data .*bad\.jsonl: not lines of image and text \(KeyError"):
        lines[0].JsonLines(str(tmp_path / "bad.jsonl"), seed=0)
