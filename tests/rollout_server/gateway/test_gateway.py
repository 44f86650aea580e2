"""The gateway: what an agent asks of it, and the trajectories that its episodes become."""

import numpy as np

from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason
from tests.rollout_server.gateway.builders_gateway import (
    played,
    sampled_text,
    say,
    text_of,
    user,
)

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


async def test_the_calls_of_a_chat_become_one_growing_list_of_ids_with_the_evidence_of_each_token():
    async def agent(session, client):
        chat = [user("one")]
        await say(client, chat)
        chat.append(user("two"))
        await say(client, chat)
        return 0.5

    [trajectory] = await played(agent, "first", "second")
    assert text_of(trajectory.token_ids) == (
        "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nfirst<|im_end|>\n"
        "<|im_start|>user\ntwo<|im_end|>\n<|im_start|>assistant\nsecond<|im_end|>"
    )
    assert sampled_text(trajectory) == "first<|im_end|>second<|im_end|>"
    assert trajectory.behavior_logprobs[trajectory.loss_mask].tolist() == [-float(n) for n in range(1, 14)]
    assert trajectory.version_runs() == [(0, 3), (1, 6), (2, 4)]  # updates in the middle of each answer
    np.testing.assert_array_equal(trajectory.token_versions == NOT_SAMPLED, ~trajectory.loss_mask)
    assert (trajectory.reward, trajectory.turns, trajectory.continues) == (0.5, 2, False)
    assert trajectory.finish_reason is FinishReason.TERMINATED
