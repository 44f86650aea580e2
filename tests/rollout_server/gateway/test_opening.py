"""When a rollout server has a gateway, and which settings it is not opened with."""

import pytest

from common.lifecycle import UserError
from rollout_server.config import RolloutServerConfig
from rollout_server.environments import environment_at
from rollout_server.gateway.gateway import Gateway, GatewaySettings
from rollout_server.gateway.opening import gateway_settings

AGENTS = [environment_at("agent+http://127.0.0.1:9/run")]
PULL = [environment_at("agent:pull")]
KEY = "k" * 16


def settings_of(environments, **options):
    return gateway_settings(RolloutServerConfig(learner="tcp://127.0.0.1:5557", **options), environments)


def test_a_run_without_agents_has_no_gateway():
    assert settings_of([environment_at("python:module:function")]) is None
    assert settings_of(AGENTS) == GatewaySettings()


@pytest.mark.parametrize("options", [{"gateway_listen": "0.0.0.0:80"}, {"gateway_url": "https://agents.example"}])
def test_agents_from_elsewhere_must_show_a_key_to_be_given_a_task(options, tmp_path):
    with pytest.raises(UserError, match="--gateway-key"):
        settings_of(PULL, **options)
    assert settings_of(AGENTS, **options) is not None  # those are told their session by us
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert settings_of(PULL, gateway_key=tmp_path / "key", **options).agent_key == KEY


@pytest.mark.parametrize("content", [b"", b"short", b"k" * 20 + b" " + b"k", "ä".encode() * 20, b"\xff" * 20])
def test_a_key_that_is_none_is_refused(content, tmp_path):
    (tmp_path / "key").write_bytes(content)
    with pytest.raises(UserError, match="--gateway-key"):
        settings_of(PULL, gateway_key=tmp_path / "key")


@pytest.mark.parametrize("url", ["agents.example", "ftp://agents.example", "http://", "http://a/?x=1"])
def test_a_gateway_url_that_is_none_is_refused(url):
    with pytest.raises(UserError, match="--gateway-url"):
        settings_of(AGENTS, gateway_url=url)


@pytest.mark.parametrize("listen", ["8000", "127.0.0.1", "127.0.0.1:x", ":80", "127.0.0.1:70000"])
def test_an_address_that_is_none_is_refused(listen):
    with pytest.raises(UserError, match="HOST:PORT"):
        Gateway(GatewaySettings(listen=listen))


async def test_an_address_that_another_has_is_refused():
    async with Gateway(GatewaySettings()) as gateway:
        with pytest.raises(UserError, match="cannot listen"):
            async with Gateway(GatewaySettings(listen=gateway.address.removeprefix("http://"))):
                pass
