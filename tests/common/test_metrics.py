import socket
from collections.abc import Iterator
from contextlib import suppress
from urllib.request import urlopen

import pytest

from common.lifecycle import UserError
from common.metrics import MAX_LABEL_VALUES, Measurement, start_metrics_server


def scrape(address: str) -> list[str]:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        return [line for line in response.read().decode().splitlines() if not line.startswith("#")]


def has_ipv6() -> bool:
    with suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


def test_a_scrape_reads_the_state_of_that_moment():
    state = {"steps": 1.0}

    def measure() -> Iterator[Measurement]:
        yield Measurement(name="steps_total", value=state["steps"], help="steps")
        yield Measurement(name="running", value=2.0, help="groups", labels={"server": "a"})
        yield Measurement(name="running", value=3.0, help="groups", labels={"server": "b"})

    with start_metrics_server("127.0.0.1:0", measure) as address:
        assert "countercurrent_steps_total 1.0" in scrape(address)
        state["steps"] = 5.0
        lines = scrape(address)
    assert "countercurrent_steps_total 5.0" in lines
    assert 'countercurrent_running{server="b"} 3.0' in lines


def test_names_from_peers_cannot_fill_the_monitoring_system():
    def measure() -> Iterator[Measurement]:
        for number in range(10 * MAX_LABEL_VALUES):
            yield Measurement(name="running", value=1.0, help="groups", labels={"server": f"s{number}"})

    with start_metrics_server("127.0.0.1:0", measure) as address:
        lines = scrape(address)
    assert len([line for line in lines if line.startswith("countercurrent_running{")]) == MAX_LABEL_VALUES
    assert f"countercurrent_measurements_left_out {9.0 * MAX_LABEL_VALUES}" in lines


def test_a_label_cannot_break_out_of_its_line():
    def measure() -> Iterator[Measurement]:
        yield Measurement(name="running", value=1.0, help="groups", labels={"server": 'a"} 9\nevil 1'})

    with start_metrics_server("127.0.0.1:0", measure) as address:
        assert [line.split()[-1] for line in scrape(address)] == ["1.0", "0.0"]


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:http", "127.0.0.1:65536", "203.0.113.7:0"])
def test_an_address_that_cannot_be_served_is_named(address: str):
    with pytest.raises(UserError, match=address), start_metrics_server(address, lambda: []):
        pass


@pytest.mark.skipif(not has_ipv6(), reason="no IPv6 here")
def test_an_ipv6_address_is_written_in_brackets():
    with start_metrics_server("[::1]:0", lambda: []) as address:
        assert address.startswith("[::1]:")
        assert scrape(address) == ["countercurrent_measurements_left_out 0.0"]


def test_an_address_in_use_is_named_and_is_free_again_when_the_block_is_left():
    with (
        start_metrics_server("127.0.0.1:0", lambda: []) as address,
        pytest.raises(UserError, match="Address already in use; choose another"),
        start_metrics_server(address, lambda: []),
    ):
        pass
    with start_metrics_server(address, lambda: []) as again:
        assert again == address
