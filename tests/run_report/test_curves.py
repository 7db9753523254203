"""Which curves a report shows: those of what the loss of the run uses."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from drrho_clip.losses import registry
from drrho_clip.losses.interface import Loss, LossInputs, LossOutput
from training import report as program
from training.run_report.curves import charts
from training.run_report.history import read_run

COMMON = "--log-every-n-steps 1 --gamma 0.5 --gamma_schedule cosine --gamma_decay_epochs 2"


class Alignment(Loss):
    """Pairs are to be similar; no temperature."""

    def forward(self, inputs: LossInputs) -> LossOutput:
        return LossOutput({"alignment": 1 - (inputs.image * inputs.text).sum(1).mean()})


def page_of(tmp_path: Path, *folders: Path) -> str:
    assert program.main([*map(str, folders), "--out", str(tmp_path / "page.html"), "--seconds", "0"]) == 0
    return (tmp_path / "page.html").read_text()


def drawn(page: str, chart: str) -> list[list[float]]:
    """The values of each line of a chart; empty: the page does not have it."""
    found = re.findall(rf'<figure id="{chart}">.*?<script type="application/json">(.*?)</script>', page, re.S)
    return [series["y"] for text in found for series in json.loads(text)["series"]]


def overview(page: str, name: str) -> list[str]:
    """The row called ``name`` of the first table; empty: there is none."""
    table = page[page.index('<section id="overview"') : page.index("</table>")]
    rows = [re.sub("<[^>]+>", "|", row) for row in re.findall("<tr>(.*?)</tr>", table, re.S)]
    cells = [[html.unescape(cell) for cell in row.split("|") if cell.strip()] for row in rows]
    return next((row[1:] for row in cells if row[0] == name), [])


def test_individual_temperatures_are_shown_by_their_mean_and_the_models_where_it_is_used(lab, tmp_path):
    individual = lab.run(
        lab.words(
            f"{COMMON} --fastclip --temperature_scheme individual_learnable --lr_tau 0.01 --temperature 0.05"
        )
    )
    common = lab.run(lab.words(f"{COMMON} --fastclip --lr_tau 0.01"))
    assert (individual.code, common.code) == (0, 0)
    own, shared = individual.logged("Mean_tau"), [1 / scale for scale in common.logged("Logit Scale")]
    assert len(set(own)) > 1 and len(own) == len(shared) == 4
    page = page_of(tmp_path, individual.folder, common.folder)
    assert drawn(page, "scale") == [pytest.approx(own, rel=1e-4), pytest.approx(shared, rel=1e-4)]
    values = [float(text) for text in overview(page, "Temperature τ")]
    assert values == pytest.approx([own[-1], shared[-1]], rel=1e-3)
    assert 'id="mean-tau"' not in page  # it is no loss


def test_a_loss_without_a_temperature_shows_none(lab, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
        registry.register(registry.LossSpec("alignment", lambda environment: Alignment(), temperature="none"))
        run = lab.run(lab.words(f"{COMMON} --loss alignment"))
        assert run.code == 0 and run.logged("Logit Scale")
        pages = [page_of(tmp_path, run.folder)]
        log = run.folder / "out.log"
        text = log.read_text()
        log.write_text(text.replace(", without a temperature", ""))  # as of earlier versions
        pages.append(page_of(tmp_path, run.folder))
        log.write_text(text)
    pages.append(page_of(tmp_path, run.folder))  # by a program that does not know this loss
    for page in pages:
        assert drawn(page, "loss") and overview(page, "Loss")
        assert drawn(page, "scale") == [] and overview(page, "Temperature τ") == []


@pytest.mark.parametrize(
    "flags, has_gamma",
    [
        ("--fastclip", True),
        ("--fastclip --temperature_scheme individual_learnable", True),
        ("--loss fastclip", True),
        ("--loss fastclip_individual", True),
        ("", False),
        ("--loss clip", False),
        ("--siglip", False),
    ],
)
def test_gamma_is_shown_where_the_loss_takes_it(lab, flags, has_gamma):
    run = lab.run(lab.words(f"{COMMON} {flags}"))
    assert run.code == 0
    lines = next((chart.series for chart in charts([read_run(run.folder)], []) if chart.key == "gamma"), [])
    # A cosine from 1 in the first epoch to --gamma after --gamma_decay_epochs, in steps of an epoch.
    expected = [([0, 1, 1, 2], pytest.approx([1, 1, 0.75, 0.75]))]
    assert [(line.x, line.y) for line in lines] == expected * has_gamma
