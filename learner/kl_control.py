"""KlControl: what the distance to the reference costs, in the reward or in the loss, and how that cost adapts."""

import torch
from torch import Tensor

from learner.algorithms.kl import adapted_coefficient, kl_estimates, kl_loss
from learner.algorithms.losses import LossOutput
from learner.reward_settings import KlSettings


class KlControl:
    """The coefficient is its whole state, and only where it adapts to a target is it one."""

    def __init__(self, settings: KlSettings) -> None:
        self._settings = settings
        self.coefficient = settings.coefficient

    def __repr__(self) -> str:
        return f"<KlControl {self.coefficient:g} in the {self._settings.place}, target {self._settings.target}>"

    @property
    def is_in_loss(self) -> bool:
        return self.coefficient > 0 and self._settings.place == "loss"

    @property
    def is_in_reward(self) -> bool:
        return self.coefficient > 0 and self._settings.place == "reward"

    def token_rewards(self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor, loss_mask_BT: Tensor) -> Tensor:
        """What each token costs, 0 or less on average; 0 outside the mask."""
        estimator = self._settings.chosen_estimator
        return -self.coefficient * kl_estimates(logprobs_BT, reference_logprobs_BT, loss_mask_BT, estimator=estimator)

    def loss(
        self, logprobs_BT: Tensor, reference_logprobs_BT: Tensor, loss_mask_BT: Tensor, *, num_loss_tokens: int
    ) -> LossOutput:
        return kl_loss(
            logprobs_BT,
            reference_logprobs_BT,
            loss_mask_BT,
            num_loss_tokens=num_loss_tokens,
            coefficient=self.coefficient,
            estimator=self._settings.chosen_estimator,
        )

    def adapt(self, kl_per_trajectory: float) -> None:
        """A step was taken on trajectories that were so far from the reference on average, by k1."""
        if self._settings.target is not None:
            self.coefficient = adapted_coefficient(self.coefficient, kl_per_trajectory, target=self._settings.target)

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; empty when the settings say it all."""
        if self._settings.target is None:
            return {}
        return {"kl_coefficient": torch.tensor(self.coefficient, dtype=torch.float64)}

    def restore(self, state: dict[str, Tensor]) -> None:
        """From a checkpoint of a run that adapted it; one that did not leaves it where the settings let it start."""
        if self._settings.target is not None and "kl_coefficient" in state:
            self.coefficient = float(state["kl_coefficient"])
