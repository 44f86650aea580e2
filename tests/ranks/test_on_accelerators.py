"""Two ranks with an accelerator each, for what needs one, such as flash attention. Of one accelerator they fail."""

import pytest

from learner.engine_settings import EngineSettings
from tests.builders_learner import largest_difference
from tests.models import a_model, save_model
from tests.ranks.pair import Pair
from tests.ranks.rank_settings import settings_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_sequences_computed_together_on_accelerators_are_trained_as_apart(
    attention: str, tmp_path_factory: pytest.TempPathFactory, pair: Pair
):
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 256}
    model = str(save_model(tmp_path_factory.mktemp("models"), a_model(0, tied=True, **shape)))
    together, apart = (
        pair.play(
            settings_for(
                model,
                zero_stage=3,
                dtype="bfloat16",
                engine=EngineSettings(sequence_parallel=size, attention=attention),
            ),
            steps=2,
            sampled_tokens=200,
            micro_batch_tokens=1000,
        )
        for size in (2, 1)
    )
    assert largest_difference(together.weights, apart.weights) < 4e-3
