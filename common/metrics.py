"""Prometheus endpoint of a process: what is true at the moment of the scrape, read from the process's own state.

There are no counters to keep in step with the state: each process has one function that lists its measurements.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from common.lifecycle import UserError

logger = logging.getLogger(__name__)

MAX_LABEL_VALUES = 256  # of one metric: names that come from peers must not fill the monitoring system
MAX_PORT = 65535
PREFIX = "countercurrent_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One number. Counters only grow (their name ends in _total); gauges come and go."""

    name: str
    value: float
    help: str
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")


Measure = Callable[[], Iterable[Measurement]]


class StateCollector(Collector):
    """Asks the process for its measurements at each scrape."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        families: dict[str, CounterMetricFamily | GaugeMetricFamily] = {}
        left_out = 0
        for one in self._measure():
            family = families.get(one.name)
            if family is None:
                make = CounterMetricFamily if one.is_counter else GaugeMetricFamily
                family = families[one.name] = make(PREFIX + one.name, one.help, labels=list(one.labels))
            if len(family.samples) < MAX_LABEL_VALUES:
                family.add_metric(list(one.labels.values()), one.value)
            else:
                left_out += 1
        yield from families.values()
        yield GaugeMetricFamily(
            PREFIX + "measurements_left_out", f"beyond {MAX_LABEL_VALUES} label values of one metric", value=left_out
        )


@contextmanager
def start_metrics_server(address: str, measure: Measure) -> Iterator[str]:
    """Serves http://address/metrics from a thread; port 0 takes a free one. Yields the address as bound.

    `measure` is called on that thread: it must only read. Raises UserError when the address cannot be used.
    """
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) > MAX_PORT:
        raise UserError(f"the metrics address must be HOST:PORT, with a port up to {MAX_PORT}, got {address!r}")
    host = host or "127.0.0.1"
    registry = CollectorRegistry(auto_describe=False)
    registry.register(StateCollector(measure))
    try:
        server, thread = start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise UserError(f"cannot serve metrics at {address}: {error.strerror}; choose another address") from error
    bound = f"{host}:{server.server_port}"
    logger.info("metrics at http://%s/metrics", bound)
    try:
        yield bound
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
