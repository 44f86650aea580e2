"""Reading and writing key files: TOML with 64 hexadecimal digits a key, private, and never half written."""

import os
import re
import stat
import tempfile
import tomllib
from pathlib import Path

from common.lifecycle import UserError

MAX_KEY_FILE_BYTES = 4096

_HEX_KEY = re.compile(r"[0-9a-f]{64}")


class KeyFileError(UserError):
    """A key file that is missing, damaged, or that others can read or change."""


def write_keys(path: Path, **keys: bytes) -> None:
    """Readable by the owner alone, and complete before it has its name. Raises FileExistsError if it has one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-key-") as file:
        file.write("".join(f'{name} = "{key.hex()}"\n' for name, key in keys.items()))
        file.flush()
        os.fsync(file.fileno())
        os.link(file.name, path)


def read_secret_keys(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Raises KeyFileError unless the file holds these keys, and only its owner can read it."""
    try:
        mode, content = _read(path)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"there is no key file {path}; the learner writes it into keys/ of its run directory"
        ) from error
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    return decode_keys(path, content, names)


def read_public_key(path: Path) -> bytes:
    """Raises KeyFileError unless the file holds one key, and only its owner can change it; OSError."""
    mode, content = _read(path)
    _refuse_if_others_write(path, mode)
    return decode_keys(path, content, ("public",))["public"]


def check_directory(path: Path) -> None:
    """Raises KeyFileError when others than the owner could put keys into it, OSError when it is not there."""
    _refuse_if_others_write(path, stat.S_IMODE(path.stat().st_mode))


def _refuse_if_others_write(path: Path, mode: int) -> None:
    if mode & 0o022:
        raise KeyFileError(
            f"others can write to {path} (mode {mode:o}), and so let themselves in; run: chmod go-w {path}"
        )


def _read(path: Path) -> tuple[int, bytes]:
    """Mode and content, as much as a key file may have and a byte more. Raises OSError."""
    with path.open("rb") as file:
        return stat.S_IMODE(os.fstat(file.fileno()).st_mode), file.read(MAX_KEY_FILE_BYTES + 1)


def decode_keys(path: Path, content: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
    """The keys in a file's content, by name; raises KeyFileError unless it holds exactly these."""
    if len(content) > MAX_KEY_FILE_BYTES:
        raise KeyFileError(f"{path} is not a key file: it has more than {MAX_KEY_FILE_BYTES} bytes")
    try:
        values = tomllib.loads(content.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeyFileError(f"{path} is not a key file: {error}") from error
    if sorted(values) != sorted(names):
        raise KeyFileError(f"{path} must hold {', '.join(names)}; it holds {', '.join(sorted(values)) or 'nothing'}")
    for name, value in values.items():
        if not isinstance(value, str) or not _HEX_KEY.fullmatch(value):
            raise KeyFileError(f"{path}: {name} must be 64 hexadecimal digits")
    return {name: bytes.fromhex(value) for name, value in values.items()}
