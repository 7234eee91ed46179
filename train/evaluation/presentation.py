"""What readers look at, made from the folder of an evaluation: tables, plots, an HTML report, and a text to print."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from ..data.cache import volume_loader
from ..data.dataset import VolumeLoader
from ..data.layout import CAP_INDEX, PHANTOM_SETTINGS
from ..data.manifest import find_manifest
from ..data.prepare import REPORT_NAME
from ..files import write_atomically
from .clinical import LabelScore, format_labels
from .folders import PREDICTIONS, SCORES, read_scores, snapshot_of
from .html_report import AnsweredTask, write_html_report
from .plots import RecallCurve, draw_calibration, draw_recall_curves, draw_type_bars
from .predictions import Reference, read_json_lines
from .published import MissingResult, PublishedScore, read_missing, read_published
from .retrieval import TASK as RETRIEVAL
from .scores import CALIBRATED_TASKS, Score, calibration_hits
from .settings import Work
from .tables import build_tables, percent, write_tables


# Whose published figures the bars of a plot show.
PAPER_SYSTEM = "Med3DVLM"
# Of the figures that come with the package.
PUBLISHED_NOTE = (
    "Published figures are of M3D's official test split; it was not checked whether these data are that. On other data they do "
    "not compare."
)


def present(
    output: Path,
    published: Path | None = None,
    work: Work | None = None,
    show_case_names: bool = False,
    model: str | None = None,
) -> str:
    """
    Writes `tables/`, `plots/`, `report.html` and `README.md` into the folder of an evaluation.

    Args:
        output (`Path`):
            The folder, with its `scores.json`.
        published (`Path`, *optional*):
            File of published figures to stand in the tables; if not given, those that come with the package, for the split "test"
            of data in the layout of M3D that are no phantoms and were not split by `med3dvlm prepare`.
        work ([`Work`], *optional*):
            Has the cache of volumes, for the slices in the report.
        show_case_names (`bool`, *optional*):
            Whether the report names cases.
        model (`str`, *optional*):
            Whose image processor prepares the slices; without it, the report has none.

    Returns:
        `str`: the text of `README.md`.

    Raises:
        FileNotFoundError: there are no scores.
        ValueError: the file of published figures is not of its format.
    """
    scores = read_scores(output / SCORES)
    result = json.loads((output / SCORES).read_text(encoding="utf-8"))
    # Those of the package are of the test.
    is_comparable = result["settings"]["split"] == "test" and is_m3d(result["settings"]["data"])
    has_others = published is not None or is_comparable
    others = read_published(published) if has_others else []
    missing = read_missing(published) if has_others else []
    tables = build_tables(scores, result["system"], others, PUBLISHED_NOTE if published is None else "")
    write_tables(tables, scores, output / "tables")
    tasks = list(dict.fromkeys(score.task for score in scores))
    plots: dict[str, Path] = {}
    if tasks == [RETRIEVAL]:
        curves = [recall_curve(group, values) for group, values in result["details"]["recall_curves"].items()]
        plots["Recall"] = draw_recall_curves(curves, output / "plots/recall.png")
    else:
        answered = read_answered(output, tasks)
        plots |= draw_answers(scores, answered, output, others)
        volumes: VolumeLoader | None = None
        orientation = "none"
        found = find_on_disk(model, result["settings"])
        if found is not None:  # what prepares volumes as the model gets them
            image_processor = Med3DVLMImageProcessor.from_pretrained(found)
            orientation = image_processor.orientation
            cache = None if work is None else work.cache
            volumes = volume_loader(image_processor, result["settings"]["prepared"], cache, "float32")
        write_html_report(
            output / "report.html",
            f"{result['system']} on {result['settings']['data']}",
            [task for task, _ in answered],
            summary=[describe_run(result), *result["notes"]],
            scores=scores,
            plots=plots,
            volumes=volumes,
            show_case_names=show_case_names,
            orientation=orientation,
            prepared=result["settings"]["prepared"],
        )
    shown = [f"## {table.title}\n\n{table.to_markdown()}" for table in tables]
    text = format_readme(result, shown, plots, output, missing)
    write_atomically(text.encode(), output / "README.md")
    return text


def is_m3d(data: str) -> bool:
    """Whether published figures can be on these data: not if they are phantoms, in a manifest, or in splits drawn here."""
    root = Path(data).expanduser()
    is_in_layout = root.is_dir() and find_manifest(root) is None and not (root / PHANTOM_SETTINGS).exists()
    return is_in_layout and not was_split_here(root)


def was_split_here(root: Path) -> bool:
    """Whether it is known that preparation drew the splits of a study, rather than taking those of an index."""
    for folder in (root, (root / CAP_INDEX).parent):
        report = folder / f"{REPORT_NAME}.json"
        if report.is_file():  # those of earlier versions do not say how, and are not taken for either
            return "seed" in (json.loads(report.read_text(encoding="utf-8")).get("splits") or {})
    return False


def recall_curve(group: str, values: dict[str, list[float]]) -> RecallCurve:
    """Of the details that retrieval keeps for a group such as "volume to report, 100"."""
    direction, size = group.rsplit(", ", 1)
    by_rank = {name: dict(enumerate(shares, start=1)) for name, shares in values.items()}
    return RecallCurve(direction, int(size), by_rank["recall"], by_rank.get("blind"))


def read_answered(output: Path, tasks: list[str]) -> list[tuple[AnsweredTask, list[float] | None]]:
    """By task, what was asked and said, and the probability of each answer, if it is known."""
    names = Reference.__dataclass_fields__
    rows = [row for _, row in read_json_lines(output / PREDICTIONS)]
    answered = []
    for task in tasks:
        lines = [row for row in rows if row["task"] == task]
        has_blind = all("blind_prediction" in line for line in lines)
        has_probability = all("probability" in line for line in lines)
        entry = AnsweredTask(
            references=[Reference(**{name: line[name] for name in names}) for line in lines],
            predictions=[line["prediction"] for line in lines],
            scores={metric: [line["scores"][metric] for line in lines] for metric in lines[0]["scores"]},
            blind_predictions=[line["blind_prediction"] for line in lines] if has_blind else None,
        )
        answered.append((entry, [line["probability"] for line in lines] if has_probability else None))
    return answered


def draw_answers(
    scores: Sequence[Score],
    answered: Sequence[tuple[AnsweredTask, list[float] | None]],
    output: Path,
    published: Sequence[PublishedScore] = (),
) -> dict[str, Path]:
    """Bars by type of each task, beside the paper's figures, and how well the probability of an answer tells if it is right."""
    plots: dict[str, Path] = {}
    for entry, probabilities in answered:
        task = entry.references[0].task
        of_task = [score for score in scores if score.task == task]
        known = {(score.metric, score.group) for score in of_task}
        figures: dict[str, dict[str, float]] = {}
        for figure in published:
            if (figure.system, figure.task) == (PAPER_SYSTEM, task) and (figure.metric, figure.group) in known:
                figures.setdefault(figure.metric, {})[figure.group] = figure.value
        plots[f"Scores, {task}"] = draw_type_bars(of_task, output / f"plots/{task}.png", figures)
        if probabilities is not None and task in CALIBRATED_TASKS:
            path = output / f"plots/{task}_calibration.png"
            hits = calibration_hits(entry.references, entry.predictions)
            title = f"Calibration, {task}{', letter and text right' if task == 'closed_vqa' else ''}"
            plots[f"Calibration, {task}"] = draw_calibration(probabilities, hits, path, title=title)
    return plots


def find_on_disk(model: str | None, settings: dict[str, Any]) -> str | None:
    """The folder of a model; of a repository on the Hub, that of the revision that was evaluated."""
    if model is None or Path(model).expanduser().is_dir():
        return model
    return str(snapshot_of(model, settings["model"].get("revision")))


def describe_run(result: dict[str, Any]) -> str:
    """One sentence on what was scored."""
    settings = result["settings"]
    return (
        f"{result['num_samples']} samples of {result['num_cases']} cases, split {settings['split']}, tasks "
        f"{', '.join(settings['tasks'])}{'; greedy decoding' if result.get('decoding') == 'greedy' else ''}."
    )


def format_readme(
    result: dict[str, Any],
    tables: list[str],
    plots: dict[str, Path],
    output: Path,
    missing: Sequence[MissingResult] = (),
) -> str:
    """The text of the folder's `README.md`."""
    lines = [f"# {result['system']}", "", describe_run(result)]
    lines += [f"**{note}**" for note in result["notes"]]
    lines += [
        "",
        "In brackets: 95 % intervals, cases resampled. Blind: the same with the volume of another case. Chance: guessing among "
        "the choices, or, for texts, the true answer to the same type of question about another case.",
        "",
        "\n\n".join(tables),
    ]
    if missing:
        lines += ["", "Of the published figures these are not known, so that no table has them:", ""]
        lines += [f"- {entry.table}. {entry.about}" for entry in missing]
    collapse = format_answer_statistics(result["details"])
    if collapse:
        lines += ["", "## Answers", "", collapse]
    for mode, labels in result["details"].get("report", {}).get("labels", {}).items():
        lines += ["", f"## Labels of reports, {mode}, %", "", format_labels([label_score(row) for row in labels])]
    lines += ["", *(f"![{caption}]({path.relative_to(output).as_posix()})" for caption, path in plots.items())]
    return "\n".join(lines) + "\n"


def label_score(row: dict[str, Any]) -> LabelScore:
    """A score of labels as `scores.json` has it."""
    fields: dict[str, Any] = {name: math.nan if value is None else value for name, value in row.items()}
    return LabelScore(**fields)


def format_answer_statistics(details: dict[str, Any]) -> str:
    """Signs of template collapse, as a table; nothing for retrieval."""
    rows = []
    for task, entry in details.items():
        if "answers" not in entry:
            continue
        unchanged = percent(entry.get("unchanged_by_another_volume"))
        for title, statistics in {"answers": entry["answers"]["given"], "references": entry["references"]}.items():
            shares = [
                percent(statistics[name])
                for name in ("distinct_share", "most_common_share", "empty_share", "repetition")
            ]
            rows.append(
                [task, title, *shares, f"{statistics['mean_words']:.1f}", unchanged if title == "answers" else ""]
            )
    if not rows:
        return ""
    header = [
        "task",
        "texts",
        "different, %",
        "most frequent, %",
        "empty, %",
        "repetition, %",
        "words",
        "unchanged by another volume, %",
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows])


__all__ = ["present"]
