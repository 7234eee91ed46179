"""Users' own manifests: what a row gives, what is refused, and that messages keep patient data to themselves."""

import csv
import json
import logging
import os
from pathlib import Path

import datasets
import m3d_layout as layout
import nibabel
import numpy as np
import pytest

from med3dvlm.train.data.check import check_study
from med3dvlm.train.data.manifest import read_manifest, write_example_manifest
from med3dvlm.train.data.samples import SAMPLE_FEATURES


SECRET = "Jane Doe 1950"


@pytest.fixture
def folder(tmp_path):
    layout.write_volume(tmp_path / "scans/a.nii.gz", seed=0)
    layout.write_volume(tmp_path / "scans/b.nii.gz", seed=1)
    return tmp_path


def write_csv(folder, *rows):
    path = folder / "manifest.csv"
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_jsonl(folder, *rows):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


QUESTION = {"image": "scans/a.nii.gz", "question": "Which organ?", "answer": "liver"}
CHOICES = ["liver", "spleen", "None", "NA"]


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_a_row_gives_a_report_and_a_question(folder, write):
    row = {**QUESTION, "report": " A cyst. ", "question_type": "organ", "case": "p1", "split": "val"}
    dataset = read_manifest(write(folder, row, {"image": str(folder / "scans/b.nii.gz"), "report": "None"}))
    assert dataset.features == SAMPLE_FEATURES
    image = str(folder / "scans/a.nii.gz")
    report = {"image": image, "case": "p1", "task": "report", "question": "", "choices": [], "answer": "A cyst."}
    assert dataset[0] == {**report, "answer_choice": "", "question_type": 0}
    question = {**report, "task": "open_vqa", "question": "Which organ?", "answer": "liver", "answer_choice": ""}
    assert dataset[1] == {**question, "question_type": 3}
    assert dataset[2]["case"] == dataset[2]["image"] == str(folder / "scans/b.nii.gz")
    assert dataset[2]["answer"] == "None"
    assert len(read_manifest(folder / f"manifest.{'csv' if write is write_csv else 'jsonl'}", "validation")) == 2


@pytest.mark.parametrize(
    "cells",
    [
        {"choices": json.dumps(CHOICES), "answer_choice": "A", "answer": ""},
        {"choices": "liver | spleen|None|NA"},
        {"choice_a": "liver", "choice_b": "spleen", "choice_c": "None", "choice_d": "NA", "answer_choice": " a"},
    ],
)
def test_choices_have_three_forms_and_letter_or_text_may_be_left_out(folder, cells):
    for path in (write_csv(folder, {**QUESTION, **cells}), write_jsonl(folder, {**QUESTION, **cells})):
        (sample,) = read_manifest(path)
        assert sample["task"] == "closed_vqa"
        assert sample["choices"] == CHOICES
        assert (sample["answer"], sample["answer_choice"]) == ("liver", "A")


def test_json_lines_take_lists_numbers_and_null(folder):
    row = {**QUESTION, "choices": CHOICES, "question_type": 3, "report": None, "split": None}
    (sample,) = read_manifest(write_jsonl(folder, row))
    assert (sample["choices"], sample["question_type"], sample["task"]) == (CHOICES, 3, "closed_vqa")


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_question_types_may_be_whole_floats(folder, write):
    assert read_manifest(write(folder, {**QUESTION, "question_type": 3.0}))[0]["question_type"] == 3
    with pytest.raises(ValueError, match="row .: expected a question type out of 1 plane"):
        read_manifest(write(folder, {**QUESTION, "question_type": 3.5}))


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_a_manifest_that_is_not_utf8_is_refused(folder, write):
    path = write(folder, {**QUESTION, "answer": "lesion"})
    path.write_bytes(path.read_bytes().replace(b"lesion", "Läsion".encode("latin-1")))
    with pytest.raises(ValueError, match=rf"{path.name} is not UTF-8 text \(.*\)\. Save it as UTF-8"):
        read_manifest(path)


def test_half_a_character_is_named_by_its_line(folder):
    path = write_jsonl(folder, QUESTION, {**QUESTION, "answer": "cyst"})
    path.write_text(path.read_text().replace("cyst", r"cyst \ud83d"))
    with pytest.raises(ValueError, match="2.*half of a character"):
        read_manifest(path)


@pytest.mark.parametrize("answer, task", [("Yes", "yes_no_vqa"), ("no.", "yes_no_vqa"), ("Yes, a cyst", "open_vqa")])
def test_yes_or_no_makes_a_yes_no_question(folder, answer, task):
    assert read_manifest(write_csv(folder, {**QUESTION, "answer": answer}))[0]["task"] == task


def test_splits(folder):
    rows = [{**QUESTION, "split": split} for split in ("train", "validation", "val", "test", "", "Train")]
    path = write_csv(folder, *rows)
    counts = {split: len(read_manifest(path, split)) for split in ("train", "validation", "test", None)}
    assert counts == {"train": 2, "validation": 2, "test": 1, None: 6}
    assert len(list(read_manifest(path, "train", streaming=True))) == 2
    with pytest.raises(ValueError, match="no rows of the split test. It has train"):
        read_manifest(write_csv(folder, rows[0]), "test")
    with pytest.raises(
        ValueError, match="no rows of the split test. It has no splits: add a column `split`; in Python"
    ):
        read_manifest(write_csv(folder, QUESTION), "test")
    with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'dev'"):
        read_manifest(path, "dev")


@pytest.mark.parametrize("write", [write_csv, write_jsonl])
def test_rows_without_a_split_among_others_are_told_of(folder, write, caplog):
    rows = [{**QUESTION, "case": SECRET, "split": split} for split in ("train", "", "test", *[""] * 6)]
    path = write(folder, *rows)
    for split in ("train", "test"):
        assert len(read_manifest(path, split)) == 1
    first = 3 if write is write_csv else 2
    named = ", ".join(f"row {number}" for number in (first, *range(first + 2, first + 6)))
    (record,) = caplog.records  # once for all that reads it
    assert (
        f"7 of the 9 rows name no split and are left out wherever one is asked for: {named} and 2 more"
        in record.message
    )
    assert SECRET not in caplog.text
    caplog.clear()
    assert len(read_manifest(path)) == 9
    read_manifest(write(folder, rows[0]), "train")
    read_manifest(write(folder, rows[1]))
    assert not caplog.records


@pytest.mark.parametrize(
    "header, separator",
    [
        ("image;report", "semicolons"),
        ('"image";"report"', "semicolons"),
        ("\ufeffimage\treport", "tabs"),
        ("sep=;", "semicolons"),
    ],
)
def test_other_separators_than_commas_are_told_of_before_any_row(folder, header, separator):
    path = folder / "manifest.csv"
    sign = ";" if separator == "semicolons" else "\t"
    path.write_text(f"{header}\nscans/a.nii.gz{sign}{SECRET}, 3,5 cm\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"header: expected commas between the columns, got {separator}") as error:
        read_manifest(path)
    assert SECRET not in str(error.value)
    (problem,) = check_study(path).problems
    assert problem.kind == "invalid_file" and problem.severity == "error" and separator in problem.reason


def test_blanks_after_commas_and_empty_rows_of_spreadsheets_do_not_matter(folder):
    path = folder / "manifest.csv"
    lines = ["image, report, split", 'scans/a.nii.gz, "abc", train', 'scans/b.nii.gz, "abc, def", train', ",,", " ,,,"]
    path.write_text("\n".join(lines) + "\n")
    dataset = read_manifest(path, "train")
    assert dataset["answer"][:] == ["abc", "abc, def"]


def test_columns_are_checked_before_any_row(folder):
    path = folder / "manifest.csv"
    for content, message in (("image,raport\na,b,c\n", "Did you mean 'report'"), ("report\n", "no column 'image'")):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"manifest.csv, header: .*{message}"):
            read_manifest(path)


@pytest.mark.parametrize("line_break", ["\r\n", "\r", "\n"])
def test_line_breaks_of_other_systems_are_not_learnt(folder, line_break):
    text = line_break.join(["A cyst.", "No stone."])
    row = {**QUESTION, "report": text, "question": text, "answer": text}
    in_columns = {"choice_a": text, "choice_b": "b", "choice_c": "c", "choice_d": "d"}
    path = write_csv(folder, {**row, **in_columns})
    (folder / "with_mark.csv").write_bytes(path.read_bytes().decode().encode("utf-8-sig"))
    in_list = write_csv(folder, {**row, "choices": json.dumps([text, *"bcd"])})
    for path in (in_list, folder / "with_mark.csv", write_jsonl(folder, {**row, "choices": [text, *"bcd"]})):
        report, question = read_manifest(path)
        assert report["answer"] == question["question"] == question["answer"] == "A cyst.\nNo stone."
        assert question["choices"] == ["A cyst.\nNo stone.", "b", "c", "d"]


def test_a_table_without_rows_is_not_told_to_have_splits(folder):
    path = folder / "manifest.csv"
    path.write_text("image,report,split\n")
    with pytest.raises(ValueError, match=r"manifest\.csv has no rows\.$"):
        read_manifest(path, "train")


@pytest.mark.parametrize(
    "cells, message",
    [
        ({"answer_choice": "A"}, "has an 'answer_choice' and no choices"),
        ({"choices": "a|b|c"}, "expected four choices, A to D, got 3"),
        ({"choices": "a|b||d"}, "expected four choices, A to D, got 3"),
        ({"choices": "a|b|c|d"}, "the text of one choice, got one that is the text of 0"),
        ({"choices": "a|b|c|d", "answer": ""}, "neither 'answer', .*, nor 'answer_choice', its letter, is filled in"),
        ({"choices": "liver|b|liver|d"}, "the text of one choice, got one that is the text of 2"),
        ({"choices": "a|liver|c|d", "answer_choice": "A"}, "'answer' is not the text of the choice A"),
        ({"choices": "liver|b|c|d", "answer_choice": SECRET}, "A to D, got something else"),
        ({"choices": "[liver"}, "'choices' starts like a JSON list but is not valid JSON"),
        ({"choices": "[1, 2, 3, 4]"}, "expected a list of texts as 'choices'"),
        ({"question_type": SECRET}, "expected a question type out of 1 plane, .*, got something else"),
        ({"split": SECRET}, "expected a split out of train, validation, test, val or none"),
        ({"image": ""}, "expected the path of a scan as 'image', got an empty cell"),
    ],
)
def test_bad_rows_are_named_and_not_quoted(folder, cells, message):
    path = write_csv(folder, QUESTION, {**QUESTION, "report": SECRET, **cells})
    with pytest.raises(ValueError, match=f"manifest.csv, row 3: .*{message}") as error:
        read_manifest(path)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"raport": ""}, "unknown column 'raport'. Did you mean 'report'\\? Known ones: image, case"),
        ({"Question": ""}, "unknown column 'Question'. Did you mean 'question'"),
        ({"xyz": ""}, "unknown column 'xyz'. Known ones"),
        ({"choices": "", "choice_a": ""}, "expected 'choices' or 'choice_a' to 'choice_d', got both"),
    ],
)
def test_unknown_columns_are_refused_with_the_nearest_one(folder, row, message):
    for path in (write_csv(folder, {**QUESTION, **row}), write_jsonl(folder, {**QUESTION, **row})):
        with pytest.raises(ValueError, match=message):
            read_manifest(path)


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "manifest.jsonl, line 1, is not valid JSON"),
        ("[1]", "line 1: expected an object such as"),
        ('{"image": "a", "answer": true}', "row 1: expected text as 'answer', got bool. Put it in quotes"),
        ('{"image": "a", "choices": {"A": "b"}}', "expected a list of texts as 'choices'"),
        ('{"report": "a"}', "there is no column 'image'"),
    ],
)
def test_bad_json_lines_are_refused(folder, line, message):
    path = folder / "manifest.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=message):
        read_manifest(path)


def test_header_is_checked_behind_blank_lines_and_other_endings_are_refused(folder):
    path = folder / "manifest.csv"
    path.write_text("image,raport\n\nscans/a.nii.gz,x\n")
    with pytest.raises(ValueError, match="Did you mean 'report'"):
        read_manifest(path)
    with pytest.raises(ValueError, match="ends in .csv or .jsonl, got '.xlsx'"):
        read_manifest(folder / "manifest.xlsx")
    for name in ("no.csv", "no.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"There is no file .*{name}"):
            read_manifest(folder / name)


def test_missing_scans_are_counted_by_row(folder):
    path = write_csv(folder, QUESTION, {**QUESTION, "image": f"scans/{SECRET}.nii"})
    with pytest.raises(FileNotFoundError, match="1 of the 2 scans in .*manifest.csv do not exist: row 3. ") as error:
        read_manifest(path)
    assert SECRET not in str(error.value)
    assert len(read_manifest(path, check_files=False)) == 2


@pytest.mark.skipif(os.sep == "\\", reason="backslashes separate folders there")
def test_backslashes_in_missing_paths_are_told_of(folder):
    path = write_csv(folder, {**QUESTION, "image": rf"scans\{SECRET}.nii.gz"})
    with pytest.raises(FileNotFoundError, match="do not exist: row 2. .*; backslashes, .*: write / instead") as error:
        read_manifest(path)
    assert SECRET not in str(error.value)
    (problem,) = check_study(path).problems
    assert problem.kind == "missing_volume" and problem.reason.endswith("write / instead")
    with pytest.raises(FileNotFoundError) as error:
        read_manifest(write_csv(folder, {**QUESTION, "image": "scans/no.nii.gz"}))
    assert "backslashes," not in str(error.value)


@pytest.mark.parametrize("cells", [{"answer": ""}, {"question": ""}, {"question": "", "answer": ""}])
def test_incomplete_rows_are_left_out_only_when_allowed(folder, cells, caplog):
    path = write_csv(folder, {**QUESTION, "case": SECRET}, {**QUESTION, "case": SECRET, **cells})
    with pytest.raises(
        ValueError,
        match="1 empty texts in .*manifest.csv: row 3.*take them out; in Python, `skip_empty.*, in a recipe data\\.skip_broken=true",
    ):
        read_manifest(path)
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        assert len(read_manifest(path, skip_empty=True)) == 1
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert "row 3" in caplog.text and "liver" not in caplog.text and SECRET not in caplog.text


@pytest.mark.parametrize("answer", [{}, {"answer": "kidney"}, {"answer": "", "answer_choice": "B"}])
def test_rows_that_lack_a_choice_are_left_out_only_when_allowed(answer, folder):
    path = write_csv(
        folder, {**QUESTION, "choices": "liver|spleen|a|b"}, {**QUESTION, "choices": "liver||a|b", **answer}
    )
    message = "expected four choices, A to D, got 3"
    with pytest.raises(ValueError, match=f"row 3: {message}.*data.skip_broken=true"):
        read_manifest(path)
    left_out = []
    assert len(read_manifest(path, skip_empty=True, left_out=left_out)) == 1
    assert [(row["row"], row["column"]) for row in left_out] == [("row 3", "choices")]
    (problem,) = check_study(path).problems
    assert problem.severity == "error" and message in problem.reason


def test_the_example_is_five_sound_cases(tmp_path):
    manifest = write_example_manifest(tmp_path / "example")
    dataset = read_manifest(manifest)
    assert len(set(dataset["case"])) == len(set(dataset["image"])) == 5
    assert set(dataset["task"]) == {"report", "open_vqa", "closed_vqa", "yes_no_vqa"}
    report = check_study(manifest, num_workers=1)
    assert report.problems == [] and report.volumes == "scans"
    assert report.num_samples["train"]["report"] == 4 and report.num_samples["validation"]["report"] == 1
    images = [nibabel.load(path) for path in dict.fromkeys(dataset["image"])]
    assert len({"".join(nibabel.aff2axcodes(image.affine)) for image in images}) == 5
    assert len({image.header.get_zooms() for image in images}) == 5
    assert dataset.cast_column("image", datasets.Nifti())[0]["image"].shape == (24, 32, 28)
    with pytest.raises(FileExistsError, match="is not empty"):
        write_example_manifest(tmp_path / "example")


@pytest.mark.parametrize("number, is_right", [(2, True), (3, False)])
def test_the_nodules_of_the_example_lie_on_the_side_the_report_names(tmp_path, number, is_right):
    manifest = write_example_manifest(tmp_path / "example")
    dataset = read_manifest(manifest)
    report = next(s["answer"] for s in dataset if Path(s["image"]).name == f"scan_{number}.nii.gz")
    assert ("right lung" in report) == is_right
    image = nibabel.as_closest_canonical(nibabel.load(tmp_path / f"example/scan_{number}.nii.gz"))
    voxels = np.asarray(image.dataobj)  # the first axis grows to the patient's right
    # A nodule is soft tissue in the middle of a lung, which otherwise is air.
    right, left = voxels[17, 16, 19], voxels[6, 16, 19]
    assert (right > -100) == is_right and (left > -100) == (not is_right)
    assert voxels[:, 0, :].max() < -900  # air in front of the patient
