import pytest

from learner.learning_rate import learning_rate_scale
from tests.builders_learner import some_train_settings


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, [1, 1, 1, 1, 1, 1]),
        ("constant", 3, [1 / 4, 2 / 4, 3 / 4, 1, 1, 1]),
        ("linear", 0, [1, 3 / 4, 2 / 4, 1 / 4, 0, 0]),
        ("linear", 2, [1 / 3, 2 / 3, 1, 1 / 2, 0, 0]),
        ("cosine", 0, [1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5, 0, 0]),
        ("linear", 4, [1 / 5, 2 / 5, 3 / 5, 4 / 5, 1, 0]),  # no step is left for the schedule
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_the_schedule(schedule, warmup, expected):
    settings = some_train_settings("m", lr_schedule=schedule, warmup_steps=warmup, total_steps=4)
    assert [learning_rate_scale(version, settings) for version in range(6)] == pytest.approx(expected)
