"""The integrity check: every kind of problem is found, named with its place, and nothing else."""

import json
import os
import re
import sys
from pathlib import Path

import m3d_layout as layout
import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.data import check as check_module
from med3dvlm.train.data.check import check_study, format_check_report
from med3dvlm.train.data.preparation_record import MADE_BY
from med3dvlm.train.data.prepare import encode_prepared_volume


IMAGE_SIZE = tuple(reversed(layout.SHAPE))  # (depth, height, width)


@pytest.fixture
def root(tmp_path):
    layout.write_cap(tmp_path, {"train": ["1", "2"], "validation": ["3"], "test": ["4"]})
    layout.write_vqa(tmp_path, "M3D_VQA_train.csv", [layout.vqa_row()])
    layout.write_vqa(tmp_path, "M3D_VQA_yn_train.csv", [layout.vqa_row(Question="Air?", Answer="No")])
    return tmp_path


def volume_of(root, case="1", series="Axial"):
    return root / f"M3D_Cap_npy/ct_case/{case}/{series}.nii.gz"


def kinds(report, severity="error"):
    return [problem.kind for problem in report.problems if problem.severity == severity]


def check(root, **options):
    return check_study(root, **{"num_workers": 1, **options})


def test_a_sound_study_has_no_problems(root):
    report = check(root, image_size=IMAGE_SIZE)
    assert report.problems == [] and report.is_ok
    assert (report.layout, report.volumes, report.num_volumes) == ("m3d", "prepared", 8)
    assert report.num_samples["train"] == {"report": 4, "closed_vqa": 1, "yes_no_vqa": 1}
    assert report.shapes == {"4x6x5": 8}
    assert check(root).volumes == "prepared"
    assert check(root, num_workers=3).problems == []


def test_scans_that_would_be_scaled_in_another_way_than_the_others_are_listed(tmp_path):
    ct = np.random.default_rng(0).integers(-1000, 1500, size=(3, *layout.SHAPE)).astype(np.int16)
    for name, array in {"a": ct[0], "b": ct[1], "c": ct[2] + 1024}.items():
        layout.write_volume(tmp_path / f"{name}.nii.gz", array=array.astype(np.int16))
    (problem,) = [entry for entry in check(tmp_path).problems if entry.kind == "mixed_intensities"]
    assert Path(problem.file).name == "c.nii.gz" and problem.severity == "warning"
    assert problem.reason.endswith("unlike 2 other scans; if it is CT, its values have an offset: subtract it")


@pytest.mark.parametrize("mean, is_told", [(1500, False), (500, True)])
def test_scans_are_taken_for_ct_where_the_processor_takes_them(mean, is_told, tmp_path):
    """An image of another kind may have a value as low as air; its mean then tells, as for `intensity_mode` "auto"."""
    arrays = np.random.default_rng(0).integers(mean - 400, mean + 900, size=(3, *layout.SHAPE)).astype(np.int16)
    arrays[:, 0, 0, 0] = 0
    arrays[2, 0, 0, 0] = -250
    for name, array in zip("abc", arrays):
        layout.write_volume(tmp_path / f"{name}.nii.gz", array=array)
    modes = {name: mode_of(tmp_path / f"{name}.nii.gz") for name in "abc"}
    assert modes == {"a": "minmax", "b": "minmax", "c": "window" if is_told else "minmax"}
    assert ("mixed_intensities" in kinds(check(tmp_path), "warning")) == is_told


def mode_of(path):
    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))
    return processor(str(path), return_report=True)["preprocessing_report"][0]["intensity_mode"]


def test_scans_are_found_by_their_ending_in_capitals_too(tmp_path):
    layout.write_volume(tmp_path / "a.nii.gz")
    layout.write_volume(tmp_path / "b.nii.gz", array=random_array())
    (tmp_path / "b.nii.gz").rename(tmp_path / "B.NII.GZ")
    report = check(tmp_path)
    assert report.num_volumes == 2 and report.is_ok


def test_a_single_scan_is_checked_and_another_file_is_named_once(tmp_path):
    layout.write_volume(tmp_path / "a.nii.gz")
    report = check(tmp_path / "a.nii.gz")
    assert (report.layout, report.num_volumes, report.problems) == ("volumes", 1, [])
    (tmp_path / "a.txt").touch()
    (problem,) = check(tmp_path / "a.txt").problems
    assert problem.reason == "expected a manifest that ends in .csv or .jsonl, got '.txt'."


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="its file system takes UTF-8 names only")
def test_a_name_that_is_not_utf8_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"M\xfcller.nii.gz")).write_bytes(b"no")
    text = format_check_report(check(tmp_path))
    assert "M\\udcfcller.nii.gz: not a NIfTI file" in text and text.encode()


def write_manifest(folder):
    names = sorted(path.name for path in folder.glob("*.nii.gz"))
    lines = [f"{name},Finding {name[0]}.,train" for name in names]
    (folder / "manifest.csv").write_text("\n".join(["image,report,split", *lines]))


def test_headers_alone_make_no_prepared_volumes_of_scans(tmp_path):
    for number in range(3):
        layout.write_volume(tmp_path / f"{number}.nii.gz", array=random_array(seed=number) * 900)
    layout.write_volume(tmp_path / "3.nii.gz", array=(random_array(seed=3, shape=(7, 6, 5)) * 900).astype(np.int16))
    scan = nibabel.load(tmp_path / "0.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.asarray(scan.dataobj), None), tmp_path / "0.nii.gz")
    for _ in range(2):  # a folder, and then a manifest
        reports = [check(tmp_path, fast=fast) for fast in (False, True)]
        assert [report.volumes for report in reports] == ["scans"] * 2
        assert all(report.is_ok and kinds(report, "warning").count("unknown_orientation") == 1 for report in reports)
        write_manifest(tmp_path)


def test_headers_alone_tell_prepared_volumes_by_their_record(tmp_path):
    affine = np.diag([-1.0, -1.0, 1.0, 1.0])[:, [2, 1, 0, 3]]
    for number in range(3):
        values = torch.rand(4, 6, 5 + number // 2, generator=torch.Generator().manual_seed(number))
        content = encode_prepared_volume(values, affine, True, True, {"made_by": MADE_BY})
        (tmp_path / f"{number}.nii.gz").write_bytes(content)
    for _ in range(2):
        for fast in (False, True):
            report = check(tmp_path, fast=fast)
            assert report.volumes == "prepared" and kinds(report) == ["wrong_shape"]
        write_manifest(tmp_path)


def test_scaled_scans_are_judged_by_their_values_and_kept_as_stored(tmp_path, monkeypatch):
    kept, check_voxels = [], check_module._check_voxels

    def spy(facts, voxels, *scaling):
        kept.append(voxels.dtype)
        check_voxels(facts, voxels, *scaling)

    monkeypatch.setattr(check_module, "_check_voxels", spy)
    array = np.random.default_rng(0).integers(0, 1500, size=layout.SHAPE).astype(np.int16)
    for name, intercept in {"a": 0.0, "b": 0.0, "c": -1024.0}.items():
        image = nibabel.Nifti1Image(array + (name == "b"), np.eye(4))
        content = bytearray(image.to_bytes())
        # Slope and intercept, for which nibabel writes NaN for an array in memory.
        content[112:120] = np.array([2.0, intercept], dtype="<f4").tobytes()
        (tmp_path / f"{name}.nii").write_bytes(content)
    report = check(tmp_path)
    assert kept == [np.int16] * 3
    # Stored the same, a and c are not the same; and c alone has air.
    assert [(p.kind, Path(p.file).name) for p in report.problems if p.kind != "unknown_orientation"] == [
        ("mixed_intensities", "c.nii")
    ]
    assert f"values from {2 * array.min() - 1024:g} to {2 * array.max() - 1024:g}" in report.problems[-1].reason


def test_scans_in_floating_point_of_one_shape_are_no_prepared_volumes(tmp_path):
    for number in range(3):
        layout.write_volume(tmp_path / f"{number}.nii.gz", array=random_array(seed=number) * 900)
    report = check(tmp_path)
    assert report.volumes == "scans" and report.is_ok


def write(path, array, **options):
    layout.write_volume(path, array=array, **options)


def random_array(dtype=np.float32, shape=layout.SHAPE, seed=99):
    return np.random.default_rng(seed).random(shape).astype(dtype)


def with_voxel(value):
    array = random_array()
    array[1, 2, 3] = value
    return array


@pytest.mark.parametrize(
    "break_it, kind, reason, is_found_fast",
    [
        (lambda path: path.unlink(), "missing_volume", "there is no volume .*Axial.nii.gz", True),
        (lambda path: path.write_bytes(b"no"), "invalid_volume", "^not a NIfTI file", True),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "invalid_volume", "truncated|damaged", False),
        (lambda path: write(path, with_voxel(np.nan)), "not_finite", "^1 of 120 voxels are NaN or infinite", False),
        (lambda path: write(path, with_voxel(np.inf)), "not_finite", "^1 of 120 voxels", False),
        (lambda path: write(path, np.full(layout.SHAPE, 0.5, np.float32)), "constant", "^all voxels are 0.5", False),
        (lambda path: write(path, with_voxel(1.5)), "outside_unit_range", r"in \[0, 1\], got .* to 1.5", False),
        (lambda path: write(path, with_voxel(-0.5)), "outside_unit_range", r"got -0.5 to", False),
        (lambda path: write(path, random_array(shape=(6, 5, 4))), "wrong_shape",
         r"expected \(depth, height, width\) = \(4, 6, 5\), got \(4, 5, 6\)", True),
        (lambda path: write(path, random_array(shape=(5, 6, 4, 2))), "invalid_volume", "series", True),
        (lambda path: write(path, random_array(shape=(5, 6, 1))), "invalid_volume", "expected a volume, got", True),
        (lambda path: write(path, (random_array() * 1.9).astype(np.uint8)), "not_float", "got integers", True),
    ],
)  # fmt: skip
def test_broken_volumes_are_errors(root, break_it, kind, reason, is_found_fast):
    break_it(volume_of(root))
    report = check(root, image_size=IMAGE_SIZE)
    problem = next(problem for problem in report.problems if problem.kind == kind)
    assert problem.severity == "error" and re.search(reason, problem.reason)
    assert str(volume_of(root)) in (problem.file, problem.reason.removeprefix("there is no volume "))
    assert problem.row == '"train"[0]'
    assert all(p.kind in (kind, "wrong_shape") for p in report.problems)
    assert (kind in kinds(check(root, image_size=IMAGE_SIZE, fast=True))) == is_found_fast


def test_the_most_frequent_shape_is_expected_without_another(root):
    write(volume_of(root), random_array(shape=(7, 6, 4)))
    assert kinds(check(root)) == ["wrong_shape"]
    assert kinds(check(root, image_size=(4, 6, 7))) == ["wrong_shape"] * 7
    assert kinds(check(root, volumes="scans")) == []


def test_shapes_are_compared_as_the_processor_orients_them(root):
    # Stored as (superior, posterior, left): after orientation the same (depth, height, width).
    affine = np.array([[0, 0, -1, 0], [0, -1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    write(volume_of(root), random_array(shape=(4, 6, 5)), affine=affine)
    assert check(root, image_size=IMAGE_SIZE).problems == []


def test_scans_may_differ_and_unlikely_headers_are_warnings(root):
    write(volume_of(root), random_array(np.int16, (7, 3, 9)) + np.arange(9, dtype=np.int16))
    write(volume_of(root, "2"), random_array() * 1000 - 500, affine=np.diag([0.001, 0.7, 0.7, 1]))
    write(volume_of(root, "3"), random_array(seed=5), affine=np.diag([0.7, 0.7, 25, 1]))
    report = check(root, volumes="scans")
    assert kinds(report) == []
    assert kinds(report, "warning") == ["unlikely_spacing", "unlikely_spacing", "mixed_intensities"]


@pytest.mark.parametrize(
    "cells, kind",
    [
        ({"Answer": ""}, "empty_answer"),
        ({"Question": " "}, "empty_question"),
        ({"Choice_D": ""}, "empty_choice"),
        ({"Answer": "liver"}, "contradictory_answer"),
        ({"Answer_Choice": "E"}, "invalid_row"),
        ({"Question_Type": "9"}, "invalid_row"),
        ({"Image_Path": ""}, "invalid_row"),
    ],
)
def test_bad_questions_are_errors_with_their_row(root, cells, kind):
    rows = [layout.vqa_row(), layout.vqa_row(**{"Question": "Another one?", **cells})]
    layout.write_vqa(root, "M3D_VQA_train.csv", rows)
    report = check(root)
    assert [(p.severity, p.kind, p.row) for p in report.problems] == [("error", kind, 3)]
    assert report.problems[0].file.endswith("M3D_VQA_train.csv")


def test_answers_may_differ_from_their_choice_in_case_and_full_stop(root):
    layout.write_vqa(root, "M3D_VQA_train.csv", [layout.vqa_row(Answer="Spleen. ")])
    assert check(root).problems == []


def test_questions_and_choices_that_repeat_are_warnings(root):
    rows = [layout.vqa_row(), layout.vqa_row(), layout.vqa_row(Question="Other?", Choice_A="NA")]
    layout.write_vqa(root, "M3D_VQA_train.csv", rows)
    report = check(root)
    assert [(p.kind, p.row) for p in report.problems] == [("repeated_question", 3), ("repeated_choice", 4)]
    assert report.is_ok


def test_the_same_report_of_a_volume_twice_in_a_split_is_a_warning(root):
    index = root / "M3D_Cap_npy/M3D_Cap.json"
    content = json.loads(index.read_text())
    content["train"].append(content["train"][0])
    index.write_text(json.dumps(content))
    report = check(root)
    assert [(p.severity, p.kind, p.row) for p in report.problems] == [("warning", "repeated_report", '"train"[4]')]


def test_files_of_a_wrong_form_are_errors_and_the_others_are_read(root):
    (root / "M3D-VQA/M3D_VQA_yn_train.csv").write_text("Image Path,Question\n")
    (root / "M3D_Cap_npy/M3D_Cap.json").write_text('{"train": 3}')
    report = check(root)
    assert kinds(report) == ["invalid_file"] * 4
    assert "lacks the columns Question Type, Answer" in report.problems[3].reason
    assert report.num_samples == {"train": {"closed_vqa": 1}}


def test_missing_unreadable_and_empty_reports_are_errors(root):
    folder = root / "M3D_Cap_npy/ct_case"
    (folder / "1/text.txt").unlink()
    (folder / "3/text.txt").write_text(" \n")
    (folder / "4/text.txt").write_bytes(b"\xff\xfe\xff")
    report = check(root)
    assert kinds(report) == ["missing_report"] * 2 + ["unreadable_report"] * 2 + ["empty_report"] * 2
    assert report.problems[0].file == str(folder / "1/text.txt")


def test_a_volume_or_case_in_two_splits_is_an_error(root):
    index = root / "M3D_Cap_npy/M3D_Cap.json"
    content = json.loads(index.read_text())
    content["test"].append(content["train"][0])
    content["validation"].append(content["train"].pop())  # the second series of case 2
    index.write_text(json.dumps(content))
    report = check(root)
    assert kinds(report) == ["volume_in_two_splits", "case_in_two_splits"]
    assert [problem.row for problem in report.problems[:2]] == ['"test"[2]', '"validation"[2]']
    assert "is in the split test here and in train in M3D_Cap.json" in report.problems[0].reason
    assert kinds(report, "info") == ["same_report_in_two_splits"]


def test_a_question_about_a_volume_of_another_split_is_an_error(root):
    layout.write_vqa(root, "M3D_VQA_test.csv", [layout.vqa_row()])
    assert kinds(check(root)) == ["volume_in_two_splits"]


def test_equal_voxels_are_an_error_across_splits_and_a_warning_within(root):
    same = random_array()
    for case in ("1", "2", "4"):
        write(volume_of(root, case), same)
    report = check(root)
    assert kinds(report) == ["same_voxels_in_two_splits"]
    assert "in the splits test and train" in report.problems[0].reason
    assert kinds(report, "warning") == ["same_voxels"]
    assert check(root, fast=True).problems == []


def test_equal_reports_across_splits_are_counted_once(root):
    for case in ("1", "2", "3", "4"):
        (root / f"M3D_Cap_npy/ct_case/{case}/text.txt").write_text("Normal.")
    report = check(root)
    assert kinds(report, "info") == ["same_report_in_two_splits"]
    assert report.problems[0].reason == "1 of 1 different reports stand in more than one split"
    assert report.is_ok


def test_manifests_are_checked_the_same_way(tmp_path):
    layout.write_volume(tmp_path / "a.nii.gz", seed=0)
    layout.write_volume(tmp_path / "b.nii.gz", seed=1)
    lines = ["image,case,split,report,question,answer,choices,answer_choice"]
    lines += ["a.nii.gz,p,train,Fine.,,,,", "b.nii.gz,p,test,,,,,", "c.nii.gz,q,test,Fine.,Air?,,,"]
    lines += ["a.nii.gz,p,train,,Which?,x,a|b|c|d,", "a.nii.gz,p,train,,Which?,,a|b|c|d,B"]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    for root in (tmp_path, tmp_path / "manifest.csv"):
        report = check(root)
        assert report.layout == "manifest"
        found = [(problem.kind, problem.row) for problem in report.problems]
        expected = [("invalid_row", 5), ("empty_report", 3), ("empty_answer", 4), ("missing_volume", 4)]
        assert found == [*expected, ("case_in_two_splits", 3), ("same_report_in_two_splits", None)]
    assert "Fine" not in json.dumps(report.to_dict())


def test_a_folder_of_volumes_alone_is_checked_too(tmp_path):
    for seed in range(3):
        layout.write_volume(tmp_path / f"case/{seed}.nii.gz", seed=seed)
    write(tmp_path / "case/3.nii.gz", random_array(seed=0) * 0 + 1)
    report = check(tmp_path, image_size=IMAGE_SIZE)
    assert (report.layout, report.num_volumes, report.num_samples) == ("volumes", 4, {})
    assert [(p.kind, p.row) for p in report.problems] == [("constant", None)]


def test_a_cache_is_checked_group_by_group(tmp_path):
    volumes = {"one/aa/1": (4, 6, 5), "one/ab/2": (4, 6, 5), "one/ac/3": (4, 5, 6), "two/aa/1": (2, 3, 4)}
    for seed, (name, shape) in enumerate(volumes.items()):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True)
        array = random_array(np.float16, shape, seed) if seed else (random_array(shape=shape) * 255).astype(np.uint8)
        save_file({"volume": array}, path)
    (tmp_path / "one/aa/9.safetensors").write_bytes(b"damaged")
    save_file({"volume": with_voxel(np.nan)[0]}, tmp_path / "one/aa/8.safetensors")
    save_file({"volume": with_voxel(np.nan).T.copy()}, tmp_path / "one/aa/7.safetensors")
    report = check(tmp_path)
    assert (report.layout, report.volumes, report.num_volumes) == ("cache", "prepared", 7)
    found = sorted((Path(problem.file).stem, problem.kind) for problem in report.problems)
    expected = [("3", "wrong_shape"), ("7", "not_finite"), ("8", "invalid_volume"), ("8", "wrong_shape")]
    assert found == [*expected, ("9", "invalid_volume")]
    assert "not_finite" not in kinds(check(tmp_path, fast=True))


def test_a_folder_of_slices_is_a_volume(tmp_path):
    for number in range(3):
        path = tmp_path / f"series/{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((random_array(shape=(6, 5), seed=number) * 255).astype(np.uint8)).save(path)
    (tmp_path / "empty").mkdir()
    lines = ["image,report", "series,A cyst.", "empty,A stone."]
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    report = check(tmp_path)
    assert report.shapes == {"3x6x5": 1}
    assert [(p.kind, p.row, p.reason) for p in report.problems] == [
        ("invalid_volume", 3, "expected a NIfTI file or a folder of slices, got another folder.")
    ]


def write_slices(folder, *names):
    folder.mkdir(exist_ok=True)
    for seed, name in enumerate(names):
        Image.fromarray((random_array(shape=(6, 5), seed=seed) * 255).astype(np.uint8)).save(folder / name)


@pytest.mark.parametrize("fast", [False, True])
def test_damaged_slices_are_an_error_and_other_files_a_warning(fast, tmp_path):
    write_slices(tmp_path / "series", *(f"{number}.png" for number in range(5)), "4.jpeg")
    for number in range(3):
        path = tmp_path / f"series/{number}.png"
        path.write_bytes(path.read_bytes()[: 30 * number])
    (tmp_path / "series/x.db").touch()
    write_slices(tmp_path / "capitals", "1.PNG", "2.PNG")
    (tmp_path / "manifest.csv").write_text("image,report\nseries,A cyst.\ncapitals,A stone.")
    report = check(tmp_path, fast=fast)
    found = [(problem.severity, problem.kind, problem.row) for problem in report.problems]
    assert found == [
        ("error", "damaged_slices", 2),
        ("error", "invalid_volume", 3),
        ("warning", "not_among_slices", 2),
        ("warning", "repeated_slice_number", 2),
    ]
    assert report.problems[0].reason.startswith("3 slices are damaged, beside 3 that can be read (0.png: the picture")
    assert report.problems[1].reason.endswith(
        "got a folder of .PNG files: rename them to .png or .jpeg, in small letters."
    )
    assert "1 files are not among the slices (x.db: not a .png" in report.problems[2].reason


def test_slices_that_are_missing_are_a_warning_and_misnamed_ones_an_error(tmp_path):
    write_slices(tmp_path / "gap", "1.png", "2.png", "4.png")
    write_slices(tmp_path / "mixed", "1.png", "2.PNG", "3.png")
    (tmp_path / "manifest.csv").write_text("image,report\ngap,A cyst.\nmixed,A stone.")
    report = check(tmp_path)
    assert [(p.severity, p.kind, p.row) for p in report.problems] == [
        ("error", "damaged_slices", 3),
        ("warning", "missing_slice_numbers", 2),
    ]
    assert "2.PNG: its ending is not in small letters: rename to .png" in report.problems[0].reason
    assert "1 numbers between the first slice and the last are missing (3)" in report.problems[1].reason


@pytest.mark.parametrize("fast", [False, True])
def test_folders_of_slices_may_differ_in_number_and_size(fast, tmp_path):
    lines = ["image,report"]
    for case, count in enumerate((3, 3, 4)):
        for number in range(count):
            path = tmp_path / f"{case}/{number}.png"
            path.parent.mkdir(exist_ok=True)
            array = random_array(shape=(6, 5), seed=10 * case + number)
            Image.fromarray((array * 255).astype(np.uint8)).save(path)
        lines.append(f"{case},A cyst.")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    report = check(tmp_path, fast=fast)
    assert report.shapes == {"3x6x5": 2, "4x6x5": 1}
    assert report.volumes == "scans" and report.problems == []


def test_rows_without_a_split_among_others_are_a_warning(tmp_path):
    lines = ["image,report,question,answer,split"]
    for number, split in enumerate(("train", "", "test", "")):
        layout.write_volume(tmp_path / f"{number}.nii.gz", seed=number)
        lines.append(f"{number}.nii.gz,Cyst {number}.,Air?,No,{split}")
    path = tmp_path / "manifest.csv"
    path.write_text("\n".join(lines))
    report = check(tmp_path)
    assert [(p.severity, p.kind, p.file, p.row) for p in report.problems] == [("warning", "no_split", str(path), None)]
    reason = report.problems[0].reason
    assert reason.startswith("2 of the 4 rows name no split and are left out wherever one is asked for: row 3, row 5;")
    assert report.is_ok
    path.write_text("\n".join([lines[0], *(line.replace("train", "").replace("test", "") for line in lines[1:])]))
    assert check(tmp_path).problems == []


def test_report_is_written_and_told(root):
    volume_of(root).unlink()
    path = root / "reports/check.json"
    report = check(root, report_path=path)
    content = json.loads(path.read_text())
    assert content["counts"] == {"error": {"missing_volume": 1}, "warning": {}, "info": {}}
    assert list(content)[-2:] == ["counts", "problems"]
    assert content["problems"][0]["row"] == '"train"[0]'
    assert [file.name for file in path.parent.iterdir()] == ["check.json"]
    text = format_check_report(report)
    assert "m3d, 8 volumes, checked as prepared" in text
    assert "train: 4 report, 1 closed_vqa, 1 yes_no_vqa" in text
    assert "error: missing volume (1)" in text and text.endswith("1 errors, 0 warnings, 0 information.")
    for case in ("2", "3", "4"):
        volume_of(root, case).unlink()
    assert "  and 2 more" in format_check_report(check(root), limit=2)


def test_progress_is_shown_when_asked_for(root, capsys):
    check(root)
    assert capsys.readouterr().err == ""
    check(root, progress=True)
    assert "8/8" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ({"volumes": "cached"}, "`volumes` must be one of auto, scans, prepared, got 'cached'"),
        ({"volumes": "scans", "image_size": (4, 6, 5)}, "`image_size` is that of prepared volumes"),
        ({"image_size": (4, 6)}, r"three numbers of voxels \(depth, height, width\), got \(4, 6\)"),
        ({"num_workers": 0}, "`num_workers` must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_refused(root, options, message):
    with pytest.raises(ValueError, match=message):
        check(root, **options)


def test_data_without_a_sample_is_an_error(tmp_path):
    manifest, root = tmp_path / "manifest.csv", tmp_path / "m3d"
    manifest.write_text("image,report,split\n")
    (root / "M3D_Cap_npy").mkdir(parents=True)
    (root / "M3D_Cap_npy/M3D_Cap.json").write_text('{"train": [], "validation": [], "test": []}')
    for place in (manifest, root):
        (problem,) = check(place).problems
        assert (problem.severity, problem.kind, problem.reason) == ("error", "no_samples", "it holds no samples")


def test_nothing_to_check_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds nothing to check. Expected a manifest"):
        check(tmp_path)
    with pytest.raises(FileNotFoundError, match="Expected a folder, a manifest or a scan"):
        check(tmp_path / "nowhere")
