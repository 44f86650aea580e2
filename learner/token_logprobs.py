"""Log-probabilities and entropies of single tokens, from hidden states, a chunk of logits at a time.

The logits of a batch are its largest tensor by far: 4 bytes times tokens times vocabulary, several times over. Here
they exist for one chunk of tokens at once, in the forward pass and, computed anew, in the backward pass.
N = tokens, C = tokens of a chunk, H = hidden size, V = vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20
"""Of float32 logits. Larger ones are no faster: a matrix product of some hundred rows is efficient already."""


def chunk_tokens(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    return max(chunk_bytes // (4 * vocab_size), 1)


def token_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    *,
    temperature: float,
    trains_entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> tuple[Tensor, Tensor]:
    """(logprobs_N of the targets, entropy_N), float32, of softmax((hidden W^T + bias) / temperature).

    Both carry grad, the entropy only with trains_entropy.
    """
    size = chunk_tokens(weight_VH.shape[0], chunk_bytes)
    logprobs_N, entropy_N = _TokenLogprobs.apply(hidden_NH, weight_VH, bias_V, targets_N, temperature, size)
    return logprobs_N, entropy_N if trains_entropy else entropy_N.detach()


def from_logits(logits_NV: Tensor, targets_N: Tensor, *, trains_entropy: bool = False) -> tuple[Tensor, Tensor]:
    """The same from all logits at once, float32 and divided by the temperature already."""
    all_logprobs_NV = logits_NV.log_softmax(dim=-1)
    logprobs_N = all_logprobs_NV.gather(1, targets_N.unsqueeze(1)).squeeze(1)
    with torch.set_grad_enabled(trains_entropy and torch.is_grad_enabled()):
        entropy_N = -(all_logprobs_NV.exp() * all_logprobs_NV).sum(dim=-1)
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        logprobs_N = hidden_NH.new_empty(len(hidden_NH), dtype=torch.float32)
        entropy_N = torch.empty_like(logprobs_N)
        for start in range(0, len(hidden_NH), chunk):
            part = slice(start, start + chunk)
            logits_CV = _logits(hidden_NH[part], weight_VH, bias_V, temperature)
            normalizer_C = logits_CV.logsumexp(dim=-1)
            logprobs_N[part] = logits_CV.gather(1, targets_N[part].unsqueeze(1)).squeeze(1) - normalizer_C
            entropy_N[part] = normalizer_C - _expected_logits(logits_CV, normalizer_C)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, targets_N)
        ctx.temperature, ctx.chunk = temperature, chunk
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        """d log p_t = (1[v = t] - p_v) / temperature; d entropy = -p_v (log p_v + entropy) / temperature."""
        hidden_NH, weight_VH, bias_V, targets_N = ctx.saved_tensors
        trains_hidden, trains_weight, trains_bias, *_ = ctx.needs_input_grad
        grad_hidden_NH = torch.empty_like(hidden_NH) if trains_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if trains_weight else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if trains_bias else None
        for start in range(0, len(hidden_NH), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits_CV = _logits(hidden_NH[part], weight_VH, bias_V, ctx.temperature)
            grad_CV = _logit_gradients(logits_CV, targets_N[part], *(_part(each, part) for each in gradients))
            grad_CV = grad_CV.div_(ctx.temperature)
            if grad_bias_V is not None:
                grad_bias_V += grad_CV.sum(dim=0)
            grad_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[part] = grad_CV @ weight_VH
            if grad_weight_VH is not None:
                grad_weight_VH += grad_CV.T @ hidden_NH[part]
        return grad_hidden_NH, _as(weight_VH, grad_weight_VH), _as(bias_V, grad_bias_V), None, None, None


def _logits(hidden_CH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, temperature: float) -> Tensor:
    return torch.nn.functional.linear(hidden_CH, weight_VH, bias_V).float().div_(temperature)


def _expected_logits(logits_CV: Tensor, normalizer_C: Tensor) -> Tensor:
    probabilities_CV = (logits_CV - normalizer_C.unsqueeze(1)).exp_()
    return torch.einsum("cv,cv->c", probabilities_CV, logits_CV)


def _logit_gradients(
    logits_CV: Tensor, targets_C: Tensor, grad_logprobs_C: Tensor | None, grad_entropy_C: Tensor | None
) -> Tensor:
    """[C, V], in the memory of the logits where that suffices."""
    all_logprobs_CV = logits_CV.sub_(logits_CV.logsumexp(dim=-1, keepdim=True))
    probabilities_CV = all_logprobs_CV.exp()
    grad_CV = torch.zeros_like(logits_CV)
    if grad_entropy_C is not None:
        negative_entropy_C = torch.einsum("cv,cv->c", probabilities_CV, all_logprobs_CV)
        surprise_CV = all_logprobs_CV.sub_(negative_entropy_C.unsqueeze(1))
        grad_CV = surprise_CV.mul_(probabilities_CV).mul_(-grad_entropy_C.unsqueeze(1))
    if grad_logprobs_C is not None:
        grad_CV = grad_CV.sub_(probabilities_CV.mul_(grad_logprobs_C.unsqueeze(1)))
        grad_CV.scatter_add_(1, targets_C.unsqueeze(1), grad_logprobs_C.unsqueeze(1))
    return grad_CV


def _part(tensor_N: Tensor | None, part: slice) -> Tensor | None:
    return tensor_N[part] if tensor_N is not None else None


def _as(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient.to(parameter.dtype) if parameter is not None and gradient is not None else None
