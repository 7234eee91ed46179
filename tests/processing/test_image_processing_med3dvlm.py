import json
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from nibabel.testing import data_path
from PIL import Image
from transformers import AutoImageProcessor


sys.path.insert(0, str(Path(__file__).parents[1] / "goldens"))
import golden_io
import make_slices

from med3dvlm import CT_WINDOWS, Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.processing.image_processing_med3dvlm import PLANES_AT_ONCE, Scan, format_preprocessing_report
from med3dvlm.processing.volume_io import InvalidVolumeError
from med3dvlm.train.tokenizers import build_tiny_tokenizer


IMAGE_SIZE = [16, 32, 48]
DATA = Path(__file__).parents[3] / "shared" / "data"
needs_data = pytest.mark.skipif(not DATA.exists(), reason="the real volumes are not beside this checkout")


def processor(**overrides):
    return Med3DVLMImageProcessor(**{"image_size": IMAGE_SIZE, **overrides})


def ct_array(shape=(10, 12, 14)):
    """Values as a CT's, in HU, shape (depth, height, width)."""
    return np.random.default_rng(0).integers(-1000, 1500, size=shape).astype(np.int16)


def ct_image(array=None, affine=None):
    array = ct_array((14, 12, 10)) if array is None else array
    return nibabel.Nifti1Image(array, np.diag([0.7, 0.8, 2.5, 1]) if affine is None else affine)


def image_of_unknown_orientation():
    image = ct_image()
    image.header["qform_code"] = image.header["sform_code"] = 0
    return image


def whole(**overrides):
    """A processor that only orients and scales, so that values can be followed."""
    return processor(do_crop_foreground=False, do_resize=False, **overrides)


@needs_data
def test_all_48_stored_orientations_of_a_head_give_identical_pixel_values():
    files = sorted((DATA / "orientations").glob("*.nii.gz"))
    assert len(files) == 48
    expected = processor()(files[0])["pixel_values"]
    different = [file.name for file in files if not torch.equal(processor()(file)["pixel_values"], expected)]
    assert different == []


def read_slices(folder):
    """A series folder as the M3D-Cap preparation stacks it: (depth, height, width), 8-bit grey over 255."""
    slices = []
    for path in sorted((path for path in folder.iterdir() if path.suffix == ".png"), key=lambda path: int(path.stem)):
        try:
            image = Image.open(path)
            image = image.convert("RGBA") if image.mode == "P" else image
            slices.append(np.asarray(image.convert("L"), dtype=np.float32) / 255)
        except OSError:
            continue  # the set has a damaged file, which the preparation leaves out
    shapes = [image.shape for image in slices]
    most_frequent = max(shapes, key=shapes.count)
    return np.stack([image for image in slices if image.shape == most_frequent])


def test_m3d_cap_preparation_equals_the_original(tmp_path):
    golden = golden_io.load("prep")
    make_slices.make_slices(tmp_path, golden.meta["salt"])
    image_processor = Med3DVLMImageProcessor(intensity_mode="minmax")
    folders = {"000001/Axial_non_contrast": None, "000002/Poschl_C__delayed": "000002/Pöschl_C__delayed"}
    for name, folder in folders.items():
        stack = read_slices(tmp_path / (folder or name))
        pixel_values = image_processor(stack)["pixel_values"]
        assert pixel_values.shape == (1, 1, 128, 256, 256)
        golden_io.check(golden, f"{name}.nii.gz", pixel_values[0, 0].numpy(), tolerance=1e-6)


@pytest.mark.parametrize(
    "make_source",
    [
        lambda path: path,
        lambda path: str(path),
        lambda path: path.read_bytes(),
        lambda path: nibabel.load(path),
        lambda path: [path],
        lambda path: [[nibabel.load(path)]],
    ],
)
def test_every_form_of_a_file_gives_the_same_values(make_source, tmp_path):
    path = tmp_path / "scan.nii.gz"
    nibabel.save(ct_image(), path)
    expected = processor()(path)["pixel_values"]
    assert expected.shape == (1, 1, *IMAGE_SIZE) and expected.dtype == torch.float32
    assert torch.equal(processor()(make_source(path))["pixel_values"], expected)


def test_arrays_are_taken_in_the_models_order():
    array = ct_array()
    expected = processor()(array)["pixel_values"]
    for source in (
        array[None],
        torch.from_numpy(array),
        torch.from_numpy(array)[None, None],
        array.astype(np.float64),
    ):
        assert torch.equal(processor()(source)["pixel_values"], expected)
    assert torch.equal(processor()(array.astype(">i2"))["pixel_values"], expected)
    flipped = nibabel.Nifti1Image(array.transpose(2, 1, 0)[::-1, ::-1], np.eye(4))  # the same scan, stored as RAS
    assert torch.equal(processor()(flipped)["pixel_values"], expected)


def test_batch_equals_its_volumes_one_by_one():
    volumes = [ct_array(), ct_array((9, 20, 11)), ct_image()]
    batch = processor()(volumes)["pixel_values"]
    assert batch.shape == (3, 1, *IMAGE_SIZE)
    for volume, expected in zip(volumes, batch):
        assert torch.equal(processor()(volume)["pixel_values"][0], expected)


def test_resize_is_trilinear_without_aligned_corners():
    array = ct_array()
    scaled = whole(intensity_mode="minmax")(array)["pixel_values"]
    expected = torch.nn.functional.interpolate(scaled, IMAGE_SIZE, mode="trilinear", align_corners=False)
    resized = processor(intensity_mode="minmax", do_crop_foreground=False)(array)["pixel_values"]
    assert torch.equal(resized, expected)


def test_windows_are_those_in_which_ct_is_read():
    """From their widths and levels in HU, which is how they are taught, written down here once more."""
    width_and_level = {
        "wide": (2000, 0),
        "soft_tissue": (400, 40),
        "lung": (1500, -600),
        "bone": (1500, 300),
        "brain": (80, 40),
        "mediastinum": (350, 50),
        "liver": (150, 30),
    }
    expected = {name: (level - width / 2, level + width / 2) for name, (width, level) in width_and_level.items()}
    assert expected == CT_WINDOWS


@pytest.mark.parametrize("window", [*CT_WINDOWS, (-50.0, 350.0)])
def test_window_clips_and_scales_hu(window):
    lower, upper = CT_WINDOWS.get(window, window)
    array = ct_array()
    values = whole(intensity_mode="window", hu_range=window)(array)["pixel_values"][0, 0]
    expected = (np.clip(array.astype(np.float64), lower, upper) - lower) / (upper - lower)
    np.testing.assert_allclose(values.numpy(), expected, atol=1e-6)


def test_percentile_scales_between_the_volumes_own_percentiles():
    array = ct_array().astype(np.float32) + 1000
    values = whole(intensity_mode="percentile", intensity_percentiles=[5, 90])(array)["pixel_values"][0, 0]
    lower, upper = np.percentile(array, [5, 90])
    np.testing.assert_allclose(values.numpy(), (np.clip(array, lower, upper) - lower) / (upper - lower), atol=1e-6)


@pytest.mark.parametrize(
    "values, expected",
    [
        ((-1000, 1500), "window"),
        ((-200, 300), "window"),
        ((-199, 300), "minmax"),
        ((-610, 30000), "minmax"),
        ((0, 255), "minmax"),
        ((0, 1), "minmax"),
    ],
)
def test_auto_windows_what_has_air_in_hu_and_scales_the_rest(values, expected):
    array = np.linspace(*values, 4 * 5 * 6).reshape(4, 5, 6)
    report = processor()(array, return_report=True)["preprocessing_report"][0]
    assert report["intensity_mode"] == expected
    assert report["intensity_range"] == ([-1000, 1000] if expected == "window" else list(values))


def test_values_in_a_narrow_range_become_0_to_1_too():
    array = np.linspace(0, 3e-9, 4 * 5 * 6).reshape(4, 5, 6)  # such as diffusion in m^2/s
    values = whole(intensity_mode="minmax")(array)["pixel_values"]
    assert values.min() == 0 and values.max() == 1


def test_foreground_is_the_smallest_box_of_voxels_above_zero():
    array = np.zeros((10, 12, 14), dtype=np.uint8)
    array[2:5, 3:9, 4:11] = 7
    array[2, 3, 4] = 0  # a zero inside the box stays
    batch = processor(do_resize=False)(array, return_report=True)
    assert batch["pixel_values"].shape == (1, 1, 3, 6, 7)
    assert batch["preprocessing_report"][0]["crop_box"] == [[2, 5], [3, 9], [4, 11]]


def test_foreground_of_ct_is_what_lies_above_the_window_not_above_zero_hu():
    array = np.full((10, 12, 14), -1000, dtype=np.int16)
    array[2:5, 3:9, 4:11] = -100
    array[3, 4, 5] = 40
    report = processor(intensity_mode="window")(array, return_report=True)["preprocessing_report"][0]
    assert report["crop_box"] == [[2, 5], [3, 9], [4, 11]]


@pytest.mark.parametrize("mode", ["auto", "window", "percentile", "minmax"])
@pytest.mark.parametrize("slope, intercept", [(1, -1024), (2, -300), (0.37, -3.1)])
def test_values_that_a_file_scales_are_prepared_as_the_scaled_values(slope, intercept, mode, tmp_path):
    stored = np.zeros((14, 12, 10), dtype=np.uint16)
    # Their mean decides what they are, and would decide otherwise without the slope, or without the intercept.
    stored[1:13, 2:12, 1:9] = np.random.default_rng(0).integers(1000, 3000, size=(12, 10, 8))
    image = ct_image(stored)
    image.header.set_slope_inter(slope, intercept)
    nibabel.save(image, tmp_path / "stored.nii.gz")
    slope, intercept = (float(np.float32(value)) for value in (slope, intercept))  # as the header has them
    nibabel.save(ct_image((stored * slope + intercept).astype(np.float32)), tmp_path / "scaled.nii.gz")
    window = [intercept + slope * value for value in (1200.5, 2500.5)]
    ours, expected = (
        processor(intensity_mode=mode, hu_range=window)(tmp_path / f"{name}.nii.gz", return_report=True)
        for name in ("stored", "scaled")
    )
    torch.testing.assert_close(ours["pixel_values"], expected["pixel_values"], atol=1e-5, rtol=0)
    report, expected_report = ours["preprocessing_report"][0], expected["preprocessing_report"][0]
    assert report["crop_box"] == expected_report["crop_box"] == [[1, 9], [0, 10], [1, 13]]
    assert report["intensity_mode"] == expected_report["intensity_mode"]
    assert mode != "auto" or report["intensity_mode"] == ("window" if (slope, intercept) == (1, -1024) else "minmax")
    for name in ("source_range", "intensity_range", "clipped_fraction"):
        assert report[name] == pytest.approx(expected_report[name], rel=1e-4)


def test_affine_of_the_report_puts_the_grid_back_on_the_scan():
    # A volume whose voxels are linear in world coordinates: trilinear interpolation keeps it exact away from the rim.
    angle = np.deg2rad(10)
    affine = np.array([[0, np.cos(angle) * 0.8, -np.sin(angle) * 2, -40], [-0.7, 0, 0, 55],
                       [0, np.sin(angle) * 0.8, np.cos(angle) * 2, 10], [0, 0, 0, 1]])  # fmt: skip
    shape = (30, 26, 20)
    index = np.stack([*np.indices(shape), np.ones(shape)])
    world = np.einsum("ab,bijk->aijk", affine, index)
    values = 1000 + 3 * world[0] + 5 * world[1] - 2 * world[2]
    values[:4] = values[:, :3] = values[..., 17:] = 0  # a border for the crop to remove
    batch = processor(intensity_mode="minmax")(nibabel.Nifti1Image(values, affine), return_report=True)
    report = batch["preprocessing_report"][0]
    grid = np.stack([*np.indices(IMAGE_SIZE), np.ones(IMAGE_SIZE)])
    placed = np.einsum("ab,bdhw->adhw", np.array(report["affine"]), grid)
    lower, upper = report["intensity_range"]
    expected = (1000 + 3 * placed[0] + 5 * placed[1] - 2 * placed[2] - lower) / (upper - lower)
    inner = (slice(2, -2), slice(4, -4), slice(6, -6))
    np.testing.assert_allclose(batch["pixel_values"][0, 0].numpy()[inner], expected[inner], atol=2e-6)
    np.testing.assert_allclose(report["spacing"], np.linalg.norm(np.array(report["affine"])[:3, :3], axis=0))


def test_report_says_what_was_done():
    report = processor(hu_range="lung")(ct_image(), return_report=True)["preprocessing_report"][0]
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    assert report["source_shape"] == [14, 12, 10] and report["oriented_shape"] == [10, 12, 14]
    assert report["source_spacing"] == pytest.approx([0.7, 0.8, 2.5])
    assert report["oriented_spacing"] == pytest.approx([2.5, 0.8, 0.7])
    assert report["source_orientation"] == "RAS" and report["orientation"] == "LPS"
    assert report["source_dtype"] == "int16" and report["shape"] == IMAGE_SIZE
    assert report["intensity_mode"] == "window" and report["intensity_range"] == [-1350, 150]
    assert report["clipped_fraction"] == pytest.approx(float((ct_array((14, 12, 10)) > 150).mean()))
    assert report["warnings"] == []
    text = format_preprocessing_report(report)
    assert "14 x 12 x 10 voxels of int16, 0.7 x 0.8 x 2.5 mm, axes RAS" in text
    assert "window: -1350 became 0 and 150 became 1" in text


@pytest.mark.parametrize(
    "source, message",
    [
        (ct_array(), "An array has no affine"),
        (image_of_unknown_orientation(), "does not say how the patient lies"),
        (ct_image(affine=np.diag([1, 1, 12, 1])), "1 to 12 mm apart"),
        (ct_image(affine=np.diag([0.002, 0.002, 0.002, 1])), "0.002 to 0.002 mm apart"),
        (ct_image(np.linspace(-250, 1200, 24).reshape(2, 3, 4)), "none is as low as air"),
        (ct_image(np.arange(24, 2424, 100, dtype=np.uint16).reshape(2, 3, 4)), "stored with an offset"),
        (ct_image(np.arange(24, 2424, 100, dtype=np.float32).reshape(2, 3, 4)), "stored with an offset"),
        (ct_image(np.linspace(-4096, 4095, 24).reshape(2, 3, 4)), "38 % of the voxels lie above 1000, which no CT"),
        (ct_image(np.linspace(-150, 500, 24).reshape(2, 3, 4)), "not as in CT"),
    ],
)
def test_report_warns_of_what_deserves_a_second_look(source, message):
    report = processor()(source, return_report=True)["preprocessing_report"][0]
    assert any(message in warning for warning in report["warnings"])
    assert message in format_preprocessing_report(report)


HEAD = np.arange(24).reshape(2, 3, 4)  # as a CT of a skull-stripped head: 0 outside, no negative value


@pytest.mark.parametrize(
    "values, options, message",
    [
        (
            HEAD * 4.0,
            {"hu_range": "brain"},
            r'`hu_range` was given but not used.*\'minmax\'.*`intensity_mode="window"`',
        ),
        (HEAD * 4.0, {"intensity_percentiles": [1, 90]}, 'given but not used.*`intensity_mode="percentile"`'),
        (HEAD * 4.0 - 50, {"hu_range": "brain", "intensity_mode": "percentile"}, "but not used.*'percentile': pass"),
        (HEAD * 4.0, {"hu_range": "brain", "intensity_mode": "window"}, "from 0 to 92 look like an 8-bit export"),
        (HEAD * 100, {}, "offset, often of 1024. Subtract it; or all around .* was set to 0.*ask for 'window'"),
        (HEAD * 200, {}, "offset, often of 1024. Subtract it.$"),  # 4600: beyond HU
    ],
)
def test_report_warns_of_options_and_values_of_another_mode(values, options, message):
    report = processor()(ct_image(values.astype(np.float32)), return_report=True, **options)["preprocessing_report"][0]
    assert [warning for warning in report["warnings"] if re.search(message, warning)]


def test_options_of_the_used_mode_are_no_reason_to_warn():
    for image_processor, options in (
        (processor(hu_range="brain"), {}),  # not of this call
        (processor(), {"hu_range": "brain", "intensity_mode": "window"}),
        (processor(), {"intensity_percentiles": [1, 90], "intensity_mode": "percentile"}),
    ):
        report = image_processor(ct_image(HEAD * 40.0), return_report=True, **options)["preprocessing_report"][0]
        assert report["warnings"] == []


def test_report_names_a_header_that_contradicts_itself(tmp_path):
    image = ct_image()
    image.set_sform(np.diag([0.7, 0.8, 2.5, 1]), code=1)
    image.set_qform(np.diag([-0.7, 0.8, 2.5, 1]), code=2)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    report = processor()(tmp_path / "scan.nii.gz", return_report=True)["preprocessing_report"][0]
    (warning,) = report["warnings"]
    assert "The header contradicts itself: the sform says axes RAS" in warning and "the qform axes LAS" in warning


def test_air_below_the_window_and_a_narrow_window_are_no_reason_to_warn():
    array = ct_array((14, 12, 10))
    array[:9] = -1024
    for hu_range in ("wide", "brain"):
        report = processor(hu_range=hu_range)(ct_image(array), return_report=True)["preprocessing_report"][0]
        assert report["clipped_fraction"] > 0.6 and report["warnings"] == []


def test_report_of_another_format_is_plain_numbers(tmp_path):
    nibabel.save(nibabel.MGHImage(ct_array((14, 12, 10)).astype(np.int32), np.eye(4)), tmp_path / "scan.mgz")
    report = processor()(nibabel.load(tmp_path / "scan.mgz"), return_report=True)["preprocessing_report"][0]
    assert json.loads(json.dumps(report)) == report and report["source_shape"] == [14, 12, 10]


def test_volume_of_truth_values_has_percentiles():
    array = ct_array() > 0
    values = whole(intensity_mode="percentile")(array)["pixel_values"][0, 0]
    assert np.array_equal(values.numpy(), array)


def with_value(value):
    array = ct_array().astype(np.float32)
    array[1, 2, 3] = array[4, 5, 6] = value
    return array


@pytest.mark.parametrize(
    "source, options, message",
    [
        (with_value(np.nan), {}, "2 of 1680 voxels are NaN or infinite"),
        (with_value(-np.inf), {}, "2 of 1680 voxels are NaN or infinite"),
        (with_value(np.inf), {}, "2 of 1680 voxels are NaN or infinite"),
        (np.full((4, 5, 6), -1000.0), {}, "all voxels are -1000"),
        (ct_array() / 5000 + 0.5, {"intensity_mode": "window"}, r"expects CT in HU.*scaled to \[0, 1\] already"),
        (np.arange(120, dtype=np.uint8).reshape(4, 5, 6), {"intensity_mode": "window"}, "an 8-bit export"),
        (ct_array(), {"intensity_mode": "none"}, r"expects values in \[0, 1\], got -1000 to"),
        (np.arange(120.0).reshape(4, 5, 6), {"intensity_mode": "none"}, r"\[0, 1\], got 0 to 119"),
        (ct_array(), {"intensity_mode": "window", "hu_range": [4000, 5000]}, "no voxel lies within the window"),
        (np.eye(40)[None] + np.zeros((40, 40, 40)), {"intensity_mode": "percentile"}, None),
        (with_value(5) * 0 + (with_value(5) == 5), {"intensity_mode": "percentile"}, "are both 0"),
        ([], {}, "at least one volume, got an empty list"),
        (Path(data_path) / "example4d.nii.gz", {}, "series of 2"),
        (Path(data_path) / "example4d.nii.gz", {"volume_index": 5}, "`volume_index` 5"),
        (np.zeros((3, 4, 5, 6)), {}, "one channel"),
        (Image.new("L", (8, 8)), {}, "got Image"),
    ],
)
def test_volumes_that_cannot_be_used_are_refused(source, options, message):
    if message is None:
        assert processor()(source, **options)["pixel_values"].isfinite().all()
        return
    with pytest.raises(InvalidVolumeError, match=message):
        processor()(source, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"image_size": [16, 32]}, "three positive numbers"),
        ({"image_size": [16, 32, 0]}, "three positive numbers"),
        ({"image_size": 16}, "three positive numbers.*got 16"),
        ({"hu_range": 80}, "two numbers.*got 80"),
        ({"intensity_percentiles": 99}, "two numbers.*got 99"),
        ({"do_crop_foreground": "no"}, "True or False, got 'no'"),
        ({"volume_index": 1.5}, "a whole number"),
        ({"do_rescale": True}, "`do_rescale` is an option of pictures.*use `intensity_mode`"),
        ({"size": {"height": 8, "width": 8}}, "`size` is an option of pictures.*use `image_size`"),
        ({"data_format": "channels_last"}, "`data_format` is an option of pictures.*leave it out"),
        ({"input_data_format": "channels_last"}, "`input_data_format` is an option of pictures.*leave it out"),
        ({"orientation": "LPL"}, "one letter each"),
        ({"orientation": None}, "one letter each.*got None"),
        ({"orientation": 3}, "one letter each.*got 3"),
        ({"hu_rnge": "lung"}, "no option `hu_rnge`; did you mean `hu_range`"),
        ({"intensity_mode": "windw"}, "did you mean 'window'"),
        ({"hu_range": "lungs"}, "did you mean 'lung'"),
        ({"hu_range": [100, -100]}, "the lower first"),
        ({"hu_range": [0]}, "two numbers"),
        ({"intensity_percentiles": [50, 150]}, "from 0 to 100"),
    ],
)
def test_impossible_options_are_refused_when_made_and_when_called(options, message):
    with pytest.raises(ValueError, match=message):
        processor(**options)
    with pytest.raises(ValueError, match=message):
        processor()(ct_array(), **options)


def test_a_volume_of_a_series_can_be_picked():
    series = nibabel.load(Path(data_path) / "example4d.nii.gz")
    picked = processor()(series, volume_index=1)["pixel_values"]
    single = nibabel.Nifti1Image(np.asarray(series.dataobj)[..., 1], series.affine)
    assert torch.equal(picked, processor()(single)["pixel_values"])


def test_choices_are_saved_beside_the_weights(tmp_path):
    ours = processor(hu_range="brain", intensity_mode="percentile", orientation="RAS", do_crop_foreground=False)
    ours.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert set(saved) == {
        "auto_map", "do_crop_foreground", "do_resize", "hu_range", "image_processor_type", "image_size",
        "intensity_mode", "intensity_percentiles", "orientation",
    }  # fmt: skip
    loaded = Med3DVLMImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == ours.to_dict()
    assert torch.equal(loaded(ct_array())["pixel_values"], ours(ct_array())["pixel_values"])
    assert Med3DVLMImageProcessor.from_pretrained(tmp_path, image_size=[8, 9, 10]).image_size == [8, 9, 10]


def test_saving_beside_a_processor_that_would_win_is_refused(tmp_path):
    whole = Med3DVLMProcessor(processor(hu_range="lung"), build_tiny_tokenizer())
    whole.save_pretrained(tmp_path)
    processor(hu_range="lung").save_pretrained(tmp_path)  # the same: nothing is lost
    with pytest.raises(
        ValueError, match=r"processor_config\.json: .*other values of 'intensity_mode', 'hu_range', and"
    ):
        processor(hu_range="brain", intensity_mode="window").save_pretrained(tmp_path)
    assert Med3DVLMImageProcessor.from_pretrained(tmp_path).hu_range == "lung"
    whole.image_processor = processor(hu_range="brain")
    whole.save_pretrained(tmp_path)
    assert Med3DVLMImageProcessor.from_pretrained(tmp_path).hu_range == "brain"


def test_the_source_is_not_changed():
    array = ct_array().astype(np.float32)
    before = array.copy()
    processor()(array)
    assert np.array_equal(array, before)


def test_volumes_of_different_sizes_do_not_make_a_batch():
    with pytest.raises(ValueError, match="different sizes.*leave `do_resize` on"):
        whole()([ct_array(), ct_array((5, 6, 7))], return_tensors="pt")
    assert [tuple(entry.shape) for entry in whole()([ct_array(), ct_array((5, 6, 7))])["pixel_values"]] == [
        (1, 10, 12, 14),
        (1, 5, 6, 7),
    ]


def test_mistyped_option_is_refused_when_loaded(tmp_path):
    processor().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no option `hu_rnge`; did you mean `hu_range`"):
        Med3DVLMImageProcessor.from_pretrained(tmp_path, hu_rnge="lung")
    with pytest.raises(ValueError, match="no option `hu_rnge`; did you mean `hu_range`"):
        AutoImageProcessor.from_pretrained(tmp_path, hu_rnge="lung")
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intensity_mod": "percentile"}))
    with pytest.raises(ValueError, match="no option `intensity_mod`; did you mean `intensity_mode`"):
        Med3DVLMImageProcessor.from_pretrained(tmp_path)


def test_options_of_a_tokenizer_and_of_loading_are_no_mistakes(tmp_path):
    processor().save_pretrained(tmp_path)
    others = {"padding_side": "left", "use_fast": True, "model_max_length": 512, "trust_remote_code": False}
    for loader in (Med3DVLMImageProcessor, AutoImageProcessor):
        loaded = loader.from_pretrained(tmp_path, hu_range="lung", **others)
        assert loaded.hu_range == "lung" and not others.keys() & loaded.to_dict().keys()
    _, unused = Med3DVLMImageProcessor.from_pretrained(tmp_path, hu_rnge="lung", return_unused_kwargs=True)
    assert unused == {"hu_rnge": "lung"}


def test_the_result_is_put_where_a_call_says():
    assert processor()(ct_array(), device="cpu")["pixel_values"].device.type == "cpu"
    assert processor()(ct_array(), device=torch.device("meta"))["pixel_values"].is_meta
    with pytest.raises(ValueError, match="`device` belongs to a call"):
        processor(device="meta")


def test_numpy_numbers_serve_as_options():
    plain = processor(image_size=[8, 9, 10], hu_range=[-100.0, 100.0])
    numpy = processor(image_size=np.array([8, 9, 10]), hu_range=np.array([-100.0, 100.0]))
    assert json.loads(numpy.to_json_string()) == json.loads(plain.to_json_string())
    series = Path(data_path) / "example4d.nii.gz"
    assert processor()(series, volume_index=np.int64(1), image_size=[np.int64(8)] * 3)["pixel_values"].shape[-1] == 8


def test_options_of_one_call_are_not_saved():
    assert not {"volume_index", "return_report"} & set(processor(volume_index=1, return_report=True).to_dict())


@needs_data
@pytest.mark.parametrize(
    "name, mode", [("ct_body_hu", "window"), ("ct_head_angio", "minmax"), ("mr_brain_gd", "minmax")]
)
def test_real_volumes_are_read(name, mode):
    batch = processor()(DATA / f"{name}.nii.gz", return_report=True)
    assert batch["pixel_values"].min() >= 0 and batch["pixel_values"].max() <= 1
    assert batch["preprocessing_report"][0]["intensity_mode"] == mode


def test_volume_of_a_dependency_is_read():
    batch = processor()(Path(data_path) / "anatomical.nii", return_report=True)
    assert batch["pixel_values"].std() > 0.05
    assert batch["preprocessing_report"][0]["source_shape"] == [33, 41, 25]


@pytest.mark.parametrize("mode", ["auto", "minmax", "percentile"])
@pytest.mark.parametrize("slope", [1.0, 0.5])
def test_no_more_than_some_planes_of_a_scan_are_floating_point_at_once(mode, slope, tmp_path, monkeypatch):
    array = ct_array((14, 12, 60))
    image = ct_image(array)
    image.header.set_slope_inter(slope, 0.25 if slope != 1 else 0)
    nibabel.save(image, tmp_path / "scan.nii.gz")
    sizes, as_float = [], Scan.as_float
    monkeypatch.setattr(Scan, "as_float", lambda scan, part: (sizes.append(part.size), as_float(scan, part))[1])
    processor(intensity_mode=mode)(tmp_path / "scan.nii.gz")
    # Two planes around each new one, and what lies between: 60 planes become 16.
    assert 14 * 12 <= max(sizes) <= 14 * 12 * PLANES_AT_ONCE * 4


@pytest.mark.parametrize("affine", [np.diag([-0.7, 0.8, 2.5, 1]), np.diag([0.7, -0.8, -2.5, 1])], ids=["L", "PI"])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.int32, np.float32, np.float64])
def test_steps_in_planes_are_the_steps_on_the_whole(dtype, affine):
    array = np.abs(ct_array((14, 12, 10)) // 8).astype(dtype)
    array[:3] = array.min()
    array[..., -2:] = array.min()
    ours = processor(intensity_mode="minmax")(ct_image(array, affine), return_report=True)
    flips = tuple(
        slice(None, None, -1 if wanted != np.sign(step) else 1) for wanted, step in zip((-1, -1, 1), np.diag(affine))
    )
    volume = torch.from_numpy(array[flips].transpose(2, 1, 0).astype(np.float32))  # (W, H, D) -> (D, H, W)
    volume = (volume - volume.min()) / (volume.max() - volume.min())
    places = (volume > 0).nonzero()
    box = [[int(start), int(stop) + 1] for start, stop in zip(places.min(0).values, places.max(0).values)]
    cropped = volume[tuple(slice(*bounds) for bounds in box)]
    expected = torch.nn.functional.interpolate(cropped[None, None], IMAGE_SIZE, mode="trilinear", align_corners=False)
    torch.testing.assert_close(ours["pixel_values"], expected, atol=5e-7, rtol=0)
    assert ours["preprocessing_report"][0]["crop_box"] == box


@pytest.mark.parametrize("dtype", [np.int16, np.float32])
def test_fraction_outside_the_window_is_that_of_all_voxels(dtype):
    array = ct_array().astype(dtype)
    window = (-160.4, 240.5)
    report = processor(intensity_mode="window", hu_range=window)(array, return_report=True)["preprocessing_report"][0]
    assert report["clipped_fraction"] == np.mean((array < window[0]) | (array > window[1]))
