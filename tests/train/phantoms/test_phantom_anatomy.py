"""The patients and scans of the phantoms: sides, phases, lesions, planes."""

from dataclasses import asdict, replace

import nibabel
import numpy as np
import pytest

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.phantoms.anatomy import (
    KINDS,
    ORGAN_HU,
    ORGANS,
    PART_RANGE,
    PHASES,
    PLANES,
    SIZE_RANGES,
    Patient,
    PhantomFindings,
    Shape,
    draw_patient,
    paint,
    scan_patient,
)


IMAGE_SIZE = (24, 40, 32)  # (D, H, W)
FINDINGS = PhantomFindings("axial", "portal venous", "liver", "upper", "calcification", "large")


def prepare(voxels: np.ndarray, affine: np.ndarray) -> np.ndarray:
    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))
    return processor(nibabel.Nifti1Image(voxels, affine), return_tensors="pt")["pixel_values"][0, 0].numpy()


def render_volume(findings: PhantomFindings, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A scan of a new patient, and its affine."""
    generator = np.random.default_rng(seed)
    return scan_patient(draw_patient(findings, generator), findings.plane, generator)


def centre_of_lesion(findings: PhantomFindings, seed: int) -> np.ndarray:
    """Where the lesion lies in what the model sees, as shares of (D, H, W): scanned with and without it."""
    patient = draw_patient(findings, np.random.default_rng(seed))
    scans = [
        prepare(*scan_patient(each, findings.plane, np.random.default_rng(seed)))
        for each in (patient, replace(patient, lesion=None))
    ]
    difference = np.abs(scans[0] - scans[1])
    places = np.indices(IMAGE_SIZE).reshape(3, -1) @ difference.reshape(-1) / difference.sum()
    return places / (np.array(IMAGE_SIZE) - 1)


def hu_of(patient: Patient, organ: str) -> float:
    """Median HU of what was painted in the middle of an organ."""
    return hu_at(patient, patient.organs[organ].centre)


def hu_at(patient: Patient, centre: tuple[float, float, float]) -> float:
    affine = np.eye(4)
    affine[:3, 3] = np.array(centre) - 2.0
    return float(np.median(paint(patient, affine, (5, 5, 5))))


@pytest.mark.parametrize("plane", PLANES)
@pytest.mark.parametrize("organ", ORGANS)
def test_lesions_lie_on_their_side_of_what_the_model_sees(organ: str, plane: str) -> None:
    """D grows to superior and W to the patient's left: the right side of the patient is the first half of W."""
    findings = replace(FINDINGS, organ=organ, plane=plane)
    for seed in range(2):
        depth, _, width = centre_of_lesion(findings, seed)
        on_right = organ in ("liver", "right lung", "right kidney")
        if plane != "oblique":  # a tilt shifts the upper and lower organs along W
            assert (width < 0.47) == on_right, (width, seed)
            assert (depth > 0.55) == ("lung" in organ)
        voxels, affine = render_volume(findings, seed)
        assert voxels.dtype == np.int16 and voxels.min() == -1000
        assert nibabel.affines.voxel_sizes(affine).max() >= 8  # the slices are thick


@pytest.mark.parametrize("organ", ["liver", "left lung", "right kidney"])
def test_the_upper_part_lies_above_the_lower_one(organ: str) -> None:
    upper, lower = (centre_of_lesion(replace(FINDINGS, organ=organ, part=part), 3)[0] for part in ("upper", "lower"))
    assert upper > lower + 0.1


def test_the_left_kidney_is_a_mirror_image_of_the_right_one() -> None:
    right, left = (centre_of_lesion(replace(FINDINGS, organ=f"{side} kidney"), 5)[2] for side in ("right", "left"))
    assert right < 0.45 and left > 0.55


def test_organs_lie_on_their_side_of_what_the_model_sees() -> None:
    """Without a lesion: what changes when an organ shrinks to a point."""
    patient = replace(draw_patient(FINDINGS, np.random.default_rng(0)), lesion=None)
    for name, is_right in {"liver": True, "heart": False, "spleen": False, "stomach": False}.items():
        affected = replace(
            patient, organs={**patient.organs, name: replace(patient.organs[name], half_axes=(1, 1, 1))}
        )
        scans = [prepare(*scan_patient(each, "axial", np.random.default_rng(0))) for each in (patient, affected)]
        difference = np.abs(scans[0] - scans[1])
        width = (np.indices(IMAGE_SIZE)[2] * difference).sum() / difference.sum()
        assert (width < (IMAGE_SIZE[2] - 1) / 2) == is_right, name


@pytest.mark.parametrize("phase", PHASES)
def test_phases_change_the_organs_as_documented(phase: str) -> None:
    patient = draw_patient(replace(FINDINGS, phase=phase, organ="right lung"), np.random.default_rng(1))
    for organ, tissue in {"liver": "liver", "spleen": "spleen", "heart": "heart", "left lung": "lung"}.items():
        expected = ORGAN_HU[tissue][PHASES.index(phase)]
        plain = ORGAN_HU[tissue][0]
        assert abs(hu_of(patient, organ) - expected) <= 5 + 0.08 * abs(expected - plain) + 1e-3, organ
    aorta = patient.organs["aorta"].centre
    assert hu_at(patient, (aorta[0], aorta[1], -100.0)) == pytest.approx(patient.hu["aorta"], abs=1e-3)


def test_an_arterial_scan_has_the_brightest_aorta_and_a_delayed_one_the_brightest_renal_pelvis() -> None:
    hu = {phase: draw_patient(replace(FINDINGS, phase=phase), np.random.default_rng(2)).hu for phase in PHASES}
    assert max(PHASES, key=lambda phase: hu[phase]["aorta"]) == "arterial"
    assert max(PHASES, key=lambda phase: hu[phase]["renal pelvis"]) == "delayed"
    assert hu["arterial"]["renal cortex"] > hu["arterial"]["renal medulla"] + 60


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("organ", ORGANS)
def test_kinds_of_lesions_differ_from_each_other_and_from_their_organ(organ: str, phase: str) -> None:
    levels = {}
    for kind in KINDS:
        findings = replace(FINDINGS, organ=organ, phase=phase, kind=kind, size="small", part="lower")
        patient = draw_patient(findings, np.random.default_rng(4))
        assert patient.lesion is not None
        levels[kind] = hu_at(patient, patient.lesion.shape.centre)
        assert levels[kind] == pytest.approx(patient.lesion.hu, abs=1e-3)
        levels[organ] = patient.hu["lung" if "lung" in organ else "renal cortex" if "kidney" in organ else organ]
    ordered = sorted(levels.values())
    assert min(np.diff(ordered)) > 25, levels
    assert sorted(levels, key=levels.__getitem__)[-2:] == ["solid mass", "calcification"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_lesions_lie_within_their_part_of_their_organ(size: str) -> None:
    for organ in ORGANS:
        for part, sign in (("upper", 1), ("lower", -1)):
            for seed in range(4):
                findings = replace(FINDINGS, organ=organ, part=part, size=size)
                patient = draw_patient(findings, np.random.default_rng(seed))
                lesion, shape = patient.lesion, patient.organs[organ]
                assert lesion is not None
                assert SIZE_RANGES[size][0] <= lesion.diameter <= SIZE_RANGES[size][1]
                assert shape.level(*lesion.shape.centre) < 1
                height = sign * (lesion.shape.centre[2] - shape.centre[2]) / shape.half_axes[2]
                assert PART_RANGE[0] - 0.01 < height < PART_RANGE[1] + 0.01


@pytest.mark.parametrize(("plane", "axis"), [("axial", 2), ("sagittal", 0), ("coronal", 1)])
def test_the_slices_of_a_plane_are_thick_along_its_axis(plane: str, axis: int) -> None:
    """The axis in the world, x y z, along which the voxels are 8 to 12 mm long; 2.5 to 3.5 mm along the others."""
    patient = draw_patient(FINDINGS, np.random.default_rng(0))
    for seed in range(4):
        _, affine = scan_patient(patient, plane, np.random.default_rng(seed))
        sizes = np.abs(affine[:3, :3]).sum(axis=1)
        assert 8 <= sizes[axis] <= 12
        assert np.all(np.delete(sizes, axis) <= 3.5) and np.all(np.delete(sizes, axis) >= 2.5)


def test_an_oblique_scan_is_tilted_by_25_to_35_degrees_about_x_or_y() -> None:
    patient = draw_patient(FINDINGS, np.random.default_rng(0))
    axes_of_tilt = set()
    for seed in range(12):
        _, affine = scan_patient(patient, "oblique", np.random.default_rng(seed))
        spacing = nibabel.affines.voxel_sizes(affine)
        normal = affine[:3, int(np.argmax(spacing))] / spacing.max()
        assert 25 <= np.degrees(np.arccos(abs(normal[2]))) <= 35
        axes_of_tilt.add("x" if abs(normal[0]) < 1e-6 else "y")
        np.testing.assert_allclose(affine[:3, :3].T @ affine[:3, :3], np.diag(spacing**2), atol=1e-6)  # no shear
    assert axes_of_tilt == {"x", "y"}


def test_stored_axes_come_in_many_orders_and_directions() -> None:
    patient = draw_patient(FINDINGS, np.random.default_rng(0))
    codes = set()
    for seed in range(40):
        _, affine = scan_patient(
            patient, "axial", np.random.default_rng(seed), in_plane_spacing=(20.0, 30.0), slice_spacing=(40.0, 50.0)
        )
        codes.add("".join(nibabel.aff2axcodes(affine)))
    assert len(codes) > 15


def test_however_it_is_stored_each_voxel_keeps_its_place() -> None:
    """The brightest lesion is found where the affine says, and the grid is centred on the body."""
    findings = replace(FINDINGS, plane="coronal")
    patient = draw_patient(findings, np.random.default_rng(0))
    for seed in range(6):
        voxels, affine = scan_patient(patient, "coronal", np.random.default_rng(seed), noise_hu=(0.0, 0.0))
        assert patient.lesion is not None
        index = np.rint(np.linalg.solve(affine[:3, :3], np.array(patient.lesion.shape.centre) - affine[:3, 3]))
        assert voxels[tuple(index.astype(int))] > 500  # the calcification
        middle = affine @ [*(np.array(voxels.shape) - 1) / 2, 1]
        np.testing.assert_allclose(middle[:2], 0, atol=1e-6)  # centred on the body


@pytest.mark.parametrize("plane", PLANES)
def test_a_lesion_is_scanned_at_its_place_to_the_millimetre(plane: str) -> None:
    """The centroid of what it adds to a scan without noise: a part of a slice too far, and it would lie elsewhere."""
    for seed in range(2):
        patient = draw_patient(FINDINGS, np.random.default_rng(seed))
        (voxels, affine), (without, same) = (
            scan_patient(each, plane, np.random.default_rng(seed), noise_hu=(0.0, 0.0))
            for each in (patient, replace(patient, lesion=None))
        )
        np.testing.assert_array_equal(affine, same)
        added = voxels.astype(float) - without
        index = np.indices(added.shape).reshape(3, -1) @ added.reshape(-1) / added.sum()
        assert patient.lesion is not None
        offset = affine[:3, :3] @ index + affine[:3, 3] - patient.lesion.shape.centre
        assert np.abs(offset).max() < 1, (seed, offset)


def test_equal_seeds_give_equal_scans_and_others_do_not() -> None:
    first, again, other = (render_volume(FINDINGS, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[1], other[1])


def test_noise_is_in_the_body_alone() -> None:
    patient = draw_patient(FINDINGS, np.random.default_rng(0))
    plain, noisy = (
        scan_patient(patient, "axial", np.random.default_rng(0), noise_hu=noise)[0] for noise in ((0, 0), (12, 12))
    )
    np.testing.assert_array_equal(noisy[plain == -1000], -1000)
    difference = (noisy.astype(float) - plain)[(plain > -500) & (plain < 800)]
    assert 11.5 < difference.std() < 12.5


@pytest.mark.parametrize("field", sorted(asdict(FINDINGS)))
def test_unknown_findings_are_refused(field: str) -> None:
    with pytest.raises(ValueError, match=f"`{field}` must be one of .*; got 'bent'"):
        replace(FINDINGS, **{field: "bent"})


def test_shapes_know_their_inside_and_their_box() -> None:
    shape = Shape((10.0, -20.0, 30.0), (4.0, 5.0, 6.0), 3.0, (0.5, 0.0))
    assert shape.level(10.0, -20.0, 30.0) == 0
    assert shape.level(10.0 + 0.5 * 6, -20.0, 36.0) == pytest.approx(1)
    lowest, highest = shape.bounds()
    np.testing.assert_allclose(lowest, [3, -25, 24])
    np.testing.assert_allclose(highest, [17, -15, 36])
    points = np.random.default_rng(0).uniform(lowest - 3, highest + 3, size=(2000, 3))
    inside = shape.level(*points.T) < 1
    assert inside.any() and np.all((points[inside] >= lowest) & (points[inside] <= highest))
