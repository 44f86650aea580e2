"""Real vLLM on two ranks: every bit of both and every token is the loaded version's, by deltas and by fulls."""

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from rollout_server.inference import Completion
from rollout_server.vllm_engine import open_vllm_engine
from tests.models import save_tiny_model
from tests.rollout_server.conftest import LiveEngine, tiny_settings
from tests.rollout_server.test_changes_on_vllm import PADDED_VOCAB_SIZE, load_changed, under_load
from tests.rollout_server.test_vllm_engine import TOLERANCE, a_prompt, a_sampling, logprob_error

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="session")]

RANKS = 2
PATTERN = [0.01, 0.0, 0.05, None, 0.001, 0.5, 0.01, 0.0001]  # shares that change; None: other weights altogether


def shard(tensors: dict[str, torch.Tensor], name: str, rank: int, *, copies: int = 1, dim: int = 0) -> torch.Tensor:
    """What a rank holds of a tensor: an equal part, the same for so many ranks that follow on each other."""
    return tensors[name].chunk(RANKS // copies, dim)[rank // copies]


def parameters_of_rank(model: Qwen2ForCausalLM, rank: int) -> dict[str, torch.Tensor]:
    """What vLLM makes of a Qwen2: words, heads and the inside of the MLP are shared out, norms are everybody's."""
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    copies = RANKS // model.config.num_key_value_heads
    parameters: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        if ".q_proj." in name:
            keys, values = name.replace("q_proj", "k_proj"), name.replace("q_proj", "v_proj")
            own = [shard(tensors, name, rank), *(shard(tensors, part, rank, copies=copies) for part in (keys, values))]
            parameters[name.replace("q_proj", "qkv_proj")] = torch.cat(own)
        elif ".gate_proj." in name:
            own = [shard(tensors, part, rank) for part in (name, name.replace("gate", "up"))]
            parameters[name.replace("gate_proj", "gate_up_proj")] = torch.cat(own)
        elif ".o_proj." in name or ".down_proj." in name:
            parameters[name] = shard(tensors, name, rank, dim=1).contiguous()
        elif "embed_tokens" in name or "lm_head" in name:
            padding = torch.zeros(PADDED_VOCAB_SIZE - tensor.shape[0], tensor.shape[1])
            parameters[name] = torch.cat([tensor, padding]).chunk(RANKS)[rank]
        elif not any(part in name for part in (".k_proj.", ".v_proj.", ".up_proj.")):
            parameters[name] = tensor
    return parameters


async def assert_both_ranks_bit_for_bit(live: LiveEngine) -> None:
    """Every byte of every parameter on either rank is that of the loaded version."""
    found: dict[str, str] = {}
    for of_rank in await live.engine._llm.compute_weight_checksums():
        found |= {key.partition(":tp")[2]: digest for key, digest in of_rank.items()}
    model = live.models[live.engine.loaded_version]
    assert found == {
        f"{rank}:{name}": hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for rank in range(RANKS)
        for name, tensor in parameters_of_rank(model, rank).items()
    }


async def test_on_two_ranks_every_bit_and_every_token_is_the_loaded_versions_whatever_mix_of_deltas_and_fulls_comes(
    sharded: LiveEngine,
):
    await sharded.load_next()
    await assert_both_ranks_bit_for_bit(sharded)
    done: list[tuple[np.ndarray, Completion]] = []
    async with under_load(sharded, done):
        for share in PATTERN * 3:
            if share is None:
                assert not (await sharded.load_next()).in_place
            else:
                assert (await load_changed(sharded, share)).in_place == (share < 0.1)
            await assert_both_ranks_bit_for_bit(sharded)
            await sharded.engine.generate(a_prompt(5), a_sampling(max_new_tokens=8), "clock")
    assert len(done) > 8
    assert sum(len(set(completion.token_versions.tolist())) > 1 for _, completion in done) > 4
    assert max(logprob_error(sharded, *one) for one in done) < TOLERANCE


async def test_closing_an_engine_of_two_ranks_leaves_none_of_their_shared_memory(tmp_path: Path):
    settings = replace(tiny_settings(save_tiny_model(tmp_path, tied=True)), tensor_parallel_size=RANKS)
    async with open_vllm_engine(settings) as engine:
        [pid] = engine.process_ids()
        paths = {Path(name) for name in re.findall(r"/dev/shm/psm_\w+", Path(f"/proc/{pid}/maps").read_text())}
        assert paths
        assert all(path.exists() for path in paths)
    assert not any(path.exists() for path in paths)
