"""The embedded default: a tiny, untrained model made on the spot, so that every command runs on a fresh machine."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer, set_seed

from ..configuration.configuration_med3dvlm import Med3DVLMConfig
from ..hub_cards.publish import publish
from ..modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor, format_preprocessing_report
from ..processing.processing_med3dvlm import Med3DVLMProcessor


UNTRAINED_NOTE = (
    "This model is untrained: its weights are random and its answers mean nothing. It exists to try the software."
)


# A real MRI of a head that comes with nibabel. Found by its path: `nibabel.testing` knows it, but needs pytest.
SCAN = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"


def build_tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 260 tokens made without any file: one for each byte, and the special ones of a conversation."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    special_tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"]
    for token in special_tokens:
        vocabulary[token] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(
        vocab=vocabulary, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>", padding_side="left"
    )
    tokenizer.add_tokens(special_tokens, special_tokens=True)
    return tokenizer


def build_tiny_model(
    image_size: tuple[int, int, int] = (32, 64, 96), seed: int = 0
) -> tuple[Med3DVLMForConditionalGeneration, Med3DVLMProcessor]:
    """
    An untrained vision-language model of the paper's design with few weights, and its processor.

    Args:
        image_size (`tuple[int, int, int]`, *optional*, defaults to `(32, 64, 96)`):
            Voxels along `(depth, height, width)`.
        seed (`int`, *optional*, defaults to 0):
            Of the random weights.

    Returns:
        The model, in evaluation mode, and the processor.
    """
    tokenizer = build_tiny_tokenizer()
    config = Med3DVLMConfig(
        vision_config={"image_size": image_size, "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 2, 1)},
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        low_level_tokens=(6, 5),
        high_level_tokens=(2, 3),
    )
    state = torch.random.get_rng_state()
    set_seed(seed)
    model = Med3DVLMForConditionalGeneration(config).eval()
    torch.random.set_rng_state(state)
    with torch.no_grad():  # at the usual scale, what random weights answer hardly depends on what they read
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    # The weights are random, and without this the answers would be broken characters.
    printable = set(map(chr, range(ord("!"), ord("~") + 1))) | {"Ġ", "<|im_end|>"}
    suppressed = [index for token, index in tokenizer.get_vocab().items() if token not in printable]
    model.generation_config.suppress_tokens = sorted(suppressed)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.max_new_tokens = 32
    processor = Med3DVLMProcessor(
        Med3DVLMImageProcessor(image_size=list(image_size)), tokenizer, image_seq_length=config.image_seq_length
    )
    return model, processor


# Runs in a process of its own, where importing our package fails as it would where it was never installed.
CLEAN_PROCESS = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "med3dvlm":
            raise ModuleNotFoundError("No module named 'med3dvlm' (blocked by the demonstration)")

sys.meta_path.insert(0, NotInstalled())
from transformers import pipeline

folder, scan, question = sys.argv[1:]
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
content = [{"type": "image", "path": scan}, {"type": "text", "text": question}]
answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False)
print(json.dumps(answer[0]["generated_text"]))
"""


def run_demo(output: Path) -> None:
    """
    Makes, publishes and asks the tiny model, and says on stdout what each thing is.

    Args:
        output (`Path`):
            Folder for the published model; what an earlier demonstration left there is replaced.

    Raises:
        RuntimeError: the published folder did not answer in the clean process.
    """
    scan, question = SCAN, "What does this scan show?"
    model, processor = build_tiny_model()
    print(f"Model: made on the spot, {model.num_parameters():,} random weights (the paper's has 7.7 billion).")
    print(f"       {UNTRAINED_NOTE}")
    folder = publish(
        model, output / "model", processor=processor, overwrite=True, license="apache-2.0", notes=UNTRAINED_NOTE
    )
    print(f"Published: {folder} ({', '.join(sorted(path.name for path in Path(folder).iterdir()))})")

    report = processor.image_processor(scan, return_report=True)["preprocessing_report"][0]
    print(f"\nScan: a real MRI of a head, {scan.name} from nibabel's test data. What is done to it before the model:")
    print("\n".join(f"    {line}" for line in format_preprocessing_report(report).splitlines()))

    print("\nAsking the published folder, in a process that cannot import this package ...")
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), str(scan), question]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"The published folder did not answer:\n{result.stderr}")
    print(f"Question: {question}")
    print(f"Answer of the untrained model (meaningless): {json.loads(result.stdout.splitlines()[-1])}")
    command_line = Path(sys.argv[0]) if Path(sys.argv[0]).name == "med3dvlm" else Path("med3dvlm")
    print(f"\nAsk it yourself: {command_line} ask {scan} {question!r} --model {folder}")


__all__ = ["UNTRAINED_NOTE", "build_tiny_model", "build_tiny_tokenizer", "run_demo"]
