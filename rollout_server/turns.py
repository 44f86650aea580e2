"""Turns: what the policy and its environment have said to each other in one sample, as ids with their evidence."""

from dataclasses import dataclass

import numpy as np

from common.trajectory import FinishReason, Trajectory
from rollout_server.conversation import Continuation, Conversation, fit
from rollout_server.environments.environment import Observation, Said
from rollout_server.inference import Completion
from rollout_server.prompts import prompt_ids
from rollout_server.token_log import TokenLog
from rollout_server.tokenizer import Tokenizer


class PromptTooLong(ValueError):
    """The first thing an environment said does not fit the model, not even cut."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How far a sample may go."""

    max_model_len: int
    reply_room: int  # tokens that must be left for the policy
    max_observation_tokens: int | None
    max_turns: int


class Turns:
    """One growing list of ids, and those before it if the sample has forked."""

    def __init__(self, conversation: Conversation, prompt_ids_T: np.ndarray, bounds: Bounds) -> None:
        self._conversation = conversation
        self._bounds = bounds
        self._logs = [TokenLog(prompt_ids_T)]
        self._end = ""  # the last sampled token, as text
        self.num_taken = 0

    @property
    def log(self) -> TokenLog:
        return self._logs[-1]

    def say(self, completion: Completion, tokenizer: Tokenizer) -> Said:
        """The policy has sampled the completion after log.token_ids."""
        log = self.log
        log.append_sampled(completion)
        self.num_taken += 1
        self._end = tokenizer.decode(completion.token_ids[-1:].tolist(), skip_special_tokens=False)

        def read(num_tokens: int) -> str:
            return tokenizer.decode(log.token_ids[:num_tokens].tolist(), skip_special_tokens=False)

        return Said(
            text=tokenizer.decode(completion.token_ids.tolist(), skip_special_tokens=True),
            is_cut=not completion.terminated,
            read_prompt=lambda: read(log.num_prompt_tokens),
            read_all=lambda: read(len(log)),
        )

    def go_on(self, said: Said, observation: Observation) -> bool:
        """Append what the policy reads next, cut if need be; False when it has no turn or no room left."""
        if self.num_taken >= self._bounds.max_turns:
            return False
        fitted = fit(
            observation, lambda shown: self._conversation.continuation(said.text, self._end, shown), self._room_for
        )
        if fitted is None:
            return False
        shown, continuation = fitted
        self._conversation.go_on(said.text, shown)
        if continuation.forks:
            self._logs.append(TokenLog(continuation.token_ids))
        else:
            self.log.append_given(continuation.token_ids)
        return True

    def _room_for(self, continuation: Continuation) -> int:
        taken = 0 if continuation.forks else len(self.log)
        room = self._bounds.max_model_len - taken - self._bounds.reply_room
        limit = self._bounds.max_observation_tokens
        return room if limit is None or continuation.forks else min(room, limit)

    def trajectories(self, reward: float, finish_reason: FinishReason) -> list[Trajectory]:
        """The episode's reward belongs to each part of it: nothing is known of which part earned it."""
        return [
            log.trajectory(reward=reward, finish_reason=finish_reason, continues=number > 0)
            for number, log in enumerate(self._logs)
        ]


def fitted_prompt(first: Observation, tokenizer: Tokenizer, bounds: Bounds) -> Observation:
    """What an environment said first, cut to what fits; raises PromptTooLong when nothing does."""
    room = bounds.max_model_len - bounds.reply_room
    if bounds.max_observation_tokens is not None:
        room = min(room, bounds.max_observation_tokens)
    fitted = fit(first, lambda shown: Continuation(prompt_ids(shown, tokenizer)), lambda _: room)
    if fitted is None:
        raise PromptTooLong(f"the first observation does not fit into {room} tokens, not even cut")
    return fitted[0]
