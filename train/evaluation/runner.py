"""
Evaluations as folders: what was asked, what was answered, the scores, and the settings under which all of it was made.

A folder is filled by one call or by several: a call that was ended, or killed, goes on where it was. With several processes
(torchrun, accelerate) each volume is dealt to one of them, and what is asked does not depend on how many there are. Batches
do, and with them, in low precision, perhaps a word of an answer: `scores.json` records the work of each call that made
answers, see [`describe_calls`].
"""

import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers.utils import logging

from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ...modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..answering import check_finite_answers, iterate_answers
from ..checkpoints import done_by_first_process
from ..data.dataset import text_group_id
from ..data.layout import Task
from ..data.preparation_record import check_not_prepared, prepared_options
from ..files import write_json_atomically, write_json_lines
from ..run_files import SKIPPED
from ..scoring import one_vector_per_text
from .asked import Asked, check_blind_control, leave_out_broken, read_asked, take_first
from .calls import begin_call, describe_calls, end_call
from .clinical import (
    CLINICAL_METRICS,
    ReportLabels,
    as_text_metrics,
    build_clinical_metrics,
    find_labeller,
    label_reports,
    score_labels,
)
from .embeddings import embed_all, gather_embeddings, read_embeddings, read_shards, write_embeddings
from .folders import (
    EMBEDDINGS,
    JOURNAL,
    PREDICTIONS,
    SCORES,
    describe_source,
    keep_references,
    only_call_in,
    open_folder,
    versions,
)
from .journal import Journal
from .loading import (
    broken_scans_have_a_way_out,
    build_volumes,
    check_kind,
    describe_work,
    device_of_process,
    find_model,
    load_for_evaluation,
    start_processes,
)
from .notes import collect_notes, notes_on, notes_on_left_out, notes_on_pairs
from .plots import calibration_bins, expected_calibration_error
from .predictions import Reference, read_predictions
from .retrieval import GALLERY_SIZES, num_scored, score_retrieval
from .scores import (
    CALIBRATED_TASKS,
    SampleScores,
    Score,
    TextMetric,
    answers_of_another_case,
    calibration_hits,
    fields_for_json,
    most_frequent_answers,
    score_samples,
    summarise,
    types_of_one_case,
)
from .settings import TEXT_METRICS, EvaluationSettings, MetricOptions, Work
from .statistics import describe_answers
from .text_metrics import BertScore, Bleu1, Meteor, Rouge1, RougeL, check_nltk_data, corpus_bleu_4


logger = logging.get_logger(__name__)


def evaluate_answers(
    output: Path,
    settings: EvaluationSettings,
    model: str | None = None,
    predictions: Path | None = None,
    blind_predictions: Path | None = None,
    system: str | None = None,
    metrics: MetricOptions | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """
    Evaluates reports and answers to questions: those of a model, or those that a file has of any system.

    Args:
        output (`Path`):
            Folder of the evaluation, new or begun with the same settings.
        settings ([`EvaluationSettings`]):
            What is asked.
        model (`str`, *optional*):
            Published model, a folder or a repository.
        predictions, blind_predictions (`Path`, *optional*):
            Answers in place of a model, see [`read_predictions`], and those with the volume of another case.
        system (`str`, *optional*):
            Name for the tables; that of the model or the file if not given.
        metrics ([`MetricOptions`], *optional*):
            Of texts.
        work ([`Work`], *optional*):
            How it is done.

    Returns:
        `dict`: the content of `scores.json`; of other processes than the first, an empty one.

    Raises:
        BlockingIOError: another call is at work in the folder.
        FileNotFoundError: data, model, predictions, or what a metric needs, are not there.
        ValueError: not exactly one of `model` and `predictions`; the folder holds an evaluation with other settings or of other
            data; the predictions do not match the references; the blind control has one case only; the model's logits are NaN.
    """
    if (model is None) == (predictions is None):
        raise ValueError("Expected exactly one of a model and a file of predictions.")
    if model is not None and blind_predictions is not None:
        raise ValueError("Blind predictions belong to a file of predictions; a model is asked for its own.")
    metrics, work = metrics or MetricOptions(), work or Work()
    state = start_processes(work)
    # Before any work: what is missing or does not fit is to be known now.
    folder = None if model is None else find_model(model)
    if folder is not None:
        check_kind(folder, Med3DVLMForConditionalGeneration)
    text_metrics = build_text_metrics(metrics, settings.tasks, device_of_process(work), state.is_main_process)
    clinical = build_clinical_metrics([name for name in metrics.names if name in CLINICAL_METRICS])
    text_metrics |= as_text_metrics(clinical)
    check_labeller(metrics, settings)
    asked = read_asked(settings, work)
    # What is given is looked at before the folder is begun, which is then for it alone.
    answers = read_given(predictions, blind_predictions, asked.references)
    if model is not None:
        check_blind_control(settings, asked.samples)
        check_not_prepared(asked.samples[0]["image"], prepared_options(settings.prepared))
    identity = {"model": describe(model or str(predictions), folder, state)}
    if blind_predictions is not None:
        identity["blind_predictions"] = describe(str(blind_predictions), None, state)

    left_out = asked.empty if folder is None else ()
    with begin(output, settings, identity, asked.references, state, left_out) as folder_settings:
        true_labels = label_true_reports(asked.references, metrics.labeller)
        if folder is not None:
            asked = leave_out_broken(output, settings, folder, asked, work)
            answers = answer_all(output, settings, folder, asked, work, state)
        if not state.is_main_process:
            return {}
        scores, details, sample_scores = score_all(asked.references, answers, text_metrics)
        write_json_lines(merged_lines(asked.references, answers, sample_scores), output / PREDICTIONS)
        facts: dict[str, Any] = {
            **describe_evaluation(output, system, folder_settings, asked),
            "decoding": None if model is None else "greedy",
            "metrics": asdict(metrics),
            "notes": collect_notes(settings, asked, answers, details, text_metrics, metrics, clinical),
            "details": details,
        }
        result = finish(output, scores, **facts)
        if metrics.labeller is None:
            return result
        # Last: a labeller that fails costs its own figures alone.
        try_labels(output, facts, asked.references, answers, metrics.labeller, true_labels)
        return finish(output, scores, **facts)


def evaluate_retrieval(
    output: Path,
    settings: EvaluationSettings,
    model: str | None = None,
    embeddings: Path | None = None,
    system: str | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """
    Evaluates retrieval between volumes and reports, in both directions, of as many of the first pairs as the largest gallery has
    that there are pairs for.

    Args:
        output, settings, model, system, work:
            As for [`evaluate_answers`].
        embeddings (`Path`, *optional*):
            In place of a model: a safetensors file with `image_embeds` and `text_embeds` of shape `(num_samples, dim)`, in the
            order of the data; of all samples, or of the first that galleries have, as this writes it for a model.

    Returns:
        `dict`: the content of `scores.json`; of other processes than the first, an empty one.

    Raises:
        BlockingIOError: another call is at work in the folder.
        FileNotFoundError: data, model or embeddings are not there.
        ValueError: not exactly one of `model` and `embeddings`; the folder holds an evaluation with other settings or of other
            data; the embeddings are of another number than the reports or of others, or not finite; the blind control has one case only.
    """
    if (model is None) == (embeddings is None):
        raise ValueError("Expected exactly one of a model and a file of embeddings.")
    work = work or Work()
    state = start_processes(work)
    asked = read_asked(settings, work)
    folder = None if model is None else find_model(model)
    if folder is not None:
        check_kind(folder, DCFormerSiglipModel)
        check_not_prepared(asked.samples[0]["image"], prepared_options(settings.prepared))
    check_blind_control(settings, asked.samples)
    if embeddings is not None:
        num_used = num_scored(len(asked.references), GALLERY_SIZES)
        image_embeds, text_embeds = read_embeddings(embeddings, asked.references, num_used)
    identity = {"model": describe(model or str(embeddings), folder, state)}
    left_out = asked.empty if folder is None else ()
    with begin(output, settings, identity, asked.references, state, left_out) as folder_settings:
        asked = leave_out_broken(output, settings, folder, asked, work)
        num_found = len(asked.references)
        asked = take_first(asked, num_scored(num_found, GALLERY_SIZES))
        if folder is not None:
            embed_rest(output, settings, folder, asked, work, state)
        if not state.is_main_process:
            return {}
        if folder is None:
            image_embeds, text_embeds = (part[: len(asked.references)] for part in (image_embeds, text_embeds))
        else:
            image_embeds, text_embeds = gather_embeddings(output, asked.references)
            write_embeddings(output / EMBEDDINGS, asked.references, image_embeds, text_embeds)
        scores, curves = score_pairs(asked, image_embeds, text_embeds)
        notes = [
            *notes_on(settings, asked.is_part, asked.references, {}, len(asked.references) == num_found),
            *notes_on_left_out(asked),
            *notes_on_pairs(num_found, asked),
        ]
        facts = describe_evaluation(output, system, folder_settings, asked)
        return finish(output, scores, **facts, notes=notes, details={"recall_curves": curves})


def score_pairs(
    asked: Asked, image_embeds: torch.Tensor, text_embeds: torch.Tensor
) -> tuple[list[Score], dict[str, dict[str, list[float]]]]:
    """[`score_retrieval`] for embeddings of shape `(num_samples, dim)`, identical reports with one vector."""
    group_ids = torch.tensor([text_group_id(text) for text in asked.samples["answer"]])
    text_embeds = one_vector_per_text(text_embeds, group_ids)
    blind_order = None
    if asked.blind is not None:
        places = {image: place for place, image in enumerate(asked.samples["image"])}
        blind_order = [places[image] for image in asked.blind["image"]]
    cases = list(asked.samples["case"])
    return score_retrieval(image_embeds, text_embeds, group_ids, cases, blind_order, GALLERY_SIZES)


def read_given(
    predictions: Path | None, blind_predictions: Path | None, references: Sequence[Reference]
) -> dict[str, list[dict[str, Any]]]:
    """Answers that files have, by mode, "given" and "blind"; see [`read_predictions`]."""
    files = {"given": predictions, "blind": blind_predictions}
    return {
        mode: [{"prediction": text} for text in read_predictions(file, references)]
        for mode, file in files.items()
        if file is not None
    }


def check_labeller(metrics: MetricOptions, settings: EvaluationSettings) -> None:
    """
    Raises:
        ImportError: there is no such labeller.
        ValueError: a labeller is given, and no report is asked for.
    """
    if metrics.labeller is not None:
        find_labeller(metrics.labeller)
        if "report" not in settings.tasks:
            raise ValueError("A labeller is for reports: leave it out, or evaluate reports.")


def describe(source: str, snapshot: str | None, state: PartialState) -> dict[str, Any]:
    """[`describe_source`] in the first process, which alone keeps it: weights are read as a whole for it."""
    return describe_source(source, snapshot) if state.is_main_process else {}


@contextmanager
def begin(
    output: Path,
    settings: EvaluationSettings,
    identity: Mapping[str, Any],
    references: Sequence[Reference],
    state: PartialState,
    left_out: Sequence[Mapping[str, str]] = (),
) -> Iterator[dict[str, Any]]:
    """
    Opens the folder, writes what is asked and, if there is any, what is left out, and yields the settings with what identifies
    the model or the files. Until the block ends, no other call can work in the folder.
    """
    folder_settings = {**asdict(settings), **identity}
    with only_call_in(output):
        if state.is_main_process:
            open_folder(output, folder_settings)
            keep_references(output, [asdict(reference) for reference in references])
            if left_out:
                write_json_lines(left_out, output / SKIPPED)
        state.wait_for_everyone()
        yield folder_settings


def describe_evaluation(
    output: Path, system: str | None, folder_settings: Mapping[str, Any], asked: Asked
) -> dict[str, Any]:
    """What `scores.json` says of any evaluation: its settings, its samples, and the calls that made the answers."""
    return {
        "system": system or folder_settings["model"]["name"],
        "settings": folder_settings,
        **describe_calls(output),
        "num_cases": asked.num_cases,
        "num_samples": len(asked.references),
        "num_skipped": asked.num_skipped,
        "part_of_split": asked.is_part_of_split,
    }


def finish(output: Path, scores: Sequence[Score], **facts: Any) -> dict[str, Any]:
    """Writes `scores.json`, and returns its content."""
    result = {**facts, "versions": versions(), "scores": [fields_for_json(score) for score in scores]}
    write_json_atomically(result, output / SCORES)
    return result


def build_text_metrics(
    options: MetricOptions, tasks: Sequence[Task], device: str | None = None, is_first: bool = True
) -> dict[str, TextMetric]:
    """
    The metrics of `TEXT_METRICS` by name, with all they need loaded; none, where no task has texts to compare.

    Args:
        options ([`MetricOptions`]):
            Which ones.
        tasks (`Sequence[Task]`):
            What is asked.
        device (`str`, *optional*):
            Where BERTScore's encoder runs.
        is_first (`bool`, *optional*):
            Whether this is the first process, which alone scores; in others BERTScore's encoder is not loaded.

    Raises:
        FileNotFoundError: METEOR's data are not there.
        OSError: BERTScore's encoder is not there.
        ValueError: a name is not known.
    """
    if not {"report", "open_vqa"}.intersection(tasks):
        return {}
    known = (*TEXT_METRICS, *CLINICAL_METRICS)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        raise ValueError(f"Expected text metrics out of {', '.join(known)}, got {', '.join(unknown)}.")
    metrics: dict[str, TextMetric] = {}
    for name in options.names:
        if name in CLINICAL_METRICS:
            continue
        if name == "meteor":
            check_nltk_data()
        if name == "bertscore":
            bert_score = BertScore(options.bertscore_model, options.bertscore_layers, device=device)
            try:
                _ = bert_score.scorer if is_first else None
            except OSError as error:
                raise OSError(
                    f"BERTScore's encoder {options.bertscore_model or 'roberta-large'!r} cannot be loaded: name another or "
                    f"a folder (--bertscore-model), or leave it out (--metrics bleu_1,rouge_1,meteor). {error}"
                ) from error
            metrics[name] = bert_score.score_samples
        else:
            maker = {"bleu_1": Bleu1, "rouge_1": Rouge1, "rouge_l": RougeL, "meteor": Meteor}[name]
            metrics[name] = maker().score_samples
    return metrics


def answer_all(
    output: Path,
    settings: EvaluationSettings,
    model_name: str,
    asked: Asked,
    work: Work,
    state: PartialState,
) -> dict[str, list[dict[str, Any]]]:
    """
    Lets a model answer what it has not answered yet: the samples, and, if there is one, those of the blind control.

    Returns:
        By mode, "given" and perhaps "blind", what the journal has for each reference, in their order; nothing in a process that
        is not the first.

    Raises:
        ValueError: the probability of an answer is not finite, of one that an earlier call kept or of a new one; those of its batch
            are not kept.
    """
    samples = {"given": asked.samples} if asked.blind is None else {"given": asked.samples, "blind": asked.blind}
    journals = {mode: Journal(output / JOURNAL, mode) for mode in samples}
    num_done: dict[str, int] = {}
    pending: dict[str, list[dict[str, Any]]] = {}
    for mode, rows in samples.items():
        done = journals[mode].read()
        # Earlier versions kept NaN, as the confidence of an answer.
        check_finite_answers({name: row.get("probability", row.get("confidence", 1.0)) for name, row in done.items()})
        pending[mode] = [
            {**rows[place], "id": reference.id}
            for place, reference in enumerate(asked.references)
            if reference.id not in done
        ]
        num_done[mode] = len(done)
        if done and pending[mode] and state.is_main_process:
            logger.warning(f"{output}: {len(done)} of {len(asked.references)} answers ({mode}) are there already.")
    state.wait_for_everyone()  # nobody writes before all have read, or the shares would differ

    keeps_call = state.is_main_process and any(pending.values())
    if keeps_call:
        begin_call(output, describe_work(model_name, settings, work), num_done)
    mine = {mode: deal(left, state) for mode, left in pending.items()}
    # In all processes, whatever each has left: on a network file system one may not see yet what another does, and would be
    # waited for.
    parts = gather_object([answer_share(settings, model_name, mine, journals, work)])
    if keeps_call:
        num_new = {mode: sum(part[mode][0] for part in parts) for mode in samples}
        end_call(output, num_new, {mode: max(part[mode][1] for part in parts) for mode in samples})
    found = {mode: journal.read() for mode, journal in journals.items()} if state.is_main_process else {}
    return {mode: [rows[reference.id] for reference in asked.references] for mode, rows in found.items()}


def answer_share(
    settings: EvaluationSettings,
    model_name: str,
    pending: Mapping[str, list[dict[str, Any]]],
    journals: Mapping[str, Journal],
    work: Work,
) -> dict[str, tuple[int, float]]:
    """The share of this process, by mode: adds the answers to the journals; how many they are, and the seconds they took."""
    made = dict.fromkeys(pending, (0, 0.0))
    if not any(pending.values()):
        return made
    model, processor = load_for_evaluation(model_name, Med3DVLMForConditionalGeneration, settings, work)
    volumes = build_volumes(processor, settings, work)
    for mode, left in pending.items():
        start = time.perf_counter()
        answers = iterate_answers(
            model, processor, left, volumes, settings.max_new_tokens, work.batch_size, work.progress
        )
        with broken_scans_have_a_way_out(work):
            for rows_answered, said in answers:
                check_finite_answers({row["id"]: answer.probability for row, answer in zip(rows_answered, said)})
                journals[mode].append(
                    {"id": row["id"], "prediction": answer.text, "probability": answer.probability}
                    for row, answer in zip(rows_answered, said)
                )
        made[mode] = (len(left), time.perf_counter() - start)
    return made


def embed_rest(
    output: Path, settings: EvaluationSettings, model_name: str, asked: Asked, work: Work, state: PartialState
) -> None:
    """Embeds the pairs that are not embedded yet, and keeps of this call what it made, and how long the slowest process took."""
    done = set(read_shards(output / JOURNAL)[0]) if state.is_main_process else set()
    keeps_call = state.is_main_process and any(reference.id not in done for reference in asked.references)
    if keeps_call:
        begin_call(output, describe_work(model_name, settings, work), {"given": len(done)})
    parts = gather_object([embed_all(output, settings, model_name, asked.samples, asked.references, work, state)])
    if keeps_call:
        numbers, seconds = zip(*parts)
        end_call(output, {"given": sum(numbers)}, {"given": max(seconds)})


def deal(rows: Sequence[dict[str, Any]], state: PartialState) -> list[dict[str, Any]]:
    """The rows of this process: the volumes are dealt out in turn, and all questions about one come one after the other."""
    rows_of: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        rows_of.setdefault(row["image"], []).append(row)
    mine = list(rows_of.values())[state.process_index :: state.num_processes]
    return [row for group in mine for row in group]


def score_all(
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    text_metrics: Mapping[str, TextMetric],
) -> tuple[list[Score], dict[str, Any], list[dict[str, float]]]:
    """
    Scores of all tasks.

    Returns:
        The scores; details of each task (signs of template collapse); and the scores of each sample.
    """
    scores: list[Score] = []
    details: dict[str, Any] = {}
    per_sample: list[dict[str, float]] = [{} for _ in references]
    for task in dict.fromkeys(reference.task for reference in references):
        places = [place for place, reference in enumerate(references) if reference.task == task]
        asked = [references[place] for place in places]
        texts = {mode: [rows[place]["prediction"] for place in places] for mode, rows in answers.items()}
        guesses = answers_of_another_case(asked)
        results: dict[str, SampleScores] = {
            mode: score_samples(asked, said, text_metrics) for mode, said in {**texts, "chance": guesses}.items()
        }
        scores += summarise(asked, results["given"], results.get("blind"), results["chance"])
        if task in ("report", "open_vqa") and text_metrics:
            scores.append(corpus_score(asked, texts, guesses))
        for place, values in zip(places, zip(*results["given"].values())):
            per_sample[place] = dict(zip(results["given"], values))
        details[task] = {
            "answers": {mode: describe_answers(said) for mode, said in texts.items()},
            "references": describe_answers([reference.expected for reference in asked]),
        }
        rows = [answers["given"][place] for place in places]
        # None in a file of predictions, nor of answers that an earlier version made.
        probabilities = [row["probability"] for row in rows if "probability" in row]
        if task in CALIBRATED_TASKS and len(probabilities) == len(rows):
            bins = calibration_bins(probabilities, calibration_hits(asked, texts["given"]))
            details[task]["calibration"] = {
                "expected_calibration_error": expected_calibration_error(bins),
                "bins": [asdict(entry) for entry in bins],
            }
        if task == "yes_no_vqa":
            details[task]["most_frequent_answers"] = {
                group: {"answer": answer, "share": share, "count": count}
                for group, (answer, share, count) in most_frequent_answers(asked).items()
            }
        if "blind" in texts:
            same = sum(one == other for one, other in zip(texts["given"], texts["blind"]))
            details[task]["unchanged_by_another_volume"] = same / len(asked)
    return scores, details, per_sample


def corpus_score(asked: Sequence[Reference], texts: Mapping[str, Sequence[str]], guesses: Sequence[str]) -> Score:
    """BLEU-4 of the corpus; it is no mean over samples, so it has no interval."""
    expected = [reference.expected for reference in asked]
    return Score(
        task=asked[0].task,
        metric="corpus_bleu_4",
        group="all",
        value=corpus_bleu_4(texts["given"], expected),
        low=float("nan"),
        high=float("nan"),
        count=len(asked),
        blind=corpus_bleu_4(texts["blind"], expected) if "blind" in texts else None,
        chance=None if types_of_one_case(asked) else corpus_bleu_4(guesses, expected),
    )


def label_true_reports(references: Sequence[Reference], labeller: str | None) -> dict[str, ReportLabels]:
    """
    The labels of the true reports by id, none without a labeller. The first process makes them, before there is any answer: a
    labeller that fails is to be known then.
    """
    if labeller is None:
        return {}
    reports = [reference for reference in references if reference.task == "report"]
    labels = done_by_first_process(lambda: label_reports([reference.reference for reference in reports], labeller))
    return {reference.id: label for reference, label in zip(reports, labels)}


def try_labels(
    output: Path,
    facts: Mapping[str, Any],
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    labeller: str,
    true_labels: Mapping[str, ReportLabels],
) -> None:
    """[`add_labels`] to the details of `facts`, or, where the labeller fails, a note that there are none."""
    try:
        add_labels(facts["details"], references, answers, labeller, true_labels)
    except Exception as error:  # a labeller may raise anything, with the text of a report as message
        name, places = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
        facts["notes"].append(f"Labels of reports failed ({name}), and there are none; the log has the place.")
        logger.warning(f"{output}: the labeller failed with {name}, and there is no F1 of labels.\n{places}")


def add_labels(
    details: dict[str, Any],
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    labeller: str,
    true_labels: Mapping[str, ReportLabels],
) -> None:
    """F1 of the labels that a labeller gives to predicted and true reports, in the details of the reports."""
    places = [place for place, reference in enumerate(references) if reference.task == "report"]
    labels = {}
    for mode, rows in answers.items():
        predicted = label_reports([rows[place]["prediction"] for place in places], labeller)
        found = score_labels(predicted, [true_labels[references[place].id] for place in places])
        labels[mode] = [score.to_dict() for score in found]
    details["report"]["labels"] = labels  # of all modes or of none


def merged_lines(
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
    sample_scores: Sequence[Mapping[str, float]],
) -> list[dict[str, Any]]:
    """A line for each sample: what was asked, expected and said, and how it scores."""
    lines = []
    for place, reference in enumerate(references):
        line = {**asdict(reference), **answers["given"][place], "id": reference.id}
        if "blind" in answers:
            line["blind_prediction"] = answers["blind"][place]["prediction"]
        lines.append({**line, "scores": dict(sample_scores[place])})
    return lines


__all__ = ["begin", "build_text_metrics", "evaluate_answers", "evaluate_retrieval"]
