"""Ends the demo: evaluates its four checkpoints on Twitter's art, prints the table, draws `report.png`.

Writes LOGS/results.json (every number), LOGS/table.md (the table) and LOGS/report.png.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from drawing import draw
from tqdm import tqdm

from measure import COLUMNS, TestSet, embed, held_out_recall, measure, read_test_set

TITLES = {
    "reference": "reference",
    "openclip": "OpenCLIP",
    "fastclip_v3": "FastCLIP-v3",
    "drrho_clip": "DRRho-CLIP",
}
HEADINGS = {
    "image_to_text_R@1": "I→T R@1",
    "image_to_text_R@5": "I→T R@5",
    "text_to_image_R@1": "T→I R@1",
    "text_to_image_R@5": "T→I R@5",
    "subcategory": "subcategory",
}
AGREEMENT = 2e-3  # a picture of 1,911 on the other side of a tie, and a little


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logs", type=Path, default=Path("logs/demo"), help="folder of the four runs")
    parser.add_argument("--retrieval", type=Path, required=True, help="test pictures with their names")
    parser.add_argument("--classification", type=Path, required=True, help="test pictures by subcategory")
    parser.add_argument("--model", type=Path, required=True, help="model config of the targets")
    parser.add_argument("--ref-model", type=Path, required=True, help="model config of the reference")
    args = parser.parse_args()

    tests = read_test_set(args.retrieval, args.classification)
    template = (args.classification / "zeroshot_classification_templates.txt").read_text().strip()
    everything = torch.ones(len(tests.names), dtype=torch.bool)
    subsets = {"all": everything, "without_flags": ~tests.flags}
    features, curves, rows = {}, {}, {}
    bar = tqdm(TITLES, desc="testing", unit="model", disable=None)
    for run in bar:
        bar.set_postfix_str(TITLES[run])
        config = args.ref_model if run == "reference" else args.model
        checkpoint = last_checkpoint(args.logs / run)
        features[run] = embed(config, checkpoint, tests, template)
        curves[run] = evaluations(args.logs / run)
        rows[run] = {
            **{name: measure(features[run], tests, chosen) for name, chosen in subsets.items()},
            "held_out_R@5": held_out_recall(features[run], tests, 5),
            "seconds": int((args.logs / run / "seconds").read_text()),
            "checkpoint": str(checkpoint),
        }
        compare_with_the_run(run, curves[run][-1], rows[run]["all"])
    chance = {name: tests.chance(chosen) for name, chosen in subsets.items()}
    largest = {name: tests.largest_class(chosen) for name, chosen in subsets.items()}
    results = {
        "pictures": len(tests.names),
        "classes": len(tests.classes),
        "rows": rows,
        "chance": chance,
        "largest_class": largest,
        "curves": curves,
    }
    (args.logs / "results.json").write_text(json.dumps(results, indent=1))
    (args.logs / "table.md").write_text(table(results, tests))
    compared = {run: features[run] for run in TITLES if run != "reference"}
    metric_chance = {**chance["all"], "imagenet-zeroshot-val-top1": chance["all"]["subcategory"]}
    draw(args.logs / "report.png", TITLES, curves, compared, tests, metric_chance)
    print((args.logs / "table.md").read_text())
    print(f"{args.logs}/report.png  {args.logs}/results.json  {args.logs}/table.md")


def last_checkpoint(run: Path) -> Path:
    """The checkpoint with the most epochs."""
    found = sorted((run / "checkpoints").glob("epoch_[0-9]*.pt"), key=lambda path: int(path.stem.split("_")[1]))
    if not found:
        raise SystemExit(f"{run}/checkpoints: no epoch_N.pt; run scripts/demo.sh")
    return found[-1]


def evaluations(run: Path) -> list[dict[str, float]]:
    """What the run itself measured while it trained, oldest first."""
    return [json.loads(line) for line in (run / "eval_results.jsonl").read_text().splitlines()]


def compare_with_the_run(run: str, in_run: dict[str, float], from_file: dict[str, float]) -> None:
    """The checkpoint, loaded by open_clip, must measure what the run measured when it wrote it."""
    names = {column: column for column in COLUMNS} | {"subcategory": "imagenet-zeroshot-val-top1"}
    for column, name in names.items():
        if not math.isclose(in_run[name], from_file[column], abs_tol=AGREEMENT):
            raise SystemExit(
                f"{run}: {column} is {from_file[column]:.4f} from the checkpoint, {in_run[name]:.4f} in the run"
            )


def table(results: dict, tests: TestSet) -> str:
    """The results in Markdown, in percent: all pictures / without flags."""
    cells = [["test: Twitter's art", *HEADINGS.values(), "unseen names I→T R@5", "trained"]]
    for run, row in results["rows"].items():
        both = [f"{100 * row['all'][c]:.1f} / {100 * row['without_flags'][c]:.1f}" for c in COLUMNS]
        cells.append([TITLES[run], *both, f"{100 * row['held_out_R@5']:.1f}", f"{row['seconds']} s"])
    chance = results["chance"]
    both = [f"{100 * chance['all'][c]:.2f} / {100 * chance['without_flags'][c]:.2f}" for c in COLUMNS]
    cells.append(["chance", *both, f"{100 * chance['all']['image_to_text_R@5']:.2f}", ""])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    largest = results["largest_class"]
    notes = [
        "",
        f"In percent, all pictures / without flags: {len(tests.names):,} / {int((~tests.flags).sum()):,} names, "
        f"{len(tests.classes)} / {len(tests.labels[~tests.flags].unique())} subcategories.",
        f"Always answering with the largest subcategory would score {100 * largest['all']:.1f} / "
        f"{100 * largest['without_flags']:.1f}.",
        f"Unseen names: the {int(tests.held_out.sum())} pictures whose names no training set has.",
        f"Trained: {sum(row['seconds'] for row in results['rows'].values())} s for all four.",
    ]
    return "\n".join([*lines, *notes]) + "\n"


if __name__ == "__main__":
    main()
