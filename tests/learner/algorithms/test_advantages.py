import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from learner.algorithms import ADVANTAGES, build_advantages, settings_of
from learner.algorithms.advantages import Episodes, Estimate
from learner.algorithms.vtrace import OffPolicyEpisodes
from learner.reward_settings import GROUP_RELATIVE
from tests.oracles import advantages as oracles
from tests.oracles.advantages import Episode

numbers = st.floats(-100, 100, allow_nan=False, width=32)
discounts = st.sampled_from([0.0, 0.5, 0.99, 1.0])


@st.composite
def episode_lists(draw) -> list[Episode]:
    """Groups of one and more, equal rewards, episodes of no token at all."""
    rewards = st.sampled_from([0.0, 1.0, 0.1]) | numbers
    episodes = []
    for _ in range(draw(st.integers(1, 8))):
        length = draw(st.integers(0, 5))
        row = st.lists(numbers, min_size=length, max_size=length)
        episodes.append(
            Episode(
                reward=draw(rewards), group=draw(st.integers(0, 3)), costs=draw(row), values=draw(row),
                after=draw(numbers), terminated=draw(st.booleans()),
            )
        )  # fmt: skip
    return episodes


def as_tensors(episodes: list[Episode], *, poison: float = 0.0, padding: int = 0) -> Episodes:
    """As [N, K] tables in float64, with `poison` wherever no token is trained."""
    num_columns = max(len(episode.costs) for episode in episodes) + padding

    def table(name: str) -> torch.Tensor:
        rows = [[*getattr(episode, name), *[poison] * num_columns][:num_columns] for episode in episodes]
        return torch.tensor(rows, dtype=torch.float64)

    lengths = torch.tensor([len(episode.costs) for episode in episodes])
    return OffPolicyEpisodes(
        rewards_N=torch.tensor([episode.reward for episode in episodes], dtype=torch.float64),
        group_index_N=torch.tensor([episode.group for episode in episodes]),
        mask_NK=torch.arange(num_columns) < lengths.unsqueeze(1),
        token_rewards_NK=table("costs"),
        values_NK=table("values"),
        bootstrap_N=torch.tensor(
            [0.0 if episode.terminated else episode.after for episode in episodes], dtype=torch.float64
        ),
        log_ratios_NK=0.01 * table("values"),
    )


def assert_equal(table_NK: torch.Tensor, rows: list[list[float]]) -> None:
    for got, expected in zip(table_NK.tolist(), rows, strict=True):
        assert got[: len(expected)] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        assert not any(got[len(expected) :])


def estimate(name: str, episodes: Episodes, **chosen: float) -> Estimate:
    return build_advantages(name, chosen)(episodes)


FORMULAS = {
    "grpo": lambda episodes, gamma: oracles.grpo(episodes),
    "dr_grpo": lambda episodes, gamma: oracles.dr_grpo(episodes),
    "rloo": lambda episodes, gamma: oracles.rloo(episodes),
    "reinforce": lambda episodes, gamma: oracles.reinforce(episodes, gamma=gamma),
    "reinforce_plus_plus": lambda episodes, gamma: oracles.reinforce_plus_plus(episodes, gamma=gamma),
    "reinforce_plus_plus_baseline": lambda episodes, gamma: oracles.reinforce_plus_plus_baseline(episodes, gamma=gamma),
}  # fmt: skip


def is_near_a_tie(episodes: list[Episode]) -> bool:
    """Deviations so small that the formula divides one rounding error by another."""
    rows = [[episode.total for episode in oracles.peers(each, episodes)] for each in episodes]
    return any(0 < max(row) - min(row) < 1e-3 for row in rows)


def gamma_of(name: str, gamma: float) -> dict[str, float]:
    return {"gamma": gamma} if "gamma" in settings_of(ADVANTAGES[name]) else {}


@pytest.mark.parametrize("name", FORMULAS)
@settings(max_examples=60, deadline=None)
@given(episodes=episode_lists(), gamma=discounts)
def test_advantages_match_the_formula_written_as_loops(name, episodes, gamma):
    assume(not is_near_a_tie(episodes))
    got = estimate(name, as_tensors(episodes, poison=math.nan, padding=1), **gamma_of(name, gamma))
    assert_equal(got.advantages_NK, FORMULAS[name](episodes, gamma))
    assert got.returns_NK is None


@settings(max_examples=100, deadline=None)
@given(episodes=episode_lists(), gamma=discounts, gae_lambda=discounts, whiten=st.booleans(), bootstrap=st.booleans())
def test_generalized_advantages_match_the_formula_written_as_loops(episodes, gamma, gae_lambda, whiten, bootstrap):
    chosen = {"gamma": gamma, "gae_lambda": gae_lambda, "bootstrap_truncated": bootstrap}
    got = estimate("gae", as_tensors(episodes), whiten=float(whiten), **chosen)
    advantages, returns = oracles.gae(episodes, **chosen)
    assert_equal(got.advantages_NK, oracles.whitened(advantages) if whiten else advantages)
    assert_equal(got.returns_NK, returns)


def test_every_estimator_is_checked_against_a_formula():
    assert {*FORMULAS, "gae", "vtrace"} == set(ADVANTAGES)  # vtrace: in test_vtrace.py
    assert set(GROUP_RELATIVE) < set(ADVANTAGES)


def some_episodes() -> list[Episode]:
    return [
        Episode(reward=1.0, group=0, costs=[-0.1, 0.2, -0.3], values=[0.5, 0.4, 0.1], terminated=True),
        Episode(reward=-2.0, group=0, costs=[0.3], values=[2.0], after=0.7, terminated=False),
        Episode(reward=0.5, group=1, costs=[], terminated=False, after=9.0),
        Episode(reward=0.5, group=0, costs=[0.0, 0.0], values=[1.0, -1.0], terminated=True),
    ]


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_what_stands_where_no_token_is_trained_changes_nothing(name, poison):
    clean = estimate(name, as_tensors(some_episodes(), padding=2))
    dirty = estimate(name, as_tensors(some_episodes(), padding=2, poison=poison))
    assert torch.equal(clean.advantages_NK, dirty.advantages_NK)
    if clean.returns_NK is not None:
        assert torch.equal(clean.returns_NK, dirty.returns_NK)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("padding", [0, 2])
def test_a_batch_without_a_trained_token_has_advantages_of_nothing(name, padding):
    episodes = [Episode(reward=1.0, group=0, costs=[]), Episode(reward=2.0, group=0, costs=[])]
    got = estimate(name, as_tensors(episodes, padding=padding, poison=math.nan))
    assert got.advantages_NK.shape == (2, padding)
    assert not got.advantages_NK.any()


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_reward_that_is_not_finite_shows_in_the_advantages(name, broken):
    """The engine then sees a loss that is not finite, and refuses the step."""
    episodes = [Episode(reward=broken, group=0, costs=[0.0], values=[0.0]) for _ in range(3)]
    assert not estimate(name, as_tensors(episodes)).advantages_NK.isfinite().any()


@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_a_group_of_one_is_compared_with_nobody(name):
    alone = Episode(reward=0.3, group=0, costs=[0.0, 0.0])
    others = [Episode(reward=reward, group=1, costs=[0.0, 0.0]) for reward in (5.0, 1.0)]
    got = estimate(name, as_tensors([alone, *others])).advantages_NK
    assert got[0].tolist() == [0.0, 0.0]
    assert got[1, 0] > 0 > got[2, 0]


@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e8 / 3])
@pytest.mark.parametrize("name", GROUP_RELATIVE)
def test_a_group_of_equal_rewards_has_no_advantage_at_all(name, reward):
    episodes = [Episode(reward=reward, group=0, costs=[0.0]) for _ in range(7)]
    for dtype in (torch.float32, torch.float64):
        tensors = as_tensors(episodes)
        in_dtype = Episodes(
            rewards_N=tensors.rewards_N.to(dtype),
            group_index_N=tensors.group_index_N,
            mask_NK=tensors.mask_NK,
            token_rewards_NK=tensors.token_rewards_NK.to(dtype),
        )
        assert estimate(name, in_dtype).advantages_NK.tolist() == [[0.0]] * 7


@pytest.mark.parametrize("name", ["reinforce_plus_plus", "gae"])
def test_a_batch_in_which_all_is_the_same_has_whitened_advantages_of_zero(name):
    episodes = [Episode(reward=0.1, group=0, costs=[0.0], values=[0.0]) for _ in range(7)]
    tensors = as_tensors(episodes)
    in_float32 = Episodes(
        rewards_N=tensors.rewards_N.float(),
        group_index_N=tensors.group_index_N,
        mask_NK=tensors.mask_NK,
        token_rewards_NK=tensors.token_rewards_NK.float(),
        values_NK=tensors.values_NK.float(),
        bootstrap_N=tensors.bootstrap_N.float(),
    )
    assert estimate(name, in_float32).advantages_NK.tolist() == [[0.0]] * 7


@pytest.mark.parametrize("name", ["reinforce", "gae"])
def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_and_not_over_the_trajectories(name):
    tensors = as_tensors(some_episodes())
    plain, white = (estimate(name, tensors, whiten=whiten) for whiten in (0.0, 1.0))
    over_tokens = white.advantages_NK[tensors.mask_NK]
    assert float(over_tokens.mean()) == pytest.approx(0.0, abs=1e-12)
    assert float(over_tokens.std(unbiased=False)) == pytest.approx(1.0, abs=1e-5)
    assert not torch.equal(plain.advantages_NK, white.advantages_NK)
    if name == "gae":
        assert torch.equal(plain.returns_NK, white.returns_NK)


ENDS = [
    Episode(reward=1.0, group=0, costs=[0.0], values=[5.0], after=3.0, terminated=terminated)
    for terminated in (True, False)
]


def test_the_reward_is_the_last_word_also_about_what_was_cut_off():
    """Otherwise a policy whose critic hopes for more learns never to stop."""
    for chosen in ({"name": "gae", "whiten": 0.0}, {"name": "vtrace"}):
        got = estimate(episodes=as_tensors(ENDS), **chosen)
        assert got.returns_NK[:, 0].tolist() == [1.0, 1.0]
        assert got.advantages_NK[0] == got.advantages_NK[1]


def test_where_a_setting_says_so_a_truncated_end_is_worth_what_the_critic_says_of_it():
    got = estimate("gae", as_tensors(ENDS), whiten=0.0, bootstrap_truncated=1.0)
    assert got.advantages_NK[:, 0].tolist() == [1.0 - 5.0, 1.0 + 3.0 - 5.0]
    assert got.returns_NK[:, 0].tolist() == [1.0, 4.0]


def test_leaving_the_deviation_out_of_grpo_is_dr_grpo():
    tensors = as_tensors(some_episodes())
    assert torch.equal(
        estimate("grpo", tensors, normalize_std=0.0).advantages_NK, estimate("dr_grpo", tensors).advantages_NK
    )


def test_an_unknown_advantage_or_setting_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown advantage td; known: dr_grpo, gae, grpo, reinforce, reinforce_plus"):
        build_advantages("td", {})
    with pytest.raises(ValueError, match="gae has no setting gama; it takes: gamma, gae_lambda, whiten"):
        build_advantages("gae", {"gama": 1.0})
    with pytest.raises(ValueError, match="rloo has no setting gamma; it takes: none"):
        build_advantages("rloo", {"gamma": 1.0})


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
@pytest.mark.parametrize("setting", ["gamma", "gae_lambda"])
def test_a_discount_that_is_none_is_refused(setting, value):
    with pytest.raises(ValueError, match=f"{setting} of gae must be >= 0 and <= 1, got {value}"):
        build_advantages("gae", {setting: value})
