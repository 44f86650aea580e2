import numpy as np
import pytest

from common.staleness import NOT_SAMPLED, oldest_version, token_staleness


def test_staleness_is_the_version_being_updated_minus_the_version_that_sampled():
    versions = np.array([NOT_SAMPLED, 3, 4, 5], np.int32)
    assert token_staleness(versions, current=5).tolist() == [0, 2, 1, 0]


def test_tokens_that_no_policy_sampled_are_never_stale():
    assert token_staleness(np.full(3, NOT_SAMPLED, np.int32), current=99).tolist() == [0, 0, 0]


def test_the_oldest_version_ignores_tokens_that_no_policy_sampled():
    assert oldest_version(np.array([NOT_SAMPLED, 7, 6], np.int32)) == 6


def test_a_trajectory_without_a_sampled_token_has_no_oldest_version():
    with pytest.raises(ValueError, match="none of the 2 tokens"):
        oldest_version(np.full(2, NOT_SAMPLED, np.int32))
