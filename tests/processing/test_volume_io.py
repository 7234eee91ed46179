import base64
import gzip
import itertools
import re
from pathlib import Path
from urllib.parse import quote

import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path

from med3dvlm.processing import volume_io
from med3dvlm.processing.volume_io import (
    InvalidVolumeError,
    check_orientation,
    flatten_volumes,
    open_volume,
    orient,
    read_stored_voxels,
    read_voxels,
    scale_stored,
    spacing_of,
)


SHAPE = (5, 7, 9)  # (i, j, k), all different
SERIES = Path(data_path) / "example4d.nii.gz"


def volume_array(shape=SHAPE, dtype=np.int16):
    return np.random.default_rng(0).integers(-1000, 1000, size=shape).astype(dtype)


def write_nifti(path, array=None, affine=None, change=None):
    """Writes a file and then lets `change` alter its raw bytes, as no library would write them."""
    array = volume_array() if array is None else array
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    if change is not None:
        content = bytearray(path.read_bytes() if path.suffix == ".nii" else gzip.decompress(path.read_bytes()))
        change(content)
        path.write_bytes(content if path.suffix == ".nii" else gzip.compress(bytes(content)))
    return path


def put(offset, dtype, *values):
    """A change of the NIfTI-1 header: `values` of `dtype` at byte `offset`."""

    def change(content):
        data = np.array(values, dtype=dtype).tobytes()
        content[offset : offset + len(data)] = data

    return change


# Byte offsets of NIfTI-1 header fields (nifti1.h): dim 40, datatype 70, pixdim 76, magic 344.
BAD_FILES = {
    "an absurd size": (put(42, "<i2", 32767, 32767, 32767), "more than any scan has"),
    "more voxels than bytes": (put(42, "<i2", 500, 500, 500), "truncated or damaged: the header claims"),
    "an empty axis": (put(44, "<i2", 0), r"expected voxels on every axis, got \(5, 0, 9\)"),
    "two axes": (put(40, "<i2", 2, 5, 7), "expected three axes, got 2"),
    "no axes": (put(40, "<i2", 0), "claims 0 axes"),
    "zero spacing": (put(80, "<f4", 0.0), r"positive voxel size in mm.*\[0.0, 1.0, 1.0\]"),
    "negative spacing": (put(84, "<f4", -2.0), r"positive voxel size in mm.*-2.0"),
    "NaN spacing": (put(88, "<f4", np.nan), "positive voxel size in mm.*nan"),
    "complex voxels": (put(70, "<i2", 32, 16), "complex numbers.*magnitude"),
    "colours": (put(70, "<i2", 128, 16), "colours.*one channel"),
    "a header of another file": (put(344, "S4", b"ni1"), "a header whose voxels lie in a second file"),
    "no header": (put(0, "<i4", 7), "not a NIfTI file"),
}


@pytest.mark.parametrize("fault", BAD_FILES)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_bad_header_is_refused_by_name(fault, suffix, tmp_path):
    change, message = BAD_FILES[fault]
    if suffix == ".nii.gz" and fault == "more voxels than bytes":
        change = put(42, "<i2", 1000, 1000, 900)  # beyond what gzip could have packed into this file
    path = write_nifti(tmp_path / f"scan{suffix}", change=change)
    with pytest.raises(InvalidVolumeError, match=message) as caught:
        open_volume(path)
    assert str(path) in str(caught.value)
    with pytest.raises(InvalidVolumeError, match=message):
        open_volume(path.read_bytes())


def bad_affine(**entries):
    affine = np.eye(4)
    for name, value in entries.items():
        affine[int(name[1]), int(name[2])] = value
    return affine


@pytest.mark.parametrize(
    "affine, message",
    [
        (bad_affine(a22=0), "affine is singular"),
        (bad_affine(a02=1, a22=0), "affine is singular"),
        (bad_affine(a00=np.nan), "finite numbers"),
        (bad_affine(a13=np.inf), "finite numbers"),
    ],
)
def test_bad_affine_is_refused(affine, message, tmp_path):
    sform = put(280, "<f4", *affine[:3].ravel())  # nibabel would not write these itself
    path = write_nifti(tmp_path / "scan.nii", affine=np.diag([1, 1, 1.5, 1]), change=sform)
    with pytest.raises(InvalidVolumeError, match=message):
        open_volume(path)


@pytest.mark.parametrize("keep", [0.3, 0.9])
def test_truncated_gzip_is_refused_by_name(keep, tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz", volume_array((20, 30, 40)))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(InvalidVolumeError, match=r"scan\.nii\.gz: truncated or damaged.*Copy or download it again"):
        read_voxels(open_volume(path))
    with pytest.raises(InvalidVolumeError, match="truncated or damaged"):
        open_volume(path.read_bytes())


@pytest.mark.parametrize("place", [-8, -1])  # in the checksum, and in the length
def test_gzip_whose_checksum_differs_is_refused(place, tmp_path, monkeypatch):
    monkeypatch.setattr(volume_io, "gzip_reader", gzip)  # igzip compares them at the last byte that is asked for
    path = write_nifti(tmp_path / "scan.nii.gz", volume_array((20, 30, 40)))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(InvalidVolumeError, match=r"scan\.nii\.gz: truncated or damaged"):
        read_voxels(open_volume(path))
    with pytest.raises(InvalidVolumeError, match="truncated or damaged"):
        open_volume(bytes(content))


def test_truncated_plain_file_is_refused_by_name(tmp_path):
    path = write_nifti(tmp_path / "scan.nii")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InvalidVolumeError, match=r"scan\.nii: truncated or damaged"):
        open_volume(path)


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("nowhere/scan.nii.gz", FileNotFoundError, "nowhere/scan.nii.gz: there is no such file"),
        ("https://example.org/scan.nii.gz", InvalidVolumeError, "expected a local file"),
        (data_path, InvalidVolumeError, "got a folder.*dcm2niix"),
        (__file__, InvalidVolumeError, r"expected a NIfTI file.*got \.py"),
        (b"short", InvalidVolumeError, "not a NIfTI file"),
        (None, InvalidVolumeError, "got NoneType"),
        (3.5, InvalidVolumeError, "got float"),
        (np.zeros((4, 5)), InvalidVolumeError, r"\(depth, height, width\), got \(4, 5\)"),
        (torch.zeros(3, 4, 5, 6), InvalidVolumeError, "one channel.*pick one channel"),
        (np.zeros((4, 5, 6, 3)), InvalidVolumeError, r"stand last: pick one channel, `volume\[\.\.\., 0\]`"),
        (np.zeros((4, 5, 6, 1)), InvalidVolumeError, r"`volume\[\.\.\., 0\]`"),
        (np.zeros((4, 5, 6, 9)), InvalidVolumeError, "along the axis where they stand.*`volume_index`"),
        (np.zeros((1, 5, 6)), InvalidVolumeError, "a single slice"),
        (np.zeros((0, 5, 6)), InvalidVolumeError, "the volume is empty"),
        (np.zeros((4, 5, 6), dtype=complex), InvalidVolumeError, "complex numbers"),
        (np.zeros((4, 5, 6), dtype=[("R", "u1"), ("G", "u1")]), InvalidVolumeError, "colours"),
        (np.full((4, 5, 6), "x"), InvalidVolumeError, "one real number a voxel"),
        (torch.ones(4, 5, 6).to_sparse(), InvalidVolumeError, r"sparse.*call `\.to_dense\(\)` first"),
        (np.ma.masked_less(np.arange(120).reshape(4, 5, 6), 9), InvalidVolumeError, r"9 .*`\.filled\(-1000\)`"),
        (nibabel.load(Path(data_path) / "minc1_4d.mnc"), InvalidVolumeError, "MINC series.*one volume as NIfTI"),
    ],
    ids=lambda value: type(value).__name__ if np.ndim(value) or hasattr(value, "affine") else str(value),
)
def test_bad_source_is_refused(source, error, message):
    with pytest.raises(error, match=message):
        open_volume(source)


def test_name_that_denies_the_compression_is_refused(tmp_path):
    path = write_nifti(tmp_path / "scan.nii.gz").rename(tmp_path / "scan.nii")
    with pytest.raises(InvalidVolumeError, match="gzip-compressed, which its name denies"):
        open_volume(path)


def test_nothing_is_read_when_a_file_is_opened(tmp_path):
    path = write_nifti(tmp_path / "scan.nii")
    volume = open_volume(path)
    assert volume.shape == SHAPE and volume.dtype == np.int16 and volume.axis_codes == "RAS"
    path.unlink()
    with pytest.raises(InvalidVolumeError, match="truncated or damaged"):
        read_voxels(volume)


@pytest.mark.parametrize("image_class", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_all_forms_of_a_volume_give_the_same_voxels(image_class, tmp_path):
    array = volume_array()
    image = image_class(array, np.diag([0.7, 0.8, 2.5, 1]))
    image.header.set_slope_inter(2.0, -5.0)
    for suffix in (".nii", ".nii.gz"):
        path = tmp_path / f"scan{suffix}"
        nibabel.save(image, path)
        expected = np.asarray(nibabel.load(path).dataobj)
        assert expected.max() > 100
        for source in (path, str(path), path.read_bytes(), nibabel.load(path)):
            volume = open_volume(source)
            assert np.array_equal(read_voxels(volume), expected)
            assert spacing_of(volume.affine) == pytest.approx((0.7, 0.8, 2.5))
    for source in (array, array[None], torch.from_numpy(array), torch.from_numpy(array)[None]):
        volume = open_volume(source)
        assert volume.affine is None and np.array_equal(read_voxels(volume), array)


@pytest.mark.parametrize(
    "suffix, begin, encode",
    [
        (".nii", "data:application/gzip;base64,", base64.b64encode),
        (".nii.gz", "data:application/gzip;base64,", base64.b64encode),
        (".nii.gz", "data:;base64,", base64.encodebytes),  # lines of 76
        (".nii.gz", "data:;base64,", lambda content: quote(base64.b64encode(content), safe="").encode()),
        (".nii.gz", "DATA:application/gzip;BASE64,", base64.b64encode),
    ],
)
def test_a_data_address_is_the_file_that_it_holds(suffix, begin, encode, tmp_path):
    path = write_nifti(tmp_path / f"scan{suffix}", affine=np.diag([0.7, 0.8, 2.5, 1]))
    volume = open_volume(f"{begin}{encode(path.read_bytes()).decode()}")
    assert np.array_equal(read_voxels(volume), read_voxels(open_volume(path)))
    assert np.array_equal(volume.affine, open_volume(path).affine) and volume.name.endswith("in memory")


@pytest.mark.parametrize(
    "address", ["data:,SECRET", "DATA:,SECRET://", "data:text/plain,SECRET", "data:;base64,SECRET!", "data:SECRET"]
)
def test_a_data_address_that_is_none_is_refused_without_showing_it(address):
    with pytest.raises(
        InvalidVolumeError, match="expected `data:.*;base64,` and the content of a NIfTI file"
    ) as caught:
        open_volume(address)
    assert "SECRET" not in str(caught.value)


def test_an_opened_volume_is_returned_as_it_is():
    volume = open_volume(volume_array())
    assert open_volume(volume) is volume
    assert flatten_volumes([[volume], volume]) == [volume, volume]


def test_batch_array_counts_as_its_volumes():
    batch = np.stack([volume_array(), volume_array() + 1])[:, None]
    volumes = flatten_volumes([batch, [volume_array()]])
    assert [volume.shape for volume in volumes] == [SHAPE] * 3
    assert np.array_equal(read_voxels(volumes[1]), batch[1, 0])


def test_series_needs_an_index():
    volume = open_volume(SERIES)
    assert volume.shape == (128, 96, 24, 2)
    with pytest.raises(InvalidVolumeError, match=r"series of 2 .*`volume_index`, from 0 to 1"):
        read_voxels(volume)
    with pytest.raises(InvalidVolumeError, match="`volume_index` 2 is not in this file, which has 2 volumes"):
        read_voxels(volume, 2)
    assert np.array_equal(read_voxels(volume, 1), np.asarray(nibabel.load(SERIES).dataobj)[..., 1])


def test_first_axis_of_a_series_is_the_fastest(tmp_path):
    array = volume_array((*SHAPE, 2, 3))
    volume = open_volume(write_nifti(tmp_path / "scan.nii", array))
    assert np.array_equal(read_voxels(volume, 1), array[..., 1, 0])
    assert np.array_equal(read_voxels(volume, 2), array[..., 0, 1])


def test_minc_image_of_one_volume_is_read():
    image = nibabel.load(Path(data_path) / "minc1_1_scale.mnc")
    assert np.array_equal(read_voxels(open_volume(image)), np.asarray(image.dataobj))


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, lambda batch: np.ma.masked_equal(batch.numpy(), 1)])
def test_batches_are_refused_as_their_volumes(convert):
    with pytest.raises(InvalidVolumeError, match=r"sparse|masked"):
        flatten_volumes(convert(torch.arange(240).reshape(2, 1, 4, 5, 6)))


def test_array_with_a_mask_that_masks_nothing_is_read():
    assert np.array_equal(read_voxels(open_volume(np.ma.array(volume_array()))), volume_array())


def test_series_of_one_needs_no_index(tmp_path):
    path = write_nifti(tmp_path / "scan.nii", volume_array()[..., None])
    assert read_voxels(open_volume(path)).shape == SHAPE


def test_unknown_orientation_is_remembered(tmp_path):
    image = nibabel.Nifti1Image(volume_array(), None)
    nibabel.save(image, tmp_path / "scan.nii")
    assert not open_volume(tmp_path / "scan.nii").is_orientation_known
    assert open_volume(write_nifti(tmp_path / "known.nii")).is_orientation_known


@pytest.mark.parametrize(
    "qform, codes, expected",
    [
        (
            np.diag([-2.0, 3.0, 4.0, 1.0]),
            (1, 2),
            r"sform says axes RAS of 2 x 3 x 4 mm, the qform axes LAS .*sform_code 1, qform",
        ),
        (np.diag([2.0, 3.0, 4.1, 1.0]), (2, 1), r"the qform axes RAS of 2 x 3 x 4.1 mm, and the sform was used"),
        (np.diag([2.0, 3.0, 4.01, 1.0]), (1, 1), None),
        (np.diag([-2.0, 3.0, 5.0, 1.0]), (1, 0), None),
        (np.diag([-2.0, 3.0, 5.0, 1.0]), (0, 1), None),
    ],
)
def test_two_affines_that_differ_are_remembered(qform, codes, expected, tmp_path):
    image = nibabel.Nifti1Image(volume_array(), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.set_qform(qform, code=codes[1])
    image.header.set_sform(np.diag([2.0, 3.0, 4.0, 1.0]), code=codes[0])
    nibabel.save(image, tmp_path / "scan.nii")
    for source in (nibabel.load(tmp_path / "scan.nii"), tmp_path / "scan.nii"):
        conflict = open_volume(source).conflict
        assert conflict is None if expected is None else re.search(expected, conflict)
        assert codes[0] == 0 or spacing_of(open_volume(source).affine) == (2, 3, 4)


@pytest.mark.parametrize("step, qfac, axis_codes", [(-2.0, -1, "LAS"), (2.0, 1, "RAS"), (2.0, 0, "RAS")])
def test_a_qform_alone_says_how_the_patient_lies(step, qfac, axis_codes, tmp_path):
    def change(content):
        put(252, "<i2", 1, 0)(content)  # qform_code and sform_code
        put(280, "<f4", *np.zeros(12))(content)  # the sform
        put(76, "<f4", qfac)(content)

    volume = open_volume(write_nifti(tmp_path / "scan.nii", affine=np.diag([step, 3.0, 4.0, 1.0]), change=change))
    assert volume.axis_codes == axis_codes and volume.is_orientation_known
    assert spacing_of(volume.affine) == (2, 3, 4)


def test_an_unreadable_qform_beside_a_sform_is_remembered(tmp_path):
    def change(content):
        put(252, "<i2", 1, 1)(content)  # both codes
        put(256, "<f4", 1.0, 1.0, 1.0)(content)  # a quaternion longer than 1

    path = write_nifti(tmp_path / "scan.nii", change=change)
    assert "the qform cannot be read" in open_volume(path).conflict


def test_tensor_with_an_affine_is_refused():
    class TensorWithAffine(torch.Tensor):
        affine = torch.eye(4)

    with pytest.raises(InvalidVolumeError, match=r"got one with an affine.*nibabel\.Nifti1Image\(tensor\[0\]"):
        open_volume(torch.zeros(1, 4, 5, 6).as_subclass(TensorWithAffine))


def test_metatensor_of_monai_is_refused_until_its_affine_is_handed_over():
    meta_tensor = pytest.importorskip("monai.data", reason="MONAI is not installed").MetaTensor
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    tensor = meta_tensor(torch.from_numpy(volume_array())[None], affine=affine)
    with pytest.raises(InvalidVolumeError, match="MetaTensor of shape .*one with an affine"):
        flatten_volumes([tensor])
    volume = open_volume(nibabel.Nifti1Image(tensor[0].numpy(), tensor.affine.numpy()))
    assert spacing_of(volume.affine) == (2, 3, 4) and np.array_equal(read_voxels(volume), volume_array())
    assert open_volume(tensor.as_tensor()).affine is None


@pytest.mark.parametrize("unit, factor", [("mm", 1), ("meter", 1000), ("micron", 0.001), ("unknown", 1)])
def test_lengths_are_millimetres_whatever_the_header_counts_in(unit, factor, tmp_path):
    image = nibabel.Nifti1Image(volume_array(), np.diag([2.0, 3.0, 4.0, 1.0]))
    image.header.set_xyzt_units(unit)
    nibabel.save(image, tmp_path / "scan.nii")
    for source in (image, tmp_path / "scan.nii"):
        assert spacing_of(open_volume(source).affine) == pytest.approx((2 * factor, 3 * factor, 4 * factor))


def test_canonical_volume_becomes_slices_from_feet_to_head():
    array = volume_array()
    affine = np.diag([2.0, 3.0, 4.0, 1.0])
    oriented, oriented_affine = orient(array, affine, "LPS")
    assert np.array_equal(oriented, array[::-1, ::-1].transpose(2, 1, 0))
    # depth grows to superior (+z), height to posterior (-y), width to the patient's left (-x)
    assert np.array_equal(oriented_affine[:3, :3], [[0, 0, -2], [0, -3, 0], [4, 0, 0]])


@pytest.mark.parametrize("codes", ["".join(codes) for axes in itertools.permutations(["LR", "PA", "IS"])
                                   for codes in itertools.product(*axes)])  # fmt: skip
@pytest.mark.parametrize("target", ["LPS", "RAS", "SAR"])
def test_every_stored_orientation_gives_the_same_oriented_volume(codes, target):
    array, affine = volume_array(), np.diag([0.7, 0.8, 2.5, 1.0])
    expected, expected_affine = orient(array, affine, target)
    to_codes = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(codes)
    )
    stored = nibabel.Nifti1Image(array, affine).as_reoriented(to_codes)
    oriented, oriented_affine = orient(np.asarray(stored.dataobj), stored.affine, target)
    assert np.array_equal(oriented, expected)
    np.testing.assert_allclose(oriented_affine, expected_affine, atol=1e-12)


def test_oblique_volume_takes_the_nearest_axes():
    angle = np.deg2rad(20)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    affine = np.eye(4)
    affine[:3, :3] = rotation @ np.diag([1, 2, 3])
    oriented, oriented_affine = orient(volume_array(), affine, "LPS")
    assert np.array_equal(oriented, volume_array()[::-1, ::-1].transpose(2, 1, 0))
    world = affine @ [1, 2, 3, 1]  # voxel (1, 2, 3) stands at depth 3, height 7 - 1 - 2, width 5 - 1 - 1
    np.testing.assert_allclose(oriented_affine @ [3, 4, 3, 1], world, atol=1e-12)


def test_none_keeps_the_stored_axes():
    array = volume_array()
    oriented, affine = orient(array, np.diag([-2.0, 3.0, 4.0, 1.0]), "none")
    assert np.array_equal(oriented, array.transpose(2, 1, 0))
    assert spacing_of(affine) == (4.0, 3.0, 2.0)


def test_orienting_copies_nothing():
    array = volume_array()
    assert np.shares_memory(orient(array, np.diag([-2.0, -3.0, 4.0, 1.0]), "LPS")[0], array)


@pytest.mark.parametrize("orientation", ["LPX", "LP", "LRS", "lps", "", None, 3, ["L", "P", "S"]])
def test_unknown_orientation_word_is_refused(orientation):
    with pytest.raises(ValueError, match="one letter each of L/R, P/A and I/S"):
        check_orientation(orientation)


@pytest.mark.parametrize("slope, intercept", [(0.37, -3.1), (1.0, -1024.0), (2.0, 0.0), (-0.5, 10.0), (1.0, 0.0)])
@pytest.mark.parametrize("ending", ["nii", "nii.gz"])
def test_stored_voxels_with_their_scaling_are_the_voxels(slope, intercept, ending, tmp_path):
    path = tmp_path / f"scan.{ending}"
    image = nibabel.Nifti1Image(volume_array(), np.eye(4))
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, path)
    volume = open_volume(path)
    stored, *scaling = read_stored_voxels(volume)
    expected = read_voxels(volume)
    assert scaling[0] > 0 and np.array_equal(scale_stored(stored, *scaling), expected)
    assert scale_stored(stored, *scaling).dtype == expected.dtype
    assert (stored.dtype == np.int16) is (slope > 0)


def test_standard_library_reads_what_the_faster_one_reads(tmp_path, monkeypatch):
    path = write_nifti(tmp_path / "scan.nii.gz")
    expected = read_voxels(open_volume(path))
    monkeypatch.setattr(volume_io, "gzip_reader", gzip)
    assert np.array_equal(read_voxels(open_volume(path)), expected)
    assert np.array_equal(read_voxels(open_volume(path.read_bytes())), expected)


@pytest.mark.parametrize(
    "name, message", [("12.PNG", "a folder of pictures.*prepare m3d-cap"), ("a.dcm", "a folder.*dcm2niix")]
)
def test_a_folder_is_refused_with_the_remedy_for_what_is_in_it(name, message, tmp_path):
    (tmp_path / name).touch()
    with pytest.raises(InvalidVolumeError, match=f"expected one NIfTI file for each volume, got {message}"):
        open_volume(tmp_path)
