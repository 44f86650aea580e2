"""Addresses of sockets: which ones are of this machine, and which ones cannot be used as they are."""

import ipaddress
import os
import socket
import stat
from contextlib import suppress

from common.lifecycle import UserError

MAX_IPC_PATH_BYTES = 107


class WireError(UserError):
    """An address or a key that cannot be used, and what to do about it."""


def is_local(address: str) -> bool:
    """Whether only processes of this machine can be at the other end. A host name counts as another machine's."""
    if address.startswith("ipc://"):
        return True
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_address(address: str, *, has_keys: bool, where_keys_are: str) -> None:
    """Raises WireError unless `address` is one, and others are kept out of it by keys if they can reach it."""
    if not address.startswith(("tcp://", "ipc://")):
        raise WireError(f"{address!r} is not an address; it must be like tcp://HOST:PORT")
    path = address.removeprefix("ipc://")
    if address.startswith("ipc://") and len(path.encode()) > MAX_IPC_PATH_BYTES:
        raise WireError(
            f"the path {path} has more than {MAX_IPC_PATH_BYTES} bytes, too many for a local socket; "
            "choose a shorter directory"
        )
    if not has_keys and not is_local(address):
        raise WireError(f"{address} can be reached from other machines, so it needs keys: {where_keys_are}")


def check_path_is_free(address: str) -> None:
    """Raises WireError unless the path of an ipc:// address may be taken: binding removes whatever lies there."""
    path = address.removeprefix("ipc://")
    if path == address or not os.path.exists(path):
        return
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        raise WireError(f"cannot listen on {address}: there is a file already; choose another path")
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
        probe.settimeout(1.0)
        probe.connect(path)
        raise WireError(f"cannot listen on {address}: another process does; stop it or choose another path")
