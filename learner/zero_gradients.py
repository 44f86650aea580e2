"""What a DeepSpeed engine has summed of a gradient, thrown away: a step that is refused leaves no trace in the next."""

from typing import Any


def discard_gradient(engine: Any, *, stage: int) -> None:
    """Between two steps, whatever part of a batch has been propagated; the engine is then as after a step.

    DeepSpeed has no such call. It does the same itself, in its ZeRO optimizers' step(), when a norm overflowed.
    """
    optimizer = engine.optimizer
    if stage == 0:
        engine.zero_grad()
    elif stage == 3:
        optimizer._pre_step()
        optimizer._overflow_clean_up(optimizer.loss_scale)
    else:
        _discard_partitions(optimizer)


def _discard_partitions(optimizer: Any) -> None:
    """At stages 1 and 2."""
    optimizer.micro_step_id = -1  # as before the first micro-batch
    optimizer.zero_grad(set_to_none=True)
    optimizer._release_preflattened_grad_buffers()
    for sums in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
        for group in sums:
            sums[group] = None
    if optimizer.cpu_offload:
        optimizer._wait_for_offload_copies()
        optimizer._offload_accumulated_param_ids = set()
        optimizer.reset_cpu_buffers()
