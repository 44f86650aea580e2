"""How many held-out prompts a checkpoint answers right: what the demo has learned, not what it has seen."""

import json
import sys
from pathlib import Path

import torch

from learner.demo.task import evaluation_prompts

MAX_NEW_TOKENS = 8
NUM_PROMPTS = 512


def accuracy(model_directory: Path) -> float:
    """Share of NUM_PROMPTS held-out prompts that greedy decoding answers exactly."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory).eval()
    rows = list(evaluation_prompts())
    rows = rows[:: max(1, len(rows) // NUM_PROMPTS)][:NUM_PROMPTS]
    prompts_BT = torch.tensor([tokenizer.encode(row["prompt"]) for row in rows])  # all of one length
    with torch.no_grad():
        answers_BT = model.generate(
            input_ids=prompts_BT,
            attention_mask=torch.ones_like(prompts_BT),
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
        )
    texts = tokenizer.batch_decode(answers_BT[:, prompts_BT.shape[1] :], skip_special_tokens=True)
    right: list[bool] = [text == row["answer"] for text, row in zip(texts, rows, strict=True)]
    return right.count(True) / len(right)


def main() -> int:
    """`python -m deploy.quickstart.evaluation DIRECTORY`: prints {"accuracy": ..., "prompts": ...}."""
    torch.set_num_threads(1)
    print(json.dumps({"accuracy": accuracy(Path(sys.argv[1])), "prompts": NUM_PROMPTS}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
