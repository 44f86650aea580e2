"""TokenLog: the one growing list of token ids that an episode is made of."""

import numpy as np

from common.staleness import NOT_SAMPLED
from common.trajectory import FinishReason, Trajectory
from rollout_server.inference import Completion


class TokenLog:
    """Token-in, token-out: ids are appended, never changed and never made again from text.

    The prompt of each turn is exactly what was logged before it. N = tokens of one append.
    """

    def __init__(self, prompt_ids_T: np.ndarray) -> None:
        self._ids: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._logprobs: list[np.ndarray] = []
        self._versions: list[np.ndarray] = []
        self.turns = 0
        self.num_prompt_tokens = int(prompt_ids_T.size)
        self.append_given(prompt_ids_T)

    def __len__(self) -> int:
        return sum(part.size for part in self._ids)

    def __repr__(self) -> str:
        return f"<TokenLog {len(self)} tokens, {self.turns} turns>"

    @property
    def token_ids(self) -> np.ndarray:
        """[T] int32: what the policy reads next."""
        return np.concatenate(self._ids)

    def append_given(self, token_ids_N: np.ndarray) -> None:
        """Tokens that the policy reads: not its own, so they are no evidence of it."""
        num_tokens = token_ids_N.size
        self._ids.append(token_ids_N.astype(np.int32))
        self._masks.append(np.zeros(num_tokens, dtype=np.bool_))
        self._logprobs.append(np.zeros(num_tokens, dtype=np.float32))
        self._versions.append(np.full(num_tokens, NOT_SAMPLED, dtype=np.int32))

    def append_sampled(self, completion: Completion) -> None:
        """What the policy sampled after token_ids."""
        self._ids.append(completion.token_ids.astype(np.int32))
        self._masks.append(np.ones(completion.token_ids.size, dtype=np.bool_))
        self._logprobs.append(completion.logprobs.astype(np.float32))
        self._versions.append(completion.token_versions.astype(np.int32))
        self.turns += 1

    def trajectory(self, *, reward: float, finish_reason: FinishReason, continues: bool = False) -> Trajectory:
        return Trajectory(
            token_ids=self.token_ids,
            loss_mask=np.concatenate(self._masks),
            behavior_logprobs=np.concatenate(self._logprobs),
            token_versions=np.concatenate(self._versions),
            reward=reward,
            finish_reason=finish_reason,
            turns=self.turns,
            continues=continues,
        )
