"""ask_networks: who is asked what before a step, and that none of it is differentiated."""

import pytest
import torch

from learner.kl_control import KlControl
from learner.opinions import ask_networks
from learner.reference import ReferencePolicy
from learner.reward_settings import KlSettings
from learner.training import TrainBatch
from tests.builders_learner import a_batch, random_groups

BATCH = a_batch(random_groups(0), micro_batch_tokens=40)
WEIGHT = torch.ones((), requires_grad=True)


class Recorder:
    """Answers every position with a number of its own, by way of a trainable weight."""

    def __init__(self, num_outputs: int) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self._num_outputs = num_outputs

    def __call__(self, token_ids_BT, attention_mask_BT, *_) -> tuple[torch.Tensor, ...]:
        assert token_ids_BT.shape == attention_mask_BT.shape
        assert not attention_mask_BT[:, -1].all()
        self.shapes.append(tuple(token_ids_BT.shape))
        return (WEIGHT * token_ids_BT.float(),) * self._num_outputs


class Silence(ReferencePolicy):
    """A reference that gives every token probability 1."""

    def __init__(self) -> None:
        pass

    def logprobs(self, micro_batches):
        return [torch.zeros(micro.loss_mask_BT.shape) for micro in micro_batches]


def shapes_of(batch: TrainBatch, extra: int) -> list[tuple[int, int]]:
    return [(len(micro.token_ids_BT), micro.token_ids_BT.shape[1] + extra) for micro in batch.micro_batches]


def opinions_with(kl: KlSettings, *, policy, critic=None, reference: ReferencePolicy | None = None):
    return ask_networks(BATCH, policy=policy, critic=critic, reference=reference, kl=KlControl(kl))


def test_the_critic_is_asked_about_one_state_more_than_there_are_tokens_and_is_not_differentiated():
    critic = Recorder(1)
    opinions = opinions_with(KlSettings(), policy=None, critic=critic)
    assert critic.shapes == shapes_of(BATCH, extra=1)
    assert not any(values_BS.requires_grad for values_BS in opinions.values_BS)
    assert opinions.reference_logprobs_BT is opinions.token_rewards_BT is None


@pytest.mark.parametrize(("coefficient", "place"), [(0.0, "loss"), (0.1, "loss"), (0.0, "reward")])
def test_the_policy_is_not_asked_unless_the_kl_is_in_the_reward(coefficient, place):
    kl = KlSettings(coefficient=coefficient, place=place, reference_model="m")
    opinions = opinions_with(kl, policy=None, reference=Silence())
    assert opinions.token_rewards_BT is None
    assert len(opinions.reference_logprobs_BT) == len(BATCH.micro_batches)


def test_the_kl_in_the_reward_is_not_differentiated():
    kl = KlSettings(coefficient=0.5, place="reward", reference_model="m")

    def policy(token_ids_BT, attention_mask_BT, loss_mask_BT):
        return WEIGHT * torch.where(loss_mask_BT, -2.0, torch.nan), torch.zeros(())

    opinions = opinions_with(kl, policy=policy, reference=Silence())
    for micro, rewards_BT in zip(BATCH.micro_batches, opinions.token_rewards_BT, strict=True):
        assert torch.equal(rewards_BT, torch.where(micro.loss_mask_BT, 1.0, 0.0))
        assert not rewards_BT.requires_grad
