"""PastPolicies: samples groups by exact past versions of the policy, in this process.

It stands for the rollout servers in runs that are about learning alone: which version sampled which token is imposed,
and everything else is as in a run. Shape suffixes: B = trajectories, T = tokens (padded), V = vocabulary.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Group, Trajectory

Row = Mapping[str, str]
Reward = Callable[[str, str, Mapping[str, Any]], float]

GENERATION_STEPS = 0.78
"""How many optimizer steps pass while a completion is sampled. The quickstart's run, in which 61 % of the tokens are as
old as they may be and 39 % one step younger, has this: versions change at any moment of a completion alike."""


class PastPolicies:
    """The newest max_staleness + 1 versions of a policy, and a model that samples as any of them."""

    def __init__(self, model: str, *, max_staleness: int, max_new_tokens: int, temperature: float, seed: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._max_staleness = max_staleness
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)
        self._rng = np.random.default_rng(seed)
        self._versions: deque[list[Tensor]] = deque(maxlen=max_staleness + 1)
        self.version = -1  # the newest

    def push(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """The parameters of the next version."""
        copied = [(name, tensor.detach().clone()) for name, tensor in tensors]
        assert [name for name, _ in copied] == [name for name, _ in self._model.named_parameters()]
        self._versions.append([tensor for _, tensor in copied])
        self.version += 1

    @torch.no_grad()
    def sample(self, rows: Sequence[Row], group_size: int, reward: Reward) -> tuple[Group, ...]:
        """A group for each row, for the step that updates the newest version.

        Its first tokens are of the oldest version that may be trained. While it is being sampled the next version
        arrives, as in a server: the tokens after that are of this one.
        """
        oldest = max(self.version - self._max_staleness, 0)
        switches = [self._switch() if oldest < self.version else self._max_new_tokens for _ in rows]
        prompts_BT = self._encode([row["prompt"] for row in rows]).repeat_interleave(group_size, dim=0)
        switches_B = torch.tensor(switches).repeat_interleave(group_size)
        tokens_BT, logprobs_BT = self._continue(oldest, prompts_BT, switches_B, greedy=False)
        parts = self._finish(oldest + 1, prompts_BT, tokens_BT, logprobs_BT, switches_B)
        trajectories = [
            self._trajectory(index, rows[index // group_size], reward, prompts_BT, parts, oldest)
            for index in range(len(prompts_BT))
        ]
        starts = range(0, len(trajectories), group_size)
        return tuple(
            Group(lease_id=place, task_id=place, trajectories=tuple(trajectories[start : start + group_size]))
            for place, start in enumerate(starts)
        )

    @torch.no_grad()
    def answers(self, rows: Sequence[Row], *, greedy: bool) -> list[str]:
        """By the newest version."""
        prompts_BT = self._encode([row["prompt"] for row in rows])
        limits_B = torch.full((len(rows),), self._max_new_tokens)
        tokens_BT, _ = self._continue(self.version, prompts_BT, limits_B, greedy=greedy)
        return [self._text(tokens_T) for tokens_T in tokens_BT]

    def _switch(self) -> int:
        """The token at which the next version arrives; most completions have five."""
        return math.ceil((1 - self._rng.random()) * 5 / GENERATION_STEPS)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([self._tokenizer.encode(prompt) for prompt in prompts])  # the demo's are of one length

    def _finish(
        self, version: int, prompts_BT: Tensor, tokens_BT: Tensor, logprobs_BT: Tensor, switches_B: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(tokens_BT, logprobs_BT, is_old_BT) of whole completions: those that are not done go on under `version`."""
        width = self._max_new_tokens
        places_T = torch.arange(width)
        is_old_BT = places_T < switches_B[:, None]
        unfinished_B = (switches_B < width) & ~(tokens_BT == self._eos).any(dim=1)
        for switch in sorted(set(switches_B[unfinished_B].tolist())):
            rows_B = unfinished_B & (switches_B == switch)
            contexts_BT = torch.cat([prompts_BT[rows_B], tokens_BT[rows_B, :switch]], dim=1)
            limits_B = torch.full((len(contexts_BT),), width - switch)
            more_BT, more_logprobs_BT = self._continue(version, contexts_BT, limits_B, greedy=False)
            tokens_BT[rows_B, switch:] = more_BT[:, : width - switch]
            logprobs_BT[rows_B, switch:] = more_logprobs_BT[:, : width - switch]
        return tokens_BT, logprobs_BT, is_old_BT

    def _continue(self, version: int, contexts_BT: Tensor, limits_B: Tensor, *, greedy: bool) -> tuple[Tensor, Tensor]:
        """(tokens_BT, logprobs_BT) [B, max_new_tokens] sampled by `version`; PAD after the end or the row's limit."""
        self._load(version)
        tokens_BT = torch.full((len(contexts_BT), self._max_new_tokens), PAD)
        logprobs_BT = torch.zeros(tokens_BT.shape)
        going_B = limits_B > 0
        inputs, cache = contexts_BT, None
        for place in range(int(limits_B.max())):
            output = self._model(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            all_logprobs_BV = (output.logits[:, -1] / self._temperature).log_softmax(dim=-1)
            chosen_B1 = (
                all_logprobs_BV.argmax(dim=-1, keepdim=True)
                if greedy
                else torch.multinomial(all_logprobs_BV.exp(), 1, generator=self._generator)
            )
            tokens_BT[going_B, place] = chosen_B1[going_B, 0]
            logprobs_BT[going_B, place] = all_logprobs_BV.gather(1, chosen_B1)[going_B, 0]
            going_B = going_B & (chosen_B1[:, 0] != self._eos) & (limits_B > place + 1)
            if not going_B.any():
                break
            inputs = chosen_B1
        return tokens_BT, logprobs_BT

    def _load(self, version: int) -> None:
        tensors = self._versions[version - self.version - 1]
        for parameter, tensor in zip(self._model.parameters(), tensors, strict=True):
            parameter.data = tensor

    @property
    def _eos(self) -> int:
        return int(self._tokenizer.eos_token_id)

    def _text(self, tokens_T: Tensor) -> str:
        return str(self._tokenizer.decode([token for token in tokens_T.tolist() if token not in (PAD, self._eos)]))

    def _trajectory(
        self, index: int, row: Row, reward: Reward, prompts_BT: Tensor, parts: tuple[Tensor, ...], oldest: int
    ) -> Trajectory:
        tokens_T, logprobs_T, is_old_T = (part_BT[index].numpy() for part_BT in parts)
        prompt_T = prompts_BT[index].numpy()
        length = int((tokens_T != PAD).sum())
        before = np.zeros(len(prompt_T))
        versions_T = np.where(is_old_T[:length], oldest, oldest + 1)
        return Trajectory(
            token_ids=np.concatenate([prompt_T, tokens_T[:length]]).astype(np.int32),
            loss_mask=np.concatenate([before, np.ones(length)]).astype(bool),
            behavior_logprobs=np.concatenate([before, logprobs_T[:length]]).astype(np.float32),
            token_versions=np.concatenate([before + NOT_SAMPLED, versions_T]).astype(np.int32),
            reward=reward(row["prompt"], self._text(parts[0][index]), row),
            finish_reason=FinishReason.TERMINATED if tokens_T[length - 1] == self._eos else FinishReason.TRUNCATED,
        )


PAD = -1


def batches(rows: Callable[[], Iterator[Row]], count: int) -> Iterator[list[Row]]:
    """`count` rows at a time, begun again when they end."""
    source = rows()
    while True:
        batch: list[Row] = []
        while len(batch) < count:
            row = next(source, None)
            if row is None:
                source = rows()
            else:
                batch.append(row)
        yield batch
