from collections.abc import Iterator
from urllib.request import urlopen

import pytest

from common.lifecycle import UserError
from common.metrics import MAX_LABEL_VALUES, Measurement, start_metrics_server


def scrape(address: str) -> list[str]:
    with urlopen(f"http://{address}/metrics", timeout=10) as response:
        return [line for line in response.read().decode().splitlines() if not line.startswith("#")]


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
        assert len(scrape(address)) == MAX_LABEL_VALUES


def test_a_label_cannot_break_out_of_its_line():
    def measure() -> Iterator[Measurement]:
        yield Measurement(name="running", value=1.0, help="groups", labels={"server": 'a"} 9\nevil 1'})

    with start_metrics_server("127.0.0.1:0", measure) as address:
        assert len(scrape(address)) == 1


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:http", "203.0.113.7:0"])
def test_an_address_that_cannot_be_served_is_named(address: str):
    with pytest.raises(UserError, match=address), start_metrics_server(address, lambda: []):
        pass
