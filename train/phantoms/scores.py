"""Scores on the held-out phantoms of a study, each beside chance and beside the blind control."""

from pathlib import Path
from typing import Any

import datasets
import torch

from ...processing.processing_med3dvlm import Med3DVLMProcessor
from ..answering import answer_samples, embed_samples
from ..data.dataset import VolumeLoader, text_group_id
from ..data.m3d import read_m3d_cap, read_m3d_vqa
from ..data.samples import CHOICE_LETTERS, QUESTION_TYPES
from ..evaluation.scores import exact_matches, has_same_words
from ..prompts import format_answer
from ..scoring import chance_recall, closed_accuracy, retrieval_recall, with_volume_of_another_case


GALLERY_SIZE = 100
# A row of the table: what is scored, the score, the same with another case's volume, and chance; shares in [0, 1].
Row = dict[str, Any]


def score_retrieval(
    model: Any, processor: Med3DVLMProcessor, study: Path, volumes: VolumeLoader, gallery_size: int = GALLERY_SIZE
) -> list[Row]:
    """
    R@1 of a dual encoder in galleries of 100 held-out phantoms, both ways; the mean over all whole galleries.

    Args:
        model ([`DCFormerSiglipModel`]), processor ([`Med3DVLMProcessor`]):
            What is scored.
        study (`Path`):
            Folder of the study.
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        gallery_size (`int`, *optional*, defaults to 100):
            Pairs in a gallery; fewer if the test has fewer.

    Returns:
        `list` of rows. "identical" counts an identical report as a match, "plain" only the phantom's own.
    """
    samples = read_m3d_cap(study, "test")
    assert isinstance(samples, datasets.Dataset)
    size = min(gallery_size, len(samples))
    image_embeds, text_embeds = embed_samples(model, processor, samples, volumes)
    group_ids = torch.tensor([text_group_id(text) for text in samples["answer"]])
    # The blind control: each phantom is represented by the volume of another one.
    places = {image: place for place, image in enumerate(samples["image"])}
    other = image_embeds[[places[image] for image in with_volume_of_another_case(samples)["image"]]]
    rows = []
    for direction in ("volume to report", "report to volume"):
        for name, key in {"identical": "recall_at_1", "plain": "plain_recall_at_1"}.items():

            def score(images: torch.Tensor, direction: str = direction, key: str = key) -> float:
                pair = (images, text_embeds) if direction == "volume to report" else (text_embeds, images)
                return retrieval_recall(*pair, group_ids, gallery_size=size)[key]

            ids = group_ids if name == "identical" else torch.arange(len(group_ids))
            rows.append(
                {
                    "score": f"R@1 of {size}, {direction}, {name}",
                    "value": score(image_embeds),
                    "blind": score(other),
                    "chance": chance_recall(ids, size),
                }
            )
    return rows


def score_answers(
    model: Any, processor: Med3DVLMProcessor, study: Path, volumes: VolumeLoader, num_cases: int | None = None
) -> tuple[list[Row], list[dict[str, Any]]]:
    """
    Scores of a vision-language model on the questions and reports of the held-out phantoms, decoded greedily.

    Args:
        model ([`Med3DVLMForConditionalGeneration`]), processor ([`Med3DVLMProcessor`]):
            What is scored.
        study (`Path`):
            Folder of the study.
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        num_cases (`int`, *optional*):
            Only the first so many cases of the test.

    Returns:
        The rows, and every answer: `case`, `task`, `question_type`, `question`, `expected`, `answer`, `blind_answer`.
    """
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for task, chance in {
        "closed_vqa": 1 / len(CHOICE_LETTERS),
        "yes_no_vqa": 0.5,
        "open_vqa": None,
        "report": None,
    }.items():
        samples = read_m3d_cap(study, "test") if task == "report" else read_m3d_vqa(study, "test", [task])  # type: ignore[list-item]
        assert isinstance(samples, datasets.Dataset)
        samples = first_cases(samples, num_cases)
        answers, blind = (
            answer_samples(model, processor, version, volumes, max_new_tokens=96, batch_size=40)
            for version in (samples, with_volume_of_another_case(samples))
        )
        for sample, answer, blind_answer in zip(samples, answers, blind):
            records.append(
                {
                    **{name: sample[name] for name in ("case", "task", "question_type", "question")},
                    "expected": format_answer(sample),
                    "answer": answer,
                    "blind_answer": blind_answer,
                }
            )
        if task == "report":
            rows += report_rows(samples, answers, blind)
            continue
        scores, blind_scores = (accuracy_by_type(samples, given) for given in (answers, blind))
        for name, value in scores.items():
            title = f"{task.removesuffix('_vqa').replace('_', '/')} VQA, {name}"
            rows.append({"score": title, "value": value, "blind": blind_scores[name], "chance": chance})
    return rows, records


def first_cases(samples: datasets.Dataset, number: int | None) -> datasets.Dataset:
    """The samples of the first `number` cases; all without a number."""
    if number is None:
        return samples
    cases = set(list(dict.fromkeys(samples["case"]))[:number])
    return samples.select([row for row, case in enumerate(samples["case"]) if case in cases])


def accuracy_by_type(samples: datasets.Dataset, answers: list[str]) -> dict[str, float]:
    """
    Accuracy by type of question and its mean. A closed answer is right when it begins with the right letter, any other when
    it has the words of the expected one, whatever the case of letters and the full stop.
    """
    if samples[0]["task"] == "closed_vqa":
        return closed_accuracy(samples, answers)
    hits: dict[str, list[bool]] = {}
    for sample, answer in zip(samples, answers, strict=True):
        name = QUESTION_TYPES[sample["question_type"]]
        hits.setdefault(name, []).append(has_same_words(answer, sample["answer"]))
    scores = {name: sum(values) / len(values) for name, values in sorted(hits.items())}
    return {**scores, "mean": sum(scores.values()) / len(scores)}


def report_rows(samples: datasets.Dataset, answers: list[str], blind: list[str]) -> list[Row]:
    """
    BLEU-1 and ROUGE-1 of the reports, and the share that is right in every word. Chance is the true report of another case.
    """
    from ..evaluation.text_metrics import Bleu1, Rouge1  # here, because the extra `eval` is not needed for the rest

    references = list(samples["answer"])
    half = len(references) // 2
    others = references[half:] + references[:half]
    rows = []
    metrics = {
        "BLEU-1": Bleu1().score_samples,
        "ROUGE-1": Rouge1().score_samples,
        "every word right": exact_matches,
    }
    for name, metric in metrics.items():
        value, blind_value, chance = (
            sum(metric(texts, references)) / len(references) for texts in (answers, blind, others)
        )
        rows.append({"score": f"report, {name}", "value": value, "blind": blind_value, "chance": chance})
    return rows


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, in percent."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100 * value:.1f}"

    lines = ["| score in % | model | blind | chance |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['score']} | {percent(row['value'])} | {percent(row['blind'])} | {percent(row['chance'])} |"
        for row in rows
    ]
    return "\n".join(lines)


__all__ = [
    "accuracy_by_type",
    "first_cases",
    "format_table",
    "report_rows",
    "score_answers",
    "score_retrieval",
]
