"""Guards of prompts that are computed once."""

from tests.mutations.guard import Guard

_SEGMENTS = "learner/test_segments.py::"
_THE_SAME = _SEGMENTS + "test_log_probabilities_entropies_values_and_gradients_are_those_of_prompts_that_are_repeated"

PROMPTS = (
    Guard(
        missing="an answer sees what it has not said yet",
        file="learner/segments.py",
        code="own_q.unsqueeze(1) >= own_q",
        broken="own_q.unsqueeze(1) >= own_q - 1",
        test=_THE_SAME,
    ),
    Guard(
        missing="answers see each other",
        file="learner/segments.py",
        code="queries_Sq = starts + torch.minimum(own_q, lengths - 1)",
        broken="queries_Sq = starts[-1:] + torch.minimum(own_q, lengths - 1)",
        test=_SEGMENTS + "test_what_one_answer_says_does_not_leak_into_another",
    ),
    Guard(
        missing="an answer sees what stands behind a short prompt that is computed beside a longer one",
        file="learner/segments.py",
        code="in_prefix_Sp = before_p < (",
        broken="in_prefix_Sp = before_p < 99 + (",
        test=_THE_SAME,
    ),
    Guard(
        missing="positions of an answer begin where it stands in the row",
        file="learner/segments.py",
        code="positions_T.expand_as(token_ids_BT)[attention_mask_BT]",
        broken="filled_M",
        test=_THE_SAME,
    ),
    Guard(
        missing="a model makes a mask as large as the row squared",
        file="learner/segments.py",
        code='        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device),\n',
        broken="",
        test=_SEGMENTS + "test_a_prompt_is_computed_once_and_no_mask_is_as_large_as_the_row_squared",
    ),
    Guard(
        missing="each long answer to a prompt has a mask of its own",
        file="learner/segments.py",
        code="prefixes if bool((prefixes != prefixes[0]).any()) else prefixes[:1]",
        broken="prefixes",
        test=_SEGMENTS + "test_long_answers_to_one_prompt_have_one_mask_between_them",
    ),
    Guard(
        missing="rows are taken apart where that gains nothing",
        file="learner/shared_prompts.py",
        code="row_tokens <= _MOST_COMPUTED * padded_tokens",
        broken="True",
        test=_SEGMENTS + "test_trajectories_of_one_length_that_share_nothing_stay_beside_one_another",
    ),
    Guard(
        missing="long answers to one prompt need a mask that fills the memory",
        file="learner/shared_prompts.py",
        code=" and (longest - unit.prefix) * longest <= _LARGEST_MASK",
        broken="",
        test="learner/test_shared_prompts.py::"
        "test_answers_whose_mask_would_be_too_large_are_computed_each_with_its_prompt",
    ),
    Guard(
        missing="answers that begin alike by chance break up their group",
        file="learner/shared_prompts.py",
        code="whole.saved > left.saved + right.saved",
        broken="not left.saved + right.saved",
        test="learner/test_shared_prompts.py::test_answers_that_happen_to_begin_alike_are_no_unit_of_their_own",
    ),
    Guard(
        missing="a group takes another along that only begins with the same instructions",
        file="learner/shared_prompts.py",
        code="whole.saved > left.saved + right.saved",
        broken="whole.saved > 0",
        test="learner/test_shared_prompts.py::"
        "test_groups_that_begin_with_the_same_instructions_stay_apart_where_their_prompts_go_on",
    ),
    Guard(
        missing="gradients of a prompt are summed in bfloat16",
        file="learner/taking.py",
        code="torch.promote_types(gradient.dtype, torch.float32)",
        broken="gradient.dtype",
        test=_SEGMENTS + "test_gradients_of_what_is_taken_many_times_are_summed_in_float32",
    ),
    Guard(
        missing="a model that ignores what a row is made of is trained on nonsense",
        file="learner/prompt_sharing.py",
        code="if not can_share(body, body.config.vocab_size, device):",
        broken="if False:",
        test="learner/test_prompt_sharing.py::"
        "test_prompts_are_computed_anew_where_they_cannot_be_shared_and_the_log_says_why",
    ),
    Guard(
        missing="what a model puts into the mask is lost",
        file="learner/segments.py",
        code="(attention_mask is not None and attention_mask.numel() > 1)",
        broken="False",
        test="learner/test_prompt_sharing.py::"
        "test_prompts_are_computed_anew_where_they_cannot_be_shared_and_the_log_says_why",
    ),
    Guard(
        missing="a window is taken for all tokens before",
        file="learner/prompt_sharing.py",
        code="if sees_a_window(body.config):",
        broken="if False:",
        test="learner/test_prompt_sharing.py::"
        "test_prompts_are_computed_anew_where_they_cannot_be_shared_and_the_log_says_why",
    ),
    Guard(
        missing="batches are cut for prompts that the reference cannot share",
        file="learner/prompt_sharing.py",
        code="(_against_network(network, device) for network in networks)",
        broken="(_against_network(network, device) for network in networks[:1])",
        test="learner/test_prompt_sharing.py::test_one_network_that_cannot_keeps_prompts_from_being_shared_by_all",
    ),
    Guard(
        missing="a reference is padded where batches are cut for packed rows",
        file="learner/arranging.py",
        code="networks = trained if own is None else [*trained, own.network]",
        broken="networks = trained",
        test="learner/test_arranging.py::test_critic_and_reference_are_packed_and_share_prompts_as_the_policy_does",
    ),
    Guard(
        missing="one network is padded where batches are cut for packed rows",
        file="learner/arranging.py",
        code="packs=not mixing",
        broken="packs=network not in mixing",
        test="learner/test_arranging.py::"
        "test_where_one_network_would_mix_trajectories_up_all_are_padded_and_the_log_names_it",
    ),
    Guard(
        missing="attention copies a long prompt as often as there are short answers",
        file="learner/cutting.py",
        code=" and each.num_padded <= _MOST_PADDED * budget",
        broken="",
        test="learner/test_packing.py::test_long_prompts_let_no_more_into_a_micro_batch_than_attention_can_copy",
    ),
    Guard(
        missing="micro-batches of several groups are larger than the budget lets them be",
        file="learner/cutting.py",
        code="computed > budget or padded > _MOST_PADDED * budget",
        broken="False",
        test="learner/test_packing.py::test_trajectories_that_share_a_prompt_stay_together_within_the_budget",
    ),
    Guard(
        missing="one rank gets the only group",
        file="learner/cutting.py",
        code="min(max(shares, 1), unit.count)",
        broken="1",
        test="learner/test_packing.py::test_a_group_that_is_all_there_is_is_shared_out_over_parts",
    ),
)
