"""YAML as plain data: nothing in a file or on a command line is evaluated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from recbole_mm.errors import InputError


class Loader(yaml.SafeLoader):
    """Safe YAML that reads ``1e-3`` as a number, as RecBole's own loader does.

    A key that a mapping has twice is an error; PyYAML would take the last one.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping, none of whose keys is given twice."""
        found = set()
        for key, _ in node.value:
            if (key.tag, key.value) in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} is given twice", key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                found.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"""^(?:[-+]?[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+
        |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
        |[-+]?\.(?:inf|Inf|INF)
        |\.(?:nan|NaN|NAN))$""",
        re.X,
    ),
    list("-+0123456789."),
)


def _data_of(text: str) -> Any:
    """What a YAML text holds.

    Raises:
        yaml.YAMLError: If that is not plain data. PyYAML raises other errors too, for example
            ValueError for the date 2020-13-45.
    """
    try:
        # a SafeLoader
        return yaml.load(text, Loader=Loader)  # noqa: S506  # nosec B506
    except (ValueError, AttributeError, RecursionError) as error:
        raise yaml.YAMLError(str(error)) from error


def parse_value(text: str) -> Any:
    """A command-line value as a YAML scalar, list or mapping; text that is no YAML stays text."""
    if text in ("None", "none"):
        return None
    try:
        value = _data_of(text)
    except yaml.YAMLError:
        return text
    is_date = hasattr(value, "isoformat")
    return text if is_date or isinstance(value, bytes) else value


def read_yaml(path: Path) -> dict[str, Any]:
    """A mapping from a YAML file of plain data.

    Raises:
        InputError: If the file cannot be read, or holds anything else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"config file {path}: cannot be read ({error}); check the path") from error
    try:
        values = _data_of(text)
    except yaml.YAMLError as error:
        raise InputError(
            f"config file {path}: not valid YAML, or not plain data: {error}"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"config file {path}: must be a mapping of keys to values")
    return values


def typed_value(text: str, default: Any) -> Any:
    """Text of the command line or of ``config_dict`` as the type that its key has."""
    if isinstance(default, str):
        return None if text in ("None", "~", "null") else text
    return parse_value(text)
