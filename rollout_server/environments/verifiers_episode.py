"""What is said to a verifiers environment server and by it, and what an episode was worth. No IO.

A request is [id, method, msgpack]; the server answers with any number of [id, "delta", msgpack], which are what its
traces have grown by, and one [id, "reply", msgpack]. A rollout that failed is a reply like any other, with success
true and without rewards.
"""

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from common.codec import Frame
from rollout_server.environments.environment import BadRow, EnvironmentFailure, Outcome, Row, check_reward

if TYPE_CHECKING:
    from rollout_server.gateway.session import Session

NO_KEY = "COUNTERCURRENT_NO_KEY"
"""A variable that no server has. The one that verifiers reads by default holds a key of its user's, for others."""

TRUNCATED = frozenset({"max_turns", "max_input_tokens", "max_output_tokens", "max_total_tokens", "compaction_failed"})
"""Stop conditions of a trace that did not come to its end."""


class TraceError(msgspec.Struct, frozen=True):
    type: str = "error"
    message: str = ""


class Head(msgspec.Struct, frozen=True):
    """How an episode of the server ended, without its traces."""

    ok: bool = False
    is_timeout: bool = False
    errors: list[TraceError] = []


class Summary(msgspec.Struct, frozen=True):
    """How large a trace is by the server's own count."""

    id: str
    nodes: int
    calls: int


class Reply(msgspec.Struct, frozen=True):
    success: bool
    error: str | None = None
    head: Head | None = None
    traces: list[Summary] = []


class Call(msgspec.Struct, frozen=True):
    """One that the agent made of the policy; without a node when it failed."""

    node: int | None = None


class Reward(msgspec.Struct, frozen=True):
    score: Any = None
    weight: Any = 1.0


class Changes(msgspec.Struct, frozen=True):
    """Fields of a trace that have another value now; the last one counts."""

    ok: bool | None = None
    is_timeout: bool | None = None
    stop_condition: str | None = None
    rewards: dict[str, Reward | None] | None = None


class Delta(msgspec.Struct, frozen=True):
    """What a trace has grown by."""

    trace: str
    discard: bool = False  # it belongs to an attempt that the server has given up
    nodes: list[msgspec.Raw] = []
    calls: list[Call] = []
    errors: list[TraceError] = []
    set: Changes = Changes()


class Trace:
    """What is known of a trace; what the policy said is the gateway's to know."""

    def __init__(self) -> None:
        self.num_nodes = 0
        self.num_calls = 0
        self.num_answers = 0
        self.last_error: TraceError | None = None
        self.ok = False
        self.is_timeout = False
        self.stop_condition: str | None = None
        self.rewards: dict[str, Reward | None] = {}

    def grow(self, delta: Delta) -> None:
        self.num_nodes += len(delta.nodes)
        self.num_calls += len(delta.calls)
        self.num_answers += sum(call.node is not None for call in delta.calls)
        self.last_error = delta.errors[-1] if delta.errors else self.last_error
        for name in Changes.__struct_fields__:
            if (value := getattr(delta.set, name)) is not None:
                setattr(self, name, value)


def run_request(row: Row, session: "Session") -> bytes:
    """Has the server play the row. Raises BadRow for numbers that do not fit.

    The key is part of the URL, for the server would read one from its own environment. Sampling is not its to say.
    """
    client = {"type": "eval", "base_url": session.url, "api_key_var": NO_KEY}
    request = {"task_data": dict(row.fields), "client": client, "model": session.model, "sampling": {}}
    try:
        return msgspec.msgpack.encode(request)
    except (OverflowError, TypeError) as error:
        raise BadRow(f"the row cannot be sent: {error}") from error


def cancel_request(request_id: str) -> bytes:
    return msgspec.msgpack.encode({"request_id": request_id})


class Record:
    """What the server says of one run, as it comes."""

    def __init__(self) -> None:
        self._traces: dict[str, Trace] = {}

    def __repr__(self) -> str:
        return f"<Record of {len(self._traces)} traces>"

    def add(self, payload: Frame) -> None:
        """Of a delta. Raises EnvironmentFailure for one that makes no sense."""
        delta = _decoded(payload, Delta)
        if delta.discard:
            self._traces.pop(delta.trace, None)
        else:
            self._traces.setdefault(delta.trace, Trace()).grow(delta)

    def outcome(self, payload: Frame, session: "Session") -> Outcome:
        """Of the reply. Raises EnvironmentFailure where there is no reward, or one that is not that of the session's
        tokens; and BadRow for a row that the server does not want."""
        reply = _decoded(payload, Reply)
        trace = self._whole_trace(_head(reply), reply.traces)
        if trace.num_answers != session.num_calls:
            raise EnvironmentFailure(
                "environment_error",
                f"the gateway gave {session.num_calls} answers, and the server counts {trace.num_answers} in what it "
                f"rewards: it began anew in the middle (set its retries to 0), or asked somebody else",
            )
        is_cut = trace.is_timeout or trace.stop_condition in TRUNCATED
        return Outcome(reward=_total(trace.rewards), truncated=is_cut)

    def _whole_trace(self, head: Head, summaries: list[Summary]) -> Trace:
        if len(summaries) != 1:
            raise EnvironmentFailure(
                "environment_error",
                f"the environment has {len(summaries)} agents, and their tokens cannot be told apart: use one "
                f"with a single agent",
            )
        [summary] = summaries
        trace = self._traces.get(summary.id)
        if trace is None or (trace.num_nodes, trace.num_calls) != (summary.nodes, summary.calls):
            raise EnvironmentFailure("environment_error", f"a part of what the server said is lost: {summary}")
        if not trace.ok or not head.ok:
            raise _failed(trace.last_error, is_timeout=trace.is_timeout or head.is_timeout)
        return trace


def _head(reply: Reply) -> Head:
    """Raises EnvironmentFailure and BadRow for a run that failed as a whole."""
    if not reply.success or reply.head is None:
        reason = reply.error or "the server gave no reason"
        if reason.startswith("ValidationError"):
            raise BadRow(f"the server does not want this row: {reason}")
        raise EnvironmentFailure("environment_error", reason)
    if reply.head.errors and not reply.head.ok:
        raise _failed(reply.head.errors[-1], is_timeout=reply.head.is_timeout)
    return reply.head


def _failed(error: TraceError | None, *, is_timeout: bool) -> EnvironmentFailure:
    reason = f"{error.type}: {error.message}" if error is not None else "the rollout failed"
    return EnvironmentFailure("environment_timeout" if is_timeout else "environment_error", reason)


def _total(rewards: dict[str, Reward | None]) -> float:
    """Their weighted sum; raises EnvironmentFailure when there are none, or one has no plausible value."""
    if not rewards:
        raise EnvironmentFailure("bad_reward", "the rollout has no rewards")
    total = 0.0
    for name, reward in rewards.items():
        if reward is None:
            raise EnvironmentFailure("bad_reward", f"the reward {name[:80]!r} has no value")
        total += check_reward(reward.score) * check_reward(reward.weight)
    return check_reward(total)


Message = TypeVar("Message", Delta, Reply)


def _decoded(payload: Frame, kind: type[Message]) -> Message:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EnvironmentFailure("environment_error", f"what the server says makes no sense: {error}") from error
