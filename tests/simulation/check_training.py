"""Training: nothing too old, nothing twice, nothing lost; and what a crash undid is done again exactly as it was."""

from tests.simulation import history as seen
from tests.simulation.account import Batch
from tests.simulation.check import Check


class Training(Check):
    """Batches and the optimizer steps that they become."""

    def on_delivered(self, event: seen.Delivered) -> None:
        account, rules = self.account, self.rules
        is_full = len(event.nonces) == rules.groups_per_step == len(set(event.tasks))
        self.demand(is_full, event, "a batch has groups_per_step groups")
        self.demand(list(event.tasks) == sorted(event.tasks), event, "a batch is in task order")
        unsafe = [nonce for nonce in event.nonces if nonce not in account.safe]
        self.demand(not unsafe and event.version in account.recorded, event, "a batch is safe before it leaves", unsafe)
        filtered = account.filtered.keys() & set(event.tasks)
        self.demand(not filtered, event, "what was filtered is not trained", filtered)
        batch = Batch(event.leases, event.tasks, event.nonces)
        before = account.delivered.get(event.version, batch)
        self.demand(batch == before, event, "a batch that was delivered is delivered again as it was", before)
        if rules.stale_action != "mask":
            overdue = [
                running for running in account.life.running.values()
                if running.min_version + rules.max_staleness <= event.version
            ]  # fmt: skip
            self.demand(not overdue, event, "the slowest group is waited for", *overdue)
        if rules.max_staleness == 0 and not account.has_failures and not rules.max_filtered:
            first = event.version * rules.groups_per_step
            in_order = event.tasks == tuple(range(first, first + rules.groups_per_step))
            self.demand(in_order, event, "on-policy, batches are the tasks in order, whatever was killed")

    def on_trained(self, event: seen.Trained) -> None:
        account = self.account
        self.demand(event.version == len(account.lineage), event, "versions are trained one after the other")
        batch = Batch(event.leases, event.tasks, event.nonces)
        self.demand(batch == account.delivered.get(event.version), event, "what was delivered is trained")
        twice = account.trained_tasks.intersection(event.tasks)
        self.demand(not twice, event, "no task is trained twice", twice)
        lowest = event.version - self.rules.max_staleness
        self.demand(lowest <= event.oldest, event, "no token is too old")
        self.demand(event.newest <= event.version, event, "no token is from the future")
        if self.rules.stale_action != "mask":
            for nonce in event.nonces:
                sample = account.samples[nonce]
                is_true = account.honest[sample.epoch]
                oldest = sample.oldest if is_true else sample.claimed_oldest
                self.demand(lowest <= oldest, event, "no token is too old in truth", sample)

    def on_learner_started(self, event: seen.LearnerStarted) -> None:
        resumes = event.is_new_run or event.version == self.account.checkpoint
        self.demand(resumes, event, "the learner goes on from its last checkpoint", self.account.checkpoint)

    def on_ended(self, event: seen.Ended) -> None:
        account = self.account
        trained = [nonce for batch in account.lineage for nonce in batch.nonces]
        self.demand(len(trained) == len(set(trained)), event, "no group is trained twice")
        queued = set(event.queued)
        lost = {
            nonce: lease for nonce, lease in account.promised.items()
            if nonce not in account.trained_nonces and lease not in queued
        }  # fmt: skip
        self.demand(not lost, event, "what was acknowledged is trained or queued", lost)
        if event.is_finished:
            late = account.promised_before_calm - account.trained_nonces
            self.demand(not late, event, "what was acknowledged is trained soon", late)
