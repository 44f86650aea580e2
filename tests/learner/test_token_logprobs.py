"""Log-probabilities in chunks: those, and those gradients, of all logits at once, in a fraction of the memory."""

import resource
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from learner.token_logprobs import chunk_tokens, from_logits, token_logprobs

TOKENS, HIDDEN, VOCABULARY = 23, 8, 50


def some_inputs(*, bias: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float().requires_grad_()

    targets_N = torch.randint(0, VOCABULARY, (TOKENS,), generator=generator)
    return normal(TOKENS, HIDDEN), normal(VOCABULARY, HIDDEN), normal(VOCABULARY) if bias else None, targets_N


@pytest.mark.parametrize("tokens_a_chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains_entropy", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients_are_those_of_all_logits_at_once(tokens_a_chunk, bias, trains_entropy, temperature):
    outcomes = []
    for in_chunks in (True, False):
        hidden_NH, weight_VH, bias_V, targets_N = some_inputs(bias=bias)
        if in_chunks:
            logprobs_N, entropy_N = token_logprobs(
                hidden_NH, weight_VH, bias_V, targets_N,
                temperature=temperature, trains_entropy=trains_entropy, chunk_bytes=tokens_a_chunk * 4 * VOCABULARY,
            )  # fmt: skip
        else:
            logits_NV = torch.nn.functional.linear(hidden_NH, weight_VH, bias_V) / temperature
            logprobs_N, entropy_N = from_logits(logits_NV, targets_N, trains_entropy=trains_entropy)
        assert entropy_N.requires_grad == trains_entropy
        weights_N = torch.linspace(-1.0, 2.0, TOKENS)
        loss = (logprobs_N * weights_N).sum() + ((entropy_N.square() * weights_N).sum() if trains_entropy else 0.0)
        loss.backward()
        parameters = [each for each in (hidden_NH, weight_VH, bias_V) if each is not None]
        outcomes.append([logprobs_N.detach(), entropy_N.detach(), *(each.grad for each in parameters)])
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_no_token_at_all_gives_a_zero_gradient_rather_than_none():
    hidden_NH, weight_VH, _, targets_N = some_inputs(bias=False)
    logprobs_N, _ = token_logprobs(hidden_NH[:0], weight_VH, None, targets_N[:0], temperature=1.0)
    logprobs_N.sum().backward()
    assert weight_VH.grad is not None
    assert not weight_VH.grad.any()


def test_a_head_that_is_not_trained_gets_no_gradient():
    hidden_NH, weight_VH, _, targets_N = some_inputs(bias=False)
    weight_VH.requires_grad_(False)
    logprobs_N, _ = token_logprobs(hidden_NH, weight_VH, None, targets_N, temperature=1.0)
    logprobs_N.sum().backward()
    assert weight_VH.grad is None
    assert hidden_NH.grad is not None


def test_a_chunk_has_a_token_at_least():
    assert chunk_tokens(1 << 30) == 1
    assert chunk_tokens(1 << 20, 8 << 20) == 2


def test_at_4k_tokens_and_32k_words_the_peak_is_less_than_half_of_that_of_all_logits_at_once():
    """Memory beyond inputs and gradients, each in a process of its own: what was once used is not given back."""
    chunked, at_once = (peak_megabytes(how) for how in ("chunked", "at once"))
    assert chunked < 0.5 * at_once


def peak_megabytes(how: str) -> float:
    command = [sys.executable, "-m", "tests.learner.test_token_logprobs", how]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=100).stdout)


def main() -> None:
    hidden_NH, weight_VH = torch.randn(4096, 64), torch.randn(32768, 64)
    targets_N = torch.randint(0, 32768, (4096,))
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    hidden_NH.requires_grad_(), weight_VH.requires_grad_()
    if sys.argv[1] == "chunked":
        logprobs_N, _ = token_logprobs(hidden_NH, weight_VH, None, targets_N, temperature=0.9)
    else:
        logprobs_N, _ = from_logits((hidden_NH @ weight_VH.T).float() / 0.9, targets_N)
    logprobs_N.sum().backward()
    sys.stdout.write(str((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb) / 1024))


if __name__ == "__main__":
    main()
