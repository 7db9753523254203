"""Ends the demo: prints its table, from the last evaluation of each run, and writes it to LOGS/table.md.

With the folders of several seeds (`scripts/demo/table.py logs/demo/seed_*`) figures are means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

RUNS = {"reference": "reference", "openclip": "OpenCLIP", "fastclip_v3": "FastCLIP-v3", "drrho_clip": "DRRho-CLIP"}
OTHERS, OURS = ("openclip", "fastclip_v3"), "drrho_clip"
ACCURACY, PICTURES = ("icons", "acc1"), ("icons", "num_samples")
COLUMNS = {
    ACCURACY: "zero-shot accuracy",
    ("icons", "acc5"): "right class among 5",
    ("retrieval", "mean_recall@1"): "retrieval R@1",
    ("retrieval", "mean_recall@5"): "retrieval R@5",
}
Measured = dict[tuple[str, str], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", type=Path, nargs="+", help="folder of the four runs of a seed")
    args = parser.parse_args()
    seeds = [{run: measured(logs / run) for run in RUNS} for logs in args.logs]
    text = "\n".join([*table(seeds), "", *verdicts(seeds)]) + "\n"
    if len(args.logs) == 1:
        (args.logs[0] / "table.md").write_text(text)
    print(text, end="")


def measured(run: Path) -> Measured:
    """What the run's last evaluation measured, from 0 to 1, and over how many pictures."""
    files = sorted(
        run.glob("eval_results/epoch_*_eval_results.jsonl"), key=lambda path: int(path.name.split("_")[1])
    )
    if not files:
        raise SystemExit(f"{run}: has no eval_results/epoch_N_eval_results.jsonl; run scripts/demo.sh")
    lines = [json.loads(line) for line in files[-1].read_text().splitlines()]
    metrics = {(line["key"], name): value for line in lines for name, value in line["metrics"].items()}
    pictures = next(line["num_samples"] for line in lines if line["key"] == ACCURACY[0])
    for k in (1, 5):  # of texts for an image and of images for a text
        both = [metrics["retrieval", f"{kind}_retrieval_recall@{k}"] for kind in ("image", "text")]
        metrics["retrieval", f"mean_recall@{k}"] = statistics.mean(both)
    return {PICTURES: pictures, **{column: metrics[column] for column in COLUMNS}}


def table(seeds: Sequence[dict[str, Measured]]) -> list[str]:
    """Means over the seeds in Markdown, in percent."""
    cells = [["", *COLUMNS.values()]]
    for run, title in RUNS.items():
        means = [statistics.mean(seed[run][column] for seed in seeds) for column in COLUMNS]
        cells.append([title, *(f"{100 * mean:.1f}" for mean in means)])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def verdicts(seeds: Sequence[dict[str, Measured]]) -> list[str]:
    """By how much DRRho-CLIP's accuracy is above the others', with standard errors."""
    pictures = int(seeds[0][OURS][PICTURES])
    over = f"{len(seeds)} seeds" if len(seeds) > 1 else f"{pictures:,} pictures"
    lines = [f"In percent. Differences in zero-shot accuracy, with their standard error over {over}:"]
    for other in OTHERS:
        rises = [seed[OURS][ACCURACY] - seed[other][ACCURACY] for seed in seeds]
        if len(seeds) > 1:
            error = statistics.stdev(rises) / math.sqrt(len(seeds))
        else:
            error = math.hypot(*(standard_error(seeds[0][run][ACCURACY], pictures) for run in (OURS, other)))
        rise = statistics.mean(rises)
        verdict = "ahead" if rise > 2 * error else "behind" if rise < -2 * error else "no clear difference"
        lines.append(f"{RUNS[OURS]} - {RUNS[other]}: {100 * rise:+.1f} ± {100 * error:.1f} points, {verdict}")
    return lines


def standard_error(share: float, pictures: int) -> float:
    """Of a share of so many pictures; that of a difference is less where two models agree on many of them."""
    return math.sqrt(share * (1 - share) / pictures)


if __name__ == "__main__":
    main()
