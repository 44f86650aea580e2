"""One frozen dataclass per process is the only declaration of its settings: flag, TOML key, default and help.

A flag beats the file, the file beats the default. Unknown keys, wrong types and impossible values end the program
with one sentence before any work.
"""

import argparse
import difflib
import inspect
import sys
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from common.setting import ConfigError, Setting, option, settings_of, to_toml

__all__ = ["ConfigError", "option", "parse", "parse_or_raise", "write_resolved"]

C = TypeVar("C")


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
    """The settings from flags and file; raises ConfigError for a mistake in either.

    table: the one of the file that holds this process's settings; known_tables: those that other processes read too.
    """
    settings = settings_of(cls)
    flags = _read_flags(_argument_parser(cls, settings, program, table, epilog), settings, argv)
    path = flags.pop("config")
    values = _read_table(path, table, known_tables, settings) if path is not None else {}
    for setting in settings:
        if (given := flags[setting.name]) is not None:
            values[setting.name] = setting.from_flag(given, values.get(setting.name))
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
    for setting in settings_of(type(config)):
        value = getattr(config, setting.name)
        if value is not None or setting.default is not None:
            lines.append(f"{setting.name} = {to_toml(value)}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Mistakes in flags are told like those in the file: in a sentence, without the list of all flags."""
        raise ConfigError(f"{message}; {self.prog} --help lists the flags")


def _argument_parser(
    cls: type[Any], settings: Sequence[Setting], program: str, table: str, epilog: str
) -> argparse.ArgumentParser:
    required = [f"{setting.flag} {_metavar(setting)}" for setting in settings if setting.is_required]
    parser = _Parser(
        prog=program,
        usage=" ".join([program, *required, "[--config FILE] [flags]"]),
        description=inspect.getdoc(cls),
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
    text = setting.help
    if setting.is_required:
        text += " (required)"
    elif setting.default not in (None, "", (), {}):
        text += f" (default: {_shown(setting.default)})"
    text = text.replace("%", "%%")
    if setting.kind is bool:
        parser.add_argument(*setting.flags, action=argparse.BooleanOptionalAction, default=None, help=text)
        return
    action = "append" if setting.kind in (dict, tuple) else "store"
    parser.add_argument(*setting.flags, action=action, default=None, metavar=_metavar(setting), help=text)


def _metavar(setting: Setting) -> str:
    if setting.choices:
        return "|".join(map(str, setting.choices))
    return {int: "N", float: "X", Path: "PATH", dict: "NAME=NUMBER"}.get(setting.kind, "TEXT")


def _shown(default: Any) -> str:
    """As a person would write it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    if isinstance(default, tuple):
        return " ".join(default)
    if hasattr(default, "to_toml"):
        return str(default.to_toml())
    return str(default)


def _read_flags(parser: argparse.ArgumentParser, settings: Iterable[Setting], argv: Sequence[str]) -> dict[str, Any]:
    values, unknown = parser.parse_known_args(list(argv))
    if unknown:
        word = unknown[0].partition("=")[0]
        known = ["--config", *(flag for setting in settings for flag in setting.flags)]
        raise ConfigError(f"unknown flag {word}{_hint(word, known, f'{parser.prog} --help lists the flags')}")
    return vars(values)


def _read_table(path: Path, table: str, known_tables: Sequence[str], settings: Iterable[Setting]) -> dict[str, Any]:
    document = _read_document(path)
    for name, content in document.items():
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: {name} stands outside of a table; write it below [{table}]")
        if name not in known_tables:
            raise ConfigError(f"{path}: unknown table [{name}]{_hint(name, known_tables)}")
    by_name = {setting.name: setting for setting in settings}
    values: dict[str, Any] = {}
    for key, value in document.get(table, {}).items():
        if key not in by_name:
            raise ConfigError(f"{path}: unknown key {key} in [{table}]{_hint(key, by_name)}")
        values[key] = by_name[key].from_toml(value, f"{path}: {key}")
    return values


def _read_document(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not TOML: {error}") from error


def _hint(word: str, known: Iterable[str], otherwise: str = "") -> str:
    """What was probably meant; then where to read on, which is the known words themselves if nothing else is said."""
    close = difflib.get_close_matches(word, known, n=1)
    return (f"; did you mean {close[0]}? " if close else "; ") + (otherwise or f"known: {', '.join(sorted(known))}")
