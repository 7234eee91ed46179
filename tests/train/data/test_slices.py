import io
import struct
import sys
import zlib
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parents[2] / "goldens"))
import golden_io
import make_slices

from med3dvlm.processing.volume_io import InvalidVolumeError
from med3dvlm.train.data import slices
from med3dvlm.train.data.slices import (
    damaged_slices,
    describe_rival_texts,
    extract_report,
    find_cases,
    find_series,
    is_slice_folder,
    open_scan,
    read_report,
    read_slices,
    to_ascii,
)


def write_slice(path, shape=(5, 7), seed=0, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 256, size=(*shape, 3), dtype=np.uint8)
    Image.fromarray(array).convert(mode).save(path)
    return path


def grey(path):
    return np.asarray(Image.open(path).convert("L"), dtype=np.float32) / 255


@pytest.fixture(scope="module")
def original_cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slices")
    make_slices.make_slices(folder, golden_io.load("prep").meta["salt"])
    return folder


def test_slices_are_stacked_as_the_original_stacks_them(original_cases):
    volumes = golden_io.load("prep").meta["volumes"]
    array, dropped = read_slices(original_cases / "000001/Axial_non_contrast")
    assert [1, *array.shape] == volumes["000001/Axial_non_contrast.nii.gz"]["before_crop_shape"] and dropped == []
    assert array.dtype == np.float32
    np.testing.assert_array_equal(array, make_slices.case_one(0).astype(np.float32) / 255)
    array, dropped = read_slices(original_cases / "000002/Pöschl_C__delayed")
    assert [1, *array.shape] == volumes["000002/Poschl_C__delayed.nii.gz"]["before_crop_shape"]
    reasons = dict(dropped)
    assert sorted(reasons) == ["16.png", "19.png", "23.png", "5.png", "notes.db"]
    assert reasons["5.png"] == "280 x 290 pixels, most slices have 280 x 300"
    assert reasons["19.png"] == "the picture cannot be read: not a picture"
    assert reasons["notes.db"] == "not a .png or .jpeg file"


def test_reports_are_those_of_the_original(original_cases):
    for name, text in golden_io.load("prep").meta["reports"].items():
        assert read_report(original_cases / Path(name).parent) == text


def test_order_is_that_of_the_numbers(tmp_path):
    for number in (10, 9, 100):
        write_slice(tmp_path / f"{number}.png", seed=number)
    write_slice(tmp_path / "011.jpeg", seed=11)
    array, dropped = read_slices(tmp_path)
    expected = [grey(tmp_path / name) for name in ("9.png", "10.png", "011.jpeg", "100.png")]
    np.testing.assert_array_equal(array, np.stack(expected))
    assert dropped == []


def test_of_two_shapes_as_frequent_the_first_stays(tmp_path):
    for number, shape in enumerate([(4, 6), (6, 4), (6, 4), (4, 6)]):
        write_slice(tmp_path / f"{number}.png", shape)
    array, dropped = read_slices(tmp_path)
    assert array.shape == (2, 4, 6) and [name for name, _ in dropped] == ["1.png", "2.png"]


@pytest.mark.parametrize("mode", ["P", "RGB", "RGBA", "LA", "1", "CMYK"])
def test_colours_become_grey_and_transparency_counts_for_nothing(mode, tmp_path):
    ending = ".jpeg" if mode == "CMYK" else ".png"
    write_slice(tmp_path / f"1{ending}", mode=mode)
    write_slice(tmp_path / f"2{ending}", mode=mode)
    array, dropped = read_slices(tmp_path)
    image = Image.open(tmp_path / f"1{ending}")
    expected = (image.convert("RGBA") if mode == "P" else image).convert("L")
    np.testing.assert_array_equal(array[0], np.asarray(expected, dtype=np.float32) / 255)
    assert dropped == []


def truncated(path):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(50, 70), dtype=np.uint8)).save(stream, "png")
    path.write_bytes(stream.getvalue()[:1500])


def of_16_bits(path):
    Image.fromarray(np.arange(35, dtype=np.uint16).reshape(5, 7) * 1000).save(path)


def of_16_bits_a_channel(channels, colour_type):
    def write(path):
        rows = b"".join(
            b"\0" + bytes(range(14 * channels)) for _ in range(5)
        )  # 5 rows of 7 pixels, each after a filter
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 7, 5, 16, colour_type, 0, 0, 0)), (b"IDAT", zlib.compress(rows))]
        content = b"\x89PNG\r\n\x1a\n"
        for name, data in [*chunks, (b"IEND", b"")]:
            content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        path.write_bytes(content)

    return write


@pytest.mark.parametrize(
    "name, write, reason",
    [
        ("3.png", truncated, "cannot be read: .*truncated"),
        ("3.png", lambda path: path.write_bytes(b""), "cannot be read: not a picture"),
        ("3.png", of_16_bits, "more than 8 bits a pixel .* save the series as NIfTI"),
        ("3.png", of_16_bits_a_channel(3, 2), r"more than 8 bits a channel \(RGB\).* save the series as NIfTI"),
        ("3.png", of_16_bits_a_channel(2, 4), "more than 8 bits"),
        ("3.png", of_16_bits_a_channel(4, 6), r"more than 8 bits a channel \(RGBA\)"),
        ("3.png", lambda path: path.mkdir(), "a folder"),
        (
            "3.jpg",
            lambda path: write_slice(path),
            "not a .png or .jpeg file: rename to .jpeg, or prepare with --accept-jpg",
        ),
        ("three.png", lambda path: write_slice(path), "no whole number"),
        ("3.5.png", lambda path: write_slice(path), "no whole number"),
        *(
            (f"{name}.png", lambda path: write_slice(path), "not in plain digits: rename it, 0 or 1 being the first")
            for name in ("2_1", "+1", "-1", "\u0663")
        ),
        ("._3.png", lambda path: path.write_bytes(b"x"), "no whole number"),
        ("3.png", lambda path: write_slice(path, (7, 5)), "7 x 5 pixels, most slices have 5 x 7"),
        ("3.PNG", lambda path: write_slice(path), "rename to .png, in small letters"),
        ("3.Jpeg", lambda path: write_slice(path), "rename to .jpeg, in small letters"),
        ("3.JPG", lambda path: write_slice(path), "not a .png or .jpeg file: rename to .jpeg, in small letters$"),
        ("three.PNG", lambda path: write_slice(path), "not a .png or .jpeg file"),
    ],
)
def test_whatever_is_no_slice_is_listed_with_the_reason(name, write, reason, tmp_path):
    for number in (1, 2):
        write_slice(tmp_path / f"{number}.png")
    write(tmp_path / name)
    array, dropped = read_slices(tmp_path)
    assert array.shape == (2, 5, 7)
    ((dropped_name, text),) = dropped
    assert dropped_name == name
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(text)
    is_misnamed = name in ("3.PNG", "3.Jpeg") or "plain digits" in reason
    assert bool(damaged_slices(dropped)) == ("cannot be read" in reason or is_misnamed)


def test_a_stack_that_lacks_slices_for_their_endings_is_refused(tmp_path):
    for name in ("1.png", "2.PNG", "3.png", "6.JPG"):
        write_slice(tmp_path / name.lower().replace("jpg", "jpeg")).rename(tmp_path / name)
    message = "1 slices are damaged or misnamed, beside 2 that can be read .2.PNG: .* rename to .png, in small letters"
    with pytest.raises(InvalidVolumeError, match=f"{message}.. Mend them; to do without them, delete them."):
        open_scan(str(tmp_path))
    _, dropped = read_slices(tmp_path, accept_jpg=True)
    assert [name for name, _ in damaged_slices(dropped)] == ["2.PNG", "6.JPG"]


def test_a_stack_that_lacks_slices_for_their_numbers_is_refused(tmp_path):
    for number in range(-2, 4):
        write_slice(tmp_path / f"{number}.png")
    message = "2 slices are damaged or misnamed, beside 4 that can be read .-1.png: its number is not in plain digits"
    with pytest.raises(InvalidVolumeError, match=f"{message}: rename .*Mend them; to do without them, delete them."):
        open_scan(str(tmp_path))


@pytest.mark.parametrize(
    "numbers, told",
    [
        ((1, 2, 4), "1 numbers between the first slice and the last are missing (3)"),
        ((0, 2, 3, 40), "37 numbers between the first slice and the last are missing (1, 4 to 39)"),
        ((1, 2, 3, 4), ""),
        ((0, 1, 2), ""),
        ((5, 10, 15), ""),
        ((1, 2, 3, 10**15), f"{10**15 - 4} numbers"),
    ],
)
def test_numbers_that_are_missing_are_told_of(numbers, told, tmp_path, caplog):
    for number in numbers:
        write_slice(tmp_path / f"{number}.png")
    assert len(open_scan(str(tmp_path))[0].data) == len(numbers)
    assert told in caplog.text and bool(told) == bool(caplog.text)


def test_a_slice_that_is_there_but_not_in_the_stack_is_no_gap(tmp_path, caplog):
    for number, shape in ((1, (5, 7)), (2, (5, 7)), (3, (7, 5)), (4, (5, 7))):
        write_slice(tmp_path / f"{number}.png", shape)
    assert open_scan(str(tmp_path))[0].shape == (3, 5, 7)
    assert "missing" not in caplog.text


def test_what_a_mac_leaves_in_archives_is_no_case(tmp_path):
    write_text(tmp_path / "1/text.txt")
    write_slice(tmp_path / "1/Axial/1.png")
    for name in ("__MACOSX/1/Axial/._1.png", "1/__MACOSX/Axial/._1.png", "1/Sagittal/._1.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"x")
    assert find_cases(tmp_path) == ["1"]
    assert [path.name for path in find_series(tmp_path / "1")] == ["Axial"]
    assert not is_slice_folder(tmp_path / "1/Sagittal")


def test_a_picture_too_large_for_pillow_is_listed(tmp_path, monkeypatch):
    for number, shape in ((1, (5, 7)), (2, (5, 7)), (3, (8, 9)), (4, (20, 30))):
        write_slice(tmp_path / f"{number}.png", shape)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60)
    array, dropped = read_slices(tmp_path)
    reasons = dict(dropped)
    assert array.shape == (2, 5, 7) and sorted(reasons) == ["3.png", "4.png"]
    assert reasons["3.png"] == "9 x 8 pixels are more than a slice has (at most 60)"
    assert "exceeds limit" in reasons["4.png"]  # Pillow's own refusal, from twice as many


def test_jpg_is_taken_when_wanted(tmp_path):
    for number in (1, 2, 3):
        write_slice(tmp_path / f"{number}.jpg", seed=number)
    assert not is_slice_folder(tmp_path) and is_slice_folder(tmp_path, accept_jpg=True)
    array, dropped = read_slices(tmp_path, accept_jpg=True)
    np.testing.assert_array_equal(array[2], grey(tmp_path / "3.jpg"))
    assert dropped == []


@pytest.mark.parametrize(
    "endings, message",
    [
        ((".jpg", ".jpg"), "got a folder of .jpg files: rename to .jpeg, or prepare with --accept-jpg"),
        ((".PNG", ".JPG"), "got a folder of .JPG, .PNG files: rename them to .png or .jpeg, in small letters"),
    ],
)
def test_a_folder_of_pictures_with_other_endings_is_refused_with_a_remedy(endings, message, tmp_path):
    for number, ending in enumerate(endings):
        write_slice(tmp_path / f"{number}{ending}")
    with pytest.raises(InvalidVolumeError, match=message):
        open_scan(str(tmp_path))


def test_two_slices_of_one_number_are_told_of(tmp_path, caplog):
    for name in ("1.png", "1.jpeg", "2.png"):
        write_slice(tmp_path / name)
    assert open_scan(str(tmp_path))[0].shape == (3, 5, 7)
    assert "2 slices share their number with another one (1.jpeg, 1.png), and all are in the stack" in caplog.text


def test_a_twin_that_is_not_in_the_stack_shares_no_number(tmp_path, caplog):
    for name in ("1.png", "2.png"):
        write_slice(tmp_path / name)
    write_slice(tmp_path / "1.jpeg", (7, 5))
    assert open_scan(str(tmp_path))[0].shape == (2, 5, 7)
    assert "share their number" not in caplog.text and "1.jpeg: 7 x 5 pixels" in caplog.text


def write_text(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("A cyst.")


def test_a_text_above_cases_swallows_none(tmp_path):
    for name in ("set/stray.txt", "set/1/text.txt", "set/2/text.txt", "flat/stray.txt", "flat/3/text.txt"):
        write_text(tmp_path / name)
    write_slice(tmp_path / "set/1/Axial/1.png")
    (tmp_path / "flat/3/scan.nii.gz").touch()
    (tmp_path / "flat/4").mkdir()
    assert find_cases(tmp_path) == ["flat/3", "flat/4", "set/1", "set/2"]


def test_two_texts_that_could_be_the_report_of_a_scan_are_told_of(tmp_path):
    for name in ("P1/report.txt", "P1/nifti/log.txt", "set/stray.txt", "set/1/text.txt", "set/2/text.txt"):
        write_text(tmp_path / name)
    for name in ("P1/nifti", "set/1"):
        (tmp_path / name / "scan.nii.gz").touch()
    for name in ("set/1", "set/2"):
        write_slice(tmp_path / name / "Axial/1.png")
    cases = find_cases(tmp_path)
    assert cases == ["P1/nifti", "set/1", "set/2"]
    assert [describe_rival_texts(tmp_path, case) for case in cases] == [
        "2 texts could be the report of these scans: keep one of P1/report.txt, P1/nifti/log.txt", "", ""
    ]  # fmt: skip
    assert describe_rival_texts(tmp_path / "P1", "nifti") == ""  # what lies beside the cases is no part of one
    (tmp_path / "P1/nifti/log.txt").unlink()
    assert find_cases(tmp_path) == ["P1", "set/1", "set/2"] and describe_rival_texts(tmp_path, "P1") == ""


def test_a_case_with_its_text_stays_one(tmp_path):
    for name in ("1/text.txt", "2/text.txt", "2/scans/notes/x.txt", "3/text.txt", "3/Axial/notes.txt"):
        write_text(tmp_path / name)
    (tmp_path / "1/empty").mkdir()
    (tmp_path / "2/scans/scan.nii.gz").touch()
    write_slice(tmp_path / "3/Axial/1.png")
    assert find_cases(tmp_path) == ["1", "2", "3"]


def test_a_series_without_slices_is_refused(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such folder. Expected one of slices"):
        read_slices(tmp_path / "missing")
    with pytest.raises(InvalidVolumeError, match=r"named by whole numbers, such as 12.png.*the folder is empty"):
        read_slices(tmp_path)
    write_slice(tmp_path / "a.png")
    with pytest.raises(InvalidVolumeError, match=r"got none that can be used \(a.png: its name"):
        read_slices(tmp_path)
    write_slice(tmp_path / "1.png")
    with pytest.raises(InvalidVolumeError, match="a single one of 5 x 7 pixels, and 1 other files. Collect"):
        read_slices(tmp_path)
    write_slice(tmp_path / "2.png")
    monkeypatch.setattr(slices, "MAX_VOXELS", 69)
    with pytest.raises(InvalidVolumeError, match="more than 69 pixels in all"):
        read_slices(tmp_path)


def test_series_of_a_case_are_folders_of_slices_and_nifti_files(tmp_path):
    write_slice(tmp_path / "b/1.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "report.txt").write_text("x")
    (tmp_path / "nested").mkdir()
    for path in (tmp_path / "a.nii.gz", tmp_path / "nested/c.nii"):
        nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), dtype=np.int16), np.eye(4)), path)
    (tmp_path / ".hidden.nii.gz").write_bytes(b"")
    found = [path.relative_to(tmp_path).as_posix() for path in find_series(tmp_path)]
    assert found == ["a.nii.gz", "b", "nested/c.nii"]
    with pytest.raises(FileNotFoundError, match="Expected the folder of a case"):
        find_series(tmp_path / "missing")


def test_a_case_has_one_report(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no report. Expected one .txt file"):
        read_report(tmp_path)
    (tmp_path / "a.txt").write_bytes("\ufeffstudy_findings: Größe 4 mm.\r\nNone else.\r\n".encode())
    assert read_report(tmp_path) == "Größe 4 mm. None else."
    (tmp_path / "b.txt").write_text("x")
    with pytest.raises(ValueError, match=r"got 2 .txt files \(a.txt, b.txt\). Keep one"):
        read_report(tmp_path)
    (tmp_path / "b.txt").unlink()
    (tmp_path / "a.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(ValueError, match="expected a text in UTF-8 .* at byte 2"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    "text, report",
    [
        ("", ""),
        (" \n ", ""),
        ("study_findings: a b c d", "study_findings: a b c d"),
        ("study_findings: a b c d e", "a b c d e"),
        ("discussion: Long enough.\nstudy_findings:\n", "Long enough. study_findings:"),
        ("discussion: x\nstudy_findings: y", "x study_findings: y"),
        ("study_findings: First study_findings: second", "First study_findings: second"),
    ],
)
def test_report_is_what_follows_the_heading(text, report):
    assert extract_report(text) == report


@pytest.mark.parametrize(
    "name, plain",
    [
        ("Axial_C+", "Axial_C+"),
        ("Pöschl", "Poschl"),
        ("Po\u0308schl", "Poschl"),
        ("Straße_Ø\u20132", "Strasse_O-2"),
        ("轴位", "__"),
        ("a\u2100b", "aa_cb"),
    ],
)
def test_names_in_ascii(name, plain):
    assert to_ascii(name) == plain
