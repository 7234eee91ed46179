"""
Clinical metrics of reports: whether the same findings are stated, not whether the words are the same.

RaTEScore, GREEN and RadGraph F1 rest on packages that are not installed with this one, and on weights that they download when
they are first used. Label F1 needs a labeller of your own. None of them is validated for every kind of report: each says what it
is validated for, and [`clinical_notes`] puts that below the tables.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.utils import logging

from .scores import TextMetric, fields_for_json
from .tables import escape_cell, percent
from .text_metrics import SampleMetric


logger = logging.get_logger(__name__)

# Of each report: 1 or 0 for each label; `None`, or a label that is left out, is unknown.
ReportLabels = Mapping[str, int | None]
Labeller = Callable[[Sequence[str]], Sequence[ReportLabels]]


class ClinicalMetric(SampleMetric):
    """
    A metric in [0, 1] of another package. The package is imported when the metric is made, its weights are loaded when it is
    first used.

    A pair with an empty text scores 0, whatever the package says of it.

    Args:
        use_radeval (`bool`, *optional*, defaults to `False`):
            Whether to take the metric from the package radeval, which has RaTEScore and GREEN for transformers 5. It is also
            taken where the metric's own package cannot be imported.

    Raises:
        ImportError: neither package can be imported; the message says what to install, and why each failed.
        ValueError: radeval does not have the metric.
    """

    module = ""
    install = ""
    radeval_name = ""
    radeval_key = ""
    validated_for = ""
    remarks = ""

    def __init__(self, use_radeval: bool = False):
        super().__init__()
        if use_radeval and not self.radeval_name:
            raise ValueError(f"{self.name} is not taken from radeval: leave out `use_radeval`.")
        modules = [*[self.module] * (not use_radeval), *["radeval"] * bool(self.radeval_name)]
        package, self.uses_radeval = import_first(modules, self.name, self.install)
        self.scorer: Any = None
        self._package = package

    @property
    def note(self) -> str:
        """What a reader of the scores must know."""
        source = f"package {'radeval' if self.uses_radeval else self.module}"
        return f"{self.name} ({self.citation}; {source}): {self.validated_for} {self.remarks}".strip()

    def score_samples(self, predictions: Sequence[str], references: Sequence[str]) -> list[float]:
        """Scores in [0, 1], one for each pair."""
        scores = [0.0] * len(predictions)
        filled = [
            place for place, pair in enumerate(zip(predictions, references)) if all(text.strip() for text in pair)
        ]
        if not filled:
            return scores
        texts, targets = ([entries[place] for place in filled] for entries in (predictions, references))
        if self.scorer is None:
            self.scorer = self._load_radeval() if self.uses_radeval else self.load_scorer(self._package)
        found = self._score_with_radeval(texts, targets) if self.uses_radeval else self.score_pairs(texts, targets)
        if len(found) != len(filled):
            raise RuntimeError(f"{self.name}: expected {len(filled)} scores from its package, got {len(found)}.")
        unread = [place for place, score in enumerate(found) if score is None or math.isnan(score)]
        if unread:
            logger.warning(
                f"{self.name}: {len(unread)} of {len(found)} pairs got no score from its package; they count as 0."
            )
        for place, score in zip(filled, found):
            scores[place] = 0.0 if score is None or math.isnan(score) else float(score)
        return scores

    def load_scorer(self, package: Any) -> Any:
        """The scorer of the metric's own package."""
        raise NotImplementedError

    def score_pairs(self, predictions: list[str], references: list[str]) -> list[Any]:
        """Scores of pairs that are not empty, with the metric's own package."""
        raise NotImplementedError

    def _load_radeval(self) -> Any:
        return self._package.RadEval(metrics=[self.radeval_name], per_sample=True, show_progress=False)

    def _score_with_radeval(self, predictions: list[str], references: list[str]) -> list[Any]:
        return list(self.scorer(refs=references, hyps=predictions)[self.radeval_key])


class RateScore(ClinicalMetric):
    """
    RaTEScore: similarity of the medical entities of two reports, with their negations and synonyms.

    Pairs are scored one by one: the package leaves out a text without a sentence of three letters, such as "1.", and the scores
    of those after it would then be of other pairs. Such a pair scores 0; one in which the package finds no entity gets 0.5 from
    it.
    """

    name = "ratescore"
    description = "RaTEScore, similarity of medical entities."
    citation = "Zhao et al. 2024, RaTEScore: A Metric for Radiology Report Generation"
    module = "RaTEScore"
    install = "pip install RaTEScore"
    radeval_name = radeval_key = "ratescore"
    validated_for = "Made for English radiology reports of several modalities and regions."
    remarks = "A pair without entities scores 0.5."

    def load_scorer(self, package: Any) -> Any:
        """The scorer; its two encoders are downloaded if need be."""
        return package.RaTEScore(use_gpu=torch.cuda.is_available())

    def score_pairs(self, predictions: list[str], references: list[str]) -> list[Any]:
        """Scores of pairs that are not empty."""
        return [
            _only_score(self.scorer.compute_score, [text], [reference])
            for text, reference in zip(predictions, references)
        ]

    def _score_with_radeval(self, predictions: list[str], references: list[str]) -> list[Any]:
        score = super()._score_with_radeval
        return [_only_score(score, [text], [reference]) for text, reference in zip(predictions, references)]


class GreenScore(ClinicalMetric):
    """
    GREEN: a language model lists the matched findings and the errors; the score is matched / (matched + significant errors).

    Args:
        model (`str`, *optional*, defaults to `"StanfordAIMI/GREEN-radllama2-7b"`):
            The language model, by name or folder; its code is run as the package does. radeval knows the default alone.
        use_radeval (`bool`, *optional*, defaults to `False`):
            As for [`ClinicalMetric`]. The release 0.0.12 of green-score needs transformers 4.40, so in the environment of this
            project radeval is what works.

    Raises:
        ImportError: neither package can be imported.
        ValueError: another model with radeval.
    """

    name = "green"
    description = "GREEN, findings and errors counted by a language model."
    citation = "Ostmeier et al. 2024, GREEN: Generative Radiology Report Evaluation and Error Notation"
    module = "green_score"
    install = "pip install green-score"
    radeval_name = radeval_key = "green"
    validated_for = "Validated for English chest X-ray reports; of other reports its authors do not vouch for it."

    default_model = "StanfordAIMI/GREEN-radllama2-7b"

    def __init__(self, model: str | None = None, use_radeval: bool = False):
        super().__init__(use_radeval)
        self.model = model or self.default_model
        if self.uses_radeval and self.model != self.default_model:
            raise ValueError(f"GREEN of the package radeval has no choice of model: leave out {model!r}.")

    def load_scorer(self, package: Any) -> Any:
        """
        The scorer; its language model is downloaded if need be.

        Raises:
            RuntimeError: there are several GPUs, for which the package ends all processes but the first.
        """
        if torch.cuda.device_count() > 1:
            raise RuntimeError(
                "green-score ends all processes but one on several GPUs: set CUDA_VISIBLE_DEVICES to one of them."
            )
        return package.GREEN(
            self.model, output_dir=".", cpu=not torch.cuda.is_available(), compute_summary_stats=False
        )

    def score_pairs(self, predictions: list[str], references: list[str]) -> list[Any]:
        """Scores of pairs that are not empty."""
        _, _, scores, _, _ = self.scorer(references, predictions)
        return list(scores)


class RadGraphF1(ClinicalMetric):
    """
    RadGraph F1: the entities of two reports that agree in words, label, and whether they have a relation ("partial", RG_ER).

    The release 0.1.18 of radgraph is written for transformers 4; with transformers 5 it can be imported, and is untried beyond.
    The copy in radeval 2.2.1 cannot be imported on Linux, so radeval is not used here.
    """

    name = "radgraph_f1"
    description = "RadGraph F1 at the level 'partial', with the model radgraph-xl."
    citation = "Jain et al. 2021, RadGraph; Delbrouck et al. 2022 and 2024, F1RadGraph and RadGraph-XL"
    module = "radgraph"
    install = "pip install radgraph"
    validated_for = (
        "Its model knows English reports of chest X-ray, chest CT, CT of abdomen and pelvis, and brain MR; the metric was "
        "validated for chest X-ray reports."
    )

    def load_scorer(self, package: Any) -> Any:
        """The scorer; its model is downloaded if need be."""
        return package.F1RadGraph(reward_level="partial", model_type="radgraph-xl")

    def score_pairs(self, predictions: list[str], references: list[str]) -> list[Any]:
        """Scores of pairs that are not empty."""
        _, scores, _, _ = self.scorer(refs=references, hyps=predictions)
        return list(scores)


CLINICAL_METRICS: dict[str, type[ClinicalMetric]] = {
    metric.name: metric for metric in (RateScore, GreenScore, RadGraphF1)
}


def build_clinical_metrics(names: Sequence[str], use_radeval: bool = False) -> dict[str, ClinicalMetric]:
    """
    Clinical metrics by name.

    Args:
        names (`Sequence[str]`):
            Of `CLINICAL_METRICS`.
        use_radeval (`bool`, *optional*, defaults to `False`):
            As for [`ClinicalMetric`], of the metrics that radeval has.

    Returns:
        `dict[str, ClinicalMetric]`; `score_samples` of each is a [`~train.evaluation.scores.TextMetric`].

    Raises:
        ImportError: a package is missing.
        ValueError: a name is not known.
    """
    unknown = [name for name in names if name not in CLINICAL_METRICS]
    if unknown:
        raise ValueError(f"Expected clinical metrics out of {', '.join(CLINICAL_METRICS)}, got {', '.join(unknown)}.")
    kinds = {name: CLINICAL_METRICS[name] for name in names}
    return {name: kind(use_radeval=use_radeval and bool(kind.radeval_name)) for name, kind in kinds.items()}


def clinical_notes(metrics: Mapping[str, ClinicalMetric]) -> list[str]:
    """A line for each metric that says what it is validated for, for below a table."""
    return [metric.note for metric in metrics.values()]


def as_text_metrics(metrics: Mapping[str, ClinicalMetric]) -> dict[str, TextMetric]:
    """The metrics as [`~train.evaluation.scores.score_samples`] takes them."""
    return {name: metric.score_samples for name, metric in metrics.items()}


def import_first(modules: Sequence[str], metric: str, install: str) -> tuple[Any, bool]:
    """
    The first of some packages that can be imported.

    Args:
        modules (`Sequence[str]`):
            Names to import.
        metric (`str`):
            Whom it is for.
        install (`str`):
            How to install the first.

    Returns:
        The module, and whether it is radeval.

    Raises:
        ImportError: none can be imported.
    """
    problems = []
    for name in modules:
        try:
            return importlib.import_module(name), name == "radeval"
        except Exception as error:  # an installed package that does not fit the others fails in ways of its own
            problems.append(f"{name}: {error}")
    other = ", or `pip install radeval`, which has it for transformers 5" if "radeval" in modules else ""
    raise ImportError(f"{metric} needs a package that is not there: `{install}`{other}. Tried {'; '.join(problems)}.")


@dataclass(frozen=True)
class LabelScore:
    """
    How often a finding is stated when the true report states it.

    Args:
        label (`str`): The finding, or "micro" (all decisions together) or "macro" (mean over labels).
        precision, recall, f1 (`float`): In [0, 1]. NaN where neither side has a positive; such labels are not in "macro".
        num_reference (`int`): Positives in the references.
        num_predicted (`int`): Positives in the predictions.
        num_unknown (`int`): Reports without a label on one side; they are left out.
    """

    label: str
    precision: float
    recall: float
    f1: float
    num_reference: int
    num_predicted: int
    num_unknown: int

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold; NaN becomes `None`."""
        return fields_for_json(self)


def score_labels(predicted: Sequence[ReportLabels], reference: Sequence[ReportLabels]) -> list[LabelScore]:
    """
    F1 of the labels of reports.

    Args:
        predicted, reference (`Sequence[ReportLabels]`):
            Labels of the predicted and of the true reports, in the same order.

    Returns:
        `list[LabelScore]`: each label in the order they first occur in, then "micro" and "macro".

    Raises:
        ValueError: the numbers of reports differ, there are none, a label is neither 1, 0 nor `None`, or the two sides have no
            label in common or one side alone has it.
    """
    if len(predicted) != len(reference) or not reference:
        raise ValueError(
            f"Expected labels for each of at least one report, got {len(predicted)} predicted and {len(reference)} true ones."
        )
    sides = []
    for name, rows in (("predicted", predicted), ("true", reference)):
        wrong = [(label, value) for row in rows for label, value in row.items() if value not in (0, 1, None)]
        if wrong:
            raise ValueError(
                f"Expected 1, 0 or None for each label, got {wrong[0][1]!r} for {wrong[0][0]!r} in a {name} report."
            )
        sides.append(list(dict.fromkeys(label for row in rows for label in row)))
    one_sided = sorted(set(sides[0]) ^ set(sides[1]))
    if one_sided or not sides[1]:
        raise ValueError(
            f"Expected the same labels on both sides; one alone has {', '.join(one_sided) or 'none at all'}."
        )
    scores, totals = [], [0, 0, 0, 0]
    for label in sides[1]:
        pairs = [(given.get(label), true.get(label)) for given, true in zip(predicted, reference)]
        known = [pair for pair in pairs if None not in pair]
        counts = [known.count((1, 1)), sum(given == 1 for given, _ in known), sum(true == 1 for _, true in known)]
        counts.append(len(pairs) - len(known))
        totals = [total + count for total, count in zip(totals, counts)]
        scores.append(_label_score(label, *counts))
    defined = [score for score in scores if not math.isnan(score.f1)]

    def mean(name: str) -> float:
        return sum(getattr(score, name) for score in defined) / len(defined) if defined else math.nan

    _, num_predicted, num_reference, num_unknown = totals
    macro = LabelScore(
        "macro", mean("precision"), mean("recall"), mean("f1"), num_reference, num_predicted, num_unknown
    )
    return [*scores, _label_score("micro", *totals), macro]


def _label_score(label: str, hits: int, num_predicted: int, num_reference: int, num_unknown: int) -> LabelScore:
    if not num_predicted and not num_reference:
        return LabelScore(label, math.nan, math.nan, math.nan, 0, 0, num_unknown)
    return LabelScore(
        label,
        hits / num_predicted if num_predicted else 0.0,
        hits / num_reference if num_reference else 0.0,
        2 * hits / (num_predicted + num_reference),
        num_reference,
        num_predicted,
        num_unknown,
    )


def label_reports(reports: Sequence[str], labeller: str | Labeller) -> list[ReportLabels]:
    """
    The labels that a labeller gives to reports, for [`score_labels`].

    The labeller's own errors are in the scores: it should be validated for reports of this kind.

    Args:
        reports (`Sequence[str]`):
            Predicted or true ones.
        labeller (`str` or `Callable`):
            See [`find_labeller`].

    Returns:
        `list[ReportLabels]`, one for each report.

    Raises:
        ImportError: the labeller cannot be imported.
        ValueError: it does not give labels for each report.
    """
    labels = list(find_labeller(labeller)(list(reports)))
    if len(labels) != len(reports) or not all(isinstance(row, Mapping) for row in labels):
        raise ValueError(
            f"Expected a dict of labels for each of {len(reports)} reports from the labeller, got {labels!r:.80}."
        )
    return labels


def find_labeller(labeller: str | Labeller) -> Labeller:
    """
    The function of a labeller: of a list of reports it returns for each a `dict` from labels to 1, 0 or `None`.

    Args:
        labeller (`str` or `Callable`):
            The function, or `"module:function"`.

    Raises:
        ImportError: there is no such module.
        ValueError: the text has not this form, or the module no such function.
    """
    if not isinstance(labeller, str):
        return labeller
    module, _, name = labeller.partition(":")
    if not module or not name:
        raise ValueError(f'Expected a labeller as "module:function", got {labeller!r}.')
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise ImportError(f"The labeller {labeller!r} cannot be imported: {error}. Install its package.") from error
    if not callable(found):
        raise ValueError(f"The module {module!r} has no function {name!r} for a labeller.")
    return found


def format_labels(scores: Sequence[LabelScore]) -> str:
    """The scores as a Markdown table in percent, with what they leave out."""
    lines = [
        "| label | precision | recall | F1 | in true reports | in predicted ones | unknown |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for score in scores:
        cells = [escape_cell(score.label), percent(score.precision), percent(score.recall), percent(score.f1)]
        cells += [str(score.num_reference), str(score.num_predicted), str(score.num_unknown)]
        lines.append(f"| {' | '.join(cells)} |")
    without = [score.label for score in scores if math.isnan(score.f1)]
    lines += [
        "",
        "- Label F1 has the errors of the labeller in it, which should be validated for reports of this kind.",
    ]
    if without:
        lines.append(f"- No report on either side has {', '.join(without)}; not in the macro mean.")
    return "\n".join(lines)


def _only_score(
    score: Callable[[list[str], list[str]], Sequence[Any]], texts: list[str], references: list[str]
) -> Any:
    """The score of a single pair; `None` if the package has nothing left of a text."""
    try:
        scores = score(texts, references)
    except (IndexError, ZeroDivisionError):  # of its tokenizer for no sentence, and of radeval's mean over no pairs
        return None
    return scores[0] if len(scores) else None


__all__ = [
    "CLINICAL_METRICS",
    "ClinicalMetric",
    "GreenScore",
    "LabelScore",
    "Labeller",
    "RadGraphF1",
    "RateScore",
    "ReportLabels",
    "as_text_metrics",
    "build_clinical_metrics",
    "clinical_notes",
    "find_labeller",
    "format_labels",
    "label_reports",
    "score_labels",
]
