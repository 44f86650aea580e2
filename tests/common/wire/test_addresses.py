import socket as stdlib_socket
from pathlib import Path

import pytest

from common.wire import WireError, is_local, open_dealer, open_router
from tests.builders_wire import a_router, is_heard


@pytest.mark.parametrize(
    ("address", "local"),
    [
        ("ipc:///run/socket", True),
        ("tcp://127.0.0.1:5", True),
        ("tcp://127.9.9.9:5", True),
        ("tcp://localhost:5", True),
        ("tcp://[::1]:5", True),
        ("tcp://0.0.0.0:5", False),
        ("tcp://*:5", False),
        ("tcp://10.0.0.1:5", False),
        ("tcp://example:5", False),
        ("tcp://127.0.0.1:5;10.0.0.1:5", False),
        ("tcp://127.0.0.1.example:5", False),
    ],
)
def test_only_loopback_and_paths_are_local(address: str, local: bool):
    assert is_local(address) is local


@pytest.mark.parametrize("open_socket", [open_dealer, open_router])
async def test_an_address_that_others_can_reach_needs_keys(open_socket: object):
    with pytest.raises(WireError, match=r"can be reached from other machines, so it needs keys"):
        async with open_socket("tcp://0.0.0.0:0", max_frame_bytes=1):  # type: ignore[operator]
            pass


@pytest.mark.parametrize("address", ["", "127.0.0.1:5", "http://127.0.0.1:5", "inproc://x"])
async def test_what_is_no_address_is_refused_with_an_example(address: str):
    with pytest.raises(WireError, match="is not an address; it must be like tcp://HOST:PORT"):
        async with open_dealer(address):
            pass


async def test_a_port_that_is_taken_is_named():
    async with a_router() as router:
        with pytest.raises(WireError, match=f"cannot listen on {router.address}: Address already in use"):
            async with a_router(router.address):
                pass


async def test_a_path_that_another_process_listens_at_is_left_to_it(tmp_path: Path):
    async with a_router(f"ipc://{tmp_path}/s") as router, open_dealer(router.address) as dealer:
        with pytest.raises(WireError, match="another process does; stop it or choose another path"):
            async with a_router(router.address):
                pass
        assert await is_heard(router, dealer)


async def test_a_path_that_a_dead_process_left_behind_is_taken(tmp_path: Path):
    with stdlib_socket.socket(stdlib_socket.AF_UNIX) as dead:
        dead.bind(f"{tmp_path}/s")
    async with a_router(f"ipc://{tmp_path}/s") as router, open_dealer(router.address) as dealer:
        assert await is_heard(router, dealer)


async def test_a_file_in_the_place_of_a_socket_is_not_overwritten(tmp_path: Path):
    (tmp_path / "notes").write_text("precious")
    with pytest.raises(WireError, match="there is a file already"):
        async with a_router(f"ipc://{tmp_path}/notes"):
            pass
    assert (tmp_path / "notes").read_text() == "precious"


async def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path):
    with pytest.raises(WireError, match=f"{tmp_path}/x+ has more than 107 bytes"):
        async with a_router(f"ipc://{tmp_path}/{'x' * 100}"):
            pass
