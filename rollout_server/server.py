"""RolloutServer: leases in, groups out, weights followed: the loops of one rollout server process."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator

import msgspec

from common import messages
from common.codec import encode
from common.events import EventLog
from common.keys import ClientKey
from common.lifecycle import UserError
from common.metrics import Measurement
from common.snapshot import NO_VERSION
from common.wire import Dealer, open_dealer
from rollout_server.busy import MeteredEngine
from rollout_server.episodes import EpisodeRunner
from rollout_server.evaluations import Evaluations
from rollout_server.greeting import SAY_IT_EVERY_S, RunFinishedError, receive_message, said_now
from rollout_server.held_leases import HeldLeases
from rollout_server.lease_failure import LeaseFailure
from rollout_server.reached_addresses import with_host_of
from rollout_server.vital_signs import VitalSigns
from rollout_server.waiting import WaitingAloud
from rollout_server.weight_receiver import WeightReceiver

logger = logging.getLogger(__name__)

HEARTBEAT_INTERVAL_S = 0.5
RESEND_AFTER_S = 5.0
HEALTH_INTERVAL_S = 5.0
HEALTH_TIMEOUT_S = 60.0


class RolloutServer:
    """One engine at work for one learner, until the run is finished."""

    def __init__(
        self,
        *,
        dealer: Dealer,
        key: ClientKey | None,
        engine: MeteredEngine,
        receiver: WeightReceiver,
        runner: Callable[[messages.Welcome], EpisodeRunner],
        hello: messages.Hello,
        ready: messages.Ready,
        events: EventLog,
    ) -> None:
        self._dealer = dealer
        self._key = key
        self._engine = engine
        self._receiver = receiver
        self._make_runner = runner
        self._hello = hello
        self._ready = ready
        self._events = events
        self._session = ""
        self._leases = HeldLeases()
        self._evaluations = Evaluations(receiver, self._say)
        self._run_id = ""
        self._following: asyncio.Task[None] | None = None
        self._vital_signs = VitalSigns(engine, receiver, self._leases, self._evaluations, events)
        self._last_heard_s = time.monotonic()
        self._confirmed_version = NO_VERSION  # the coordinator was told that this one is loaded
        self._is_greeting_again = False
        self._is_finished = False
        self._adapters: messages.AdapterNeeds | None = None  # that the engine was started for

    def __repr__(self) -> str:
        return (
            f"<RolloutServer {self._leases!r}, "
            f"version {self._receiver.loaded_version} of {self._receiver.published_version}>"
        )

    def metrics(self) -> Iterator[Measurement]:
        """What Prometheus is told."""
        return self._vital_signs.metrics()

    async def run(self, welcome: messages.Welcome) -> None:
        """Returns when the run is finished."""
        self._adapters = welcome.adapters
        try:
            async with asyncio.TaskGroup() as self._tasks:
                await self._enter(welcome)
                self._tasks.create_task(self._receive())
                self._tasks.create_task(self._send_groups())
                self._tasks.create_task(self._heartbeat())
                self._tasks.create_task(self._watch_engine())
        except* RunFinishedError as finished:
            self._is_finished = True
            logger.info("%s", finished.exceptions[0])
        finally:
            if not self._is_finished:  # its leases go to others at once
                self._dealer.try_send(encode(messages.Leaving(reason=self._receiver.doubt[:4096] or "it stops")))

    async def _enter(self, welcome: messages.Welcome) -> None:
        """Begin, or begin again after the learner restarted: what was leased by its former self is void."""
        self._leases.drop_all()
        if self._following is not None:
            self._following.cancel()
        self._run_id, self._session = welcome.run_id, welcome.session
        self._runner = self._make_runner(welcome)
        self._receiver.hold_s = welcome.evaluation_hold_s
        await self._receiver.follow(welcome.run_id)
        await self._receiver.announce(welcome.published_version)
        self._following = self._tasks.create_task(self._follow_weights(welcome.weights_address))
        await self._say_ready()
        logger.info("joined run %s", welcome.run_id)

    async def _say_ready(self) -> None:
        """Whatever was confirmed before may be forgotten. Of evaluations nobody knows any more."""
        self._confirmed_version = NO_VERSION
        self._evaluations.drop_all()
        await self._receiver.hold(0, NO_VERSION)
        await self._dealer.send(encode(msgspec.structs.replace(self._ready, held=self._leases.claims())))

    async def _follow_weights(self, address: str) -> None:
        address = with_host_of(self._dealer.address, address)
        async with open_dealer(address, key=self._key) as dealer:
            await self._receiver.run(dealer, on_doubt=self._leave_service, on_hold=self._say_alive)

    async def _leave_service(self, doubt: str) -> None:
        """While the engine computes with other weights than it was given, what it samples is nobody's.

        Groups that are finished are older: they were held back until their version was judged.
        """
        for lease_id in self._leases.working():
            self._leases.drop(lease_id)
        self._evaluations.drop_all()
        await self._say_alive()

    async def _receive(self) -> None:
        while True:
            message = receive_message(await self._dealer.receive())
            self._last_heard_s = time.monotonic()
            match message:
                case messages.Pulse():
                    self._vital_signs.waiting_for = message.waiting_for
                    await self._receiver.announce(message.published_version)
                case messages.Welcome():
                    await self._hear_welcome(message)
                case messages.Refused():
                    self._hear_refusal(message)
                case messages.RelayPlan():
                    self._receiver.relaying.follow(message)
                case messages.HoldVersions() | messages.Evaluate():
                    await self._hear_of_evaluation(message)
                case messages.Finished(reason=reason):
                    raise RunFinishedError(f"the run is finished: {reason}")
                case _:
                    await self._hear_of_lease(message)

    async def _hear_of_evaluation(self, message: messages.HoldVersions | messages.Evaluate) -> None:
        if isinstance(message, messages.HoldVersions):
            await self._evaluations.hold(message)
            await self._say_alive()
        elif message.evaluation_id not in self._evaluations:
            work = self._evaluations.work(message, self._runner)
            self._evaluations.begin(message, self._tasks.create_task(work))

    async def _hear_of_lease(self, message: messages.Message | None) -> None:
        match message:
            case messages.Leases() if self._receiver.doubt:
                await self._say_alive()  # and out of service: they were granted before that was heard
            case messages.Leases(leases=leases):
                self._begin_work(leases)
            case messages.LeaseCancelled(lease_id=lease_id):
                self._leases.drop(lease_id)
            case messages.GroupsAccepted(lease_ids=lease_ids):
                self._forget(lease_ids)
            case messages.GroupRefused(lease_id=lease_id, reason=reason):
                logger.warning("the learner refused group %d: %s", lease_id, reason)
                self._leases.drop(lease_id)

    def _begin_work(self, leases: Iterable[messages.Lease]) -> None:
        for lease in leases:
            if lease.lease_id not in self._leases:
                self._leases.begin(lease, self._tasks.create_task(self._work(lease)))

    def _forget(self, accepted: Iterable[int]) -> None:
        for lease_id in accepted:
            task_id = self._leases.task_of(lease_id)
            self._events.emit("group_acknowledged", run=self._run_id, lease=lease_id, task=task_id)
            self._leases.drop(lease_id)

    async def _hear_welcome(self, welcome: messages.Welcome) -> None:
        if welcome.session != self._session:
            await self._enter_again(welcome)
        elif self._is_greeting_again:
            self._is_greeting_again = False
            await self._say_ready()

    async def _enter_again(self, welcome: messages.Welcome) -> None:
        same_model = welcome.model_fingerprint == self._ready.model_fingerprint
        if not same_model or welcome.tokenizer_fingerprint != self._ready.tokenizer_fingerprint:
            raise UserError(
                f"the learner came back with another model or tokenizer ({welcome.model}); start a new rollout server"
            )
        self._check_adapters(welcome.adapters)
        if welcome.run_id != self._run_id:
            await self._enter(welcome)
            return
        # Another coordinator of the same learner: the weights are the same, and it takes what is held here.
        self._session = welcome.session
        self._is_greeting_again = False
        await self._say_ready()
        await self._say_alive()  # it has to know what is loaded before it hears of tokens sampled with that
        self._leases.resend(self._dealer.try_send, time.monotonic(), after_s=0.0)

    def _check_adapters(self, needs: messages.AdapterNeeds | None) -> None:
        """Raises UserError for adapters that the engine was not started for."""
        had = self._adapters
        if needs is None or (
            had is not None and needs.rank <= had.rank and {*needs.target_modules} <= {*had.target_modules}
        ):
            return
        raise UserError(
            f"the learner came back with adapters of {needs}, this engine was started for {had or 'none'}: "
            "start a new rollout server"
        )

    def _hear_refusal(self, refused: messages.Refused) -> None:
        if not refused.retry:
            raise UserError(f"the learner refuses this rollout server: {refused.reason}")
        # The connection was cut, and whatever was said on the new one before Hello was not heard: Ready perhaps,
        # or what is loaded.
        self._is_greeting_again = True
        self._confirmed_version = NO_VERSION
        self._dealer.try_send(encode(said_now(self._hello)))

    async def _say(self, message: messages.Message) -> None:
        """Once."""
        await self._dealer.send(encode(message))
        self._vital_signs.progress += 1

    async def _work(self, lease: messages.Lease) -> None:
        try:
            group = await self._runner.run(lease)
        except LeaseFailure as failure:
            logger.warning("task %d failed (%s): %s", lease.task_id, failure.kind, failure.reason)
            failed = messages.LeaseFailed(lease_id=lease.lease_id, kind=failure.kind, reason=failure.reason[:4096])
            await self._dealer.send(encode(failed))
            self._leases.drop(lease.lease_id)
        else:
            # A token may only claim a version that this server has loaded, and found right.
            await self._receiver.wait_for_version(group.newest_version)
            self._leases.finished(group)
        self._vital_signs.progress += 1

    async def _send_groups(self) -> None:
        """What is finished while a message is made and sent goes with the next one."""
        while True:
            message = await self._leases.next_message(time.monotonic)
            if message.newest_version > self._confirmed_version:  # the learner has to know first that it is loaded
                await self._say_alive()
            await self._dealer.send(message.frames)

    async def _say_alive(self) -> None:
        heartbeat = self._vital_signs.heartbeat()
        await self._dealer.send(encode(heartbeat))
        self._confirmed_version = heartbeat.loaded_version

    async def _heartbeat(self) -> None:
        aloud = WaitingAloud(self._dealer.address, time.monotonic())
        while True:
            self._engine.flush()
            heartbeat = self._vital_signs.heartbeat()
            if self._dealer.try_send(encode(heartbeat)):
                self._confirmed_version = heartbeat.loaded_version
            self._leases.resend(self._dealer.try_send, time.monotonic(), after_s=RESEND_AFTER_S)
            awaited = self._leases.awaited_version(self._receiver.loaded_version)
            aloud.look(
                time.monotonic(),
                heard_s=self._last_heard_s,
                is_working=self._leases.num_working > 0 and awaited is None,
                waiting_for=self._vital_signs.waiting_for if awaited is None else f"snapshot {awaited} of the learner",
                every_s=SAY_IT_EVERY_S,
            )
            await asyncio.sleep(HEARTBEAT_INTERVAL_S)

    async def _watch_engine(self) -> None:
        """Progress is what the engine does, not what its front end says; a dead engine ends this process."""
        while True:
            await self._engine.check_health(HEALTH_TIMEOUT_S)
            self._vital_signs.progress += 1
            await asyncio.sleep(HEALTH_INTERVAL_S)
