"""Key files: who may talk to a run. CURVE keys as TOML with 64 hexadecimal digits.

The learner's directory holds `server.key` (its own pair), one `NAME.key` per rollout server (the one file to copy to
the other node) and `allowed/NAME.pub` per key that may connect. Deleting a .pub file revokes the key.
"""

import re
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

KeyPair = tuple[bytes, bytes]  # public, secret; 32 bytes each

_HEX_KEY = re.compile(r"[0-9a-f]{64}")


class KeyFileError(ValueError):
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
    values = _read_secret(directory / "server.key", ("public", "secret"))
    return ServerKeys(public=values["public"], secret=values["secret"], directory=directory)


def ensure_client_key(server: ServerKeys, name: str, generate: Callable[[], KeyPair]) -> Path:
    """The key file of the client `name`, generated and allowed at the first call. Copy it to the client's node."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name) or name == "server":
        raise KeyFileError(
            f"a key's name is made of letters, digits, '.', '_' and '-', and is not server; got {name!r}"
        )
    path = server.directory / f"{name}.key"
    if not path.exists():
        public, secret = generate()
        _write_secret(path, public=public, secret=secret, server_public=server.public)
        (server.directory / "allowed" / f"{name}.pub").write_text(f'public = "{public.hex()}"\n')
    return path


def load_client_key(path: Path) -> ClientKey:
    return ClientKey(**_read_secret(path, ("public", "secret", "server_public")))


class AllowList:
    """Public keys that may connect, by the name of their file; read anew whenever it is asked."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "allowed"

    def name_of(self, public: bytes) -> str | None:
        """Name of an allowed key, None for a stranger's."""
        for path in sorted(self._directory.glob("*.pub")):
            if _read_keys(path, ("public",))["public"] == public:
                return path.stem
        return None


def _write_secret(path: Path, **keys: bytes) -> None:
    text = "".join(f'{name} = "{key.hex()}"\n' for name, key in keys.items())
    path.touch(mode=0o600, exist_ok=False)
    path.write_text(text)


def _read_secret(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
    except FileNotFoundError as error:
        raise KeyFileError(
            f"there is no key file {path}; the learner writes it into keys/ of its run directory"
        ) from error
    if mode & 0o077:
        raise KeyFileError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    return _read_keys(path, names)


def _read_keys(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise KeyFileError(f"{path} is not a key file: {error}") from error
    if sorted(values) != sorted(names):
        raise KeyFileError(f"{path} must hold {', '.join(names)}; it holds {', '.join(sorted(values)) or 'nothing'}")
    for name, value in values.items():
        if not isinstance(value, str) or not _HEX_KEY.fullmatch(value):
            raise KeyFileError(f"{path}: {name} must be 64 hexadecimal digits")
    return {name: bytes.fromhex(value) for name, value in values.items()}
