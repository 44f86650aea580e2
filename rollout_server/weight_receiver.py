"""WeightReceiver: has each new version brought here in the background, applied by the engine, and judged by its canary.

Generation goes on until the engine itself pauses to apply. A version counts as loaded once the engine's own
log-probabilities of the canary's prompt are the learner's; until then nothing that it sampled leaves this server.
"""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable

from common.events import EventLog
from common.lifecycle import UserError
from common.snapshot import NO_VERSION, SnapshotError, SnapshotManifest
from common.wire import Dealer
from rollout_server.inference import EngineError, InferenceEngine, LocalSnapshot
from rollout_server.pulled_snapshots import PulledSnapshots
from rollout_server.relay import Relaying
from rollout_server.snapshot_client import SnapshotClient
from rollout_server.snapshot_transport import ArrivedSnapshot, SnapshotTransport, WeightTarget
from rollout_server.version_hold import VersionHold

logger = logging.getLogger(__name__)

ASK_AGAIN_S = 0.2  # after an answer that was of no use, and as much longer after each further one in a row
MAX_PATIENCE = 10  # times ASK_AGAIN_S
MAX_FAILED_CANARIES = 2  # in a row; the second is of weights that were copied whole


async def _ignore(doubt: str) -> None:
    pass


async def _not_told() -> None:
    pass


class WeightReceiver:
    """Keeps the engine at the newest published snapshot of the run."""

    def __init__(
        self,
        engine: InferenceEngine,
        events: EventLog,
        *,
        transport: Callable[[WeightTarget, SnapshotClient, Relaying], SnapshotTransport] = PulledSnapshots,
        relaying: Relaying | None = None,
    ) -> None:
        """relaying: None: weights come from the learner alone, and are given to nobody."""
        self._engine = engine
        self._events = events
        self._target = WeightTarget()
        self._client = SnapshotClient()
        self.relaying = relaying or Relaying()
        self._transport = transport(self._target, self._client, self.relaying)
        self._changed = asyncio.Condition()
        self._failed_canaries = 0  # in a row
        self._hold = VersionHold()
        self.hold_s = 0.0  # a version is held for so long at most once a newer one is published
        self.doubt = ""  # why nothing that the engine samples may be used; empty when nothing speaks against it
        self.paused_s = 0.0  # time the engine was paused for updates, since the start
        self.deltas_loaded = 0
        self.full_loaded = 0
        self.canaries_failed = 0

    def __repr__(self) -> str:
        doubt = f", in doubt: {self.doubt}" if self.doubt else ""
        return f"<WeightReceiver at version {self.loaded_version}, published {self.published_version}{doubt}>"

    @property
    def loaded_version(self) -> int:
        """The newest version that the engine is known to compute with."""
        return self._target.loaded_version

    @property
    def holding(self) -> int:
        """The loaded version, where the engine is kept at that for an evaluation; else NO_VERSION."""
        return self.loaded_version if self._hold.holds(self.loaded_version) and not self.doubt else NO_VERSION

    @property
    def published_version(self) -> int:
        return self._target.published_version

    @property
    def received_bytes(self) -> int:
        """Of chunks that were taken, since the start."""
        return self._client.received_bytes

    def close(self) -> None:
        self._transport.close()

    async def follow(self, run_id: str) -> None:
        """Versions of another run, or of another life of this run, mean nothing here: start over."""
        async with self._changed:
            if run_id != self._target.run_id:
                self._target.run_id = run_id
                self._target.loaded_version = self._target.published_version = NO_VERSION
                self._hold.clear()
                self._changed.notify_all()

    async def announce(self, published_version: int) -> None:
        """The learner published `published_version`; it will be brought here when what is on its way is there."""
        async with self._changed:
            self._target.published_version = max(self.published_version, published_version)
            self._changed.notify_all()

    async def hold(self, first: int, last: int) -> None:
        """Stay at the first version from `first` to `last` that is loaded; an empty range: at none.

        Generation goes on, and a version is held for hold_s at most once a newer one is published.
        """
        async with self._changed:
            self._hold.set(first, last)
            self._changed.notify_all()

    async def _released(self) -> None:
        """Returns when the engine may have a newer version; one is published."""
        async with self._changed:
            version = self.holding
            try:
                async with asyncio.timeout(self.hold_s):
                    await self._changed.wait_for(lambda: self.holding == NO_VERSION)
            except TimeoutError:
                logger.info("version %d was held for %g s for its evaluation; going on", version, self.hold_s)
                self._hold.run_out(version)

    async def wait_for_version(self, version: int) -> None:
        """Returns once weights of at least `version` are loaded."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.loaded_version >= max(version, 0))

    async def run(
        self,
        dealer: Dealer,
        *,
        on_doubt: Callable[[str], Awaitable[None]] = _ignore,
        on_hold: Callable[[], Awaitable[None]] = _not_told,
    ) -> None:
        """Load what is published, for ever.

        on_doubt: told why nothing that the engine samples may be used, before the weights are repaired.
        on_hold: told when a version was loaded that is to be held.
        Raises EngineError when the weights cannot be brought into a known state, UserError when the engine computes
        with others than it was given, or refuses what the learner publishes.
        """
        num_useless = 0  # answers in a row
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self.published_version > self.loaded_version)
            await self._released()
            run_id = self._target.run_id
            async with self._transport.next_version(dealer) as arrived:
                if arrived is not None and run_id == self._target.run_id:
                    await self._released()  # it may have been on its way already
                    await self._apply(arrived)
            num_useless = num_useless + 1 if arrived is None else 0
            if arrived is None:
                await asyncio.sleep(ASK_AGAIN_S * min(num_useless, MAX_PATIENCE))
            elif arrived.manifest.is_base_model:
                self._target.base_model = arrived.manifest.content_digest
            elif run_id == self._target.run_id:
                await self._judge(arrived.manifest, on_doubt)
                if self.holding != NO_VERSION:
                    await on_hold()

    async def _apply(self, arrived: ArrivedSnapshot) -> None:
        manifest = arrived.manifest
        snapshot = LocalSnapshot(manifest=manifest, path=arrived.path, changes=arrived.changes)
        if manifest.is_base_model:
            self._target.base_model = b""  # what the engine holds is not known until this one is loaded
        kind = "base_model_update" if manifest.is_base_model else "weight_update"
        with self._events.interval(
            kind, version=manifest.version, num_bytes=arrived.num_bytes, form=arrived.form
        ) as fields:
            try:
                update = await self._engine.load_weights(snapshot)
            except EngineError as error:
                # Half-applied weights are repaired by applying the whole snapshot once more; twice is not bad luck.
                logger.warning("applying %s failed, once more: %s", manifest.title, error)
                whole = LocalSnapshot(manifest=manifest, path=arrived.path)
                update = await self._engine.load_weights(whole)
            except SnapshotError as error:
                raise self._refused(error) from error
            fields |= {"pause_s": update.pause_s, "in_place": update.in_place}
        self.paused_s += update.pause_s
        if manifest.is_base_model:
            logger.info(
                "the base model of the adapters is loaded: %.1f kB (%s)", manifest.num_bytes / 1e3, arrived.form
            )
            return
        self.deltas_loaded += arrived.changes is not None
        self.full_loaded += arrived.changes is None
        logger.info(
            "at version %d, %d behind: %.1f kB (%s) of %.1f kB pulled, paused for %.0f ms",
            *(manifest.version, max(0, self.published_version - manifest.version), arrived.num_bytes / 1e3),
            *(arrived.form, manifest.num_bytes / 1e3, update.pause_s * 1e3),
        )

    def _refused(self, error: SnapshotError) -> UserError:
        """What comes next would be refused too."""
        self.doubt = f"the engine refuses what the learner publishes: {error}"
        return UserError(
            f"{self.doubt}; start a new rollout server, whose engine will be as the run needs it now, and if that is "
            "refused too, give it the learner's own model with --model"
        )

    async def _judge(self, manifest: SnapshotManifest, on_doubt: Callable[[str], Awaitable[None]]) -> None:
        """The engine was given the version: does it compute with it?

        A version without a canary is taken at its digests' word. One that follows a failed canary was copied whole.
        """
        complaint = await self._complaint(manifest)
        if complaint is not None:
            self._mistrust(complaint)
            await on_doubt(complaint)
            return
        if manifest.canary is not None:
            self._failed_canaries = 0
        if self.doubt:
            logger.warning("back in service at version %d, which was loaded whole", manifest.version)
        async with self._changed:
            self._target.loaded_version = manifest.version
            self.doubt = ""
            self._changed.notify_all()

    async def _complaint(self, manifest: SnapshotManifest) -> str | None:
        """What is wrong with the engine's log-probabilities, if anything is."""
        canary, version = manifest.canary, manifest.version
        if canary is None:
            return None
        start_s = time.time()
        try:
            distance = canary.distance(await self._engine.token_logprobs(canary.token_array()))
        except ValueError as error:
            return f"the canary of version {version} cannot be asked: {error}"
        is_good = distance <= canary.tolerance
        self._events.record(
            "canary", start_s, time.time(), version=version, ok=is_good, tolerance=canary.tolerance,
            distance=distance if math.isfinite(distance) else None,
        )  # fmt: skip
        if is_good:
            return None
        return (
            f"with version {version} loaded, the engine's log-probabilities of the canary are {distance:.3g} nats per "
            f"token from the learner's, {canary.tolerance:g} are allowed"
        )

    def _mistrust(self, complaint: str) -> None:
        self._failed_canaries += 1
        self.canaries_failed += 1
        self.doubt = complaint
        if self._failed_canaries >= MAX_FAILED_CANARIES:
            raise UserError(
                f"{complaint}; so they were before the whole snapshot was loaded. This engine computes something else "
                "than the learner with the same weights: compare versions, dtype and model code of both, or raise the "
                "learner's canary_tolerance if the difference is no more than rounding"
            )
        logger.error("out of service until the whole snapshot is loaded: %s", complaint)
        self._transport.forget()
        self._target.base_model = b""  # what adapters are added to may be what is wrong
