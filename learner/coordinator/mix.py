"""Mix: which environment a task is of, as a pure function of its number, so that any task can be made again."""

from collections.abc import Sequence
from dataclasses import dataclass

CYCLE = 1000  # tasks after which the order of environments repeats: shares are exact to a thousandth


@dataclass(frozen=True, slots=True)
class Place:
    environment: int
    index: int  # this is the environment's task number `index`


class Mix:
    """Environments take turns, as evenly as their weights allow, and each gets at least one task of a cycle.

    Raises ValueError for no weights, or more than a cycle has room for.
    """

    def __init__(self, weights: Sequence[float] = (1.0,)) -> None:
        if not 1 <= len(weights) <= CYCLE or min(weights) <= 0:
            raise ValueError(f"a mix needs 1 to {CYCLE} weights above 0, got {len(weights)}: {list(weights)[:5]}")
        self.num_environments = len(weights)
        self._places = [Place(0, 0)] if len(weights) == 1 else _one_cycle(weights)
        self._per_cycle = [0] * len(weights)
        for place in self._places:
            self._per_cycle[place.environment] += 1

    def place(self, task_id: int) -> Place:
        cycle, within = divmod(task_id, len(self._places))
        place = self._places[within]
        return Place(place.environment, cycle * self._per_cycle[place.environment] + place.index)

    def environment_of(self, task_id: int) -> int:
        return self._places[task_id % len(self._places)].environment


def _one_cycle(weights: Sequence[float]) -> list[Place]:
    """Smooth weighted round robin: the environment that is owed most has the next turn."""
    total = sum(weights)
    shares = [max(weight / total, 1 / CYCLE) for weight in weights]
    owed = [0.0] * len(shares)
    given = [0] * len(shares)
    places = []
    for _ in range(CYCLE):
        owed = [debt + share for debt, share in zip(owed, shares, strict=True)]
        chosen = max(range(len(owed)), key=owed.__getitem__)
        places.append(Place(chosen, given[chosen]))
        owed[chosen] -= sum(shares)
        given[chosen] += 1
    return places
