"""
Questions per second of the evaluation against a plain loop that asks one question at a time, on the same model and cases: the
ratio, and whether the answers are identical. And what `k` questions about one volume cost, as a multiple of one.

`python tests/bench_evaluation.py MODEL STUDY [--cases N]`: a published vision-language model, and a study with closed questions.
`python tests/bench_evaluation.py --paper-shapes`: an untrained DCFormer-small at 128 x 256 x 256 before a small language model.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from med3dvlm import Med3DVLMConfig, Med3DVLMForConditionalGeneration, Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.train.answering import end_token_ids, iterate_answers
from med3dvlm.train.data.dataset import ProcessedVolumes
from med3dvlm.train.data.study import first_cases, read_task
from med3dvlm.train.prompts import build_messages, format_question
from med3dvlm.train.tokenizers import build_tiny_tokenizer


MAX_NEW_TOKENS = 16
NUM_RUNS = 5


class InMemory:
    """Volumes that are processed already: what is timed is the model."""

    def __init__(self, volumes: dict[str, torch.Tensor]):
        self.volumes = volumes

    def load(self, path: str) -> torch.Tensor:
        return self.volumes[path]


def answer_one_by_one(model: Any, processor: Any, rows: list[dict[str, Any]], volumes: InMemory) -> list[str]:
    """As the documentation of any vision-language model does it: one conversation, one volume, one `generate`."""
    answers = []
    for row in rows:
        inputs = processor.apply_chat_template(
            build_messages(volumes.load(row["image"]), format_question(row)),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"intensity_mode": "none", "do_crop_foreground": False, "do_resize": False},
        )
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                repetition_penalty=1.0,  # the model's own settings may say otherwise, and the evaluation does not follow them
                no_repeat_ngram_size=0,
                eos_token_id=end_token_ids(processor.tokenizer),
                pad_token_id=processor.tokenizer.pad_token_id,
            )
        new_tokens = output[0, inputs["input_ids"].shape[1] :]
        answers.append(processor.tokenizer.decode(new_tokens, skip_special_tokens=True).strip())
    return answers


def answer_in_batches(
    model: Any, processor: Any, rows: list[dict[str, Any]], volumes: InMemory, size: int
) -> list[str]:
    """As the evaluation does it."""
    batches = iterate_answers(model, processor, rows, volumes, MAX_NEW_TOKENS, size)
    return [answer.text for _, answers in batches for answer in answers]


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Time of a call, and what it returns."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare_on_study(model_name: str, study: str, num_cases: int) -> None:
    """All closed questions of a few cases, both ways in turn."""
    model = Med3DVLMForConditionalGeneration.from_pretrained(model_name).eval()
    processor = Med3DVLMProcessor.from_pretrained(model_name)
    samples = first_cases(read_task(study, "test", "closed_vqa"), num_cases)
    rows = [samples[place] for place in range(len(samples))]
    load = ProcessedVolumes(processor.image_processor).load
    volumes = InMemory({image: load(image) for image in dict.fromkeys(row["image"] for row in rows)})
    times = []
    for _ in range(NUM_RUNS):
        slow, expected = seconds(lambda: answer_one_by_one(model, processor, rows, volumes))
        fast, answers = seconds(lambda: answer_in_batches(model, processor, rows, volumes, 40))
        times.append((slow, fast))
        same = sum(one == other for one, other in zip(expected, answers))
    slow, fast = map(statistics.median, zip(*times))
    ratios = [one / other for one, other in times]
    print(
        f"{len(rows)} questions about {len(volumes.volumes)} volumes: one by one {len(rows) / slow:.1f}/s, in batches "
        f"{len(rows) / fast:.1f}/s; ratio {statistics.median(ratios):.1f} (medians of {NUM_RUNS} alternating runs, "
        f"ratios from {min(ratios):.1f} to {max(ratios):.1f}); {same} of {len(rows)} answers identical"
    )


def compare_on_paper_shapes() -> None:
    """What 5 questions cost as a multiple of 1, with 256 image tokens."""
    torch.manual_seed(0)
    tokenizer = build_tiny_tokenizer()
    config = Med3DVLMConfig(
        text_config={
            "model_type": "qwen2",
            "vocab_size": len(tokenizer),
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    model = Med3DVLMForConditionalGeneration(config).eval()
    image_processor = Med3DVLMImageProcessor(image_size=list(config.image_size))
    processor = Med3DVLMProcessor(image_processor, tokenizer, image_seq_length=config.image_seq_length)
    volumes = InMemory({"volume": torch.rand(config.image_size)})
    questions = ["Which organ is abnormal?", "Which plane is it?", "Is there a cyst?", "Where?", "Which phase is it?"]
    rows: list[dict[str, Any]] = [{"image": "volume", "task": "open_vqa", "question": text} for text in questions]
    times = []
    for _ in range(NUM_RUNS + 1):
        one, _ = seconds(lambda: answer_in_batches(model, processor, rows[:1], volumes, 5))
        five, answers = seconds(lambda: answer_in_batches(model, processor, rows, volumes, 5))
        times.append((one, five))
    one, five = map(statistics.median, zip(*times[1:]))
    ratio = statistics.median(many / single for single, many in times[1:])
    expected = answer_one_by_one(model, processor, rows, volumes)
    same = sum(a == b for a, b in zip(expected, answers))
    print(
        f"128 x 256 x 256, 256 image tokens, language model of {sum(p.numel() for p in model.model.language_model.parameters()) / 1e6:.0f} M "
        f"parameters: 1 question {one:.2f} s, 5 questions {five:.2f} s; ratio {ratio:.2f} (medians of "
        f"{NUM_RUNS}); {same} of 5 answers identical to one by one"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="published vision-language model")
    parser.add_argument("study", nargs="?", help="folder in the layout of M3D")
    parser.add_argument("--cases", type=int, default=20, help="cases of the test split (default 20)")
    parser.add_argument("--paper-shapes", action="store_true", help="the cost of 5 questions at the paper's size")
    options = parser.parse_args()
    if options.paper_shapes:
        compare_on_paper_shapes()
    if options.model and options.study:
        compare_on_study(options.model, options.study, options.cases)
    elif not options.paper_shapes:
        parser.error("expected a model and a study, or --paper-shapes")


if __name__ == "__main__":
    main()
