"""Two nodes on one machine: each a network namespace of its own, a cable between them."""

import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from common.keys import ServerKeys, ensure_client_key, load_client_key
from common.wire import curve_keypair
from tests.system.processes import LEARNER, Stage

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Node:
    namespace: str
    host: str  # its address on the cable

    @property
    def within(self) -> tuple[str, ...]:
        """Words that run a command on this node."""
        return ("ip", "netns", "exec", self.namespace)


def ip(*words: str) -> None:
    try:
        done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False, timeout=10)
    except FileNotFoundError:
        pytest.skip("there is no `ip` command on this machine")
    if done.returncode != 0:
        pytest.skip(f"this kernel or user has no network namespaces: ip {' '.join(words)}: {done.stderr.strip()}")


@pytest.fixture
def nodes() -> Iterator[tuple[Node, Node]]:
    number = os.getpid()
    pair = (Node(f"cc-{number}-a", "10.231.77.1"), Node(f"cc-{number}-b", "10.231.77.2"))
    ends = ("cc-a", "cc-b")
    made: list[str] = []
    try:
        for node in pair:
            ip("netns", "add", node.namespace)
            made.append(node.namespace)
        [first, second] = [node.namespace for node in pair]
        ip("-n", first, "link", "add", ends[0], "type", "veth", "peer", "name", ends[1], "netns", second)
        for node, end in zip(pair, ends, strict=True):
            ip("-n", node.namespace, "address", "add", f"{node.host}/24", "dev", end)
            for link in (end, "lo"):
                ip("-n", node.namespace, "link", "set", link, "up")
        yield pair
    finally:
        for namespace in made:
            subprocess.run(["ip", "netns", "delete", namespace], check=True, timeout=10)


def a_strangers_key(real: Path, directory: Path) -> Path:
    """It knows the learner's public key, and is on nobody's allow-list."""
    server_public = load_client_key(real).server_public
    (directory / "allowed").mkdir(parents=True)
    return ensure_client_key(ServerKeys(public=server_public, secret=b"", directory=directory), "s", curve_keypair)


async def test_the_printed_command_joins_from_another_node_and_only_with_the_learners_key(
    stage: Stage, nodes: tuple[Node, Node], demo_model: str
):
    here, there = nodes
    listen = ("--listen", f"tcp://{here.host}:0", "--max-staleness", "1")
    run = (*LEARNER, *listen, "--total-steps", "6", "--model", demo_model, "--no-tensorboard")
    learner = await stage.start(*run, within=here.within)
    words = await learner.join_command()
    [*join, flag, key] = words
    assert (flag, key) == ("--key", str(stage.path / "run/keys/rollout-server.key"))
    assert join[2].startswith(f"tcp://{here.host}:")

    strangers_key = a_strangers_key(Path(key), stage.path / "strangers")
    stranger = await stage.start(*join, flag, str(strangers_key), "--name", "stranger", within=there.within)
    assert "it needs keys: give the key file the learner wrote, with --key" in await stage.fails(
        *join, within=there.within
    )
    server = await stage.start(*words, within=there.within)
    for command in (learner, server):
        assert await command.exit_code() == 0, repr(command)
    assert stage.steps() == [1, 2, 3, 4, 5, 6]

    assert "is not on" in learner.log
    assert "server stranger" not in learner.log
    await stranger.says("waiting for the learner at tcp://.*is the key one of its run")
    stranger.send_signal(signal.SIGTERM)
    assert await stranger.exit_code() == 128 + signal.SIGTERM
    assert await stage.has_no()
