"""The learner command: start coordinator and snapshot server, wait for rollout servers, train, checkpoint."""

import os
import sys
from typing import NoReturn

from common.config import parse
from common.lifecycle import configure_logging, leave, run_until_stopped
from learner.algorithms import describe_all
from learner.config import LearnerConfig
from learner.launch import launched_place, without_local_rank
from learner.rank_processes import run_follower, supervise_ranks
from learner.running import learn

KNOWN_TABLES = ("learner", "rollout_server")

EXAMPLES = """\
examples:
  learner --max-staleness 2                          the demo model and task on this machine; prints how to join
  learner --config run.toml --max-staleness 0        synchronous PPO
  learner --config run.toml --listen tcp://0.0.0.0:5557   rollout servers on other nodes join with a key file
  learner --advantage rloo --kl-coefficient 0.05 --kl-in reward    held near the model it starts from
  learner --correction icepop:high=2 --correction veto    masks in place of bounded importance weights
  learner --ranks 8 --zero-stage 2 --dtype bfloat16  8 processes on this machine; started anew when one dies
  learner --evaluate-every-steps 20 --evaluation-samples 4    mean reward and pass@4 on held-out prompts
  torchrun --nproc-per-node 8 -m learner --config run.toml    the same by another launcher; or deepspeed, or srun
  learner --model Qwen/Qwen3-0.6B --data prompts.jsonl --environment python:my_rewards:score

A run directory that holds a checkpoint is resumed from it.
"""


def main(argv: list[str] | None = None) -> NoReturn:
    words = without_local_rank(sys.argv[1:] if argv is None else argv)
    config = parse_learner(words)
    place = launched_place(os.environ)
    if place is not None and place.rank > 0:
        configure_logging(f"learner {place.rank}")
        leave(run_follower(config, place))
    configure_logging("learner")
    if place is None and config.ranks > 1:
        leave(run_until_stopped(lambda: supervise_ranks(words, config)))
    leave(run_until_stopped(lambda: learn(config)))


def parse_learner(argv: list[str]) -> LearnerConfig:
    epilog = f"{describe_all()}\n\n{EXAMPLES}"
    return parse(LearnerConfig, argv, program="learner", table="learner", known_tables=KNOWN_TABLES, epilog=epilog)


if __name__ == "__main__":
    main()
