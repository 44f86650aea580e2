"""`python -m tests.storm.learner_process FLAGS`: the learner command with the table policy in place of DeepSpeed."""

import sys
from typing import NoReturn

from common.lifecycle import configure_logging, leave, run_until_stopped
from learner.__main__ import parse_learner
from learner.running import learn
from tests.storm.table_policy import open_table_engine


def main() -> NoReturn:
    config = parse_learner(sys.argv[1:])
    configure_logging("learner")
    leave(run_until_stopped(lambda: learn(config, open_engine=open_table_engine)))


if __name__ == "__main__":
    main()
