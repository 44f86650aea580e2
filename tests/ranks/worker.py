"""One of two ranks: reads scenarios, a line of JSON each, plays them on DeepSpeed, and says what came of them.

Both are told the same. Rank 0 answers with a line of JSON; tensors go into files.
"""

import json
import math
import os
import sys
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
from safetensors.torch import save_file

from common.lifecycle import UserError
from learner.deepspeed_engine import open_ranks, open_resumed_engine
from learner.launch import launched_place
from learner.rank_orders import LeadingEngine, follow, lead
from learner.ranks import Ranks
from learner.training import TrainSettings
from tests.builders_learner import a_batch, random_groups, weights_of, with_nan
from tests.ranks.rank_settings import SHARED

STEP_TIMEOUT_S = 60.0


class Scenario(msgspec.Struct, frozen=True, kw_only=True):
    """What both ranks do: open an engine, perhaps at a checkpoint, train, and write down what it has become."""

    settings: TrainSettings
    weights: str  # file
    resume: str = ""  # directory
    save: str = ""  # directory; after save_after steps
    save_after: int = 0
    export: str = ""  # directory
    steps: int = 0
    micro_batch_tokens: int = 40
    num_groups: int = 3
    sampled_tokens: int | None = None  # of each trajectory, more than it would have
    nan: str = ""  # field of the last micro-batch, which is rank 1's
    nan_in_backward_of_rank: int | None = None


def play(scenario: Scenario, ranks: Ranks, writing: Ranks) -> dict[str, Any]:
    resume = Path(scenario.resume) if scenario.resume else None
    engine = lead(scenario.settings, resume, opener(scenario), ranks, writing)
    assert isinstance(engine, LeadingEngine)
    results, write = [], None
    for step in range(scenario.steps):
        if scenario.save and step == scenario.save_after:
            write = engine.copy_state()
        version = engine.version
        groups = random_groups(
            version,
            num_groups=scenario.num_groups,
            version=version,
            sampled_tokens=scenario.sampled_tokens,
            shared=SHARED,
        )
        batch = a_batch(groups, version=version, micro_batch_tokens=scenario.micro_batch_tokens, layout=engine.layout)
        result = engine.step(with_nan(batch, scenario.nan) if scenario.nan else batch)
        results.append({"metrics": dict(result.metrics), "refusal": result.refusal})
    if write is not None:  # only now: the steps since have changed nothing of it
        write(Path(scenario.save))
    if scenario.export:
        engine.export_huggingface(Path(scenario.export))
    save_file(weights_of(engine, scenario.settings), scenario.weights)
    engine.close()
    return {"results": results, "version": engine.version, "layout": asdict(engine.layout)}


def answer(scenario: Scenario, ranks: Ranks, writing: Ranks) -> dict[str, Any]:
    try:
        return play(scenario, ranks, writing)
    except UserError as error:
        return {"user_error": str(error)}


def opener(scenario: Scenario) -> Any:
    def open_engine(settings: TrainSettings, checkpoint: Path | None, ranks: Ranks) -> Any:
        engine = open_resumed_engine(settings, checkpoint, ranks)
        if scenario.nan_in_backward_of_rank == ranks.rank:
            layer = engine._network.model.model.layers[1].mlp.down_proj
            layer.register_full_backward_hook(
                lambda _module, inputs, _outputs: tuple(each * math.nan for each in inputs)
            )
        return engine

    return open_engine


def main() -> None:
    warnings.simplefilter("ignore")
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what DeepSpeed prints is no answer
    ranks, writing = open_ranks(launched_place(os.environ), timeout_s=STEP_TIMEOUT_S)
    for line in sys.stdin:
        scenario = msgspec.json.decode(line, type=Scenario)
        if ranks.rank == 0:
            answers.write(json.dumps(answer(scenario, ranks, writing)) + "\n")
            answers.flush()
        else:
            with suppress(UserError):  # rank 0 says it as well
                follow(opener(scenario), ranks, writing)


if __name__ == "__main__":
    main()
