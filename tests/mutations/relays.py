"""Guards of weights that servers give on to each other."""

from tests.mutations.guard import Guard

RELAYS_TEST = "weights/test_relays.py"
SHELF_TEST = "rollout_server/test_relay_shelf.py"
PLANS_TEST = "learner/coordinator/test_relay_plans.py"
SOURCES = "rollout_server/chunk_sources.py"
SHELF = "rollout_server/relay_shelf.py"
PULLED = "rollout_server/pulled_snapshots.py"
PLANS = "learner/coordinator/relay_plans.py"
CHANGES = f"{RELAYS_TEST}::test_before_a_server_changes_its_copy_it_gives_nothing_of_it_any_more"
STRANGER = f"{RELAYS_TEST}::test_a_relay_lets_in_those_whom_it_was_told_to_and_no_stranger"
LIES = f"{RELAYS_TEST}::test_a_relay_that_lies_is_named_counted_and_never_asked_again_and_nothing_of_it_is_loaded"
SLOW = (
    f"{RELAYS_TEST}::test_a_relay_that_is_stuck_or_slow_delays_a_version_by_its_grace_and_is_then_not_asked_for_a_while"
)
TOLD = (
    f"{PLANS_TEST}::"
    "test_servers_that_offer_to_give_weights_on_are_told_where_to_pull_and_those_that_do_not_are_told_nothing"
)

RELAYS = (
    Guard(
        missing="what a relay sends is taken unseen",
        file="rollout_server/snapshot_client.py",
        code="            verify_chunk(pull.manifest, message.index, payload)\n",
        broken="            pass\n",
        test=LIES,
    ),
    Guard(
        missing="a relay that lies is asked again",
        file=SOURCES,
        code="rest_s=math.inf, is_lie=True",
        broken="rest_s=0.0, is_lie=True",
        test=LIES,
    ),
    Guard(
        missing="a relay that is stuck is waited for, for ever",
        file=SOURCES,
        code="if left_s <= 0:",
        broken="if False:",
        test=SLOW,
    ),
    Guard(
        missing="a relay that is stuck is waited for in each version",
        file=SOURCES,
        code='is all that came", rest_s=REST_S)',
        broken='is all that came", rest_s=0.0)',
        test=SLOW,
    ),
    Guard(
        missing="all behind a dead relay turn to the learner at once",
        file=SOURCES,
        code="GRACE_S * level +",
        broken="GRACE_S +",
        test=f"{RELAYS_TEST}::test_a_relay_that_is_given_up_near_the_learner_is_not_given_up_by_those_behind_it",
    ),
    Guard(
        missing="chunks that a relay was asked for are not asked for again of the learner",
        file=SOURCES,
        code="        pull.ask_others(time.monotonic())\n",
        broken="",
        test=f"{RELAYS_TEST}::test_a_relay_that_dies_in_the_middle_costs_its_grace_and_no_chunk_twice",
    ),
    Guard(
        missing="an address that is none ends the server",
        file=SOURCES,
        code="except WireError as error:",
        broken="except InterruptedError as error:",
        test=f"{RELAYS_TEST}::test_an_address_that_is_none_or_needs_keys_that_are_not_there_costs_nothing_but_a_line",
    ),
    Guard(
        missing="a key that is none ends the server",
        file="common/wire/options.py",
        code="        raise WireError(f\"{public.hex() or 'nothing'} is not the public key of a socket\") from error",
        broken="        raise",
        test=f"{RELAYS_TEST}::test_a_key_that_is_none_is_no_reason_to_fail",
    ),
    Guard(
        missing="a relay where nobody listens holds up the event loop",
        file=SOURCES,
        code=", linger_ms=0)",
        broken=")",
        test=f"{RELAYS_TEST}::test_a_relay_where_nobody_listens_is_left_without_holding_up_the_event_loop",
    ),
    Guard(
        missing="who joins pulls from the learner before the coordinator has said where",
        file=SOURCES,
        code="                await self._is_told.wait()\n",
        broken="                pass\n",
        test=f"{RELAYS_TEST}::test_who_joins_waits_for_the_coordinator_to_say_where_to_pull_but_not_for_long",
    ),
    Guard(
        missing="after a pull that was given up the next may be given up for the same reason",
        file=PULLED,
        code="if self._gave_up or manifest.version == NO_VERSION:",
        broken="if manifest.version == NO_VERSION:",
        test=f"{RELAYS_TEST}::test_once_a_pull_was_given_up_the_next_is_of_the_learner_alone",
    ),
    Guard(
        missing="bytes are given while a delta changes them",
        file=PULLED,
        code="        self._shelf.change()\n",
        broken="",
        test=CHANGES,
    ),
    Guard(
        missing="bytes are given while another snapshot is written over them",
        file=PULLED,
        code="        self._shelf.withdraw()\n        await self._writing.run(self._copy.begin",
        broken="        await self._writing.run(self._copy.begin",
        test=CHANGES,
    ),
    Guard(
        missing="bytes change while a reader copies them",
        file=SHELF,
        code="        with self._lock:\n            held = self._held.get(request.digest)",
        broken="        if True:\n            held = self._held.get(request.digest)",
        test=f"{SHELF_TEST}::test_bytes_are_not_changed_before_the_last_reader_has_copied_them",
    ),
    Guard(
        missing="chunks are given that have not come yet",
        file=SHELF,
        code="if request.index not in held.arrived:",
        broken="if False:",
        test=f"{SHELF_TEST}::test_a_chunk_is_given_as_soon_as_it_is_there_and_others_come_later",
    ),
    Guard(
        missing="a server that relays nothing keeps deltas",
        file=SHELF,
        code="        if not self.is_open:\n            return\n",
        broken="",
        test=f"{SHELF_TEST}::"
        "test_nothing_is_given_any_more_of_what_was_withdrawn_nor_kept_by_a_server_that_relays_nothing",
    ),
    Guard(
        missing="a relay lets in everybody who has a key",
        file="common/keys.py",
        code="        return self._names.get(public)\n",
        broken='        return "anybody"\n',
        test=STRANGER,
    ),
    Guard(
        missing="a relay lets in nobody, or asks for no key",
        file="rollout_server/relay.py",
        code="    if relaying.key is not None:\n",
        broken="    if False:\n",
        test=STRANGER,
    ),
    Guard(
        missing="a relay does not hear whom to let in",
        file="rollout_server/relay.py",
        code="        self.admitted.replace(plan.admitted)\n",
        broken="",
        test=STRANGER,
    ),
    Guard(
        missing="who asks and does not read makes a relay hold as much as it likes",
        file="rollout_server/relay.py",
        code=', "send_queue_messages": ANSWERS_IN_FLIGHT}',
        broken="}",
        test=f"{RELAYS_TEST}::test_who_asks_and_does_not_read_makes_a_relay_hold_little",
    ),
    Guard(
        missing="nobody is told at the learner which relay lies",
        file="learner/coordinator/inbound.py",
        code="        _log_liar(session, heartbeat)\n",
        broken="",
        test=f"{PLANS_TEST}::test_a_relay_that_sent_wrong_weights_is_named_once_where_the_operator_looks",
    ),
    Guard(
        missing="a revoked key is let in by relays on",
        file=PLANS,
        code=" and not is_revoked(one.peer)",
        broken="",
        test=f"{PLANS_TEST}::test_a_relay_lets_in_the_keys_that_its_pullers_showed_until_one_is_revoked",
    ),
    Guard(
        missing="servers are sent to one that is out of service",
        file=PLANS,
        code=" and not beat.out_of_service",
        broken="",
        test=TOLD,
    ),
    Guard(
        missing="servers are sent to one that is gone",
        file=PLANS,
        code=" and is_heard",
        broken="",
        test=f"{PLANS_TEST}::test_nobody_is_sent_to_a_server_that_was_not_heard_of_for_a_while",
    ),
    Guard(
        missing="a server that was cut off is not told again",
        file=PLANS,
        code="self._told.get(server_id) != (session.peer, plan)",
        broken="self._told.get(server_id, (None, None))[1] != plan",
        test=f"{PLANS_TEST}::test_a_server_that_comes_back_over_another_connection_is_told_again",
    ),
    Guard(
        missing="a server gives weights on to more than it may",
        file="learner/coordinator/relays.py",
        code="while len(pulling) < self._fan_out:",
        broken="while len(pulling) <= self._fan_out:",
        test="learner/coordinator/test_relays.py::"
        "test_every_server_reaches_the_learner_over_servers_that_are_there_and_nobody_serves_more_than_it_may",
    ),
    Guard(
        missing="servers are sent to one that left",
        file="learner/coordinator/relays.py",
        code="if server in by_id and (source is None or source in by_id)",
        broken="if server in by_id",
        test="learner/coordinator/test_relays.py::"
        "test_whoever_has_a_place_keeps_it_when_others_leave_and_the_orphans_get_the_free_ones",
    ),
)
