"""What a reader of scores must know: of what they are, what was left out, and what they are worth."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..data.dataset import text_group_id
from ..naming import name_a_few
from ..run_files import SKIPPED
from .asked import Asked
from .clinical import clinical_notes
from .predictions import Reference
from .retrieval import GALLERY_SIZES
from .scores import CHANCE, TextMetric, is_read
from .settings import EvaluationSettings, MetricOptions
from .text_metrics import encoder_note, language_note


# What keeps an answer from being read, by task.
UNREAD = {
    "closed_vqa": "begin with no letter of a choice",
    "yes_no_vqa": "are neither yes nor no alone",
}
# Share of the most frequent answer to yes/no questions from which on a reader is to be told, and of how many questions at
# least: of a few, it is as high by chance.
MOST_FREQUENT, FEWEST_QUESTIONS = 0.6, 20


def collect_notes(
    settings: EvaluationSettings,
    asked: Asked,
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    details: Mapping[str, Mapping[str, Any]],
    text_metrics: Mapping[str, TextMetric],
    metrics: MetricOptions,
    clinical: Mapping[str, Any],
) -> list[str]:
    """
    All notes on the scores of answers.

    Args:
        settings, asked:
            What was asked.
        answers (`Mapping`):
            By mode, "given" and perhaps "blind", those to each of the references.
        details (`Mapping`):
            Of each task, as `scores.json` has them.
        text_metrics, metrics, clinical:
            The metrics of texts, with what was asked for, and the clinical ones among them.
    """
    return [
        *notes_on(settings, asked.is_part, asked.references, answers),
        *notes_on_unread(asked.references, answers),
        *notes_on_balance(details),
        *notes_on_left_out(asked),
        *notes_on_encoder(text_metrics, metrics),
        *notes_on_language(asked.references, text_metrics, metrics),
        *clinical_notes(clinical),
    ]


def notes_on(
    settings: EvaluationSettings,
    is_part: bool,
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    are_all_scored: bool = True,
) -> list[str]:
    """
    What a reader of the scores must know: fewer cases than the split has, of which perhaps not all are scored, and empty answers.
    """
    notes = []
    if is_part:
        of_each = " of each task" if len(settings.tasks) > 1 else ""
        notes.append(
            f"Only the first {settings.num_cases} cases{of_each} of the split {settings.split!r} were "
            f"{'scored' if are_all_scored else 'taken'}."
        )
    for mode, rows in answers.items():
        empty = [reference.id for reference, row in zip(references, rows) if not row["prediction"].strip()]
        if empty:
            notes.append(
                f"{len(empty)} of {len(references)} answers ({mode}) are empty and score 0: {name_a_few(empty, 3)}."
            )
    return notes


def notes_on_unread(references: Sequence[Reference], answers: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """What a reader of accuracies must know: answers that say something, but not in a form that can be right."""
    notes = []
    for task, fault in UNREAD.items():
        places = [place for place, reference in enumerate(references) if reference.task == task]
        for mode, rows in answers.items():
            said = {references[place].id: (references[place], rows[place]["prediction"]) for place in places}
            unread = [name for name, (entry, text) in said.items() if text.strip() and not is_read(entry, text)]
            if unread:
                notes.append(
                    f"{len(unread)} of {len(said)} answers ({mode}) {fault}, and count as wrong: {name_a_few(unread, 3)}."
                )
    return notes


def notes_on_balance(details: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a reader of the accuracy of yes/no questions must know where one true answer is much more frequent than the other."""
    groups = details.get("yes_no_vqa", {}).get("most_frequent_answers", {})
    found = [
        f"{group}: {entry['share']:.1%} of the true answers are {entry['answer']}"
        for group, entry in groups.items()
        if entry["share"] > MOST_FREQUENT and entry["count"] >= FEWEST_QUESTIONS
    ]
    chance = f"; always saying so scores that, more than the {CHANCE['yes_no_vqa']:.0%} of chance."
    return [f"Yes/no questions, {', '.join(found)}{chance}"] if found else []


def notes_on_left_out(asked: Asked) -> list[str]:
    """What a reader of the scores must know where samples lack a text, or volumes cannot be read, and were left out."""
    notes = []
    if asked.empty:
        notes.append(
            f"{len(asked.empty):,} of {asked.num_all:,} samples lack a text and were left out; {SKIPPED} lists them."
        )
    return notes if asked.skipped_note is None else [*notes, asked.skipped_note]


def notes_on_pairs(num_found: int, asked: Asked) -> list[str]:
    """What a reader of retrieval must know of the pairs: those that are scored are the first of `num_found`."""
    num_used = len(asked.references)
    notes, sizes = [], ", ".join(map(str, GALLERY_SIZES))
    if num_used < num_found:
        notes.append(f"Only the first {num_used:,} of {num_found:,} pairs were scored: galleries have {sizes} pairs.")
    missing = [size for size in GALLERY_SIZES if size > num_found]
    if missing:
        notes.append(f"No gallery of {', '.join(map(str, missing))}: there are only {num_found} pairs.")
    num_reports = len({text_group_id(text) for text in asked.samples["answer"]})
    if num_reports < num_used:
        notes.append(f"{num_used} pairs have {num_reports} different reports.")
    return notes


def notes_on_encoder(text_metrics: Collection[str], options: MetricOptions) -> list[str]:
    """What a reader of the scores must know where BERTScore has another encoder than the original's."""
    note = encoder_note(options.bertscore_model, options.bertscore_layers) if "bertscore" in text_metrics else None
    return [] if note is None else [note]


def notes_on_language(
    references: Sequence[Reference], text_metrics: Collection[str], options: MetricOptions
) -> list[str]:
    """What a reader of the scores must know where the true texts are not in English."""
    texts = [reference.reference for reference in references if reference.task in ("report", "open_vqa")]
    # BLEU is there with any other metric of texts: BLEU-4 of the corpus.
    names = {*text_metrics, "bleu_1"} if text_metrics else ()
    note = language_note(texts, names, options.bertscore_model)
    return [] if note is None else [note]


__all__ = ["collect_notes", "notes_on", "notes_on_left_out", "notes_on_pairs"]
