"""`countercurrent key`: who may connect to a run, while it goes on."""

from pathlib import Path

from common.keys import AllowList, ensure_client_key, load_server_keys, revoke_key
from common.wire import curve_keypair


def add_key(run_dir: Path, name: str) -> None:
    """Make a key file for one more rollout server, and let it in. Raises KeyFileError."""
    path = ensure_client_key(load_server_keys(_keys(run_dir)), name, curve_keypair)
    print(f"{path}: copy it to the node of the rollout server, which is started with --key {path.name}")


def remove_key(run_dir: Path, name: str) -> None:
    """Take a key off the allow-list. Raises KeyFileError when there is none of that name."""
    revoke_key(_keys(run_dir), name)
    print(f"{name} is revoked; its connections end within two seconds")


def list_keys(run_dir: Path) -> None:
    """Names and beginnings of the keys that are let in. Raises KeyFileError."""
    directory = load_server_keys(_keys(run_dir)).directory
    for public, name in sorted((AllowList(directory).names() or {}).items(), key=lambda item: item[1]):
        print(f"{name:<24} {public.hex()[:8]}")


def _keys(run_dir: Path) -> Path:
    return run_dir / "keys"
