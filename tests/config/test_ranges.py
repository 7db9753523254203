"""Each flag by itself: refused ones, and the edges of every interval."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.commands import DATA, REFERENCE, config, refusal
from training.config.flags import ALL


@pytest.mark.parametrize("key", [key for key, flag in ALL.items() if flag.refused])
def test_published_flags_without_an_effect_are_refused_unless_at_their_default(key, capsys):
    flag = ALL[key]
    if flag.kind == "switch":
        other = flag.name
    else:
        other = f"{flag.name} {flag.default + 1 if flag.kind == 'int' else 'x'}"
        if flag.default is not None:
            assert config(f"{DATA} {flag.name} '{flag.default}'").trains
    sentence = refusal(f"{DATA} {other}", capsys)
    assert sentence == f"{other}: {flag.refused}"


# For every interval: values outside it, and a value on its edge that belongs to it.
EDGES = {
    "(0, inf)": (["0", "-1", "inf", "nan"], "0.5"),
    "[0, inf)": (["-1"], "0"),
    "[1, inf)": (["0", "-1"], "1"),
    "[0, 1)": (["1", "-0.5", "nan"], "0"),
    "(0, 1]": (["0", "1.5", "nan"], "1"),
    "[0, 1]": (["-0.5", "1.5", "nan"], "0"),
    "(-inf, inf)": (["nan", "inf"], "-1"),
    "[5e-5, 0.1]": (["1e-05", "0.2", "0", "nan"], "0.1"),
}
# Other flags that these need to be valid.
COMPANY = {
    "image_std": DATA,
    "temperature": DATA,
    "epochs": f"{DATA} --imagenet-val {Path(__file__).parent}",
    "ref_filter_n_chunks": DATA,
    "loss_weight": f"{DATA} {REFERENCE} --ref_features_usage distill",
}


@pytest.mark.parametrize("key", [key for key, flag in ALL.items() if flag.within])
def test_intervals(key, capsys):
    flag, interval = ALL[key], ALL[key].within
    outside, inside = EDGES[interval]
    inside = "1" if flag.kind == "int" and inside == "0.5" else inside
    line = COMPANY.get(key, DATA)
    for value in outside:
        if flag.kind == "int" and value in ("inf", "nan"):
            continue
        sentence = refusal(f"{line} {flag.name} {value}", capsys)
        assert sentence.startswith(f"{flag.name} {value}")
        assert f"must lie in {interval}" in sentence
    assert config(f"{line} {flag.name} {inside}").flags[key] is not None
