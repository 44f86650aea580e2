"""One frozen dataclass per process is the only declaration of its settings: flag, TOML key, default and help.

A flag beats the file, the file beats the default. Unknown keys, wrong types and impossible values end the program
with one sentence before any work.
"""

import argparse
import dataclasses
import difflib
import json
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

C = TypeVar("C")


class ConfigError(ValueError):
    """A setting that cannot be used, and what to write instead."""


def option(default: Any = MISSING, *, help: str) -> Any:
    """A setting: a dataclass field with its help. Without a default it must be given.

    A mutable default is made by a function: option(dict, help=...) is an empty dict.
    """
    if callable(default):
        return dataclasses.field(default_factory=default, metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


def parse(
    cls: type[C], argv: Sequence[str], *, program: str, table: str, known_tables: Sequence[str], epilog: str = ""
) -> C:
    """The settings from flags and file; a mistake is printed and ends the program with exit code 2."""
    try:
        return parse_or_raise(cls, argv, program=program, table=table, known_tables=known_tables, epilog=epilog)
    except ConfigError as error:
        sys.stderr.write(f"{program}: {error}\n")
        sys.exit(2)


def parse_or_raise(
    cls: type[C], argv: Sequence[str], *, program: str, table: str, known_tables: Sequence[str], epilog: str = ""
) -> C:
    """The settings from flags and file; raises ConfigError for a mistake in either."""
    settings = _settings_of(cls)
    flags = vars(_argument_parser(cls, settings, program, table, epilog).parse_args(list(argv)))
    path = flags.pop("config")
    values = _read_table(path, table, known_tables, settings) if path is not None else {}
    for setting in settings:
        if (given := flags[setting.name]) is not None:
            values[setting.name] = setting.from_flag(given)
    missing = [setting.flag for setting in settings if setting.is_required and setting.name not in values]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given; {program} --help says what it is")
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def write_resolved(config: Any, path: Path, *, table: str) -> None:
    """Write all settings as a TOML table that parse() reads back to an equal configuration."""
    lines = [f"[{table}]"]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_to_toml(value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _to_toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_to_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(_to_toml(item) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One field, as a flag and as a TOML key."""

    field: Field[Any]
    kind: Any  # str, int, float, bool, Path, tuple or dict
    choices: tuple[Any, ...] = ()
    is_optional: bool = False

    @property
    def name(self) -> str:
        return self.field.name

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_required(self) -> bool:
        return self.field.default is MISSING and self.field.default_factory is MISSING

    @property
    def default(self) -> Any:
        if self.field.default_factory is not MISSING:
            return self.field.default_factory()
        return self.field.default

    def from_flag(self, given: Any) -> Any:
        """Flags arrive as text, or as lists of it."""
        if self.kind is dict:
            return dict(self._pair(text) for text in given)
        if self.kind is tuple:
            return tuple(given)
        return self.checked(given, self.flag)

    def checked(self, value: Any, where: str) -> Any:
        """The value as its type; raises ConfigError naming `where` it came from."""
        if self.is_optional and value == "":
            return None
        converted = _convert(value, self.kind)
        if converted is _WRONG:
            raise ConfigError(f"{where} must be {_NOUNS[self.kind]}, got {value!r}")
        if self.choices and converted not in self.choices:
            raise ConfigError(f"{where} must be one of {', '.join(map(str, self.choices))}; got {value!r}")
        return converted

    def _pair(self, text: str) -> tuple[str, float]:
        name, _, number = text.partition("=")
        value = _convert(number, float)
        if not name or value is _WRONG:
            raise ConfigError(f"{self.flag} takes NAME=NUMBER, got {text!r}")
        return name.strip().replace("-", "_"), value


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


def _convert(value: Any, kind: Any) -> Any:
    """The value as `kind`, whether it came as text or from TOML; _WRONG when it is something else."""
    if kind in (str, Path):
        return kind(value) if isinstance(value, str | Path) else _WRONG
    if kind is bool:
        return value if isinstance(value, bool) else _WRONG
    if kind is tuple:
        return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else _WRONG
    if kind is dict:
        pairs = {key: _convert(item, float) for key, item in value.items()} if isinstance(value, dict) else {"": _WRONG}
        return _WRONG if _WRONG in pairs.values() else pairs
    return _convert_number(value, kind)


def _convert_number(value: Any, kind: Callable[[Any], Any]) -> Any:
    if isinstance(value, bool) or (kind is int and isinstance(value, float)):
        return _WRONG
    try:
        return kind(value)
    except (TypeError, ValueError):
        return _WRONG


def _settings_of(cls: type[Any]) -> list[Setting]:
    hints = typing.get_type_hints(cls)
    return [_setting(field, hints[field.name]) for field in dataclasses.fields(cls)]


def _setting(field: Field[Any], hint: Any) -> Setting:
    is_optional = False
    if typing.get_origin(hint) in (Union, types.UnionType):
        [hint] = [part for part in typing.get_args(hint) if part is not type(None)]
        is_optional = True
    choices: tuple[Any, ...] = ()
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        hint = type(choices[0])
    return Setting(field=field, kind=typing.get_origin(hint) or hint, choices=choices, is_optional=is_optional)


def _argument_parser(
    cls: type[Any], settings: Sequence[Setting], program: str, table: str, epilog: str
) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=cls.__doc__,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help=f"TOML file; its table [{table}] holds any of the settings below"
    )
    for setting in settings:
        _add_flag(parser, setting)
    return parser


def _add_flag(parser: argparse.ArgumentParser, setting: Setting) -> None:
    # Flags are kept as text here, so that a mistake in a flag and one in the file are told in the same words.
    text = setting.field.metadata["help"].replace("%", "%%")
    default = setting.default
    if setting.is_required:
        text += " (required)"
    elif default is not None and default != {}:
        text += f" (default: {default})".replace("%", "%%")
    if setting.kind is bool:
        parser.add_argument(setting.flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    metavar = {int: "N", float: "X", Path: "PATH", dict: "NAME=NUMBER"}.get(setting.kind, "TEXT")
    if setting.choices:
        metavar = "|".join(map(str, setting.choices))
    action = "append" if setting.kind in (dict, tuple) else "store"
    parser.add_argument(setting.flag, action=action, default=None, metavar=metavar, help=text)


def _read_table(path: Path, table: str, known_tables: Sequence[str], settings: Sequence[Setting]) -> dict[str, Any]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error
    for name in document:
        if name not in known_tables:
            raise ConfigError(f"{path}: unknown table [{name}]{_suggestion(name, known_tables)}")
    by_name = {setting.name: setting for setting in settings}
    values: dict[str, Any] = {}
    for key, value in document.get(table, {}).items():
        if key not in by_name:
            raise ConfigError(f"{path}: unknown key {key} in [{table}]{_suggestion(key, list(by_name))}")
        values[key] = by_name[key].checked(value, f"{path}: {key}")
    return values


def _suggestion(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return (f"; did you mean {close[0]}?" if close else "") + f" known: {', '.join(sorted(known))}"
