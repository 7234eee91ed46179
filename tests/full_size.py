"""The paper's model at its full size with random bfloat16 weights, written to a folder that `med3dvlm ask` can load.

    python tests/full_size.py FOLDER
    med3dvlm ask SCAN "What does this scan show?" --model FOLDER --max-new-tokens 8

Needs 16 GB of memory and as much on disk; the weights exist once in memory.
"""

import resource
import sys
import time

import torch

from med3dvlm import Med3DVLMConfig, Med3DVLMForConditionalGeneration, Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.train.tokenizers import build_tiny_tokenizer


def main(folder: str) -> None:
    tokenizer = build_tiny_tokenizer()  # the paper's has 151,665 tokens; the model's vocabulary holds either
    config = Med3DVLMConfig(image_token_id=tokenizer.convert_tokens_to_ids("<image>"))
    start = time.perf_counter()
    model = Med3DVLMForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    print(f"built {model.num_parameters():,} parameters in {time.perf_counter() - start:.0f} s")
    model.generation_config.suppress_tokens = list(range(len(tokenizer), config.text_config.vocab_size))
    start = time.perf_counter()
    model.save_pretrained(folder)
    image_processor = Med3DVLMImageProcessor(image_size=list(config.image_size))
    Med3DVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length).save_pretrained(folder)
    print(f"saved in {time.perf_counter() - start:.0f} s")
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


if __name__ == "__main__":
    main(sys.argv[1])
