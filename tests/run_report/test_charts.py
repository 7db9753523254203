"""Long lines are drawn with fewer points, and nothing of what matters is lost."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from training.run_report.charts import Chart, Series, _running_mean, draw, png, thinned


def test_few_points_stay_as_they_are():
    assert thinned([1, 2, 3], [4, 5, 6]) == ([1, 2, 3], [4, 5, 6])


def test_peaks_and_ends_of_long_lines_stay():
    y = np.random.default_rng(0).normal(size=50_001)
    y[31_234], y[7] = 40, -40
    x, kept = thinned(range(len(y)), y.tolist(), 400)
    assert 200 < len(x) <= 402 and x == sorted(x)
    assert (x[0], x[-1]) == (0, 50_000)
    assert 31_234 in x and 7 in x
    assert kept == [y[i] for i in x]


def test_running_mean_is_of_the_neighbours():
    y = np.random.default_rng(1).normal(size=300).tolist()
    slow = [np.mean(y[max(i - 5, 0) : i + 6]) for i in range(300)]
    assert _running_mean(y) == pytest.approx(slow)


def test_a_drawing_has_its_own_names_and_the_pages_colours():
    chart = Chart("loss", "Loss <of> all", "", [Series(f"run {i}", [0, 1], [i, 2], run=i) for i in range(8)])
    svg = draw(chart).svg
    assert svg.startswith("<svg viewBox=") and 'width="' not in svg[: svg.index(">")]
    assert {f"var(--s{i})" for i in range(6)} <= set(re.findall(r"var\(--s\d\)", svg))  # colours begin again
    assert not re.search(r"#0[123]01", svg)
    assert all(name.startswith("loss-") for name in re.findall(r'\bid="([^"]*)"', svg))
    assert {name[5:] for name in re.findall(r"url\(#([^)]*)\)", svg)} <= {
        name[5:] for name in re.findall(r'\bid="([^"]*)"', svg)
    }
    assert png(chart).startswith(b"\x89PNG")


def test_the_frame_is_where_the_axes_are():
    """The cursor of the page follows from it: a line from end to end of x begins and ends there."""
    drawing = draw(Chart("a", "A", "", [Series("run", [0.0, 10.0], [0.0, 1.0])]))
    left, right, top, bottom = drawing.frame
    low, high = drawing.limits
    paths = re.findall(
        r'<path d="M ([\d.]+) ([\d.]+) \nL ([\d.]+) ([\d.]+) \n"[^>]*style="[^"]*var\(--s0\)', drawing.svg
    )
    ((x0, y0, x1, y1),) = [tuple(map(float, path)) for path in paths]
    assert x0 == pytest.approx(left + (right - left) * (0 - low) / (high - low), abs=0.01)
    assert x1 == pytest.approx(left + (right - left) * (10 - low) / (high - low), abs=0.01)
    assert top < y1 < y0 < bottom


@pytest.mark.parametrize("name", ["$lr_$x", "was $20.00 & now $15.00", r"\$a$", "_first", "$", "__"])
def test_names_are_drawn_as_they_are(name):
    """Whatever a formula would be of them, and although matplotlib leaves out what begins with an underscore."""
    chart = Chart("loss", f"Loss of {name}", "$a$", [Series(each, [0, 1], [1, 2]) for each in (name, "other")])
    texts = [html.unescape(text) for text in re.findall(r"<text [^>]*>([^<]*)</text>", draw(chart).svg)]
    assert texts[-2:] == [name, "other"]
    assert png(chart).startswith(b"\x89PNG")


def test_a_key_cannot_leave_its_place_in_the_page():
    """It is a number in no regular expression, and the end of no attribute."""
    for key in ('q"><svg onload=document.title=1>', r"\1\g<2>"):
        tags = []
        reader = HTMLParser()
        reader.handle_starttag = lambda tag, given, tags=tags: tags.append((tag, dict(given)))
        reader.feed(draw(Chart(key, "A", "", [Series("run", [0, 1], [0, 1])])).svg)
        assert not any("onload" in given for _, given in tags)
        names = [given["id"] for _, given in tags if "id" in given]
        assert names and all(name.startswith(f"{key}-") for name in names)
