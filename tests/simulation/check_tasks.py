"""Tasks: none is skipped, none starves, and none is given up without having been tried."""

from tests.simulation import history as seen
from tests.simulation.account import TOO_SLOW
from tests.simulation.check import Check


class Tasks(Check):
    """Where every task is that was ever handed out."""

    def on_granted(self, event: seen.Granted) -> None:
        if event.task <= self.account.newest_task:
            return
        starving = {
            task: waiting for task, waiting in self.account.waiting.items()
            if waiting.overtaken > waiting.ahead and task != event.task
        }  # fmt: skip
        self.demand(not starving, event, "tasks that were given back come before new ones", starving)

    def on_cancelled(self, event: seen.Cancelled) -> None:
        running = self.account.life.running.get(event.lease)
        if running is not None and TOO_SLOW in event.reason:
            times = self.account.life.given_up[running.task] + 1
            self.demand(times <= self.rules.max_requeues, event, "a slow task is waited for in the end", times)

    def on_parked(self, event: seen.Parked) -> None:
        tries = min(self.rules.max_task_failures, self.rules.max_task_losses)
        tried = self.account.tries[event.task]
        self.demand(tried >= tries, event, "a task is tried often enough before it is given up", tried)

    def on_checkpointed(self, event: seen.Checkpointed) -> None:
        self.demand(event.version == len(self.account.lineage), event, "a checkpoint is of the version that it says")
        self._demand_that_none_is_skipped(event)

    def on_ended(self, event: seen.Ended) -> None:
        if event.is_finished:
            self._demand_that_none_is_skipped(event)

    def _demand_that_none_is_skipped(self, event: seen.Checkpointed | seen.Ended) -> None:
        trained = [task for batch in self.account.lineage[: event.version] for task in batch.tasks]
        # Of what was filtered later than that, only the journal says that it is done.
        filtered = [task for task, seen_ in self.account.filtered.items() if seen_.at_version < event.version - 1]
        everywhere = sorted([*trained, *filtered, *event.open_tasks, *event.parked])
        is_whole = everywhere == list(range(event.next_task))
        self.demand(is_whole, event, "every task is trained, filtered, open or parked, and only one of these", trained)
        surprising = set(event.parked) - self.account.parked
        self.demand(not surprising, event, "a task is named when it is parked", surprising)
