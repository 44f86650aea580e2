"""The checker: reads a history, and nothing else, and says which promise it breaks.

It shares no code with the coordinator: what must hold is written here a second time, in other words.
"""

import re
from collections.abc import Callable, Iterable
from typing import Any

from tests.simulation import history as seen
from tests.simulation.account import Account
from tests.simulation.check import Check, Violation
from tests.simulation.check_evaluations import Evaluations
from tests.simulation.check_leases import Leases
from tests.simulation.check_servers import Progress, Servers
from tests.simulation.check_tasks import Tasks
from tests.simulation.check_training import Training

CHECKS: tuple[type[Check], ...] = (Leases, Training, Tasks, Servers, Progress, Evaluations)

_EVENT_NAMES = {kind: re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).lower() for kind in seen.EVENTS}


def check(history: Iterable[seen.Event]) -> None:
    """Raises Violation at the first event that breaks a promise."""
    events = iter(history)
    planned = next(events)
    assert isinstance(planned, seen.Planned), "a history begins with its plan"
    account = Account(planned.plan)
    handlers = _handlers([*(kind(account) for kind in CHECKS), account])
    for place, event in enumerate(events, start=1):
        try:
            for handle in handlers[type(event)]:
                handle(event)
        except KeyError as error:
            text = f"nothing happens out of the blue: {error} was not in the history before"
            violation = Violation(f"{text}\n  seed {planned.plan.seed}: {seen.describe(event)}")
            violation.place = place
            raise violation from error
        except Violation as violation:
            violation.place = place
            raise


def _handlers(readers: list[Any]) -> dict[type, list[Callable[[Any], None]]]:
    """By event: the methods that are named after it."""
    return {
        kind: [getattr(reader, f"on_{name}") for reader in readers if hasattr(reader, f"on_{name}")]
        for kind, name in _EVENT_NAMES.items()
    }
