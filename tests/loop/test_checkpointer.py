"""When a run saves and stops: by steps, by the clock and by signals, at the same step on all ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from tests.support.ranks import ranks
from tests.support.small_runs import RUN
from training.distributed.signals import Agreement, Interrupts
from training.distributed.watchdog import Watchdog
from training.loop import checkpointer
from training.loop.checkpointer import Checkpointer


class Clock:
    """Replaces ``time`` in ``checkpointer``; the test sets it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def kept(
    rank: int, steps: int, *, signal_at: int | None = None, asks_after_epochs: bool = False, **flags
) -> tuple[list[str], int]:
    """The names that a run saves, and its last step. Each step takes a minute, and an epoch has 5 steps."""
    config, clock, names = replace(RUN, **flags), Clock(), []
    trainer = SimpleNamespace(step=0, finished=False, world=SimpleNamespace(is_main=rank == 0, world_size=1))
    trainer.data = SimpleNamespace(steps_per_epoch=5, state_dict=dict)
    trainer.meters, trainer.stepper = {}, SimpleNamespace(skipped=SimpleNamespace(state_dict=dict))
    state = SimpleNamespace(step=0, samples_seen=0, compression=None)
    saver = SimpleNamespace(save=lambda state, saved: names.extend(saved), due=lambda epoch: epoch % 2 == 0)
    interrupts = Interrupts()
    before, checkpointer.time = checkpointer.time, clock
    try:
        with Agreement() as agreement:
            watchdog = Watchdog(trainer.world, 0)
            keeping = Checkpointer(config, trainer, state, saver, interrupts, agreement, watchdog)
            for step in range(1, steps + 1):
                trainer.step, clock.now = step, 60.0 * step
                trainer.finished = step == steps
                if step == signal_at and rank == 1:
                    interrupts.wanted = "SIGUSR1"
                if keeping.after_step():
                    break
                if asks_after_epochs and step % 5 == 0:
                    assert not keeping.asked_to_stop()
    finally:
        checkpointer.time = before
    return names, trainer.step


def on_rank(*args, **kwargs) -> tuple[list[str], int]:
    return kept(dist.get_rank(), *args, **kwargs)


def test_steps_are_saved_unless_an_epoch_or_the_end_saves_anyway():
    names, last = kept(0, 12, save_every_n_steps=5)
    assert (names, last) == (["step_5"], 12)  # step 10 ends the second epoch, which --save-frequency saves
    assert kept(0, 12, save_every_n_steps=4)[0] == ["step_4", "step_8"]
    assert kept(0, 12)[0] == []


@pytest.mark.parametrize(
    ("minutes", "expected"), [(4, ["step_4", "step_8"]), (2.5, ["step_3", "step_6", "step_9"])]
)
def test_minutes_count_from_the_last_save(minutes, expected):
    assert kept(0, 10, save_every_minutes=minutes)[0] == expected


def test_ranks_save_by_the_clock_of_the_first_at_one_step_and_once():
    """A request after step 4 takes effect after step 5. One after step 9 coincides with an epoch's own save."""
    for names, _ in ranks(2).run(on_rank, 13, save_every_minutes=4):
        assert names == ["step_5"]


def test_a_save_that_is_due_when_an_epoch_ends_is_made_after_it():
    """The request after step 5 is lost in the question at the epoch's end; that after step 6 takes effect."""
    for names, _ in ranks(2).run(on_rank, 13, save_every_minutes=5, asks_after_epochs=True):
        assert names == ["step_7", "step_13"][: len(names)] and names


def test_a_signal_to_one_rank_stops_all_at_the_same_step():
    for names, last in ranks(2).run(on_rank, 12, signal_at=6):
        assert (names, last) == ([], 7)
