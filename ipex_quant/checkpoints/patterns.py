"""Regular expressions from checkpoints, matched in bounded time.

Python's matcher backtracks, which can take exponential time. `Pattern` follows all alternatives at once: for every part
of an expression and every position where it can begin, it finds all positions where it can end. Captures are not kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_LENGTH = 1000
"""Most characters of a pattern."""

MAX_DEPTH = 20
"""Deepest nesting of groups."""

MAX_STEPS = 100_000
"""Most attempts to match a part in one match; patterns in use take a few thousand."""


@dataclass
class _Run:
    """State of one match: the text, the ends found for each part and start, and the number of steps taken."""

    text: str
    ends: dict[tuple[int, int], int] = field(default_factory=dict)
    steps: int = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise ValueError(f"a pattern takes more than {MAX_STEPS} steps to match {self.text[:100]!r}; simplify it")


_Matcher = Callable[[_Run, int], int]
"""Maps a run and a start position to the positions where a part can end, one bit each."""

_OPENINGS = re.compile(r"\((?:\?(?::|=|!|P<\w+>))?(?!\?)")
_TOKENS = re.compile(
    r"\\x[0-9a-fA-F]{2}|\\u[0-9a-fA-F]{4}|\\[^0-9xuUNpP]"  # an escape, except references
    r"|\[\^?\]?(?:\\.|[^\]\\])*\]"  # a class
    r"|[^\\\[()|*+?{]"  # any other character
    r"|\{(?!\d*,?\d*\})",  # a brace that repeats nothing
    re.DOTALL,
)
_REPEATS = re.compile(r"(?:[*+?]|\{(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\})(?P<lazy>\??)(?P<possessive>\+?)")


class Pattern:
    """A regular expression in a subset of Python's ``re`` syntax; raises ValueError for an invalid or unsupported one.

    References to groups, lookbehind, conditions, flags, and atomic and possessive parts are not supported.
    """

    def __init__(self, text: str) -> None:
        if len(text) > MAX_LENGTH:
            raise ValueError(f"a pattern of {len(text)} characters, expected at most {MAX_LENGTH}")
        try:
            re.compile(text)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is not a regular expression: {error}") from error
        self._text, self._at, self._depth, self._parts = text, 0, 0, 0
        self._match = self._alternatives()
        if self._at != len(text):
            raise self._unsupported()

    def matches(self, text: str) -> bool:
        """Whether the pattern matches at the start of `text`, as in ``re.match``; ValueError after `MAX_STEPS`."""
        return self._match(_Run(text), 0) != 0

    def _unsupported(self) -> ValueError:
        return ValueError(f"{self._text!r}: {self._text[self._at : self._at + 10]!r} is not supported in a pattern")

    def _alternatives(self) -> _Matcher:
        ways = [self._sequence()]
        while self._text.startswith("|", self._at):
            self._at += 1
            ways.append(self._sequence())

        def match(run: _Run, at: int) -> int:
            ends = 0
            for way in ways:
                ends |= way(run, at)
            return ends

        return ways[0] if len(ways) == 1 else self._remembered(match)

    def _sequence(self) -> _Matcher:
        parts = []
        while self._at < len(self._text) and self._text[self._at] not in "|)":
            parts.append(self._repeated(self._item()))

        def match(run: _Run, at: int) -> int:
            ends = 1 << at
            for part in parts:
                ends = _from_each(part, run, ends)
            return ends

        return self._remembered(match)

    def _item(self) -> _Matcher:
        if self._text[self._at] == "(":
            return self._group()
        token = _TOKENS.match(self._text, self._at)
        if token is None:
            raise self._unsupported()
        self._at = token.end()
        single = re.compile(token[0])  # matches at most one character, without backtracking

        def match(run: _Run, at: int) -> int:
            run.step()
            found = single.match(run.text, at)
            return 1 << found.end() if found else 0

        return match

    def _group(self) -> _Matcher:
        opening = _OPENINGS.match(self._text, self._at)
        if opening is None or self._depth == MAX_DEPTH:
            raise self._unsupported()
        self._at, self._depth = opening.end(), self._depth + 1
        inner = self._alternatives()
        self._depth -= 1
        self._at += 1  # the closing parenthesis, present since `re` compiled the text
        if opening[0] == "(?=":
            return lambda run, at: 1 << at if inner(run, at) else 0
        if opening[0] == "(?!":
            return lambda run, at: 0 if inner(run, at) else 1 << at
        return inner

    def _repeated(self, item: _Matcher) -> _Matcher:
        repeat = _REPEATS.match(self._text, self._at)
        if repeat is None:
            return item
        if repeat["possessive"]:
            raise self._unsupported()
        self._at = repeat.end()
        if repeat[0][0] != "{":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[repeat[0][0]]
        else:
            least = int(repeat["least"] or 0)
            most = None if repeat["comma"] and not repeat["most"] else int(repeat["most"] or least)

        def match(run: _Run, at: int) -> int:
            # More repetitions than characters add nothing: one of them would be empty.
            enough = len(run.text) - at + 1
            new = 1 << at
            for _ in range(min(least, enough)):
                new = _from_each(item, run, new)
            found = new
            for _ in range(enough if most is None else min(most - least, enough)):
                new = _from_each(item, run, new) & ~found
                if not new:
                    break
                found |= new
            return found

        return self._remembered(match)

    def _remembered(self, match: _Matcher) -> _Matcher:
        self._parts += 1
        part = self._parts

        def once(run: _Run, at: int) -> int:
            run.step()
            key = part, at
            if key not in run.ends:
                run.ends[key] = match(run, at)
            return run.ends[key]

        return once


def _from_each(part: _Matcher, run: _Run, starts: int) -> int:
    ends = 0
    while starts:
        lowest = starts & -starts
        ends |= part(run, lowest.bit_length() - 1)
        starts ^= lowest
    return ends
