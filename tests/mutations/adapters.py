"""Guards of adapters on their way into an engine."""

from tests.mutations.guard import Guard

ON_VLLM = "rollout_server/test_adapters_on_vllm.py"

ADAPTERS = (
    Guard(
        missing="an engine is used on for adapters of a rank that it has no room for",
        file="rollout_server/server.py",
        code="had is not None and needs.rank <= had.rank and",
        broken="had is not None and",
        test="rollout_server/test_server.py::"
        "test_a_learner_that_comes_back_with_adapters_that_the_engine_has_no_room_for_is_not_served",
    ),
    Guard(
        missing="adapters that nobody needs stay in the engine",
        file="rollout_server/vllm_worker.py",
        code="self.remove_lora(each)",
        broken="pass",
        test=f"{ON_VLLM}::"
        "test_no_more_versions_are_held_than_there_is_room_for_and_the_next_waits_for_a_request_to_end",
    ),
    Guard(
        missing="the base model samples before its first adapter is there",
        file="rollout_server/vllm_engine.py",
        code="self._refusal = NO_ADAPTER if manifest.is_base_model else None",
        broken="self._refusal = None",
        test=f"{ON_VLLM}::test_another_base_waits_for_running_requests_and_nothing_is_sampled_until_it_has_an_adapter",
    ),
    Guard(
        missing="an adapter may read what another one of its number has cached",
        file="rollout_server/vllm_engine.py",
        code="salt = adapter.name if adapter is not None else str(self.loaded_version)",
        broken="salt = str(self.loaded_version)",
        test=f"{ON_VLLM}::test_a_version_number_that_comes_again_reads_nothing_that_its_former_weights_have_cached",
    ),
    Guard(
        missing="a version that the engine refuses ends the server with a traceback",
        file="rollout_server/weight_receiver.py",
        code="except SnapshotError as error:",
        broken="except InterruptedError as error:",
        test="rollout_server/test_server.py::"
        "test_a_version_that_the_engine_refuses_ends_the_server_with_a_sentence_that_says_what_to_do",
    ),
    Guard(
        missing="the coordinator is not told why",
        file="rollout_server/weight_receiver.py",
        code='self.doubt = f"the engine refuses what the learner publishes: {error}"',
        broken='refusal = f"the engine refuses what the learner publishes: {error}"',
        test="rollout_server/test_server.py::"
        "test_a_version_that_the_engine_refuses_ends_the_server_with_a_sentence_that_says_what_to_do",
    ),
    Guard(
        missing="an architecture without adapters is started with them",
        file="rollout_server/vllm_start.py",
        code="if not supports_lora(model_class):",
        broken="if False:",
        test=f"{ON_VLLM}::test_an_architecture_for_which_vllm_has_no_adapters_is_refused_before_it_is_started",
    ),
)
