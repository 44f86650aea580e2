"""ReferencePolicy: frozen, comparable, and out of the way when it is told to be."""

import pytest
import torch

from common.lifecycle import UserError
from learner.networks import load_policy
from learner.reference import Reference, ReferencePolicy, open_reference
from learner.reward_settings import KlSettings
from learner.training import TrainSettings
from tests.builders_learner import a_batch, random_groups, some_train_settings
from tests.models import save_tiny_model

CPU = torch.device("cpu")
BATCH = a_batch(random_groups(0), micro_batch_tokens=40)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))


def settings_with(model: str, reference_model: str | None, **kl):
    return some_train_settings(model, kl=KlSettings(reference_model=reference_model, **kl))


def opened(settings: TrainSettings) -> Reference | None:
    return open_reference(settings, CPU, load_policy(settings.model, dtype="float32", temperature=1.0))


@pytest.mark.parametrize("offload", [False, True])
def test_a_reference_says_what_the_policy_it_was_loaded_from_says_at_its_temperature(model, offload):
    settings = settings_with(model, model, reference_offload=offload)
    policy = load_policy(model, dtype="float32", temperature=settings.temperature)
    logprobs = opened(settings).logprobs(BATCH.micro_batches)
    for micro, got_BT in zip(BATCH.micro_batches, logprobs, strict=True):
        expected_BT, _ = policy(micro.token_ids_BT, micro.attention_mask_BT, micro.loss_mask_BT)
        assert torch.equal(got_BT, expected_BT)
        assert not got_BT.requires_grad


def test_without_a_reference_in_the_settings_there_is_none(model):
    assert opened(some_train_settings(model)) is None


def test_a_frozen_network_asks_for_no_gradient(model):
    network = load_policy(model, dtype="float32", temperature=1.0)
    ReferencePolicy(network, device=CPU, offload=False)
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_an_offloaded_reference_is_copied_to_the_device_and_stays_in_host_memory(tied, tmp_path):
    model = str(save_tiny_model(tmp_path / "model", tied=tied))
    network = load_policy(model, dtype="float32", temperature=1.0)
    copies = ReferencePolicy(network, device=torch.device("meta"), offload=True)._copy_to_device()
    resting = dict([*network.named_parameters(), *network.named_buffers()])
    assert copies.keys() == resting.keys()
    assert {tensor.device.type for tensor in copies.values()} == {"meta"}
    assert {tensor.device.type for tensor in resting.values()} == {"cpu"}


def test_an_offloaded_reference_answers_with_the_copy(model):
    settings = settings_with(model, model, reference_offload=True)
    reference = opened(settings)
    copy_to_device = reference._copy_to_device
    reference._copy_to_device = lambda: {name: tensor * 0 + 0.01 for name, tensor in copy_to_device().items()}
    flat = reference.logprobs(BATCH.micro_batches[:1])[0]
    assert torch.unique(flat[BATCH.micro_batches[0].loss_mask_BT]).numel() == 1  # all words are equally likely


def test_a_reference_that_stays_is_on_the_device_from_the_start(model):
    network = load_policy(model, dtype="float32", temperature=1.0)
    ReferencePolicy(network, device=torch.device("meta"), offload=False)
    assert {parameter.device.type for parameter in network.parameters()} == {"meta"}


def test_a_reference_that_does_not_exist_is_named(model, tmp_path):
    with pytest.raises(UserError, match=f"cannot load the model {tmp_path}/nowhere: "):
        opened(settings_with(model, f"{tmp_path}/nowhere"))


def test_a_reference_whose_tokens_mean_other_words_is_refused(model, tmp_path):
    other = save_tiny_model(tmp_path / "other", tied=True)
    tokenizer = other / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"w50"', '"other"'))
    with pytest.raises(UserError, match=r"other has another tokenizer than .*tied: its token ids mean other words"):
        opened(settings_with(model, str(other)))
    same = save_tiny_model(tmp_path / "same", seed=1, tied=False)
    assert opened(settings_with(model, str(same))) is not None
