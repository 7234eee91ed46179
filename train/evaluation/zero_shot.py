"""
Zero-shot classification with the dual encoder: how near the vector of a volume is to those of texts that name a class.

Prompts and labels come from files, so that any finding with a label can be tested without training.
"""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch.nn.functional import normalize
from tqdm import tqdm

from ..answering import embed_texts
from ..data.collate import stack_volumes
from ..data.dataset import VolumeLoader
from ..data.m3d import read_csv_rows
from ..scoring import check_finite, from_half_way_round
from .scores import fields_for_json
from .tables import escape_cell, percent


Rule = Literal["sigmoid", "against negatives", "among classes"]
RULES: tuple[Rule, ...] = get_args(Rule)
# What each rule makes of the logits z of a volume and the prompts of a class.
RULE_TEXTS: dict[str, str] = {
    "sigmoid": "sigmoid of the logit of the positive prompts, each class by itself; negative prompts are not used",
    "against negatives": "softmax over the logits of the positive and the negative prompts, each class by itself",
    "among classes": "softmax over the logits of the positive prompts of all classes",
}
# An example: which organ of a phantom holds the lesion.
PHANTOM_PROMPTS = Path(__file__).parent / "prompts" / "phantom_organs.yaml"
MEAN_OF_CLASSES = "mean of classes"
THRESHOLD = 0.5
KEY_COLUMNS = ("image", "case")


@dataclass(frozen=True)
class ClassPrompts:
    """
    Texts that stand for a class.

    Args:
        name (`str`): Of the class, as in the labels.
        positive (`tuple[str, ...]`): Said of a volume that shows it.
        negative (`tuple[str, ...]`, *optional*): Said of one that does not.
    """

    name: str
    positive: tuple[str, ...]
    negative: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabelledVolume:
    """
    What is known of a volume.

    Args:
        image (`str`): Its path.
        case (`str`): Patient or study.
        labels (`dict[str, int]`): 1 or 0 for each class that is known.
    """

    image: str
    case: str
    labels: dict[str, int]


@dataclass(frozen=True)
class Labels:
    """
    Labels of a file.

    Args:
        volumes (`list[LabelledVolume]`): In the order of the file.
        columns_without_prompts (`tuple[str, ...]`): Classes of the file that no prompts were given for.
    """

    volumes: list[LabelledVolume]
    columns_without_prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class ZeroShotScore:
    """
    How well a class is told from the texts alone.

    Args:
        name (`str`): The class, or "mean of classes".
        auroc (`float`): Area under the ROC curve; NaN where `reason` says why.
        low, high (`float`): Ends of its 95 % interval, cases resampled.
        blind_auroc (`float`): The same with the volume of another case.
        f1, accuracy (`float`): At the threshold 0.5. F1 is NaN without positives.
        threshold (`float`, *optional*): The one with the best F1 on a file for validation.
        f1_at_threshold, accuracy_at_threshold (`float`, *optional*): At that threshold.
        num_positive, num_negative, num_unknown (`int`): Volumes with 1, with 0, and without a label, which are left out.
        reason (`str`): Why a figure is NaN; empty if none is.
    """

    name: str
    auroc: float
    low: float
    high: float
    blind_auroc: float
    f1: float
    accuracy: float
    num_positive: int
    num_negative: int
    num_unknown: int
    threshold: float | None = None
    f1_at_threshold: float | None = None
    accuracy_at_threshold: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class ZeroShotResult:
    """
    Scores of all classes, and how probabilities were made.

    Args:
        rule (`str`): One of `RULES`.
        scores (`list[ZeroShotScore]`): One for each class, and their mean.
        probabilities (`dict[str, list[float]]`): Of each class, for each volume.
        notes (`list[str]`): What a reader of the table must know.
    """

    rule: Rule
    scores: list[ZeroShotScore]
    probabilities: dict[str, list[float]] = field(repr=False)
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """What JSON can hold, without the probabilities; NaN becomes `None`."""
        rows = [fields_for_json(score) for score in self.scores]
        return {"rule": self.rule, "rule_text": RULE_TEXTS[self.rule], "scores": rows, "notes": list(self.notes)}


def read_prompts(path: str | Path) -> list[ClassPrompts]:
    """
    Reads a set of prompts.

    Args:
        path (`str` or `Path`):
            YAML or JSON: for each class a list of prompts, or `positive` and `negative` lists.

    Returns:
        `list[ClassPrompts]`, in the order of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it has not this form.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such set of prompts.")
    from omegaconf import OmegaConf  # what else is evaluated in one process does without it, and without scikit-learn

    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # the YAML library has its own family of errors; whatever it is, the file is at fault
        raise ValueError(f"{path}: not readable as YAML or JSON: {error}") from error
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{path}: expected prompts for each class, such as `liver: [A lesion in the liver.]`.")
    return [_read_class(path, str(name), entry) for name, entry in content.items()]


def _read_class(path: Path, name: str, entry: Any) -> ClassPrompts:
    where = f"{path}, {name!r}"
    if name in KEY_COLUMNS:
        raise ValueError(f"{where}: a class cannot have the name of the column {name!r} of the labels.")
    entry = {"positive": entry} if isinstance(entry, list) else entry
    if not isinstance(entry, dict) or not {"positive"} <= set(entry) <= {"positive", "negative"}:
        raise ValueError(f"{where}: expected a list of prompts, or `positive` and perhaps `negative` lists.")
    texts = {}
    for side, prompts in entry.items():
        if (
            not isinstance(prompts, list)
            or not prompts
            or not all(isinstance(text, str) and text.strip() for text in prompts)
        ):
            raise ValueError(f"{where}: expected a list of texts as {side!r}, got {prompts!r}.")
        texts[side] = tuple(text.strip() for text in prompts)
    return ClassPrompts(name, **texts)


def read_labels(
    path: str | Path,
    classes: Sequence[str],
    images_of: Mapping[str, Sequence[str]] | Callable[[], Mapping[str, Sequence[str]]] | None = None,
) -> Labels:
    """
    Reads the labels of volumes.

    Args:
        path (`str` or `Path`):
            CSV (UTF-8) with a column `image`, a path relative to the file's folder or absolute, or `case`, or both, and one
            for each class: 1, 0, or empty for unknown.
        classes (`Sequence[str]`):
            Those that are scored; each must have a column.
        images_of (`Mapping` or `Callable`, *optional*):
            Paths of the volumes of each case, or what finds them, for a file without `image`: see [`images_by_case`]. The labels
            then belong to each of them.

    Returns:
        [`Labels`].

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no CSV, or not in UTF-8, a column is missing, a cell is neither 1, 0 nor empty, a row names no
            volume, or one occurs twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file of labels.")
    columns: list[str] = []
    images_of_cases: dict[str, Sequence[str]] = {}

    def check_columns(header: list[str]) -> None:
        columns.extend(header)
        absent = [name for name in classes if name not in header]
        if absent:
            raise ValueError(
                f"{path}: no column for {', '.join(map(repr, absent))}. It has {', '.join(header) or 'none'}. Add the column, or "
                "give prompts for those that it has (--prompts)."
            )
        if not set(KEY_COLUMNS) & set(header):
            raise ValueError(f"{path}: expected a column 'image' or 'case', got {', '.join(header)}.")
        if "image" not in header and images_of is None:
            raise ValueError(f"{path}: has no column 'image'. Add one, or say which volumes a case has.")
        if "image" not in header and images_of is not None:
            images_of_cases.update(images_of() if callable(images_of) else images_of)

    volumes: list[LabelledVolume] = []
    seen: dict[str, int] = {}
    for number, row in read_csv_rows(path, check_header=check_columns):
        where = f"{path}, row {number}"
        labels = {name: _read_label(where, name, row[name]) for name in classes}
        known = {name: label for name, label in labels.items() if label is not None}
        case = (row.get("case") or "").strip()
        if "image" in columns:
            if not row["image"].strip():
                raise ValueError(f"{where}: expected the path of a volume as 'image', got an empty cell.")
            # As in manifests: absolute, and links stay.
            images: Sequence[str] = [os.path.abspath(path.parent / row["image"].strip())]  # noqa: PTH100
        else:
            images = images_of_cases.get(case, ())
            if not images:
                raise ValueError(f"{where}: its case is not among the {len(images_of_cases)} cases of the data.")
        for image in images:
            if image in seen:
                raise ValueError(f"{where}: its volume occurs a second time, first in row {seen[image]}.")
            seen[image] = number
            volumes.append(LabelledVolume(image, case or image, known))
    if not volumes:
        raise ValueError(f"{path}: expected rows with labels, got none.")
    spare = tuple(name for name in columns if name not in (*KEY_COLUMNS, *classes))
    return Labels(volumes, spare)


def _read_label(where: str, name: str, cell: str) -> int | None:
    values = {"": None, "0": 0, "0.0": 0, "1": 1, "1.0": 1}
    if cell.strip() not in values:
        raise ValueError(
            f"{where}: expected 1, 0 or an empty cell for {name!r}, got something else. Leave unknown ones empty."
        )
    return values[cell.strip()]


def images_by_case(samples: Any) -> dict[str, list[str]]:
    """The different volumes of each case of samples, for [`read_labels`]."""
    images: dict[str, dict[str, None]] = {}
    for case, image in zip(samples["case"], samples["image"]):
        images.setdefault(case, {})[image] = None
    return {case: list(found) for case, found in images.items()}


def run_zero_shot(
    model: Any,
    processor: Any,
    prompts: Sequence[ClassPrompts],
    labels: Labels,
    volumes: VolumeLoader,
    validation: Labels | None = None,
    rule: Rule | None = None,
    max_text_length: int = 512,
    batch_size: int = 16,
    show_progress: bool = False,
) -> ZeroShotResult:
    """
    Scores zero-shot classification.

    The vector of a class is the mean of the unit vectors of its prompts, made a unit vector again. Its logit for a volume is
    `exp(logit_scale) * <image, text> + logit_bias`, as in training, of which the rule makes a probability:

    - "sigmoid" takes the sigmoid of the logit of the positive prompts: only for a model with the sigmoid loss, where that is
      the probability that the two belong together. Negative prompts are not used.
    - "against negatives" is the softmax over positive and negative prompts.
    - "among classes" is the softmax over the positive prompts of all classes, for classes that exclude each other.

    The order of volumes, and so the AUROC, does not depend on scale and bias under the first two rules; what is above 0.5 does.
    Training on one match among many texts makes the sigmoid small for all: look at the threshold of a file for validation.

    Args:
        model ([`DCFormerSiglipModel`]):
            Used in evaluation mode; its mode is restored.
        processor ([`Med3DVLMProcessor`]):
            The model's processor.
        prompts (`Sequence[ClassPrompts]`):
            Of [`read_prompts`].
        labels ([`Labels`]):
            Of [`read_labels`].
        volumes ([`VolumeLoader`]):
            Loads the volumes.
        validation ([`Labels`], *optional*):
            Labels of other volumes, on which a threshold is chosen for each class.
        rule (`str`, *optional*):
            One of `RULES`. By default "sigmoid" for a model with the sigmoid loss; for one with the softmax loss "against
            negatives" if all classes have negative prompts, else "among classes".
        max_text_length (`int`, *optional*, defaults to 512):
            Most tokens of a prompt.
        batch_size (`int`, *optional*, defaults to 16):
            Volumes, or prompts, at a time.
        show_progress (`bool`, *optional*, defaults to `False`):
            Whether to show a progress bar.

    Returns:
        [`ZeroShotResult`]. A class with one kind of label alone has an AUROC of NaN and a reason; the mean is over the others,
        and its reason counts them.

    Raises:
        ValueError: the rule does not fit the model or the prompts, a prompt is too long, all volumes are of one case, a volume
            or case for validation is among those that are scored, or a vector is not finite.
    """
    if not prompts:
        raise ValueError("Expected prompts for at least one class, got none.")
    rule = _choose_rule(model, prompts, rule)
    scored = [volume.image for volume in labels.volumes]
    for_validation = [] if validation is None else [volume.image for volume in validation.volumes]
    if shared := set(scored) & set(for_validation):
        first = next(place for place, image in enumerate(scored, start=1) if image in shared)
        raise ValueError(
            f"{len(shared)} volumes are both for validation and scored, the first is volume {first} of those that are scored: remove "
            "them from one of the files."
        )
    cases = [volume.case for volume in labels.volumes]
    if validation is not None and (common := {volume.case for volume in validation.volumes} & set(cases)):
        first = next(place for place, case in enumerate(cases, start=1) if case in common)
        raise ValueError(
            f"{len(common)} cases are both for validation and scored, with other volumes, so that thresholds would be chosen on "
            f"patients that are scored, the first is that of volume {first} of those that are scored: remove them from one of the "
            "files."
        )
    other = _places_of_another_case(cases)

    was_training = model.training
    model.eval()
    try:
        class_embeds = embed_prompts(model, processor, prompts, max_text_length, batch_size)
        image_embeds = embed_volumes(model, [*scored, *for_validation], volumes, batch_size, show_progress)
    finally:
        model.train(was_training)
    for kind, vectors in zip(("prompts", "negative prompts", "volumes"), (*class_embeds, image_embeds)):
        if vectors is not None:
            check_finite(kind, vectors)
    probabilities = class_probabilities(model, image_embeds, *class_embeds, rule)
    given, chosen_on = probabilities[: len(scored)], probabilities[len(scored) :]

    rows = []
    for place, entry in enumerate(prompts):
        row = _score_class(entry.name, given[:, place], given[other, place], labels.volumes)
        if validation is not None:
            row = _add_threshold(row, given[:, place], labels.volumes, chosen_on[:, place], validation.volumes)
        rows.append(row)
    rows.append(_mean_of(rows))
    notes = [f"Probabilities: {RULE_TEXTS[rule]}."]
    if labels.columns_without_prompts:
        notes.append(f"Not scored, for want of prompts: {', '.join(labels.columns_without_prompts)}.")
    return ZeroShotResult(
        rule, rows, {entry.name: given[:, place].tolist() for place, entry in enumerate(prompts)}, notes
    )


def find_rule(name: str) -> Rule:
    """
    The rule of a name.

    Raises:
        ValueError: there is none.
    """
    for rule in RULES:
        if rule == name:
            return rule
    raise ValueError(f"Expected a rule out of {', '.join(map(repr, RULES))}, got {name!r}.")


def _choose_rule(model: Any, prompts: Sequence[ClassPrompts], rule: Rule | None) -> Rule:
    is_sigmoid = model.logit_bias is not None
    without = [entry.name for entry in prompts if not entry.negative]
    if rule is None:
        return "sigmoid" if is_sigmoid else "among classes" if without else "against negatives"
    rule = find_rule(rule)
    if rule == "sigmoid" and not is_sigmoid:
        raise ValueError(
            "The rule 'sigmoid' needs a model that was trained with the sigmoid loss. Choose 'against negatives' or "
            "'among classes'."
        )
    if rule == "against negatives" and without:
        raise ValueError(f"The rule 'against negatives' needs negative prompts; {', '.join(without)} have none.")
    if rule == "among classes" and len(prompts) < 2:
        raise ValueError("The rule 'among classes' needs at least two classes: the softmax of one is always 1.")
    return rule


@torch.inference_mode()
def embed_prompts(
    model: Any, processor: Any, prompts: Sequence[ClassPrompts], max_text_length: int = 512, batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Unit vectors of the positive and of the negative prompts of each class.

    Args:
        model, processor, prompts, max_text_length, batch_size:
            As for [`run_zero_shot`].

    Returns:
        Two `torch.Tensor` of shape `(num_classes, projection_dim)`, in float32 on the CPU; the second is `None` unless all
        classes have negative prompts.

    Raises:
        ValueError: a prompt has more than `max_text_length` tokens.
    """
    texts = list(dict.fromkeys(text for entry in prompts for text in (*entry.positive, *entry.negative)))
    vectors = dict(zip(texts, embed_texts(model, processor, texts, max_text_length, batch_size, kind="prompt")))

    def mean(chosen: tuple[str, ...]) -> torch.Tensor:
        return normalize(torch.stack([vectors[text] for text in chosen]).mean(dim=0), dim=-1)

    positive = torch.stack([mean(entry.positive) for entry in prompts])
    if not all(entry.negative for entry in prompts):
        return positive, None
    return positive, torch.stack([mean(entry.negative) for entry in prompts])


@torch.inference_mode()
def embed_volumes(
    model: Any, images: Sequence[str], volumes: VolumeLoader, batch_size: int = 16, show_progress: bool = False
) -> torch.Tensor:
    """
    Unit vectors of volumes.

    Args:
        model ([`DCFormerSiglipModel`]):
            In evaluation mode.
        images (`Sequence[str]`):
            Paths.
        volumes, batch_size, show_progress:
            As for [`run_zero_shot`].

    Returns:
        `torch.Tensor` of shape `(num_images, projection_dim)`, in float32 on the CPU.
    """
    embeds = []
    for start in tqdm(range(0, len(images), batch_size), desc="embedding", disable=not show_progress):
        batch = [{"volume": volumes.load(image)} for image in images[start : start + batch_size]]
        pixel_values = stack_volumes(batch).to(model.device, model.dtype)
        features = model.get_image_features(pixel_values, return_dict=True)
        embeds.append(normalize(features.pooler_output.float(), dim=-1).cpu())
    return torch.cat(embeds)


@torch.inference_mode()
def class_probabilities(
    model: Any, image_embeds: torch.Tensor, positive: torch.Tensor, negative: torch.Tensor | None, rule: Rule
) -> np.ndarray:
    """
    Probabilities of the classes.

    Args:
        model ([`DCFormerSiglipModel`]):
            Of which scale and bias are taken.
        image_embeds (`torch.Tensor` of shape `(num_images, projection_dim)`):
            Unit vectors.
        positive, negative (`torch.Tensor` of shape `(num_classes, projection_dim)`):
            Of [`embed_prompts`].
        rule (`str`):
            One of `RULES`, see [`run_zero_shot`].

    Returns:
        `np.ndarray` of shape `(num_images, num_classes)`, in float64: near 0 and 1 float32 would tie volumes that differ.
    """
    scale = model.logit_scale.double().exp().cpu()
    bias = 0.0 if model.logit_bias is None else model.logit_bias.double().cpu()
    images = image_embeds.double()
    logits = scale * images @ positive.double().T + bias
    if rule == "among classes":
        return logits.softmax(dim=1).numpy()
    if rule == "against negatives":
        assert negative is not None
        logits = logits - (scale * images @ negative.double().T + bias)
    return logits.sigmoid().numpy()


def _places_of_another_case(cases: Sequence[str]) -> np.ndarray:
    """For each volume the first one of the case half-way round, as in the blind control of answers."""
    first: dict[str, int] = {}
    for place, case in enumerate(cases):
        first.setdefault(case, place)
    names = list(first)
    if len(names) < 2:
        raise ValueError(f"Zero-shot classification needs volumes of at least two cases, got {len(names)}.")
    other = {name: first[next(from_half_way_round(names, turn))] for turn, name in enumerate(names)}
    return np.array([other[case] for case in cases])


def _known(name: str, volumes: Sequence[LabelledVolume]) -> tuple[np.ndarray, np.ndarray]:
    """Places of the volumes with a label, and the labels."""
    places = [place for place, volume in enumerate(volumes) if name in volume.labels]
    return np.array(places, dtype=int), np.array([volumes[place].labels[name] for place in places], dtype=int)


def _score_class(
    name: str, probabilities: np.ndarray, blind: np.ndarray, volumes: Sequence[LabelledVolume]
) -> ZeroShotScore:
    from sklearn.metrics import roc_auc_score

    places, truth = _known(name, volumes)
    given = probabilities[places]
    num_positive, num_negative = int(truth.sum()), int((truth == 0).sum())
    auroc = blind_auroc = low = high = math.nan
    reason = ""
    if num_positive and num_negative:
        auroc, blind_auroc = float(roc_auc_score(truth, given)), float(roc_auc_score(truth, blind[places]))
        low, high = auroc_interval(truth, given, [volumes[place].case for place in places])
    else:
        absent = "labels" if not len(truth) else "volume with 1" if not num_positive else "volume with 0"
        reason = f"No AUROC of {name!r}: no {absent} among {len(volumes)} volumes."
    f1, accuracy = _at_threshold(truth, given, THRESHOLD)
    return ZeroShotScore(
        name=name,
        auroc=auroc,
        low=low,
        high=high,
        blind_auroc=blind_auroc,
        f1=f1,
        accuracy=accuracy,
        num_positive=num_positive,
        num_negative=num_negative,
        num_unknown=len(volumes) - len(truth),
        reason=reason,
    )


def _at_threshold(truth: np.ndarray, given: np.ndarray, threshold: float) -> tuple[float, float]:
    """F1, NaN without positives, and accuracy, NaN without labels."""
    from sklearn.metrics import accuracy_score, f1_score

    said = (given >= threshold).astype(int)
    f1 = float(f1_score(truth, said, zero_division=0)) if truth.any() else math.nan
    return f1, float(accuracy_score(truth, said)) if len(truth) else math.nan


def _add_threshold(
    row: ZeroShotScore,
    given: np.ndarray,
    volumes: Sequence[LabelledVolume],
    validation_given: np.ndarray,
    validation_volumes: Sequence[LabelledVolume],
) -> ZeroShotScore:
    validation_places, validation_truth = _known(row.name, validation_volumes)
    threshold = best_threshold(validation_truth, validation_given[validation_places])
    if math.isnan(threshold):
        absent = f"No threshold for {row.name!r}: no volume with 1 among those for validation."
        return replace(row, reason=f"{row.reason} {absent}".strip())
    places, truth = _known(row.name, volumes)
    f1, accuracy = _at_threshold(truth, given[places], threshold)
    return replace(row, threshold=threshold, f1_at_threshold=f1, accuracy_at_threshold=accuracy)


def best_threshold(truth: np.ndarray, given: np.ndarray) -> float:
    """The lowest of the given values with the best F1 if all from it on are called positive; NaN without positives."""
    if not truth.any():
        return math.nan
    order = np.argsort(-given, kind="stable")
    values, hits = given[order], truth[order].cumsum()
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True))  # equal values are called the same
    f1 = 2 * hits[ends] / (ends + 1 + truth.sum())
    return float(values[ends[np.flatnonzero(f1 == f1.max())[-1]]])


def auroc_interval(
    truth: Sequence[int] | np.ndarray,
    given: Sequence[float] | np.ndarray,
    clusters: Sequence[Any],
    num_resamples: int = 2000,
) -> tuple[float, float]:
    """
    Percentile interval (95 %) of the AUROC, by resampling whole cases with replacement.

    An AUROC of exactly 0 or 1 is the same in each draw, however few cases there are. The interval's other end is then the exact
    bound of as many hits in a row as the rarer label has cases (Clopper and Pearson 1934), as in
    [`~train.evaluation.statistics.bootstrap_interval`].

    Args:
        truth (`Sequence[int]`):
            1 or 0 for each volume.
        given (`Sequence[float]`):
            Probabilities.
        clusters (`Sequence`):
            Case of each volume.
        num_resamples (`int`, *optional*, defaults to 2000):
            How often to draw. Draws without both labels have no AUROC and are left out.

    Returns:
        `tuple[float, float]`: the lower and the upper end; NaN if no draw has both labels, or there are fewer than two cases.
    """
    truth, given = np.asarray(truth), np.asarray(given, dtype=float)
    names: dict[Any, int] = {}
    rows = np.array([names.setdefault(name, len(names)) for name in clusters])
    if len(names) < 2:
        return math.nan, math.nan
    with_1, with_0 = (given[truth == label] for label in (1, 0))
    if len(with_1) and len(with_0) and (with_1.min() > with_0.max() or with_1.max() < with_0.min()):
        bound = 0.025 ** (1 / min(len(np.unique(rows[truth == label])) for label in (1, 0)))
        return (bound, 1.0) if with_1.min() > with_0.max() else (0.0, 1 - bound)
    order = np.argsort(given, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(given[order]) != 0))  # of equal values
    generator = np.random.default_rng(0)
    values: list[np.ndarray] = []
    for start in range(0, num_resamples, 100):  # in blocks: all draws at once would need gigabytes for large studies
        size = min(100, num_resamples - start)
        drawn = generator.multinomial(len(names), np.full(len(names), 1 / len(names)), size=size)
        weights = drawn[:, rows[order]].astype(float)
        positive, negative = (np.add.reduceat(weights * (truth[order] == label), starts, axis=1) for label in (1, 0))
        below = negative.cumsum(axis=1) - negative
        pairs = positive.sum(axis=1) * negative.sum(axis=1)
        wins = (positive * (below + 0.5 * negative)).sum(axis=1)
        values.append(wins[pairs > 0] / pairs[pairs > 0])
    drawn_values = np.concatenate(values)
    if not len(drawn_values):
        return math.nan, math.nan
    low, high = np.quantile(drawn_values, [0.025, 0.975])
    return float(low), float(high)


def _mean_of(rows: Sequence[ZeroShotScore]) -> ZeroShotScore:
    """Unweighted means over the classes that have a figure; their interval is not estimated."""

    def mean(values: Sequence[float | None]) -> float:
        known = [value for value in values if value is not None and not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    def mean_or_none(values: Sequence[float | None]) -> float | None:
        return None if all(value is None for value in values) else mean(values)

    without = [row.name for row in rows if row.reason]
    return ZeroShotScore(
        name=MEAN_OF_CLASSES,
        auroc=mean([row.auroc for row in rows]),
        low=math.nan,
        high=math.nan,
        blind_auroc=mean([row.blind_auroc for row in rows]),
        f1=mean([row.f1 for row in rows]),
        accuracy=mean([row.accuracy for row in rows]),
        num_positive=sum(row.num_positive for row in rows),
        num_negative=sum(row.num_negative for row in rows),
        num_unknown=sum(row.num_unknown for row in rows),
        f1_at_threshold=mean_or_none([row.f1_at_threshold for row in rows]),
        accuracy_at_threshold=mean_or_none([row.accuracy_at_threshold for row in rows]),
        reason=f"Means are over the classes that have the figure; {', '.join(without)} lack some." if without else "",
    )


def format_zero_shot(result: ZeroShotResult) -> str:
    """The scores as a Markdown table in percent, with the reasons and notes below."""
    has_threshold = any(score.f1_at_threshold is not None for score in result.scores)
    titles = ["class", "AUROC", "95 %", "blind", "F1", "accuracy"]
    titles += ["threshold", "F1 at it", "accuracy at it"] * has_threshold
    titles += ["with 1", "with 0", "unknown"]
    lines = [f"| {' | '.join(titles)} |", f"| --- |{' ---: |' * (len(titles) - 1)}"]
    for score in result.scores:
        interval = "" if math.isnan(score.low) else f"{100 * score.low:.1f} to {100 * score.high:.1f}"
        cells = [escape_cell(score.name), percent(score.auroc), interval, percent(score.blind_auroc)]
        cells += [percent(score.f1), percent(score.accuracy)]
        if has_threshold:
            cells += ["" if score.threshold is None else f"{score.threshold:.3g}"]
            cells += [percent(score.f1_at_threshold), percent(score.accuracy_at_threshold)]
        cells += [str(score.num_positive), str(score.num_negative), str(score.num_unknown)]
        lines.append(f"| {' | '.join(cells)} |")
    remarks = [*result.notes, "F1 and accuracy are at the threshold 0.5 unless it is given. Chance of AUROC is 50."]
    remarks += [score.reason for score in result.scores if score.reason]
    return "\n".join([*lines, "", *[f"- {remark}" for remark in remarks]])


__all__ = [
    "MEAN_OF_CLASSES",
    "PHANTOM_PROMPTS",
    "RULES",
    "ClassPrompts",
    "LabelledVolume",
    "Labels",
    "Rule",
    "ZeroShotResult",
    "ZeroShotScore",
    "auroc_interval",
    "best_threshold",
    "class_probabilities",
    "embed_prompts",
    "embed_volumes",
    "find_rule",
    "format_zero_shot",
    "images_by_case",
    "read_labels",
    "read_prompts",
    "run_zero_shot",
]
