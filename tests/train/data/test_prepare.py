import csv
import errno
import gzip
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nibabel
import numpy as np
import preparation_program
import pytest
import torch
from nibabel.testing import data_path
from PIL import Image
from typer.testing import CliRunner


sys.path.insert(0, str(Path(__file__).parents[2] / "goldens"))
import golden_io
import make_slices

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.processing.volume_io import InvalidVolumeError
from med3dvlm.train.cli import app
from med3dvlm.train.data import prepare, slices
from med3dvlm.train.data.cache import VolumeCache
from med3dvlm.train.data.check import check_study
from med3dvlm.train.data.dataset import ProcessedVolumes
from med3dvlm.train.data.m3d import read_m3d_cap
from med3dvlm.train.data.preparation_record import PREPARED, read_preparation_record
from med3dvlm.train.data.prepare import encode_prepared_volume, format_preparation_report, prepare_m3d_cap
from med3dvlm.train.data.reading import find_broken
from med3dvlm.train.data.samples import SPLITS
from med3dvlm.train.data.slices import find_cases, read_slices
from med3dvlm.train.data.splits import DEFAULT_FRACTIONS, draw_splits


IMAGE_SIZE = preparation_program.IMAGE_SIZE


def prepare_here(source, destination, **options):
    return prepare_m3d_cap(source, destination, **{"image_size": IMAGE_SIZE, "num_workers": 0, **options})


def write_report(case, text="study_findings: A cyst."):
    case.mkdir(parents=True, exist_ok=True)
    (case / "text.txt").write_text(text, encoding="utf-8")


def write_series(folder, count=5, shape=(20, 30), seed=0):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        array = np.random.default_rng([seed, number]).integers(1, 256, size=shape, dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{number}.png")


def write_cases(source, count=4):
    for number in range(1, count + 1):
        write_report(source / f"{number:06}", f"study_findings: Cyst {number}.")
        write_series(source / f"{number:06}/Axial", seed=number)
    return source


def write_scan(path, affine=None, array=None, code=1):
    if array is None:
        array = np.random.default_rng(0).integers(-1000, 1500, size=(14, 12, 10)).astype(np.int16)
        array[:3] = array[:, 10:] = -1000  # air around, for the crop to remove
    affine = np.diag([0.7, 0.8, 2.5, 1]) if affine is None else affine
    image = nibabel.Nifti1Image(array, affine if code else None)
    image.header.set_zooms(nibabel.affines.voxel_sizes(affine))
    if code:
        image.set_sform(affine, code)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def read_back(path, image_size=IMAGE_SIZE):
    return Med3DVLMImageProcessor(image_size=list(image_size), **PREPARED)(path)["pixel_values"][0, 0]


def reasons(report, *levels):
    return {
        "/".join(filter(None, (entry.case, entry.series, entry.name))): entry.reason
        for entry in report.dropped
        if entry.level in (levels or prepare.LEVELS)
    }


def all_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The cases of the golden, prepared in full size."""
    folder = tmp_path_factory.mktemp("original")
    make_slices.make_slices(folder / "M3D_Cap", golden_io.load("prep").meta["salt"])
    report = prepare_m3d_cap(folder / "M3D_Cap", folder / "M3D_Cap_npy", num_workers=0)
    return folder, report


def test_splits_are_to_be_given_where_questions_have_them_already(tmp_path, caplog):
    """As in the example of the command: volumes and questions of one case in one split, by the names that M3D uses."""
    raw, root = tmp_path / "M3D_Cap_raw", tmp_path / "data"
    write_cases(raw / "ct_case", count=8)
    names = [f"M3D_Cap_npy/ct_case/{number:06}/Axial" for number in range(1, 9)]
    index = tmp_path / "M3D_Cap.json"
    splits = {"train": names[:6], "validation": names[6:7], "test": names[7:]}
    entries = {
        split: [{"image": f"{name}.npy", "text": f"{Path(name).parent}/text.txt"} for name in of_split]
        for split, of_split in splits.items()
    }
    index.write_text(json.dumps(entries))
    header = "Image Path,Question Type,Question,Choice A,Choice B,Choice C,Choice D,Answer,Answer Choice"
    for split, short in {"train": "train", "validation": "val", "test": "test"}.items():
        rows = [f"{name}.npy,1,Which plane?,axial,coronal,sagittal,none,axial,A" for name in splits[split]]
        (root / "M3D-VQA").mkdir(parents=True, exist_ok=True)
        (root / f"M3D-VQA/M3D_VQA_{short}.csv").write_text("\n".join([header, *rows]) + "\n")

    prepare_here(raw, root / "M3D_Cap_npy", splits=index)
    assert "--splits" not in caplog.text
    assert check_study(root).is_ok
    (root / "M3D_Cap_npy/M3D_Cap.json").unlink()
    prepare_here(raw, root / "M3D_Cap_npy")
    assert "M3D-VQA: its questions follow the splits of M3D-Cap's own index" in caplog.text
    assert not check_study(root).is_ok


def test_files_and_reports_are_those_of_the_original(original):
    folder, _ = original
    meta = golden_io.load("prep").meta
    ours = {"M3D_Cap.json", "preparation_report.csv", "preparation_report.json", ".preparation_report.lock"}
    assert set(all_files(folder / "M3D_Cap_npy")) == {*meta["files_written"], *ours}
    for name, text in meta["reports"].items():
        assert (folder / "M3D_Cap_npy" / name).read_text() == text


def test_volumes_equal_the_original(original):
    folder, _ = original
    golden = golden_io.load("prep")
    for name in golden.meta["volumes"]:
        path = folder / "M3D_Cap_npy" / name
        image = nibabel.load(path)
        assert image.get_data_dtype() == np.float32 and image.shape == (256, 256, 128)
        array = np.asarray(image.dataobj).transpose(2, 1, 0)  # (W, H, D) -> (D, H, W)
        stored = golden_io.subsample(array, golden.meta["outputs"][name]["stride"])
        assert np.abs(stored - golden.arrays[name]).max() <= 1e-6
        golden_io.check(golden, name, array, tolerance=1e-6)
        # What reads prepared volumes takes them as they are.
        assert torch.equal(read_back(path, (128, 256, 256)), torch.from_numpy(np.ascontiguousarray(array)))


def test_everything_left_out_is_listed(original):
    folder, report = original
    assert (report.num_cases, report.num_volumes, report.num_made) == (4, 2, 2)
    assert not report.is_ok
    assert reasons(report, "case") == dict.fromkeys(
        ("000003", "000004"), "there is no series: expected folders of .png or .jpeg slices, or NIfTI files"
    )
    assert reasons(report, "series") == {"000003/Sagittal_empty": "expected .png or .jpeg slices, it is empty"}
    series = "000002/Pöschl_C__delayed"
    assert sorted(reasons(report, "slice")) == [f"{series}/{number}.png" for number in (16, 19, 23, 5)]
    assert reasons(report, "file") == {f"{series}/notes.db": "not a .png or .jpeg file"}
    content = json.loads((folder / "M3D_Cap_npy/preparation_report.json").read_text())
    assert content["num_dropped"] == {"case": 2, "series": 1, "sample": 0, "slice": 4, "file": 1}
    assert content["is_ok"] is False and list(content)[-2:] == ["num_dropped", "dropped"]
    with (folder / "M3D_Cap_npy/preparation_report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == content["dropped"] and len(rows) == 8
    text = format_preparation_report(report)
    assert "dropped, slice   4" in text and "000003/Sagittal_empty: expected .png" in text
    assert f'read_m3d_cap("{folder}", "train")' in text


def test_reasons_of_series_come_before_what_follows_for_their_cases(tmp_path):
    source = tmp_path / "source"
    for number in range(11):
        (source / f"{number}/Axial").mkdir(parents=True)
        if number < 10:
            write_report(source / str(number))
        name = "0.PNG" if number == 0 else "0.jpg"
        Image.new("L", (4, 5)).save(source / f"{number}/Axial/{name}")
    report = prepare_here(source, tmp_path / "out")
    assert sum(entry.level == "case" for entry in report.dropped) == 12  # the last has no report either
    assert report.num_cases == report.count("case") == 11
    text = format_preparation_report(report)
    assert "--accept-jpg" in text and "got 0.PNG: rename them to .png or .jpeg, in small letters" in text
    assert "dropped, case    11" in text and text.count("there is no series") <= 1 and "read_m3d_cap" not in text
    for path in (tmp_path / "nowhere.json", source):
        with pytest.raises(FileNotFoundError, match=r"there is no such file\. `splits` \(--splits\) names an index"):
            prepare_here(source, tmp_path / "other", splits=path)


def test_affine_of_slices_tells_crop_and_scale_in_pixels(original):
    folder, _ = original
    path = folder / "M3D_Cap_npy/000001/Axial_non_contrast.nii.gz"
    image = nibabel.load(path)
    box = read_preparation_record(path)["preprocessing_report"]["crop_box"]
    assert [stop - start for start, stop in box] == [31, 141, 151]
    assert image.header.get_xyzt_units()[0] == "unknown"
    assert image.header["sform_code"] == image.header["qform_code"] == 2
    # The middle of the first voxel and of the last, in pixels of the stack (width, height, depth).
    for voxel, edge in (((-0.5,) * 3, 0), ((255.5, 255.5, 127.5), 1)):
        pixel = image.affine @ [*voxel, 1] * [-1, -1, 1, 1]
        np.testing.assert_allclose(pixel[:3], [box[axis][edge] - 0.5 for axis in (2, 1, 0)], atol=1e-4)
    np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)


def test_affine_of_a_scan_is_the_true_one(tmp_path):
    angle = np.deg2rad(12)
    affine = np.array([[0, np.cos(angle) * 0.8, -np.sin(angle) * 2, -40], [-0.7, 0, 0, 55],
                       [0, np.sin(angle) * 0.8, np.cos(angle) * 2, 10], [0, 0, 0, 1]])  # fmt: skip
    shape = (30, 26, 20)
    world = np.einsum("ab,bijk->aijk", affine, np.stack([*np.indices(shape), np.ones(shape)]))
    values = 1000 + 3 * world[0] + 5 * world[1] - 2 * world[2]  # linear, so that interpolation keeps it
    values[:4] = values[:, :3] = values[..., 17:] = 0
    write_report(tmp_path / "source/1")
    write_scan(tmp_path / "source/1/scan.nii", affine, values.astype(np.float32))
    report = prepare_here(tmp_path / "source", tmp_path / "out", intensity_mode="minmax")
    assert report.is_ok, report.dropped
    path = tmp_path / "out/1/scan.nii.gz"
    image = nibabel.load(path)
    stored = np.asarray(image.dataobj)
    placed = np.einsum("ab,bijk->aijk", image.affine, np.stack([*np.indices(stored.shape), np.ones(stored.shape)]))
    lower, upper = read_preparation_record(path)["preprocessing_report"]["intensity_range"]
    expected = (1000 + 3 * placed[0] + 5 * placed[1] - 2 * placed[2] - lower) / (upper - lower)
    inner = (slice(2, -2), slice(2, -2), slice(2, -2))
    np.testing.assert_allclose(stored[inner], expected[inner], atol=1e-5)
    assert nibabel.aff2axcodes(image.affine) == ("L", "P", "S")
    assert image.header.get_xyzt_units()[0] == "mm" and image.header["sform_code"] == 1
    np.testing.assert_allclose(image.header.get_qform(), image.affine, atol=1e-4)


@pytest.mark.parametrize("code", [0, 1])
def test_a_prepared_scan_is_read_back_to_the_bit(code, tmp_path):
    write_report(tmp_path / "source/1")
    write_scan(tmp_path / "source/1/a.nii.gz", code=code)
    write_scan(tmp_path / "source/1/b.nii.gz", np.diag([-0.7, 2.5, -0.8, 1])[:, [2, 0, 1, 3]], code=code)
    report = prepare_here(tmp_path / "source", tmp_path / "out")
    assert report.is_ok and report.num_volumes == 2
    for name in ("a.nii.gz", "b.nii.gz"):
        expected = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))(tmp_path / "source/1" / name)
        assert torch.equal(read_back(tmp_path / "out/1" / name), expected["pixel_values"][0, 0])
        record = read_preparation_record(tmp_path / "out/1" / name)
        assert record["preprocessing_report"]["intensity_mode"] == "window"
        assert nibabel.load(tmp_path / "out/1" / name).header["sform_code"] == 2 - code


@pytest.mark.parametrize("name", ["scan.nii.gz", "scan.nii", "SCAN.NII.GZ"])
def test_a_prepared_volume_is_not_prepared_once_more(name, tmp_path):
    write_report(tmp_path / "in/1")
    write_scan(tmp_path / "in/1/scan.nii.gz")
    prepare_here(tmp_path / "in", tmp_path / "out")
    content = (tmp_path / "out/1/scan.nii.gz").read_bytes()
    (tmp_path / "out/1/scan.nii.gz").unlink()
    path = str(tmp_path / "out/1" / name)
    Path(path).write_bytes(gzip.decompress(content) if name == "scan.nii" else content)
    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))
    for loader in (ProcessedVolumes(processor), VolumeCache(tmp_path / "cache", processor)):
        with pytest.raises(ValueError, match="data.volumes=prepared in a recipe, --prepared in an evaluation"):
            loader.load(path)
    assert ProcessedVolumes(processor, PREPARED).load(path).shape == IMAGE_SIZE
    report = prepare_here(tmp_path / "out", tmp_path / "twice")
    assert not report.is_ok and report.num_volumes == 0
    (reason,) = reasons(report, "series").values()
    assert "cropped and scaled already, and must not be once more: prepare from the scans" in reason


def write_nifti_2(path):
    scan = nibabel.load(path.with_name("twin.nii.gz"))
    nibabel.save(nibabel.Nifti2Image(np.asarray(scan.dataobj), scan.affine), path)


def write_gzipped(content):
    return lambda path: path.write_bytes(gzip.compress(content))


@pytest.mark.parametrize(
    "write, is_scan",
    [
        (write_nifti_2, True),
        (lambda path: path.write_bytes(b""), False),
        (lambda path: path.write_bytes(bytes(100)), False),
        (write_gzipped(b"<html>" * 200), False),
        (write_gzipped((348).to_bytes(4, "little") + bytes(96)), False),
        (write_gzipped((348).to_bytes(4, "little") + b"x" * 400), False),
        (lambda path: path.write_bytes(nibabel.load(path.with_name("twin.nii.gz")).to_bytes()), True),
    ],
)
def test_what_preparation_does_not_write_has_no_record_and_is_read_as_a_scan(write, is_scan, tmp_path, caplog):
    twin, path = tmp_path / "twin.nii.gz", tmp_path / "scan.nii.gz"
    write_scan(twin)
    write(path)
    assert read_preparation_record(path) is None
    volumes = ProcessedVolumes(Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE)))
    listing = tmp_path / "skipped.jsonl"
    broken = find_broken(volumes, [str(twin), str(path)], listing)
    assert broken == ([] if is_scan else [str(path)])
    if is_scan:
        assert not caplog.records
        assert torch.equal(volumes.load(str(path)), volumes.load(str(twin)))


def test_an_empty_file_in_the_place_of_a_volume_is_made_anew(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    (volume := tmp_path / "out/000001/Axial.nii.gz").parent.mkdir(parents=True)
    volume.touch()
    report = prepare_here(source, tmp_path / "out")
    assert report.is_ok and report.num_made == 1 and read_back(volume).shape == IMAGE_SIZE


def test_a_sheared_scan_has_no_quaternion(tmp_path):
    affine = np.diag([0.7, 0.8, 2.5, 1])
    affine[1, 2] = 0.6  # a tilted gantry
    write_report(tmp_path / "source/1")
    write_scan(tmp_path / "source/1/a.nii.gz", affine)
    assert prepare_here(tmp_path / "source", tmp_path / "out").is_ok
    image = nibabel.load(tmp_path / "out/1/a.nii.gz")
    assert image.header["qform_code"] == 0 and image.header["sform_code"] == 1


def test_axes_between_two_directions_are_refused():
    affine = np.array([[0, 0, -1, 0], [0, 1, 0, 0], [1.0, 0, 0, 0], [0, 0, 0, 1]])
    with pytest.raises(InvalidVolumeError, match="halfway between the directions of the patient"):
        encode_prepared_volume(torch.zeros(IMAGE_SIZE), affine, True, True, {})


def test_the_result_is_read_by_the_reader(tmp_path):
    write_cases(tmp_path / "source/ct_case", 5)
    for name in ("data/M3D_Cap_npy", "anywhere"):
        report = prepare_here(tmp_path / "source", tmp_path / name)
        assert report.is_ok and report.num_samples == {"train": 3, "validation": 1, "test": 1}
        cases = []
        for split, count in report.num_samples.items():
            dataset = read_m3d_cap(report.root, split)
            assert len(dataset) == count
            for sample in dataset:
                number = int(sample["case"].removeprefix("ct_case/"))
                assert sample["answer"] == f"Cyst {number}."
                assert sample["image"] == str(tmp_path / name / f"ct_case/{number:06}/Axial.nii.gz")
                stack = read_slices(tmp_path / f"source/ct_case/{number:06}/Axial")[0]
                expected = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE), intensity_mode="minmax")(stack)
                assert torch.equal(read_back(sample["image"]), expected["pixel_values"][0, 0])
            cases += dataset["case"]
        assert len(set(cases)) == 5
    assert report.root == str(tmp_path / "anywhere")
    index = json.loads((tmp_path / "data/M3D_Cap_npy/M3D_Cap.json").read_text())
    entry = index["test"][0]
    assert entry["image"].startswith("M3D_Cap_npy/ct_case/00000") and entry["text"].endswith("/text.txt")


def test_splits_follow_from_seed_and_fractions(tmp_path):
    write_cases(tmp_path / "source", 12)
    for number in range(1, 13):
        write_series(tmp_path / f"source/{number:06}/Sagittal", seed=number + 50)

    def split_of_cases(seed, splits):
        (tmp_path / "out/M3D_Cap_npy/M3D_Cap.json").unlink(missing_ok=True)
        report = prepare_here(tmp_path / "source", tmp_path / "out", seed=seed, splits=splits)
        index = json.loads(Path(report.index).read_text())
        return {entry["image"].split("/")[0]: split for split, entries in index.items() for entry in entries}, report

    fractions = {"validation": 0.25, "test": 0.5}
    first, report = split_of_cases(0, fractions)
    assert len(first) == 12 and set(first.values()) == set(SPLITS)
    # Both series of a case together.
    assert report.num_samples == {split: 2 * count for split, count in Counter(first.values()).items()}
    assert split_of_cases(0, fractions)[0] == first
    assert split_of_cases(1, fractions)[0] != first
    assert set(split_of_cases(0, {"train": 1})[0].values()) == {"train"}
    assert set(split_of_cases(0, {"test": 1.0})[0].values()) == {"test"}


def test_the_split_of_a_case_does_not_depend_on_other_cases():
    fractions = {"validation": 0.1, "test": 0.2}
    names = [f"{number:06}" for number in range(1000)]
    some, more = (draw_splits(cases, fractions, seed=3) for cases in (names[::2], names))
    assert all(more[case] == split for case, split in some.items())
    for split, share in (("train", 0.7), ("validation", 0.1), ("test", 0.2)):
        assert abs(list(more.values()).count(split) / 1000 - share) < 0.04


@pytest.mark.parametrize("seed", range(20))
def test_of_a_few_cases_one_is_in_each_split_and_for_training_first(seed):
    for count, expected in ((1, {"train"}), (2, {"train", "test"}), (3, set(SPLITS)), (5, set(SPLITS))):
        drawn = draw_splits([str(number) for number in range(count)], DEFAULT_FRACTIONS, seed)
        assert len(drawn) == count and "train" in drawn.values()
        assert set(drawn.values()) == expected or count == 2
    both = draw_splits(["a", "b", "c"], {"validation": 0.5, "test": 0.5}, seed)
    assert set(both.values()) == {"validation", "test"}


def write_index(path, **entries):
    content = {
        split: [
            {"image": f"M3D_Cap_npy/{case}/Axial.nii.gz", "text": f"M3D_Cap_npy/{case}/text.txt"} for case in cases
        ]
        for split, cases in {**dict.fromkeys(SPLITS, ()), **entries}.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def test_the_index_that_is_about_to_be_written_is_not_taken_for_the_given_one(tmp_path):
    source, root = write_cases(tmp_path / "source", 1), tmp_path / "root"
    index = write_index(root / "M3D_Cap_npy/M3D_Cap.json", train=["000001"], test=["000002"])
    content = index.read_bytes()
    with pytest.raises(FileExistsError, match="about to be written.*: move it elsewhere and pass it from there"):
        prepare_here(source, index.parent, splits=index)
    assert index.read_bytes() == content
    official = tmp_path / "official.json"
    index.rename(official)
    prepare_here(source, index.parent, splits=official)
    write_cases(source, 2)
    prepare_here(source, index.parent, splits=official)
    assert read_m3d_cap(root, "test")["case"][:] == ["000002"]


def test_entries_keep_the_order_of_the_given_index(tmp_path):
    source = write_cases(tmp_path / "source", 3)
    index = write_index(tmp_path / "index.json", train=["000002"], test=["000003", "000001"])
    prepare_here(source, tmp_path / "M3D_Cap_npy", splits=index)
    assert read_m3d_cap(tmp_path, "test")["case"][:] == ["000003", "000001"]
    write_index(index, train=["000001"], test=["000003", "000001"])
    (warning,) = prepare_here(source, tmp_path / "both/M3D_Cap_npy", splits=index).warnings
    assert "1 volumes are in two splits, such as 000001/Axial.nii.gz" in warning
    for split, cases in {"train": ["000001"], "test": ["000003", "000001"]}.items():
        assert read_m3d_cap(tmp_path / "both", split)["case"][:] == cases


def test_a_later_call_keeps_the_splits_of_the_first(tmp_path):
    source, root = write_cases(tmp_path / "source", 3), tmp_path / "root"
    index = write_index(tmp_path / "index.json", train=["000002"], test=["000003", "000001"])
    prepare_here(source, root / "M3D_Cap_npy", splits=index)
    written = root / "M3D_Cap_npy/M3D_Cap.json"
    content = written.read_bytes()
    with pytest.raises(
        FileExistsError, match=r"splits from an index \(\w+\), .* the seed 0.* the same `splits` \(--splits\)"
    ):
        prepare_here(source, root / "M3D_Cap_npy")
    assert written.read_bytes() == content
    prepare_here(source, tmp_path / "drawn", seed=1)
    write_report(source / "000004")
    write_series(source / "000004/Axial")
    assert prepare_here(source, tmp_path / "drawn", seed=1).num_made == 1  # the source may grow
    for options in ({}, {"seed": 1, "splits": {"test": 0.5}}):
        with pytest.raises(FileExistsError, match="and the seed 1, this one .* or delete the index to split anew"):
            prepare_here(source, tmp_path / "drawn", **options)
    (tmp_path / "drawn/M3D_Cap_npy/M3D_Cap.json").unlink()
    assert prepare_here(source, tmp_path / "drawn").num_made == 0


def test_another_source_does_not_replace_what_was_made_of_the_first(tmp_path):
    """Whether they have a case of one name, or none."""
    first, out = write_cases(tmp_path / "first", 2), tmp_path / "out"
    prepare_here(first, out)
    before = {name: (out / name).read_bytes() for name in all_files(out)}
    for name, count in (("colliding", 1), ("disjoint", 1)):
        write_cases(tmp_path / name, count)
        write_series(tmp_path / name / "000001/Axial", seed=50)
    (tmp_path / "disjoint/000001").rename(tmp_path / "disjoint/000009")
    for name, cases in (("colliding", "1 cases that are not in .*000002"), ("disjoint", "2 cases .*000001, 000002")):
        with pytest.raises(FileExistsError, match=f"it names {cases}.* an earlier call made it of {first}, .*both"):
            prepare_here(tmp_path / name, out)
        assert {name: (out / name).read_bytes() for name in all_files(out)} == before
    first.rename(tmp_path / "moved")
    moved = prepare_here(tmp_path / "moved", out)
    assert moved.is_ok and moved.num_made == 0 and moved.warnings == []
    write_cases(tmp_path / "other", 2)
    warnings = prepare_here(tmp_path / "other", out).warnings
    assert warnings == [
        "2 volumes were replaced because their source changed (000001/Axial.nii.gz, 000002/Axial.nii.gz)"
    ]


def test_volumes_that_leave_the_index_are_told_of(tmp_path):
    source = write_cases(tmp_path / "source", 3)
    prepare_here(source, tmp_path / "M3D_Cap_npy")
    shutil.rmtree(source / "000002")
    report = prepare_here(source, tmp_path / "M3D_Cap_npy")
    assert report.is_ok and report.warnings == [
        "1 volumes of the former index left it (M3D_Cap_npy/000002/Axial.nii.gz): see whether the source is complete"
    ]
    assert report.warnings[0] in format_preparation_report(report)
    assert prepare_here(source, tmp_path / "M3D_Cap_npy").warnings == []


def test_a_written_index_that_was_changed_is_refused_with_a_remedy(tmp_path):
    source = write_cases(tmp_path / "source", 2)
    index = Path(prepare_here(source, tmp_path / "out").index)
    content = index.read_bytes()
    for changed in ("{", '{"train": []}'):
        index.write_text(changed)
        with pytest.raises(
            FileExistsError, match=r"M3D_Cap.json.*\. Preparation wrote this file .*: delete it to have it"
        ):
            prepare_here(source, tmp_path / "out")
    index.unlink()
    assert prepare_here(source, tmp_path / "out").num_made == 0 and index.read_bytes() == content


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="its file system takes UTF-8 names only")
def test_names_that_are_not_utf8_are_listed_and_the_others_prepared(tmp_path):
    source = write_cases(tmp_path / "source", 4)
    bad = os.fsdecode(b"M\xfcller")
    (source / f"000001/Axial/{bad}.doc").touch()
    (source / "000002").rename(source / bad)
    (source / "000003/text.txt").rename(source / f"000003/{bad}.txt")
    write_series(source / f"000004/{bad}", seed=9)
    report = prepare_here(source, tmp_path / "out")
    assert reasons(report) == {
        bad: "its name is not UTF-8: rename it",
        "000003": f"the report {bad}.txt: its name is not UTF-8: rename it",
        f"000004/{bad}": "its name is not UTF-8: rename it",
        f"000001/Axial/{bad}.doc": "not a .png or .jpeg file",
    }
    index = json.loads(Path(report.index).read_text())
    assert {entry["image"].split("/")[0] for entries in index.values() for entry in entries} == {"000001", "000004"}
    text = format_preparation_report(report)
    assert "  M\\udcfcller: its name is not UTF-8" in text and text.encode()
    assert bad in [
        row["case"] for row in json.loads((tmp_path / "out/preparation_report.json").read_text())["dropped"]
    ]
    assert "case,M\\udcfcller,,,its name" in (tmp_path / "out/preparation_report.csv").read_text()


def test_an_index_that_names_none_of_the_cases_is_refused_before_work(tmp_path, caplog):
    source = write_cases(tmp_path / "source/ct_case", 2)
    index = write_index(tmp_path / "index.json", train=["ct_case/000001"])
    message = "names none of the 2 cases in .*: it has ct_case/000001, the source 000001. Name the source folder"
    with pytest.raises(ValueError, match=message):
        prepare_here(source, tmp_path / "out", splits=index)
    with pytest.raises(ValueError, match="names none of the 2 cases in .*: it is empty"):
        prepare_here(source, tmp_path / "out", splits=write_index(tmp_path / "empty.json"))
    assert not (tmp_path / "out").exists()
    prepare_here(source.parent, tmp_path / "out", splits=index)
    assert "1 of the 2 cases" in caplog.text and "will be in no split: ct_case/000002" in caplog.text


def test_splits_that_an_earlier_version_drew_are_not_drawn_anew(tmp_path):
    source, destination = write_cases(tmp_path / "source", 3), tmp_path / "M3D_Cap_npy"
    report = prepare_here(source, destination)
    written, content = Path(report.index), Path(report.index).read_bytes()
    earlier = {name: value for name, value in report.to_dict().items() if name != "splits"}
    (destination / "preparation_report.json").write_text(json.dumps(earlier))
    with pytest.raises(FileExistsError, match="earlier version, which drew them otherwise: .* from there as `splits`"):
        prepare_here(source, destination)
    assert written.read_bytes() == content
    written.rename(tmp_path / "index.json")
    prepare_here(source, destination, splits=tmp_path / "index.json")
    assert json.loads(written.read_bytes()) == json.loads(content)


def test_splits_of_an_index_are_taken(tmp_path):
    write_cases(tmp_path / "source", 4)
    index = {
        "train": [{"image": "M3D_Cap_npy/000002/Axial.npy", "text": "M3D_Cap_npy/000002/text.txt"}],
        "validation": [{"image": "M3D_Cap_npy/000003/Axial.nii.gz", "text": "M3D_Cap_npy/000003/text.txt"}],
        "test": [{"image": f"000001/{name}.nii.gz", "text": "000001/text.txt"} for name in ("Axial", "Lost")],
    }
    (tmp_path / "index.json").write_text(json.dumps(index))
    report = prepare_here(tmp_path / "source", tmp_path / "M3D_Cap_npy", splits=tmp_path / "index.json")
    assert report.num_samples == {"train": 1, "validation": 1, "test": 1}
    assert [read_m3d_cap(tmp_path, split)["case"] for split in report.num_samples] == [
        ["000002"],
        ["000003"],
        ["000001"],
    ]
    assert reasons(report) == {
        "000004/Axial.nii.gz": "the given index does not name it, so it is in no split",
        "000001/Lost.nii.gz": "the given index names it, and no volume with a report was made of the source",
    }
    assert not report.is_ok


def test_each_reason_for_a_missing_case_or_series(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    write_series(source / "no_report/Axial")
    write_report(source / "two_reports")
    (source / "two_reports/other.txt").write_text("x")
    write_series(source / "two_reports/Axial")
    write_report(source / "empty_report", " \n")
    write_series(source / "empty_report/Axial")
    write_report(source / "no_series")
    (source / "nothing").mkdir()
    write_series(source / "loose")  # slices in the folder of the case itself
    (source / "loose/Axial").mkdir()
    write_report(source / "loose")
    bad = source / "bad"
    write_report(bad)
    write_series(bad / "good")
    write_series(bad / "single", count=1)
    write_series(bad / "jpg")
    for path in (bad / "jpg").iterdir():
        path.rename(path.with_suffix(".jpg"))
    (bad / "black").mkdir()
    for number in range(3):
        Image.new("L", (4, 5)).save(bad / f"black/{number}.png")
    (bad / "damaged.nii.gz").write_bytes(b"x" * 400)
    shutil.copy(Path(data_path) / "example4d.nii.gz", bad / "series4d.nii.gz")
    write_series(bad / "Pöschl", seed=1)
    write_series(bad / "poschl", seed=2)
    (bad / "Thumbs.db").write_bytes(b"")
    report = prepare_here(source, tmp_path / "out")
    found = reasons(report, "case", "series")
    assert found["no_report"] == "there is no report. Expected one .txt file."
    assert found["two_reports"].startswith("expected one report, got 2 .txt files (other.txt, text.txt)")
    assert found["empty_report"] == "the report is empty: fill in text.txt"
    for name in ("no_series", "loose"):
        assert found[name].startswith("there is no series: expected folders of .png or .jpeg slices")
    assert found["loose/Axial"] == "expected .png or .jpeg slices, it is empty"
    assert "there is no" in found["nothing"]
    assert found["bad/single"].startswith("expected the slices of a volume, got a single one of 20 x 30 pixels")
    assert found["bad/jpg"].endswith(": rename to .jpeg, or prepare with --accept-jpg (in Python `accept_jpg=True`)")
    assert found["bad/black"] == "all voxels are 0: the volume shows nothing."
    assert found["bad/damaged.nii.gz"].startswith("not a NIfTI file")
    assert "a series of 2 volumes" in found["bad/series4d.nii.gz"]
    assert found["bad/poschl"] == "its file would be poschl.nii.gz, which is that of Pöschl: rename one of them"
    assert len(found) == 13 and not report.is_ok
    assert reasons(report, "file")["bad/Thumbs.db"] == "neither a report (.txt) nor a NIfTI file"
    assert "slices belong in a folder for each series" in reasons(report, "file")["loose/0.png"]
    assert sum(report.num_samples.values()) == 3  # 000001/Axial, bad/good, bad/Poschl
    # Volumes without a report are there, but in no split.
    assert (tmp_path / "out/no_report/Axial.nii.gz").is_file()
    stack = read_slices(bad / "Pöschl")[0]
    expected = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))(stack)["pixel_values"][0, 0]
    assert torch.equal(read_back(tmp_path / "out/bad/Poschl.nii.gz"), expected)
    assert prepare_here(source, tmp_path / "out", accept_jpg=True).num_volumes == report.num_volumes + 1


def test_the_command_takes_jpg_slices_when_asked_to(tmp_path):
    source = write_cases(tmp_path / "source", 2)
    for path in (source / "000002/Axial").iterdir():
        path.rename(path.with_suffix(".jpg"))
    size = [str(number) for number in IMAGE_SIZE]
    arguments = ["prepare", "m3d-cap", source, tmp_path / "out", "--image-size", *size, "--workers", "0", "--json"]
    for options, code, count in (([], 1, 1), (["--accept-jpg"], 0, 2)):
        result = CliRunner().invoke(app, [*map(str, arguments), *options])
        assert result.exit_code == code, result.output
        assert json.loads(result.stdout)["num_volumes"] == count


def test_options_that_make_no_difference_to_a_series_leave_it_as_it_is(tmp_path):
    source = write_cases(tmp_path / "source", 2)
    for path in (source / "000002/Axial").iterdir():
        path.rename(path.with_suffix(".jpg"))
    prepare_here(source, tmp_path / "out")
    volume = tmp_path / "out/000001/Axial.nii.gz"
    before = volume.read_bytes(), volume.stat().st_mtime_ns
    assert prepare_here(source, tmp_path / "out", accept_jpg=True, hu_range="lung").num_made == 1
    assert (volume.read_bytes(), volume.stat().st_mtime_ns) == before
    write_scan(source / "000001/scan.nii.gz")
    prepare_here(source, tmp_path / "out")
    assert prepare_here(source, tmp_path / "out", hu_range="lung").num_made == 1


def test_volumes_of_earlier_versions_are_kept_where_jpg_makes_no_difference(tmp_path, monkeypatch):
    source, describe = write_cases(tmp_path / "source", 2), prepare.fingerprint_of
    (source / "000002/Axial/0.png").rename(source / "000002/Axial/0.jpg")

    def describe_as_earlier(processor, dtype, options):
        return describe(processor, dtype, {**options, "accept_jpg": True})

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "fingerprint_of", describe_as_earlier)
        prepare_here(source, tmp_path / "out", accept_jpg=True)
    assert prepare_here(source, tmp_path / "out", accept_jpg=True).num_made == 0
    assert prepare_here(source, tmp_path / "out").num_made == 1  # 000002, whose volume has the .jpg slice


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def test_damaged_slices_are_a_failure(tmp_path):
    source = write_cases(tmp_path / "source", 2)
    for number in (0, 2, 4):
        truncate(source / f"000002/Axial/{number}.png")
    size = [str(number) for number in IMAGE_SIZE]
    arguments = ["prepare", "m3d-cap", source, tmp_path / "out", "--image-size", *size, "--workers", "0"]
    for _ in range(2):  # when it is done before, too
        result = CliRunner().invoke(app, list(map(str, arguments)))
        assert result.exit_code == 1 and "damaged slices: copy these again, or delete them (3)" in result.stdout
    assert "000002/Axial/0.png: the picture cannot be read" in result.stdout
    with pytest.raises(
        InvalidVolumeError, match="Axial: 3 slices are damaged, beside 2 that can be read .* delete them"
    ):
        ProcessedVolumes(Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))).load(str(source / "000002/Axial"))
    for number in (0, 2, 4):
        (source / f"000002/Axial/{number}.png").unlink()
    assert prepare_here(source, tmp_path / "out").is_ok


def test_damaged_slices_stand_apart_from_cases_that_were_left_out(tmp_path, capsys):
    source = write_cases(tmp_path / "source", 3)
    truncate(source / "000002/Axial/0.png")
    (source / "000003/text.txt").unlink()
    text = format_preparation_report(prepare_here(source, tmp_path / "out", progress=True))
    assert "Cases and series that were left out (1):\n  000003: there is no report" in text
    assert "damaged slices: copy these again, or delete them (1):\n  000002/Axial/0.png: the picture" in text
    assert "with_failures=2" in capsys.readouterr().err


def test_slices_with_other_endings_are_a_failure_and_missing_numbers_a_warning(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    folder = source / "000001/Axial"
    (folder / "2.png").rename(folder / "2.PNG")
    (folder / "4.png").rename(folder / "6.JPG")
    for _ in range(2):
        report = prepare_here(source, tmp_path / "out")
        assert not report.is_ok and report.num_volumes == 1
        assert reasons(report, "slice") == {
            "000001/Axial/2.PNG": "its ending is not in small letters: rename to .png, in small letters",
            "000001/Axial/6.JPG": "not a .png or .jpeg file: rename to .jpeg, in small letters",
        }
        text = format_preparation_report(report)
        assert "misnamed slices: rename these, or delete them (1):\n  000001/Axial/2.PNG: its" in text
        assert report.warnings == [
            "000001/Axial: 2 numbers between the first slice and the last are missing (4 to 5): see whether all slices were "
            "copied"
        ]


def test_slices_with_numbers_that_are_not_in_plain_digits_are_a_failure(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    for number, name in ((0, "-1"), (4, "1_10")):
        (source / f"000001/Axial/{number}.png").rename(source / f"000001/Axial/{name}.png")
    report = prepare_here(source, tmp_path / "out")
    assert not report.is_ok and report.num_volumes == 1
    reason = "its number is not in plain digits: rename it, 0 or 1 being the first"
    assert reasons(report) == {"000001/Axial/-1.png": reason, "000001/Axial/1_10.png": reason}
    text = format_preparation_report(report)
    assert "misnamed slices: rename these, or delete them (2):\n  000001/Axial/-1.png: its number" in text


def test_volumes_that_lack_misnamed_slices_untold_are_made_anew(tmp_path, monkeypatch):
    source = write_cases(tmp_path / "source", 2)
    for number, name in ((2, "2.PNG"), (4, "+4.png")):
        (source / f"000001/Axial/{number}.png").rename(source / f"000001/Axial/{name}")
    (source / "000002/Axial/-1.png").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(slices, "describe_misnaming", lambda path, accept_jpg: "")  # as earlier versions
        assert prepare_here(source, tmp_path / "out").is_ok
    for num_made in (1, 0):
        report = prepare_here(source, tmp_path / "out")
        assert not report.is_ok and report.num_made == num_made
        assert [entry.name for entry in report.dropped if entry.is_failure] == ["+4.png", "2.PNG"]


def test_numbers_that_are_missing_are_told_of_volumes_made_before(tmp_path, monkeypatch):
    source = write_cases(tmp_path / "source", 1)
    (source / "000001/Axial/2.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "missing_numbers", lambda folder: [])  # as earlier versions
        assert prepare_here(source, tmp_path / "out").warnings == []
    report = prepare_here(source, tmp_path / "out")
    assert report.num_made == 0
    assert [warning[:60] for warning in report.warnings] == [
        "000001/Axial: 1 numbers between the first slice and the last"
    ]


def test_two_slices_of_one_number_are_a_warning(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    shutil.copy(source / "000001/Axial/1.png", source / "000001/Axial/01.jpeg")
    for _ in range(2):
        report = prepare_here(source, tmp_path / "out")
        assert report.is_ok
        assert report.warnings == [
            "000001/Axial: 2 slices share their number with another one (01.jpeg, 1.png), and all are in the stack: keep one "
            "of each"
        ]
    assert report.warnings[0] in format_preparation_report(report)


def test_what_was_told_of_the_numbers_is_told_again_without_a_look_at_the_slices(tmp_path, monkeypatch):
    source = write_cases(tmp_path / "source", 2)
    shutil.copy(source / "000001/Axial/1.png", source / "000001/Axial/01.jpeg")
    Image.new("L", (7, 5)).save(source / "000002/Axial/01.jpeg")  # of another shape, so not in the stack
    first = prepare_here(source, tmp_path / "out")
    assert [warning[:13] for warning in first.warnings] == ["000001/Axial:"]

    def fail(*arguments):
        raise AssertionError("the slices were sorted once more")

    monkeypatch.setattr(slices, "_sort_by_number", fail)
    again = prepare_here(source, tmp_path / "out")
    assert again.num_made == 0 and again.warnings == first.warnings


def test_a_text_above_the_cases_is_listed(tmp_path):
    source = tmp_path / "source"
    write_cases(source / "ct_case", 2)
    (source / "ct_case/readme.txt").write_text("About the cases.")
    report = prepare_here(source, tmp_path / "out")
    assert report.num_cases == 2 and report.is_ok
    assert reasons(report) == {"ct_case/readme.txt": "a text above cases, so the report of none: move it away"}


def test_a_scan_whose_report_may_be_either_of_two_texts_is_not_prepared(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    write_report(source / "P1")
    write_scan(source / "P1/nifti/scan.nii.gz")
    (source / "P1/nifti/log.txt").write_text("Converted.")
    report = prepare_here(source, tmp_path / "out")
    assert not report.is_ok and report.num_volumes == 1 and not (tmp_path / "out/P1").exists()
    assert reasons(report) == {
        "P1/nifti": "2 texts could be the report of these scans: keep one of P1/text.txt, P1/nifti/log.txt"
    }
    (source / "P1/nifti/log.txt").unlink()
    assert prepare_here(source, tmp_path / "out").is_ok
    assert (tmp_path / "out/P1/nifti_scan.nii.gz").is_file()


def test_a_fault_in_one_series_does_not_stop_the_others(tmp_path, monkeypatch):
    source = write_cases(tmp_path / "source", 3)

    def read(path, accept_jpg):
        if "000002" in str(path):
            raise MemoryError("no room")
        return read_slices(path, accept_jpg)

    monkeypatch.setattr(prepare, "read_slices", read)
    report = prepare_here(source, tmp_path / "out")
    assert report.num_volumes == 2
    assert reasons(report, "series") == {"000002/Axial": "MemoryError: no room"}


def test_what_is_done_is_left_as_it_is(tmp_path):
    source = write_cases(tmp_path / "source", 3)
    (source / "000001/Axial/x.db").write_bytes(b"")
    first = prepare_here(source, tmp_path / "out")
    files = {name: (tmp_path / "out" / name) for name in all_files(tmp_path / "out") if not name.startswith(".")}
    before = {name: (path.read_bytes(), path.stat().st_ino) for name, path in files.items() if name.startswith("0")}
    again = prepare_here(source, tmp_path / "out")
    assert (first.num_made, again.num_made, again.num_volumes) == (3, 0, 3)
    assert {name: (files[name].read_bytes(), files[name].stat().st_ino) for name in before} == before
    assert again.dropped == first.dropped and again.count("file") == 1

    write_series(source / "000002/Axial", seed=77)  # other pictures
    (source / "000003/text.txt").write_text("Another report.")
    files["000003/Axial.nii.gz"].write_bytes(before["000003/Axial.nii.gz"][0][:100])
    assert prepare_here(source, tmp_path / "out").num_made == 2
    assert files["000003/text.txt"].read_text() == "Another report."
    assert files["000001/Axial.nii.gz"].read_bytes() == before["000001/Axial.nii.gz"][0]
    assert files["000002/Axial.nii.gz"].read_bytes() != before["000002/Axial.nii.gz"][0]
    assert files["000003/Axial.nii.gz"].read_bytes() == before["000003/Axial.nii.gz"][0]
    assert prepare_here(source, tmp_path / "out", image_size=(12, 8, 16)).num_made == 3
    nibabel.save(
        nibabel.Nifti1Image(np.zeros((3, 4, 5)), np.eye(4)), files["000001/Axial.nii.gz"]
    )  # of something else, which is left as it is, and said
    report = prepare_here(source, tmp_path / "out", image_size=(12, 8, 16))
    assert report.num_made == 0 and not report.is_ok and "has not made it" in format_preparation_report(report)


def is_running(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_after_a_kill_the_same_call_goes_on(tmp_path):
    source, output = write_cases(tmp_path / "source", 30), tmp_path / "out"
    command = [sys.executable, preparation_program.__file__, str(source), str(output), "1"]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    wait_until(lambda: len(list(output.glob("0*/*.nii.gz"))) >= 3 or process.poll() is not None)
    process.kill()  # the worker is not told
    process.wait()
    wait_until(lambda: not is_running(process.pid))
    done = sorted(output.glob("0*/*.nii.gz"))
    assert 3 <= len(done) < 30 and not (output / "M3D_Cap_npy/M3D_Cap.json").exists()
    for path in done:
        assert read_back(path).shape == IMAGE_SIZE
    (output / "000030").mkdir(exist_ok=True)
    (output / f"000030/.Axial.nii.gz.{'0f' * 16}.tmp").write_bytes(b"half")  # as a kill within a write leaves it
    report = prepare_here(source, output)
    assert report.is_ok and report.num_volumes == 30 and report.num_made == 30 - len(done)
    prepare_here(source, tmp_path / "at_once")
    assert all_files(output) == all_files(tmp_path / "at_once")
    for name in all_files(output):
        if name.startswith("0"):
            assert (output / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes()


def test_a_case_that_ends_its_process_is_listed_and_the_others_are_made(tmp_path, monkeypatch):
    source = write_cases(tmp_path / "source", 3)
    monkeypatch.setattr(prepare, "_prepare_case", preparation_program.prepare_case_or_die)
    report = prepare_here(source, tmp_path / "out", num_workers=1, progress=True)
    assert reasons(report) == {"000001": "its process was ended from outside, as happens when memory runs out"}
    assert report.num_volumes == 2


def test_two_calls_do_not_work_on_one_folder(tmp_path):
    source = write_cases(tmp_path / "source", 1)
    prepare_here(source, tmp_path / "out")
    with (
        prepare._only_one_at(tmp_path / "out"),
        pytest.raises(BlockingIOError, match="another call is preparing this folder"),
    ):
        prepare_here(source, tmp_path / "out")
    assert prepare_here(source, tmp_path / "out").is_ok


def test_of_hidden_files_those_of_a_killed_call_alone_are_deleted(tmp_path):
    source, out = write_cases(tmp_path / "source", 1), tmp_path / "out"
    (out / "000001/.dir.tmp").mkdir(parents=True)
    (out / f".{'0f' * 16}.tmp").mkdir()
    (out / ".important.tmp").write_text("mine")
    leftover = out / f"000001/.Axial.nii.gz.{'0f' * 16}.tmp"
    leftover.write_bytes(b"half")
    assert prepare_here(source, out).is_ok
    assert (out / ".important.tmp").read_text() == "mine" and (out / "000001/.dir.tmp").is_dir()
    assert not leftover.exists()


def test_cases_may_lie_deeper(tmp_path):
    write_cases(tmp_path / "ct_case", 2)
    write_series(tmp_path / "other/group/7/Axial")  # without a report
    (tmp_path / "other/group/8").mkdir()
    (tmp_path / "readme.txt").write_text("x")
    assert find_cases(tmp_path) == ["ct_case/000001", "ct_case/000002", "other/group/7", "other/group/8"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"source": "missing"}, "there is no such folder. Expected one of case folders"),
        ({"source": "empty"}, "holds no case folders. Expected SRC/<case>/<series>/<number>.png"),
        ({"destination": "source/out"}, "expected a folder outside"),
        ({"image_size": (8, 12)}, "three positive numbers of voxels"),
        ({"intensity_mode": "windw"}, "did you mean 'window'"),
        ({"num_workers": -1}, "must be 0 or more, got -1"),
        ({"splits": {"val": 0.5}}, "must be an index, or fractions of the cases"),
        ({"splits": {"validation": 0.7, "test": 0.5}}, "must be an index, or fractions of the cases"),
        ({"splits": {"train": 0.5, "test": 0.2}}, "must be an index, or fractions of the cases"),
        ({"splits": "nowhere.json"}, r"nowhere.json: there is no such file\. `splits` \(--splits\) names an index"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_written(options, message, tmp_path):
    write_cases(tmp_path / "source", 1)
    (tmp_path / "empty").mkdir()
    folders = {"source": "source", "destination": "out", **options}
    source, destination = (tmp_path / folders.pop(name) for name in ("source", "destination"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare_here(source, destination, **folders)
    assert not destination.exists()


def test_what_preparation_has_not_made_is_not_replaced(tmp_path):
    write_cases(tmp_path / "raw", 1)
    write_series(tmp_path / "raw" / "000001" / "Axial")
    destination = tmp_path / "M3D_Cap_npy"
    index = destination / "M3D_Cap.json"
    index.parent.mkdir()
    official = {"train": [], "validation": [], "test": [{"image": "a", "text": "b"}]}
    index.write_text(json.dumps(official))
    with pytest.raises(
        FileExistsError, match="preparation has not made it, so it is not replaced. To keep its splits"
    ):
        prepare_here(tmp_path / "raw", destination)
    assert json.loads(index.read_text()) == official
    index.unlink()

    (volume := destination / "000001" / "Axial.nii.gz").parent.mkdir()
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), volume)
    content = volume.read_bytes()
    report = prepare_here(tmp_path / "raw", destination)
    assert volume.read_bytes() == content and not report.is_ok
    assert any("has not made it" in entry.reason for entry in report.dropped if entry.level == "series")


def test_a_full_disk_ends_the_call(tmp_path, monkeypatch):
    write_cases(tmp_path / "raw", 2)
    write_series(tmp_path / "raw" / "000001" / "Axial")

    def full(content, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "write_atomically", full)
    with pytest.raises(prepare.CannotWriteError, match="No space left on device.*the same call then goes on"):
        prepare_here(tmp_path / "raw", tmp_path / "out")


def test_a_report_that_cannot_be_written_does_not_hinder_the_next_call(tmp_path, monkeypatch):
    source, write = write_cases(tmp_path / "raw", 1), prepare.write_atomically

    def full(content, path):
        if path.name == "preparation_report.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, path)

    monkeypatch.setattr(prepare, "write_atomically", full)
    with pytest.raises(prepare.CannotWriteError, match="preparation_report.json: it cannot be written"):
        prepare_here(source, tmp_path / "out")
    monkeypatch.setattr(prepare, "write_atomically", write)
    assert prepare_here(source, tmp_path / "out").is_ok


@pytest.mark.parametrize("name", ["out", "000001"])
def test_a_folder_that_cannot_be_made_ends_the_call(name, tmp_path, monkeypatch):
    source, make = write_cases(tmp_path / "raw", 2), Path.mkdir

    def full(path, *arguments, **options):
        if path.name == name:
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(prepare.CannotWriteError, match=f"{name}: it cannot be written .No space left"):
        prepare_here(source, tmp_path / "out")


def test_a_folder_that_the_disk_cannot_hold_is_of_its_case_alone(tmp_path, monkeypatch):
    source, make = write_cases(tmp_path / "raw", 2), Path.mkdir

    def refuse(path, *arguments, **options):
        if path.name == "000001":
            raise OSError(errno.EINVAL, "Invalid argument")
        make(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    report = prepare_here(source, tmp_path / "out")
    assert report.num_volumes == 1 and "Invalid argument" in reasons(report, "case")["000001"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_a_folder_that_may_not_be_written_to_asks_for_no_space(number, tmp_path, monkeypatch):
    def refuse(content, path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(prepare, "write_atomically", refuse)
    with pytest.raises(prepare.CannotWriteError, match="Choose a folder that may be written to.*goes on") as error:
        prepare_here(write_cases(tmp_path / "raw", 1), tmp_path / "out")
    assert "space" not in str(error.value)


def test_a_link_back_invents_no_cases(tmp_path):
    write_report(tmp_path / "raw" / "set" / "000001")
    write_series(tmp_path / "raw" / "set" / "000001" / "Axial")
    (tmp_path / "raw" / "set" / "loop").symlink_to(tmp_path / "raw", target_is_directory=True)
    assert find_cases(tmp_path / "raw") == ["set/000001"]
