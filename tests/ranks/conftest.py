"""What the tests of real ranks share: the two ranks, and a model."""

from collections.abc import Iterator

import pytest

from tests.models import save_tiny_model
from tests.ranks.pair import Pair, a_pair


@pytest.fixture(scope="session")
def pair() -> Iterator[Pair]:
    with a_pair() as pair:
        yield pair


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_model(tmp_path_factory.mktemp("models") / "tied", tied=True))
