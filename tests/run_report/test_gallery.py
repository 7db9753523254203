"""Pictures, confusion and retrieval on the page: the right pictures, the right marks, the right counts."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from tests.support.kept import classes, retrieval, run
from training.evaluation.benchmark.sets import read_picture
from training.run_report.page import gallery
from training.run_report.page.metrics import changes
from training.run_report.pictures import Thumbnails, thumbnail
from training.run_report.summary import summary

LABELS = [0, 0, 1, 1, 2, 2]
BEFORE = [[0, 1, 2], [1, 0, 2], [1, 0, 2], [1, 2, 0], [0, 2, 1], [0, 2, 1]]
AFTER = [[0, 1, 2], [0, 1, 2], [1, 0, 2], [0, 2, 1], [2, 0, 1], [0, 2, 1]]
NAMES = ["ant", "<bee>", "cat"]


def colour(i):
    return (40 * i, 255 - 40 * i, 7)


@pytest.fixture
def places(tmp_path):
    """Six pictures of one colour each."""
    for i in range(6):
        Image.new("RGB", (20, 10), colour(i)).save(tmp_path / f"{i}.png")
    return [("file", str(tmp_path / f"{i}.png"), 0, -1) for i in range(6)]


@pytest.fixture
def runs(places):
    pairs = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.3], [0.6, 0.7, 0.1]])
    captions = ["a dog", "a <b>", "a cow"]
    kept = [classes(LABELS, top, names=NAMES, places=places) for top in (BEFORE, AFTER)]
    found = [retrieval(s, captions, places, top=2) for s in (pairs, pairs + 2 * np.eye(3))]
    return [run("first", kept[0], found[0]), run("second", kept[1], found[1])]


class Page(HTMLParser):
    """Items of the lists of pictures: the numbers of their colours, and their text."""

    def __init__(self, text):
        super().__init__()
        self.items, self.headings, self.depth = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "img":
            pixels = Image.open(io.BytesIO(base64.b64decode(given["src"].partition(",")[2]))).getpixel((0, 0))
            self.handle_data(f"[{[colour(i) for i in range(6)].index(pixels)}]")
        if tag == "h4":
            self.headings.append("")
            self.items.append([])
        if tag == "ul":
            self.depth = 0
        if tag == "li":
            self.depth += 1
            if self.depth == 1:
                self.items[-1].append("")

    def handle_endtag(self, tag):
        if tag == "li":
            self.depth -= 1

    def handle_data(self, data):
        if self.depth:
            self.items[-1][-1] += f"{data} "
        elif self.headings and not self.headings[-1]:
            self.headings[-1] = data


def test_each_picture_stands_with_its_class_and_what_is_said_of_it(runs):
    page = Page(gallery.classes(runs, Thumbnails(read_picture)))
    said = dict(zip(page.headings, page.items))
    (one, four) = said["second is right, first is wrong"]
    expected = "[1] ant first <bee> 50 % ant ✓ 50 % cat 50 % second ant ✓ 50 % <bee> 50 % cat 50 %"
    assert " ".join(one.split()) == expected
    assert four.startswith("[4] cat ")
    assert [item[:3] for item in said["first is right, second is wrong"]] == ["[3]"]
    assert [item[:3] for item in said["Drawn evenly from the set"]] == [f"[{i}]" for i in range(6)]
    assert [item[:3] for item in said["Surest mistakes"]] == ["[5]"]
    assert "<bee>" not in gallery.classes(runs, Thumbnails(read_picture))


def test_the_matrix_has_all_pictures_and_the_pairs_their_counts(runs):
    text = gallery.confusion(runs, Thumbnails(read_picture))
    first, second = re.findall(r"<table><caption>\w+: rows are classes.*?</table>", text)
    for table, top in ((first, BEFORE), (second, AFTER)):
        counts = np.zeros((3, 3), int)
        np.add.at(counts, (LABELS, np.array(top)[:, 0]), 1)
        cells = [int(cell or 0) for cell in re.findall(r'<td class="(?:right|wrong)"[^>]*>(\d*)</td>', table)]
        assert cells == counts.flatten().tolist()
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", text[text.index("most frequent") :])
    cells = [re.sub(r"<[^>]+>", "|", row).strip("|") for row in rows]
    assert [re.sub(r"\|+", " | ", row) for row in cells] == [
        "cat | ant | 2 of 2 | 1 of 2",
        "ant | &lt;bee&gt; | 1 of 2 | 0 of 2",
        "&lt;bee&gt; | ant | 0 of 2 | 1 of 2",
    ]


def test_retrieval_shows_the_first_ones_and_the_right_one_behind_them(runs):
    page = Page(gallery.retrieval(runs, Thumbnails(read_picture)))
    said = {title: [" ".join(item.split()) for item in items] for title, items in zip(page.headings, page.items)}
    assert said["Which picture has this caption?"] == [
        "a dog first [0] ✓ [1] second [0] ✓ [1]",
        "a <b> first [2] [0] [1] ✓ rank 3 second [1] ✓ [2]",
        "a cow first [1] [0] [2] ✓ rank 3 second [2] ✓ [1]",
    ]
    assert (
        said["Which caption has this picture?"][1] == "[1] first a dog a cow a <b> ✓ rank 3 second a <b> ✓ a dog"
    )


def test_what_changed_is_counted(runs):
    text = re.sub(r"<[^>]+>", " ", changes(runs))
    assert re.search(r"The set\s+class\s+second\s+\+16\.7 .* 2 of 6\s+1 of 6", text)
    assert re.search(r"Pairs\s+picture of a caption\s+second\s+\+66\.7", text)
    assert changes(runs[:1]) == ""


def test_pictures_that_are_gone_are_told(runs, tmp_path):
    for file in tmp_path.glob("*.png"):
        file.unlink()
    pictures = Thumbnails(read_picture)
    text = gallery.classes(runs, pictures)
    assert "<img" not in text and "ant" in text
    assert pictures.remark.startswith("6 pictures could not be opened; they are looked for where they were")
    assert gallery.glance(runs, pictures) == ""
    assert summary(runs, [], pictures).startswith(b"\x89PNG")


def test_no_more_pictures_are_read_than_said(places):
    asked = []

    def read(place):
        asked.append(place)
        return read_picture(place)

    pictures = Thumbnails(read, most=3)
    assert [bool(pictures.small(place)) for place in [*places, places[0]]] == [True] * 3 + [False] * 3 + [True]
    assert asked == places[:3]
    assert pictures.remark == "3 pictures were not looked for because of the limit of 3"
    hurried = Thumbnails(read_picture, seconds=1e-9)
    assert [bool(hurried.small(place)) for place in places[:3]] == [True, False, False]
    assert hurried.remark == "2 pictures were not looked for because of --seconds"


def test_another_page_reads_only_what_is_new(places):
    asked = []
    pictures = Thumbnails(lambda place: asked.append(place) or read_picture(place), most=2)
    for some in (places[:2], places[1:3], places[:1]):
        pictures.begin()
        assert all(pictures.small(place) for place in some) and not pictures.remark
    assert asked == [*places[:3], places[0]]
    assert thumbnail(b"no picture", 10) == b""


def test_the_summary_is_a_picture_of_all_parts(runs):
    """Taller than that of one run without pictures."""
    tall = Image.open(io.BytesIO(summary(runs, [], Thumbnails(read_picture))))
    low = Image.open(io.BytesIO(summary([run("alone")], [], Thumbnails(read_picture))))
    assert tall.width == low.width and tall.height > 3 * low.height
    red, green, blue = (np.asarray(tall.convert("RGB")).reshape(-1, 3) == colour(4)).T
    assert (red & green & blue).sum() > 500  # the picture that only the second run has right


def test_captions_and_classes_are_drawn_as_they_are(places, monkeypatch):
    """Whatever a formula would be of them; what is drawn is what matplotlib is given and does not parse."""
    captions = ["was $20, now 50% off at $10", "was $20.00 & now $15.00", "$x_$y"]
    names = ["$a_$b", "_bee", "$cat$"]
    pairs = np.array([[0.9, 0.5, 0.1], [0.8, 0.2, 0.3], [0.6, 0.7, 0.1]])
    found = run("_$r_$un", classes(LABELS, BEFORE, names=names, places=places), retrieval(pairs, captions, places))
    drawn = set()
    prepared = Text._preprocess_math

    def noted(self, text):
        drawn.add(" ".join(self.get_text().split()))
        given = prepared(self, text)
        assert given == (text, False)
        return given

    monkeypatch.setattr(Text, "_preprocess_math", noted)
    assert summary([found], [], Thumbnails(read_picture)).startswith(b"\x89PNG")
    assert {"$a_$b", "_$r_$un"} <= drawn and drawn & set(captions)
