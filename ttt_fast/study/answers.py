r"""Whether a written mathematical answer is the right one. Nothing that a model wrote is executed.

The answer of a text is what stands in its last ``\boxed{…}``; a text without one has no answer. Two
answers agree if, after the same tidying of LaTeX, one of these holds:

- they are the same string;
- both are numbers, of the same value to 1e-9: integers, decimals, fractions, roots, powers, π and
  what + − · / make of them, read by the small parser below (5 = 5.0, 9/√5 = 9√5/5, 025 = 25);
- both are lists of as many parts with the same brackets around them, and their parts agree: in
  their order within brackets, in any order without ("0 or 4" = "4, 0").

Anything else is compared as a string: 3x − 2 and −2 + 3x do not agree, nor do two ways to write a
matrix. So a right answer in an unusual form may be called wrong, and a wrong one hardly right.
"""

from __future__ import annotations

import math
import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
# Numbers, commands of letters, and single characters.
_TOKEN = re.compile(r"\d+(?:\.\d+)?|\.\d+|\\[A-Za-z]+|\S")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_CLOSING = {"(": ")", "[": "]", "\\{": "\\}"}
_PRECISION = 1e-9
# What is longer is no answer, and deep nesting would exhaust Python's stack.
_LONGEST = 500
_DEEPEST = 30


def boxed(text: str) -> str | None:
    r"""What stands in the last ``\boxed{…}`` of a text whose braces close; None without one."""
    found = None
    for match in _BOX.finditer(text):
        end = _closing_brace(text, match.end())
        if end is not None:
            found = text[match.end() : end]
    return None if found is None else found.strip()


def _closing_brace(text: str, start: int) -> int | None:
    depth = 1
    for place in range(start, len(text)):
        if text[place] in "{}" and text[place - 1] != "\\":
            depth += 1 if text[place] == "{" else -1
            if depth == 0:
                return place
    return None


def agree(one: str, other: str) -> bool:
    """Whether two answers agree, as said above; very long ones only if they are the same."""
    if max(len(one), len(other)) > _LONGEST:
        return one == other
    return _agree(tidied(one), tidied(other))


def _agree(one: str, other: str) -> bool:
    if one == other:
        return one != ""
    numbers = value_of(one), value_of(other)
    if None not in numbers:
        return math.isclose(*numbers, rel_tol=_PRECISION, abs_tol=_PRECISION)
    (brackets, parts), (other_brackets, other_parts) = _parts(one), _parts(other)
    if brackets != other_brackets or len(parts) != len(other_parts) or len(parts) < 2:
        return False
    if brackets:
        return all(map(_agree, parts, other_parts))
    return _agree_in_any_order(parts, other_parts)


def _agree_in_any_order(parts: list[str], others: list[str]) -> bool:
    left = list(others)
    for part in parts:
        same = next((n for n, other in enumerate(left) if _agree(part, other)), None)
        if same is None:
            return False
        left.pop(same)
    return True


# ---------------------------------------------------------------------------- LaTeX


def tidied(answer: str) -> str:
    r"""An answer without what does not change it: spaces, dollars, \left, degrees, units, "x ="."""
    text = answer.strip().strip("$").strip()
    text = re.sub(r"\\[()\[\]]|\\(?:left|right|displaystyle|big|Big)(?![A-Za-z])", "", text)
    text = text.replace(",\\!", "").replace("{,}", "")
    text = re.sub(r"\\[,;:!> ]|~|\\q?quad(?![A-Za-z])", " ", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|°", "", text)
    text = re.sub(r"\\?[%$]", "", text)
    text = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", text)
    text = text.replace("−", "-").replace("π", "\\pi").replace("∞", "\\infty")
    text = text.replace("+\\infty", "\\infty")
    text = _without_units(text)
    text = re.sub(r"\s+(?:or|and)\s+", ",", text.strip())
    text = re.sub(r"\s+", "", text).rstrip(".")
    text = re.sub(r"^[A-Za-z]=", "", text)
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _without_units(text: str) -> str:
    r"""12\text{ cm} is 12, \text{no} is no, 0\text{ or }4 is 0 or 4."""
    words = _TEXT.search(text)
    while words is not None:
        inside = words.group(1)
        joins = inside.strip() in ("or", "and")
        unit = text[: words.start()].strip() and not text[words.end() :].strip() and not joins
        text = text[: words.start()] + ("" if unit else f" {inside} ") + text[words.end() :]
        words = _TEXT.search(text)
    return text


def _parts(text: str) -> tuple[str, list[str]]:
    r"""Brackets around a list, and what its commas (or \cup) divide."""
    opening = next((each for each in _CLOSING if text.startswith(each)), None)
    ends = ("", "")
    if opening is not None and not _splits(text):
        # Half-open intervals close with the other kind.
        closing = next((c for c in (")", "]", "\\}") if text.endswith(c)), "")
        ends = (opening, closing)
        text = text[len(opening) : len(text) - len(closing)]
    places = _splits(text)
    starts = [0, *(end for _, end in places)]
    stops = [*(start for start, _ in places), len(text)]
    return "".join(ends), [text[a:b] for a, b in zip(starts, stops, strict=True)]


def _splits(text: str) -> list[tuple[int, int]]:
    """Where the separators outside of all brackets begin and end."""
    found, depth = [], 0
    for match in re.finditer(r"\\cup|\\[{}]|.", text):
        token = match.group()
        if token in ("(", "[", "{", "\\{"):
            depth += 1
        elif token in (")", "]", "}", "\\}"):
            depth -= 1
        elif token in (",", "\\cup") and depth == 0:
            found.append(match.span())
    return found


# ---------------------------------------------------------------------------- numbers


def value_of(text: str) -> float | None:
    """The value of a tidied answer; None if it is no number, or not a finite real one."""
    reader = _Reader(_TOKEN.findall(text))
    try:
        value = reader.sum()
    except (_NoNumberError, ArithmeticError):
        return None
    done = reader.peek() is None and isinstance(value, float) and math.isfinite(value)
    return value if done else None


class _NoNumberError(Exception):
    """The tokens are no number."""


class _Reader:
    r"""Reads sums of products of powers, as LaTeX writes them.

    sum     = ["+" | "-"] product {("+" | "-") product}
    product = power {["*" | "/" | \cdot | \times] power}
    power   = atom ["^" group]
    atom    = number | \pi | \frac group group | \sqrt ["[" sum "]"] group
              | "(" sum ")" | "{" sum "}"
    """

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._place = 0
        self._depth = 0

    def peek(self) -> str | None:
        """The next token; None behind the last."""
        return self._tokens[self._place] if self._place < len(self._tokens) else None

    def _take(self, *expected: str) -> str:
        token = self.peek()
        if token is None or expected and token not in expected:
            raise _NoNumberError
        self._place += 1
        return token

    def sum(self) -> float:
        """A sum."""
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NoNumberError
        sign = -1.0 if self.peek() in ("+", "-") and self._take() == "-" else 1.0
        total = sign * self._product()
        while self.peek() in ("+", "-"):
            sign = -1.0 if self._take() == "-" else 1.0
            total += sign * self._product()
        self._depth -= 1
        return total

    def _product(self) -> float:
        value = self._power()
        while (token := self.peek()) not in (None, "+", "-", ")", "]", "}"):
            if token == "/":
                self._take()
                value /= self._power()
            else:
                if token in ("*", "\\cdot", "\\times"):
                    self._take()
                elif token[0].isdigit() or token == "\\frac":
                    raise _NoNumberError  # no product: 2 3, or one and a half, written 1\frac12
                value *= self._power()
        return value

    def _power(self) -> float:
        base = self._atom()
        if self.peek() != "^":
            return base
        self._take()
        exponent = self._group()
        if base < 0 and not exponent.is_integer():
            raise _NoNumberError
        return base**exponent

    def _atom(self) -> float:
        token = self._take()
        if token[0].isdigit() or token[0] == "." and len(token) > 1:
            return float(token)
        if token == "\\pi":
            return math.pi
        if token == "\\frac":
            return self._group() / self._group()
        if token == "\\sqrt":
            return self._root()
        if token in ("(", "{"):
            value = self.sum()
            self._take(")" if token == "(" else "}")
            return value
        raise _NoNumberError

    def _root(self) -> float:
        degree = 2.0
        if self.peek() == "[":
            self._take()
            degree = self.sum()
            self._take("]")
        value = self._group()
        if value < 0:
            raise _NoNumberError
        return math.sqrt(value) if degree == 2.0 else value ** (1 / degree)

    def _group(self) -> float:
        r"""What stands in braces, or the single digit or command without them: \frac12, \sqrt5."""
        token = self.peek()
        if token == "{":
            return self._atom()
        if token is not None and token.isdigit() and len(token) > 1:
            self._tokens[self._place : self._place + 1] = list(token)
        return self._atom()
