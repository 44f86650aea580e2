"""`python -m deploy.real_model.convert GGUF DIRECTORY`: a GGUF file as a Hugging Face model in bfloat16."""

import sys
from pathlib import Path


def main(gguf: Path, directory: Path) -> None:
    """Needs the package gguf."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    place, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(place, gguf_file=name).save_pretrained(directory)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
