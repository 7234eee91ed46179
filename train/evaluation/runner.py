"""
Evaluations as folders: what was asked, what was answered, the scores, and the settings under which all of it was made.

A folder is filled by one call or by several: a call that was ended, or killed, goes on where it was. With several processes
(torchrun, accelerate) each volume is dealt to one of them, and what is asked does not depend on how many there are. Batches
do, and with them, in low precision, perhaps a word of an answer: `scores.json` records the work, see [`describe_work`].
"""

import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from safetensors.torch import save
from transformers.utils import logging

from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ...modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ...processing.processing_med3dvlm import Med3DVLMProcessor
from ..answering import check_finite_answers, iterate_answers
from ..checkpoints import done_by_first_process
from ..data.dataset import text_group_id
from ..data.layout import vqa_file
from ..data.m3d import missing_text
from ..data.manifest import find_manifest
from ..data.preparation_record import check_not_prepared, prepared_options
from ..data.reading import find_broken
from ..data.samples import SPLITS, Task
from ..data.study import first_cases, read_task
from ..files import write_atomically, write_json_atomically, write_json_lines
from ..scoring import one_vector_per_text, with_volume_of_another_case
from ..stages import SKIPPED, folder_of
from .clinical import (
    CLINICAL_METRICS,
    ReportLabels,
    as_text_metrics,
    build_clinical_metrics,
    clinical_notes,
    find_labeller,
    label_reports,
    score_labels,
)
from .embeddings import embed_all, gather_embeddings, read_embeddings
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
from .plots import calibration_bins, expected_calibration_error
from .predictions import Reference, build_references, first_few, read_predictions
from .retrieval import GALLERY_SIZES, score_retrieval
from .scores import (
    CHANCE,
    SampleScores,
    Score,
    TextMetric,
    answers_of_another_case,
    fields_for_json,
    is_read,
    most_frequent_answers,
    score_samples,
    summarise,
    types_of_one_case,
)
from .settings import (
    EvaluationSettings,
    Work,
    broken_scans_have_a_way_out,
    build_volumes,
    check_kind,
    describe_work,
    device_of_process,
    find_model,
    load_for_evaluation,
    start_processes,
)
from .statistics import describe_answers
from .text_metrics import (
    BertScore,
    Bleu1,
    Meteor,
    Rouge1,
    RougeL,
    check_nltk_data,
    corpus_bleu_4,
    encoder_note,
    language_note,
)


logger = logging.get_logger(__name__)

# What says whether one answer is right, by task; whole reports hardly ever are, in every word.
HIT_METRICS = {"closed_vqa": "accuracy", "yes_no_vqa": "accuracy", "open_vqa": "exact"}
# What keeps an answer from being read, by task.
UNREAD = {
    "closed_vqa": "begin with no letter of a choice",
    "yes_no_vqa": "are neither yes nor no alone",
}
# Share of the most frequent answer to yes/no questions from which on a reader is to be told, and of how many questions at
# least: of a few, it is as high by chance.
MOST_FREQUENT, FEWEST_QUESTIONS = 0.6, 20
# Metrics of texts, by the names under which scores are kept. The first four are the paper's.
TEXT_METRICS = ("bleu_1", "rouge_1", "meteor", "bertscore", "rouge_l")


@dataclass(frozen=True)
class MetricOptions:
    """
    Which text metrics, and with which encoder.

    Args:
        names (`tuple[str, ...]`, *optional*): Of `TEXT_METRICS` and `CLINICAL_METRICS`.
        bertscore_model (`str`, *optional*): Encoder of BERTScore; roberta-large if not given, as in the original.
        bertscore_layers (`int`, *optional*): Its layer, for an encoder that bert_score does not know.
        labeller (`str`, *optional*): "module:function" that labels reports, for F1 of labels.
    """

    names: tuple[str, ...] = TEXT_METRICS
    bertscore_model: str | None = None
    bertscore_layers: int | None = None
    labeller: str | None = None


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
    if metrics.labeller is not None:
        find_labeller(metrics.labeller)
        if "report" not in settings.tasks:
            raise ValueError("A labeller is for reports: leave it out, or evaluate reports.")
    samples, references, is_part, empty = read_asked(settings, work)
    # What is given is looked at before the folder is begun, which is then for it alone.
    answers: dict[str, list[dict[str, Any]]] = {}
    if model is not None:
        check_blind_control(settings, samples)
        check_not_prepared(samples[0]["image"], prepared_options(settings.prepared))
    for mode, file in {"given": predictions, "blind": blind_predictions}.items():
        if file is not None:
            answers[mode] = [{"prediction": text} for text in read_predictions(file, references)]
    identity = {"model": describe(model or str(predictions), folder, state)}
    if blind_predictions is not None:
        identity["blind_predictions"] = describe(str(blind_predictions), None, state)

    with begin(output, settings, identity, references, state, empty if folder is None else ()) as folder_settings:
        true_labels = label_true_reports(references, metrics.labeller)
        skipped_note, seconds, num_new, num_all = None, 0.0, 0, len(references) + len(empty)
        if folder is not None:
            samples, references, blind, skipped_note = leave_out_broken(
                output, settings, folder, samples, references, work, empty
            )
            versions_of_samples = {"given": samples} if blind is None else {"given": samples, "blind": blind}
            start = time.perf_counter()
            answers, num_new = answer_all(output, settings, folder, versions_of_samples, references, work, state)
            seconds = time.perf_counter() - start
        if not state.is_main_process:
            return {}
        scores, details, sample_scores = score_all(references, answers, text_metrics)
        write_json_lines(merged_lines(references, answers, sample_scores), output / PREDICTIONS)
        facts: dict[str, Any] = {
            "system": system or folder_settings["model"]["name"],
            "settings": folder_settings,
            "work": None if folder is None else describe_work(folder, settings, work),
            "decoding": None if model is None else "greedy",
            "metrics": asdict(metrics),
            "num_cases": len(set(samples["case"])),
            "num_samples": len(references),
            "num_skipped": num_all - len(references),
            "part_of_split": is_part or num_all > len(references),
            "notes": [
                *notes_on(settings, is_part, references, answers),
                *notes_on_unread(references, answers),
                *notes_on_balance(details),
                *notes_on_empty(empty, num_all),
                *([] if skipped_note is None else [skipped_note]),
                *notes_on_encoder(text_metrics, metrics),
                *notes_on_language(references, text_metrics, metrics),
                *clinical_notes(clinical),
            ],
            "samples_per_second": num_new / seconds if num_new else None,
            "details": details,
        }
        result = finish(output, scores, **facts)
        if metrics.labeller is not None:  # last: a labeller that fails costs its own figures alone
            try:
                add_labels(details, references, answers, metrics.labeller, true_labels)
            except Exception as error:  # a labeller may raise anything, with the text of a report as message
                name, places = type(error).__name__, "".join(traceback.format_tb(error.__traceback__))
                facts["notes"].append(f"Labels of reports failed ({name}), and there are none; the log has the place.")
                logger.warning(f"{output}: the labeller failed with {name}, and there is no F1 of labels.\n{places}")
            result = finish(output, scores, **facts)
        return result


def evaluate_retrieval(
    output: Path,
    settings: EvaluationSettings,
    model: str | None = None,
    embeddings: Path | None = None,
    system: str | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """
    Evaluates retrieval between volumes and reports, in both directions, of as many of the first pairs as the largest gallery has.

    Args:
        output, settings, model, system, work:
            As for [`evaluate_answers`].
        embeddings (`Path`, *optional*):
            In place of a model: a safetensors file with `image_embeds` and `text_embeds` of shape `(num_samples, dim)`, in the
            order of the data.

    Returns:
        `dict`: the content of `scores.json`; of other processes than the first, an empty one.

    Raises:
        BlockingIOError: another call is at work in the folder.
        FileNotFoundError: data, model or embeddings are not there.
        ValueError: not exactly one of `model` and `embeddings`; the folder holds an evaluation with other settings or of other
            data; the embeddings are of another number than the reports, or not finite; the blind control has one case only.
    """
    if (model is None) == (embeddings is None):
        raise ValueError("Expected exactly one of a model and a file of embeddings.")
    work = work or Work()
    state = start_processes(work)
    samples, references, is_part, empty = read_asked(settings, work)
    folder = None if model is None else find_model(model)
    if folder is not None:
        check_kind(folder, DCFormerSiglipModel)
        check_not_prepared(samples[0]["image"], prepared_options(settings.prepared))
    check_blind_control(settings, samples)
    if embeddings is not None:
        image_embeds, text_embeds = read_embeddings(embeddings, len(references))
    identity = {"model": describe(model or str(embeddings), folder, state)}
    with begin(output, settings, identity, references, state, empty if folder is None else ()) as folder_settings:
        seconds, num_new, num_all = 0.0, 0, len(references) + len(empty)
        samples, references, blind, skipped_note = leave_out_broken(
            output, settings, folder, samples, references, work, empty
        )
        num_sound, largest = len(references), max(GALLERY_SIZES)
        if num_sound > largest:  # no gallery has more, so that more need not be embedded
            samples, references = samples.select(range(largest)), references[:largest]
            blind = None if blind is None else with_volume_of_another_case(samples)
        if folder is not None:
            start = time.perf_counter()
            num_new = sum(gather_object([embed_all(output, settings, folder, samples, references, work, state)]))
            seconds = time.perf_counter() - start
        if not state.is_main_process:
            return {}
        if folder is None:
            image_embeds, text_embeds = image_embeds[: len(references)], text_embeds[: len(references)]
        else:
            image_embeds, text_embeds = gather_embeddings(output, references)
            write_atomically(save({"image_embeds": image_embeds, "text_embeds": text_embeds}), output / EMBEDDINGS)
        group_ids = torch.tensor([text_group_id(text) for text in samples["answer"]])
        text_embeds = one_vector_per_text(text_embeds, group_ids)
        blind_order = None
        if blind is not None:
            places = {image: place for place, image in enumerate(samples["image"])}
            blind_order = [places[image] for image in blind["image"]]
        cases = list(samples["case"])
        scores, curves = score_retrieval(image_embeds, text_embeds, group_ids, cases, blind_order, GALLERY_SIZES)
        num_reports = len(set(group_ids.tolist()))
        notes = [*notes_on(settings, is_part, references, {}), *notes_on_empty(empty, num_all)]
        if skipped_note is not None:
            notes.append(skipped_note)
        if num_sound > largest:
            notes.append(f"Only the first {largest:,} of {num_sound:,} pairs were scored: no gallery has more.")
        missing = [size for size in GALLERY_SIZES if size > len(references)]
        if missing:
            notes.append(f"No gallery of {', '.join(map(str, missing))}: there are only {len(references)} pairs.")
        if num_reports < len(references):
            notes.append(f"{len(references)} pairs have {num_reports} different reports.")
        return finish(
            output,
            scores,
            system=system or folder_settings["model"]["name"],
            settings=folder_settings,
            work=None if folder is None else describe_work(folder, settings, work),
            num_cases=len(set(cases)),
            num_samples=len(references),
            num_skipped=num_all - num_sound,
            part_of_split=is_part or num_all > len(references),
            notes=notes,
            samples_per_second=num_new / seconds if num_new else None,
            details={"recall_curves": curves},
        )


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


def find_unreadable(
    output: Path,
    settings: EvaluationSettings,
    model: str,
    images: Sequence[str],
    work: Work,
    base: Path,
    empty: Sequence[Mapping[str, str]] = (),
) -> list[str]:
    """
    The images that cannot be read, the same ones in all processes: those in the folder's listing, which the first process makes
    by reading all of them, unless there is one. Its paths are relative to the folder `base`. What was left out as `empty` stands
    in it too. None without `work.skip_broken`.
    """
    if not work.skip_broken:
        return []

    def find() -> list[str]:
        volumes = build_volumes(Med3DVLMProcessor.from_pretrained(model), settings, work)
        return find_broken(
            volumes,
            list(dict.fromkeys(images)),
            output / SKIPPED,
            base=base,
            is_resumed=True,
            progress=work.progress,
            left_out=empty,
        )

    return done_by_first_process(find)


def leave_out_broken(
    output: Path,
    settings: EvaluationSettings,
    folder: str | None,
    samples: datasets.Dataset,
    references: Sequence[Reference],
    work: Work,
    empty: Sequence[Mapping[str, str]] = (),
) -> tuple[datasets.Dataset, list[Reference], datasets.Dataset | None, str | None]:
    """
    What is asked about volumes that can be read, if those that cannot are to be left out; without a model, about all. Samples
    that were left out as `empty` are listed beside the volumes.

    Returns:
        The samples, their references, the samples with the volume of another case each (`None` without the blind control), and a
        note if something is left out.

    Raises:
        ValueError: nothing is left of a task, or there is no sound volume of another case.
    """
    broken: list[str] = []
    if folder is not None:
        images = list(samples["image"])
        broken = find_unreadable(output, settings, folder, images, work, folder_of(settings.data), empty)
    blind = with_volume_of_another_case(samples, broken) if settings.blind else None
    note, kept = leave_out(output, samples, broken)
    blind = None if blind is None else blind.select(kept)
    return samples.select(kept), [references[row] for row in kept], blind, note


def leave_out(output: Path, samples: datasets.Dataset, broken: Collection[str]) -> tuple[str | None, list[int]]:
    """
    What is left of samples without those whose image cannot be read.

    Returns:
        What a reader of the scores must know of that, `None` where nothing is left out; and the rows that are kept.

    Raises:
        ValueError: nothing is left of a task.
    """
    images, tasks = list(samples["image"]), list(samples["task"])
    without = set(broken)
    kept = [row for row, image in enumerate(images) if image not in without]
    if len(kept) == len(images):
        return None, kept
    lost = sorted(set(tasks) - {tasks[row] for row in kept})
    if lost:
        raise ValueError(
            f"Not one volume of the task {lost[0]!r} can be read: {output / SKIPPED} lists the reasons. Mend them, and remove "
            "this listing, so that all are read anew."
        )
    cases = {case for case, image in zip(samples["case"], images) if image in without}
    note = (
        f"{len(without)} volumes ({len(cases)} cases) cannot be read and were left out; {SKIPPED} lists them: "
        f"{len(images) - len(kept):,} of {len(images):,} samples were not scored."
    )
    return note, kept


def check_blind_control(settings: EvaluationSettings, samples: datasets.Dataset) -> None:
    """
    Raises:
        ValueError: the blind control is asked for, and no case has another one.
    """
    num_cases = len(set(samples["case"]))
    if settings.blind and num_cases < 2:
        raise ValueError(
            f"The blind control needs samples of at least two cases, got {num_cases}: take more cases, or leave it out "
            "(--no-blind)."
        )


def finish(output: Path, scores: Sequence[Score], **facts: Any) -> dict[str, Any]:
    """Writes `scores.json`, and returns its content."""
    result = {**facts, "versions": versions(), "scores": [fields_for_json(score) for score in scores]}
    write_json_atomically(result, output / SCORES)
    return result


def read_asked(
    settings: EvaluationSettings, work: Work
) -> tuple[datasets.Dataset, list[Reference], bool, list[dict[str, str]]]:
    """
    What can be asked. With `work.skip_broken`, samples that lack a text are left out, the others have the ids that they have
    among all, and a volume may be missing: see [`leave_out_broken`].

    Returns:
        The samples, their references, whether they are of a part of the split only, and a row
        `{"id": ..., "case": ..., "column": ..., "reason": ...}` for each sample that is left out.

    Raises:
        FileNotFoundError: data are not there.
        ValueError: there is no task, or a task has no sample, or none with all its texts.
    """
    samples, is_part = read_samples(settings, work.skip_broken)
    references = build_references(samples)
    empty: dict[int, dict[str, str]] = {}
    for row, (sample, reference) in enumerate(zip(samples, references) if work.skip_broken else ()):
        column = missing_text(sample)
        if column is not None:
            reason = "empty text, or there is no such file" if column == "report" else "empty text"
            empty[row] = {"id": reference.id, "case": reference.case, "column": column, "reason": reason}
    if empty:
        kept = [row for row in range(len(references)) if row not in empty]
        lost = sorted({entry.task for entry in references} - {references[row].task for row in kept})
        if lost:
            raise ValueError(
                f"{settings.data}: every sample of the task {lost[0]!r} lacks a text in the split {settings.split!r}. Fill them "
                "in, or choose other tasks."
            )
        samples, references = samples.select(kept), [references[row] for row in kept]
    return samples, references, is_part, list(empty.values())


def read_samples(settings: EvaluationSettings, keep_broken: bool = False) -> tuple[datasets.Dataset, bool]:
    """
    What is asked, one task after the other, and whether that is only a part of the split: with `settings.num_cases`, the samples
    of the first cases of each task, so that ids do not depend on what else is asked. With `keep_broken`, samples that lack a
    text or whose volume is missing are among them, see [`~train.data.study.read_task`].

    Raises:
        FileNotFoundError: data are not there.
        ValueError: there is no task, or a task has no sample.
    """
    if not settings.tasks:
        raise ValueError(
            f"{settings.data}: no questions in the split {settings.split!r}. `med3dvlm evaluate report` takes its reports."
        )
    parts, is_part = [], False
    for task in settings.tasks:
        whole = read_task(settings.data, settings.split, task, keep_broken)
        part = first_cases(whole, settings.num_cases)
        is_part = is_part or len(part) < len(whole)
        if len(part) == 0:
            raise ValueError(
                f"{settings.data}: the split {settings.split!r} has no sample of the task {task!r}. Choose other tasks."
            )
        parts.append(part)
    return datasets.concatenate_datasets(parts), is_part


def questions_of(data: str, split: str, keep_broken: bool = False) -> tuple[Task, ...]:
    """
    The tasks of questions that a study has: in the layout of M3D, those that there is a file of for the split. With
    `keep_broken`, volumes may be missing and texts empty.

    Raises:
        FileNotFoundError: there is no such study.
        ValueError: the split is not known.
    """
    if split not in SPLITS:
        raise ValueError(f"--split: expected one of {', '.join(SPLITS)}, got {split!r}.")
    root = Path(data).expanduser()
    tasks: tuple[Task, ...] = ("closed_vqa", "open_vqa", "yes_no_vqa")
    if find_manifest(root) is not None:
        return tuple(task for task in tasks if len(read_task(root, split, task, keep_broken)))
    if not root.is_dir():
        raise FileNotFoundError(
            f"{root}: there is no such study. Expected a folder in the layout of M3D, or a manifest."
        )
    return tuple(task for task in tasks if (root / vqa_file(split, task)).is_file())


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
    versions_of_samples: Mapping[str, datasets.Dataset],
    references: Sequence[Reference],
    work: Work,
    state: PartialState,
) -> tuple[dict[str, list[dict[str, Any]]], int]:
    """
    Lets a model answer what it has not answered yet: of each mode, "given" and perhaps "blind", the samples of the references.

    Returns:
        By mode, what the journal has for each reference, in their order; and how many answers all processes made.

    Raises:
        ValueError: the probability of an answer is not finite, of one that an earlier call kept or of a new one; those of its batch
            are not kept.
    """
    journals = {mode: Journal(output / JOURNAL, mode) for mode in versions_of_samples}
    pending: list[tuple[str, list[dict[str, Any]]]] = []
    for mode, rows in versions_of_samples.items():
        done = journals[mode].read()
        # Earlier versions kept NaN, as the confidence of an answer.
        check_finite_answers({name: row.get("probability", row.get("confidence", 1.0)) for name, row in done.items()})
        left = [
            {**rows[place], "id": reference.id}
            for place, reference in enumerate(references)
            if reference.id not in done
        ]
        if done and left and state.is_main_process:
            logger.warning(f"{output}: {len(done)} of {len(references)} answers ({mode}) are there already.")
        pending.append((mode, deal(left, state)))
    state.wait_for_everyone()  # nobody writes before all have read, or the shares would differ

    num_new = 0
    if any(left for _, left in pending):
        model, processor = load_for_evaluation(model_name, Med3DVLMForConditionalGeneration, settings, work)
        volumes = build_volumes(processor, settings, work)
        for mode, left in pending:
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
                    num_new += len(said)
    state.wait_for_everyone()
    num_new = sum(gather_object([num_new]))
    found = {mode: journal.read() for mode, journal in journals.items()} if state.is_main_process else {}
    return {mode: [rows[reference.id] for reference in references] for mode, rows in found.items()}, num_new


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
        if task in HIT_METRICS and len(probabilities) == len(rows):
            bins = calibration_bins(probabilities, results["given"][HIT_METRICS[task]])
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


def notes_on(
    settings: EvaluationSettings,
    is_part: bool,
    references: Sequence[Reference],
    answers: Mapping[str, Sequence[Mapping[str, Any]]],
) -> list[str]:
    """What a reader of the scores must know: fewer cases than the split has, and empty answers."""
    notes = []
    if is_part:
        of_each = " of each task" if len(settings.tasks) > 1 else ""
        notes.append(
            f"Only the first {settings.num_cases} cases{of_each} of the split {settings.split!r} were scored."
        )
    for mode, rows in answers.items():
        empty = [reference.id for reference, row in zip(references, rows) if not row["prediction"].strip()]
        if empty:
            notes.append(
                f"{len(empty)} of {len(references)} answers ({mode}) are empty and score 0: {first_few(empty)}."
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
                    f"{len(unread)} of {len(said)} answers ({mode}) {fault}, and count as wrong: {first_few(unread)}."
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


def notes_on_empty(empty: Sequence[Mapping[str, str]], num_all: int) -> list[str]:
    """What a reader of the scores must know where samples that lack a text were left out."""
    if not empty:
        return []
    return [f"{len(empty):,} of {num_all:,} samples lack a text and were left out; {SKIPPED} lists them."]


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


__all__ = ["HIT_METRICS", "TEXT_METRICS", "MetricOptions", "evaluate_answers", "evaluate_retrieval", "questions_of"]
