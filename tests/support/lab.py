"""Small data and models for commands, and the runs of these commands, each made when it is first asked for."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from drrho_clip.batch import Batch
from tests.support import evalsets, shards, tiny_models
from training.distributed.process_group import World
from training.loop.task import Task
from training.main import main

CPU = torch.device("cpu")
WORLD = World(0, 0, 1, 1, CPU)
OTHER_NODE = World(1, 0, 2, 1, CPU)
TEXT = {"width": 16, "heads": 1}  # small enough that a run takes a fraction of a second


@dataclass
class Lab:
    """A folder with everything that the commands of the table need, made when it is first needed."""

    root: Path
    runs: dict[tuple[str, ...], Run] = field(default_factory=dict)
    numbers: Iterator[int] = field(default_factory=itertools.count)

    def path(self, name: str) -> str:
        """The file called ``name``; each has a method of its own below."""
        return str(getattr(self, name))

    @cached_property
    def vit(self) -> str:
        return tiny_models.path("tiny-vit", self.root, text_cfg=TEXT)

    @cached_property
    def resnet(self) -> str:
        return tiny_models.path("tiny-resnet", self.root, text_cfg=TEXT)

    @cached_property
    def coca(self) -> str:
        return tiny_models.path("tiny-coca", self.root)

    @cached_property
    def reference(self) -> str:
        return tiny_models.path("tiny-vit-reference", self.root)

    @cached_property
    def weights(self) -> str:
        return self._weights("tiny-vit", "weights.pt", text_cfg=TEXT)

    @cached_property
    def reference_weights(self) -> str:
        return self._weights("tiny-vit-reference", "reference.pt")

    @cached_property
    def other_reference_weights(self) -> str:
        return self._weights("tiny-vit-reference", "other.pt", seed=1)

    @cached_property
    def coca_weights(self) -> str:
        return self._weights("tiny-coca", "coca.pt")

    @cached_property
    def other_coca_weights(self) -> str:
        return self._weights("tiny-coca", "other_coca.pt", seed=1)

    def _weights(self, name: str, file: str, seed: int = 0, **changes: Any) -> str:
        torch.save(tiny_models.build(name, seed=seed, **changes).state_dict(), self.root / file)
        return str(self.root / file)

    @cached_property
    def shards(self) -> str:
        return shards.write_shards(self.root / "shards", 16, per_shard=4)

    @cached_property
    def other_shards(self) -> str:
        samples = [shards.sample(i) for i in range(40, 48)]
        return shards.write_shards(self.root / "other", samples, per_shard=4)

    @cached_property
    def spoiled(self) -> str:
        """Shards with one sample that has no caption."""
        samples = [shards.sample(i) for i in range(4)]
        del samples[1]["txt"]
        return shards.write_shards(self.root / "spoiled", samples, per_shard=2)

    @cached_property
    def full_shards(self) -> str:
        """Every sample has two pictures, two captions and two numbers."""
        samples = [shards.sample(i) for i in range(4)]
        for i, sample in enumerate(samples):
            sample["other.jpg"] = shards.encode(shards.picture(20 + i))
            sample["json"] |= {"caption": f"another caption of {i}", "id": 30 + i}
        return shards.write_shards(self.root / "full", samples, per_shard=2)

    @cached_property
    def reinforced(self) -> str:
        """Shards in DataCompDR's layout: one view and one synthetic caption of each sample, embeddings of 8."""
        samples = [shards.sample(i) for i in range(4)]
        for i, sample in enumerate(samples):
            file, numbers = io.BytesIO(), np.random.default_rng(i).standard_normal((3, 8), np.float32)
            np.savez(file, image_emb=numbers[:1], text_emb=numbers[1:])
            sample |= {"npz": file.getvalue(), "syn.json": {"syn_text": [f"synthetic {i}"]}}
            sample["paug.json"] = {"param_aug": [[[1, 2, 30, 20 + i], [[6, 0.3], [1, 0.3]]]]}
        return shards.write_shards(self.root / "reinforced", samples, per_shard=2)

    @cached_property
    def csv(self) -> str:
        return shards.write_csv(self.root / "csv", 4)

    @cached_property
    def wide_csv(self) -> str:
        """Tabs between columns, and all columns twice: the second picture and caption are another row's."""
        rows = Path(self.csv).read_text().splitlines()
        header, rows = rows[0].split("\t"), [row.split("\t") for row in rows[1:]]
        wide = [[*header, "other_path", "other_title"], *([*a, *b] for a, b in zip(rows, rows[1:] + rows[:1]))]
        return self._write("wide.csv", "\n".join("\t".join(row) for row in wide))

    @cached_property
    def comma_csv(self) -> str:
        return self._write("comma.csv", Path(self.csv).read_text().replace("\t", ","))

    @cached_property
    def quoted_csv(self) -> str:
        """Captions between quote signs."""
        header, *rows = Path(self.csv).read_text().splitlines()
        return self._write(
            "quoted.csv", "\n".join([header, *('{}\t"{}"'.format(*row.split("\t")) for row in rows)])
        )

    @cached_property
    def latin_csv(self) -> str:
        """Captions that end in a letter which is é in latin-1 and Cyrillic in cp1251."""
        header, *rows = Path(self.csv).read_bytes().splitlines()
        (self.root / "latin.csv").write_bytes(b"\n".join([header, *(row + b" \xe9" for row in rows)]))
        return str(self.root / "latin.csv")

    @cached_property
    def pictures(self) -> str:
        """Three classes of two pictures, and one short prompt."""
        for i in range(6):
            file = self.root / "pictures" / f"class_{i // 2}" / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            shards.picture(i).save(file)
        (self.root / "pictures/zeroshot_classification_templates.txt").write_text("a {c}\n")
        return str(self.root / "pictures")

    @cached_property
    def benchmark(self) -> str:
        """Two sets of the DataComp benchmark, of two pictures each."""
        for name in ("wds_cifar10_test", "wds_mnist_test"):
            evalsets.write_classification(self.root / "benchmark" / name, [0, 1], ["waves", "rings"])
        return str(self.root / "benchmark")

    @cached_property
    def features(self) -> str:
        """The reference's features of the sixteen samples."""
        line = "--ref_model @reference --ref_model_pretrained @reference_weights --cache_ref_model_features"
        folder = self.root / "features"
        assert main([*self.words(line), "--cached_ref_features_dir", str(folder), "--name", "features"]) == 0
        return str(folder)

    @cached_property
    def captions(self) -> str:
        """Three captions of each of the sixteen samples, by a CoCa that knows nothing."""
        line = "--cap_model @coca --cap_model_pretrained @coca_weights --cache_syn_texts --num_syn_texts 3"
        folder = self.root / "captions"
        assert main([*self.words(line), "--cached_syn_texts_dir", str(folder), "--name", "captions"]) == 0
        return str(folder)

    @cached_property
    def published_features(self) -> str:
        """Files in the published layout, four rows in each; row r holds multiples of r + 1."""
        folder = self.root / "published_features"
        folder.mkdir()
        for number in range(4):
            rows = torch.arange(4 * number, 4 * number + 4)
            torch.save((rows[:, None, None] + 1) * torch.ones(4, 2, 3), folder / f"{number:08d}.pt")
        return str(folder)

    @property
    def elsewhere(self) -> str:
        return str(self.root / "elsewhere")

    @cached_property
    def settings(self) -> str:
        return self._write("settings.yaml", "lr: 0.125\nskip_scheduler: true\n")

    @cached_property
    def checkpoint(self) -> str:
        return str(self.run(self.words("--epochs 1 --warmup 0")).folder / "checkpoints/epoch_1.pt")

    def _write(self, name: str, text: str) -> str:
        (self.root / name).write_text(text)
        return str(self.root / name)

    def words(self, line: str) -> list[str]:
        """A command on the lab's data, completed by ``line``; ``@name`` stands for the path of that file."""
        base = (
            "--train-data @shards --train-num-samples 4 --data_size 64 --model @vit --batch-size 2 --epochs 2 "
            f"--workers 0 --lr 1e-3 --warmup 0 --precision fp32 --logs {self.root / 'logs'}"
        )
        return [re.sub(r"@(\w+)", lambda name: self.path(name[1]), word) for word in f"{base} {line}".split()]

    def run(self, words: list[str]) -> Run:
        """``training.main`` on ``words``, once per command."""
        key = tuple(words)
        if key not in self.runs:
            name = f"run{next(self.numbers)}"
            seen: list[int] = []
            outputs = Task.outputs

            def watched(task: Task, batch: Batch) -> dict[str, Tensor]:
                seen.append(len(batch))
                return outputs(task, batch)

            with mock.patch.object(Task, "outputs", watched):
                code = main([*words, "--name", name])
            self.runs[key] = Run(code, Path(words[words.index("--logs") + 1]) / name, seen)
        return self.runs[key]


@dataclass(frozen=True)
class Run:
    """What a run left: its exit code, its folder, and the sizes of the batches that went through the model."""

    code: int
    folder: Path
    forwards: list[int]

    @cached_property
    def log(self) -> str:
        return (self.folder / "out.log").read_text()

    def logged(self, name: str) -> list[float]:
        """The values that the lines about training give for ``name``."""
        return [float(value) for value in re.findall(rf"{name}: ([-+.\de]+)", self.log)]

    @property
    def files(self) -> list[str]:
        """Everything in its folder, except what is inside TensorBoard's."""
        names = (str(file.relative_to(self.folder)) for file in self.folder.rglob("*"))
        return sorted(name for name in names if "/events" not in name and "__" not in name)

    @cached_property
    def saved(self) -> dict[str, Any]:
        return torch.load(sorted(self.folder.glob("checkpoints/epoch_*.pt"))[-1], weights_only=True)
