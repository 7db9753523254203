"""Pictures of evaluation sets and what the runs say about them; confusion of classes; what retrieval finds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.predictions import CONFUSED, Classified, Retrieved
from training.run_report import picks
from training.run_report.history import History
from training.run_report.page.parts import escaped, table
from training.run_report.picks import Guess, ShownPicture, Side
from training.run_report.pictures import Thumbnails

_GLANCE = 12  # pictures
_CARDS = 12
_NEAREST = 3  # classes that a card shows
_MATRIX = 20  # classes up to which the whole matrix is shown
_PAIRS = 15
_QUERIES = 6


def classes(runs: Sequence[History], pictures: Thumbnails) -> str:
    """For each set of classification: what changed between runs, pictures drawn evenly, and sure mistakes."""
    parts: list[str] = []
    for key, kept in picks.sets(runs, Classified).items():
        content = "".join(
            f"<h4>{escaped(title)}</h4>{note}{_cards(shown, runs, pictures)}"
            for title, note, shown in _groups(runs, kept)
            if shown
        )
        parts.append(_set(runs, key, kept, content, is_open=not parts))
    return "".join(parts)


def glance(runs: Sequence[History], pictures: Thumbnails) -> str:
    """A few pictures to begin with."""
    title, shown = picks.first_look(runs, _GLANCE)
    tiles = "".join(
        f"<li>{_image(pictures, look.place, f'picture of: {look.label}')}<strong>{escaped(look.label)}</strong>"
        f"<small>{escaped(look.said)}</small></li>"
        for look in shown
        if pictures.data_url(look.place)
    )
    return f'<div class="glance"><p>{escaped(title)}</p><ul>{tiles}</ul></div>' if tiles else ""


def _groups(
    runs: Sequence[History], kept: Sequence[Classified | None]
) -> list[tuple[str, str, list[ShownPicture]]]:
    """Title, note and pictures."""
    there = [number for number, each in enumerate(kept) if each is not None]
    groups = []
    for other in there[1:]:
        a, b = there[0], other
        for one, two in ((b, a), (a, b)):
            title = f"{runs[one].name} is right, {runs[two].name} is wrong"
            groups.append((title, "", picks.only_right(kept, one, two, _CARDS)))
    groups.append(("Drawn evenly from the set", "", picks.evenly_drawn(kept, _CARDS)))
    whose = "A model that is sure and wrong" if len(there) == 1 else "Models that agree and are wrong"
    note = f'<p class="note">{whose} may also have met a wrong label.</p>'
    groups.append(("Surest mistakes", note, picks.surest_mistakes(kept, _CARDS)))
    return groups


def _set(
    runs: Sequence[History],
    key: str,
    kept: Sequence[Classified | Retrieved | None],
    content: str,
    *,
    is_open: bool,
) -> str:
    """A part of the page that can be closed, about one set."""
    there = [(run, each) for run, each in zip(runs, kept) if each is not None]
    name = there[0][1].name
    whose = [f"{run.name} " if len(runs) > 1 else "" for run, _ in there]
    said = "; ".join(f"{who}after {run.kept_at[key].replace('_', ' ')}" for who, (run, _) in zip(whose, there))
    return (
        f"<details{' open' * is_open}><summary><h3>{escaped(name)}</h3></summary>"
        f'<p class="note">{escaped(said)}.</p>{content}</details>'
    )


def _cards(shown: Sequence[ShownPicture], runs: Sequence[History], pictures: Thumbnails) -> str:
    cards = []
    for each in shown:
        picture = _image(pictures, each.place, f"picture {each.number}, a {each.label}")
        guesses = "".join(
            _guess(guess, run.name if len(runs) > 1 else "", each.label)
            for guess, run in zip(each.guesses, runs)
            if guess is not None
        )
        cards.append(f"<li>{picture}<div><p><strong>{escaped(each.label)}</strong></p>{guesses}</div></li>")
    return f'<ul class="guesses">{"".join(cards)}</ul>'


def _guess(guess: Guess, run: str, label: str) -> str:
    """The nearest classes, with bars as long as they are probable."""
    lines = []
    for name, probability in list(zip(guess.names, guess.probabilities))[:_NEAREST]:
        share = max(0.0, 100 * probability)
        said = f"{share:.0f} %" if share >= 1 else f"{share:.1f} %"
        is_right = name == label
        mark = ' <span class="mark" role="img" aria-label="right">✓</span>' if is_right else ""
        lines.append(
            f'<li{" class=hit" * is_right} style="--share:{share:.0f}%"><span>{escaped(name)}{mark}</span>'
            f"<span>{said}</span></li>"
        )
    who = f'<p class="who">{escaped(run)}</p>' if run else ""
    return f'{who}<ol class="near">{"".join(lines)}</ol>'


def _image(pictures: Thumbnails, place: Sequence[str | int], alt: str) -> str:
    if picture := pictures.data_url(place):
        return f'<img src="{picture}" alt="{escaped(alt)}" loading="lazy">'
    return '<div class="none" aria-hidden="true"></div>'


def confusion(runs: Sequence[History], pictures: Thumbnails) -> str:
    """For each set: how many pictures of a class were taken for which, as a matrix where it has few classes."""
    parts: list[str] = []
    for key, kept in picks.sets(runs, Classified).items():
        there = [(run, each) for run, each in zip(runs, kept) if each is not None]
        content = _pairs(there, pictures)
        if len(there[0][1].classes) <= _MATRIX:
            content = (
                '<div class="matrices">' + "".join(_matrix(run, each) for run, each in there) + "</div>" + content
            )
        parts.append(_set(runs, key, kept, content, is_open=not parts))
    return "".join(parts)


def _matrix(run: History, kept: Classified) -> str:
    """Rows are classes, columns what their pictures were taken for; shades are shares of the row."""
    counts = np.diag(kept.class_right)
    for label, predicted, n in kept.confused.tolist():
        counts[label, predicted] = n
    names = [escaped(name) for name in kept.classes]
    rows = []
    for label, name in enumerate(names):
        total = max(int(kept.class_pictures[label]), 1)
        cells = []
        for predicted, n in enumerate(counts[label].tolist()):
            css = "right" if label == predicted else "wrong"
            cells.append(f'<td class="{css}" style="--share:{100 * n / total:.0f}%">{n or ""}</td>')
        rows.append(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>')
    heads = "".join(f'<th scope="col"><span>{name}</span></th>' for name in names)
    caption = f"{escaped(run.name)}: rows are classes, columns what their pictures were taken for"
    return (
        f'<div class="table matrix" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}'
        f"</caption><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _pairs(there: Sequence[tuple[History, Classified]], pictures: Thumbnails) -> str:
    """The most frequent confusions of all runs, with a picture of each class."""
    counts = [{(a, b): n for a, b, n in kept.confused.tolist()} for _, kept in there]
    total: dict[tuple[int, int], int] = {}
    for each in counts:
        for pair, n in each.items():
            total[pair] = total.get(pair, 0) + n
    first = there[0][1]
    rows = []
    for a, b in sorted(total, key=lambda pair: -total[pair])[:_PAIRS]:
        of = int(first.class_pictures[a])
        # Only the most frequent pairs are kept, so one that is missing is 0 where there are less.
        cells = [
            f"{each.get((a, b), 0):,} of {of:,}" if (a, b) in each or len(each) < CONFUSED else "–"
            for each in counts
        ]
        rows.append((*(_class(first, number, pictures) for number in (a, b)), *cells))
    if not rows:
        return "<p>No class was taken for another one.</p>"
    heads = ["class", "taken for", *(escaped(run.name) for run, _ in there)]
    return table("The most frequent confusions: pictures of a class that were taken for another one", heads, rows)


def _class(kept: Classified, number: int, pictures: Thumbnails) -> str:
    """The name of a class, with a picture of it."""
    examples = np.flatnonzero(kept.label == number)
    image = ""
    if len(examples) and (picture := pictures.data_url(kept.places[examples[0]])):
        image = f'<img src="{picture}" alt="" loading="lazy">'
    return f'<span class="class">{image}{escaped(kept.classes[number])}</span>'


def retrieval(runs: Sequence[History], pictures: Thumbnails) -> str:
    """For each set of retrieval: some captions and the pictures that are found for them, and the reverse."""
    parts: list[str] = []
    for key, kept in picks.sets(runs, Retrieved).items():
        content = _queries(runs, kept, "text", pictures) + _queries(runs, kept, "image", pictures)
        parts.append(_set(runs, key, kept, content, is_open=not parts))
    return "".join(parts)


def _queries(runs: Sequence[History], kept: Sequence[Retrieved | None], side: Side, pictures: Thumbnails) -> str:
    title = "Which picture has this caption?" if side == "text" else "Which caption has this picture?"
    there = [(run, each) for run, each in zip(runs, kept) if each is not None]
    first = there[0][1]
    rows = []
    for query in picks.queries(kept, side, _QUERIES):
        if side == "text":
            asked = f"<blockquote>{escaped(first.captions[query])}</blockquote>"
        else:
            asked = _image(pictures, first.pictures[query], f"picture {query}")
        answers = "".join(_answers(run, each, side, query, pictures, len(runs) > 1) for run, each in there)
        rows.append(f'<li><div class="query">{asked}</div><div class="answers">{answers}</div></li>')
    drawn = "Queries are evenly drawn."
    if len(there) > 1:
        drawn = "Half of the queries, as far as there are such, are those that only some of the runs answer."
    note = f'<p class="note">Most similar first; ✓ marks what belongs together. {drawn}</p>'
    return f'<h4>{title}</h4>{note}<ul class="retrieval {side}">{"".join(rows)}</ul>'


def _answers(run: History, kept: Retrieved, side: Side, query: int, pictures: Thumbnails, named: bool) -> str:
    """What one run found: the first ones, and the right one behind them where it is not among these."""
    found = picks.found(kept, side, query)
    items = [_answer(kept, side, n, hit, pictures) for n, hit in zip(found.numbers, found.hits)]
    if not any(found.hits):
        items.append(_answer(kept, side, found.own, True, pictures, f"rank {found.rank:,}"))
    who = f'<p class="who">{escaped(run.name)}</p>' if named else ""
    return f"<div>{who}<ol>{''.join(items)}</ol></div>"


def _answer(
    kept: Retrieved, side: Side, number: int, is_right: bool, pictures: Thumbnails, remark: str = ""
) -> str:
    mark = '<span class="mark" role="img" aria-label="right">✓</span>' if is_right else ""
    text = f"<small>{remark}</small>" if remark else ""
    if side == "text":
        content = _image(pictures, kept.pictures[number], f"picture {number}")
    else:
        content = f"<span>{escaped(kept.captions[number])}</span>"
    css = " ".join(filter(None, ("hit" if is_right else "", "behind" if remark else "")))
    return f'<li class="{css}">{content}{mark}{text}</li>'
