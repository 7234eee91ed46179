"""The demonstration `med3dvlm demo`: the whole way from scans to scores on phantoms, in minutes and without a download."""

import json
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from ..modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..processing.processing_med3dvlm import Med3DVLMProcessor


RESEARCH_NOTE = "For research only: not a medical device."
# A real MRI of a head that comes with nibabel. Found by its path: `nibabel.testing` knows it, but needs pytest.
SCAN = Path(nibabel.__file__).parent / "tests" / "data" / "anatomical.nii"
NUM_DRAWN = 3  # phantoms in the picture of answers

# Runs in a process of its own, where importing our package fails as it would where it was never installed.
CLEAN_PROCESS = """
import json, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "med3dvlm":
            raise ModuleNotFoundError("No module named 'med3dvlm' (blocked by the demonstration)")

sys.meta_path.insert(0, NotInstalled())
from transformers import pipeline

folder, questions = sys.argv[1], json.loads(sys.argv[2])
pipe = pipeline("image-text-to-text", model=folder, trust_remote_code=True)
answers = []
for scan, question in questions:
    content = [{"type": "image", "path": scan}, {"type": "text", "text": question}]
    answer = pipe(text=[{"role": "user", "content": content}], return_full_text=False, max_new_tokens=96)
    answers.append(answer[0]["generated_text"])
print(json.dumps(answers))
"""

# What the demonstration replaces in the recipes to be done in minutes.
QUICK: dict[str, list[str]] = {
    stage: ["training.max_steps=-1", f"training.num_train_epochs={epochs}", "training.eval_strategy=no"]
    for stage, epochs in {"language": 0.9, "contrastive": 7, "projector": 0.6, "finetune": 0.35}.items()
}
# The plain loss of `phantom/contrastive`, with the offset that fits 32 pairs.
WITHOUT_SIMILAR_REPORTS = ["data.similar_reports=0", "model.dual_encoder.logit_bias_init_value=-3.434"]
# So short a training does not get to what similar reports teach.
QUICK["contrastive"] += WITHOUT_SIMILAR_REPORTS
# What each stage takes from earlier ones: fields of the recipe's `model`.
STARTS_FROM: dict[str, dict[str, str]] = {
    "language": {},
    "contrastive": {},
    "projector": {"start_from": "contrastive", "language_model": "language"},
    "finetune": {"start_from": "projector"},
}


def run_demo(output: Path, num_cases: int | None = None, seed: int = 0, full: bool = False) -> None:
    """
    Shows the whole way on phantoms, and says on stdout what each thing is: a study is made, a small language model and the
    three stages are trained, the result is published, loaded in a process that cannot import this package, asked about a
    held-out phantom and a real scan, and scored on the held-out phantoms. A demonstration that was interrupted is continued.

    Args:
        output (`Path`):
            Folder for all that is made.
        num_cases (`int`, *optional*):
            Phantoms; 900 by default, and with `full` the 4,600 that the recipes are made for.
        seed (`int`, *optional*, defaults to 0):
            Seed of phantoms and training.
        full (`bool`, *optional*, defaults to `False`):
            Whether to train as long as the recipes say, instead of a few minutes.

    Raises:
        RuntimeError: the published folder did not answer in the clean process.
    """
    from .files import write_atomically, write_json_lines
    from .merge import merge_adapter
    from .phantoms.study import write_study
    from .recipe import STAGES, load_recipe
    from .run_files import SUMMARY
    from .stages import run_recipe

    start = time.perf_counter()
    num_cases = num_cases or (4600 if full else 900)
    study, cache = output / "phantoms", output / "cache"

    def report(message: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {message}", flush=True)

    num_validation, num_test = (100, 400) if full else (None, min(100, num_cases // 9))
    summary = write_study(
        study, num_cases, seed, num_validation=num_validation, num_test=num_test, progress=sys.stderr.isatty()
    )
    counts = ", ".join(f"{count} {split}" for split, count in summary["num_cases"].items())
    held_out = f"--validation {summary['num_cases']['validation']} --test {summary['num_cases']['test']}"
    report(
        f"Phantoms: {counts}, in {study}. The same by hand: med3dvlm phantom {study} --cases {num_cases} {held_out} "
        f"--seed {seed}"
    )

    stages: dict[str, Path] = {}
    for stage in STAGES:
        overrides = [
            f"data.root={study}",
            f"data.cache={cache}",
            f"training.output_dir={output / stage}",
            f"training.seed={seed}",
            "training.logging_steps=10",
            *(f"model.{name}={stages[earlier]}" for name, earlier in STARTS_FROM[stage].items()),
            *([] if full else QUICK[stage]),
        ]
        stages[stage] = run_recipe(load_recipe(f"phantom/{stage}", overrides))
        numbers = json.loads((output / stage / SUMMARY).read_text(encoding="utf-8"))
        memory = numbers["peak_memory_gib"]
        report(
            f"Stage {stage}: {numbers['train']['train_runtime']:.0f} s, {numbers['samples_per_second']:.0f} samples/s, "
            f"{'' if memory is None else f'peak memory {memory:.1f} GiB, '}curves in {output / stage / 'curves.png'}"
        )
    notes = f"Trained on {num_cases} phantoms: it knows drawn scans, not patients. {RESEARCH_NOTE}"
    model_folder = Path(
        merge_adapter(stages["finetune"], output / "model", overwrite=True, license="apache-2.0", notes=notes)
    )
    report(f"Merged and published: {model_folder}")

    questions = questions_of_a_phantom(study)
    answers = ask_in_clean_process(model_folder, [*questions, (str(SCAN), "What does this scan show?", "")])
    report("Asked the published folder, in a process that cannot import this package:")
    for (scan, question, expected), answer in zip(questions, answers):
        print(f"    {Path(scan).name}: {question}\n        answer: {answer}\n        truth:  {expected}")
    print(f"    {SCAN.name}, a real MRI of a head, which no phantom resembles: {answers[-1]}")

    table, records = score_models(
        stages["contrastive"], model_folder, study, cache, num_cases=40 if not full else None
    )
    write_atomically(f"{table}\n".encode(), output / "scores.md")
    write_json_lines(records, output / "answers.jsonl")
    picture = draw_answers(study, model_folder, records, output / "answers.png")
    report(f"Scores on held-out phantoms; blind: the volume replaced by another case's. Picture: {picture}")
    print(f"\n{table}\n")
    command_line = Path(sys.argv[0]) if Path(sys.argv[0]).name == "med3dvlm" else Path("med3dvlm")
    print(f"Ask it yourself: {command_line} ask {questions[0][0]} {questions[0][1]!r} --model {model_folder}")


def questions_of_a_phantom(study: Path) -> list[tuple[str, str, str]]:
    """Scan, question and expected answer for the first held-out phantom: its closed questions, and the request for a report."""
    from .data.m3d import read_m3d_cap, read_m3d_vqa
    from .prompts import format_answer, format_question

    reports = read_m3d_cap(study, "test")
    first = reports[0]["image"]  # type: ignore[index]
    samples = [sample for sample in read_m3d_vqa(study, "test", ["closed_vqa"]) if sample["image"] == first]
    samples.append(reports[0])  # type: ignore[index]
    return [(sample["image"], format_question(sample), format_answer(sample)) for sample in samples]


def ask_in_clean_process(folder: Path, questions: list[tuple[str, str, str]]) -> list[str]:
    """
    Answers of a published folder, loaded by `pipeline` where our package cannot be imported.

    Raises:
        RuntimeError: it did not answer.
    """
    command = [sys.executable, "-c", CLEAN_PROCESS, str(folder), json.dumps([entry[:2] for entry in questions])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"The published folder did not answer:\n{result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def score_models(
    dual_encoder_folder: Path, model_folder: Path, study: Path, cache: Path, num_cases: int | None = None
) -> tuple[str, list[dict[str, Any]]]:
    """
    Scores both published models on the held-out phantoms.

    Args:
        dual_encoder_folder (`Path`), model_folder (`Path`):
            Published dual encoder and vision-language model.
        study (`Path`):
            Folder of the phantoms.
        cache (`Path`):
            Folder of the cache of processed volumes.
        num_cases (`int`, *optional*):
            Only so many cases are asked about; retrieval always takes all.

    Returns:
        The table in Markdown, and every answer.
    """
    from ..modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
    from .data.cache import VolumeCache
    from .phantoms.scores import format_table, score_answers, score_retrieval

    processor = Med3DVLMProcessor.from_pretrained(dual_encoder_folder)
    volumes = VolumeCache(cache, processor.image_processor)
    rows = score_retrieval(DCFormerSiglipModel.from_pretrained(dual_encoder_folder), processor, study, volumes)
    model = Med3DVLMForConditionalGeneration.from_pretrained(model_folder)
    processor = Med3DVLMProcessor.from_pretrained(model_folder)
    answer_rows, records = score_answers(model, processor, study, volumes, num_cases)
    return format_table(rows + answer_rows), records


def draw_answers(study: Path, model_folder: Path, records: list[dict[str, Any]], path: Path) -> Path:
    """Draws slices of a few phantoms through their lesion, as the model gets them, with its answers beside the truth."""
    from .data.samples import QUESTION_TYPES
    from .figures import new_figure, save_png

    processor = Med3DVLMImageProcessor.from_pretrained(model_folder)
    truth = [json.loads(line) for line in (study / "phantoms.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = list(dict.fromkeys(record["case"] for record in records))[:NUM_DRAWN]
    figure = new_figure(15, 3.6 * len(asked))
    axes = figure.subplots(len(asked), 4, squeeze=False)
    for row, case in enumerate(asked):
        entry = next(entry for entry in truth if entry["case"] == case)
        inputs = processor(str(study / entry["image"]), return_report=True)
        volume, affine = inputs["pixel_values"][0, 0].numpy(), np.array(inputs["preprocessing_report"][0]["affine"])
        lesion = np.linalg.solve(affine, [*entry["lesion_centre"], 1.0])[:3]
        d, h, w = (int(np.clip(round(place), 0, size - 1)) for place, size in zip(lesion, volume.shape))
        slices = {"axial": volume[d], "coronal": volume[::-1, h], "sagittal": volume[::-1, :, w]}  # superior is up
        for axis, (name, picture) in zip(axes[row], slices.items()):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1, aspect="auto")
            axis.set_title(name)
            axis.set_axis_off()
        lines = []
        for record in records:
            if record["case"] == case and record["task"] in ("closed_vqa", "report"):
                name = QUESTION_TYPES.get(record["question_type"], "report")
                mark = "right" if record["answer"] == record["expected"] else f"truth: {record['expected']}"
                lines.append(textwrap.fill(f"{name}: {record['answer']} ({mark})", 62))
        axes[row][3].text(0, 1, "\n".join(lines), va="top", fontsize=8)
        axes[row][3].set_axis_off()
    return save_png(figure, path, dpi=90)


__all__ = [
    "WITHOUT_SIMILAR_REPORTS",
    "run_demo",
    "score_models",
]
