#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Run the whole lecture and write it down as one page: formulas, programs, what they print, figures.

    python python/examples/all.py                  # writes lecture.html; about 20 seconds on two cores
    python python/examples/all.py -o FILE 03 07    # some of the sections, to another file

The page needs nothing but itself and a browser. Whatever a script prints it has asserted before.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import keyword
import re
import runpy
import time
import tokenize
from dataclasses import dataclass
from html import escape
from pathlib import Path

import chainrule as cr
from formulas import mathml

HERE = Path(__file__).resolve().parent

PAGE = """<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>The lecture, runnable</title>
<style>
  :root {{ color-scheme: light }}
  body {{ max-width: 860px; margin: 3rem auto; padding: 0 1.2rem; color: #222; background: #fff;
         font: 16px/1.55 system-ui, "Segoe UI", Helvetica, Arial, sans-serif }}
  h1 {{ font-size: 2rem; line-height: 1.2; margin-bottom: .4rem }}
  h2 {{ font-size: 1.35rem; margin: 0; padding-top: 2.6rem }}
  h2 .number {{ color: #1b6ca8; margin-right: .5em }}
  nav ol {{ columns: 2; column-gap: 2rem; padding-left: 1.6rem }} nav li {{ break-inside: avoid }}
  a {{ color: #1b6ca8; text-decoration: none }} a:hover {{ text-decoration: underline }}
  .lecture {{ color: #777; margin: .1rem 0 0 }}
  .formulas {{ margin: 1.1rem 0; padding: .7rem 1.2rem; background: #f6f8fa; border-left: 3px solid #1b6ca8 }}
  .formulas div {{ margin: .55rem 0; font-size: 1.15rem; overflow-x: auto }}
  math {{ math-style: normal; font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", math }}
  sub {{ font-size: .75em; line-height: 0 }}
  pre {{ margin: 1rem 0; padding: .9rem 1.2rem; overflow-x: auto; border-radius: 5px;
        font: 13px/1.5 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }}
  .output {{ background: #22272e; color: #e6edf3 }} details pre {{ background: #f6f8fa }}
  summary {{ cursor: pointer; color: #555 }}
  .k {{ color: #9a3d9a }} .s {{ color: #3c7a4a }} .c {{ color: #888; font-style: italic }}
  figure {{ margin: 1.2rem 0; overflow-x: auto }} figure svg {{ max-width: 100%; height: auto }}
  footer {{ margin-top: 3rem; color: #777; font-size: .9rem }}
</style>
</head>
<body>
<h1>The lecture, runnable</h1>
<p>Every formula of “Lecture 9 Recap – Neural Networks 2”, in its order and its symbols, as a short program.
What a program prints it has asserted before: against the closed form, or against differences.</p>
<nav><ol>
{contents}
</ol></nav>
{sections}
<footer>chainrule {version}, {isa}, {threads} threads</footer>
</body>
</html>
"""

SECTION = """<section id="{name}">
<h2><span class="number">{number}</span>{title}</h2>
<p class="lecture">{lecture}</p>
<div class="formulas">
{formulas}
</div>
{text}
<details><summary>{name}.py</summary><pre>{source}</pre></details>
<pre class="output">{output}</pre>
{figure}
</section>"""


@dataclass(frozen=True)
class Card:
    """The docstring of an example in its parts."""

    title: str
    lecture: str
    formulas: list[str]
    paragraphs: list[str]

    @classmethod
    def of(cls, docstring: str) -> Card:
        """Title; "Lecture: section"; indented lines are formulas, the others are text."""
        title, lecture, *blocks = docstring.strip().split("\n\n")
        formulas = [
            line.strip() for block in blocks if block.startswith("    ") for line in block.splitlines()
        ]
        texts = [" ".join(block.split()) for block in blocks if not block.startswith("    ")]
        return cls(title, " ".join(lecture.split()), formulas, texts)


def run(path: Path) -> tuple[str, str, str]:
    """Run an example: its docstring, what it printed, and its figure or ""."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(path))
    figure = names["figure"]() if "figure" in names else ""
    return names["__doc__"], printed.getvalue(), figure


def coloured(source: str) -> str:
    """Python as HTML, with keywords, strings and comments in spans."""
    lines, parts, row, column = source.splitlines(keepends=True), [], 1, 0

    def upto(end: tuple[int, int]) -> str:
        nonlocal row, column
        text = ""
        while row < end[0]:
            text, row, column = text + lines[row - 1][column:], row + 1, 0
        if row <= len(lines):
            text, column = text + lines[row - 1][column : end[1]], end[1]
        return text

    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        word = token.type == tokenize.NAME and keyword.iskeyword(token.string)
        kind = "k" if word else {tokenize.STRING: "s", tokenize.COMMENT: "c"}.get(token.type, "")
        if kind:
            parts.append(escape(upto(token.start)))
            parts.append(f'<span class="{kind}">{escape(upto(token.end))}</span>')
    return "".join([*parts, escape(upto((len(lines) + 1, 0)))])


def prose(text: str) -> str:
    """Text as HTML, with scripts that Unicode does not have: W¹_{jd}, x_d."""
    return re.sub(r"(?<=\w)_(?:\{(\w+)\}|(\w)\b)", lambda m: f"<sub>{m[1] or m[2]}</sub>", escape(text))


def section(path: Path) -> str:
    """An example as a part of the page."""
    docstring, output, figure = run(path)
    card = Card.of(docstring)
    return SECTION.format(
        name=path.stem,
        number=path.stem[:2],
        title=escape(card.title),
        lecture=escape(card.lecture),
        formulas="\n".join(f"<div>{mathml(formula)}</div>" for formula in card.formulas),
        text="\n".join(f"<p>{prose(text)}</p>" for text in card.paragraphs),
        source=coloured(path.read_text(encoding="utf-8")),
        output=escape(output.rstrip()),
        figure=f"<figure>{figure}</figure>" if figure else "",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sections", nargs="*", help="numbers such as 03; all of them unless said")
    parser.add_argument("-o", "--output", type=Path, default=Path("lecture.html"))
    arguments = parser.parse_args()
    paths = sorted(HERE.glob("[0-9][0-9]_*.py"))
    if arguments.sections:
        paths = [path for path in paths if path.stem[:2] in arguments.sections]
    if not paths:
        parser.error(f"no such section: expected some of 01 to 10, got {' '.join(arguments.sections)}")
    sections, contents = [], []
    for path in paths:
        start = time.perf_counter()
        sections.append(section(path))
        title = re.search(r"</span>(.*)</h2>", sections[-1]).group(1)
        contents.append(f'<li><a href="#{path.stem}">{title}</a></li>')
        print(f"{path.name:<28} {time.perf_counter() - start:5.1f} s")
    info = cr.info()
    page = PAGE.format(
        contents="\n".join(contents), sections="\n".join(sections), version=escape(info["version"]),
        isa=info["isa"], threads=info["threads"],
    )  # fmt: skip
    arguments.output.write_text(page, encoding="utf-8")
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
