"""The networks that are trained: a policy that gives log-probabilities, and a critic that gives values."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from common.lifecycle import UserError
from learner.packing import HiddenStates, body_inputs, run_body
from learner.token_logprobs import from_logits, token_logprobs

transformers_logging.disable_progress_bar()  # the learner shows its own progress

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Architectures that change the logits after the output layer: for them the model's own forward is needed.
_LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


class PolicyNetwork(nn.Module):
    """A causal language model, asked only for the log-probabilities of the tokens that are trained on."""

    def __init__(
        self, model: nn.Module, *, temperature: float, trains_entropy: bool = False, packs: bool = False
    ) -> None:
        """trains_entropy: the entropy carries grad. packs: see learner/packing.py."""
        super().__init__()
        self.model: Any = model
        self.packs = packs
        self._temperature = temperature
        self._trains_entropy = trains_entropy
        self._changes_logits = any(getattr(self.model.config, name, None) for name in _LOGIT_CHANGES)

    def forward(self, token_ids_BT: Tensor, attention_mask_BT: Tensor, loss_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
        """(logprobs_BT, entropy_BT) at the policy's temperature, float32; 0 outside loss_mask_BT."""
        predicted_BT = loss_mask_BT[:, 1:]
        targets_N = token_ids_BT[:, 1:][predicted_BT]
        head = self.model.get_output_embeddings()
        if self._changes_logits or type(head) is not nn.Linear:
            logits_NV = self._logits(head, token_ids_BT, attention_mask_BT, predicted_BT).float() / self._temperature
            values = from_logits(logits_NV, targets_N, trains_entropy=self._trains_entropy)
        else:
            hidden = run_body(self.model.base_model, token_ids_BT, attention_mask_BT, packs=self.packs)
            values = token_logprobs(
                hidden.before(predicted_BT),
                head.weight,
                head.bias,
                targets_N,
                temperature=self._temperature,
                trains_entropy=self._trains_entropy,
            )
        logprobs_N, entropy_N = values
        return self._place(logprobs_N, loss_mask_BT), self._place(entropy_N, loss_mask_BT)

    def _logits(
        self, head: nn.Module, token_ids_BT: Tensor, attention_mask_BT: Tensor, predicted_BT: Tensor
    ) -> Tensor:
        """[N, V], all at once: from a head that does more than a product with a matrix."""
        if not self._changes_logits:
            hidden = run_body(self.model.base_model, token_ids_BT, attention_mask_BT, packs=self.packs)
            logits_NV: Tensor = head(hidden.before(predicted_BT))
            return logits_NV
        inputs, places_BT = body_inputs(self.model, token_ids_BT, attention_mask_BT, packs=self.packs)
        return HiddenStates(self.model(**inputs).logits.flatten(0, 1), places_BT).before(predicted_BT)

    @staticmethod
    def _place(values_N: Tensor, loss_mask_BT: Tensor) -> Tensor:
        return torch.zeros(loss_mask_BT.shape, device=values_N.device).masked_scatter(loss_mask_BT, values_N)


class CriticNetwork(nn.Module):
    """A language model's body with one output: the value of the state before each token."""

    def __init__(self, body: nn.Module, *, packs: bool = False) -> None:
        super().__init__()
        self.body: Any = body
        self.packs = packs
        self.head = nn.Linear(self.body.config.hidden_size, 1, bias=True, dtype=next(body.parameters()).dtype)
        nn.init.zeros_(self.head.weight)  # every state is worth nothing yet, rather than something random
        nn.init.zeros_(self.head.bias)

    def forward(self, token_ids_BT: Tensor, attention_mask_BT: Tensor) -> Tensor:
        """values_BT float32: the value at t sees the tokens before t. Position 0 has seen nothing: 0."""
        hidden = run_body(self.body, token_ids_BT, attention_mask_BT, packs=self.packs)
        values_P = self.head(hidden.flat_PH).squeeze(-1).float()
        return torch.nn.functional.pad(values_P[hidden.places_BT[:, :-1]], (1, 0))


def load_policy(model: str, *, dtype: str, temperature: float, trains_entropy: bool = False) -> PolicyNetwork:
    """Raises UserError when there is no such model."""
    network = _load(AutoModelForCausalLM, model, dtype)
    return PolicyNetwork(network, temperature=temperature, trains_entropy=trains_entropy)


def load_critic(model: str, *, dtype: str) -> CriticNetwork:
    """Raises UserError when there is no such model."""
    return CriticNetwork(_load(AutoModel, model, dtype))


def _load(kind: Any, model: str, dtype: str) -> nn.Module:
    try:
        loaded: nn.Module = kind.from_pretrained(model, dtype=DTYPES[dtype])
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load the model {model}: {error}") from error
    # Dropout would make the log-probabilities of the same parameters differ from those the server sampled with.
    return loaded.eval()
