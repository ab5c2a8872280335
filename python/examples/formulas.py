# SPDX-License-Identifier: MIT
"""The formulas of the docstrings as MathML, which browsers set without any help.

A formula is written as one would read it: φᴸ⁻¹, ∂L/∂fₙ, ∑ₙ, 1/(1 + exp(−f)). What Unicode has no script for
is written x_{nd} or W^{ℓ}. A fraction is two things around a / without spaces.

>>> mathml("∂L/∂fₙ")
'<math><mfrac><mrow><mi>∂</mi><mi>L</mi></mrow><mrow><mi>∂</mi><msub><mi>f</mi><mi>n</mi></msub></mrow></mfrac></math>'
"""

from __future__ import annotations

import re
from html import escape

UP = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀᴸˡᵏ*", "0123456789+−TLlk*", strict=True))
DOWN = dict(zip("₀₁₂₃₄₅₆₇₈₉ₙₖⱼₓᵥᵤ", "0123456789nkjxvu", strict=True))
NAMES = ("exp", "log")  # all other letters stand for themselves
SIGNS = "=<>+−→←⋯·|,…"  # have their own room around them
TOKEN = re.compile(rf"[_^]|[{''.join(UP)}]+|[{''.join(DOWN)}]+|{'|'.join(NAMES)}|[A-Za-z]′?|[0-9.]+|\S| ")

SPACE = '<mspace width="0.22em"/>'
BRACKET = '<mo stretchy="false">{}</mo>'  # the formulas are not so high that brackets must grow
OPEN, CLOSE = BRACKET.format("("), BRACKET.format(")")


class Parser:
    """One pass from left to right over the tokens of a formula."""

    def __init__(self, formula: str) -> None:
        self.tokens, self.place = TOKEN.findall(formula), 0

    def peek(self) -> str:
        """The next token, "" at the end."""
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self) -> str:
        """The next token, which is then used up."""
        self.place += 1
        return self.tokens[self.place - 1]

    def row(self, end: str = "") -> str:
        """Everything up to a closing bracket, or to the end."""
        parts, before = list[str](), ""
        while self.peek() != end:
            start = self.place
            parts.append(self.fraction())
            if parts[-1] == SPACE and (before in SIGNS or self.peek() in SIGNS):
                parts.pop()
            before = self.tokens[start]
        return "".join(parts)

    def fraction(self) -> str:
        """A thing, or two with a / between them."""
        above = self.scripted()
        if self.peek() != "/":
            return above
        self.take()
        return f"<mfrac>{bare(above)}{bare(self.scripted())}</mfrac>"

    def scripted(self) -> str:
        """A thing with what stands below and above it."""
        token, what = self.peek(), self.atom()
        below, above = self.script(DOWN, "_"), self.script(UP, "^")
        if not (below or above):
            return what
        kind = "munder" if token == "∑" else "m" + ("sub" if below else "") + ("sup" if above else "")
        return f"<{kind}>{what}{below}{above}</{kind}>"

    def script(self, letters: dict[str, str], mark: str) -> str:
        """A sub- or superscript: Unicode's, or a mark and what is behind it."""
        if self.peek() == mark:
            self.take()
            return self.atom()
        if self.peek() and all(letter in letters for letter in self.peek()):
            return grouped(Parser("".join(letters[letter] for letter in self.take())).row())
        return ""

    def atom(self) -> str:
        """A name, a number, a sign, or a bracket with all that is in it."""
        token = self.take()
        if token in "({":
            inside = self.row(")" if token == "(" else "}")
            self.take()
            return grouped(f"{OPEN}{grouped(inside)}{CLOSE}" if token == "(" else inside)
        if token == "∂":  # binds what follows, with its argument: ∂σ(z)
            argument = self.scripted() + (self.atom() if self.peek() == "(" else "")
            return f"<mrow><mi>∂</mi>{argument}</mrow>"
        if token == " ":
            return SPACE
        if token == "½":
            return "<mfrac><mn>1</mn><mn>2</mn></mfrac>"
        kind = "mi" if token[0].isalpha() else "mn" if token[0].isnumeric() else "mo"
        return BRACKET.format(token) if token in "[]" else f"<{kind}>{escape(token)}</{kind}>"


def grouped(inside: str) -> str:
    """As one thing."""
    return f"<mrow>{inside}</mrow>" if inside.count("<m") > 1 else inside


def bare(part: str) -> str:
    """Without brackets around the whole: the bar of a fraction groups."""
    return part.removeprefix(f"<mrow>{OPEN}").removesuffix(f"{CLOSE}</mrow>")


def mathml(formula: str) -> str:
    """A line of text as a <math> element."""
    return f"<math>{Parser(formula).row()}</math>"
