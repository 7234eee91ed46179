"""
Whether a model uses its volume: the same questions with volumes that were changed in known ways, and what that changes.

A model that answers from the question alone gives the same answers whatever the volume. A model that looks at it must fall to
the blind control where nothing is left to see, must not mind a voxel, and must see that right and left are swapped.
"""

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import datasets
import torch

from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ..answering import check_finite_answers, embed_samples, iterate_answers
from ..data.dataset import VolumeLoader, text_group_id
from ..data.preparation_record import states_directions
from ..scoring import one_vector_per_text, retrieval_hits, with_volume_of_another_case
from .predictions import build_references
from .scores import (
    CHANCE,
    TextMetric,
    answers_of_another_case,
    fields_for_json,
    has_same_words,
    score_samples,
    types_of_one_case,
)
from .statistics import bootstrap_interval
from .tables import metric_title


# Makes another volume of one of shape `(depth, height, width)`; the generator is the volume's own.
Change = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
OTHER_CASE = "other case"
# Over the answers that name a side with the true volume: whether they name other sides, or the same in another order of first
# mention. One that names none any more says nothing of where it saw them, and is counted as not changed.
SIDES_CHANGED = "answers whose sides change"
ANSWERS_CHANGED = "answers that change"
COSINE = "cosine"
SIDE = re.compile(r"\b(left|right)(?:-sided)?\b", re.IGNORECASE)


def blank(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """All voxels 0."""
    return torch.zeros_like(volume)


def shuffle(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same voxels in random order."""
    order = torch.randperm(volume.numel(), generator=generator)
    return volume.flatten()[order].reshape(volume.shape)


def mirror(volume: torch.Tensor, generator: torch.Generator, axis: int = 2) -> torch.Tensor:
    """Right and left swapped, if that is where the axis runs: see [`side_axis`]."""
    return volume.flip(axis)


def side_axis(orientation: str) -> int | None:
    """
    The axis of a volume of shape `(depth, height, width)` that runs between the patient's right and left: for `"LPS"`, the
    directions in which (width, height, depth) grow, it is 2. `None` if nothing is known of them (`"none"`).
    """
    return next((2 - place for place, letter in enumerate(orientation) if letter in "LR"), None)


def shift(volume: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Moved by one voxel along each axis; the first slices are there twice, the last ones are gone."""
    for axis in range(volume.ndim):
        places = (torch.arange(volume.shape[axis]) - 1).clamp(min=0)
        volume = volume.index_select(axis, places)
    return volume


CHANGES: dict[str, Change] = {"blank": blank, "shuffled": shuffle, "mirrored": mirror, "shifted": shift}


class ChangedVolumes:
    """
    Brings changed volumes, with another loader behind it.

    Args:
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        change (`str` or `Callable`):
            A key of `CHANGES`, or a function of a volume of shape `(depth, height, width)` and a `torch.Generator`.
        seed (`int`, *optional*, defaults to 0):
            Of the random numbers, which also depend on the path and on nothing else.
        orientation (`str`, *optional*, defaults to `"LPS"`):
            The image processor's, which says where right and left are; with `"none"`, "mirrored" flips the width.

    Raises:
        ValueError: the change is not known.
    """

    def __init__(self, volumes: VolumeLoader, change: str | Change, seed: int = 0, orientation: str = "LPS"):
        self.volumes, self.change, self.seed = volumes, find_change(change), seed
        axis = side_axis(orientation)
        if self.change is mirror and axis is not None:
            self.change = partial(mirror, axis=axis)

    def load(self, path: str) -> torch.Tensor:
        """
        The changed volume at `path`: `torch.Tensor` of shape `(depth, height, width)`.

        Raises:
            ValueError: the change gives another shape.
        """
        volume = self.volumes.load(path)
        digest = hashlib.blake2b(f"{self.seed}:{path}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)  # torch takes seeds below 2**63
        changed = self.change(volume, generator)
        if changed.shape != volume.shape:
            raise ValueError(f"The change of {path} gave the shape {tuple(changed.shape)} for {tuple(volume.shape)}.")
        return changed


def find_change(change: str | Change) -> Change:
    """
    The function of a change.

    Raises:
        ValueError: the change is not known.
    """
    if not isinstance(change, str):
        return change
    if change not in CHANGES:
        raise ValueError(f"Expected a change out of {', '.join(map(repr, CHANGES))}, or a function, got {change!r}.")
    return CHANGES[change]


@dataclass(frozen=True)
class Dependence:
    """
    What one change of the volumes does to one figure.

    Args:
        change (`str`): A key of `CHANGES`, "other case", or the name of a change of your own.
        task (`str`): One of `TASKS`, or "retrieval" for a dual encoder.
        metric (`str`): A score, "answers that change", "answers whose sides change", or "cosine" to the vector of the true
            volume.
        original (`float`, *optional*): With the true volumes; a share that changes, and the cosine, have none.
        changed (`float`): With the changed ones.
        low, high (`float`): Ends of the 95 % interval of `changed - original`, or of `changed` if there is no original; cases
            are resampled.
        count (`int`): Samples.
        expectation (`str`): What a model that uses the volume would show; empty if nothing is expected.
        holds (`bool`, *optional*): Whether it shows it.
        remark (`str`): Why, in figures.
    """

    change: str
    task: str
    metric: str
    original: float | None
    changed: float
    low: float
    high: float
    count: int
    expectation: str = ""
    holds: bool | None = None
    remark: str = ""

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; NaN becomes `None`."""
        return fields_for_json(self)


def check_image_dependence(
    model: Any,
    processor: Any,
    samples: datasets.Dataset,
    volumes: VolumeLoader,
    changes: Sequence[str] | Mapping[str, Change] = tuple(CHANGES),
    text_metrics: Mapping[str, TextMetric] | None = None,
    max_new_tokens: int = 128,
    max_text_length: int = 512,
    batch_size: int = 16,
    seed: int = 0,
    stable_share: float = 0.1,
    stable_cosine: float = 0.95,
    show_progress: bool = False,
    prepared: bool = False,
) -> list[Dependence]:
    """
    Asks again with changed volumes, and with those of another case.

    What is expected of a model that uses the volume, and when it holds:

    - "other case": every score falls; the interval of the difference lies below 0.
    - "blank", "shuffled": every score falls to that of another case, or to chance; its difference to that of another case is
      not above 0 beyond its interval, while another case's score does fall.
    - "shifted": no score falls; the interval of the difference does not lie below 0. At most `stable_share` of the answers to
      questions change; whole reports may differ in a word. The mean cosine is at least `stable_cosine`.
    - "mirrored": of the answers that name a side, more name another than not, whatever else they say. Where the image processor's
      orientation is `"none"`, or a volume was made of slices, which do not state theirs, the width is flipped, and nothing is
      expected of it that could hold.

    Of a score that is not above chance with the true volumes, beyond its interval, nothing can be said: there is nothing that it
    could fall from. Chance of texts is the score of a true answer of another case to the same type of question, see
    [`~train.evaluation.scores.answers_of_another_case`]; types that one case is asked have none and are left out of it, and it
    counts as 0 where no other types are left.

    Args:
        model ([`Med3DVLMForConditionalGeneration`], a `peft.PeftModel` of one, or [`DCFormerSiglipModel`]):
            Used in evaluation mode; its mode is restored.
        processor ([`Med3DVLMProcessor`]):
            The model's processor. Its image processor's orientation says which axis runs between right and left.
        samples (`datasets.Dataset`):
            Rows of `SAMPLE_FEATURES` of at least two cases, of any tasks; for a dual encoder, of the task "report".
        volumes ([`VolumeLoader`]):
            Loads the true volumes.
        changes (`Sequence` or `Mapping`, *optional*):
            Keys of `CHANGES`, all by default; or functions by a name, of which nothing is expected unless they are those of
            `CHANGES`. "other case" is always made.
        text_metrics (`Mapping`, *optional*):
            Of open answers and reports, by name, besides `exact`.
        max_new_tokens, max_text_length, batch_size, show_progress:
            As for [`~train.answering.answer_samples`] and [`~train.answering.embed_samples`].
        seed (`int`, *optional*, defaults to 0):
            Of the shuffling.
        stable_share, stable_cosine (`float`, *optional*, defaults to 0.1 and 0.95):
            What still counts as no change.
        prepared (`bool`, *optional*, defaults to `False`):
            Whether the volumes were prepared before, perhaps from slices: see [`~train.data.preparation_record.states_directions`].

    Returns:
        `list[Dependence]`.

    Raises:
        ValueError: a change is not known, the samples are of one case or of a task that the model does not do, or the probability
            of an answer is not finite.
    """
    found: dict[str, Change] = (
        {name: find_change(name) for name in changes} if not isinstance(changes, Mapping) else {**changes}
    )
    taken = [name for name, change in found.items() if name == OTHER_CASE or CHANGES.get(name, change) is not change]
    if taken:
        raise ValueError(f"The name {taken[0]!r} stands for another change: choose one of your own.")
    is_known = all(states_directions(image, prepared) for image in dict.fromkeys(samples["image"]))
    orientation = processor.image_processor.orientation if is_known else "none"
    loaders: dict[str, VolumeLoader] = {
        name: ChangedVolumes(volumes, change, seed, orientation) for name, change in found.items()
    }
    if isinstance(model, DCFormerSiglipModel):
        return _check_embeddings(
            model, processor, samples, volumes, loaders, max_text_length, batch_size, stable_cosine, show_progress
        )
    if not len(samples):
        raise ValueError("Expected samples to ask about, got none.")
    rows: list[Dependence] = []
    for task in dict.fromkeys(samples["task"]):
        chosen = samples.select([place for place, name in enumerate(samples["task"]) if name == task])

        def ask(version: datasets.Dataset, loader: VolumeLoader) -> list[str]:
            batches = iterate_answers(model, processor, version, loader, max_new_tokens, batch_size, show_progress)
            answers = [answer for _, said in batches for answer in said]
            ids = [reference.id for reference in build_references(version)]
            check_finite_answers({name: answer.probability for name, answer in zip(ids, answers)})
            return [answer.text for answer in answers]

        blind = ask(with_volume_of_another_case(chosen), volumes)
        answers = {OTHER_CASE: blind, **{name: ask(chosen, loader) for name, loader in loaders.items()}}
        rows += compare_answers(chosen, ask(chosen, volumes), answers, text_metrics, stable_share, orientation)
    return rows


def compare_answers(
    samples: datasets.Dataset,
    original: Sequence[str],
    changed: Mapping[str, Sequence[str]],
    text_metrics: Mapping[str, TextMetric] | None = None,
    stable_share: float = 0.1,
    orientation: str = "LPS",
) -> list[Dependence]:
    """
    What changes of the volumes did to answers.

    Args:
        samples (`datasets.Dataset`):
            Of one task.
        original (`Sequence[str]`):
            Answers with the true volumes.
        changed (`Mapping`):
            For each change the answers with the changed ones; "other case" among them.
        text_metrics, stable_share:
            As for [`check_image_dependence`].
        orientation (`str`, *optional*, defaults to `"LPS"`):
            The image processor's. With `"none"`, as of volumes made of slices, nothing can be said of mirroring.

    Returns:
        `list[Dependence]`, change by change: the shares of answers that change, then the scores.

    Raises:
        ValueError: "other case" is missing.
    """
    if OTHER_CASE not in changed:
        raise ValueError(f"Expected answers for {OTHER_CASE!r} among the changes, got {', '.join(changed)}.")
    references = build_references(samples)
    task, cases = references[0].task, [reference.case for reference in references]
    scores = score_samples(references, original, text_metrics or {})
    scores_of = {
        name: scores if answers is original else score_samples(references, answers, text_metrics or {})
        for name, answers in changed.items()
    }
    alone, guesses = types_of_one_case(references), None
    guessed = [place for place, reference in enumerate(references) if reference.question_type not in alone]
    if task not in CHANCE and guessed:
        others = answers_of_another_case(references)
        guesses = score_samples(
            [references[place] for place in guessed], [others[place] for place in guessed], text_metrics or {}
        )
    named = [sides_of(answer) for answer in original]
    with_side = [place for place, sides in enumerate(named) if sides]
    rows = []
    for name, answers in changed.items():
        differs = [float(not has_same_words(one, other)) for one, other in zip(original, answers)]
        rows.append(_share_row(name, task, ANSWERS_CHANGED, differs, cases, stable_share, orientation))
        moved = [float(bool(now := sides_of(answers[place])) and now != named[place]) for place in with_side]
        of_cases = [cases[place] for place in with_side]
        rows.append(_share_row(name, task, SIDES_CHANGED, moved, of_cases, stable_share, orientation))
        for metric, values in scores.items():
            chance = CHANCE.get(task, 0.0) if guesses is None else _mean(guesses[metric])
            of_other = scores_of[OTHER_CASE][metric]
            rows.append(_score_row(name, task, metric, values, scores_of[name][metric], of_other, cases, chance))
    return rows


def sides_of(text: str) -> list[str]:
    """The sides that a text names, "left" or "right", each once, in the order in which they are first named."""
    return list(dict.fromkeys(side.lower() for side in SIDE.findall(text)))


def _share_row(
    change: str,
    task: str,
    metric: str,
    differs: Sequence[float],
    cases: Sequence[str],
    stable_share: float,
    orientation: str,
) -> Dependence:
    share = _mean(differs)
    low, high = bootstrap_interval(differs, cases)
    expectation, holds, remark = "", None, ""
    if metric == SIDES_CHANGED and change == "mirrored":
        expectation = "most answers that name a side name another"
        holds = share > 0.5 if differs else None
        remark = f"{share:.0%} of {len(differs)} do" if differs else "no answer names a side"
        if side_axis(orientation) is None:
            holds = None
            remark += "; which axis runs between right and left is not known, the orientation is 'none' or there are stacks of slices"
    if metric == ANSWERS_CHANGED and change == "shifted" and task != "report":
        expectation = f"at most {stable_share:.0%} of the answers change"
        holds, remark = share <= stable_share, f"{share:.0%} change"
    return Dependence(change, task, metric, None, share, low, high, len(differs), expectation, holds, remark)


def _score_row(
    change: str,
    task: str,
    metric: str,
    original: Sequence[float],
    changed: Sequence[float],
    others: Sequence[float],
    cases: Sequence[str],
    chance: float = 0.0,
) -> Dependence:
    """A score, and whether it falls as it should: `others` are those with the volume of another case."""
    low, high = bootstrap_interval([new - old for new, old in zip(changed, original)], cases, are_scores=False)
    expectation: str = ""
    holds: bool | None = None
    remark = ""
    if change == "shifted":
        expectation, holds = "the score does not fall", high >= 0
    elif change in (OTHER_CASE, "blank", "shuffled"):
        losses, gains = ([new - old for new, old in zip(*pair)] for pair in ((others, original), (changed, others)))
        _, high_of_other = bootstrap_interval(losses, cases, are_scores=False)
        falls = high_of_other < 0
        gain, _ = bootstrap_interval(gains, cases, are_scores=False)
        expectation = "the score falls"
        if change != OTHER_CASE:
            expectation += " to that of another case, or to chance"
        holds = falls and (change == OTHER_CASE or gain <= 0 or _mean(changed) <= chance + 1e-6)
        if not falls:
            remark = "with another case's volume the score is not lower beyond its interval"
        elif not holds:
            remark = f"{_mean(changed):.1%} is above the {_mean(others):.1%} of another case"
    lowest, _ = bootstrap_interval(original, cases)
    if expectation and not lowest > chance:
        holds = None
        remark = f"nothing to fall from: {_mean(original):.1%} is not above chance, {chance:.1%}, beyond its interval"
    return Dependence(
        change, task, metric, _mean(original), _mean(changed), low, high, len(changed), expectation, holds, remark
    )


def _check_embeddings(
    model: DCFormerSiglipModel,
    processor: Any,
    samples: datasets.Dataset,
    volumes: VolumeLoader,
    loaders: Mapping[str, VolumeLoader],
    max_text_length: int,
    batch_size: int,
    stable_cosine: float,
    show_progress: bool,
) -> list[Dependence]:
    tasks = sorted(set(samples["task"]))
    if tasks != ["report"]:
        raise ValueError(
            f"A dual encoder is checked with samples of the task 'report', got {', '.join(tasks) or 'none'}."
        )

    def embed(loader: VolumeLoader) -> tuple[torch.Tensor, torch.Tensor]:
        return embed_samples(model, processor, samples, loader, max_text_length, batch_size, show_progress)

    images, texts = embed(volumes)
    places = {image: place for place, image in enumerate(samples["image"])}
    other = images[[places[image] for image in with_volume_of_another_case(samples)["image"]]]
    changed = {OTHER_CASE: other, **{name: embed(loader)[0] for name, loader in loaders.items()}}
    return compare_embeddings(samples, images, texts, changed, stable_cosine)


def compare_embeddings(
    samples: datasets.Dataset,
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    changed: Mapping[str, torch.Tensor],
    stable_cosine: float = 0.95,
) -> list[Dependence]:
    """
    What changes of the volumes did to their vectors.

    Args:
        samples (`datasets.Dataset`):
            Reports.
        image_embeds, text_embeds (`torch.Tensor` of shape `(num_samples, projection_dim)`):
            Unit vectors of the true volumes and of the reports.
        changed (`Mapping`):
            For each change those of the changed volumes; "other case" among them.
        stable_cosine (`float`, *optional*, defaults to 0.95):
            As for [`check_image_dependence`].

    Returns:
        `list[Dependence]`, change by change: the cosine, then the recall at 1 from volume to report and back, all samples in
        one gallery; only the own report, or volume, is a match.

    Raises:
        ValueError: "other case" is missing.
    """
    if OTHER_CASE not in changed:
        raise ValueError(f"Expected vectors for {OTHER_CASE!r} among the changes, got {', '.join(changed)}.")
    group_ids = torch.tensor([text_group_id(text) for text in samples["answer"]])
    text_embeds = one_vector_per_text(text_embeds, group_ids)
    cases = list(samples["case"])

    def hits(images: torch.Tensor) -> dict[str, list[float]]:
        pairs = {"volume to report": (images, text_embeds), "report to volume": (text_embeds, images)}
        return {
            f"recall_at_1, {direction}": retrieval_hits(*pair, group_ids, ranks=(1,))["recall_at_1"].tolist()
            for direction, pair in pairs.items()
        }

    original, others = hits(image_embeds), hits(changed[OTHER_CASE])
    rows = []
    for name, images in changed.items():
        cosines = (image_embeds * images).sum(dim=1).tolist()
        low, high = bootstrap_interval(cosines, cases, are_scores=False)
        expectation, holds = "", None
        if name == "shifted":
            expectation, holds = f"the cosine is at least {stable_cosine:g}", _mean(cosines) >= stable_cosine
        remark = f"{_mean(cosines):.3f}" if expectation else ""
        rows.append(
            Dependence(
                name, "retrieval", COSINE, None, _mean(cosines), low, high, len(cases), expectation, holds, remark
            )
        )
        found = hits(images)
        for metric, values in original.items():
            chance = 1 / len(cases)
            rows.append(_score_row(name, "retrieval", metric, values, found[metric], others[metric], cases, chance))
    return rows


def format_dependence(rows: Sequence[Dependence]) -> str:
    """
    The rows as a Markdown table, and below it each expectation with its outcome in plain words.

    Args:
        rows (`Sequence[Dependence]`):
            Of [`check_image_dependence`].

    Returns:
        `str`. Scores and shares in percent.
    """
    lines = [
        "| task | change | figure | true volume | changed | 95 % of the difference | samples |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        scale, digits = (1.0, 3) if row.metric == COSINE else (100.0, 1)
        shown = ["" if value is None else f"{scale * value:.{digits}f}" for value in (row.original, row.changed)]
        interval = (
            ""
            if row.original is None or math.isnan(row.low)
            else f"{scale * row.low:+.{digits}f} to {scale * row.high:+.{digits}f}"
        )
        if math.isnan(row.changed):
            shown[1], interval = "-", ""
        figure = metric_title(row.metric)
        lines.append(f"| {row.task} | {row.change} | {figure} | {' | '.join(shown)} | {interval} | {row.count} |")
    outcomes = {True: "holds", False: "DOES NOT HOLD", None: "cannot be said"}
    expected = [row for row in rows if row.expectation]
    lines += [""] + [
        f"- {row.task}, {row.change}, {metric_title(row.metric)}: {row.expectation}: {outcomes[row.holds]}"
        + (f" ({row.remark})." if row.remark else ".")
        for row in expected
    ]
    if any(row.metric == SIDES_CHANGED for row in rows):
        lines.append("- An answer names a side with the English word left or right; in other languages none is found.")
    counts = [sum(row.holds is outcome for row in expected) for outcome in (True, False, None)]
    lines.append(
        f"- Of {len(expected)} things that a model which uses its volume would show, {counts[0]} hold, {counts[1]} do not hold, "
        f"and {counts[2]} cannot be said."
    )
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


__all__ = [
    "ANSWERS_CHANGED",
    "CHANGES",
    "COSINE",
    "OTHER_CASE",
    "SIDES_CHANGED",
    "Change",
    "ChangedVolumes",
    "Dependence",
    "check_image_dependence",
    "compare_answers",
    "compare_embeddings",
    "find_change",
    "format_dependence",
]
