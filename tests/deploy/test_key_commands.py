"""`countercurrent key`, as people type it."""

import pytest

from common.keys import AllowList, ensure_server_keys, load_client_key
from common.wire import curve_keypair
from deploy.__main__ import main


@pytest.fixture
def run_dir(tmp_path):
    ensure_server_keys(tmp_path / "keys", curve_keypair)
    return tmp_path


def key(action, *words):
    return main(["key", action, *map(str, words)])


def test_an_added_key_is_let_in_and_its_file_named(run_dir, capsys):
    assert key("add", run_dir, "node-7") == 0
    path = run_dir / "keys" / "node-7.key"
    assert str(path) in capsys.readouterr().out
    assert AllowList(run_dir / "keys").name_of(load_client_key(path).public) == "node-7"


def test_keys_are_listed_by_name_and_without_secrets(run_dir, capsys):
    for name in ("b", "a"):
        key("add", run_dir, name)
    capsys.readouterr()
    assert key("list", run_dir) == 0
    public = load_client_key(run_dir / "keys" / "a.key").public
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a", "b"]
    assert lines[0].split()[1] == public.hex()[:8]


def test_a_revoked_key_is_not_let_in_any_more(run_dir):
    key("add", run_dir, "node-7")
    public = load_client_key(run_dir / "keys" / "node-7.key").public
    assert key("revoke", run_dir, "node-7") == 0
    assert AllowList(run_dir / "keys").name_of(public) is None
    assert not (run_dir / "keys" / "node-7.key").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("revoke", "nobody"), "there is no key nobody in"),
        (("add", "../out"), "a key's name is made of letters"),
        (("add", "server"), "a key's name"),
    ],
)
def test_what_cannot_be_done_is_said(run_dir, capsys, words, complaint):
    action, name = words
    assert key(action, run_dir, name) == 2
    assert complaint in capsys.readouterr().err


def test_a_directory_without_keys_is_named(tmp_path, capsys):
    assert key("list", tmp_path) == 2
    assert f"there is no key file {tmp_path}/keys/server.key" in capsys.readouterr().err
