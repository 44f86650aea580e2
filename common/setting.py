"""Setting: one field of a configuration, as a flag and as a TOML key."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, Union


class ConfigError(ValueError):
    """A setting that cannot be used, and what to write instead."""


def option(default: Any = MISSING, *, help: str, short: str = "") -> Any:
    """A setting: a dataclass field with its help. Without a default it must be given.

    A mutable default is made by a function: option(dict, help=...) is an empty dict. short: another name of the flag.
    """
    metadata = {"help": help, "short": short}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def settings_of(cls: type[Any]) -> "list[Setting]":
    hints = typing.get_type_hints(cls)
    return [_setting(field, hints[field.name]) for field in dataclasses.fields(cls)]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What may be written for one field: text, numbers, true or false, paths, lists of texts, tables of numbers.

    Or what a class of its own reads, with from_toml(value) that raises ValueError, and writes, with to_toml().
    """

    field: Field[Any]
    kind: Any  # str, int, float, bool, Path, tuple, dict, or such a class
    choices: tuple[Any, ...] = ()
    is_optional: bool = False

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def flags(self) -> list[str]:
        """All names of the flag, its own first."""
        short = self.field.metadata["short"]
        return [self.flag, f"--{short}"] if short else [self.flag]

    @property
    def help(self) -> str:
        return str(self.field.metadata["help"])

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        """MISSING for a setting that must be given."""
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.field.default

    def from_flag(self, given: Any, in_file: Any) -> Any:
        """The value of flags, which arrive as text or as lists of it; pairs are added to the table in the file."""
        if self.kind is dict:
            return {**(in_file or {}), **dict(self._pair(text) for text in given)}
        if self.kind in (int, float):
            given = _number(given, self.kind)
        return self.from_toml(given, self.flag)

    def from_toml(self, value: Any, where: str) -> Any:
        """The value as its type; raises ConfigError naming `where` it came from. Empty text is no value."""
        if self.is_optional and value == "":
            return None
        if _reads_itself(self.kind):
            return _read_by(self.kind, value, where)
        converted = _convert(value, self.kind)
        if converted is _WRONG:
            raise ConfigError(f"{where} must be {_NOUNS[self.kind]}, got {value!r}")
        if self.choices and converted not in self.choices:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, self.choices))}; got {value!r}")
        return converted

    def _pair(self, text: str) -> tuple[str, float]:
        name, _, number = text.partition("=")
        name, value = name.strip(), _convert(_number(number, float), float)
        if not name or value is _WRONG:
            raise ConfigError(f"{self.flag} takes NAME=NUMBER, got {text!r}")
        return name.replace("-", "_"), value


def _reads_itself(kind: Any) -> bool:
    return hasattr(kind, "from_toml")


def _read_by(kind: Any, value: Any, where: str) -> Any:
    try:
        return kind.from_toml(value)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


_WRONG = object()
_NOUNS = {
    str: "text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    Path: "a path",
    tuple: "a list of texts",
    dict: "a table of numbers",
}


def _number(text: str, kind: Any) -> Any:
    """The number that a text stands for; the text itself when it stands for none."""
    try:
        return kind(text)
    except ValueError:
        return text


def _convert(value: Any, kind: Any) -> Any:
    """A value of a TOML document as `kind`; _WRONG when it is something else."""
    if kind is float:
        return _float(value)
    if kind is tuple:
        return tuple(value) if isinstance(value, list) and all(isinstance(item, str) for item in value) else _WRONG
    if kind is dict:
        numbers = {key: _float(item) for key, item in value.items()} if isinstance(value, dict) else {"": _WRONG}
        return _WRONG if _WRONG in numbers.values() else numbers
    if kind is Path:
        return Path(value) if isinstance(value, str) and value else _WRONG
    return value if type(value) is kind else _WRONG


def _float(value: Any) -> Any:
    if type(value) not in (int, float):
        return _WRONG
    try:
        return _WRONG if math.isnan(value) else float(value)
    except OverflowError:  # a whole number that no float can hold
        return _WRONG


def _setting(field: Field[Any], hint: Any) -> Setting:
    is_optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        [hint] = [part for part in typing.get_args(hint) if part is not type(None)]
        is_optional = True
    choices: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        [hint] = {type(choice) for choice in choices}
    kind = typing.get_origin(hint) or hint
    assert kind in _NOUNS or _reads_itself(kind), f"{field.name}: settings cannot be of type {hint}"
    return Setting(field=field, kind=kind, choices=choices, is_optional=is_optional)


def to_toml(value: Any) -> str:
    """A value of a setting as TOML; None is written as the empty text that is read as None."""
    if hasattr(value, "to_toml"):
        return to_toml(value.to_toml())
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(key)} = {to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "[" + ", ".join(to_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return _quoted("" if value is None else str(value))


_ESCAPES = {code: f"\\u{code:04x}" for code in (*range(0x20), 0x7F)} | {ord('"'): '\\"', ord("\\"): "\\\\"}


def _quoted(text: str) -> str:
    return f'"{text.translate(_ESCAPES)}"'
