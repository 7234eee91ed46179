"""
Evaluations as folders whose work cannot be split between processes: zero-shot classification, and whether a model uses its
volume.

As in [`runner`][train.evaluation.runner], a folder belongs to one model, one set of data and one set of settings. What takes
minutes is made anew by a second call, not continued.
"""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ...modeling_med3dvlm.modeling_dcformer_siglip import DCFormerSiglipModel
from ...modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ..data.layout import Split, Task
from ..data.preparation_record import check_not_prepared, prepared_options
from ..data.study import read_task
from ..files import write_atomically, write_json_atomically
from ..run_files import SKIPPED
from .asked import check_blind_control, find_unreadable, leave_out_broken, read_asked
from .folders import DEPENDENCE, ZERO_SHOT, describe_source, only_call_in, open_folder, versions
from .image_dependence import check_image_dependence, format_dependence
from .loading import (
    broken_scans_have_a_way_out,
    build_volumes,
    check_kind,
    describe_work,
    find_model,
    load_for_evaluation,
    model_type_of,
    start_single_process,
)
from .notes import notes_on, notes_on_left_out
from .runner import begin, build_text_metrics
from .settings import EvaluationSettings, MetricOptions, Work
from .zero_shot import (
    PHANTOM_PROMPTS,
    Labels,
    find_rule,
    format_zero_shot,
    images_by_case,
    read_labels,
    read_prompts,
    run_zero_shot,
)


# What is asked about volumes that were changed, by default.
DUAL_ENCODER_TASKS: tuple[Task, ...] = ("report",)
GENERATION_TASKS: tuple[Task, ...] = ("report", "closed_vqa")
# Hardly a report is right in every word, so that by `exact` alone nothing could fall.
DEPENDENCE_METRICS = MetricOptions(("bleu_1", "rouge_1"))


def evaluate_zero_shot(
    output: Path,
    settings: EvaluationSettings,
    model: str,
    labels: Path,
    prompts: Path | None = None,
    validation: Path | None = None,
    rule: str | None = None,
    work: Work | None = None,
) -> dict[str, Any]:
    """
    Evaluates zero-shot classification with a dual encoder, see [`run_zero_shot`].

    Args:
        output (`Path`):
            Folder of the evaluation, new or begun with the same settings.
        settings ([`EvaluationSettings`]):
            Precision, longest prompt, and whether volumes are prepared. `data` and `split` say whose cases the labels name, if they
            name no files; `data` may be empty otherwise.
        model (`str`):
            Published dual encoder, a folder or a repository.
        labels (`Path`):
            File for [`read_labels`].
        prompts (`Path`, *optional*):
            File for [`read_prompts`]; the organs of phantoms, if not given.
        validation (`Path`, *optional*):
            Labels of other volumes, on which thresholds are chosen; of cases of the split "validation" if they name no files.
        rule (`str`, *optional*):
            One of `RULES`: how similarities become probabilities, see [`run_zero_shot`].
        work ([`Work`], *optional*):
            How it is done.

    Returns:
        `dict`: the content of `zero_shot.json`.

    Raises:
        BlockingIOError: another call is at work in the folder.
        FileNotFoundError: data, labels, prompts, model or a volume are not there.
        InvalidVolumeError: a volume cannot be read.
        ValueError: there are several processes; the folder holds an evaluation with other settings; files, rule, model and prompts
            do not fit each other; no volume can be read; volumes are prepared, and the settings say that they are not.
    """
    work = work or Work()
    start_single_process(work)
    chosen_rule = None if rule is None else find_rule(rule)
    classes = read_prompts(prompts or PHANTOM_PROMPTS)

    def read(path: Path, split: Split) -> Labels:
        def images() -> dict[str, list[str]]:
            return images_by_case(read_task(settings.data, split, "report", work.skip_broken))

        return read_labels(path, [entry.name for entry in classes], images if settings.data else None)

    labelled = read(labels, settings.split)
    held = None if validation is None else read(validation, "validation")
    folder = find_model(model)
    check_kind(folder, DCFormerSiglipModel)
    check_not_prepared(labelled.volumes[0].image, prepared_options(settings.prepared))
    folder_settings = {
        **asdict(settings),
        "model": describe_source(model, folder),
        "prompts": [asdict(entry) for entry in classes],
        "labels": describe_source(str(labels)),
        "validation": None if validation is None else describe_source(str(validation)),
        "rule": rule,
    }
    with only_call_in(output):
        open_folder(output, folder_settings)
        images = [volume.image for part in (labelled, held) if part is not None for volume in part.volumes]
        broken = set(find_unreadable(output, settings, folder, images, work, labels.parent))
        notes = []
        if broken:
            labelled = without_images(labelled, broken, labels)
            held = None if held is None or validation is None else without_images(held, broken, validation)
            notes.append(
                f"{len(broken)} of {len(images)} volumes cannot be read and were left out; {SKIPPED} lists them."
            )
        loaded, processor = load_for_evaluation(folder, DCFormerSiglipModel, settings, work)
        with broken_scans_have_a_way_out(work):
            result = run_zero_shot(
                loaded,
                processor,
                classes,
                labelled,
                build_volumes(processor, settings, work),
                held,
                chosen_rule,
                settings.max_text_length,
                work.batch_size,
                work.progress,
            )
        result = replace(result, notes=[*result.notes, *notes])
        text = f"# Zero-shot classification, {folder_settings['model']['name']}\n\n{format_zero_shot(result)}\n"
        content = {**result.to_dict(), "settings": folder_settings, "work": describe_work(folder, settings, work)}
        return write_result(output / ZERO_SHOT, text, content)


def without_images(labels: Labels, broken: set[str], path: Path) -> Labels:
    """
    Labels of the volumes that can be read.

    Raises:
        ValueError: none is left.
    """
    kept = [volume for volume in labels.volumes if volume.image not in broken]
    if not kept:
        raise ValueError(
            f"{path}: not one of its {len(labels.volumes)} volumes can be read; {SKIPPED} lists the reasons. Mend them, and remove "
            "this listing, so that all are read anew."
        )
    return replace(labels, volumes=kept)


def evaluate_dependence(
    output: Path, settings: EvaluationSettings, model: str, seed: int = 0, work: Work | None = None
) -> dict[str, Any]:
    """
    Evaluates whether a model uses its volume, see [`check_image_dependence`].

    Args:
        output (`Path`):
            Folder of the evaluation, new or begun with the same settings.
        settings ([`EvaluationSettings`]):
            What is asked. Without tasks it is reports and closed questions; for a dual encoder, which takes no other task, reports.
        model (`str`):
            Published model of either kind, a folder or a repository.
        seed (`int`, *optional*, defaults to 0):
            Of the shuffling.
        work ([`Work`], *optional*):
            How it is done.

    Returns:
        `dict`: the content of `dependence.json`.

    Raises:
        BlockingIOError: another call is at work in the folder.
        FileNotFoundError: data, model or a volume are not there.
        InvalidVolumeError: a volume cannot be read.
        ValueError: there are several processes; the folder holds an evaluation with other settings or of other data; there is one
            case only, or a task that the model does not do, or the model is of neither kind; volumes are prepared, and the settings
            say that they are not.
    """
    work = work or Work()
    state = start_single_process(work)
    folder = find_model(model)
    is_dual = model_type_of(folder) == DCFormerSiglipModel.config_class.model_type
    kind = DCFormerSiglipModel if is_dual else Med3DVLMForConditionalGeneration
    check_kind(folder, kind)
    if not settings.tasks:
        settings = replace(settings, tasks=DUAL_ENCODER_TASKS if is_dual else GENERATION_TASKS)
    asked = read_asked(settings, work)
    check_blind_control(settings, asked.samples)
    check_not_prepared(asked.samples[0]["image"], prepared_options(settings.prepared))
    metrics = {} if is_dual else build_text_metrics(DEPENDENCE_METRICS, settings.tasks)
    identity = {"model": describe_source(model, folder), "metrics": list(metrics), "seed": seed}
    with begin(output, settings, identity, asked.references, state) as folder_settings:
        asked = leave_out_broken(output, settings, folder, asked, work)
        loaded, processor = load_for_evaluation(folder, kind, settings, work)
        with broken_scans_have_a_way_out(work):
            rows = check_image_dependence(
                loaded,
                processor,
                asked.samples,
                build_volumes(processor, settings, work),
                text_metrics=metrics,
                max_new_tokens=settings.max_new_tokens,
                max_text_length=settings.max_text_length,
                batch_size=work.batch_size,
                seed=seed,
                show_progress=work.progress,
                prepared=settings.prepared,
            )
        notes = [*notes_on(settings, asked.is_part, asked.references, {}), *notes_on_left_out(asked)]
        title = f"# Image dependence, {folder_settings['model']['name']}"
        text = "\n\n".join([title, format_dependence(rows), *notes])
        content = {
            "model": model,
            "num_cases": asked.num_cases,
            "num_samples": len(asked.references),
            "num_skipped": asked.num_skipped,
            "notes": notes,
            "rows": [row.to_dict() for row in rows],
            "settings": folder_settings,
            "work": describe_work(folder, settings, work),
        }
        return write_result(output / DEPENDENCE, f"{text}\n", content)


def write_result(path: Path, text: str, content: dict[str, Any]) -> dict[str, Any]:
    """Writes a result with the versions, and `README.md` beside it; returns what is in the file."""
    content = {**content, "versions": versions()}
    write_json_atomically(content, path)
    write_atomically(text.encode(), path.with_name("README.md"))
    return content


__all__ = ["evaluate_dependence", "evaluate_zero_shot"]
