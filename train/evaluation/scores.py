"""From answers to scores: each sample by itself, then means by type of question with intervals, chance and blind control."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..data.samples import CHOICE_LETTERS, QUESTION_TYPES
from ..prompts import MARKS, parse_choice, text_after_choice
from ..scoring import from_half_way_round
from .predictions import Reference
from .statistics import bootstrap_interval


# Of a metric: a score for each pair of a prediction and its reference, in their order.
SampleScores = dict[str, list[float]]
# Scores whole lists, as `SampleMetric.score_samples` does, because encoders take batches.
TextMetric = Callable[[Sequence[str], Sequence[str]], list[float]]

CHANCE = {"closed_vqa": 1 / len(CHOICE_LETTERS), "yes_no_vqa": 0.5}
# Whose answers are right or wrong, so that a probability can be held against it; whole reports hardly ever are, in every word.
CALIBRATED_TASKS = ("closed_vqa", "yes_no_vqa", "open_vqa")
# In a question as `format_question` writes it.
FIRST_CHOICE = re.compile(r" Choices: A\. (.*) B\. .* C\. .* D\. ", re.DOTALL)
# Names of the lines that are no type of question: the mean over types, and over samples.
MEAN_OF_TYPES, ALL_SAMPLES = "mean of types", "all"


@dataclass(frozen=True)
class Score:
    """
    One figure.

    Args:
        task (`str`): One of `TASKS`.
        metric (`str`): Such as "accuracy" or "meteor".
        group (`str`): A type of question, "mean of types" or "all".
        value (`float`): The mean over the samples of the group, in [0, 1]; of "mean of types", over the types.
        low, high (`float`): Ends of its 95 % interval, cases resampled; NaN where none is estimated.
        count (`int`): Samples it is a mean of.
        blind (`float`, *optional*): The same with the volume of another case.
        chance (`float`, *optional*): What guessing gives: among the choices, or for texts the true answer of another case.
    """

    task: str
    metric: str
    group: str
    value: float
    low: float
    high: float
    count: int
    blind: float | None = None
    chance: float | None = None


def fields_for_json(row: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON can hold them: NaN, of what is not known or not estimated, becomes `None`."""
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value for name, value in asdict(row).items()
    }


def score_samples(
    references: Sequence[Reference], predictions: Sequence[str], text_metrics: Mapping[str, TextMetric]
) -> SampleScores:
    """
    Scores of each sample of one task.

    - Closed questions: `accuracy`, by the letter of the answer, see [`chosen_letter`]; and `original_accuracy`, the rule of the
      original evaluation, for which the letter and a full stop may stand anywhere in the answer, so that one which names all
      four choices is right.
    - Yes/no questions: `accuracy`, the same words whatever the case of letters and the full stop.
    - Open questions and reports: the text metrics, and `exact`, the same words.

    Args:
        references (`Sequence[Reference]`):
            Of one task.
        predictions (`Sequence[str]`):
            In the same order.
        text_metrics (`Mapping`):
            By name.

    Returns:
        `dict` from the name of a metric to a score for each sample.

    Raises:
        ValueError: the numbers differ, there are none, or the references are of several tasks.
    """
    if len(references) != len(predictions) or not references:
        raise ValueError(
            f"Expected a prediction for each of at least one reference, got {len(predictions)} for {len(references)}."
        )
    tasks = {reference.task for reference in references}
    if len(tasks) > 1:
        raise ValueError(f"Expected references of one task, got {', '.join(sorted(tasks))}.")
    pairs = list(zip(references, predictions))
    if tasks == {"closed_vqa"}:
        return {
            "accuracy": [float(chosen_letter(entry, text) == entry.answer_choice) for entry, text in pairs],
            "original_accuracy": [float(f"{entry.answer_choice}." in text) for entry, text in pairs],
        }
    texts = [reference.reference for reference in references]
    same = exact_matches(predictions, texts)
    if tasks == {"yes_no_vqa"}:
        return {"accuracy": same}
    return {**{name: metric(predictions, texts) for name, metric in text_metrics.items()}, "exact": same}


def summarise(
    references: Sequence[Reference],
    scores: SampleScores,
    blind_scores: SampleScores | None = None,
    chance_scores: SampleScores | None = None,
) -> list[Score]:
    """
    Means over the samples of each type of question that occurs, over the types, and over all samples.

    Args:
        references (`Sequence[Reference]`):
            Of one task.
        scores (`dict`):
            Of [`score_samples`].
        blind_scores (`dict`, *optional*):
            The same, of answers that were given with the volume of another case.
        chance_scores (`dict`, *optional*):
            The same, of [`answers_of_another_case`]. Chance of an accuracy, by either rule, is one in the number of choices
            instead.

    Returns:
        `list[Score]`. The mean over types stands there only if there are types. Of texts, a group with a type of question that
        only one case is asked has no chance.
    """
    task = references[0].task
    types = [QUESTION_TYPES.get(reference.question_type, "") for reference in references]
    names = [name for name in QUESTION_TYPES.values() if name in types]
    places_of = {name: [place for place, other in enumerate(types) if other == name] for name in names}
    typed = [place for name in names for place in places_of[name]]
    groups = {**places_of, **({MEAN_OF_TYPES: typed} if typed else {}), ALL_SAMPLES: list(range(len(references)))}

    def mean(values: Sequence[float], group: str) -> float:
        if group == MEAN_OF_TYPES:
            return _mean([_mean([values[place] for place in places_of[name]]) for name in names])
        return _mean([values[place] for place in groups[group]])

    alone = types_of_one_case(references)
    lines = []
    for metric, values in scores.items():
        for group, places in groups.items():
            if task in CHANCE:
                chance = CHANCE[task]
            elif chance_scores is None or any(references[place].question_type in alone for place in places):
                chance = None
            else:
                chance = mean(chance_scores[metric], group)
            low, high = bootstrap_interval(
                [values[place] for place in places],
                [references[place].case for place in places],
                [types[place] for place in places] if group == MEAN_OF_TYPES else None,
            )
            lines.append(
                Score(
                    task=task,
                    metric=metric,
                    group=group,
                    value=mean(values, group),
                    low=low,
                    high=high,
                    count=len(places),
                    blind=None if blind_scores is None else mean(blind_scores[metric], group),
                    chance=chance,
                )
            )
    return lines


def answers_of_another_case(references: Sequence[Reference]) -> list[str]:
    """
    For each reference a true answer of another case to the same type of question, half-way round the list of cases: what a
    system says that knows the answers and has seen no volume. A case with the same volume is passed over; empty where there is no
    other, see [`types_of_one_case`].
    """
    answers = [""] * len(references)
    for places, others in _cases_to_guess_with(references):
        for number, place in enumerate(places if others else []):
            answers[place] = references[others[number % len(others)]].expected
    return answers


def _cases_to_guess_with(references: Sequence[Reference]) -> Iterator[tuple[list[int], list[int]]]:
    """
    For each type of question and each case that is asked it: the places of its references, and of those of the other case that
    [`answers_of_another_case`] takes; none if there is no case with another volume.
    """
    places_of: dict[int, dict[str, list[int]]] = {}
    for place, reference in enumerate(references):
        places_of.setdefault(reference.question_type, {}).setdefault(reference.case, []).append(place)
    for by_case in places_of.values():
        cases = [(places, {references[place].image for place in places}) for places in by_case.values()]
        for turn, (places, images) in enumerate(cases):
            others = from_half_way_round(cases, turn)
            yield places, next((other for other, shown in others if shown.isdisjoint(images)), [])


def chosen_letter(reference: Reference, text: str) -> str | None:
    """
    The letter of the choice that an answer to a closed question names: that which it begins with, see
    [`~train.prompts.parse_choice`]; or A, where its words are those of the first choice after an A, as `"A liver"` or `"A (liver)"`.
    """
    letter = parse_choice(text)
    if (
        letter is None
        and (choice := FIRST_CHOICE.search(reference.question))
        and any(has_same_words(text, said) for said in (f"A {choice[1]}", f"A ({choice[1]})"))
    ):
        return "A"
    return letter


def is_read(reference: Reference, text: str) -> bool:
    """
    Whether an answer is of a form that can be right: to a closed question, it has a [`chosen_letter`]; to a yes/no question, it
    is yes or no, and no more. Any text is, to the others.
    """
    if reference.task == "closed_vqa":
        return chosen_letter(reference, text) is not None
    if reference.task == "yes_no_vqa":
        return any(has_same_words(text, word) for word in ("yes", "no", reference.reference))
    return True


def most_frequent_answers(references: Sequence[Reference]) -> dict[str, tuple[str, float, int]]:
    """
    By type of question, and of all, the most frequent true answer in lower case, its share, which is what always giving it
    scores, and of how many questions.

    Args:
        references (`Sequence[Reference]`):
            Of yes/no questions, at least one.
    """
    counts: dict[str, Counter[str]] = {name: Counter() for name in (*QUESTION_TYPES.values(), ALL_SAMPLES)}
    for reference in references:
        for group in {QUESTION_TYPES.get(reference.question_type, ALL_SAMPLES), ALL_SAMPLES}:
            counts[group][reference.reference.lower().strip().rstrip(". ")] += 1
    frequent = {group: (*found.most_common(1)[0], found.total()) for group, found in counts.items() if found}
    return {group: (answer, number / total, total) for group, (answer, number, total) in frequent.items()}


def types_of_one_case(references: Sequence[Reference]) -> set[int]:
    """
    Types of question that only one case is asked, or a case and none with another volume, so that there is no answer of another
    case to guess with.
    """
    return {references[places[0]].question_type for places, others in _cases_to_guess_with(references) if not others}


def exact_matches(predictions: Sequence[str], references: Sequence[str]) -> list[float]:
    """1 for each prediction that [`has_same_words`] as its reference, else 0."""
    return [float(has_same_words(text, reference)) for text, reference in zip(predictions, references)]


def calibration_hits(references: Sequence[Reference], predictions: Sequence[str]) -> list[float]:
    """
    What the probability of an answer is held against, one for each: 1 if the whole answer is right, else 0. To a closed question
    it is the letter, in any form that [`chosen_letter`] reads, and the text that follows it, if there is any, though the letter
    alone is scored: the probability is that of both.

    Args:
        references (`Sequence[Reference]`):
            Of one of `CALIBRATED_TASKS`.
        predictions (`Sequence[str]`):
            In the same order.
    """
    return [float(_is_right(reference, text)) for reference, text in zip(references, predictions)]


def _is_right(reference: Reference, text: str) -> bool:
    if reference.task != "closed_vqa":
        return has_same_words(text, reference.reference)
    said = text_after_choice(text)  # of "A liver" there is none: its letter was told by its words
    is_said = not said or has_same_words(said, reference.reference.strip(MARKS))
    return is_said and chosen_letter(reference, text) == reference.answer_choice


def has_same_words(text: str, other: str) -> bool:
    """Whether two texts have the same words, whatever the case of letters, white space and the full stop at the end."""
    one, two = (entry.lower().strip().rstrip(". ").split() for entry in (text, other))
    return one == two


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


__all__ = [
    "ALL_SAMPLES",
    "CALIBRATED_TASKS",
    "MEAN_OF_TYPES",
    "SampleScores",
    "Score",
    "TextMetric",
    "answers_of_another_case",
    "calibration_hits",
    "chosen_letter",
    "exact_matches",
    "fields_for_json",
    "has_same_words",
    "is_read",
    "most_frequent_answers",
    "score_samples",
    "summarise",
    "types_of_one_case",
]
