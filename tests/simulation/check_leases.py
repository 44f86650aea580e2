"""Leases: each ends once and is in one place, credits come back, bounds hold, and nothing is promised too early."""

from tests.simulation import history as seen
from tests.simulation.account import Account
from tests.simulation.check import Check

PAUSE_SLACK_S = 1.0  # the coordinator's own pauses are forgiven to a tick


class Leases(Check):
    """What the coordinator grants, accepts, answers and counts."""

    def __init__(self, account: Account) -> None:
        super().__init__(account)
        self._inherited = 0  # open groups that a coordinator began with, as far as they are left

    # --- granting --------------------------------------------------------------------------------------------------

    def on_joined(self, event: seen.Joined) -> None:
        key = event.key
        self.demand(key not in self.account.life.quarantined_keys, event, "who is quarantined does not join again")

    def on_granted(self, event: seen.Granted) -> None:
        life = self.account.life
        self.demand(event.server not in life.quarantined, event, "nothing is granted to who is quarantined")
        again = life.running.get(event.lease)
        if again is not None:
            same = (again.server, again.task) == (event.server, event.task)
            self.demand(same, event, "a lease that is told again is the same", again)
            return
        silent_limit_s = self.rules.notice_timeout_s + PAUSE_SLACK_S
        self.demand(event.silent_s <= silent_limit_s, event, "nothing is granted to who is not heard")
        self.demand(life.held[event.server] < life.capacity[event.server], event, "no server has more than it can take")
        self.demand(event.min_version <= event.at_version, event, "no lease waits for a version that needs it")
        self.demand(event.lease not in self.account.leases, event, "a lease is granted once")
        self._demand_that_the_task_is_free(event)

    def on_adopted(self, event: seen.Adopted) -> None:
        life = self.account.life
        self.demand(event.lease not in life.running, event, "a lease runs at one server")
        self.demand(event.lease not in life.accepted, event, "a lease that was fulfilled is over")
        granted = self.account.leases.get(event.lease)
        self.demand(granted == event.task, event, "only what was granted is gone on with", granted)
        self._demand_that_the_task_is_free(event)

    def _demand_that_the_task_is_free(self, event: seen.Granted | seen.Adopted) -> None:
        task, account = event.task, self.account
        self.demand(task not in account.life.running_tasks, event, "a task runs once at a time")
        self.demand(task not in account.alive, event, "a task whose group was accepted is not done again")
        self.demand(task not in account.filtered, event, "a task whose group was filtered is not done again")
        self.demand(task not in account.trained_tasks, event, "a trained task is not done again")
        self.demand(task not in account.life.parked, event, "a parked task is not done again")

    # --- accepting -------------------------------------------------------------------------------------------------

    def on_accepted(self, event: seen.Accepted) -> None:
        self._demand_that_the_lease_is_fulfilled(event)
        may_be_taken = not self.account.samples[event.nonce].is_equal or not self._filters_more(event.at_version)
        self.demand(may_be_taken, event, "a group of equal rewards is filtered, as far as that is allowed")

    def on_filtered(self, event: seen.Filtered) -> None:
        self._demand_that_the_lease_is_fulfilled(event)
        self.demand(self.account.samples[event.nonce].is_equal, event, "only groups of equal rewards are filtered")
        self.demand(self._filters_more(event.at_version), event, "no more groups are filtered than the bound")

    def _filters_more(self, version: int) -> bool:
        filtered = sum(event.at_version == version for event in self.account.filtered.values())
        return filtered < self.rules.max_filtered

    def _demand_that_the_lease_is_fulfilled(self, event: seen.Accepted | seen.Filtered) -> None:
        account = self.account
        running = account.life.running.get(event.lease)
        self.demand(running is not None and running.server == event.server, event, "who has the lease fulfils it")
        assert running is not None
        self.demand(event.task == running.task, event, "a group is of its lease's task", running)
        self._demand_that_the_task_is_not_done(event)
        sample = account.samples[event.nonce]
        self.demand(sample.claimed_oldest >= running.min_version, event, "no token is older than the lease allows")
        self.demand(sample.claimed_newest <= account.published, event, "no token is from the future")
        confirmed = account.life.confirmed.get(event.server, -1)
        self.demand(sample.claimed_newest <= confirmed, event, "a server uses what it said it has", sample, confirmed)
        self.demand(sample.lie not in ("too_large", "not_finite"), event, "rubbish is not accepted")

    def _demand_that_the_task_is_not_done(self, event: seen.Accepted | seen.Filtered) -> None:
        self.demand(event.task not in self.account.alive, event, "no task is in the queue twice")
        self.demand(event.task not in self.account.filtered, event, "no task is filtered twice")

    def on_answered(self, event: seen.Answered) -> None:
        nonce = self.account.life.accepted.get(event.lease)
        known = nonce is None or nonce in self.account.safe
        self.demand(known, event, "a server forgets its group only once the journal has it")
        self.demand(nonce is not None or not event.is_accepted, event, "only what was accepted is acknowledged")

    # --- counting --------------------------------------------------------------------------------------------------

    def on_coordinator_opened(self, event: seen.CoordinatorOpened) -> None:
        self._inherited = len(self.account.alive)

    def on_observed(self, event: seen.Observed) -> None:
        counted = event.running + event.queued + event.trained + event.ended
        self.demand(event.is_balanced and counted == event.leased, event, "every lease is in one place", counted)
        running = len(self.account.life.running)
        self.demand(event.running == running, event, "running leases are those granted and not ended", running)
        trained = sum(len(batch.nonces) for batch in self.account.lineage[: event.version])
        queued = len(self.account.alive) - trained
        self.demand(event.queued == queued, event, "what was accepted and not trained is queued", queued)
        self.demand(event.trained == trained, event, "what was trained is counted", trained)
        self._demand_bounds(event)

    def _demand_bounds(self, event: seen.Observed) -> None:
        rules = self.rules
        num_open = event.running + event.queued
        self._inherited = min(self._inherited, num_open)
        ceiling = min((rules.max_staleness + 1) * rules.groups_per_step, rules.queue_groups)
        self.demand(num_open <= max(ceiling, self._inherited), event, "no more groups are open than the bound", ceiling)
        reserved_bytes = event.queue_bytes + event.running * rules.max_group_bytes
        self.demand(reserved_bytes <= rules.queue_bytes, event, "no more bytes are spoken for than the bound")
        self.demand(event.queue_bytes >= 0, event, "bytes are counted once")
