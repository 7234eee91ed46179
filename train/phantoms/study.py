"""A study of phantoms in the layouts of M3D-Cap and M3D-VQA: scans, reports, and questions that a scan alone can answer."""

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from tqdm import tqdm

from ..data.layout import CAP_INDEX, CHOICE_LETTERS, PHANTOM_SETTINGS, VQA_COLUMNS, VQA_SPLITS, vqa_file
from ..files import write_atomically, write_json_lines
from ..processes import count_usable_cores, worker_pool
from .anatomy import (
    FACTORS,
    IN_PLANE_SPACING,
    KINDS,
    NOISE_HU,
    ORGANS,
    PARTS,
    PHASES,
    PLANES,
    SLICE_SPACING,
    PhantomFindings,
    draw_patient,
    scan_patient,
)


TRUTH_FILE = "phantoms.jsonl"
LABELS_FILE = "labels.csv"
# Counts up when the same settings would give other files.
GENERATOR_VERSION = 5

# The organ on the other side; liver and spleen stand for each other, so that each organ has exactly one.
PARTNERS = {
    "right lung": "left lung",
    "left lung": "right lung",
    "right kidney": "left kidney",
    "left kidney": "right kidney",
    "liver": "spleen",
    "spleen": "liver",
}
PHASE_TEXTS = dict(zip(PHASES, ("non-contrast", "arterial phase", "portal venous phase", "delayed phase")))
# Wordings by number of the question type, see `med3dvlm.train.data.samples.QUESTION_TYPES`.
WORDINGS: dict[int, tuple[str, ...]] = {
    1: (
        "In which plane was this scan acquired?",
        "What is the acquisition plane of this scan?",
        "In what plane do the slices of this volume lie?",
    ),
    2: (
        "In which contrast phase was this scan acquired?",
        "What is the contrast phase of this scan?",
        "Which phase of contrast enhancement does this volume show?",
    ),
    3: ("Which organ contains the lesion?", "In which organ is the lesion?", "Which organ is abnormal in this scan?"),
    4: (
        "What kind of lesion is present?",
        "What is the abnormality in this scan?",
        "Which lesion does this scan show?",
    ),
    5: ("Where is the lesion?", "Where is the abnormality located?", "What is the location of the lesion?"),
}
YES_NO_WORDINGS: dict[int, tuple[str, ...]] = {
    1: ("Is this {article} {plane} scan?", "Was this scan acquired in {article} {plane} plane?"),
    2: ("Is this {phase_scan}?", "Was {phase_scan} acquired?"),
    3: ("Is the lesion in the {organ}?", "Does the {organ} contain a lesion?"),
    4: ("Is there a {kind} in the {organ}?", "Does this scan show a {kind} of the {organ}?"),
    5: ("Is the lesion in the {part} part of the {organ}?", "Does the lesion lie in the {part} part of the {organ}?"),
}


@dataclass(frozen=True)
class QuestionPlan:
    """
    What the questions about one case offer, besides what follows from its findings.

    Args:
        letters (`dict[int, str]`): Letter of the right choice, by question type.
        distractors (`dict[int, tuple]`): The wrong levels among the choices; for locations, the other organ.
        asked (`dict[int, tuple]`): What the yes/no question of each type asks for: plane, phase, organ, (kind, organ),
            (part, organ), each in a tuple.
    """

    letters: dict[int, str]
    distractors: dict[int, tuple[str, ...]]
    asked: dict[int, tuple[str, ...]]


def write_study(
    destination: Path,
    num_cases: int,
    seed: int = 0,
    num_validation: int | None = None,
    num_test: int | None = None,
    in_plane_spacing: tuple[float, float] = IN_PLANE_SPACING,
    slice_spacing: tuple[float, float] = SLICE_SPACING,
    noise_hu: tuple[float, float] = NOISE_HU,
    num_workers: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Writes a study of phantoms in the layouts of M3D, one scan with one report and ten questions per case.

    ```
    destination/
        M3D_Cap_npy/M3D_Cap.json                                the splits: paths of scans and reports
        M3D_Cap_npy/phantom/000001/Axial_arterial.nii.gz        HU in int16, with its affine
        M3D_Cap_npy/phantom/000001/text.txt                     the report
        M3D-VQA/M3D_VQA_{train,val,test}.csv                    five questions per case, with choices A to D
        M3D-VQA/M3D_VQA_yn_{train,val,test}.csv                 five yes/no questions per case, their choices empty
        labels.csv                                              per case of the test split, which organ holds the lesion
        phantom.json                                            the settings
        phantoms.jsonl                                          per case the findings, and where the lesion lies
    ```

    The same settings give the same bytes, whatever the number of workers. A call that was interrupted is continued by the
    same call: scans that are complete are kept.

    Args:
        destination (`Path`): Folder of the study: new, empty, or begun with the same settings.
        num_cases (`int`): Cases of all splits together.
        seed (`int`, *optional*, defaults to 0): Seed of all draws.
        num_validation (`int`, *optional*): Cases for validation; one in twenty, at most 100, if not given.
        num_test (`int`, *optional*): Cases for the test; one in ten, at most 200, if not given.
        in_plane_spacing, slice_spacing (`tuple[float, float]`, *optional*): Lowest and highest spacing in mm.
        noise_hu (`tuple[float, float]`, *optional*): Lowest and highest standard deviation of the noise in HU.
        num_workers (`int`, *optional*): Processes; as many as this process may use cores, if not given.
        progress (`bool`, *optional*, defaults to `True`): Whether to show a progress bar on stderr.

    Returns:
        `dict` with `destination`, `settings`, `num_cases` by split, `num_made` and `num_kept` scans, `num_reports`
        different reports, and `num_bytes` of the scans.

    Raises:
        FileExistsError: the folder holds something else, or a study with other settings.
        ValueError: a setting has a value that cannot be.

    Example:

    ```python
    >>> summary = write_study(Path("phantoms"), num_cases=400, seed=0)
    >>> summary["num_cases"]
    {'train': 340, 'validation': 20, 'test': 40}
    ```"""
    destination = Path(destination)
    num_validation = min(100, num_cases // 20) if num_validation is None else num_validation
    num_test = min(200, num_cases // 10) if num_test is None else num_test
    settings = {
        "generator_version": GENERATOR_VERSION,
        "num_cases": num_cases,
        "num_validation": num_validation,
        "num_test": num_test,
        "seed": seed,
        "in_plane_spacing": list(in_plane_spacing),
        "slice_spacing": list(slice_spacing),
        "noise_hu": list(noise_hu),
    }
    check_settings(settings)
    if num_workers is not None and num_workers < 1:
        raise ValueError(f"`num_workers` must be at least 1, got {num_workers}.")
    claim_destination(destination, settings)

    sizes = {"train": num_cases - num_validation - num_test, "validation": num_validation, "test": num_test}
    findings: list[PhantomFindings] = []
    plans: list[QuestionPlan] = []
    splits: list[str] = []
    for number, (split, size) in enumerate(sizes.items()):
        generator = np.random.default_rng([seed, 0, number])
        of_split = draw_findings(size, generator)
        findings += of_split
        plans += plan_questions(of_split, generator)
        splits += [split] * size

    make = partial(
        make_case,
        destination,
        seed,
        in_plane_spacing=in_plane_spacing,
        slice_spacing=slice_spacing,
        noise_hu=noise_hu,
    )
    num_workers = min(num_workers or count_usable_cores(), num_cases)
    cases: list[dict[str, Any]] = [{}] * num_cases
    with tqdm(total=num_cases, desc="phantoms", unit="case", disable=not progress) as bar:
        for index, case in _in_parallel(make, findings, num_workers):
            cases[index] = case
            bar.update()

    write_lists(destination, findings, plans, splits, cases, seed)
    return {
        "destination": str(destination),
        "settings": settings,
        "num_cases": sizes,
        "num_made": sum(case["made"] for case in cases),
        "num_kept": sum(not case["made"] for case in cases),
        "num_reports": len({write_report(entry) for entry in findings}),
        "num_bytes": sum(case["bytes"] for case in cases),
    }


def check_settings(settings: dict[str, Any]) -> None:
    """
    Checks the settings of a study.

    Raises:
        ValueError: a setting has a value that cannot be.
    """
    for name in ("num_cases", "num_validation", "num_test", "seed"):
        value, least = settings[name], int(name == "num_cases")
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
    held_out = settings["num_validation"] + settings["num_test"]
    if held_out >= settings["num_cases"]:
        raise ValueError(
            f"{settings['num_validation']} cases for validation and {settings['num_test']} for the test leave none of "
            f"{settings['num_cases']} for training: ask for more cases, or for fewer of these."
        )
    for name, lowest in (("in_plane_spacing", 0.5), ("slice_spacing", 0.5), ("noise_hu", 0.0)):
        value = settings[name]
        if len(value) != 2 or not lowest <= value[0] <= value[1] < float("inf"):
            raise ValueError(f"`{name}` must be two numbers of at least {lowest:g}, the lower first, got {value!r}.")


def claim_destination(destination: Path, settings: dict[str, Any]) -> None:
    """
    Writes the settings into a new or empty folder, or compares them with those of the study in it.

    Raises:
        FileExistsError: the folder holds something else, or a study with other settings.
    """
    path = destination / PHANTOM_SETTINGS
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        names = sorted(settings.keys() | found.keys())
        other = [
            f"{name} {found.get(name)!r} instead of {settings.get(name)!r}"
            for name in names
            if found.get(name) != settings.get(name)
        ]
        if other:
            raise FileExistsError(
                f"{destination} holds phantoms made with other settings ({', '.join(other)}): ask for the same, choose "
                "another folder, or delete this one."
            )
    elif destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(
            f"Expected a new or empty folder, or one with phantoms, got {destination}, which holds something else: choose "
            "another folder."
        )
    else:
        write_atomically(_as_json(settings), path)


def draw_findings(count: int, generator: np.random.Generator) -> list[PhantomFindings]:
    """
    Draws the findings of a split so that every level of every factor, and every pair of levels of two factors, comes as
    nearly equally often as the number of cases allows. No finding tells another.

    Args:
        count (`int`): Number of cases.
        generator (`np.random.Generator`): Source of the draws.

    Returns:
        `list[PhantomFindings]`.
    """
    combinations = list(itertools.product(*FACTORS.values()))
    chosen = list(range(len(combinations))) * (count // len(combinations))
    chosen += _choose_evenly(count % len(combinations), generator)
    return [PhantomFindings(*combinations[chosen[place]]) for place in generator.permutation(count)]


def _choose_evenly(count: int, generator: np.random.Generator) -> list[int]:
    """Some of all combinations of levels, each time one whose pairs of levels came least often so far."""
    numbers = [len(levels) for levels in FACTORS.values()]
    levels = np.array(list(itertools.product(*map(range, numbers))))  # (combinations, factors)
    pairs = []
    for first, second in itertools.combinations(range(len(numbers)), 2):
        cells = numbers[first] * numbers[second]
        pairs.append((levels[:, first] * numbers[second] + levels[:, second], cells))
    burden = np.zeros(len(levels))
    chosen: list[int] = []
    for _ in range(count):
        best = np.flatnonzero(burden <= burden.min() + 1e-9)
        combination = int(generator.choice(best))
        chosen.append(combination)
        for cell_of, cells in pairs:
            burden[cell_of == cell_of[combination]] += cells  # a pair in many cells comes seldom, and weighs more
        burden[combination] = np.inf
    return chosen


def plan_questions(findings: Sequence[PhantomFindings], generator: np.random.Generator) -> list[QuestionPlan]:
    """
    Draws letters, wrong choices and what the yes/no questions ask for, evenly for each right answer: a level is as often
    a right choice as its share of the choices, a letter is right in a quarter of the cases, and half of the yes/no
    questions of each type have the answer yes, whatever they ask for.

    Args:
        findings (`Sequence[PhantomFindings]`): Findings of the cases of one split.
        generator (`np.random.Generator`): Source of the draws.

    Returns:
        `list[QuestionPlan]`, one per case.
    """
    plans = [QuestionPlan({}, {}, {}) for _ in findings]
    for question_type, levels in ((1, PLANES), (2, PHASES), (3, ORGANS), (4, KINDS), (5, ORGANS)):
        factor = {1: "plane", 2: "phase", 3: "organ", 4: "kind", 5: "organ"}[question_type]
        # Within a level of the answer, the cases are in random order, so each may get the next of an even sequence.
        for level in levels:
            members = [index for index, entry in enumerate(findings) if getattr(entry, factor) == level]
            others = tuple(other for other in levels if other != level)
            sets: Sequence[tuple[str, ...]]
            if question_type == 5:
                partner = PARTNERS[level]
                sets = [(partner,)] * 4 + [(other,) for other in others if other != partner]
            else:
                sets = list(itertools.combinations(others, 3))
            for index, distractors in zip(members, _evenly(sets, len(members), generator)):
                plans[index].distractors[question_type] = distractors
            for index, letter in zip(members, _evenly(CHOICE_LETTERS, len(members), generator)):
                plans[index].letters[question_type] = letter
            is_yes = _evenly((True, False), len(members), generator)
            for index, yes in zip(members, is_yes):
                plans[index].asked[question_type] = _draw_asked(question_type, findings[index], yes, generator)
    return plans


def _draw_asked(
    question_type: int, findings: PhantomFindings, yes: bool, generator: np.random.Generator
) -> tuple[str, ...]:
    """What a yes/no question asks for. A wrong one of two things is wrong in one of them, either as often."""
    truth = _truth(question_type, findings)
    if yes:
        return truth
    factors = {1: (PLANES,), 2: (PHASES,), 3: (ORGANS,), 4: (KINDS, ORGANS), 5: (PARTS, ORGANS)}[question_type]
    place = int(generator.integers(len(factors)))
    others = [level for level in factors[place] if level != truth[place]]
    if factors[place] is ORGANS and generator.random() < 0.5:
        others = [PARTNERS[truth[place]]]
    wrong = others[int(generator.integers(len(others)))]
    return (*truth[:place], wrong, *truth[place + 1 :])


def _truth(question_type: int, findings: PhantomFindings) -> tuple[str, ...]:
    return {
        1: (findings.plane,),
        2: (findings.phase,),
        3: (findings.organ,),
        4: (findings.kind, findings.organ),
        5: (findings.part, findings.organ),
    }[question_type]


def make_questions(
    findings: PhantomFindings, generator: np.random.Generator, plan: QuestionPlan | None = None
) -> list[dict[str, Any]]:
    """
    Ten questions about one case: for each type one with choices and one to be answered with yes or no.

    Args:
        findings (`PhantomFindings`): Findings of the case.
        generator (`np.random.Generator`): Draws the wording, and the order of the wrong choices.
        plan (`QuestionPlan`, *optional*): What the questions offer; drawn for this case alone if not given.

    Returns:
        `list` of rows with the columns `Question Type`, `Question`, `Choice A` to `Choice D`, `Answer` and `Answer
        Choice` of M3D-VQA. The choices of a yes/no question, and its `Answer Choice`, are empty.

    Example:

    ```python
    >>> findings = PhantomFindings("axial", "arterial", "liver", "upper", "cyst", "small")
    >>> make_questions(findings, np.random.default_rng(0))[2]["Answer"]
    'liver'
    ```"""
    if plan is None:
        plan = plan_questions([findings], generator)[0]
    rows: list[dict[str, Any]] = []
    for question_type in WORDINGS:
        answer, wrong = _answers(question_type, findings, plan.distractors[question_type])
        choices = [wrong[place] for place in generator.permutation(3)]
        letter = plan.letters[question_type]
        choices.insert(CHOICE_LETTERS.index(letter), answer)
        row: dict[str, Any] = {"Question Type": question_type, "Question": _pick(WORDINGS[question_type], generator)}
        row |= {f"Choice {name}": choice for name, choice in zip(CHOICE_LETTERS, choices)}
        rows.append({**row, "Answer": answer, "Answer Choice": letter})
    for question_type, wordings in YES_NO_WORDINGS.items():
        asked = plan.asked[question_type]
        question = _pick(wordings, generator).format(**_words(question_type, asked))
        row = {"Question Type": question_type, "Question": question}
        row |= dict.fromkeys((f"Choice {name}" for name in CHOICE_LETTERS), "")
        answer = "Yes" if asked == _truth(question_type, findings) else "No"
        rows.append({**row, "Answer": answer, "Answer Choice": ""})
    return rows


def _answers(question_type: int, findings: PhantomFindings, distractors: tuple[str, ...]) -> tuple[str, list[str]]:
    """The text of the right choice, and those of the three wrong ones."""
    if question_type == 5:
        places = [(part, organ) for organ in (findings.organ, *distractors) for part in PARTS]
        right = (findings.part, findings.organ)
        return _place(*right), [_place(*place) for place in places if place != right]
    (right_level,) = _truth(question_type, findings)[:1]
    texts = PHASE_TEXTS if question_type == 2 else {}
    return texts.get(right_level, right_level), [texts.get(level, level) for level in distractors]


def _place(part: str, organ: str) -> str:
    return f"{part} part of the {organ}"


def _words(question_type: int, asked: tuple[str, ...]) -> dict[str, str]:
    """What fills the wording of a yes/no question."""
    if question_type == 1:
        return {"plane": asked[0], "article": "an" if asked[0][0] in "aeiou" else "a"}
    if question_type == 2:
        if asked[0] == "non-contrast":
            return {"phase_scan": "a non-contrast scan"}
        return {"phase_scan": f"{'an' if asked[0][0] in 'aeiou' else 'a'} {PHASE_TEXTS[asked[0]]} scan"}
    if question_type == 3:
        return {"organ": asked[0]}
    return {"kind" if question_type == 4 else "part": asked[0], "organ": asked[1]}


def write_report(findings: PhantomFindings) -> str:
    """
    The report of a phantom, in fixed words: equal findings have equal reports, and different ones different.

    Args:
        findings (`PhantomFindings`): What it shows.

    Returns:
        `str`, one line.

    Example:

    ```python
    >>> write_report(PhantomFindings("axial", "arterial", "liver", "upper", "cyst", "small"))
    'Axial scan, arterial phase. Small cyst of the liver, upper part.'
    ```"""
    technique = f"{findings.plane.capitalize()} scan, {PHASE_TEXTS[findings.phase]}."
    return f"{technique} {findings.size.capitalize()} {findings.kind} of the {findings.organ}, {findings.part} part."


def make_case(
    destination: Path,
    seed: int,
    index: int,
    findings: PhantomFindings,
    in_plane_spacing: tuple[float, float],
    slice_spacing: tuple[float, float],
    noise_hu: tuple[float, float],
) -> dict[str, Any]:
    """
    Writes the scan and the report of one case, unless both are there. Depends on the seed, the index and the settings of
    the scan alone.

    Returns:
        `dict` with `made` (whether the scan was made), `bytes` (size of the scan's file), and the lesion's `centre` (RAS+
        mm), `diameter` (mm) and `hu`.
    """
    generator = np.random.default_rng([seed, 1, index])
    patient = draw_patient(findings, generator)
    assert patient.lesion is not None
    scan, report = (destination / path for path in paths_of_case(index, findings))
    made = not (scan.exists() and report.exists())
    if made:
        voxels, affine = scan_patient(
            patient, findings.plane, generator, in_plane_spacing, slice_spacing, noise_hu=noise_hu
        )
        write_atomically(write_report(findings).encode() + b"\n", report)
        write_atomically(encode_nifti(voxels, affine), scan)
    return {
        "made": made,
        "bytes": scan.stat().st_size,
        "centre": [round(value, 3) for value in patient.lesion.shape.centre],
        "diameter": round(patient.lesion.diameter, 3),
        "hu": round(patient.lesion.hu, 3),
    }


def paths_of_case(index: int, findings: PhantomFindings) -> tuple[str, str]:
    """Paths of the scan and the report of a case, counted from 0, relative to the study."""
    folder = f"M3D_Cap_npy/phantom/{index + 1:06d}"
    series = f"{findings.plane.capitalize()}_{findings.phase.replace('-', '_').replace(' ', '_')}"
    return f"{folder}/{series}.nii.gz", f"{folder}/text.txt"


def encode_nifti(voxels: np.ndarray, affine: np.ndarray) -> bytes:
    """A `.nii.gz` file with known orientation (codes of sform and qform 1, scanner) and lengths in mm."""
    image = nibabel.Nifti1Image(voxels, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm")
    # Without a time stamp, so that equal scans are equal files. Noise does not compress: the fastest level is as good.
    return gzip.compress(image.to_bytes(), compresslevel=1, mtime=0)


def write_lists(
    destination: Path,
    findings: Sequence[PhantomFindings],
    plans: Sequence[QuestionPlan],
    splits: Sequence[str],
    cases: Sequence[dict[str, Any]],
    seed: int,
) -> None:
    """Writes what lists the cases: `M3D_Cap.json`, the files of questions, the labels, and last the ground truth."""
    entries: dict[str, list[dict[str, str]]] = {split: [] for split in VQA_SPLITS}
    questions: dict[str, list[dict[str, Any]]] = {
        vqa_file(split, task): [] for split in VQA_SPLITS for task in ("closed_vqa", "yes_no_vqa")
    }
    truth = []
    for index, (of_case, plan, split, case) in enumerate(zip(findings, plans, splits, cases)):
        scan, report = paths_of_case(index, of_case)
        entries[split].append({"image": scan, "text": report})
        for row in make_questions(of_case, np.random.default_rng([seed, 2, index]), plan):
            task = "closed_vqa" if row["Answer Choice"] else "yes_no_vqa"
            questions[vqa_file(split, task)].append({"Image Path": scan, "Text": report, **row})
        lesion = {f"lesion_{name}": case[name] for name in ("centre", "diameter", "hu")}
        truth.append({"case": f"phantom/{index + 1:06d}", "split": split, "image": scan, **asdict(of_case), **lesion})
    write_atomically(_as_json(entries), destination / CAP_INDEX)
    for file, rows in questions.items():
        write_atomically(_as_csv(rows, VQA_COLUMNS), destination / file)
    write_labels(truth, destination / LABELS_FILE)
    write_json_lines(truth, destination / TRUTH_FILE)


def write_labels(truth: Sequence[Mapping[str, Any]], destination: Path, split: str = "test") -> None:
    """
    Writes labels for zero-shot classification: which organ of each phantom of a split holds the lesion, as 1 and 0.

    Args:
        truth (`Sequence`): Lines of `phantoms.jsonl`.
        destination (`Path`): CSV file. Its paths are those of `truth`, relative to the folder of the study.
        split (`str`, *optional*, defaults to `"test"`): Split of the phantoms.
    """
    columns = ("image", "case", *ORGANS)
    rows = [
        {"image": line["image"], "case": line["case"], **{organ: int(line["organ"] == organ) for organ in ORGANS}}
        for line in truth
        if line["split"] == split
    ]
    write_atomically(_as_csv(rows, columns), destination)


def _in_parallel(make: Any, findings: Sequence[PhantomFindings], num_workers: int) -> Iterator[tuple[int, Any]]:
    """Results of `make(index, findings)` with their index, as they come."""
    if num_workers == 1:
        for index, entry in enumerate(findings):
            yield index, make(index, entry)
        return
    chunk = max(1, min(16, len(findings) // (4 * num_workers)))
    with worker_pool(num_workers) as pool:
        futures = [
            pool.submit(_make_chunk, make, start, list(findings[start : start + chunk]))
            for start in range(0, len(findings), chunk)
        ]
        for future in as_completed(futures):
            yield from future.result()


def _make_chunk(make: Any, start: int, findings: list[PhantomFindings]) -> list[tuple[int, Any]]:
    return [(index, make(index, entry)) for index, entry in enumerate(findings, start=start)]


def _evenly(options: Sequence[Any], count: int, generator: np.random.Generator) -> list[Any]:
    """As many options as asked for, in random order, each as often as the others or once more."""
    drawn: list[Any] = []
    while len(drawn) < count:
        drawn += [options[place] for place in generator.permutation(len(options))]
    return drawn[:count]


def _pick(wordings: Sequence[str], generator: np.random.Generator) -> str:
    return wordings[int(generator.integers(len(wordings)))]


def _as_json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _as_csv(rows: list[dict[str, Any]], columns: Sequence[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


__all__ = ["PhantomFindings", "QuestionPlan", "make_questions", "write_labels", "write_report", "write_study"]
