"""The networks that are trained: a policy that gives log-probabilities, and a critic that gives values."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from common.lifecycle import UserError
from learner.engine_settings import Attention
from learner.lora_settings import LoraSettings
from learner.packing import FLASH, PADDED, HiddenStates, body_inputs, run_body
from learner.token_logprobs import from_logits, token_logprobs

if TYPE_CHECKING:
    from learner.lora import Adapters

transformers_logging.disable_progress_bar()  # the learner shows its own progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Architectures that change the logits after the output layer: for them the model's own forward is needed.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


Gather = Callable[[Sequence[tuple[str, nn.Parameter]]], Iterator[tuple[str, Tensor]]]
"""Named parameters, whole, one after the other: see Trainable.gathered()."""


def changes_logits(config: Any) -> bool:
    return any(getattr(config, name, None) for name in _LOGIT_CHANGES)


class PolicyNetwork(nn.Module):
    """A causal language model, asked only for the log-probabilities of the tokens that are trained on."""

    def __init__(
        self,
        model: nn.Module,
        *,
        temperature: float,
        trains_entropy: bool = False,
        adapters: "Adapters | None" = None,
        has_value_head: bool = False,
    ) -> None:
        """trains_entropy: the entropy carries grad. adapters: those in the model, where they alone are trained.

        has_value_head: it also says what the states are worth, by a head that is not published.
        """
        super().__init__()
        self.model: Any = model
        self.adapters = adapters
        self.value_head = a_value_head(self.model) if has_value_head else None  # beside the model, not in it
        self.arrangement = PADDED
        self._temperature = temperature
        self._trains_entropy = trains_entropy
        self._changes_logits = changes_logits(self.model.config)

    @property
    def body(self) -> Any:
        """The transformers model without its output layer."""
        return self.model.base_model

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """For what is asked of it inside, by whatever way the call comes."""
        usual, self._temperature = self._temperature, temperature
        try:
            yield
        finally:
            self._temperature = usual

    def forward(self, token_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, ...]:
        """(logprobs_BT, entropy_BT) at the policy's temperature, float32; 0 outside loss_mask_BT.

        With a value head values_BT follows, everywhere: see CriticNetwork.forward().
        """
        if self._changes_logits:
            logits, hidden = self._whole_forward(token_ids_BT, attention_mask_BT)
            predicted_BT = logits.following(loss_mask_BT)
            said = self._from_logits(logits.before(predicted_BT), token_ids_BT[predicted_BT])
        else:
            hidden = run_body(self.body, token_ids_BT, attention_mask_BT, self.arrangement)
            predicted_BT = hidden.following(loss_mask_BT)
            said = self._from_hidden(hidden.before(predicted_BT), token_ids_BT[predicted_BT])
        placed = tuple(hidden.of_all_ranks(self._place(each_N, predicted_BT)) for each_N in said)
        return placed if self.value_head is None else (*placed, values_before(self.value_head, hidden))

    def values(self, forward: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        """What a critic of its own would be called as; `forward` calls this network, which has a value head."""
        assert self.value_head is not None

        def values_alone(token_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, ...]:
            return forward(token_ids_BT, attention_mask_BT, torch.zeros_like(attention_mask_BT))[2:]

        return values_alone

    def _from_hidden(self, hidden_NH: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.get_output_embeddings()
        if type(head) is not nn.Linear:
            return self._from_logits(head(hidden_NH), targets_N)
        return token_logprobs(
            hidden_NH,
            head.weight,
            head.bias,
            targets_N,
            temperature=self._temperature,
            trains_entropy=self._trains_entropy,
        )

    def _from_logits(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """Of all logits at once: from a head that does more than a product with a matrix."""
        return from_logits(logits_NV.float() / self._temperature, targets_N, trains_entropy=self._trains_entropy)

    def _whole_forward(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> tuple[HiddenStates, HiddenStates]:
        """(logits, last hidden states): the model's own forward knows what is done to its logits."""
        inputs, whereabouts = body_inputs(self.model, token_ids_BT, attention_mask_BT, self.arrangement)
        output = self.model(**inputs, output_hidden_states=self.value_head is not None)
        hidden = output.hidden_states[-1] if self.value_head is not None else output.logits
        return HiddenStates(output.logits.flatten(0, 1), whereabouts), HiddenStates(hidden.flatten(0, 1), whereabouts)

    def merged_tensors(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """The whole policy: parameters by Hugging Face name, tied ones once, each with its adapter added."""
        if self.adapters is not None:
            return self.adapters.merged(gather)
        return gather(list(self.model.named_parameters()))

    def base_model_tensors(self, gather: Gather) -> Iterator[tuple[str, Tensor]]:
        """Likewise, without adapters: what is not trained where there are any."""
        assert self.adapters is not None, "without adapters there is no base model"
        return self.adapters.base_model(gather)

    def adapter_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """By their names in a PEFT directory; none without adapters."""
        return self.adapters.parameters() if self.adapters is not None else []

    def export(self, directory: Path, tensors: dict[str, Tensor], adapters: dict[str, Tensor]) -> None:
        """Write a Hugging Face directory, adapters merged; with adapters also a PEFT one in it, `adapter`.

        tensors: those of merged_tensors(), adapters: those of adapter_parameters(), whole, in host memory.
        """
        self.model.save_pretrained(directory, state_dict=tensors)
        if self.adapters is not None:
            self.adapters.save(directory / "adapter", adapters)

    @staticmethod
    def _place(values_N: Tensor, mask_BT: Tensor) -> Tensor:
        return torch.zeros(mask_BT.shape, device=values_N.device).masked_scatter(mask_BT, values_N)


class CriticNetwork(nn.Module):
    """A language model's body with one output: the value of the state before each token."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body: Any = body
        self.arrangement = PADDED
        self.head = a_value_head(body)

    def forward(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """values_BT float32: the value at t sees the tokens before t. Position 0 has seen nothing: 0."""
        hidden = run_body(self.body, token_ids_BT, attention_mask_BT, self.arrangement)
        return values_before(self.head, hidden)


Network = PolicyNetwork | CriticNetwork


def a_value_head(model: Any) -> nn.Linear:
    """Every state is worth nothing yet, rather than something random."""
    head = nn.Linear(model.config.hidden_size, 1, bias=True, dtype=next(model.parameters()).dtype)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def values_before(head: nn.Module, hidden: HiddenStates) -> Tensor:
    """values_BT float32 of the state before each token; position 0 has seen nothing: 0."""
    values_BT = hidden.spread(head(hidden.flat_PH).squeeze(-1).float())
    return nn.functional.pad(values_BT[:, :-1], (1, 0))


def load_policy(
    model: str,
    *,
    dtype: str,
    temperature: float,
    trains_entropy: bool = False,
    lora: LoraSettings | None = None,
    attention: Attention = "auto",
    has_value_head: bool = False,
) -> PolicyNetwork:
    """With lora, adapters are put into it and alone are trained. Raises UserError when there is no such model."""
    network = _load(AutoModelForCausalLM, model, dtype, attention)
    adapters = None
    if lora is not None:
        from learner.lora import Adapters  # imports peft: seconds, only when used

        adapters = Adapters(network, lora)
    return PolicyNetwork(
        network,
        temperature=temperature,
        trains_entropy=trains_entropy,
        adapters=adapters,
        has_value_head=has_value_head,
    )


def load_critic(model: str, *, dtype: str, attention: Attention = "auto") -> CriticNetwork:
    """Raises UserError when there is no such model."""
    return CriticNetwork(_load(AutoModel, model, dtype, attention))


def _load(kind: Any, model: str, dtype: str, attention: Attention) -> nn.Module:
    """Raises UserError when there is no such model, or no such attention for it."""
    if attention == "auto" and dtype == "bfloat16" and is_flash_attn_2_available():
        with suppress(UserError):  # a model that cannot is computed as transformers would
            return _load(kind, model, dtype, FLASH)
    how = {} if attention == "auto" else {"attn_implementation": attention}
    try:
        loaded: nn.Module = kind.from_pretrained(model, dtype=DTYPES[dtype], **how)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"cannot load the model {model}: {error}") from error
    # Dropout would make the log-probabilities of the same parameters differ from those the server sampled with.
    return loaded.eval()
