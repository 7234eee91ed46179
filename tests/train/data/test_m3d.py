"""Readers of M3D-Cap and M3D-VQA: every field, the reference's own rows, and what is refused."""

import json
import logging
import pickle
import re
import sys
from pathlib import Path

import datasets
import m3d_layout as layout
import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "goldens"))
import make_slices

from med3dvlm.train.data.m3d import read_csv_rows, read_m3d_cap, read_m3d_cap_raw, read_m3d_vqa
from med3dvlm.train.data.samples import SAMPLE_FEATURES


GOLDENS = Path(__file__).parents[2] / "goldens"


@pytest.fixture
def root(tmp_path):
    layout.write_cap(tmp_path, {"train": ["1", "2"], "validation": ["3"], "test": ["4"]})
    return tmp_path


def test_reports_come_out_with_their_features(root):
    dataset = read_m3d_cap(root, "train")
    assert dataset.features == SAMPLE_FEATURES
    assert dataset["case"][:] == ["ct_case/1", "ct_case/1", "ct_case/2", "ct_case/2"]
    assert dataset[1] == {
        "image": str(root / "M3D_Cap_npy/ct_case/1/Sagittal.nii.gz"),
        "case": "ct_case/1",
        "task": "report",
        "question": "",
        "choices": [],
        "answer": "Findings of 1.",
        "answer_choice": "",
        "question_type": 0,
    }
    assert len(read_m3d_cap(root, "validation")) == len(read_m3d_cap(root, "test")) == 2


def test_relative_root_gives_absolute_paths(root, monkeypatch):
    monkeypatch.chdir(root.parent)
    image = read_m3d_cap(root.name, "test")[0]["image"]
    assert image == str(root / "M3D_Cap_npy/ct_case/4/Axial.nii.gz")


def test_npy_in_a_path_means_the_nifti_file(tmp_path):
    layout.write_cap(tmp_path, {"train": ["1"]}, ending=".npy")
    layout.write_vqa(tmp_path, "M3D_VQA_train.csv", [layout.vqa_row(Image_Path="M3D_Cap_npy/ct_case/1/Axial.npy")])
    for dataset in (read_m3d_cap(tmp_path, "train"), read_m3d_vqa(tmp_path, "train")):
        assert dataset[0]["image"] == str(tmp_path / "M3D_Cap_npy/ct_case/1/Axial.nii.gz")
        assert dataset[0]["case"] == "ct_case/1"


def test_volumes_are_decoded_lazily_where_wanted(root):
    dataset = read_m3d_cap(root, "train").cast_column("image", datasets.Nifti())
    image = dataset[0]["image"]
    assert not image.in_memory
    assert image.shape == layout.SHAPE
    expected = np.random.default_rng(3).random(layout.SHAPE, dtype=np.float32)  # case 1, axial
    np.testing.assert_array_equal(np.asarray(image.dataobj), expected)


def test_streaming_gives_the_same_samples_in_shards(root):
    layout.write_vqa(root, "M3D_VQA_val.csv", [layout.vqa_row(Question=f"{i}?") for i in range(90)])
    for read, count in ((read_m3d_cap, 2), (read_m3d_vqa, 64)):
        streamed = read(root, "validation", streaming=True)
        assert isinstance(streamed, datasets.IterableDataset)
        assert streamed.num_shards == count
        assert list(streamed) == list(read(root, "validation"))
        assert list(pickle.loads(pickle.dumps(streamed))) == list(streamed)


def test_rows_equal_the_reference(tmp_path):
    golden = json.loads((GOLDENS / "dataset.json").read_text())
    rows = [{**row, "Image Path": "v.nii.gz"} for row in golden["inputs"]["csv_rows"]]
    layout.write_volume(tmp_path / "v.nii.gz")
    for name in ("M3D_VQA_test.csv", "M3D_VQA_yn_test.csv"):
        layout.write_vqa(tmp_path, name, rows)
    tasks = {"vqa_closed": "closed_vqa", "vqa_open": "open_vqa", "vqa_yn": "yes_no_vqa"}
    for golden_name, task in tasks.items():
        for index, sample in enumerate(read_m3d_vqa(tmp_path, "test", [task])):
            item = golden["items"][f"pad_is_eos/{golden_name}/{index}"]
            question, answer = sample["question"], sample["answer"]
            if task == "closed_vqa":
                letters = zip("ABCD", sample["choices"])
                question += " Choices: " + " ".join(f"{letter}. {choice}" for letter, choice in letters)
                answer = f"{sample['answer_choice']}. {answer}"
                assert sample["answer_choice"] == item["answer_choice"]
            assert item["question"] == "<im_patch>" * 4 + " " + question
            assert item["answer"] == answer
            assert sample["question_type"] == item["question_type"]


def test_each_row_gives_a_sample_per_task_and_cells_stay_text(root):
    rows = [layout.vqa_row(), layout.vqa_row(Answer="None", Answer_Choice="C", Question='Is it, or "not"?\nSay.')]
    layout.write_vqa(root, "M3D_VQA_train.csv", rows)
    layout.write_vqa(root, "M3D_VQA_yn_train.csv", [layout.vqa_row(Question="Air?", Answer="No", Question_Type=4)])
    dataset = read_m3d_vqa(root, "train", ("open_vqa", "closed_vqa", "yes_no_vqa"))
    assert dataset["task"][:] == ["open_vqa", "closed_vqa"] * 2 + ["yes_no_vqa"]
    assert dataset[3]["choices"] == ["liver", "spleen", "None", "NA"]
    assert (dataset[3]["answer"], dataset[3]["answer_choice"]) == ("None", "C")
    assert dataset[3]["question"] == 'Is it, or "not"?\nSay.'
    assert (dataset[2]["choices"], dataset[2]["answer_choice"]) == ([], "")
    assert (dataset[4]["answer"], dataset[4]["question_type"], dataset[4]["choices"]) == ("No", 4, [])


def test_a_closed_question_without_a_choice_is_left_out_and_the_open_one_stays(root):
    rows = [layout.vqa_row(), layout.vqa_row(Choice_C="", Question_Type="3.0")]
    layout.write_vqa(root, "M3D_VQA_train.csv", rows)
    left_out = []
    dataset = read_m3d_vqa(root, "train", skip_empty=True, left_out=left_out)
    assert dataset["task"][:] == ["closed_vqa", "open_vqa", "open_vqa"] and dataset["question_type"][:] == [3, 3, 3]
    expected = {"source": "M3D-VQA", "row": "M3D_VQA_train.csv, row 3", "column": "choices", "reason": "empty text"}
    assert left_out == [expected]


def test_line_breaks_of_windows_become_plain_ones(root):
    path = layout.write_vqa(root, "M3D_VQA_train.csv", [layout.vqa_row(Question="One\ntwo?"), layout.vqa_row()])
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert read_m3d_vqa(root, "train", ["open_vqa"])["question"][:] == ["One\ntwo?", "Which organ?"]


def test_yes_no_files_need_no_choices(root):
    columns = ("Image Path", "Question Type", "Question", "Answer")
    layout.write_vqa(root, "M3D_VQA_yn_train.csv", [layout.vqa_row(Answer="Yes")], columns)
    assert read_m3d_vqa(root, "train", ["yes_no_vqa"])[0]["answer"] == "Yes"


def test_missing_yes_no_file_says_what_was_published(root):
    with pytest.raises(
        FileNotFoundError, match="M3D_VQA_yn_val.csv. M3D publishes yes/no questions for the split train"
    ):
        read_m3d_vqa(root, "validation", ["yes_no_vqa"])


@pytest.mark.parametrize(
    "cells, message",
    [
        ({"Question_Type": 6}, r"M3D_VQA_train.csv, row 3: expected a question type out of 1 plane, .*, got '6'"),
        ({"Answer_Choice": "E"}, r"M3D_VQA_train.csv, row 3: expected the letter .* A to D, got 'E'"),
        ({"Answer_Choice": ""}, r"row 3: expected the letter .* A to D, got ''"),
        ({"Image_Path": " "}, r"row 3: expected the path of a volume as Image Path, got an empty cell"),
        ({"Answer": " "}, r"1 empty texts in .*M3D-VQA: M3D_VQA_train.csv, row 3 \(answer\).*`skip_empty=True`"),
        ({"Question": ""}, r"M3D_VQA_train.csv, row 3 \(question\)"),
        ({"Choice_C": " "}, r"1 empty texts in .*: M3D_VQA_train.csv, row 3 \(choices\)"),
        ({"Question_Type": "3.5"}, r"row 3: expected a question type out of .*, got '3.5'"),
    ],
)
def test_bad_rows_are_named(root, cells, message):
    layout.write_vqa(root, "M3D_VQA_train.csv", [layout.vqa_row(), layout.vqa_row(**cells)])
    with pytest.raises(ValueError, match=message):
        read_m3d_vqa(root, "train", ["closed_vqa"])


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "Image Path,Question,Answer\n",
            "lacks the columns Question Type, Choice A, .*Its columns: Image Path, Question",
        ),
        ("", "lacks the columns Image Path, .*Its columns: none"),
        (",".join(layout.VQA_COLUMNS) + "\na,b,c\n", "row 2: expected 10 cells as in the header, got 3"),
        (",".join(layout.VQA_COLUMNS) + '\na,"b" c\n', "line 2, is not valid CSV: .* each one in it doubled"),
        (",".join((*layout.VQA_COLUMNS, "Answer")) + "\n", "names columns twice: Answer"),
        (",".join(layout.VQA_COLUMNS) + "\n", "holds no samples"),
        (";".join(layout.VQA_COLUMNS) + "\na;b\n", "M3D_VQA_train.csv, header: expected commas .*, got semicolons"),
    ],
)
def test_bad_tables_are_refused(root, content, message):
    path = layout.write_vqa(root, "M3D_VQA_train.csv", [])
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        read_m3d_vqa(root, "train")


def test_empty_columns_beside_a_table_and_semicolons_within_names_do_not_matter(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('case,"effusion; left; right",,\n1,0,,\n')
    assert list(read_csv_rows(path)) == [(2, {"case": "1", "effusion; left; right": "0"})]
    path.write_text("case,liver,\n1,0,x\n")
    with pytest.raises(ValueError, match="row 2: has a text in a column without a name"):
        list(read_csv_rows(path))


def test_a_table_that_is_not_utf8_is_refused(root):
    path = layout.write_vqa(root, "M3D_VQA_train.csv", [])
    path.write_bytes(path.read_bytes() + "Läsion".encode("latin-1"))
    with pytest.raises(ValueError, match="M3D_VQA_train.csv is not UTF-8 text"):
        read_m3d_vqa(root, "train")


def test_a_cell_may_be_longer_than_python_takes_by_itself(root):
    layout.write_vqa(root, "M3D_VQA_train.csv", [layout.vqa_row(Answer="spleen " * 30_000)])
    assert len(read_m3d_vqa(root, "train", ["open_vqa"])[0]["answer"]) == 7 * 30_000 - 1


def test_empty_texts_are_left_out_only_when_allowed(root, caplog):
    for case in ("1", "2"):
        (root / f"M3D_Cap_npy/ct_case/{case}/text.txt").write_text(" \n" if case == "2" else "Fine.")
    with pytest.raises(ValueError, match=r'2 empty texts in .*M3D_Cap.json: "train"\[2\] \(report\), "train"\[3\]'):
        read_m3d_cap(root, "train")
    logging.getLogger("transformers").addHandler(caplog.handler)
    try:
        dataset = read_m3d_cap(root, "train", skip_empty=True)
    finally:
        logging.getLogger("transformers").removeHandler(caplog.handler)
    assert dataset["case"][:] == ["ct_case/1"] * 2
    assert "2 empty texts" in caplog.text and '"train"[2] (report)' in caplog.text and "left out" in caplog.text


def test_what_is_left_out_is_told_by_its_place(root):
    (root / "M3D_Cap_npy/ct_case/1/text.txt").unlink()
    (root / "M3D_Cap_npy/ct_case/2/text.txt").write_text(" ")
    layout.write_vqa(root, "M3D_VQA_train.csv", [layout.vqa_row(), layout.vqa_row(Question="")])
    with pytest.raises(FileNotFoundError, match=r"1 of the 2 reports .* set data\.skip_broken=true in the recipe"):
        read_m3d_cap(root, "train")
    rows = []
    with pytest.raises(ValueError, match="holds no samples"):
        read_m3d_cap(root, "train", skip_empty=True, left_out=rows)
    assert len(read_m3d_vqa(root, "train", skip_empty=True, left_out=rows)) == 2
    cap, vqa = {"source": "M3D_Cap.json", "column": "report"}, {"source": "M3D-VQA", "column": "question"}
    assert rows[:3] == [
        {**cap, "row": '"train"[0]', "reason": "there is no such file"},
        {**cap, "row": '"train"[1]', "reason": "there is no such file"},
        {**cap, "row": '"train"[2]', "reason": "empty text"},
    ]
    assert rows[4:] == [{**vqa, "row": "M3D_VQA_train.csv, row 3", "reason": "empty text"}] * 2  # of each task


def test_all_missing_files_are_counted_and_a_few_named(root):
    cases = [str(number) for number in range(10, 18)]
    layout.write_cap(root, {"train": ["1", *cases]})
    for case in cases:
        (root / f"M3D_Cap_npy/ct_case/{case}/Axial.nii.gz").unlink()
    with pytest.raises(
        FileNotFoundError,
        match=r"8 of the 18 volumes .*/10/Axial.nii.gz, .* and 3 more.*m3d-cap.*data\.skip_broken=true",
    ):
        read_m3d_cap(root, "train")
    assert len(read_m3d_cap(root, "train", check_files=False)) == 18
    (root / "M3D_Cap_npy/ct_case/10/text.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 9 reports .*ct_case/10/text.txt"):
        read_m3d_cap(root, "train")


def test_unreadable_report_is_named(root):
    (root / "M3D_Cap_npy/ct_case/2/text.txt").write_bytes("Läsion".encode("latin-1"))
    with pytest.raises(ValueError, match=r"ct_case/2/text.txt is not UTF-8 text .* at byte 1\)"):
        read_m3d_cap(root, "train")


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "M3D_Cap.json is not valid JSON"),
        ("[]", r"expected an object with the lists train, validation, test, got no \"train\" in list"),
        ('{"validation": []}', r'got no "train" in validation'),
        ('{"train": [{"image": "a"}]}', r'"train"\[0\]: expected .*"text": path.*got .*"image": "a"'),
        ('{"train": []}', "holds no samples"),
    ],
)
def test_bad_index_is_refused(root, content, message):
    (root / "M3D_Cap_npy/M3D_Cap.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_m3d_cap(root, "train")


@pytest.mark.parametrize("tasks", ["open_vqa", [], ["report"], ["open_vqa", "open_vqa"]])
def test_unknown_tasks_are_refused(root, tasks):
    with pytest.raises(ValueError, match="`tasks` must be a list of some of closed_vqa, open_vqa, yes_no_vqa"):
        read_m3d_vqa(root, "train", tasks)


def test_unknown_splits_and_missing_files_are_refused(root, tmp_path):
    for read in (read_m3d_cap, read_m3d_vqa):
        with pytest.raises(ValueError, match="`split` must be one of train, validation, test, got 'val'"):
            read(root, "val")
    with pytest.raises(FileNotFoundError, match="M3D_VQA_test.csv"):
        read_m3d_vqa(root, "test")
    with pytest.raises(FileNotFoundError, match="There is no file .*M3D_Cap.json. Expected the folder that holds"):
        read_m3d_cap(tmp_path / "nowhere", "test")


def write_raw_case(folder, series=("Axial", "Coronal"), text="study_findings: A cyst in the liver."):
    for index, name in enumerate(series):
        for number in (10, 2):
            path = folder / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((6, 5), 20 * number + index, np.uint8)).save(path)
    (folder / "text.txt").write_text(text)


def test_raw_case_folders_give_a_sample_per_series(tmp_path):
    write_raw_case(tmp_path / "ct_case/000006")
    write_raw_case(tmp_path / "ct_case/000002", series=("Axial",))
    dataset = read_m3d_cap_raw(tmp_path)
    assert dataset.features == SAMPLE_FEATURES
    assert dataset["case"][:] == ["ct_case/000002", "ct_case/000006", "ct_case/000006"]
    assert dataset["image"][:] == [
        str(tmp_path / "ct_case" / name) for name in ("000002/Axial", "000006/Axial", "000006/Coronal")
    ]
    assert set(dataset["answer"]) == {"A cyst in the liver."} and set(dataset["task"]) == {"report"}
    assert read_m3d_cap_raw(tmp_path / "ct_case")["case"][:] == ["000002", "000006", "000006"]
    assert list(read_m3d_cap_raw(tmp_path, streaming=True)) == list(dataset)


def test_raw_folders_without_cases_or_reports_are_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no samples"):
        read_m3d_cap_raw(tmp_path)
    with pytest.raises(FileNotFoundError, match="Expected one of case folders"):
        read_m3d_cap_raw(tmp_path / "nowhere")
    write_raw_case(tmp_path / "1", text=" ")
    write_raw_case(tmp_path / "2")
    with pytest.raises(ValueError, match=r"2 empty texts in .*: 1 \(report\), 1 \(report\)"):
        read_m3d_cap_raw(tmp_path)
    assert set(read_m3d_cap_raw(tmp_path, skip_empty=True)["case"]) == {"2"}


def test_raw_cases_may_hold_nifti_files(tmp_path):
    write_raw_case(tmp_path / "1", series=("Axial",))
    layout.write_volume(tmp_path / "1/Sagittal.nii.gz")
    layout.write_volume(tmp_path / "2/scan.nii.gz")  # no folder beside it
    (tmp_path / "2/text.txt").write_text("A stone.")
    dataset = read_m3d_cap_raw(tmp_path)
    names = [Path(image).relative_to(tmp_path).as_posix() for image in dataset["image"]]
    assert names == ["1/Axial", "1/Sagittal.nii.gz", "2/scan.nii.gz"]
    assert dataset["case"][:] == ["1", "1", "2"] and dataset[2]["answer"] == "A stone."


def test_raw_cases_that_give_no_sample_are_refused_or_left_out_and_named(tmp_path, caplog):
    """A series without a report, and the cases 000003 (an empty series) and 000004 (no series) of the golden."""
    make_slices.make_slices(tmp_path)
    write_raw_case(tmp_path / "000005")
    (tmp_path / "000005/text.txt").unlink()
    write_raw_case(tmp_path / "000006", series=("Axial",))
    message = (
        r"3 of the 6 cases in .* give no sample: 000003 \(no series\), 000004 \(no series\), 000005 \(no report\)\."
    )
    with pytest.raises(ValueError, match=f"{message} Expected one .txt file in each, .*`skip_empty=True`") as error:
        read_m3d_cap_raw(tmp_path)
    assert "jpg" not in str(error.value) and "headings" not in str(error.value)
    dataset = read_m3d_cap_raw(tmp_path, skip_empty=True)
    assert dataset["case"][:] == ["000001", "000002", "000006"]
    assert re.search(f"{message} They are left out", caplog.text)


def test_raw_cases_whose_report_cannot_be_read_are_left_out_and_named(tmp_path, caplog):
    for case in ("1", "2", "3"):
        write_raw_case(tmp_path / case, series=("Axial",))
    (tmp_path / "1/other.txt").write_text("x")
    (tmp_path / "2/text.txt").write_bytes("Größe".encode("latin-1"))
    message = r"2 of the 3 cases .*: 1 \(expected one report, got 2 .txt files .*\), 2 \(text.txt: expected a text in UTF-8 .*\)"
    with pytest.raises(ValueError, match=message):
        read_m3d_cap_raw(tmp_path)
    assert read_m3d_cap_raw(tmp_path, skip_empty=True)["case"][:] == ["3"]
    assert re.search(message, caplog.text)


def test_a_raw_scan_below_two_texts_is_refused_or_left_out_and_named(tmp_path, caplog):
    write_raw_case(tmp_path / "1", series=("Axial",))
    layout.write_volume(tmp_path / "P1/nifti/scan.nii.gz")
    for name in ("report.txt", "nifti/log.txt"):
        (tmp_path / "P1" / name).write_text("A stone.")
    message = r"1 of the 2 cases .*: P1/nifti \(2 texts .*: keep one of P1/report.txt, P1/nifti/log.txt\)\."
    with pytest.raises(ValueError, match=message):
        read_m3d_cap_raw(tmp_path)
    assert read_m3d_cap_raw(tmp_path, skip_empty=True)["case"][:] == ["1"]
    assert re.search(message, caplog.text)


def test_raw_cases_with_nothing_but_jpg_are_refused_with_a_remedy(tmp_path):
    write_raw_case(tmp_path / "1", series=("Axial",))
    for path in (tmp_path / "1/Axial").iterdir():
        path.rename(path.with_suffix(".jpg"))
    with pytest.raises(ValueError, match=r"1 \(only .jpg slices\)\. .* rename to .jpeg, or prepare with --accept-jpg"):
        read_m3d_cap_raw(tmp_path)
    for path in (tmp_path / "1/Axial").iterdir():
        path.rename(path.with_suffix(".jpeg"))
    assert len(read_m3d_cap_raw(tmp_path)) == 1


def test_folders_without_slices_beside_other_series_are_told_of(tmp_path, caplog):
    write_raw_case(tmp_path / "ct_case/1", series=("Axial",))
    (tmp_path / "ct_case/1/Sagittal").mkdir()
    assert len(read_m3d_cap_raw(tmp_path)) == 1
    assert f"1 folders in cases of {tmp_path} hold neither .png or .jpeg slices" in caplog.text
    assert "left out: ct_case/1/Sagittal." in caplog.text
