"""The model card of an export: what the model is, how it was trained and what it reached."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from training.config.flags import ALL
from training.exporting.subject import Subject

_OF_THE_MACHINE = {
    "name",
    "logs",
    "resume",
    "copy_codebase",
    "remote_sync",
    "dist_url",
    "wandb_notes",
    "config_file",
}


def model_card(subject: Subject) -> str:
    """Markdown with a YAML header, as the Hugging Face hub reads it.

    Paths and URLs in the flags are cut down to their last part: a card is published, and they may hold names of a
    machine or a key. Without a licence the header says ``unknown``.
    """
    described = subject.built.description
    header = (
        "---\ntags:\n- clip\nlibrary_name: open_clip\npipeline_tag: zero-shot-image-classification\n"
        f"license: {subject.license or 'unknown'}\n---\n"
    )
    parameters = sum(p.numel() for p in subject.built.module.parameters())
    pixels = subject.preprocess
    size = pixels["size"]
    parts = [
        f"# {described.name}, trained with DRRho-CLIP",
        _table(
            ("", ""),
            [
                ("architecture", described.name),
                ("parameters", f"{parameters / 1e6:.1f}M"),
                ("image size", " x ".join(map(str, size)) if isinstance(size, list) else str(size)),
                ("mean", ", ".join(map(str, pixels["mean"]))),
                ("std", ", ".join(map(str, pixels["std"]))),
                ("interpolation, resize mode", f"{pixels['interpolation']}, {pixels['resize_mode']}"),
                ("tokenizer", described.tokenizer),
                ("context length", str(described.context_length)),
                ("precision of the weights", str(subject.dtype).removeprefix("torch.")),
                ("licence", subject.license or "not stated by whoever exported the model"),
            ],
        ),
        "## Use",
        "```python\nimport open_clip\n\n"
        "model, _, preprocess = open_clip.create_model_and_transforms('local-dir:DIR')\n"
        "tokenizer = open_clip.get_tokenizer('local-dir:DIR')\nmodel.eval()\n```",
    ]
    if subject.held:
        parts += ["## Training", _table(("", ""), list(_progress(subject)))]
        if flags := list(_flags(subject)):
            parts += ["Flags other than the defaults:", _table(("flag", "value"), flags)]
    if results := _results(subject):
        parts += ["## Evaluation", _table(("metric", "value"), results)]
    return header + "\n" + "\n\n".join(parts) + "\n"


def _progress(subject: Subject) -> Iterator[tuple[str, str]]:
    for name, key in (("epochs", "epoch"), ("steps", "step"), ("samples seen", "samples_seen")):
        if key in subject.held:
            yield name, f"{subject.held[key]:,}"
    if sizes := subject.held.get("data_sizes"):
        yield "data size", " + ".join(f"{size:,}" for size in sizes)


def _flags(subject: Subject) -> Iterator[tuple[str, str]]:
    for key, value in sorted(dict(subject.held.get("flags", {})).items()):
        if key not in ALL or key in _OF_THE_MACHINE:
            continue
        default = ALL[key].default
        if str(value) != str(tuple(default) if isinstance(default, list) else default):
            yield ALL[key].name, _public(str(value), is_model=key.endswith("model"))


def _public(value: str, *, is_model: bool) -> str:
    """``value`` without folders, hosts, queries and commands; lists as they are typed."""
    if "pipe:" in value:
        return "pipe: (a command)"
    if value.startswith("(") and value.endswith(")"):
        return value.strip("(),").replace(",", "")
    if is_model and not re.search(r"\.json$|^local-dir:", value):
        return value  # ViT-B/32
    return "::".join(re.sub(r"[?#].*", "", part).rstrip("/").rpartition("/")[2] for part in value.split("::"))


def _results(subject: Subject) -> list[tuple[str, str]]:
    """The numbers that the run's evaluations of this epoch have left beside it."""
    if subject.file is None or subject.file.parent.name != "checkpoints" or "epoch" not in subject.held:
        return []
    run, epoch = subject.file.parent.parent, subject.held["epoch"]
    found: dict[str, str] = {}
    for line in _lines(run / "eval_results.jsonl"):
        if line.get("epoch") == epoch and line.get("step", subject.held.get("step")) == subject.held.get("step"):
            found |= {
                k: f"{v:.4f}" for k, v in line.items() if isinstance(v, float) and k not in ("epoch", "step")
            }
    for line in _lines(run / "eval_results" / f"{subject.file.stem}_eval_results.jsonl"):
        main = dict(line.get("metrics") or {}).get("main_metric")
        if isinstance(main, float):
            found[str(line.get("dataset", line.get("key")))] = f"{main:.4f}"
    return list(found.items())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file of results; a line that was cut off is ignored."""
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        with suppress(ValueError):
            held = json.loads(line)
            if isinstance(held, dict):
                yield held


def _table(head: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    cells = [(a.replace("|", "\\|"), " ".join(b.split()).replace("|", "\\|")) for a, b in [head, *rows]]
    lines = [f"| {a} | {b} |" for a, b in cells]
    return "\n".join([lines[0], "|---|---|", *lines[1:]])
