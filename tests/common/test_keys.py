import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from common.key_files import KeyFileError
from common.keys import (
    AllowList,
    KeyPair,
    ServerKeys,
    ensure_client_key,
    ensure_server_keys,
    load_client_key,
    load_server_keys,
)


def a_generator() -> Callable[[], KeyPair]:
    """Makes other keys at every call; they need not be CURVE keys to be stored."""
    return lambda: (os.urandom(32), os.urandom(32))


@pytest.fixture
def server(tmp_path: Path) -> ServerKeys:
    return ensure_server_keys(tmp_path / "keys", a_generator())


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_servers_keys_are_made_once_and_only_the_owner_can_read_them(server: ServerKeys):
    assert ensure_server_keys(server.directory, a_generator()) == load_server_keys(server.directory) == server
    assert (mode_of(server.directory), mode_of(server.directory / "server.key")) == (0o700, 0o600)


def test_a_clients_key_is_one_file_that_names_its_server_and_is_allowed(server: ServerKeys):
    path = ensure_client_key(server, "node-1", a_generator())
    key = load_client_key(path)
    assert (path.name, mode_of(path), key.server_public) == ("node-1.key", 0o600, server.public)
    assert AllowList(server.directory).name_of(key.public) == "node-1"
    assert load_client_key(ensure_client_key(server, "node-1", a_generator())) == key


def test_no_secret_is_ever_shown(server: ServerKeys):
    key = load_client_key(ensure_client_key(server, "node-1", a_generator()))
    for keys in (server, key):
        assert keys.secret.hex()[:8] not in repr(keys)
        assert repr(keys.secret) not in repr(keys)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_repairs_it(server: ServerKeys, mode: int):
    path = ensure_client_key(server, "node-1", a_generator())
    path.chmod(mode)
    with pytest.raises(KeyFileError, match=f"can be read by others .mode {mode:o}.; run: chmod 600 {path}"):
        load_client_key(path)


def test_a_directory_where_others_could_let_themselves_in_is_refused(server: ServerKeys):
    server.directory.chmod(0o770)
    with pytest.raises(KeyFileError, match=f"so let themselves in; run: chmod go-w {server.directory}$"):
        load_server_keys(server.directory)


def test_a_missing_key_says_where_keys_come_from(tmp_path: Path):
    with pytest.raises(KeyFileError, match=r"there is no key file .*nothing.key; the learner writes it into keys/"):
        load_client_key(tmp_path / "nothing.key")
    with pytest.raises(KeyFileError, match="cannot be read: Is a directory"):
        load_client_key(tmp_path)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "must hold public, secret, server_public; it holds nothing"),
        (b'public = "00"', "must hold public, secret, server_public; it holds public"),
        (b"public = ", "is not a key file"),
        (b"\xff\xfe", "is not a key file"),
        (b"x = " + b"[" * 3000, "is not a key file"),
        (b"# " + b"x" * 5000, "more than 4096 bytes"),
        (
            f'public = "{"0" * 63}"\nsecret = "{"0" * 64}"\nserver_public = "{"0" * 64}"'.encode(),
            "public must be 64 hex",
        ),
        (f'public = "{"0" * 64}"\nsecret = 5\nserver_public = "{"0" * 64}"'.encode(), "secret must be 64 hex"),
    ],
)
def test_a_damaged_key_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, complaint: str):
    path = tmp_path / "node.key"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=complaint):
        load_client_key(path)


@pytest.mark.parametrize("name", ["", "server", "../escape", "a/b", ".hidden", "x" * 65, "a b", "a\nb"])
def test_a_name_that_is_no_plain_file_name_is_refused(server: ServerKeys, name: str):
    with pytest.raises(KeyFileError, match="a key's name is made of"):
        ensure_client_key(server, name, a_generator())


def test_a_key_can_be_added_and_revoked_while_the_list_is_in_use(server: ServerKeys):
    allowed = AllowList(server.directory)
    first = load_client_key(ensure_client_key(server, "first", a_generator()))
    assert (allowed.name_of(first.public), repr(allowed)) == (
        "first",
        f"<AllowList {server.directory}/allowed, 1 keys>",
    )
    second = load_client_key(ensure_client_key(server, "second", a_generator()))
    assert allowed.name_of(second.public) == "second"
    (server.directory / "allowed" / "first.pub").unlink()
    assert (allowed.name_of(first.public), allowed.name_of(second.public)) == (None, "second")
    (server.directory / "allowed" / "second.pub").write_text(f'public = "{first.public.hex()}"\n')
    assert (allowed.name_of(first.public), allowed.name_of(second.public)) == ("second", None)


def test_the_files_are_read_only_when_one_of_them_changed(server: ServerKeys, monkeypatch: pytest.MonkeyPatch):
    key = load_client_key(ensure_client_key(server, "node", a_generator()))
    allowed = AllowList(server.directory)
    assert allowed.name_of(key.public) == "node"
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    assert allowed.name_of(key.public) == "node"


def test_a_damaged_file_on_the_allow_list_lets_in_nobody_and_keeps_nobody_else_out(
    server: ServerKeys, caplog: pytest.LogCaptureFixture
):
    key = load_client_key(ensure_client_key(server, "good", a_generator()))
    (server.directory / "allowed" / "bad.pub").write_text("public = ")
    allowed = AllowList(server.directory)
    assert [allowed.name_of(key.public), allowed.name_of(b"")] == ["good", None]
    assert [record.message for record in caplog.records] == [
        f"a key on the allow-list is skipped: {server.directory}/allowed/bad.pub is not a key file: "
        "Invalid value (at end of document)"
    ]


def test_without_an_allow_list_nobody_is_let_in(server: ServerKeys, caplog: pytest.LogCaptureFixture):
    key = load_client_key(ensure_client_key(server, "node", a_generator()))
    allowed = AllowList(server.directory)
    assert allowed.name_of(key.public) == "node"
    (server.directory / "allowed").rename(server.directory / "elsewhere")
    assert allowed.name_of(key.public) is None
    assert f"nobody is let in: there is no {server.directory}/allowed" in caplog.text


def test_a_revoked_key_is_not_handed_out_again(server: ServerKeys):
    path = ensure_client_key(server, "node", a_generator())
    (server.directory / "allowed" / "node.pub").unlink()
    with pytest.raises(KeyFileError, match=r"node.key was revoked; delete the file to have a new key made"):
        ensure_client_key(server, "node", a_generator())
    path.unlink()
    assert ensure_client_key(server, "node", a_generator()) == path


def test_a_key_of_another_server_is_not_handed_out(server: ServerKeys):
    ensure_client_key(server, "node", a_generator())
    (server.directory / "server.key").unlink()
    other = ensure_server_keys(server.directory, a_generator())
    with pytest.raises(KeyFileError, match=r"node.key is for another server; delete it"):
        ensure_client_key(other, "node", a_generator())


def test_a_key_file_is_complete_before_it_has_its_name(server: ServerKeys, monkeypatch: pytest.MonkeyPatch):
    def fail(_descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        ensure_client_key(server, "node", a_generator())
    assert sorted(path.name for path in server.directory.iterdir()) == ["allowed", "server.key"]
