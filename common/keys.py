"""Key files: who may talk to a run. CURVE keys as TOML with 64 hexadecimal digits.

The learner's directory holds `server.key` (its own pair), one `NAME.key` per rollout server (the one file to copy to
the other node) and `allowed/NAME.pub` per key that may connect. Adding a .pub file admits a key, deleting it revokes
the key, both while the run is going on, for the connections made from then on.
"""

import logging
import os
import re
import stat
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.lifecycle import UserError

KeyPair = tuple[bytes, bytes]  # public, secret; 32 bytes each

logger = logging.getLogger(__name__)

MAX_KEY_FILE_BYTES = 4096

_HEX_KEY = re.compile(r"[0-9a-f]{64}")


class KeyFileError(UserError):
    """A key file that is missing, damaged, or readable by others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """The pair of a socket that binds, and the directory that says who may connect to it."""

    public: bytes
    secret: bytes
    directory: Path

    def __repr__(self) -> str:
        return f"<ServerKeys {self.public.hex()[:8]} in {self.directory}>"  # never the secret


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientKey:
    """The pair of a socket that connects, and the public key it expects at the other end."""

    public: bytes
    secret: bytes
    server_public: bytes

    def __repr__(self) -> str:
        return f"<ClientKey {self.public.hex()[:8]} for server {self.server_public.hex()[:8]}>"


def ensure_server_keys(directory: Path, generate: Callable[[], KeyPair]) -> ServerKeys:
    """The directory's server pair, generated at the first call."""
    path = directory / "server.key"
    if not path.exists():
        (directory / "allowed").mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        public, secret = generate()
        _write_secret(path, public=public, secret=secret)
    return load_server_keys(directory)


def load_server_keys(directory: Path) -> ServerKeys:
    """Raises KeyFileError also when others could add a key to the allow-list."""
    values = _read_secret(directory / "server.key", ("public", "secret"))
    if stat.S_IMODE(directory.stat().st_mode) & 0o022:
        raise KeyFileError(f"others can write to {directory}, and so let themselves in; run: chmod 700 {directory}")
    return ServerKeys(public=values["public"], secret=values["secret"], directory=directory)


def ensure_client_key(server: ServerKeys, name: str, generate: Callable[[], KeyPair]) -> Path:
    """The key file of the client `name`, generated and allowed at the first call. Copy it to the client's node.

    Raises KeyFileError for a key that exists but was revoked, or belongs to another server.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) or name == "server":
        raise KeyFileError(
            f"a key's name is made of letters, digits, '.', '_' and '-', and is not server; got {name!r}"
        )
    path = server.directory / f"{name}.key"
    if not path.exists():
        public, secret = generate()
        # Allowed before it exists: a crash in between must not leave a key that looks revoked.
        (server.directory / "allowed" / f"{name}.pub").write_text(f'public = "{public.hex()}"\n')
        _write_secret(path, public=public, secret=secret, server_public=server.public)
    _check_usable(path, load_client_key(path), server)
    return path


def _check_usable(path: Path, key: ClientKey, server: ServerKeys) -> None:
    if key.server_public != server.public:
        raise KeyFileError(f"{path} is for another server; delete it to have a new key made")
    if AllowList(server.directory).name_of(key.public) is None:
        raise KeyFileError(f"the key {path} was revoked; delete the file to have a new key made")


def load_client_key(path: Path) -> ClientKey:
    return ClientKey(**_read_secret(path, ("public", "secret", "server_public")))


class AllowList:
    """Public keys that may connect, by the name of their file; the files are read anew when one of them changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "allowed"
        self._seen: list[tuple[str, int, int, int]] = []
        self._names: dict[bytes, str] = {}

    def __repr__(self) -> str:
        return f"<AllowList {self._directory}, {len(self._names)} keys>"

    def name_of(self, public: bytes) -> str | None:
        """Name of an allowed key, None for a stranger's. A file that is damaged allows nobody, and is logged."""
        try:
            found = self._look()
            if found != self._seen:
                self._names = self._read([name for name, *_ in found])
                self._seen = found
        except OSError as error:
            logger.warning("nobody is let in until %s can be read: %s", self._directory, error.strerror)
            self._seen, self._names = [], {}
        return self._names.get(public)

    def _look(self) -> list[tuple[str, int, int, int]]:
        """(name, inode, size, time of last change in ns) of every .pub file."""
        with os.scandir(self._directory) as entries:
            files = [(entry.name, entry.stat()) for entry in entries if entry.name.endswith(".pub")]
        return sorted((name, file.st_ino, file.st_size, file.st_ctime_ns) for name, file in files)

    def _read(self, file_names: list[str]) -> dict[bytes, str]:
        names: dict[bytes, str] = {}
        for file_name in file_names:
            path = self._directory / file_name
            try:
                names[_read_keys(path, path.read_bytes(), ("public",))["public"]] = path.stem
            except KeyFileError as error:
                logger.warning("a key on the allow-list is skipped: %s", error)
        return names


def _write_secret(path: Path, **keys: bytes) -> None:
    """Readable by the owner alone, and complete before it has its name. Raises FileExistsError if it has one."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".new-key-") as file:
        file.write("".join(f'{name} = "{key.hex()}"\n' for name, key in keys.items()))
        file.flush()
        os.fsync(file.fileno())
        os.link(file.name, path)


def _read_secret(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            content = file.read(MAX_KEY_FILE_BYTES + 1)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"there is no key file {path}; the learner writes it into keys/ of its run directory"
        ) from error
    except OSError as error:
        raise KeyFileError(f"the key file {path} cannot be read: {error.strerror}") from error
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    return _read_keys(path, content, names)


def _read_keys(path: Path, content: bytes, names: tuple[str, ...]) -> dict[str, bytes]:
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
