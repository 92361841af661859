"""Which metrics and labels a PromQL expression speaks of, read off its tokens."""

from __future__ import annotations

import re
from typing import NamedTuple

_TOKEN = re.compile(
    r"""\s*(?:
    (?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
    |(?P<duration>\[[^\]]*\])
    |(?P<number>[0-9][0-9.eE]*)
    |(?P<name>[A-Za-z_:$][A-Za-z0-9_:$]*)
    |(?P<sign>=~|!~|!=|==|>=|<=|[-+*/%^(){},=<>])
    )""",
    re.VERBOSE,
)
_GROUPING = {"by", "without", "on", "ignoring", "group_left", "group_right"}
_OPERATORS = {"and", "or", "unless", "bool", "offset"}
_FUNCTIONS = {
    "avg", "count", "delta", "histogram_quantile", "increase", "label_values", "max", "min", "rate", "sum", "time",
}  # fmt: skip
_MATCHERS = {"=", "!=", "=~", "!~"}


class Spoken(NamedTuple):
    """What an expression names."""

    metrics: dict[str, dict[str, str]]
    """The name of each series → labels that it is selected by, with "operator value"."""
    grouping: set[str]
    """Labels of by, on, ignoring, …"""


def read_promql(expression: str) -> Spoken:
    """Raises ValueError for what it does not understand."""
    tokens = _tokens(expression)
    spoken = Spoken({}, set())
    position = 0
    while position < len(tokens):
        kind, text = tokens[position]
        position += 1
        following = tokens[position][1] if position < len(tokens) else ""
        if kind != "name" or text in _OPERATORS:
            continue
        if text in _GROUPING:
            if following == "(":
                position, labels = _names(tokens, position)
                spoken.grouping.update(labels)
        elif text in _FUNCTIONS:
            if text == "label_values":  # Grafana's own: a metric, and a label of it
                position, (metric, label) = _names(tokens, position)
                spoken.metrics.setdefault(metric, {})
                spoken.grouping.add(label)
        elif following == "(":
            raise ValueError(f"{text} is not a function that is known here: {expression}")
        else:
            selected = spoken.metrics.setdefault(text, {})
            if following == "{":
                position = _matchers(tokens, position + 1, selected)
    return spoken


def _tokens(expression: str) -> list[tuple[str, str]]:
    tokens: list[tuple[str, str]] = []
    position = 0
    while expression[position:].strip():
        match = _TOKEN.match(expression, position)
        if match is None:
            raise ValueError(f"not understood from {expression[position:]!r}")
        tokens.append((str(match.lastgroup), match[0].strip()))
        position = match.end()
    for opening, closing in ("()", "{}"):
        texts = [text for _, text in tokens]
        if texts.count(opening) != texts.count(closing):
            raise ValueError(f"{opening} and {closing} do not match: {expression}")
    return tokens


def _names(tokens: list[tuple[str, str]], position: int) -> tuple[int, list[str]]:
    """Of a list in parentheses that starts here."""
    names = []
    while tokens[position][1] != ")":
        if tokens[position][0] == "name":
            names.append(tokens[position][1])
        position += 1
    return position + 1, names


def _matchers(tokens: list[tuple[str, str]], position: int, selected: dict[str, str]) -> int:
    while tokens[position][1] != "}":
        if tokens[position][1] == ",":
            position += 1
            continue
        (name_kind, name), (_, operator), (value_kind, value) = tokens[position : position + 3]
        if name_kind != "name" or operator not in _MATCHERS or value_kind != "string":
            raise ValueError(f"not a matcher: {name} {operator} {value}")
        selected[name] = f"{operator} {value[1:-1]}"
        position += 3
    return position + 1
