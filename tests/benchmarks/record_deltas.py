"""Deltas of a real training run: the demo model, trained by plain torch Adam, published in bfloat16 after every step.

Twice for each learning rate: with the parameters themselves in bfloat16 (where an update below half a unit in the last
place is lost), and with parameters in float32 that are rounded to be published (what DeepSpeed does). Run as
`python -m tests.benchmarks.record_deltas`.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.delta.compiled import primitives
from common.delta.formats import Words
from learner.demo.model import build_demo_model
from learner.demo.task import NUM_DIGITS, training_prompts
from tests.benchmarks.delta_schemes import delta_scheme, entropy_bound_bytes, xor_zstd_scheme

LEARNING_RATES = (1e-6, 1e-5, 1e-4)
BATCH = 32
SETTLING_STEPS = 5  # Adam's first steps are larger than all others


@dataclass(frozen=True)
class Recorded:
    """One version against the one before."""

    density: float
    one_unit: float  # share of the changes that are by one unit in the last place
    delta_bytes: int
    xor_bytes: int
    bound_bytes: float


def batches(tokenizer: object, seed: int) -> Iterator[torch.Tensor]:
    rows = [f"{row['prompt']}{row['answer']}<eos>" for row in training_prompts()]
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = torch.randint(len(rows), (BATCH,), generator=generator)
        yield torch.tensor([tokenizer.encode(rows[i]) for i in chosen])


def published(model: torch.nn.Module) -> Words:
    """[parameters] the bit patterns of all parameters in bfloat16."""
    flat = torch.cat([parameter.detach().bfloat16().flatten() for parameter in model.parameters()])
    return flat.view(torch.int16).numpy().view(np.uint16)


def train(directory: Path, dtype: torch.dtype, learning_rate: float, steps: int) -> Iterator[Words]:
    """The published parameters after each step."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    data = batches(AutoTokenizer.from_pretrained(directory), seed=0)
    for _ in range(steps):
        ids_BT = next(data)
        labels_BT = ids_BT.clone()
        labels_BT[:, : NUM_DIGITS + 1] = -100  # the prompt is given, not learned
        model(input_ids=ids_BT, labels=labels_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield published(model)


def record(old: Words, new: Words) -> Recorded:
    ours, xor = delta_scheme("delta", primitives()), xor_zstd_scheme()
    parts = ours.encode(old, new)
    restored = old.copy()
    ours.apply(ours.decode(parts, restored), restored)
    if not np.array_equal(restored, new):
        raise AssertionError("the delta does not restore the new version")
    differences = (new - old)[old != new].view(np.int16)
    return Recorded(
        density=differences.size / old.size,
        one_unit=float(np.mean(np.abs(differences) == 1)) if differences.size else 0.0,
        delta_bytes=sum(map(len, parts)),
        xor_bytes=sum(map(len, xor.encode(old, new))),
        bound_bytes=entropy_bound_bytes(old, new),
    )


def report(kind: str, learning_rate: float, num_parameters: int, recorded: list[Recorded]) -> None:
    def median(name: str) -> float:
        return statistics.median(getattr(each, name) for each in recorded)

    changes = max(1.0, median("density") * num_parameters)
    size = median("delta_bytes")
    print(f"{kind:18} {learning_rate:8.0e} {median('density'):8.2%} {median('one_unit'):9.0%} {size / 1e3:9.1f} "
          f"{2 * num_parameters / size:7.0f} {8 * size / changes:12.2f} {size / median('xor_bytes'):8.2f} "
          f"{size / (6 * changes):12.2f} {size / max(1.0, median('bound_bytes')):9.2f}", flush=True)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="of each run (default: 40)")
    parser.add_argument("--model", type=Path, help="a model directory with the demo's tokenizer (default: the demo's)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="countercurrent-bench-") as name:
        directory = arguments.model or Path(name) / "model"
        if arguments.model is None:
            build_demo_model(directory)
        print("parameters in           lr  changed  by 1 ulp  kB/version  1/full  bits/change   of XOR  "
              "of int32+bf16  of bound")  # fmt: skip
        for kind, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            for learning_rate in LEARNING_RATES:
                all_versions = list(train(directory, dtype, learning_rate, arguments.steps))[SETTLING_STEPS:]
                recorded = [record(old, new) for old, new in itertools.pairwise(all_versions)]
                report(kind, learning_rate, all_versions[0].size, recorded)
    return 0


if __name__ == "__main__":
    sys.exit(main())
