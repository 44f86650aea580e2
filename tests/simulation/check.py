"""Check: some promises that can be told from the same account."""

from typing import Any

from tests.simulation import history as seen
from tests.simulation.account import Account


class Violation(AssertionError):
    """A promise was broken. The text says which, where and when."""

    place: int = 0  # of the event in the history


class Check:
    """Methods on_... are named after events and see each of them before it is booked in the account."""

    def __init__(self, account: Account) -> None:
        self.account = account
        self.plan = account.plan
        self.rules = account.plan.rules

    def demand(self, holds: bool, event: Any, promise: str, *facts: object) -> None:
        """`facts` are told when the promise does not hold."""
        if not holds:
            told = f" ({', '.join(map(str, facts))})" if facts else ""
            raise Violation(f"{promise}{told}\n  seed {self.plan.seed}: {seen.describe(event)}")
