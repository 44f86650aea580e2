"""Networks of a run lay out their micro-batches alike."""

import torch

from learner.arranging import arrange, pack_where_possible
from learner.deepspeed_engine import open_deepspeed_engine
from learner.engine_settings import EngineSettings
from learner.networks import CriticNetwork, PolicyNetwork
from learner.packing import PADDED, Arrangement
from learner.ranks import Alone
from learner.reference import ReferencePolicy
from learner.reward_settings import KlSettings
from tests.builders_learner import some_train_settings
from tests.models import a_model_that_mixes_rows_up, a_tiny_model, save_tiny_model

CPU = torch.device("cpu")


def a_policy() -> PolicyNetwork:
    return PolicyNetwork(a_tiny_model(0, tied=True), temperature=1.0)


def test_critic_and_reference_are_packed_and_share_prompts_as_the_policy_does(tmp_path):
    model = str(save_tiny_model(tmp_path / "model", tied=True))
    kl = KlSettings(coefficient=0.1, reference_model=model)
    engine = open_deepspeed_engine(some_train_settings(model, advantage="gae", critic_model=model, kl=kl))
    networks = engine._policy.module, engine._critic.module, engine._reference.network
    assert [network.arrangement for network in networks] == [Arrangement(packs=True, shares=True)] * 3


def test_where_one_network_would_mix_trajectories_up_all_are_padded_and_the_log_names_it(caplog):
    networks = [a_policy(), CriticNetwork(a_model_that_mixes_rows_up())]
    pack_where_possible(networks, CPU)
    assert [network.arrangement for network in networks] == [PADDED] * 2
    assert caplog.messages == ["MixesRowsUp: trajectories in one row would be mixed up, so all are padded instead"]


def test_a_reference_that_would_mix_trajectories_up_keeps_the_policy_from_being_packed():
    policy, mixing = a_policy(), a_policy()
    mixing.model.model = a_model_that_mixes_rows_up()
    reference = ReferencePolicy(mixing, device=CPU, offload=True)
    arrange(policy, None, reference, EngineSettings(), CPU, None, Alone())
    assert policy.arrangement == mixing.arrangement == PADDED


def test_nothing_is_packed_that_is_not_to_be():
    policy = a_policy()
    arrange(policy, None, None, EngineSettings(packing=False), CPU, None, Alone())
    assert policy.arrangement == PADDED
