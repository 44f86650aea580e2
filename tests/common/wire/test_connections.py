"""Connections over real sockets: the kernel counts what was received, and one can be ended without the others."""

import asyncio
import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from common.keys import ServerKeys, ensure_server_keys
from common.wire import connections as connections_module
from common.wire import curve_keypair, open_dealer
from common.wire.connections import Connections, Ending, Limits
from common.wire.refusals import Refusals
from tests.builders_wire import TIMEOUT_S, a_client_key, a_router

NOBODY: frozenset[str] = frozenset()


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Listener:
    """A TCP port, and the connections it has accepted; nobody reads what arrives, unless told to."""

    def __init__(self, stack: ExitStack, **limits: int) -> None:
        self._stack = stack
        self._socket = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.port = self._socket.getsockname()[1]
        self.refusals = Refusals()
        self.clock = Clock()
        generous = {"held_bytes": 1 << 30, "held_bytes_of_all": 1 << 30, "connections": 100, "silent_connections": 100}
        self.connections = Connections(self.port, self.refusals, Limits(**(generous | limits)), now=self.clock)

    def accept(self) -> tuple[socket.socket, socket.socket]:
        """(their end, our end) of a new connection."""
        theirs = self._stack.enter_context(socket.create_connection(("127.0.0.1", self.port)))
        ours = self._stack.enter_context(self._socket.accept()[0])
        for end in (theirs, ours):
            end.settimeout(TIMEOUT_S)
        self.connections.accept(ours.fileno())
        return theirs, ours

    def talkative(self, key: str) -> tuple[socket.socket, socket.socket]:
        """Likewise, of a peer that has sent a message."""
        theirs, ours = self.accept()
        self.connections.note(ours.fileno(), key, 0)
        return theirs, ours


@contextmanager
def a_listener(**limits: int) -> Iterator[Listener]:
    with ExitStack() as stack:
        yield Listener(stack, **limits)


def send(theirs: socket.socket, ours: socket.socket, num_bytes: int) -> None:
    """Sent, and read by ZeroMQ, as it were."""
    while num_bytes:
        piece = min(num_bytes, 1 << 16)  # no more than the kernel takes at once
        theirs.sendall(bytes(piece))
        num_bytes -= piece
        while piece:
            piece -= len(ours.recv(piece))


def is_open(end: socket.socket) -> bool:
    end.setblocking(False)
    try:
        return end.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False


@pytest.fixture(params=["plain", "encrypted"])
def keys(request: pytest.FixtureRequest, tmp_path: Path) -> ServerKeys | None:
    return ensure_server_keys(tmp_path / "keys", curve_keypair) if request.param == "encrypted" else None


async def test_what_was_received_as_messages_is_what_the_kernel_has_counted_to_the_byte(
    keys: ServerKeys | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(connections_module, "BESIDE_MESSAGES_BYTES", 0)
    rng = random.Random(0)
    sizes = [*range(0, 300, 7), 220, 221, 222, 223, 254, 255, 256, 257, *(rng.randrange(200_000) for _ in range(100))]
    key = a_client_key(keys) if keys is not None else None
    async with a_router(keys=keys) as router, open_dealer(router.address, key=key) as dealer:
        watched = router._watch._connections
        assert watched is not None
        received = 0
        async with asyncio.timeout(TIMEOUT_S):
            for header in sizes:
                await dealer.send([bytes(header), bytes(rng.choice(sizes))])
            while received < len(sizes):
                received += len(await router.receive())
        watched.look(NOBODY)
        handshake_and_heartbeats = 1_000
        assert 0 <= watched.held_bytes < handshake_and_heartbeats


def test_what_is_read_and_not_received_is_held():
    with a_listener() as listener:
        theirs, ours = listener.talkative("a")
        send(theirs, ours, 3_000_000)
        listener.connections.note(ours.fileno(), "a", 1_000_000)
        listener.connections.look(NOBODY)
        assert listener.connections.held_bytes == 2_000_000 - connections_module.BESIDE_MESSAGES_BYTES
        listener.connections.note(ours.fileno(), "a", 2_000_000)
        listener.connections.look(NOBODY)
        assert repr(listener.connections) == "<Connections 1 open, 0 bytes held>"


def test_what_waits_in_the_kernel_is_not_held():
    with a_listener(held_bytes=0) as listener:
        theirs, _ours = listener.talkative("a")
        theirs.sendall(bytes(200_000))
        listener.connections.look(NOBODY)
        assert is_open(theirs)


def test_a_connection_that_holds_more_than_it_may_is_cut_and_others_stay():
    with a_listener(held_bytes=1_000_000) as listener:
        greedy, greedy_end = listener.talkative("a")
        modest, modest_end = listener.talkative("a")
        send(greedy, greedy_end, 1_000_000 + connections_module.BESIDE_MESSAGES_BYTES + 1)
        send(modest, modest_end, 1_000_000 + connections_module.BESIDE_MESSAGES_BYTES)
        listener.connections.look(NOBODY)
        assert (is_open(greedy), is_open(modest)) == (False, True)
        assert listener.refusals.counts() == {"overlong": 1}


def test_heartbeats_are_not_held_against_a_connection_however_long_it_is_there():
    with a_listener(held_bytes=0) as listener:
        theirs, ours = listener.talkative("a")
        send(theirs, ours, connections_module.BESIDE_MESSAGES_BYTES)
        for _ in range(3):
            send(theirs, ours, connections_module.BESIDE_MESSAGES_BYTES_PER_S * 1000)
            listener.clock.now_s += 1000.0
            listener.connections.look(NOBODY)
        assert is_open(theirs)


def test_when_all_together_hold_too_much_the_heaviest_goes_first():
    with a_listener(held_bytes_of_all=5_000_000) as listener:
        ends = {size: listener.talkative("a") for size in (2_000_000, 4_000_000, 3_000_000)}
        for size, (theirs, ours) in ends.items():
            send(theirs, ours, size)
        listener.connections.look(NOBODY)
        assert {size: is_open(theirs) for size, (theirs, _) in ends.items()} == {
            2_000_000: True,
            4_000_000: False,
            3_000_000: True,
        }


def test_connections_of_a_revoked_key_are_cut_and_those_of_other_keys_stay():
    with a_listener() as listener:
        bad, good, silent = listener.talkative("bad")[0], listener.talkative("good")[0], listener.accept()[0]
        listener.connections.look(frozenset({"bad"}))
        assert [is_open(end) for end in (bad, good, silent)] == [False, True, True]
        assert listener.refusals.counts() == {"revoked": 1}


def test_of_too_many_silent_connections_the_oldest_is_cut():
    with a_listener(silent_connections=2) as listener:
        talkative, first, second, third = (
            listener.talkative("a")[0], listener.accept()[0], listener.accept()[0], listener.accept()[0]
        )  # fmt: skip
        assert [is_open(end) for end in (talkative, first, second, third)] == [True, False, True, True]
        assert listener.refusals.counts() == {"crowding": 1}


def test_of_too_many_connections_the_newest_of_the_key_that_has_most_is_cut():
    with a_listener(connections=4) as listener:
        ends = []
        for key in ("a", "b", "b", "b", "c"):
            listener.clock.now_s += 1.0
            ends.append(listener.talkative(key)[0])
        assert [is_open(end) for end in ends] == [True, True, True, False, True]


def test_how_a_connection_ended_is_known():
    with a_listener(held_bytes=0) as listener:
        silent, talkative = listener.accept()[1], listener.talkative("a")[1]
        theirs, cut = listener.talkative("a")
        send(theirs, cut, 100_000)
        listener.connections.look(NOBODY)
        endings = [listener.connections.ended(end.fileno()) for end in (silent, talkative, cut)]
        assert endings == [Ending.UNHEARD, Ending.HEARD, Ending.CUT]
        assert listener.connections.num_ended == 3


def test_a_descriptor_that_was_given_to_something_else_meanwhile_is_left_alone():
    with a_listener(held_bytes=0) as listener, a_listener() as other:
        theirs, ours = listener.talkative("a")
        descriptor = ours.fileno()
        ours.close()
        with open("/dev/null") as file:
            assert file.fileno() == descriptor
            listener.connections.look(frozenset({"a"}))
        their_new_end, our_new_end = other.accept()
        assert our_new_end.fileno() == descriptor or their_new_end.fileno() == descriptor
        listener.connections.look(frozenset({"a"}))
        assert is_open(their_new_end)
        assert is_open(our_new_end)
        assert listener.refusals.counts() == {}
        theirs.close()


def test_a_late_message_of_a_connection_that_is_gone_is_not_counted_for_a_socket_of_another_port():
    with a_listener(held_bytes=0) as listener, a_listener() as other:
        their_end, our_end = other.accept()
        listener.connections.note(our_end.fileno(), "a", 100)
        send(their_end, our_end, 1_000_000)
        listener.connections.look(frozenset({"a"}))
        assert is_open(their_end)
        assert repr(listener.connections) == "<Connections 0 open, 0 bytes held>"


def test_a_message_that_comes_before_its_connection_was_announced_is_counted():
    with a_listener() as listener:
        theirs = socket.create_connection(("127.0.0.1", listener.port))
        with theirs, listener._socket.accept()[0] as ours:
            send(theirs, ours, 5_000_000)
            listener.connections.note(ours.fileno(), "a", 4_000_000)
            listener.connections.accept(ours.fileno())
            listener.connections.look(NOBODY)
            assert repr(listener.connections) == "<Connections 1 open, 0 bytes held>"
            assert listener.connections.ended(ours.fileno()) is Ending.HEARD
