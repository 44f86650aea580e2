import shlex
import socket
from pathlib import Path

import pytest

from common.lifecycle import UserError
from learner.config import LearnerConfig
from learner.joining import checked_model_len, join_command, listen_address, needs_keys, weights_address
from learner.run_directory import RunDirectory


@pytest.fixture
def run(tmp_path) -> RunDirectory:
    return RunDirectory(path=tmp_path, run_id="abc", lineage=1, private=tmp_path)


def test_a_server_on_the_same_machine_joins_by_the_address_alone(run):
    command = join_command(LearnerConfig(), run, "tcp://127.0.0.1:5557")
    assert command == "rollout-server --learner tcp://127.0.0.1:5557"


def test_a_server_on_another_machine_is_given_a_host_it_can_resolve_and_the_key_file(run):
    config = LearnerConfig(listen="tcp://0.0.0.0:5557", advertise_host="trainer.example")
    key = run.path / "keys" / "rollout-server.key"
    assert join_command(config, run, "tcp://0.0.0.0:5557") == (
        f"rollout-server --learner tcp://trainer.example:5557 --key {key}"
    )
    unnamed = join_command(LearnerConfig(listen="tcp://*:5557"), run, "tcp://0.0.0.0:5557")
    assert f"tcp://{socket.getfqdn()}:5557" in unnamed


def test_the_command_can_be_pasted_even_when_a_path_has_spaces(tmp_path):
    run = RunDirectory(path=tmp_path / "my run", run_id="abc", lineage=1, private=tmp_path)
    words = shlex.split(join_command(LearnerConfig(listen="tcp://10.0.0.1:1"), run, "tcp://10.0.0.1:1"))
    assert words[-1] == str(tmp_path / "my run" / "keys" / "rollout-server.key")


@pytest.mark.parametrize(
    ("listen", "weights_listen", "expected"),
    [
        ("tcp://127.0.0.1:0", None, False),
        ("ipc:///run/a", None, False),
        ("tcp://10.0.0.1:0", None, True),
        ("tcp://*:0", None, True),
        ("tcp://127.0.0.1:0", "tcp://10.0.0.1:0", True),
    ],
)
def test_the_command_names_the_key_exactly_when_somebody_on_another_machine_could_connect(
    run, listen, weights_listen, expected
):
    config = LearnerConfig(listen=listen, weights_listen=weights_listen)
    assert needs_keys(config) is expected
    assert ("--key" in join_command(config, run, "tcp://127.0.0.1:5557")) is expected


def test_weights_are_served_on_the_same_network_unless_told_otherwise():
    assert weights_address(LearnerConfig(listen="tcp://10.0.0.1:5557")) == "tcp://10.0.0.1:0"
    assert weights_address(LearnerConfig(listen="ipc:///run/learner")) == "ipc:///run/learner-weights"
    assert weights_address(LearnerConfig(weights_listen="tcp://10.0.0.2:1")) == "tcp://10.0.0.2:1"


@pytest.mark.parametrize("listen", ["tcp://127.0.0.1:0", "tcp://127.0.0.1:*"])
def test_a_resumed_run_takes_its_free_port_again(run, listen):
    config = LearnerConfig(listen=listen)
    assert listen_address(config, run) == listen
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run.remember_address(f"tcp://127.0.0.1:{port}")
    assert listen_address(config, run) == f"tcp://127.0.0.1:{port}"


def test_a_port_somebody_else_took_meanwhile_is_not_insisted_on(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run.remember_address(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        assert listen_address(LearnerConfig(), run) == "tcp://127.0.0.1:0"


def test_a_port_that_was_chosen_is_kept(run):
    run.remember_address("tcp://127.0.0.1:1234")
    assert listen_address(LearnerConfig(listen="tcp://127.0.0.1:5557"), run) == "tcp://127.0.0.1:5557"


def test_lengths_beyond_the_model_are_refused_and_its_own_is_the_default():
    assert checked_model_len(LearnerConfig(max_new_tokens=100), 128) == 128
    assert checked_model_len(LearnerConfig(max_new_tokens=50, max_model_len=64), 128) == 64
    assert checked_model_len(LearnerConfig(max_new_tokens=50), 128) == 128
    assert checked_model_len(LearnerConfig(max_new_tokens=50), 1 << 20) == 2 * 50 + 1024  # what memory is bounded by
    with pytest.raises(UserError, match="max_model_len 512 is more than the 128 tokens the model can do"):
        checked_model_len(LearnerConfig(max_model_len=512), 128)
    with pytest.raises(UserError, match="max_new_tokens 128 leaves no room for a prompt within 128 tokens"):
        checked_model_len(LearnerConfig(max_new_tokens=128), 128)


def test_keys_lie_in_the_run_directory(run):
    assert Path(join_command(LearnerConfig(listen="tcp://*:1"), run, "tcp://h:1").split()[-1]).parent == run.keys
