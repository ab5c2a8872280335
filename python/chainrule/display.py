# SPDX-License-Identifier: MIT
"""What is shown: tables of text, the same for notebooks in Markdown and HTML; what stderr takes."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

Row = Sequence[str]

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(number: int) -> str:
    """A number as an exponent.

    >>> "φ" + superscript(12)
    'φ¹²'
    """
    return str(number).translate(_SUPERSCRIPTS)


def number(value: float, digits: int = 4) -> str:
    """A number in a few significant digits, with a proper minus sign.

    >>> number(-0.123456), number(1e-7), number(-0.0)
    ('−0.1235', '1e−07', '0')
    """
    return f"{value + 0.0:.{digits}g}".replace("-", "−")


def text_table(rows: Sequence[Row], align: str) -> str:
    """Rows below each other, the first the header; a letter of `align` for each column: l left, r right.

    >>> print(text_table([("layer", "size"), ("Linear", "12")], "lr"))
    layer   size
    Linear    12
    """
    sizes = [max(len(row[column]) for row in rows) for column in range(len(align))]
    marks = ["<" if side == "l" else ">" for side in align]
    return "\n".join(
        "  ".join(f"{cell:{mark}{size}}" for cell, mark, size in zip(row, marks, sizes, strict=True)).rstrip()
        for row in rows
    )


def markdown_table(rows: Sequence[Row], align: str) -> str:
    """The same table in Markdown; bars and angle brackets inside a cell are escaped.

    >>> print(markdown_table([("layer", "size"), ("Linear", "12")], "lr"))
    | layer | size |
    | :--- | ---: |
    | Linear | 12 |
    """
    rule = [":---" if side == "l" else "---:" for side in align]
    head, *body = [[cell.replace("|", r"\|").replace("<", "&lt;") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *body))


def html_table(rows: Sequence[Row], align: str, *, foot: bool = False) -> str:
    """The same table in HTML, its last row a footer if `foot`.

    >>> html_table([("a<b",), ("1",)], "r")[:60]
    '<table><thead><tr><th style="text-align:right">a&lt;b</th></'
    """
    from html import escape

    sides = ["left" if side == "l" else "right" for side in align]

    def line(row: Row, tag: str) -> str:
        cells = (
            f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>'
            for cell, side in zip(row, sides, strict=True)
        )
        return f"<tr>{''.join(cells)}</tr>"

    head, body, last = rows[0], rows[1 : -1 if foot else None], rows[-1:] if foot else []
    parts = [
        f"<thead>{line(head, 'th')}</thead>",
        f"<tbody>{''.join(line(row, 'td') for row in body)}</tbody>",
    ]
    parts += [f"<tfoot>{line(row, 'th')}</tfoot>" for row in last]
    return f"<table>{''.join(parts)}</table>"


class TextTable(str):
    """A text that a notebook shows as the HTML table it stands for."""

    html: str

    def __new__(cls, text: str, html: str) -> TextTable:
        made = super().__new__(cls, text)
        made.html = html
        return made

    def _repr_html_(self) -> str:
        return self.html


def stderr() -> TextIO | None:
    """Where messages go; None where there is nothing, or a stream that is closed."""
    return None if getattr(sys.stderr, "closed", False) else sys.stderr


def warn(message: str, kind: type[Warning], stacklevel: int) -> None:
    """warnings.warn, which alone would fail where stderr is closed."""
    try:
        warnings.warn(message, kind, stacklevel=stacklevel + 1)
    except ValueError:
        if stderr() is sys.stderr:
            raise
