"""Guard: a line of the code that something rests upon, what it is broken into, and the test that must notice."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard:
    missing: str  # what goes wrong without it
    file: str
    code: str  # once in the file
    broken: str
    test: str  # FILE::NAME below tests/

    def __str__(self) -> str:
        return self.missing

    def break_in(self, root: Path) -> None:
        """Raises ValueError unless the code is there exactly once."""
        path = root / self.file
        source = path.read_text()
        if source.count(self.code) != 1:
            raise ValueError(f"{self.file} has {source.count(self.code)} times {self.code!r}; the entry must follow it")
        path.write_text(source.replace(self.code, self.broken))
