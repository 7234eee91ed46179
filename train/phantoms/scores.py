"""Scores on the held-out phantoms of a study, each beside chance and beside the blind control."""

from pathlib import Path
from typing import Any

import torch

from ...processing.processing_med3dvlm import Med3DVLMProcessor
from ..answering import answer_samples, embed_samples, embed_texts
from ..data.dataset import VolumeLoader, text_group_id
from ..data.samples import Task
from ..data.study import first_cases, read_task
from ..evaluation.predictions import build_references
from ..evaluation.scores import (
    ALL_SAMPLES,
    MEAN_OF_TYPES,
    Score,
    answers_of_another_case,
    score_samples,
    summarise,
)
from ..evaluation.tables import metric_title, percent
from ..scoring import chance_recall, one_vector_per_text, retrieval_recall, with_volume_of_another_case


GALLERY_SIZE = 100
# The metrics of each task that the table has.
REPORTED: dict[Task, tuple[str, ...]] = {
    "closed_vqa": ("accuracy",),
    "yes_no_vqa": ("accuracy",),
    "open_vqa": ("exact",),
    "report": ("bleu_1", "rouge_1", "exact"),
}
# What is exchanged in a report, to see whether a dual encoder knows which of the two a volume shows.
EXCHANGED = {
    "upper or lower part": ("upper part", "lower part"),
    "small or large": ("Small", "Large"),
    "left or right": ("left", "right"),
    "cyst or fat": ("cyst", "fat-containing lesion"),
}
# A row of the table: what is scored, the score, the same with another case's volume, and chance; shares in [0, 1].
Row = dict[str, Any]


def score_retrieval(
    model: Any, processor: Med3DVLMProcessor, study: Path, volumes: VolumeLoader, gallery_size: int = GALLERY_SIZE
) -> list[Row]:
    """
    R@1 of a dual encoder in galleries of 100 held-out phantoms, both ways, the mean over all whole galleries; and how often it
    prefers a phantom's report to one that is wrong in one thing.

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
        `list` of rows. Only the phantom's own report is a match, and in "deduplicated" rows any that is identical. "The right
        one of two reports" compares the report with the same where two words are exchanged.
    """
    samples = read_task(study, "test", "report")
    size = min(gallery_size, len(samples))
    image_embeds, text_embeds = embed_samples(model, processor, samples, volumes)
    group_ids = torch.tensor([text_group_id(text) for text in samples["answer"]])
    text_embeds = one_vector_per_text(text_embeds, group_ids)
    # The blind control: each phantom is represented by the volume of another one.
    places = {image: place for place, image in enumerate(samples["image"])}
    other = image_embeds[[places[image] for image in with_volume_of_another_case(samples)["image"]]]
    rows = []
    for direction in ("volume to report", "report to volume"):
        for name, key in {"R@1": "recall_at_1", "deduplicated R@1": "deduplicated_recall_at_1"}.items():

            def score(images: torch.Tensor, direction: str = direction, key: str = key) -> float:
                pair = (images, text_embeds) if direction == "volume to report" else (text_embeds, images)
                return retrieval_recall(*pair, group_ids, gallery_size=size)[key]

            ids = torch.arange(len(group_ids)) if name == "R@1" else group_ids
            rows.append(
                {
                    "score": f"{name} of {size}, {direction}",
                    "value": score(image_embeds),
                    "blind": score(other),
                    "chance": chance_recall(ids, size),
                }
            )
    for name, pair in EXCHANGED.items():
        texts = (exchange(text, *pair) for text in samples["answer"])
        exchanged = {row: text for row, text in enumerate(texts) if text is not None}
        if not exchanged:
            continue
        own, other_texts = list(exchanged), embed_texts(model, processor, list(exchanged.values()))
        values = {}
        for key, images in {"value": image_embeds[own], "blind": other[own]}.items():
            differences = (images * (text_embeds[own] - other_texts)).sum(dim=1)
            values[key] = float((differences.sign() + 1).mean() / 2)  # a tie counts half
        rows.append({"score": f"the right one of two reports, {name}", **values, "chance": 0.5})
    return rows


def exchange(text: str, one: str, other: str) -> str | None:
    """The text with `one` and `other` exchanged; `None` if it has neither."""
    if one not in text and other not in text:
        return None
    return other.join(part.replace(other, one) for part in text.split(one))


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
    # The extra `eval` is not needed for the rest.
    from ..evaluation.text_metrics import Bleu1, Rouge1

    text_metrics = {"bleu_1": Bleu1().score_samples, "rouge_1": Rouge1().score_samples}
    rows: list[Row] = []
    records: list[dict[str, Any]] = []
    for task, metrics in REPORTED.items():
        samples = first_cases(read_task(study, "test", task), num_cases)
        references = build_references(samples)
        answers, blind = (
            answer_samples(model, processor, version, volumes, max_new_tokens=96, batch_size=40)
            for version in (samples, with_volume_of_another_case(samples))
        )
        records += [
            {
                "case": reference.case,
                "task": task,
                "question_type": reference.question_type,
                "question": reference.question,
                "expected": reference.expected,
                "answer": answer,
                "blind_answer": blind_answer,
            }
            for reference, answer, blind_answer in zip(references, answers, blind)
        ]
        scores = summarise(
            references,
            *(
                score_samples(references, texts, text_metrics)
                for texts in (answers, blind, answers_of_another_case(references))
            ),
        )
        rows += [
            {
                "score": title_of(score),
                "value": score.value,
                "blind": score.blind,
                "chance": score.chance,
            }
            for score in scores
            if score.metric in metrics and (task == "report") == (score.group == ALL_SAMPLES)
        ]
    return rows, records


def title_of(score: Score) -> str:
    """What a row of the table is called."""
    if score.task == "report":
        return f"report, {metric_title(score.metric)}"
    group = "mean" if score.group == MEAN_OF_TYPES else score.group
    return f"{score.task.removesuffix('_vqa').replace('_', '/')} VQA, {group}"


def format_table(rows: list[Row]) -> str:
    """The rows as a Markdown table, in percent."""

    lines = ["| score in % | model | blind | chance |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['score']} | {percent(row['value'])} | {percent(row['blind'])} | {percent(row['chance'])} |"
        for row in rows
    ]
    return "\n".join(lines)


__all__ = ["exchange", "format_table", "score_answers", "score_retrieval"]
