"""RewardModel: a sequence classifier with one label as a reward function. Imported by worker processes alone."""

import asyncio
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from rollout_server.environments.environment import EnvironmentFailure


class RewardModel:
    """reward(prompt, completion, row). Calls that come while a batch is computed make the next one together.

    A row with chat messages is rendered by the reward model's own chat template, the completion as the assistant's
    answer; of a text, prompt and completion are one text. Nothing is cut: what is too long for the model fails.
    """

    def __init__(self, model: str, max_batch: str) -> None:
        """Raises ValueError, saying why, for what is no reward model."""
        self._model = _load(model)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(model)
        self._max_tokens = int(getattr(self._model.config, "max_position_embeddings", 1 << 20))
        self._model.config.pad_token_id = self._tokenizer.pad_token_id
        # Which token is a text's last is told by the padding: without a token for it each text goes alone.
        self._max_batch = int(max_batch) if self._tokenizer.pad_token_id is not None else 1
        self._thread = ThreadPoolExecutor(1)
        self._waiting: list[tuple[list[int], asyncio.Future[float]]] = []
        self._turn = asyncio.Lock()

    async def __call__(self, prompt: str, completion: str, row: Mapping[str, Any]) -> float:
        """Raises EnvironmentFailure for a text that the model cannot read."""
        token_ids = self._read(prompt, completion, row)
        if not 0 < len(token_ids) <= self._max_tokens:
            raise EnvironmentFailure(
                "environment_error", f"{len(token_ids)} tokens, the reward model reads 1 to {self._max_tokens}"
            )
        score: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._waiting.append((token_ids, score))
        while not score.done():
            async with self._turn:  # whoever has it computes for others as well
                if not score.done():
                    await self._compute()
        return score.result()

    def _read(self, prompt: str, completion: str, row: Mapping[str, Any]) -> list[int]:
        if isinstance(messages := row["prompt"], str):
            return list(self._tokenizer(prompt + completion)["input_ids"])
        if self._tokenizer.chat_template is None:
            raise EnvironmentFailure(
                "environment_error", "the row holds chat messages, and the reward model has no chat template"
            )
        said = [*messages, {"role": "assistant", "content": completion}]
        text = self._tokenizer.apply_chat_template(said, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    async def _compute(self) -> None:
        """One batch of those that wait, the longest first: texts of like length go together, and little is padded."""
        self._waiting.sort(key=lambda each: len(each[0]))
        batch = [self._waiting.pop() for _ in range(min(self._max_batch, len(self._waiting)))]
        texts = [token_ids for token_ids, _ in batch]
        try:
            scores = await asyncio.get_running_loop().run_in_executor(self._thread, self._score, texts)
        except asyncio.CancelledError:  # this call has no time left; the others of the batch may have
            self._waiting += batch
            raise
        except Exception as error:  # noqa: BLE001 - whatever it is, each call of the batch is to hear of it
            for _, score in batch:
                score.set_exception(EnvironmentFailure("environment_error", f"{type(error).__name__}: {error}"))
            return
        for (_, score), value in zip(batch, scores, strict=True):
            score.set_result(value)

    def _score(self, texts: Sequence[list[int]]) -> list[float]:
        length = max(map(len, texts))
        padding = self._tokenizer.pad_token_id or 0
        token_ids_BT = torch.tensor([text + [padding] * (length - len(text)) for text in texts])
        is_text_BT = torch.arange(length) < torch.tensor([len(text) for text in texts])[:, None]
        with torch.no_grad():
            logits_B1 = self._model(input_ids=token_ids_BT, attention_mask=is_text_BT.long()).logits
        scores: list[float] = logits_B1[:, 0].float().tolist()
        return scores


def _load(model: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no model {model}: {error}") from error
    if config.num_labels != 1:
        raise ValueError(f"{model} has {config.num_labels} labels; a reward model has one")
    loaded, told = AutoModelForSequenceClassification.from_pretrained(
        model, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(told["missing_keys"]):
        raise ValueError(f"{model} is no reward model: it has no {', '.join(missing)}")
    broken = [name for name, parameter in loaded.named_parameters() if not parameter.isfinite().all()]
    if broken:
        raise ValueError(f"{model} is damaged: {broken[0]} and {len(broken) - 1} more tensors hold nan or inf")
    return loaded.eval()
