from learner.coordinator.depth import WINDOW_STEPS, Depth


def a_depth(groups_per_step=16, ceiling=64):
    return Depth(groups_per_step=groups_per_step, ceiling=ceiling)


def test_the_depth_starts_at_the_ceiling_and_shrinks_while_finished_groups_lie_about():
    depth = a_depth()
    depths = []
    for _ in range(WINDOW_STEPS * 8):
        depth.batch_delivered(idle_share=0.0, spare=depth.leases - 16)
        depths.append(depth.leases)
    assert depths[0] == 64
    assert depths == sorted(depths, reverse=True)
    assert depths[-1] == 18  # a batch, and the margin that is kept


def test_one_step_without_spare_groups_keeps_the_depth():
    depth = a_depth()
    for step in range(WINDOW_STEPS * 8):
        depth.batch_delivered(idle_share=0.0, spare=0 if step % WINDOW_STEPS == 0 else 48)
    assert depth.leases == 64


def test_a_learner_that_waits_for_lack_of_data_gets_more_at_once_up_to_the_ceiling():
    depth = a_depth()
    for _ in range(WINDOW_STEPS * 8):
        depth.batch_delivered(idle_share=0.0, spare=depth.leases - 16)
    for expected in (22, 26, 30):
        depth.batch_delivered(idle_share=0.5, spare=0)
        assert depth.leases == expected
    for _ in range(20):
        depth.batch_delivered(idle_share=0.5, spare=0)
    assert depth.leases == 64


def test_a_learner_that_waits_for_one_slow_group_beside_enough_others_gets_no_more():
    depth = a_depth()
    for _ in range(WINDOW_STEPS):
        depth.batch_delivered(idle_share=0.0, spare=48)
    before = depth.leases
    depth.batch_delivered(idle_share=0.5, spare=30)
    assert depth.leases == before


def test_the_depth_is_never_less_than_a_batch():
    depth = a_depth(groups_per_step=1, ceiling=1)
    for _ in range(WINDOW_STEPS * 4):
        depth.batch_delivered(idle_share=0.0, spare=5)
    assert depth.leases == 1
    assert repr(depth) == "<Depth 1 of at most 1 leases>"
