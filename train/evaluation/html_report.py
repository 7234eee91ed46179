"""An evaluation as one HTML page that needs nothing else: figures, and cases with slices, questions, answers and scores."""

import base64
import io
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...hub_cards.model_card import DIRECTIONS
from ..data.dataset import VolumeLoader
from ..data.preparation_record import states_directions
from ..files import write_atomically
from .predictions import Reference
from .scores import SampleScores, Score
from .tables import metric_title, percent


# Metrics that say right or wrong; others are matters of degree and get no mark.
RIGHT_OR_WRONG = ("accuracy", "exact")
SLICE_POSITIONS = (0.25, 0.5, 0.75)
SLICE_SIZE = 160  # pixels along each side of a slice
OPPOSITES = {"R": "L", "L": "R", "A": "P", "P": "A", "S": "I", "I": "S"}
# Of the slices across an axis that runs in a direction.
PLANES = {"S": "axial", "I": "axial", "A": "coronal", "P": "coronal", "L": "sagittal", "R": "sagittal"}

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 76rem; margin: 1.5rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; }
table { border-collapse: collapse; margin: 0.6rem 0 1.2rem; }
th, td { border: 1px solid #ccc; padding: 0.25rem 0.6rem; text-align: left; vertical-align: top; }
th { background: #f2f2f2; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; max-width: 26rem; }
.warning { border: 2px solid #b35900; background: #fff6e8; padding: 0.5rem 0.9rem; }
.right { background: #d7e9f7; }
.wrong { background: #fbe0d0; }
.case { border-top: 2px solid #ccc; margin-top: 1.5rem; }
.planes { display: flex; flex-wrap: wrap; gap: 0.8rem; }
figure { margin: 0; }
figure img { display: block; max-width: 100%; }
figcaption { font-size: 13px; color: #444; }
"""


@dataclass(frozen=True)
class AnsweredTask:
    """
    What a system was asked in one task, what it said, and how each answer scored.

    Args:
        references (`Sequence[Reference]`): Of one task.
        predictions (`Sequence[str]`): In the same order, as all that follow.
        scores (`dict`): Of [`~train.evaluation.scores.score_samples`]; cases are ranked by the first metric.
        blind_predictions (`Sequence[str]`, *optional*): Answers that were given with the volume of another case.

    Raises:
        ValueError: the references are of several tasks or there are none, lengths differ, or there are no scores.
    """

    references: Sequence[Reference]
    predictions: Sequence[str]
    scores: SampleScores
    blind_predictions: Sequence[str] | None = None

    def __post_init__(self) -> None:
        tasks = sorted({reference.task for reference in self.references})
        if len(tasks) != 1:
            raise ValueError(f"Expected references of one task, got {', '.join(tasks) or 'none'}.")
        lengths = {"predictions": len(self.predictions)}
        lengths |= {f"scores[{name!r}]": len(values) for name, values in self.scores.items()}
        if self.blind_predictions is not None:
            lengths["blind_predictions"] = len(self.blind_predictions)
        for name, length in lengths.items():
            if length != len(self.references):
                raise ValueError(
                    f"{tasks[0]}: expected `{name}` for each of {len(self.references)} references, got {length}."
                )
        if not self.scores:
            raise ValueError(
                f"{tasks[0]}: expected scores of at least one metric, by which cases are ranked, got none."
            )

    @property
    def rank_metric(self) -> str:
        """The metric by which cases are ranked."""
        return next(iter(self.scores))


@dataclass(frozen=True)
class Question:
    """One question of a case, with all that was said to it."""

    reference: Reference
    prediction: str
    blind_prediction: str | None
    scores: dict[str, float]
    rank_metric: str


def write_html_report(
    path: Path,
    title: str,
    answered: Sequence[AnsweredTask],
    summary: Sequence[str] = (),
    scores: Sequence[Score] = (),
    plots: Mapping[str, Path] | None = None,
    volumes: VolumeLoader | None = None,
    num_cases: int = 5,
    seed: int = 0,
    show_case_names: bool = False,
    orientation: str = "none",
    prepared: bool = False,
) -> Path:
    """
    Writes one HTML file with styles and pictures inside: no script, no network.

    It shows the tables of scores, the plots, and the best, the worst and random cases with slices of the volume, and for each
    question the reference, the answer, the blind answer and the scores. A case is all its questions; it is ranked by the mean
    over them of the metric that their task is ranked by. Cases that rank equally come in an order drawn with `seed`.

    Args:
        path (`Path`):
            The HTML file.
        title (`str`):
            Heading.
        answered (`Sequence[AnsweredTask]`):
            The tasks, each once.
        summary (`Sequence[str]`):
            Paragraphs under the heading, such as the settings; plain text.
        scores (`Sequence[Score]`):
            For the tables.
        plots (`Mapping[str, Path]`, *optional*):
            PNG files by caption.
        volumes ([`VolumeLoader`], *optional*):
            Loads the volumes for slices; without it, the report has none.
        num_cases (`int`, *optional*, defaults to 5):
            Cases of each kind: the best, the worst and random others. A case is shown once: of few cases, there are at most a
            third of each kind.
        seed (`int`, *optional*, defaults to 0):
            Of the random cases.
        show_case_names (`bool`, *optional*, defaults to `False`):
            Whether to name cases as the data do; otherwise they are counted, and only the ids of the questions are given.
        orientation (`str`, *optional*, defaults to `"none"`):
            The image processor's, such as `"LPS"`: the directions in which (width, height, depth) of the loaded volumes grow, for
            the captions. With `"none"`, and of slices, which do not state any, the captions name no direction.
        prepared (`bool`, *optional*, defaults to `False`):
            Whether the volumes were prepared before, perhaps from slices: see [`~train.data.preparation_record.states_directions`].

    Returns:
        `Path`: the file.

    Raises:
        FileNotFoundError: a plot is not there.
        ValueError: nothing was answered, a task is there twice, `num_cases` is below 1, a volume is none, or a plot is no PNG.
    """
    tasks = [entry.references[0].task for entry in answered]
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"Expected each answered task once and at least one, got {', '.join(tasks) or 'none'}.")
    cases = group_by_case(answered)
    chosen = choose_cases(cases, num_cases, seed)
    ranked_by = ", ".join(f"{task}: {metric_title(entry.rank_metric)}" for task, entry in zip(tasks, answered))
    parts = [f"<h1>{escape(title)}</h1>", _warning(volumes is not None, show_case_names)]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in summary]
    parts.append(_score_tables(scores))
    parts += [_figure(_read_png(file), caption) for caption, file in (plots or {}).items()]
    parts.append(
        f"<h2>Cases</h2>\n<p>{sum(map(len, chosen.values()))} of {len(cases)} cases, ranked by the mean over the questions of "
        f"a case of one metric per task ({escape(ranked_by)}). Random cases are drawn from those that are neither among the "
        f"best nor the worst shown, with seed {seed}.</p>"
    )
    number = 0
    for kind, names in chosen.items():
        parts.append(f"<h2>{kind}</h2>")
        for name in names:
            number += 1
            label = name if show_case_names else f"case {number}"
            parts.append(_case(label, cases[name], volumes, orientation, prepared))
    write_atomically(_page(title, parts).encode("utf-8", "backslashreplace"), path)
    return path


def group_by_case(answered: Iterable[AnsweredTask]) -> dict[str, list[Question]]:
    """All questions of each case, in the order of the tasks and their references."""
    cases: dict[str, list[Question]] = {}
    for entry in answered:
        for place, reference in enumerate(entry.references):
            cases.setdefault(reference.case, []).append(
                Question(
                    reference=reference,
                    prediction=entry.predictions[place],
                    blind_prediction=None if entry.blind_predictions is None else entry.blind_predictions[place],
                    scores={name: values[place] for name, values in entry.scores.items()},
                    rank_metric=entry.rank_metric,
                )
            )
    return cases


def case_score(questions: Sequence[Question]) -> float:
    """By which a case is ranked: the mean over its questions of the metric that their task is ranked by."""
    return sum(question.scores[question.rank_metric] for question in questions) / len(questions)


def choose_cases(cases: Mapping[str, Sequence[Question]], num_cases: int, seed: int) -> dict[str, list[str]]:
    """
    The best, the worst and random other cases, each at most once.

    Args:
        cases (`Mapping`):
            Questions by case.
        num_cases (`int`):
            Of each kind; at most a third of all, and at least 1.
        seed (`int`):
            Of the random ones, and of the order of those that rank equally.

    Returns:
        `dict[str, list[str]]`: names of cases by heading; only kinds of which there are any.

    Raises:
        ValueError: `num_cases` is below 1.
    """
    if num_cases < 1:
        raise ValueError(f"`num_cases` must be at least 1, got {num_cases}.")
    number = min(num_cases, max(1, len(cases) // 3))
    generator = random.Random(seed)
    names = list(cases)
    generator.shuffle(names)
    ranked = sorted(names, key=lambda name: -case_score(cases[name]))
    best, others = ranked[:number], ranked[number:]
    worst, others = others[::-1][:number], others[: max(0, len(others) - number)]
    chosen = {"Best": best, "Worst": worst, "Random": generator.sample(others, min(number, len(others)))}
    return {kind: names for kind, names in chosen.items() if names}


def draw_slices(volume: Any, slice_size: int, orientation: str) -> dict[str, bytes]:
    """
    Strips of three slices of a volume across each axis. With the orientation `"LPS"` the display is radiological.

    Args:
        volume (`torch.Tensor` or `numpy.ndarray` of shape `(depth, height, width)`):
            In [0, 1].
        slice_size (`int`):
            Height and width of each slice, in pixels, whatever its shape was.
        orientation (`str`):
            The directions in which (width, height, depth) grow, such as `"LPS"`; `"none"` if they are not known.

    Returns:
        `dict[str, bytes]`: a PNG by caption, which names the directions if they are known.

    Raises:
        ValueError: it is no volume, or has values that are not finite.
    """
    voxels = np.asarray(volume, dtype=np.float32)
    if voxels.ndim != 3 or not np.isfinite(voxels).all():
        raise ValueError(
            f"Expected a volume of shape (depth, height, width) with finite values, got {voxels.shape}. Check the data with "
            "`med3dvlm prepare check`."
        )
    d, h, w = ([int(share * (size - 1)) for share in SLICE_POSITIONS] for size in voxels.shape)
    # Where the depth runs upwards in the patient, or forwards, its end is shown above.
    is_depth_up = orientation[-1] in "SA"
    upright = voxels[::-1] if is_depth_up else voxels
    planes = [
        [voxels[place] for place in d],
        [upright[:, place] for place in h],
        [upright[:, :, place] for place in w],
    ]
    captions = _captions(orientation, is_depth_up)
    return {caption: _strip(slices, slice_size) for caption, slices in zip(captions, planes)}


def _captions(orientation: str, is_depth_up: bool) -> list[str]:
    """Of the slices across the depth, the height and the width; `is_depth_up` if those across the latter two end above."""
    if orientation == "none":
        shown = {"depth": "height down and width", "height": "depth down and width", "width": "depth down and height"}
        return [
            f"across the {axis}, with {rest} to the right; directions are not known" for axis, rest in shown.items()
        ]
    width, height, depth = tuple(orientation)
    top = depth if is_depth_up else OPPOSITES[depth]
    return [
        f"{PLANES[across]}, from {DIRECTIONS[OPPOSITES[across]]} to {DIRECTIONS[across]}; {DIRECTIONS[OPPOSITES[columns]]} is on "
        f"the left, {DIRECTIONS[above]} above"
        for across, above, columns in ((depth, OPPOSITES[height], width), (height, top, width), (width, top, height))
    ]


def _strip(slices: Sequence[np.ndarray], slice_size: int) -> bytes:
    gap = 4
    strip = Image.new("L", (len(slices) * (slice_size + gap) - gap, slice_size), 255)
    for place, values in enumerate(slices):
        grey = (values.clip(0, 1) * 255).round().astype(np.uint8)
        picture = Image.fromarray(np.ascontiguousarray(grey)).resize(
            (slice_size, slice_size), Image.Resampling.BILINEAR
        )
        strip.paste(picture, (place * (slice_size + gap), 0))
    file = io.BytesIO()
    strip.save(file, format="PNG", optimize=True)
    return file.getvalue()


def _warning(has_images: bool, show_case_names: bool) -> str:
    contents = ["image data of cases"] if has_images else []
    contents += ["reference texts and answers about cases"] + (["names of cases"] if show_case_names else [])
    return (
        f'<p class="warning"><strong>This report contains {" and ".join(contents)}.</strong> Treat it as you must treat the '
        "data set it was made from, and do not pass it on where that is not allowed. Slices are resized to squares. For "
        "research only: not a medical device.</p>"
    )


def _score_tables(scores: Sequence[Score]) -> str:
    parts = ["<h2>Scores</h2>"] if scores else []
    for task in dict.fromkeys(score.task for score in scores):
        rows = [
            (
                metric_title(score.metric),
                score.group,
                *(percent(value, 2, "") for value in (score.value, score.low, score.high, score.blind, score.chance)),
                f"{score.count:,}",
            )
            for score in scores
            if score.task == task
        ]
        head = ("Metric", "Group", "Score (%)", "95 %, from", "to", "Blind (%)", "Chance (%)", "Samples")
        parts.append(f"<h3>{escape(task)}</h3>\n<table>\n<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>")
        for metric, group, *numbers in rows:
            cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
            parts.append(f"<tr><td>{escape(metric)}</td><td>{escape(group)}</td>{cells}</tr>")
        parts.append("</table>")
    if scores:
        parts.append(
            "<p>Blind: answered with the volume of another case. Chance: what guessing gives, for texts the true answer of another case.</p>"
        )
    return "\n".join(parts)


def _score(value: float | None) -> str:
    text = percent(value, 2, undefined="")
    return f"{text} %" if text else "undefined"


def _case(
    label: str,
    questions: Sequence[Question],
    volumes: VolumeLoader | None,
    orientation: str,
    prepared: bool,
) -> str:
    ids = [question.reference.id for question in questions]
    more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
    parts = [
        f'<section class="case">\n<h3>{escape(label)} ({escape(ids[0])}{more}): {_score(case_score(questions))}</h3>'
    ]
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.reference.image, []).append(question)
    for image, asked in by_image.items():
        if volumes is not None:
            known = orientation if states_directions(image, prepared) else "none"
            pictures = draw_slices(volumes.load(image), SLICE_SIZE, known)
            figures = "\n".join(_figure(picture, caption) for caption, picture in pictures.items())
            parts.append(f'<div class="planes">\n{figures}\n</div>')
        parts.append(_question_table(asked))
    return "\n".join([*parts, "</section>"])


def _question_table(questions: Sequence[Question]) -> str:
    has_blind = any(question.blind_prediction is not None for question in questions)
    head = ["Id", "Question", "Reference", "Answer", *(["Blind answer"] if has_blind else []), "Scores"]
    parts = [f"<table>\n<tr>{''.join(f'<th>{name}</th>' for name in head)}</tr>"]
    for question in questions:
        right = is_right(question)
        mark, style = {True: ("right", " right"), False: ("wrong", " wrong"), None: ("", "")}[right]
        figures = "\n".join(f"{metric_title(name)}: {_score(value)}" for name, value in question.scores.items())
        texts = [question.reference.question, question.reference.expected, question.prediction]
        cells = [
            f'<td class="text{style if place == 2 else ""}">{escape(text)}</td>' for place, text in enumerate(texts)
        ]
        if has_blind:
            cells.append(f'<td class="text">{escape(question.blind_prediction or "")}</td>')
        note = f"<strong>{mark}</strong>\n" if mark else ""
        cells.append(f'<td class="text{style}">{note}{escape(figures)}</td>')
        parts.append(f"<tr><td>{escape(question.reference.id)}</td>{''.join(cells)}</tr>")
    return "\n".join([*parts, "</table>"])


def is_right(question: Question) -> bool | None:
    """Whether an answer is right; `None` where that is a matter of degree, and the words are not the same."""
    for name in RIGHT_OR_WRONG:
        if name in question.scores:
            if question.scores[name] == 1:
                return True
            return False if name == "accuracy" else None
    return None


def _figure(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode("ascii")
    text = escape(caption)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _read_png(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path}: expected a PNG to put into the report, this is none.")
    return content


def _page(title: str, parts: Sequence[str]) -> str:
    # The policy forbids scripts and the network, should a text ever get past the escaping.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>",
            *parts,
            "</body>\n</html>\n",
        ]
    )


__all__ = [
    "AnsweredTask",
    "Question",
    "case_score",
    "choose_cases",
    "draw_slices",
    "group_by_case",
    "write_html_report",
]
