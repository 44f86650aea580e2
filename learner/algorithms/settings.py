"""The settings of an algorithm: its keyword-only arguments with defaults, their bounds and their help.

clip_ratio: Annotated[float, Setting("ratios below 1 - this are clipped", at_least=0, at_most=1)] = 0.2
"""

import inspect
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any


@dataclass(frozen=True, slots=True)
class Setting:
    """What an argument means, and which values make sense."""

    help: str
    at_least: float = -math.inf
    more_than: float = -math.inf
    at_most: float = math.inf

    def admits(self, value: float) -> bool:
        return self.more_than < value <= self.at_most and value >= self.at_least

    @property
    def range(self) -> str:
        """For a sentence: "must be ..."."""
        words = []
        if self.at_least > -math.inf:
            words.append(f">= {self.at_least:g}")
        if self.more_than > -math.inf:
            words.append(f"> {self.more_than:g}")
        if self.at_most < math.inf:
            words.append(f"<= {self.at_most:g}")
        return " and ".join(words)


def settings_of(function: Callable[..., Any]) -> dict[str, float]:
    """Keyword-only arguments with defaults: the hyperparameters."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is not p.empty}


def declared_settings(function: Callable[..., Any]) -> dict[str, Setting]:
    """Of those settings of a function that say what they mean."""
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: extra
        for name, hint in hints.items()
        for extra in getattr(hint, "__metadata__", ())
        if isinstance(extra, Setting)
    }


def build(
    kind: str, table: Mapping[str, Callable[..., Any]], name: str, settings: Mapping[str, float]
) -> Callable[..., Any]:
    """`name` of the table with its settings filled in.

    Raises ValueError for a name or a setting that does not exist, with those that do, and for a value out of bounds.
    """
    if name not in table:
        raise ValueError(f"unknown {kind} {name}; known: {', '.join(sorted(table))}")
    known, declared = settings_of(table[name]), declared_settings(table[name])
    for setting, value in settings.items():
        if setting not in known:
            raise ValueError(f"{name} has no setting {setting}; it takes: {', '.join(known) or 'none'}")
        if setting in declared and not declared[setting].admits(value):
            raise ValueError(f"{setting} of {name} must be {declared[setting].range}, got {value}")
    return partial(table[name], **settings)


def parse_call(text: str) -> tuple[str, dict[str, float]]:
    """ "icepop:low=0.5,high=2" -> ("icepop", {"low": 0.5, "high": 2.0}); raises ValueError for anything else."""
    name, _, listed = text.partition(":")
    settings: dict[str, float] = {}
    for pair in listed.split(",") if listed else []:
        setting, _, number = pair.partition("=")
        try:
            settings[setting.strip().replace("-", "_")] = float(number)
        except ValueError:
            raise ValueError(f"expected NAME or NAME:SETTING=NUMBER,SETTING=NUMBER, got {text!r}") from None
    return name.strip(), settings


def describe(title: str, table: Mapping[str, Callable[..., Any]]) -> str:
    """For --help: each name with the first sentence of what it is, then its settings with defaults."""
    lines = [title]
    for name in sorted(table):
        lines.append(f"  {name:<28}  {_first_line(table[name])}")
        declared = declared_settings(table[name])
        for setting, default in settings_of(table[name]).items():
            meaning = declared[setting].help if setting in declared else ""
            lines.append(f"    {f'{setting}={default:g}':<28}{meaning}".rstrip())
    return "\n".join(lines)


def _first_line(function: Callable[..., Any]) -> str:
    return (inspect.getdoc(function) or "").partition("\n")[0]
