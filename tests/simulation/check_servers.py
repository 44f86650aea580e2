"""Servers: the honest are not blamed, the living are not taken for dead; and the run goes on."""

from tests.simulation import history as seen
from tests.simulation.account import NO_FAULT, Account
from tests.simulation.check import Check

HANGS = ("server_hang", "server_pause", "partition", "cut", "coordinator_pause")  # nothing is heard of progress
MAX_STEP_S = 200.0  # of an undisturbed run, from one step to the next


class Servers(Check):
    """Who is refused, dropped and quarantined."""

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._is_troubled = False

    def on_went_wrong(self, event: seen.WentWrong) -> None:
        self._is_troubled |= event.kind in HANGS

    def on_quarantined(self, event: seen.Quarantined) -> None:
        self.demand(event.key not in self.account.honest_keys, event, "no honest server is quarantined")

    def on_refused(self, event: seen.Refused) -> None:
        sample = self.account.samples.get(event.nonce)
        honest = sample is not None and self.account.honest[sample.epoch]
        self.demand(not honest or event.kind in NO_FAULT, event, "no honest server is blamed for its group", sample)

    def on_dropped(self, event: seen.Dropped) -> None:
        if event.reason.startswith("not heard of"):
            is_silent = event.silent_s >= self.rules.server_timeout_s
            self.demand(is_silent, event, "only who is silent for long counts as lost")
        elif event.reason.startswith("alive"):
            self.demand(self._is_troubled, event, "only who hangs is taken for hanging")


class Progress(Check):
    """While nothing goes wrong, steps follow each other."""

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._stepped_at = 0.0

    def on_calmed(self, event: seen.Calmed) -> None:
        self._stepped_at = event.now

    def on_trained(self, event: seen.Trained) -> None:
        if self.account.is_calm:
            waited_s = event.now - self._stepped_at
            self.demand(waited_s <= MAX_STEP_S, event, "an undisturbed run makes steps", waited_s)
        self._stepped_at = event.now

    def on_ended(self, event: seen.Ended) -> None:
        self.demand(event.is_finished, event, "an undisturbed run goes on")

    def on_broke(self, event: seen.Broke) -> None:
        self.demand(False, event, "the coordinator's own code does not fail")
