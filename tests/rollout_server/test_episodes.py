import asyncio
import dataclasses
import itertools
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from common.codec import check_group, check_vocabulary, pack_group, read_columns
from common.environments import EnvironmentSettings
from common.messages import Lease
from common.snapshot import TensorSpec, build_manifest
from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason
from rollout_server.environments import environment_at
from rollout_server.environments.environment import EnvironmentFailure, Row, Said, StepResult
from rollout_server.episodes import EpisodeRunner, sample_seed
from rollout_server.inference import Completion, EngineError, LocalSnapshot, Sampling
from rollout_server.lease_failure import FAILURE_KINDS, LeaseFailure
from rollout_server.table_engine import TABLE_TENSOR, TableEngine
from tests.rollout_server.tokenizer_twin import BOS_ID, EOS_ID, CharacterTokenizer

TOKENIZER = CharacterTokenizer()
URL = "scripted:"


class ScriptedEnvironment:
    """Answers each step of each episode with the next of its results; an exception is raised."""

    url = URL

    def __init__(
        self,
        *results: StepResult | Exception,
        step: Callable[[], Awaitable[None]] | None = None,
        settings: EnvironmentSettings | None = None,
    ) -> None:
        self.settings = settings or EnvironmentSettings()
        self.results = results or (StepResult(reward=1.0, done=True),)
        self.texts: list[str] = []
        self.num_open = 0
        self._step = step

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    @asynccontextmanager
    async def episode(self, row: Row, *, seed: int) -> AsyncIterator["ScriptedEpisode"]:
        self.num_open += 1
        try:
            yield ScriptedEpisode(self, row, self.results)
        finally:
            self.num_open -= 1


class ScriptedEpisode:
    def __init__(self, environment: ScriptedEnvironment, row: Row, results: Sequence[StepResult | Exception]) -> None:
        self._environment = environment
        self._row = row
        self._results = iter(results)

    async def reset(self) -> Any:
        return self._row.prompt

    async def step(self, said: Said) -> StepResult:
        self._environment.texts.append(said.text)
        if self._environment._step is not None:
            await self._environment._step()
        result = next(self._results)
        if isinstance(result, Exception):
            raise result
        return result


def a_lease(prompt: Any = "12+3=", **changes: Any) -> Lease:
    fields: dict[str, Any] = {
        "lease_id": 7,
        "task_id": 5,
        "environment": URL,
        "row": json.dumps({"prompt": prompt}).encode(),
        "group_size": 4,
        "seed": 11,
        "min_version": 0,
        "max_group_bytes": 1 << 20,
    }
    return Lease(**fields | changes)


async def an_engine(
    tmp_path: Path, *, max_model_len: int = 64, eos_logit: float = 1.0, version: int = 0
) -> TableEngine:
    """Samples letters and ends after some: a table of zeros but for the end-of-sequence token."""
    size = TOKENIZER.vocab_size
    engine = TableEngine(vocab_size=size, max_model_len=max_model_len, eos_id=EOS_ID)
    table = np.zeros((size, size), dtype=np.float32)
    table[:, EOS_ID] = eos_logit
    data = table.tobytes()
    (tmp_path / "table").write_bytes(data)
    specs = (TensorSpec(TABLE_TENSOR, table.shape, "float32", 0),)
    manifest = build_manifest(memoryview(data), specs, run_id="r", version=version)
    await engine.load_weights(LocalSnapshot(manifest=manifest, path=tmp_path / "table"))
    return engine


async def at_once(version: int) -> None:
    del version


def a_runner(engine: Any, environment: Any = None, **changes: Any) -> EpisodeRunner:
    settings = {"temperature": 1.0, "max_new_tokens": 8, "max_model_len": 64, "wait_for_version": at_once}
    environment = environment or ScriptedEnvironment()
    return EpisodeRunner(engine, {environment.url: environment}, TOKENIZER, **settings | changes)


async def failure_of(runner: EpisodeRunner, lease: Lease) -> LeaseFailure:
    with pytest.raises(LeaseFailure) as caught:
        await runner.run(lease)
    assert caught.value.kind in FAILURE_KINDS
    return caught.value


@pytest.mark.parametrize(("eos_logit", "max_turns"), [(50.0, 1), (-50.0, 9)])  # no turn left; cut in the middle of one
async def test_an_episode_that_cannot_go_on_is_rewarded_for_ending_there(tmp_path, eos_logit, max_turns):
    async def end() -> float:
        return 0.5

    settings = EnvironmentSettings(max_turns=max_turns)
    environment = ScriptedEnvironment(StepResult(reward=0.25, done=False, end=end), settings=settings)
    group = await a_runner(await an_engine(tmp_path, eos_logit=eos_logit), environment).run(a_lease(group_size=1))
    [trajectory] = group.trajectories
    assert (trajectory.reward, trajectory.finish_reason) == (0.75, FinishReason.TRUNCATED)


async def test_a_lease_becomes_a_group_of_prompt_and_sampled_ids_with_their_evidence(tmp_path):
    environment = ScriptedEnvironment(StepResult(reward=0.5, done=True))
    group = await a_runner(await an_engine(tmp_path, version=3), environment).run(a_lease())
    assert (group.lease_id, group.task_id, len(group.trajectories)) == (7, 5, 4)
    prompt = TOKENIZER.encode("12+3=", add_special_tokens=True)
    texts = []
    for trajectory in group.trajectories:
        sampled = np.arange(len(trajectory)) >= len(prompt)
        assert trajectory.token_ids[: len(prompt)].tolist() == prompt
        texts.append(TOKENIZER.decode(trajectory.token_ids[sampled].tolist(), skip_special_tokens=True))
        np.testing.assert_array_equal(trajectory.loss_mask, sampled)
        np.testing.assert_array_equal(trajectory.token_versions, np.where(sampled, 3, NOT_SAMPLED))
        assert (trajectory.behavior_logprobs[~sampled] == 0).all()
        assert (trajectory.behavior_logprobs[sampled] < 0).all()
        assert [trajectory.token_ids.dtype, trajectory.behavior_logprobs.dtype] == [np.int32, np.float32]
        assert (trajectory.reward, trajectory.turns) == (0.5, 1)
        ended = trajectory.token_ids[-1] == EOS_ID
        assert trajectory.finish_reason is (FinishReason.TERMINATED if ended else FinishReason.TRUNCATED)
    assert sorted(texts) == sorted(environment.texts)
    assert environment.num_open == 0


async def test_the_samples_of_a_lease_depend_on_nothing_but_its_seed(tmp_path):
    runner = a_runner(await an_engine(tmp_path, eos_logit=-9.0))
    again, once = await asyncio.gather(runner.run(a_lease()), runner.run(a_lease()))
    other = await runner.run(a_lease(seed=12))
    tokens = [[trajectory.token_ids.tobytes() for trajectory in group.trajectories] for group in (once, again, other)]
    assert tokens[0] == tokens[1]
    assert len({*tokens[0], *tokens[2]}) == 8


def test_sample_seeds_are_those_of_split_mix_64_and_fit_63_bits():
    # The first outputs for the state 1234567 are published with the reference implementation.
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [sample_seed(1234567, index) for index in range(3)] == [output >> 1 for output in published]
    seeds = {sample_seed(seed, index) for seed in range(100) for index in range(100)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 1 << 63 for seed in [*seeds, sample_seed((1 << 53) - 1, 4095)])


async def test_nothing_is_sampled_before_the_version_that_the_lease_asks_for(tmp_path):
    engine = await an_engine(tmp_path)
    asked: list[int] = []
    loaded = asyncio.Event()

    async def wait_for_version(version: int) -> None:
        asked.append(version)
        await loaded.wait()
        engine.loaded_version = version

    environment = ScriptedEnvironment()
    async with asyncio.TaskGroup() as tasks:
        runner = a_runner(engine, environment, wait_for_version=wait_for_version)
        run = tasks.create_task(runner.run(a_lease(min_version=2)))
        await asyncio.sleep(0.01)
        assert (asked, environment.texts) == ([2], [])
        loaded.set()
    assert run.result().oldest_version == 2


async def test_a_lease_before_the_first_snapshot_waits_for_that_one(tmp_path):
    asked: list[int] = []

    async def wait_for_version(version: int) -> None:
        asked.append(version)

    await a_runner(await an_engine(tmp_path), wait_for_version=wait_for_version).run(a_lease(min_version=-1))
    assert asked == [0]


async def test_generation_is_cut_to_what_fits_the_model(tmp_path):
    engine = await an_engine(tmp_path, max_model_len=10, eos_logit=-99.0)
    group = await a_runner(engine, max_new_tokens=100).run(a_lease("12+3="))
    assert {len(trajectory) for trajectory in group.trajectories} == {10}
    assert {trajectory.finish_reason for trajectory in group.trajectories} == {FinishReason.TRUNCATED}


async def test_the_engine_is_asked_for_no_more_than_fits_the_run_or_the_model():
    for limits, expected in [((8, 64), 8), ((100, 20), 14), ((100, 1000), 58)]:
        engine = EngineThat(GOOD)
        runner = a_runner(engine, max_new_tokens=limits[0], max_model_len=limits[1])
        await runner.run(a_lease("12+3=", group_size=1))
        assert [sampling.max_new_tokens for sampling in engine.asked] == [expected]


async def test_a_prompt_that_leaves_no_room_fails_its_lease_with_the_numbers(tmp_path):
    failure = await failure_of(a_runner(await an_engine(tmp_path, max_model_len=6)), a_lease("12+3="))
    assert (failure.kind, failure.reason) == ("prompt_too_long", "6 tokens; the model takes 6 in all")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b"{", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'{"prompt": "\xff"}', "not a JSON object"),
        (b'{"prompt": NaN}', "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b'{"question": "a", "answer": 1}', 'no "prompt"; it has: answer, question'),
        (b'{"prompt": ""}', "empty"),
        (b'{"prompt": 3}', "must be a text or a list"),
        (b'{"prompt": []}', "must be a text or a list"),
        (b'{"prompt": [{"role": "user"}]}', "must be a text or a list"),
        (b'{"prompt": "UPPER"}', "cannot be tokenized: no token for 'U'"),
        (b'{"prompt": [{"role": "judge", "content": "a"}]}', "cannot be tokenized: only users and"),
    ],
)
async def test_a_row_without_a_usable_prompt_fails_its_lease_with_the_reason(tmp_path, row, reason):
    failure = await failure_of(a_runner(await an_engine(tmp_path)), a_lease(row=row))
    assert failure.kind == "bad_row"
    assert reason in failure.reason


async def test_a_group_with_more_bytes_than_the_lease_pays_for_is_not_sent(tmp_path):
    engine = await an_engine(tmp_path)
    group = await a_runner(engine).run(a_lease())
    assert (await a_runner(engine).run(a_lease(max_group_bytes=group.num_bytes))).num_bytes == group.num_bytes
    failure = await failure_of(a_runner(engine), a_lease(max_group_bytes=group.num_bytes - 1))
    assert failure.kind == "group_too_large"


async def test_a_lease_of_another_environment_is_refused(tmp_path):
    failure = await failure_of(a_runner(await an_engine(tmp_path)), a_lease(environment="python:a:b"))
    assert failure.kind == "wrong_environment"


@pytest.mark.parametrize("kind", ["environment_error", "environment_timeout", "bad_reward"])
async def test_a_failed_episode_fails_the_lease_with_the_environments_kind_and_reason(tmp_path, kind):
    environment = ScriptedEnvironment(EnvironmentFailure(kind, "because"))
    failure = await failure_of(a_runner(await an_engine(tmp_path), environment), a_lease())
    assert (failure.kind, failure.reason) == (kind, "because")
    assert environment.num_open == 0


@pytest.mark.parametrize("reward", [float("nan"), float("-inf"), 1e10, None, "1", True])
async def test_a_reward_that_is_no_plausible_number_never_reaches_a_trajectory(tmp_path, reward):
    environment = ScriptedEnvironment(StepResult(reward=reward, done=True))
    assert (await failure_of(a_runner(await an_engine(tmp_path), environment), a_lease())).kind == "bad_reward"


async def test_when_one_sample_fails_the_others_are_cancelled(tmp_path):
    arrived = 0

    async def fail_at_the_third() -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 3:
            raise EnvironmentFailure("environment_error", "third")
        await asyncio.Event().wait()

    environment = ScriptedEnvironment(step=fail_at_the_third)
    runner = a_runner(await an_engine(tmp_path), environment)
    async with asyncio.timeout(5):
        assert (await failure_of(runner, a_lease())).reason == "third"
    assert (environment.num_open, runner.num_running) == (0, 0)


async def test_cancelling_a_run_ends_its_episodes(tmp_path):
    environment = ScriptedEnvironment(step=asyncio.Event().wait)
    runner = a_runner(await an_engine(tmp_path), environment)
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(runner.run(a_lease()))
        async with asyncio.timeout(5):
            while len(environment.texts) < 4:
                await asyncio.sleep(0)
        assert (environment.num_open, runner.num_running) == (4, 1)
        run.cancel()
    assert (environment.num_open, runner.num_running) == (0, 0)


async def test_a_bug_in_an_environment_is_not_mistaken_for_a_failed_lease(tmp_path):
    environment = ScriptedEnvironment(ZeroDivisionError("bug"))
    with pytest.raises(ExceptionGroup, match="unhandled errors"):
        await a_runner(await an_engine(tmp_path), environment).run(a_lease())


class EngineThat:
    """Gives one fixed completion, or raises."""

    vocab_size = max_model_len = 64

    def __init__(self, outcome: Completion | Exception) -> None:
        self._outcome = outcome
        self.asked: list[Sampling] = []

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        self.asked.append(sampling)
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


GOOD = Completion(
    token_ids=np.array([5, EOS_ID], dtype=np.int32),
    logprobs=np.array([-1.0, -2.0], dtype=np.float32),
    token_versions=np.array([4, 5], dtype=np.int32),
    terminated=True,
)
EMPTY = {"token_ids": np.zeros(0), "logprobs": np.zeros(0), "token_versions": np.zeros(0)}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (EMPTY, "no token"),
        ({"logprobs": np.array([-1.0])}, "2 tokens, 1 log-probs, 2 versions"),
        ({"logprobs": np.array([-1.0, np.nan])}, "not finite"),
        ({"logprobs": np.array([-1.0, -np.inf])}, "not finite"),
        ({"token_versions": np.array([3, 4])}, "version 3, the lease wants at least 4"),
    ],
)
async def test_a_sample_without_sound_evidence_fails_its_lease(changes, reason):
    assert (await a_runner(EngineThat(GOOD)).run(a_lease(min_version=4))).oldest_version == 4
    failure = await failure_of(a_runner(EngineThat(dataclasses.replace(GOOD, **changes))), a_lease(min_version=4))
    assert failure.kind == "bad_sample"
    assert reason in failure.reason


@pytest.mark.parametrize("error", [EngineError("the engine is dead"), ValueError("the engine is dead")])
async def test_an_engine_that_dies_or_refuses_fails_the_lease(error):
    failure = await failure_of(a_runner(EngineThat(error)), a_lease())
    assert failure.kind == "engine_error"
    assert "the engine is dead" in failure.reason
    assert failure.__cause__ is error


# --- several turns -------------------------------------------------------------------------------------------------


async def test_the_prompt_of_each_turn_is_all_ids_before_it_and_the_environments_are_masked(tmp_path):
    engine = await an_engine(tmp_path, eos_logit=99.0)
    prompts: list[list[int]] = []
    generate = engine.generate

    async def recording(prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        prompts.append(prompt_ids.tolist())
        return await generate(prompt_ids, sampling, request_id)

    engine.generate = recording  # type: ignore[method-assign]
    environment = ScriptedEnvironment(
        StepResult(reward=0.25, done=False, observation="no\n"),
        StepResult(reward=0.0, done=False, observation="colder\n"),
        StepResult(reward=0.5, done=True),
    )
    (trajectory,) = (await a_runner(engine, environment).run(a_lease("guess\n", group_size=1))).trajectories
    for earlier, later in zip(prompts, [*prompts[1:], trajectory.token_ids.tolist()], strict=True):
        assert later[: len(earlier)] == earlier
        assert len(later) > len(earlier)
    text = TOKENIZER.decode(trajectory.token_ids.tolist(), skip_special_tokens=False)
    assert text == "<bos>guess\n<eos>no\n<eos>colder\n<eos>"
    np.testing.assert_array_equal(trajectory.loss_mask, trajectory.token_ids == EOS_ID)
    np.testing.assert_array_equal(trajectory.token_versions == NOT_SAMPLED, ~trajectory.loss_mask)
    assert (trajectory.reward, trajectory.turns) == (0.75, 3)
    assert trajectory.finish_reason is FinishReason.TERMINATED


async def test_each_turn_samples_with_a_seed_of_its_own():
    engine = EngineThat(GOOD)
    more = StepResult(reward=0, done=False, observation="a")
    environment = ScriptedEnvironment(more, more, StepResult(reward=0, done=True))
    await a_runner(engine, environment).run(a_lease(group_size=1, seed=9))
    seeds = [sampling.seed for sampling in engine.asked]
    assert seeds == [sample_seed(9, 0), *[sample_seed(sample_seed(9, 0), turn) for turn in (1, 2)]]


@pytest.mark.parametrize(
    ("step", "eos_logit"),
    [
        (StepResult(reward=1, done=True, truncated=True), 99.0),  # the environment's limit
        (StepResult(reward=1, done=False, observation="go on"), -99.0),  # the text was cut
        (StepResult(reward=1, done=False, observation="x" * 100), 99.0),  # what comes next does not fit, not even cut
    ],
)
async def test_an_episode_that_did_not_reach_its_end_is_truncated(tmp_path, step, eos_logit):
    runner = a_runner(await an_engine(tmp_path, eos_logit=eos_logit), ScriptedEnvironment(step), max_model_len=40)
    (trajectory,) = (await runner.run(a_lease(group_size=1))).trajectories
    assert trajectory.finish_reason is FinishReason.TRUNCATED
    assert (trajectory.reward, trajectory.turns) == (1.0, 1)
    assert trajectory.loss_mask[-1]


class NeverDone(ScriptedEnvironment):
    """Answers each step alike, for ever."""

    def __init__(self, observation: Any, **settings: Any) -> None:
        super().__init__(settings=EnvironmentSettings(**settings))
        self.results = itertools.repeat(StepResult(reward=0.5, done=False, observation=observation))


async def test_a_chat_goes_on_with_what_the_template_puts_between_two_turns(tmp_path):
    environment = ScriptedEnvironment(
        StepResult(reward=0, done=False, observation="no"),
        StepResult(reward=0, done=False, observation=[{"role": "user", "content": "warm"}]),
        StepResult(reward=1, done=True),
    )
    runner = a_runner(await an_engine(tmp_path, eos_logit=99.0), environment)
    lease = a_lease([{"role": "user", "content": "guess"}], group_size=1)
    (trajectory,) = (await runner.run(lease)).trajectories
    text = TOKENIZER.decode(trajectory.token_ids.tolist(), skip_special_tokens=False)
    assert text == "<bos><user>guess<policy><eos>\n<user>no<policy><eos>\n<user>warm<policy><eos>"
    np.testing.assert_array_equal(trajectory.loss_mask, trajectory.token_ids == EOS_ID)
    assert (trajectory.turns, trajectory.continues) == (3, False)


async def test_weights_that_change_in_the_middle_of_an_episode_are_told_apart_token_by_token(tmp_path):
    engine = await an_engine(tmp_path, eos_logit=99.0, version=3)

    async def update() -> None:
        engine.loaded_version += 1

    more = StepResult(reward=0, done=False, observation="a")
    environment = ScriptedEnvironment(more, more, StepResult(reward=1, done=True), step=update)
    (trajectory,) = (await a_runner(engine, environment).run(a_lease(group_size=1))).trajectories
    assert trajectory.version_runs() == [(3, 1), (4, 1), (5, 1)]
    np.testing.assert_array_equal(trajectory.token_versions == NOT_SAMPLED, ~trajectory.loss_mask)


async def test_a_long_observation_is_cut_with_a_mark_and_leaves_room_for_an_answer(tmp_path):
    environment = ScriptedEnvironment(
        StepResult(reward=0, done=False, observation="begin" + "x" * (2 << 20) + "theend"),
        StepResult(reward=1, done=True),
    )
    runner = a_runner(await an_engine(tmp_path, max_model_len=200, eos_logit=99.0), environment, max_model_len=200)
    async with asyncio.timeout(2):
        (trajectory,) = (await runner.run(a_lease("guess", group_size=1))).trajectories
    text = TOKENIZER.decode(trajectory.token_ids.tolist(), skip_special_tokens=False)
    assert re.fullmatch(
        r"<bos>guess<eos>beginx+\n\[\.\.\. 2097\d\d\d characters left out \.\.\.\]\nx+theend<eos>", text
    )
    assert 150 < len(trajectory) <= 200 - 8


async def test_an_observation_longer_than_the_environment_may_say_is_cut_although_it_would_fit(tmp_path):
    environment = ScriptedEnvironment(
        StepResult(reward=0, done=False, observation="x" * 90),
        StepResult(reward=1, done=True),
        settings=EnvironmentSettings(max_observation_tokens=60),
    )
    runner = a_runner(await an_engine(tmp_path, max_model_len=200, eos_logit=99.0), environment, max_model_len=200)
    (trajectory,) = (await runner.run(a_lease("guess", group_size=1))).trajectories
    assert 50 < (~trajectory.loss_mask).sum() - len("?guess") <= 60


async def test_an_episode_that_is_never_done_is_truncated_after_so_many_turns(tmp_path):
    environment = NeverDone("a", max_turns=5)
    (trajectory,) = (
        await a_runner(await an_engine(tmp_path, eos_logit=99.0), environment).run(a_lease(group_size=1))
    ).trajectories
    assert (trajectory.turns, trajectory.reward, trajectory.finish_reason) == (5, 2.5, FinishReason.TRUNCATED)


async def test_an_episode_that_takes_too_long_fails_its_lease_whatever_its_steps_do(tmp_path):
    environment = ScriptedEnvironment(step=asyncio.Event().wait, settings=EnvironmentSettings(episode_timeout_s=0.05))
    failure = await failure_of(a_runner(await an_engine(tmp_path), environment), a_lease())
    assert (failure.kind, failure.reason) == ("environment_timeout", "the episode was not done within 0.05 s")
    assert environment.num_open == 0


async def test_each_lease_goes_to_the_environment_it_names(tmp_path):
    environments = {name: ScriptedEnvironment(StepResult(reward=reward, done=True)) for name, reward in AND_REWARDS}
    engine = await an_engine(tmp_path)
    settings = {"temperature": 1.0, "max_new_tokens": 8, "max_model_len": 64, "wait_for_version": at_once}
    runner = EpisodeRunner(engine, environments, TOKENIZER, **settings)
    for name, reward in AND_REWARDS:
        group = await runner.run(a_lease(environment=name))
        assert {trajectory.reward for trajectory in group.trajectories} == {reward}


AND_REWARDS = [("sums", 0.25), ("games", 0.75)]


class Forgetful(CharacterTokenizer):
    """Its template leaves out of earlier turns what stands before a =, as thinking templates leave out thoughts."""

    def apply_chat_template(self, conversation: list[dict[str, Any]], **how: Any) -> list[int] | str:
        shown = [
            {**each, "content": each["content"].rpartition("=")[2]} if each["role"] == "assistant" else each
            for each in conversation
        ]
        return super().apply_chat_template(shown, **how)


class EngineSaying:
    """Says one text after the other."""

    vocab_size = max_model_len = 64

    def __init__(self, *texts: str) -> None:
        self._texts = iter(texts)
        self.prompts: list[str] = []

    async def generate(self, prompt_ids: np.ndarray, sampling: Sampling, request_id: str) -> Completion:
        self.prompts.append(TOKENIZER.decode(prompt_ids.tolist(), skip_special_tokens=False))
        ids = np.array(TOKENIZER.encode(next(self._texts) + "<eos>", add_special_tokens=False), dtype=np.int32)
        ones = np.ones(ids.size)
        return Completion(
            token_ids=ids, logprobs=-ones.astype(np.float32), token_versions=ones.astype(np.int32), terminated=True
        )


async def test_a_template_that_drops_thoughts_forks_the_sample_so_that_every_part_is_what_was_read_and_sampled():
    more = StepResult(reward=0.25, done=False, observation="b")
    environment = ScriptedEnvironment(more, more, StepResult(reward=0.5, done=True))
    engine = EngineSaying("hm=1", "2", "3")
    runner = EpisodeRunner(
        engine, {URL: environment}, Forgetful(), temperature=1.0, max_new_tokens=8, max_model_len=64,
        wait_for_version=at_once,
    )  # fmt: skip
    group = await runner.run(a_lease([{"role": "user", "content": "a"}], group_size=1))
    texts = [TOKENIZER.decode(each.token_ids.tolist(), skip_special_tokens=False) for each in group.trajectories]
    assert texts == [
        "<bos><user>a<policy>hm=1<eos>",
        "<bos><user>a<policy>1<eos>\n<user>b<policy>2<eos>\n<user>b<policy>3<eos>",
    ]
    assert engine.prompts[1] == "<bos><user>a<policy>1<eos>\n<user>b<policy>"
    sampled = [
        TOKENIZER.decode(each.token_ids[each.loss_mask].tolist(), skip_special_tokens=True)
        for each in group.trajectories
    ]
    assert sampled == ["hm=1", "23"]  # the 1 of the second part was read, not sampled
    assert [each.continues for each in group.trajectories] == [False, True]
    assert [each.turns for each in group.trajectories] == [1, 2]
    assert {each.reward for each in group.trajectories} == {1.0}
    header, payload = pack_group(group)
    check_vocabulary(read_columns(header.trajectories, payload), 64)
    check_group(header, max_model_len=64, group_size=1, newest_version=1)


# --- with real worker processes ------------------------------------------------------------------------------------


async def test_groups_with_a_real_reward_function_and_a_chat_prompt(tmp_path):
    url = "python:tests.rollout_server.reward_functions:num_characters"
    async with environment_at(url, EnvironmentSettings(workers=1)) as environment:
        runner = a_runner(await an_engine(tmp_path), environment)
        lease = a_lease([{"role": "user", "content": "hi?"}], environment=url)
        groups = await asyncio.gather(*(runner.run(lease) for _ in range(20)))
    prompt = TOKENIZER.encode("<user>hi?<policy>", add_special_tokens=True)
    assert prompt[0] == BOS_ID
    for trajectory in (trajectory for group in groups for trajectory in group.trajectories):
        assert trajectory.token_ids[: len(prompt)].tolist() == prompt
        completion = TOKENIZER.decode(trajectory.token_ids[len(prompt) :].tolist(), skip_special_tokens=True)
        assert trajectory.reward == len("hi?") + len(completion)
    assert runner.num_sampled_tokens == sum(group.num_sampled_tokens for group in groups)
