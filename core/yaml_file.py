"""A YAML file as a tree, with the line of every key; and single keys set from the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .errors import ConfigError


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """Read a file whose top is a mapping, or that is empty: what it says, and the line of each key.

    Raises:
        ConfigError: it cannot be read, is not YAML, or has a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", fix="`tandem serve` without a file serves the demo model") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines = dict(_key_lines(path, node)) if node is not None else {}
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of sections, found {type(tree).__name__}")
    return tree, lines


def _key_lines(path: Path, node: yaml.Node, above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """Line numbers of all keys; refuses a key that is written twice, where YAML would keep the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            here = (*above, str(key.value))
            if here in seen:
                raise ConfigError(f"{path}:{key.start_mark.line + 1}: {'.'.join(here)} is given twice")
            seen.add(here)
            yield here, key.start_mark.line + 1
            yield from _key_lines(path, value, here)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            yield from _key_lines(path, value, (*above, str(index)))


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set one key of what a file says.

    Args:
        tree: changed.
        override: "kv.block_tokens=32"; the value is YAML.

    Raises:
        ConfigError: it is no such text, or leads through a value.
    """
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise ConfigError(f"--set {override}: expected KEY=VALUE", fix="for example --set kv.block_tokens=32")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {override}: the value is not YAML") from None
    for name in names[:-1]:
        below = tree.setdefault(name, {})
        if below is None:
            below = tree[name] = {}
        if not isinstance(below, dict):
            raise ConfigError(f"--set {override}: {name} is a value, not a section")
        tree = below
    tree[names[-1]] = value
