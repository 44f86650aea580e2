"""Guards of changes that are written into a running engine's parameters."""

from tests.mutations.guard import Guard

IN_PLACE = (
    Guard(
        missing="an engine into which not all changes were written goes on",
        file="rollout_server/vllm_engine.py",
        code="                raise failed\n",
        broken="                pass\n",
        test="rollout_server/test_changes_on_vllm.py::"
        "test_half_written_changes_keep_the_engine_paused_until_a_whole_snapshot_is_loaded",
    ),
    Guard(
        missing="memory of the largest delta so far is kept",
        file="rollout_server/in_place_changes.py",
        code="            file.truncate()\n",
        broken="",
        test="rollout_server/test_placements.py::"
        "test_a_patch_makes_the_parameters_what_a_load_of_the_new_snapshot_makes_them",
    ),
    Guard(
        missing="values are read from where other values lie once types are mixed",
        file="rollout_server/local_changes.py",
        code="offset += count * words.itemsize",
        broken="offset += count * 4",
        test="rollout_server/test_local_changes.py::"
        "test_what_is_written_is_read_tensor_by_tensor_whatever_their_types_and_in_however_many_pieces_they_come",
    ),
)
