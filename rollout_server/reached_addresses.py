"""By which addresses sockets that are bound somewhere are reached from elsewhere."""

import socket


def with_host_of(reached: str, bound: str) -> str:
    """A socket bound on all networks is reached at the host that reached its neighbour."""
    host, _, port = bound.removeprefix("tcp://").rpartition(":")
    if host in ("*", "0.0.0.0", "[::]"):
        return f"tcp://{reached.removeprefix('tcp://').rpartition(':')[0]}:{port}"
    return bound


def own_address_towards(address: str) -> str:
    """tcp://HOST:0 of the network over which `address` is reached; loopback where that is a path."""
    if not address.startswith("tcp://"):
        return "tcp://127.0.0.1:0"
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, int(port)))  # sends nothing
        return f"tcp://{probe.getsockname()[0]}:0"
