"""Scores as tables in the forms of the paper: Markdown for readers, CSV for spreadsheets."""

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...hub_cards.model_index import METRIC_TITLES as CARD_TITLES
from ..data.samples import QUESTION_TYPES
from ..files import write_atomically
from ..scoring import RECALL_RANKS
from .published import MEASURED, PUBLISHED, PublishedScore, list_sources
from .retrieval import TASK as RETRIEVAL
from .scores import ALL_SAMPLES, MEAN_OF_TYPES, Score


METRIC_TITLES = {
    **CARD_TITLES,
    "accuracy": "accuracy",
    "original_accuracy": "accuracy, original rule",
    "exact": "every word right",
    **{f"recall_at_{rank}": f"R@{rank}" for rank in RECALL_RANKS},
}
TITLES = {
    RETRIEVAL: "Retrieval",
    "report": "Report generation",
    "open_vqa": "Open questions",
    "closed_vqa": "Closed questions",
    "yes_no_vqa": "Yes/no questions",
}


@dataclass(frozen=True)
class Table:
    """
    A table of texts.

    Args:
        name (`str`): Of its files.
        title (`str`): For readers.
        header (`tuple[str, ...]`): Names of the columns.
        rows (`tuple[tuple[str, ...], ...]`): The cells.
        notes (`tuple[str, ...]`, *optional*): Lines below the table.
    """

    name: str
    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()

    def to_markdown(self) -> str:
        """The table and its notes, without its title."""
        lines = [self.header, tuple("---" for _ in self.header), *self.rows]
        text = "\n".join(f"| {' | '.join(map(escape_cell, line))} |" for line in lines)
        return "\n\n".join([text, *self.notes])

    def to_csv(self) -> str:
        """The same as comma-separated values."""
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.header, *self.rows])
        return stream.getvalue()


def escape_cell(cell: str) -> str:
    """A text that cannot end a cell of a Markdown table, nor its row."""
    return cell.replace("|", "\\|").replace("\n", " ")


@dataclass(frozen=True)
class _Form:
    """Of a task's table: what its rows are, and for each column the metric and the group that stand in it."""

    row_title: str
    rows: Mapping[str, Mapping[str, tuple[str, str]]]  # title of a row -> title of a column -> metric, group


def build_tables(
    scores: Sequence[Score], system: str, published: Sequence[PublishedScore] = (), published_note: str = ""
) -> list[Table]:
    """
    A table for each task, in percent: the system with its 95 % intervals, its blind control and chance, and what others
    published, each marked as measured here or published.

    Args:
        scores (`Sequence[Score]`):
            Of one system.
        system (`str`):
            Its name.
        published (`Sequence`, *optional*):
            Figures that others published; those of other tasks are left out.
        published_note (`str`, *optional*):
            What a reader of any of them must know, for below the sources.

    Returns:
        `list[Table]`, in the order of the scores.
    """
    return [
        _build_table(task, [score for score in scores if score.task == task], system, published, published_note)
        for task in dict.fromkeys(score.task for score in scores)
    ]


def _form_of(task: str, scores: Sequence[Score | PublishedScore]) -> _Form:
    metrics = list(dict.fromkeys(score.metric for score in scores))
    groups = list(dict.fromkeys(score.group for score in scores))
    if task == RETRIEVAL:
        kinds = {"": "", "deduplicated_": ", identical reports match"}
        return _Form(
            "query to gallery, pairs",
            {
                group + title: {f"R@{rank}": (f"{prefix}recall_at_{rank}", group) for rank in RECALL_RANKS}
                for group in groups
                for prefix, title in kinds.items()
            },
        )
    types = [name for name in (*QUESTION_TYPES.values(), MEAN_OF_TYPES) if name in groups]
    if not types:  # reports, or questions without types: a column for each metric
        columns = {metric_title(metric): (metric, ALL_SAMPLES) for metric in metrics}
        return _Form("", {"": columns})
    return _Form(
        "metric",
        {metric_title(metric): {group: (metric, group) for group in (*types, ALL_SAMPLES)} for metric in metrics},
    )


def _build_table(
    task: str, scores: Sequence[Score], system: str, published: Sequence[PublishedScore], published_note: str
) -> Table:
    cited = [entry for entry in published if entry.task == task]
    sources = list(dict.fromkeys((entry.table, entry.source) for entry in cited))  # as `list_sources` has them
    others: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for entry in cited:
        mark = f"{PUBLISHED} [{sources.index((entry.table, entry.source)) + 1}]"
        others.setdefault((entry.system, mark), {})[entry.metric, entry.group] = entry.value
    form = _form_of(task, [*scores, *cited])
    found = {(score.metric, score.group): score for score in scores}
    rows = []
    for title, columns in form.rows.items():
        places = list(columns.values())
        own = [found.get(place) for place in places]
        kinds = [
            (system, MEASURED, [format_score(score) for score in own]),
            (f"{system}, blind", MEASURED, [percent(None if score is None else score.blind) for score in own]),
            ("chance", "", [percent(None if score is None else score.chance) for score in own]),
            *(
                (name, mark, [percent(values.get(place)) for place in places])
                for (name, mark), values in others.items()
            ),
        ]
        head = (title,) if form.row_title else ()
        rows += [(*head, name, mark, *cells) for name, mark, cells in kinds if any(cells)]
    head = (form.row_title,) if form.row_title else ()
    notes = [f"[{number}] {line}" for number, line in enumerate(list_sources(cited), start=1)]
    if cited and published_note:
        notes.append(published_note)
    return Table(
        name=task,
        title=f"{TITLES[task]}, %",
        header=(*head, "system", "source", *next(iter(form.rows.values()))),
        rows=tuple(rows),
        notes=tuple(notes),
    )


def metric_title(metric: str) -> str:
    """The name of a metric for readers, of tables, plots and reports alike."""
    return METRIC_TITLES.get(metric, metric.replace("_", " "))


def format_score(score: Score | None) -> str:
    """Such as "84.0 [76.0, 91.0]"; without an interval where there is none."""
    if score is None:
        return ""
    interval = "" if math.isnan(score.low) else f" [{percent(score.low)}, {percent(score.high)}]"
    return percent(score.value) + interval


def percent(value: float | None, digits: int = 1, undefined: str = "-") -> str:
    """Such as "84.0"; nothing for no value, `undefined` for NaN."""
    return "" if value is None else undefined if math.isnan(value) else f"{100 * value:.{digits}f}"


def write_tables(tables: Sequence[Table], scores: Sequence[Score], folder: Path) -> None:
    """Writes each table as Markdown and CSV, and `all_scores.csv`, which has every field of every score."""
    for table in tables:
        write_atomically(f"# {table.title}\n\n{table.to_markdown()}\n".encode(), folder / f"{table.name}.md")
        write_atomically(table.to_csv().encode(), folder / f"{table.name}.csv")
    names = tuple(field.name for field in fields(Score))
    rows = tuple(
        tuple(
            "" if value is None or value != value else str(value) for value in (getattr(score, name) for name in names)
        )
        for score in scores
    )
    write_atomically(Table("all_scores", "", names, rows).to_csv().encode(), folder / "all_scores.csv")


__all__ = ["Table", "build_tables", "escape_cell", "format_score", "metric_title", "percent", "write_tables"]
