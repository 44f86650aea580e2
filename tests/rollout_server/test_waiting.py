from rollout_server.waiting import WaitingAloud

EVERY_S = 5.0


def said(caplog, *looks):
    """What is said at each look: (now, last heard, works, what for)."""
    caplog.set_level("INFO")
    aloud = WaitingAloud("tcp://learner:1", 0.0)
    found = []
    for now_s, heard_s, is_working, waiting_for in looks:
        caplog.clear()
        aloud.look(now_s, heard_s=heard_s, is_working=is_working, waiting_for=waiting_for, every_s=EVERY_S)
        found.append(caplog.messages)
    return found


def test_a_server_without_leases_says_again_and_again_what_keeps_them_away(caplog):
    what = "the learner to complete step 3"
    looks = [(float(now), float(now), False, what) for now in range(13)]
    times = [now for now, messages in enumerate(said(caplog, *looks)) if messages == [f"waiting for {what}"]]
    assert times == [6, 12]


def test_a_server_that_works_waits_for_nobody_and_one_that_hears_nothing_names_the_learner(caplog):
    silent = ["waiting for the learner at tcp://learner:1: nothing heard of it"]
    looks = [(9.0, 8.0, True, ""), (13.5, 8.0, True, ""), (14.0, 8.0, False, "snapshot 3"), (19.0, 8.0, False, "")]
    assert said(caplog, *looks) == [[], silent, [], silent]


def test_a_server_that_was_told_no_reason_waits_for_leases(caplog):
    assert said(caplog, (6.0, 6.0, False, "")) == [["waiting for leases"]]
