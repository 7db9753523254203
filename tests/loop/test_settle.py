"""A run that is started again sums its gradients over the ranks as if it had never stopped."""

import copy

import pytest
import torch

from drrho_clip import collectives
from drrho_clip.batch import Batch
from tests.support import tiny_models
from tests.support.ranks import ranks
from tests.support.stepping import CPU, OPTIM, make_batch, make_loss, make_task
from training.distributed import ddp
from training.distributed.process_group import World
from training.loop.optimizer import create_optimizer
from training.loop.step import Stepper


def own_batch(step: int) -> Batch:
    k, r = collectives.world_size(), collectives.rank()
    return make_batch(4 * k, seed=step).select(torch.arange(4) + 4 * r)


class Process:
    """Model, loss and stepper as a process builds them at its start, with the contents of a checkpoint."""

    def __init__(
        self,
        kind: str,
        accum: int = 1,
        static_graph: bool = False,
        compression: str = "none",
        saved: tuple[dict, dict, dict] | None = None,
    ) -> None:
        k, r = collectives.world_size(), collectives.rank()
        self.model = tiny_models.build(kind, text_cfg={"vocab_size": 8192})  # 2 MB: more than DDP's first bucket
        self.loss = make_loss("drrho")
        self.loss.set_epoch(1)
        world = World(r, r, k, k, CPU)
        wrapped = ddp.wrap(self.model, world, static_graph=static_graph, sync_bn=False, compression=compression)
        optimizer = create_optimizer(self.model, OPTIM, CPU)
        if saved is not None:
            self.model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            self.loss.state.load_state_dict(saved[2])
        self.stepper = Stepper(make_task(self.model, self.loss, "drrho", wrapped=wrapped), optimizer, accum=accum)
        wrapped.train()

    def train(self, steps: range, settle: bool) -> list[float]:
        if settle:
            self.stepper.settle(own_batch(steps[0]), steps[0])
        return [self.stepper(own_batch(step), step)["loss"].item() for step in steps]

    def saved(self) -> tuple[dict, dict, dict]:
        return copy.deepcopy(
            (self.model.state_dict(), self.stepper.optimizer.state_dict(), self.loss.state.state_dict())
        )


def _interrupted(settle: bool, *process) -> bool:
    whole = Process(*process)
    losses = whole.train(range(6), settle)
    first = Process(*process)
    begun = first.train(range(3), settle)
    second = Process(*process, saved=first.saved())
    same = begun + second.train(range(3, 6), settle) == losses
    theirs = dict(whole.model.state_dict())
    return same and all(torch.equal(v, theirs[n]) for n, v in second.model.state_dict().items())


PROCESSES = [
    ("tiny-vit", 1),
    ("tiny-vit", 2),
    ("tiny-vit", 1, True),
    ("tiny-vit", 2, False, "bf16"),
    ("tiny-resnet", 1),
]


NAMES = ["plain", "accumulation", "static-graph", "compressed", "batchnorm"]


@pytest.mark.parametrize("process", PROCESSES, ids=NAMES)
def test_three_ranks_that_start_again_train_on_bit_for_bit(process):
    assert ranks(3).run(_interrupted, True, *process) == [True] * 3


def test_without_settling_they_do_not():
    """Otherwise the test above could not fail."""
    assert ranks(3).run(_interrupted, False, "tiny-vit") == [False] * 3


def _settled_only(kind: str) -> list[str]:
    process = Process(kind)
    before = process.saved()
    process.stepper.settle(own_batch(0), 0)
    after = process.saved()
    moved = [n for n, v in before[0].items() if not torch.equal(v, after[0][n])]
    moved += [n for n, p in process.model.named_parameters() if p.grad is not None]
    moved += list(after[1]["state"])
    moved += [n for n, v in after[2].items() if not v.to_local().isnan().all()]
    return moved + (["skipped"] if process.stepper.skipped.read() != (0, 0) else [])


def test_settling_changes_nothing():
    assert ranks(3).run(_settled_only, "tiny-resnet") == [[]] * 3
