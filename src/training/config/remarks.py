"""Remarks: what the user should know although the run is not refused.

They are about flags that have no effect in this combination, and about pitfalls. Each group lists the conditions
under which its flags are idle; this module defines the form of these entries and collects those that hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from drrho_clip.losses.registry import LossSpec
from training.config.flags import ALL
from training.config.given import Given


@dataclass(frozen=True)
class Setting:
    """What remarks depend on. ``kinds``: the types of training and validation data."""

    given: Given
    loss: LossSpec
    temperature_scheme: str
    usage: frozenset[str]
    kinds: frozenset[str]
    report_to: frozenset[str]
    trains: bool
    writes_cache: bool


class Idle(NamedTuple):
    """``flags`` have no effect in a training run for which ``when`` holds; ``why`` completes "no effect ..."."""

    flags: tuple[str, ...]
    when: Callable[[Setting], bool]
    why: str


class Pitfall(NamedTuple):
    """``sentence`` is logged where ``when`` holds."""

    when: Callable[[Setting], bool]
    sentence: str


def collect(setting: Setting, idle: Iterable[Idle], pitfalls: Iterable[Pitfall]) -> tuple[str, ...]:
    """One sentence per reason, and per pitfall. A flag is named once, with the first reason that holds."""
    reasons: dict[str, list[str]] = {}
    named: set[str] = set()
    for remark in idle if setting.trains else ():
        flags = [key for key in remark.flags if setting.given.chose(key) and key not in named]
        if flags and remark.when(setting):
            named.update(flags)
            reasons.setdefault(remark.why, []).extend(ALL[key].name for key in flags)
    found = (f"{', '.join(names)}: no effect {why}" for why, names in reasons.items())
    return (*found, *(pitfall.sentence for pitfall in pitfalls if pitfall.when(setting)))
