"""The studies of phantoms: layout, balance, what a blind reader can gain, and that a call can be repeated and continued."""

import csv
import hashlib
import itertools
import json
import multiprocessing
from collections import Counter
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from med3dvlm.train.data.layout import CHOICE_LETTERS, VQA_COLUMNS
from med3dvlm.train.phantoms import study
from med3dvlm.train.phantoms.anatomy import FACTORS, KINDS, ORGANS, PHASES, PhantomFindings
from med3dvlm.train.phantoms.study import draw_findings, make_questions, plan_questions, write_report, write_study


# Coarse voxels, so that a scan takes a few milliseconds.
COARSE: dict[str, Any] = {"in_plane_spacing": (12.0, 16.0), "slice_spacing": (24.0, 30.0)}
SETTINGS: dict[str, Any] = {
    "num_cases": 14,
    "seed": 3,
    "num_validation": 2,
    "num_test": 4,
    "progress": False,
    **COARSE,
}


def digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def read_rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == VQA_COLUMNS
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("phantoms")
    write_study(destination, num_workers=1, **SETTINGS)
    return destination


@pytest.fixture(scope="module")
def many() -> tuple[list[PhantomFindings], list[dict[str, Any]]]:
    """A large split, and its questions."""
    generator = np.random.default_rng(0)
    findings = draw_findings(1000, generator)
    plans = plan_questions(findings, generator)
    return findings, [row for entry, plan in zip(findings, plans) for row in make_questions(entry, generator, plan)]


def test_layout_is_that_of_m3d(folder: Path) -> None:
    entries = json.loads((folder / "M3D_Cap_npy" / "M3D_Cap.json").read_text())
    assert {split: len(listed) for split, listed in entries.items()} == {"train": 8, "validation": 2, "test": 4}
    truth = [json.loads(line) for line in (folder / "phantoms.jsonl").read_text().splitlines()]
    assert len(truth) == 14
    for case in truth:
        entry = next(e for e in entries[case["split"]] if e["image"] == case["image"])
        assert entry["text"] == f"M3D_Cap_npy/{case['case']}/text.txt"
        findings = PhantomFindings(**{name: case[name] for name in FACTORS})
        assert (folder / entry["text"]).read_text().strip() == write_report(findings)
        image = nibabel.load(folder / entry["image"])
        assert image.get_data_dtype() == np.int16 and image.header.get_xyzt_units()[0] == "mm"
        assert int(image.header["sform_code"]) == int(image.header["qform_code"]) == 1
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-3)
        place = np.rint(np.linalg.solve(image.affine, [*case["lesion_centre"], 1])[:3])
        assert np.all((place >= 0) & (place < image.shape))
    for split, name in (("train", "train"), ("validation", "val"), ("test", "test")):
        listed = {entry["image"] for entry in entries[split]}
        for path in (f"M3D_VQA_{name}.csv", f"M3D_VQA_yn_{name}.csv"):
            rows = read_rows(folder / "M3D-VQA" / path)
            assert len(rows) == 5 * len(listed) and {row["Image Path"] for row in rows} == listed
            assert Counter(row["Question Type"] for row in rows) == dict.fromkeys("12345", len(listed))
    assert not list(folder.rglob(".*"))  # no temporary file is left


def test_rows_of_both_files_are_consistent(folder: Path) -> None:
    for row in read_rows(folder / "M3D-VQA" / "M3D_VQA_train.csv"):
        choices = [row[f"Choice {letter}"] for letter in CHOICE_LETTERS]
        assert len(set(choices)) == 4 and row[f"Choice {row['Answer Choice']}"] == row["Answer"]
    for row in read_rows(folder / "M3D-VQA" / "M3D_VQA_yn_train.csv"):
        assert row["Answer"] in ("Yes", "No") and row["Answer Choice"] == ""
        assert {row[f"Choice {letter}"] for letter in CHOICE_LETTERS} == {""}


def test_labels_say_which_organ_of_each_test_case_holds_the_lesion(folder: Path) -> None:
    truth = [json.loads(line) for line in (folder / "phantoms.jsonl").read_text().splitlines()]
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    expected = {case["image"]: case for case in truth if case["split"] == "test"}
    assert len(rows) == 4 and {row["image"] for row in rows} == set(expected)
    for row in rows:
        case = expected[row["image"]]
        assert (folder / row["image"]).is_file() and row["case"] == case["case"]
        assert [organ for organ in ORGANS if row[organ] == "1"] == [case["organ"]]
        assert {row[organ] for organ in ORGANS} == {"0", "1"}


def test_splits_share_no_case(folder: Path) -> None:
    entries = json.loads((folder / "M3D_Cap_npy" / "M3D_Cap.json").read_text())
    cases = {split: {Path(entry["image"]).parent for entry in listed} for split, listed in entries.items()}
    assert all(not cases[a] & cases[b] for a, b in itertools.combinations(cases, 2))


def test_the_number_of_processes_changes_no_byte(folder: Path, tmp_path: Path) -> None:
    summary = write_study(tmp_path, num_workers=2, **SETTINGS)
    assert summary["num_made"] == 14 and summary["num_cases"] == {"train": 8, "validation": 2, "test": 4}
    assert digests(tmp_path) == digests(folder)
    assert not multiprocessing.active_children()


def test_another_seed_gives_other_phantoms(folder: Path, tmp_path: Path) -> None:
    write_study(tmp_path, num_workers=1, **(SETTINGS | {"seed": 4}))
    assert digests(tmp_path).keys() & digests(folder).keys() and digests(tmp_path) != digests(folder)


def test_an_interrupted_study_is_continued(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = study.scan_patient
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    monkeypatch.setattr(study, "scan_patient", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_study(tmp_path, num_workers=1, **SETTINGS)
    assert not (tmp_path / "phantoms.jsonl").exists()
    kept = digests(tmp_path)
    summary = write_study(tmp_path, num_workers=1, **SETTINGS)
    assert (summary["num_kept"], summary["num_made"]) == (5, 9)
    assert kept.items() <= digests(tmp_path).items() and digests(tmp_path) == digests(folder)


def test_a_deleted_case_alone_is_made_again(folder: Path, tmp_path: Path) -> None:
    write_study(tmp_path, num_workers=1, **SETTINGS)
    next((tmp_path / "M3D_Cap_npy" / "phantom" / "000007").glob("*.nii.gz")).unlink()
    summary = write_study(tmp_path, num_workers=1, **SETTINGS)
    assert (summary["num_kept"], summary["num_made"]) == (13, 1)
    assert digests(tmp_path) == digests(folder)


def test_a_study_with_other_settings_is_refused(folder: Path) -> None:
    before = digests(folder)
    with pytest.raises(FileExistsError, match=r"other settings \(num_cases 14 instead of 15, seed 3 instead of 5\)"):
        write_study(folder, num_workers=1, **(SETTINGS | {"num_cases": 15, "seed": 5}))
    assert digests(folder) == before


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds something else"):
        write_study(tmp_path, num_workers=1, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_cases": 0}, "`num_cases` must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "`seed` must be a whole number of at least 0, got -1"),
        ({"num_test": 12}, "2 cases for validation and 12 for the test leave none of 14 for training"),
        ({"noise_hu": (9.0, 3.0)}, r"`noise_hu` must be two numbers of at least 0, the lower first"),
        ({"slice_spacing": (0.0, 3.0)}, r"`slice_spacing` must be two numbers of at least 0.5"),
        ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        write_study(tmp_path / "new", **(SETTINGS | change))
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("count", [40, 200, 1536 + 300])
def test_levels_and_pairs_of_levels_come_equally_often(count: int) -> None:
    findings = draw_findings(count, np.random.default_rng(count))
    assert len(findings) == count
    for name, levels in FACTORS.items():
        counts = Counter(getattr(entry, name) for entry in findings)
        assert max(counts[level] for level in levels) - min(counts[level] for level in levels) <= 2, name
    for first, second in itertools.combinations(FACTORS, 2):
        counts = Counter((getattr(entry, first), getattr(entry, second)) for entry in findings)
        pairs = list(itertools.product(FACTORS[first], FACTORS[second]))
        assert max(counts[pair] for pair in pairs) - min(counts[pair] for pair in pairs) <= 4, (first, second)


def test_right_letters_are_balanced_for_each_type(many: Any) -> None:
    _, rows = many
    for question_type in range(1, 6):
        counts = Counter(
            row["Answer Choice"] for row in rows if row["Question Type"] == question_type and row["Answer Choice"]
        )
        assert set(counts) == set(CHOICE_LETTERS) and max(counts.values()) - min(counts.values()) <= 12


def test_each_choice_is_right_in_a_quarter_of_the_questions_that_offer_it(many: Any) -> None:
    _, rows = many
    for question_type in range(1, 6):
        closed = [row for row in rows if row["Question Type"] == question_type and row["Answer Choice"]]
        offered = Counter(row[f"Choice {letter}"] for row in closed for letter in CHOICE_LETTERS)
        right = Counter(row["Answer"] for row in closed)
        assert set(offered) == set(right)
        for choice, count in offered.items():
            assert right[choice] / count == pytest.approx(0.25, abs=0.045), (question_type, choice)


def test_two_organs_offered_as_locations_are_right_equally_often(many: Any) -> None:
    """Else the pair would tell the organ. Half of the pairs are an organ and its partner on the other side."""
    _, rows = many
    answers: dict[frozenset[str], Counter[str]] = {}
    for row in (row for row in rows if row["Question Type"] == 5 and row["Answer Choice"]):
        organs = frozenset(row[f"Choice {letter}"].partition(" of the ")[2] for letter in CHOICE_LETTERS)
        assert len(organs) == 2
        answers.setdefault(organs, Counter())[row["Answer"].partition(" of the ")[2]] += 1
    assert set(answers) == {frozenset(pair) for pair in itertools.combinations(ORGANS, 2)}
    for organs, counts in answers.items():
        assert abs(np.subtract(*(counts[organ] for organ in organs))) <= 6, (organs, counts)
    partners = sum(
        counts.total() for organs, counts in answers.items() if frozenset(map(study.PARTNERS.get, organs)) == organs
    )
    assert partners / 1000 == pytest.approx(0.5, abs=0.03)


def test_answers_to_yes_no_questions_are_balanced_whatever_is_asked(many: Any) -> None:
    _, rows = many
    yes_no = [row for row in rows if not row["Answer Choice"]]
    for question_type in range(1, 6):
        counts = Counter(row["Answer"] for row in yes_no if row["Question Type"] == question_type)
        assert abs(counts["Yes"] - counts["No"]) <= 8
    asked = {
        1: ("axial", "coronal", "sagittal", "oblique"),
        2: PHASES,
        3: ORGANS,
        4: (*KINDS, *ORGANS),
        5: (*ORGANS, "upper", "lower"),
    }
    for question_type, words in asked.items():
        for word in words:
            answers = [r["Answer"] for r in yes_no if r["Question Type"] == question_type and word in r["Question"]]
            assert np.mean([answer == "Yes" for answer in answers]) == pytest.approx(0.5, abs=0.1), (
                question_type,
                word,
            )


def test_a_blind_reader_who_learnt_the_training_split_stays_near_chance() -> None:
    """Guesses from question and choices: what was right most often among such choices, or such letters, in training."""
    splits = []
    for seed, count in ((0, 2000), (1, 600)):
        generator = np.random.default_rng(seed)
        findings = draw_findings(count, generator)
        plans = plan_questions(findings, generator)
        splits.append([r for f, p in zip(findings, plans) for r in make_questions(f, generator, p)])
    train, test = splits
    for question_type in range(1, 6):
        closed = [[r for r in rows if r["Question Type"] == question_type and r["Answer Choice"]] for rows in splits]
        by_text, by_wording = Counter(), Counter()
        for row in closed[0]:
            by_text[row["Answer"]] += 1
            by_wording[row["Question"], row["Answer Choice"]] += 1
        for row in closed[0]:
            choices = frozenset(row[f"Choice {letter}"] for letter in CHOICE_LETTERS)
            by_wording[choices, row["Answer"]] += 1
        hits = np.zeros(3)
        for row in closed[1]:
            choices = {letter: row[f"Choice {letter}"] for letter in CHOICE_LETTERS}
            offered = frozenset(choices.values())
            hits[0] += max(choices.values(), key=by_text.__getitem__) == row["Answer"]
            hits[1] += max(CHOICE_LETTERS, key=lambda x: by_wording[row["Question"], x]) == row["Answer Choice"]
            hits[2] += max(choices.values(), key=lambda x: by_wording[offered, x]) == row["Answer"]
        assert np.all(hits / len(closed[1]) < 0.31), (question_type, hits / len(closed[1]))
        yes_no = [
            [r for r in rows if r["Question Type"] == question_type and not r["Answer Choice"]] for rows in splits
        ]
        yes = Counter({r["Question"]: 0 for r in yes_no[0]})
        for row in yes_no[0]:
            yes[row["Question"]] += 1 if row["Answer"] == "Yes" else -1
        hit = np.mean([(yes[row["Question"]] > 0) == (row["Answer"] == "Yes") for row in yes_no[1]])
        assert hit < 0.57, (question_type, hit)
    assert {row["Question"] for row in train} >= {row["Question"] for row in test if row["Answer Choice"]}


def test_the_training_split_of_the_demonstration_has_each_report_at_least_twice() -> None:
    """So that a report which is right in every word need not be a new one: what is unseen is the scan."""
    counts = Counter(write_report(entry) for entry in draw_findings(4100, np.random.default_rng([0, 0, 0])))
    assert len(counts) == np.prod([len(levels) for levels in FACTORS.values()]) == 1536
    assert min(counts.values()) == 2


def test_equal_findings_have_equal_reports_and_others_others() -> None:
    reports = {}
    for levels in itertools.product(*FACTORS.values()):
        findings = PhantomFindings(*levels)
        assert write_report(findings) == write_report(PhantomFindings(*levels))
        reports[write_report(findings)] = findings
    assert len(reports) == 4 * 4 * 6 * 2 * 4 * 2
    assert not any("\n" in report or ":" in report.replace("Impression:", "") for report in reports)


def test_questions_of_one_case_need_no_plan() -> None:
    findings = PhantomFindings("oblique", "non-contrast", "left kidney", "lower", "fat-containing lesion", "small")
    rows = make_questions(findings, np.random.default_rng(0))
    answers = ["oblique", "non-contrast", "left kidney", "fat-containing lesion", "lower part of the left kidney"]
    assert [row["Answer"] for row in rows[:5]] == answers
    assert all(row["Answer"] in ("Yes", "No") for row in rows[5:]) and len(rows) == 10
    assert rows == make_questions(findings, np.random.default_rng(0))
