"""Pieces of HTML that the page is made of: escaped text, numbers as people write them, tables."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence


def escaped(value: object) -> str:
    # Names of files need not be text.
    return html.escape(str(value).encode("utf-8", "backslashreplace").decode())


def breakable(name: str) -> str:
    """The name of a metric, which may be continued in the next line after each underscore."""
    return escaped(name).replace("_", "_<wbr>")


def anchor(name: str) -> str:
    return name.lower().replace(" ", "-")


def written(value: float) -> str:
    if value != 0 and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"


def table(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]], *, css: str = "") -> str:
    """``head`` and cells are HTML. The first cell of a row is its heading; the table scrolls by itself."""
    body = "".join(f'<tr><th scope="row">{row[0]}</th>{"".join(map(_cell, row[1:]))}</tr>' for row in rows)
    heads = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    return (
        f'<div class="table {css}" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(content: str) -> str:
    return f'<td class="long">{content}</td>' if len(content) > 40 else f"<td>{content}</td>"
