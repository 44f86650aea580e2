"""A rollout server in an evaluation: it holds a version, samples with nothing else, and goes on with its leases."""

import json
from typing import Any

from common.messages import Evaluate, Evaluated, EvaluationFailed, Finished, GroupsFinished, HoldVersions, Pulse, Ready
from rollout_server.environments.environment import StepResult
from tests.rollout_server.builders_server import READY, a_joined_server, a_learner
from tests.rollout_server.test_episodes import ScriptedEnvironment

ANY_LATER = (1 << 31) - 1
TOKEN_S = 0.02  # eight tokens an episode


def evaluate(evaluation_id: int = 0, **changes: Any) -> Evaluate:
    fields: dict[str, Any] = {
        "evaluation_id": evaluation_id,
        "task_id": 7,
        "version": 0,
        "environment": ScriptedEnvironment.url,
        "row": json.dumps({"prompt": "12+3="}).encode(),
        "samples": 2,
        "seed": 5,
        "temperature": 1.0,
    }
    return Evaluate(**fields | changes)


def publish(learner, version: int) -> None:
    learner.published = version
    learner.say(Pulse(published_version=version))


async def test_a_version_is_held_while_it_is_evaluated_and_leases_go_on_under_it(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=TOKEN_S, hold_s=60.0) as serving:
        await learner.hear_heartbeat(loaded_version=0, holding=-1)
        learner.say(HoldVersions(first=0, last=ANY_LATER))
        await learner.hear_heartbeat(loaded_version=0, holding=0)
        publish(learner, 1)
        learner.lease(3)
        learner.say(evaluate())
        evaluated = await learner.hear(Evaluated)
        assert (evaluated.task_id, evaluated.version) == (7, 0)
        assert [(one.oldest_version, one.newest_version) for one in evaluated.episodes] == [(0, 0), (0, 0)]
        assert (await learner.hear_group()).trajectories[0].token_versions.max() == 0
        assert learner.manifests_asked == 1  # nothing is pulled only to wait: it would keep the learner's memory
        learner.lease(4, min_version=1)  # it begins only once version 1 is loaded
        learner.say(HoldVersions(first=0, last=-1))
        await learner.hear_heartbeat(loaded_version=1, holding=-1)
        assert (await learner.hear_group()).trajectories[0].oldest_version == 1
        learner.say(Finished(reason="done"))
        await serving


async def test_a_hold_runs_out_and_a_task_that_saw_two_versions_is_not_told_as_done(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=0.1, hold_s=0.2) as serving:
        await learner.hear_heartbeat(loaded_version=0)
        learner.say(HoldVersions(first=0, last=0))
        await learner.hear_heartbeat(holding=0)
        learner.say(evaluate())
        publish(learner, 1)
        failed = await learner.hear(EvaluationFailed)
        assert (failed.evaluation_id, failed.kind) == (0, "version_gone")
        await learner.hear_heartbeat(loaded_version=1, holding=-1)
        assert not any(isinstance(message, Evaluated) for message in learner.heard)
        learner.say(Finished(reason="done"))
        await serving


async def test_a_task_of_a_version_that_is_gone_is_refused(tmp_path):
    async with a_learner() as learner:
        learner.published = 3
        async with a_joined_server(learner, tmp_path) as serving:
            await learner.hear_heartbeat(loaded_version=3)
            learner.say(evaluate(version=2))
            failed = await learner.hear(EvaluationFailed)
            assert (failed.kind, failed.reason) == ("version_gone", "version 3 is loaded, 2 is to be evaluated")
            learner.say(Finished(reason="done"))
            await serving


async def test_evaluated_greedily_all_episodes_are_the_same_and_sampled_they_follow_the_seed(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path) as serving:
        await learner.hear_heartbeat(loaded_version=0)
        learner.say(HoldVersions(first=0, last=0))
        told = []
        for number, temperature in enumerate([0.0, 0.0, 1.0, 1.0]):
            learner.say(evaluate(number, samples=8, seed=number if temperature == 0 else 5, temperature=temperature))
            told.append((await learner.hear(Evaluated)).episodes)
        assert len(set(told[0])) == 1
        assert told[0] == told[1]  # whatever the seed
        assert told[2] == told[3]
        assert len({episode.num_tokens for episode in told[2]}) > 1
        learner.say(Finished(reason="done"))
        await serving


async def test_tasks_of_other_versions_than_those_to_hold_are_void_and_so_is_everything_when_it_says_ready(tmp_path):
    async with a_learner() as learner, a_joined_server(learner, tmp_path, step_s=0.1, hold_s=60.0) as serving:
        await learner.hear_heartbeat(loaded_version=0)
        learner.say(HoldVersions(first=0, last=0))
        learner.say(evaluate(0))
        learner.say(HoldVersions(first=1, last=1))  # void before it is done
        learner.say(HoldVersions(first=0, last=0))
        learner.say(evaluate(1))
        assert (await learner.hear(Evaluated)).evaluation_id == 1
        learner.say(evaluate(2))
        learner.session = "2"  # another coordinator of the same run
        welcome = learner.welcome(run_id="run.1")
        learner.say(welcome)
        assert await learner.hear(Ready) == READY
        await learner.hear_heartbeat(holding=-1)
        learner.lease(9)
        await learner.hear(GroupsFinished)
        assert [message.evaluation_id for message in learner.heard if isinstance(message, Evaluated)] == [1]
        learner.say(Finished(reason="done"))
        await serving


async def test_an_evaluation_that_fails_says_why(tmp_path):
    environment = ScriptedEnvironment(StepResult(reward=float("nan"), done=True))
    async with a_learner() as learner, a_joined_server(learner, tmp_path, environment) as serving:
        await learner.hear_heartbeat(loaded_version=0)
        learner.say(evaluate())
        failed = await learner.hear(EvaluationFailed)
        assert failed.kind == "bad_reward"
        learner.say(Finished(reason="done"))
        await serving
