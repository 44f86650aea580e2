"""Guards of leases, groups and acknowledgements that travel together."""

from tests.mutations.guard import Guard

TOGETHER = (
    Guard(
        missing="a group that is kept keeps all that came with it in memory",
        file="common/together.py",
        code='b"".join((ids[4 * start : 4 * end], logprobs[4 * start : 4 * end], mask[start:end]))',
        broken='memoryview(b"".join((ids[4 * start : 4 * end], logprobs[4 * start : 4 * end], mask[start:end])))',
        test="learner/coordinator/test_conversation.py::"
        "test_a_group_that_is_queued_keeps_none_of_those_in_memory_that_came_with_it",
    ),
    Guard(
        missing="a payload may be longer than the headers say",
        file="common/codec.py",
        code="if len(payload) != num_tokens",
        broken="if len(payload) < num_tokens",
        test="common/test_together.py::test_a_payload_of_another_length_than_the_headers_say_cannot_be_split",
    ),
    Guard(
        missing="a message carries any number of small things",
        file="common/together.py",
        code="len(some) == MAX_TOGETHER or ",
        broken="",
        test="common/test_together.py::test_small_items_are_bounded_in_number",
    ),
    Guard(
        missing="a group is sent whose lease was taken away",
        file="rollout_server/held_leases.py",
        code="        self._unsent.pop(lease_id, None)\n",
        broken="",
        test="rollout_server/test_held_leases.py::"
        "test_a_lease_that_is_taken_away_before_its_group_was_sent_is_not_sent",
    ),
    Guard(
        missing="a group is sent twice at once",
        file="rollout_server/held_leases.py",
        code="math.inf",
        broken="-1e9",
        test="rollout_server/test_held_leases.py::"
        "test_groups_are_sent_again_each_by_itself_and_none_that_was_not_sent_yet",
    ),
    Guard(
        missing="a group claims a version before the learner heard that it is loaded",
        file="rollout_server/server.py",
        code="if message.newest_version > self._confirmed_version:",
        broken="if False:",
        test="rollout_server/test_server.py::"
        "test_a_group_follows_the_word_that_the_version_it_was_sampled_by_is_loaded",
    ),
    Guard(
        missing="the largest row cannot be leased",
        file="rollout_server/greeting.py",
        code=", max_header_bytes=MAX_HEADER_BYTES",
        broken="",
        test="rollout_server/test_held_leases.py::test_the_largest_row_can_be_leased",
    ),
    Guard(
        missing="leases pile up for a server that does not read",
        file="learner/coordinator/lender.py",
        code="if self._must_wait(some[0][0]):",
        broken="if False:",
        test="learner/coordinator/test_lender.py::test_a_server_that_does_not_read_gets_no_more_and_others_get_theirs",
    ),
    Guard(
        missing="rows are asked for by a new thread each time",
        file="learner/coordinator/background.py",
        code="while (call := self._calls.get()) is not None:\n            call()",
        broken="while (call := self._calls.get()) is not None:\n            threading.Thread(target=call).start()",
        test="learner/coordinator/test_background.py::"
        "test_calls_run_one_after_the_other_on_one_thread_that_is_not_the_loops",
    ),
    Guard(
        missing="what cannot be told apart is passed over in silence",
        file="learner/coordinator/inbound.py",
        code="self.hear_garbage(session.peer, str(error), now)",
        broken="pass",
        test="learner/coordinator/test_conversation.py::"
        "test_groups_whose_payload_does_not_fit_their_headers_are_refused_as_a_whole_and_their_leases_go_on",
    ),
    Guard(
        missing="a batch holds up everybody else while it is sent",
        file="learner/coordinator/batch_sender.py",
        code="                await turn.next()\n",
        broken="                pass\n",
        test="learner/coordinator/test_batch_sender.py::test_others_have_a_turn_between_the_parts_of_a_batch",
    ),
    Guard(
        missing="leases hold up everybody else while they are sent",
        file="learner/coordinator/lender.py",
        code="                    await turn.next()\n",
        broken="                    pass\n",
        test="learner/coordinator/test_lender.py::test_others_have_a_turn_between_the_messages_of_leases",
    ),
    Guard(
        missing="heartbeats wait behind groups",
        file="learner/coordinator/inbox.py",
        code="return not self._in_order[incoming.peer] and _may_overtake(incoming.frames)",
        broken="return False",
        test="learner/coordinator/test_service.py::"
        "test_a_heartbeat_is_answered_before_the_groups_that_were_sent_before_it",
    ),
    Guard(
        missing="what takes a server out of service overtakes the groups before it",
        file="learner/coordinator/inbox.py",
        code="return not _heartbeats.decode(frames[0]).out_of_service",
        broken="return bool(_heartbeats.decode(frames[0]))",
        test="learner/coordinator/test_inbox.py::"
        "test_a_heartbeat_that_takes_its_server_out_of_service_waits_for_the_groups_before_it",
    ),
    Guard(
        missing="a server leaves before its groups are heard",
        file="learner/coordinator/inbox.py",
        code="        if not self._waiting[incoming.peer]:\n            return True\n",
        broken="        return True\n",
        test="learner/coordinator/test_inbox.py::"
        "test_what_else_a_server_says_keeps_its_place_behind_its_own_groups_and_behind_no_others",
    ),
    Guard(
        missing="what is received and not heard has no bound",
        file="learner/coordinator/inbox.py",
        code="            self._has_room.clear()\n",
        broken="            pass\n",
        test="learner/coordinator/test_inbox.py::test_no_more_is_taken_in_than_its_bound_and_one_message",
    ),
    Guard(
        missing="groups hold up everybody else while they are heard",
        file="learner/coordinator/service.py",
        code="(incoming := self._inbox.take()) is not None:\n                self._hear_server(incoming)\n"
        "                if turn.is_over:\n",
        broken="(incoming := self._inbox.take()) is not None:\n                self._hear_server(incoming)\n"
        "                if False:\n",
        test="learner/coordinator/test_service.py::test_others_have_a_turn_while_a_burst_of_servers_messages_is_heard",
    ),
    Guard(
        missing="leases wait behind groups",
        file="learner/coordinator/service.py",
        code="await self._lender.wait_until_sent()",
        broken="pass",
        test="learner/coordinator/test_service.py::"
        "test_groups_are_not_heard_while_leases_are_being_sent_and_heartbeats_are",
    ),
    Guard(
        missing="a slow generator of rows holds up the loop",
        file="learner/coordinator/lender.py",
        code="if all(self._source_of(grant).are_in_memory for grant in grants):",
        broken="if True:",
        test="learner/coordinator/test_lender.py::test_tasks_are_asked_for_in_a_thread_unless_they_are_in_memory",
    ),
    Guard(
        missing="a generator in a mix with rows in memory holds up the loop",
        file="learner/coordinator/tasks.py",
        code="all(source.are_in_memory for source in sources)",
        broken="any(source.are_in_memory for source in sources)",
        test="learner/coordinator/test_tasks.py::test_tasks_are_in_memory_if_the_rows_of_every_environment_are",
    ),
    Guard(
        missing="groups wait for the rows of leases",
        file="learner/coordinator/lender.py",
        code="                    made = await self._tasks_for(grants, background)\n"
        "                    self._has_sent.clear()\n",
        broken="                    self._has_sent.clear()\n"
        "                    made = await self._tasks_for(grants, background)\n",
        test="learner/coordinator/test_lender.py::"
        "test_who_waits_until_leases_are_sent_waits_for_messages_and_not_for_rows",
    ),
)
