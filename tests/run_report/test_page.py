"""The page of real runs, in a real browser: curves are there, nothing is loaded, nothing fails, it fits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support import evalsets, shards
from training import report as program
from training.run_report.build import RunReport
from training.run_report.intervals import wilson
from training.run_report.server import open_server

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COMMON = (
    "--train-data @spoiled --train-num-samples 4 --data_size 8 --max_bad_fraction 0.9 --fastclip --gamma 0.5 "
    "--gamma_decay_epochs 2 --val-data @shards --log-every-n-steps 1 --report-to tensorboard"
)


N = 12  # pictures of each set


@pytest.fixture(scope="module")
def runs(lab) -> tuple[Path, Path]:
    sets = lab.root / "sets_of_the_report"
    evalsets.write_classification(sets / "wds_cifar10_test", [i % 4 for i in range(N)], shards.SHAPES[:4])
    pairs = [{"__key__": f"{i}", "jpg": evalsets.encoded(i, "jpg"), "txt": shards.caption(i)} for i in range(N)]
    evalsets.write_wds(sets / "wds_mine_test", pairs, kind="retrieval")
    line = f"{COMMON} --epochs 3 --imagenet-val @pictures --eval_data_dir {sets} --zeroshot-frequency 3"
    first = lab.run(lab.words(line))
    second = lab.run(lab.words(f"{line} --lr 0.05"))
    assert (first.code, second.code) == (0, 0)
    return first.folder, second.folder


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new/report.html"
    assert program.main([*map(str, runs), "--out", str(out)]) == 0
    return out


class Structure(HTMLParser):
    """Headings in order, labels of pictures, ids, and whatever would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if "id" in given:
            self.ids.append(given["id"])
        for name in ("src", "href", "xlink:href"):
            if name in given and not given[name].startswith(("#", "data:")):
                self.loaded.append(given[name])
        named = {"img": "alt", "input": "aria-label", "nav": "aria-label"}.get(tag)
        decorates = tag == "img" and given.get("alt") == ""
        if (named and not given.get(named) and not decorates) or (
            given.get("role") == "img" and not given.get("aria-label")
        ):
            self.unlabelled.append(tag)


def test_the_page_holds_all_it_needs_and_can_be_read_aloud(page):
    text = page.read_text()
    found = Structure(text)
    assert found.loaded == [] and "@import" not in text
    assert found.unlabelled == []
    # Pictures of classes stand before the names of these.
    assert text.count('alt=""') == text.count('<span class="class"><img')
    assert len(found.ids) == len(set(found.ids))
    assert found.headings[0] == 1 and found.headings.count(1) == 1
    assert all(after - before <= 1 for before, after in zip(found.headings, found.headings[1:]))
    assert 'lang="en"' in text and '<a class="skip" href="#main">' in text


def test_what_the_page_says(page, runs):
    text = page.read_text()
    for words in (
        "Loss", "Temperature τ", "Weight γ", "Learning rate", "Throughput", "Waiting for data", "Retrieval: R@1",
        "log u of images over time", "How log u of captions is spread", "Samples with the largest u",
        "missing text", "Flags that differ between the runs", "--lr", "process hours",
        "Pictures and their classes", "CIFAR-10", "Confusion of classes", "Which picture has this caption?",
        "Differences to run", "imagenet-zeroshot-val-top1", "mean_recall@1",
    ):  # fmt: skip
        assert words in text, words
    differing = text[text.index("Flags that differ") : text.index("All chosen flags")]
    assert set(re.findall(r">--(\w+)<", differing)) == {"lr", "lr_tau", "name"}
    (loss,) = re.findall(r'<figure id="loss">.*?<script type="application/json">(.*?)</script>', text, re.S)
    drawn = json.loads(loss)["series"]
    for series, folder in zip(drawn, runs):
        logged = re.findall(r" Loss: ([-\d.e]+)", (folder / "out.log").read_text())
        assert series["name"] == folder.name
        assert series["y"] == pytest.approx([float(value) for value in logged], rel=1e-4)


def test_models_whose_optimizers_have_other_defaults_differ(lab, tmp_path):
    folders = []
    for model in ("vit", "resnet"):
        run = lab.run(lab.words(f"--epochs 1 --model @{model}"))
        assert run.code == 0
        given = torch.load(run.folder / "checkpoints/epoch_1.pt", weights_only=True)["flags"]
        assert (given["beta2"], given["lr_tau"]) == ("None", "-1.0")  # what a resumed run compares with
        folders.append(run.folder)
    assert program.main([*map(str, folders), "--out", str(tmp_path / "page.html"), "--seconds", "0"]) == 0
    text = (tmp_path / "page.html").read_text()
    differing, chosen = text[text.index("Flags that differ") :].split("All chosen flags")
    rows = {
        name: re.findall("<td[^>]*>(.*?)</td>", row) for name, row in re.findall(r">--(\w+)<(.*?)</tr>", differing)
    }
    assert set(rows) == {"beta2", "eps", "model", "name"}
    assert [list(map(float, rows[key])) for key in ("beta2", "eps")] == [[0.98, 0.999], [1e-6, 1e-8]]
    assert "--lr<" in chosen and not re.search(r"--(lr_tau|beta1|beta2|eps)<", chosen)  # these are the defaults
    older = tmp_path / "older"  # params.txt of version 0.1 holds what was given
    older.mkdir()
    for name in ("out.log", "params.txt"):
        shutil.copy(folders[0] / name, older)
    text = (older / "params.txt").read_text()
    text = re.sub(r"(?m)^(beta1|beta2|eps): .*", r"\1: None", re.sub(r"(?m)^lr_tau: .*", "lr_tau: -1.0", text))
    assert text.count("None\n") >= 3
    (older / "params.txt").write_text(text)
    assert program.main([*map(str, (folders[0], older)), "--out", str(tmp_path / "2.html"), "--seconds", "0"]) == 0
    assert "All flags are equal." in (tmp_path / "2.html").read_text()


def test_metrics_have_intervals(page, runs):
    text = page.read_text()
    for folder in runs:
        lines = (folder / "eval_results/epoch_3_eval_results.jsonl").read_text().splitlines()
        line = next(found for found in map(json.loads, lines) if found["key"] == "cifar10")
        low, high = wilson(line["metrics"]["acc1"], N)
        assert f"({low:.3f} to {high:.3f})</small><br><small>acc1" in text
        last = json.loads((folder / "eval_results.jsonl").read_text().splitlines()[-1])
        low, high = wilson(last["imagenet-zeroshot-val-top1"], 6)
        assert f"({low:.3f} to {high:.3f})" in text[text.index("imagenet-zeroshot-val-top1") :]


def test_each_chart_is_a_picture_too(page):
    pictures = sorted(file.stem for file in (page.parent / "report_png").iterdir())
    assert pictures == sorted(["summary", *re.findall(r'<figure id="([^"]+)"', page.read_text())])
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in (page.parent / "report_png").iterdir())


def test_histograms_of_u_are_kept_each_epoch_and_are_those_of_the_checkpoint(runs):
    events = EventAccumulator(str(runs[0] / "tensorboard"), {"histograms": 0}).Reload()
    for column in ("log_u_image", "log_u_text"):
        kept = events.Histograms(f"sample_state/{column}")
        assert [event.step for event in kept] == [1, 2, 3]
        values = [event.histogram_value for event in kept]
        assert [value.num for value in values] == [3, 3, 3]  # one of four samples has no caption
        assert sum(values[-1].bucket) == 3
    found = RunReport(runs[:1]).read()[1][0]
    edges, counts = found.spread["log_u_text"]
    assert (edges[0], edges[-1]) == pytest.approx((values[-1].min, values[-1].max))
    assert sum(counts) == found.seen == 3


PROBE = """<script>
const faults = []; addEventListener("error", (event) => faults.push(event.message));
addEventListener("load", async () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  for (const image of document.images) image.loading = "eager";
  await Promise.all([...document.images].map((image) => image.decode().catch(() => faults.push("a picture"))));
  const slider = document.querySelector("#loss input"), before = slider.getAttribute("aria-valuetext");
  slider.value = 0; slider.dispatchEvent(new Event("input"));
  parent.document.body.dataset.probe = JSON.stringify({
    faults, pictures: document.images.length, viewport: innerWidth,
    small: [...document.querySelectorAll("button, summary, nav a")].filter((e) => e.tabIndex < 0).length,
    wide: document.documentElement.scrollWidth - innerWidth, before,
    after: slider.getAttribute("aria-valuetext"), ink: getComputedStyle(document.body).color,
    lines: [...document.querySelectorAll("figure svg")].map((svg) => [...svg.querySelectorAll("path")]
      .filter((path) => path.getAttribute("style")?.includes("var(--s") && path.getTotalLength() > 5).length),
  });
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [400, 900, 1600])
def test_in_a_browser(page, tmp_path, width):
    """All parts opened, in a frame: Chromium's windows have 500 pixels at least."""
    probed = page.read_text().replace("<head>", f"<head>{PROBE}", 1)
    frame = f'<iframe style="border: 0; width: {width}px; height: 900px" srcdoc="{html.escape(probed)}"></iframe>'
    (tmp_path / "frame.html").write_text(f'<!doctype html><body style="margin: 0">{frame}</body>')
    done = subprocess.run(
        [
            BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1700,1000", "--enable-logging=stderr", "--virtual-time-budget=3000",
            *(["--blink-settings=preferredColorScheme=0"] if width == 900 else []),
            "--dump-dom", (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    (held,) = re.findall(r'<body [^>]*data-probe="([^"]*)"', done.stdout)
    seen = json.loads(html.unescape(held))
    assert seen["faults"] == []
    assert seen["viewport"] == width and seen["wide"] <= 0
    assert seen["pictures"] > 60 and seen["small"] == 0
    assert all(lines >= 2 for lines in seen["lines"]) and len(seen["lines"]) > 10
    assert seen["before"] != seen["after"] and seen["after"].startswith("epochs ")


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_the_served_page_changes_with_the_run(runs, tmp_path):
    shutil.copytree(runs[0], tmp_path / "run")
    server = open_server(RunReport([tmp_path / "run"], seconds=0), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        address = f"http://127.0.0.1:{port}"
        code, first = get(address)
        signature = get(f"{address}/signature")[1]
        assert code == 200 and f'data-signature="{signature}"' in first and 'id="refresh"' in first
        assert get(f"{address}/signature")[1] == signature
        with (tmp_path / "run/out.log").open("a") as log:
            log.write("2026-01-02,10:00:00 | WARNING | something new\n")
        assert get(f"{address}/signature")[1] != signature
        assert "something new" in get(address)[1] and "something new" not in first
        assert get(f"{address}/../etc/passwd")[0] == 404
        assert get(address, Host="elsewhere.example")[0] == 403
        shutil.rmtree(tmp_path / "run")
        assert get(address)[0] == 503
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_wilsons_interval():
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263, and 0 of 20.
    assert wilson(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
