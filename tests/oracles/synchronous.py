"""A synchronous trainer as one would write it first: generate, reward, GRPO, one clipped step; transformers and torch.

Nothing of the project is in it. It goes on from its own weights from the first step to the last, so what it shares with
whatever it is compared with is the model it begins with, the prompts, the settings, and the random choice of tokens:
`generate` is told by a logits processor which token comes next, where another random generator would choose others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One completion as it was chosen, its end token included."""

    prompt_ids: list[int]
    token_ids: list[int]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the trainer makes of one batch. Ragged lists: one per sample, in order."""

    logprobs: list[list[float]]  # of the chosen tokens, as generate gave them
    rewards: list[float]
    advantages: list[float]
    loss: float
    grad_norm: float
    weights: dict[str, Tensor]  # after the step


class ChosenTokens(LogitsProcessor):
    """Lets generate choose nothing but the n-th given token of each row; beyond its end, padding."""

    def __init__(self, samples: Sequence[Sample], prompt_length: int) -> None:
        self._samples = samples
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        place = input_ids.shape[1] - self._prompt_length
        forced = torch.full_like(scores, -torch.inf)
        for row, sample in enumerate(self._samples):
            forced[row, sample.token_ids[place] if place < len(sample.token_ids) else 0] = 0.0
        return forced


class SynchronousTrainer:
    """GRPO (arXiv:2402.03300) with PPO's clip and the mean over tokens, by AdamW with a constant learning rate."""

    def __init__(
        self, model: str, *, learning_rate: float, betas: tuple[float, float], epsilon: float, max_grad_norm: float
    ) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._max_grad_norm = max_grad_norm
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=learning_rate, betas=betas, eps=epsilon, weight_decay=0.0
        )

    def step(self, groups: Sequence[Sequence[Sample]], reward: Callable[[str, str], float]) -> Step:
        samples = [sample for group in groups for sample in group]
        logprobs = [row for group in groups for row in self.generate(group)]
        rewards = [reward(self._text(sample.prompt_ids), self._text(sample.token_ids)) for sample in samples]
        advantages = self._advantages(rewards, [len(group) for group in groups])
        loss = self._loss(samples, logprobs, advantages)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self._max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        weights = {name: parameter.detach().clone() for name, parameter in self.model.named_parameters()}
        return Step(
            logprobs=logprobs, rewards=rewards, advantages=advantages, loss=float(loss.detach()),
            grad_norm=float(norm), weights=weights,
        )  # fmt: skip

    @torch.no_grad()
    def generate(self, group: Sequence[Sample]) -> list[list[float]]:
        """The log-probability that each chosen token had when it was generated; the prompts of a group are the same."""
        prompts = torch.tensor([sample.prompt_ids for sample in group])
        longest = max(len(sample.token_ids) for sample in group)
        generated = self.model.generate(
            prompts, attention_mask=torch.ones_like(prompts), logits_processor=[ChosenTokens(group, prompts.shape[1])],
            max_new_tokens=longest, min_new_tokens=longest, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        logprobs = [logits.float().log_softmax(dim=-1) for logits in generated.logits]
        return [
            [float(logprobs[place][row, token]) for place, token in enumerate(sample.token_ids)]
            for row, sample in enumerate(group)
        ]

    def _advantages(self, rewards: Sequence[float], sizes: Sequence[int]) -> list[float]:
        advantages: list[float] = []
        for size in sizes:
            group = rewards[len(advantages) : len(advantages) + size]
            mean, spread = fmean(group), stdev(group)
            advantages += [(reward - mean) / (spread + 1e-6) for reward in group]
        return advantages

    def _loss(self, samples: Sequence[Sample], logprobs: Sequence[list[float]], advantages: Sequence[float]) -> Tensor:
        total, num_tokens = torch.tensor(0.0), 0
        for sample, old, advantage in zip(samples, logprobs, advantages, strict=True):
            ids = torch.tensor([sample.prompt_ids + sample.token_ids])
            every = self.model(ids).logits[0].float().log_softmax(dim=-1)
            for place, token in enumerate(sample.token_ids):
                new = every[len(sample.prompt_ids) + place - 1, token]
                ratio = (new - old[place]).exp()
                total = total - torch.min(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
                num_tokens += 1
        return total / num_tokens

    def _text(self, token_ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text
