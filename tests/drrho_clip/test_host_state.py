"""Rows in host memory, fetched ahead and written behind: a step sees what a table written at once would give."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch

from drrho_clip import collectives
from drrho_clip.sample_state import SampleState, StateUpdate
from drrho_clip.state.fixed_point import FixedPoint
from drrho_clip.state.host_state import HostSampleState
from tests.support.ranks import ranks
from tests.support.stepping import CPU, build, make_batch, make_loss, make_task
from training.data.loader import prefetch
from training.loop.step import Stepper
from training.loop.task import Selection

N, COLUMNS, STEPS = 23, ("log_u_image", "tau_image"), 40
CODES = {"log_u_image": FixedPoint.of_bound(1e-3, -33, 89)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0, equal_nan=True)


def random_steps(seed: int, behind: int, ahead: int, chosen: bool, codes) -> int:
    """Random steps with many repeated rows; ``ahead`` batches are announced. Returns how many rows were seen."""
    k, r, b = collectives.world_size(), collectives.rank(), 4
    random = torch.Generator().manual_seed(seed)
    host, plain = HostSampleState(N, COLUMNS, "cpu", codes, behind), SampleState(N, COLUMNS, codes=codes)
    # Half of the rows are among three, so that nearly every step meets rows of the steps before it.
    drawn = torch.randint(N - 4, (STEPS, k * b), generator=random)
    drawn = torch.where(torch.rand(drawn.shape, generator=random) < 0.5, drawn % 3, drawn)
    own = [row[r * b : (r + 1) * b].clone() for row in drawn]
    for step in range(ahead):
        host.announce(own[step])
    for step, index in enumerate(own):
        if ahead and step + ahead < STEPS:
            host.announce(own[step + ahead])
        if chosen:
            for state in (host, plain):
                state.choose_from(index)
            index = index[torch.randperm(b, generator=random)[: b // 2]]
        if step % 7 == 3:
            host.fetch(index)  # a pass whose result is dropped, as before the first step
            if chosen:
                host.choose_from(own[step])
        (everywhere, found), (same_rows, expected) = host.fetch(index), plain.fetch(index)
        assert torch.equal(everywhere, same_rows)
        same(found, expected)
        table = 10 * torch.randn(len(COLUMNS), N, generator=random)
        new = {name: found[name].nan_to_num(1.0) / 2 + table[i, everywhere] for i, name in enumerate(COLUMNS)}
        taken = None if step % 3 else torch.tensor(bool(step % 2))
        for state in (host, plain):
            state.commit(StateUpdate(everywhere, new), taken)
        if step % 11 == 5:
            same(host.state_dict() if k == 1 else host.values(), plain.state_dict() if k == 1 else plain.values())
        if step == 25:
            for state in (host, plain):
                state.load_state_dict(state.sharded({n: c.clone() for n, c in state.local().items()}))
    same(host.values(), plain.values())
    return int((~plain.values()["tau_image"].isnan()).sum())


HOW = [(0, 1, False), (1, 0, False), (2, 1, False), (3, 3, False), (2, 1, True)]


@pytest.mark.parametrize(
    ("k", "behind", "ahead", "chosen"), [*((k, *how) for k in (1, 2) for how in HOW), (4, 2, 1, False)]
)
def test_every_step_sees_what_a_table_written_at_once_would_give(k, behind, ahead, chosen):
    run = ranks(k).run if k > 1 else lambda f, *a: [f(*a)]
    for seed, codes in enumerate(({}, CODES)):
        seen = run(random_steps, seed, behind, ahead, chosen, codes)
        assert N // 2 < sum(seen) <= N - 4


def test_rows_that_were_announced_and_never_used_do_no_harm():
    host, plain = HostSampleState(N, COLUMNS, "cpu"), SampleState(N, COLUMNS)
    for index in (torch.tensor([1, 2, 3]), torch.tensor([3, 4, 1])):
        host.announce(torch.tensor([1, 2, 3]))  # as at the end of a run inside an epoch
        host.announce(index)
        for _ in range(2):
            (everywhere, found), (_, expected) = host.fetch(index), plain.fetch(index)
            same(found, expected)
            new = {name: everywhere + 0.5 + found[name].nan_to_num(0.0) for name in COLUMNS}
            for state in (host, plain):
                state.commit(StateUpdate(everywhere, new))
    same(host.state_dict(), plain.state_dict())


def test_a_row_outside_is_told_and_one_that_was_not_announced_gives_no_finite_value():
    host = HostSampleState(N, COLUMNS, "cpu")
    host.announce(bad := torch.tensor([3, N]))
    with pytest.raises(IndexError, match=rf"index {N} is outside"):
        host.fetch(bad)
    with pytest.raises(IndexError, match=rf"index {N} is outside"):
        host.choose_from(bad)
    host.choose_from(torch.tensor([1, 2, 3]))
    _, found = host.fetch(torch.tensor([2, 5]))
    assert found["tau_image"].isnan().tolist() == [True, False] and found["tau_image"][1] == math.inf


def trained(kind, name: str, accum: int, selection: Selection | None) -> dict[str, torch.Tensor]:
    """Weights and rows after steps on batches with rows in common, one of them not finite."""
    loss = make_loss(name, kind=kind)
    model = build(name)
    task = make_task(model, loss, name, **({"selection": selection} if selection else {}))
    task.model.train()
    loss.set_epoch(1)
    stepper = Stepper(task, torch.optim.SGD(model.parameters(), lr=0.1), accum=accum)
    k, r = collectives.world_size(), collectives.rank()
    batches = [make_batch(12, seed=seed) for seed in range(6)]
    batches = [batch.chunk(k)[r] for batch in batches]
    for step, batch in enumerate(prefetch(batches, CPU, loss.state.announce)):
        if step == 0:
            task.prepare(batch.index, None)  # a pass that is dropped, as ``Stepper.settle``'s are
        saved = copy.deepcopy(model.state_dict())
        if step == 3:
            with torch.no_grad():
                model.visual.proj.fill_(torch.nan)
        stepper(batch, step)
        if step == 3:
            model.load_state_dict(saved)
    return {**model.state_dict(), **loss.state.values()}


@pytest.mark.parametrize(
    ("name", "accum", "selection"),
    [("fastclip", 1, None), ("fastclip_individual", 3, None), ("drrho", 2, Selection(0.5, 1, topk=False))],
)
def test_losses_train_bit_for_bit_as_with_rows_beside_the_model(name, accum, selection):
    found = trained(HostSampleState, name, accum, selection)
    same(found, trained(SampleState, name, accum, selection))
    seen = ~found["log_u_text"].isnan()
    assert 0 < seen.sum() < 64


def test_two_ranks_train_bit_for_bit_too():
    run = partial(ranks(2).run, trained)
    for found, expected in zip(run(HostSampleState, "fastclip", 1, None), run(SampleState, "fastclip", 1, None)):
        same(found, expected)
