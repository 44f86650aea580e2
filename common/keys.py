"""Keys: who may talk to a run, as files in a directory. CURVE keys, see key_files.py for what is in a file.

The learner's directory holds `server.key` (its own pair), one `NAME.key` per rollout server (the one file to copy to
the other node) and `allowed/NAME.pub` per key that may connect. Adding a .pub file admits a key, deleting it revokes
the key, both while the run is going on; the connections of a revoked key end within two seconds.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from common.key_files import KeyFileError, check_directory, read_public_key, read_secret_keys, write_keys

KeyPair = tuple[bytes, bytes]  # public, secret; 32 bytes each

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerKeys:
    """The pair of a socket that binds, and the directory that says who may connect to it."""

    public: bytes
    secret: bytes
    directory: Path

    def __repr__(self) -> str:
        return f"<ServerKeys {self.public.hex()[:8]} in {self.directory}>"  # never the secret

    @property
    def allowed(self) -> "AllowList":
        return AllowList(self.directory)


class GivenKeys:
    """Public keys that may connect, as somebody with an allow-list has named them last; nobody at first."""

    def __init__(self) -> None:
        self._names: dict[bytes, str] = {}

    def __repr__(self) -> str:
        return f"<GivenKeys, {len(self._names)} keys>"

    def replace(self, keys: Iterable[bytes]) -> None:
        """From now on these. Another thread may be looking."""
        self._names = dict.fromkeys(keys, "of another server")

    def name_of(self, public: bytes) -> str | None:
        return self._names.get(public)

    def names(self) -> dict[bytes, str]:
        return self._names


@dataclass(frozen=True, slots=True, kw_only=True)
class RelayKeys:
    """The pair of a relay's socket, and who may connect to it."""

    public: bytes
    secret: bytes
    allowed: GivenKeys

    def __repr__(self) -> str:
        return f"<RelayKeys {self.public.hex()[:8]} for {self.allowed!r}>"  # never the secret


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
        for private in (directory, directory / "allowed"):
            private.mkdir(parents=True, exist_ok=True)
            private.chmod(0o700)
        public, secret = generate()
        write_keys(path, public=public, secret=secret)
    return load_server_keys(directory)


def load_server_keys(directory: Path) -> ServerKeys:
    """Raises KeyFileError also when others could add a key to the allow-list."""
    values = read_secret_keys(directory / "server.key", ("public", "secret"))
    for private in (directory, directory / "allowed"):
        try:
            check_directory(private)
        except OSError as error:
            raise KeyFileError(f"{private} cannot be used: {error.strerror}") from error
    return ServerKeys(public=values["public"], secret=values["secret"], directory=directory)


def ensure_client_key(server: ServerKeys, name: str, generate: Callable[[], KeyPair]) -> Path:
    """The key file of the client `name`, generated and allowed at the first call. Copy it to the client's node.

    A file that was moved there instead is not replaced: its key stays allowed, and the path is returned as if it were
    here. Raises KeyFileError for a key that was revoked, or belongs to another server.
    """
    path, public_path = _paths(server.directory, name)
    if path.exists():
        _check_usable(path, load_client_key(path), server)
    elif not public_path.exists():
        public, secret = generate()
        # Allowed before it exists: a crash in between must not leave a key that looks revoked.
        write_keys(public_path, public=public)
        try:
            write_keys(path, public=public, secret=secret, server_public=server.public)
        except OSError:
            public_path.unlink()
            raise
    return path


def revoke_key(directory: Path, name: str) -> None:
    """Take the key `name` off the allow-list, and delete its file here, which is of no use any more.

    Raises KeyFileError when there is no such key.
    """
    path, public_path = _paths(directory, name)
    if not public_path.exists() and not path.exists():
        raise KeyFileError(f"there is no key {name} in {directory}")
    public_path.unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _paths(directory: Path, name: str) -> tuple[Path, Path]:
    """Of the key file, and of the file that allows the key."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}", name) or name == "server":
        raise KeyFileError(
            f"a key's name is made of letters, digits, '.', '_' and '-', and is not server; got {name!r}"
        )
    return directory / f"{name}.key", directory / "allowed" / f"{name}.pub"


def _check_usable(path: Path, key: ClientKey, server: ServerKeys) -> None:
    if key.server_public != server.public:
        raise KeyFileError(f"{path} is for another server; delete it to have a new key made")
    if AllowList(server.directory).name_of(key.public) is None:
        raise KeyFileError(f"the key {path} was revoked; delete the file to have a new key made")


def load_client_key(path: Path) -> ClientKey:
    """Raises KeyFileError when it is missing, damaged, or others can read it."""
    return ClientKey(**read_secret_keys(path, ("public", "secret", "server_public")))


class AllowList:
    """Public keys that may connect, by the name of their file; the files are read anew when one of them changed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "allowed"
        self._seen: list[tuple[str, int, int, int]] | None = None
        self._names: dict[bytes, str] = {}
        self._trouble = ""  # why nobody is let in, as it was logged

    def __repr__(self) -> str:
        return f"<AllowList {self._directory}, {len(self._names)} keys>"

    def name_of(self, public: bytes) -> str | None:
        """Name of an allowed key, None for a stranger's. A file that is damaged allows nobody, and is logged."""
        return (self.names() or {}).get(public)

    def names(self) -> dict[bytes, str] | None:
        """The names of all allowed keys; None when that cannot be found out at the moment: then nobody is let in."""
        try:
            check_directory(self._directory)
            found = self._look()
            if found != self._seen:
                self._names, self._seen = self._read([name for name, *_ in found]), found
        except FileNotFoundError:
            self._forget(f"there is no {self._directory}")
        except (OSError, KeyFileError) as error:
            self._forget(f"{self._directory} cannot be read: {error}" if isinstance(error, OSError) else str(error))
            return None
        else:
            self._trouble = ""
        return self._names

    def _forget(self, trouble: str) -> None:
        if trouble != self._trouble:
            logger.warning("nobody is let in: %s", trouble)
        self._trouble, self._seen, self._names = trouble, None, {}

    def _look(self) -> list[tuple[str, int, int, int]]:
        """(name, inode, size, time of last change in ns) of every .pub file."""
        found: list[tuple[str, int, int, int]] = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                if entry.name.endswith(".pub"):
                    with suppress(FileNotFoundError):  # deleted just now
                        file = entry.stat()
                        found.append((entry.name, file.st_ino, file.st_size, file.st_ctime_ns))
        return sorted(found)

    def _read(self, file_names: list[str]) -> dict[bytes, str]:
        names: dict[bytes, str] = {}
        for file_name in file_names:
            path = self._directory / file_name
            try:
                names[read_public_key(path)] = path.stem
            except KeyFileError as error:
                logger.warning("a key on the allow-list is skipped: %s", error)
            except FileNotFoundError:
                logger.debug("%s was deleted just now", path)
        return names
