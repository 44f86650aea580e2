"""The table policy as a torch module: what rollout_server.table_engine samples from, trained by the real PPO engine."""

from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import Qwen2Config

from learner.checkpoint import Checkpoint
from learner.demo.model import VOCAB_SIZE, save_tokenizer
from learner.networks import PolicyNetwork
from learner.ppo_engine import PpoEngine
from learner.torch_engine import TorchNetwork
from learner.training import TrainEngine, TrainSettings


class TableModel(nn.Module):
    """pi(next | ids) = softmax(table[last of ids]): V * V parameters, and a step of milliseconds."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace()
        self.table = nn.Embedding(VOCAB_SIZE, VOCAB_SIZE)
        nn.init.zeros_(self.table.weight)

    def base_model(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> SimpleNamespace:
        del attention_mask, use_cache
        return SimpleNamespace(last_hidden_state=self.table(input_ids))

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()

    def save_pretrained(self, directory: Path, state_dict: dict[str, Tensor]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        torch.save(state_dict, directory / "table.pt")


def save_table_model(directory: Path) -> None:
    """What learner and servers compare of a model: its configuration and its tokenizer."""
    Qwen2Config(vocab_size=VOCAB_SIZE, max_position_embeddings=64, eos_token_id=1).save_pretrained(directory)
    save_tokenizer(directory)


def open_table_engine(settings: TrainSettings, checkpoint: Checkpoint | None) -> TrainEngine:
    """In place of the learner's own: the same PPO, on plain torch and a table."""
    policy = PolicyNetwork(TableModel(), temperature=settings.temperature)
    engine = PpoEngine(settings, TorchNetwork(policy, settings), critic=None)
    if checkpoint is not None:
        engine.load(checkpoint.directory)
    return engine
