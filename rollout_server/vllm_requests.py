"""What is asked of vLLM for one prompt, and what its answer says."""

from typing import Any

import numpy as np

from rollout_server.adapter_versions import HeldAdapter
from rollout_server.inference import Completion, EngineError, Sampling
from rollout_server.vllm_adapters import adapter_token_versions

MIN_TEMPERATURE = 0.01  # vLLM raises anything lower, except 0, to this; the learner would not know


def sampling_params(sampling: Sampling, stop_token_ids: list[int]) -> Any:
    """For a completion with the log-probability of each token; raises ValueError for what vLLM would change."""
    _check_sampling(sampling)
    return _params(
        temperature=sampling.temperature,
        max_tokens=sampling.max_new_tokens,
        seed=sampling.seed,
        stop_token_ids=stop_token_ids,
        logprobs=0,
    )


def logprobs_params() -> Any:
    """For the log-probabilities of the prompt itself."""
    return _params(temperature=1.0, max_tokens=1, prompt_logprobs=0)


def _params(**asked: Any) -> Any:
    """Ids, not text, all at once."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **asked, flat_logprobs=True, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY, skip_clone=True
    )


def _check_sampling(sampling: Sampling) -> None:
    if sampling.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be >= 1, got {sampling.max_new_tokens}")
    if sampling.temperature != 0 and not sampling.temperature >= MIN_TEMPERATURE:
        raise ValueError(f"temperature must be >= {MIN_TEMPERATURE}, or 0 for greedy, got {sampling.temperature}")


def completion_of(output: Any, adapter: HeldAdapter | None) -> Completion:
    """Raises EngineError unless every token has its log-probability and its version."""
    num_tokens = len(output.token_ids)
    if len(output.logprobs.logprobs) != num_tokens:
        raise EngineError(f"{num_tokens} tokens, but {len(output.logprobs.logprobs)} log-probabilities")
    versions = token_versions(output.weight_versions or (), num_tokens)
    return Completion(
        token_ids=np.array(output.token_ids, dtype=np.int32),
        logprobs=np.array(output.logprobs.logprobs, dtype=np.float32),
        token_versions=versions if adapter is None else adapter_token_versions(versions, adapter.version),
        terminated=output.finish_reason == "stop",
    )


def token_versions(spans: Any, num_tokens: int) -> np.ndarray:
    """Versions per token [num_tokens] int32 from vLLM's spans [start, end), which must tile the tokens."""
    versions = np.empty(num_tokens, dtype=np.int32)
    end = 0
    for span in spans:
        if span.start != end or not span.version.isdecimal():
            raise EngineError(f"weight version span {span} does not continue at token {end} with a number")
        versions[end : span.end] = int(span.version)
        end = span.end
    if end != num_tokens:
        raise EngineError(f"weight version spans cover {end} of {num_tokens} tokens")
    return versions


def eos_ids(hf_config: Any) -> list[int]:
    """End-of-sequence ids of the model's config; vLLM adds those of the tokenizer and of generation_config.json."""
    ids = getattr(hf_config, "eos_token_id", None)
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)
