"""What cannot work is told in one sentence, before any work."""

import asyncio
import json
import secrets
import shutil
import socket
from pathlib import Path

import pytest

from common.codec import Decoder, encode
from common.messages import PROTOCOL_VERSION, CoordinatorToServer, Hello, Refused
from common.wire import open_dealer
from learner.__main__ import main as learn
from rollout_server.__main__ import main as serve
from tests.models import save_tiny_model
from tests.system.processes import LEARNER, Stage

pytestmark = pytest.mark.timeout(300)


SETTINGS = [
    (("learner", "--config", "typo.toml"), r"unknown key groups_per_stop in [learner]; did you mean groups_per_step?"),
    (("learner", "--config", "wrong.toml"), "group_size must be a whole number, got 'four'"),
    (("learner", "--queue-groups", "3"), "queue_groups 3 can never hold a batch of groups_per_step 16"),
    (("learner", "--max-staleness", "-1"), "max_staleness must be >= 0, got -1; 0 means strictly on-policy"),
    (("rollout-server",), "--learner must be given; rollout-server --help says what it is"),
    (("rollout-server", "--learner", "host:5557"), "learner must look like tcp://HOST:PORT, got 'host:5557'"),
]


@pytest.mark.parametrize(("words", "sentence"), SETTINGS)
def test_a_setting_that_cannot_be_used_is_told_before_any_work(
    words: tuple[str, ...],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    Path("typo.toml").write_text("[learner]\ngroups_per_stop = 3\n")
    Path("wrong.toml").write_text("[learner]\ngroup_size = 'four'\n")
    files = sorted(tmp_path.iterdir())
    with pytest.raises(SystemExit) as ending:
        {"learner": learn, "rollout-server": serve}[words[0]](list(words[1:]))
    assert ending.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert sentence in line
    assert sorted(tmp_path.iterdir()) == files


async def test_a_learner_that_cannot_work_says_why_in_one_sentence(stage: Stage, demo_model: str):
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        wrong = {
            ("--model", "nowhere/nothing"): "cannot load the model nowhere/nothing",
            ("--loss", "guesswork", "--model", demo_model): "unknown loss guesswork; known: cispo, decoupled_ppo, ",
            ("--max-new-tokens", "600", "--model", demo_model): "max_new_tokens 600 leaves no room for a prompt",
            ("--data", "none.jsonl", "--model", demo_model): "none.jsonl cannot be read",
            ("--listen", f"tcp://127.0.0.1:{port}", "--model", demo_model): f"cannot listen on tcp://127.0.0.1:{port}",
        }
        async with asyncio.TaskGroup() as tasks:
            refusals = {
                sentence: tasks.create_task(stage.fails("learner", "--run-dir", f"run-{number}", *words))
                for number, (words, sentence) in enumerate(wrong.items())
            }
    for sentence, refusal in refusals.items():
        assert sentence in refusal.result()
    assert await stage.has_no()


async def test_a_learner_refuses_strangers_and_each_is_told_why(stage: Stage, demo_model: str, tmp_path: Path):
    """A second learner in its directory, a server of another model, tokenizer, protocol, without environment or key."""
    learner = await stage.start(*LEARNER, "--environment", "python:no_such_rewards:score", "--model", demo_model)
    words = await learner.join_command()
    other_model = save_tiny_model(tmp_path / "other-model", tied=True)
    other_tokenizer = with_another_tokenizer(demo_model, tmp_path / "other-tokenizer")
    async with asyncio.TaskGroup() as tasks:
        refusals = [
            tasks.create_task(stage.fails(*each))
            for each in (
                (*LEARNER, "--model", demo_model),
                (*words, "--model", str(other_model)),
                (*words, "--model", str(other_tokenizer)),
                (*words, "--model", "nowhere/nothing"),
                words,
                ("rollout-server", "--learner", "tcp://192.0.2.1:5557", "--key", "none.key"),
            )
        ]
    second, model, tokenizer, missing, environment, key = (refusal.result() for refusal in refusals)
    assert "is in use by another learner; choose another --run-dir, or stop that one" in second
    assert "other-model is not the architecture the learner trains" in model
    assert "other-tokenizer has another tokenizer or chat template" in tokenizer
    assert "cannot load nowhere/nothing; --model says where this node has" in missing
    assert "no_such_rewards" in environment
    assert "there is no key file none.key; the learner writes it into keys/" in key

    refused = await greeting(words[2], protocol=PROTOCOL_VERSION + 1)
    assert f"the server speaks protocol {PROTOCOL_VERSION + 1}, the learner {PROTOCOL_VERSION}" in refused.reason
    assert not refused.retry
    assert learner.is_running


def with_another_tokenizer(model: str, directory: Path) -> Path:
    shutil.copytree(model, directory)
    path = directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    path.write_text(json.dumps(tokenizer))
    return directory


async def greeting(address: str, *, protocol: int) -> Refused:
    decoder = Decoder(CoordinatorToServer, max_payload_bytes=0)
    async with asyncio.timeout(10), open_dealer(address) as dealer:
        await dealer.send(encode(Hello(protocol=protocol, server="old", epoch=secrets.token_hex(8))))
        message, _ = decoder.decode(await dealer.receive())
    assert isinstance(message, Refused)
    return message
