"""Procedural CT of chest and abdomen: a patient drawn at random, one lesion in it, and the scan that a plane and a phase give.

Everything is a function of world coordinates in RAS+ mm: x grows to the patient's right, y to anterior, z to superior. So
the right lung and the liver lie at x > 0, the left lung, the spleen and most of the heart at x < 0.
"""

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np


PLANES = ("axial", "coronal", "sagittal", "oblique")
PHASES = ("non-contrast", "arterial", "portal venous", "delayed")
ORGANS = ("right lung", "left lung", "liver", "spleen", "right kidney", "left kidney")
KINDS = ("cyst", "solid mass", "calcification", "fat-containing lesion")
PARTS = ("upper", "lower")
SIZES = ("small", "large")
# The factors of a phantom by the names of the fields of `PhantomFindings`, each with its levels.
FACTORS: dict[str, tuple[str, ...]] = {
    "plane": PLANES,
    "phase": PHASES,
    "organ": ORGANS,
    "part": PARTS,
    "kind": KINDS,
    "size": SIZES,
}

# Mean HU in the phases, in the order of `PHASES`. The attenuations are typical of abdominal CT; the delayed phase is late
# enough for the kidneys to excrete, but the renal pelvis stays below a calcification.
ORGAN_HU: dict[str, tuple[float, float, float, float]] = {
    "aorta": (42.0, 320.0, 160.0, 105.0),
    "inferior vena cava": (42.0, 65.0, 150.0, 110.0),
    "heart": (42.0, 260.0, 150.0, 105.0),
    "liver": (58.0, 75.0, 118.0, 95.0),
    "spleen": (50.0, 130.0, 125.0, 98.0),
    "renal cortex": (36.0, 200.0, 185.0, 155.0),
    "renal medulla": (34.0, 75.0, 170.0, 155.0),
    "renal pelvis": (8.0, 15.0, 60.0, 450.0),
    "lung": (-820.0, -820.0, -820.0, -820.0),
}
AIR_HU = -1000.0
FAT_HU = -100.0
MUSCLE_HU = 52.0
# Between the organs: mostly fat, with vessels and mesentery.
CAVITY_HU = 30.0

CYST_HU = 0.0
CALCIFICATION_HU = 900.0
FAT_LESION_HU = -150.0
# A solid mass is brighter than its organ in each phase, and never darker than this.
SOLID_MASS_EXCESS_HU = 100.0
SOLID_MASS_LEAST_HU = 180.0

# Diameters in mm.
SIZE_RANGES = {"small": (34.0, 40.0), "large": (52.0, 62.0)}
# Height of a lesion's centre above or below that of its organ, as a share of the organ's half height.
PART_RANGE = (0.5, 0.62)

# Spacings in mm, and standard deviation of the noise in HU: (lowest, highest) of uniform draws.
IN_PLANE_SPACING = (2.5, 3.5)
SLICE_SPACING = (8.0, 12.0)
NOISE_HU = (10.0, 15.0)
OBLIQUE_TILT_DEGREES = (25.0, 35.0)
# A thick slice is the mean of so many thin ones: the partial volume effect.
SUBSLICES = 3


@dataclass(frozen=True)
class PhantomFindings:
    """
    What a phantom shows, and all that its report tells.

    Args:
        plane (`str`): One of `PLANES`, in which the thick slices lie.
        phase (`str`): One of `PHASES`.
        organ (`str`): One of `ORGANS`, which holds the lesion.
        part (`str`): One of `PARTS` of the organ.
        kind (`str`): One of `KINDS`.
        size (`str`): One of `SIZES`, see `SIZE_RANGES`.

    Raises:
        ValueError: a field is none of its levels.

    Example:

    ```python
    >>> PhantomFindings("axial", "arterial", "liver", "upper", "cyst", "small").organ
    'liver'
    ```"""

    plane: str
    phase: str
    organ: str
    part: str
    kind: str
    size: str

    def __post_init__(self) -> None:
        for name, level in asdict(self).items():
            if level not in FACTORS[name]:
                raise ValueError(f"`{name}` must be one of {', '.join(map(repr, FACTORS[name]))}; got {level!r}.")


@dataclass(frozen=True)
class Shape:
    """
    A superellipsoid in world coordinates: inside is where `level` is below 1.

    Args:
        centre, half_axes (`tuple[float, float, float]`): In mm, along x, y, z.
        exponent (`float`, *optional*, defaults to 2): 2 is an ellipsoid, more is closer to a box.
        lean (`tuple[float, float]`, *optional*): How far the centre moves along x and y with each mm of z.
    """

    centre: tuple[float, float, float]
    half_axes: tuple[float, float, float]
    exponent: float = 2.0
    lean: tuple[float, float] = (0.0, 0.0)

    def level(self, x: Any, y: Any, z: Any) -> Any:
        """Level at world coordinates in mm, which may be arrays that broadcast against each other."""
        up = z - self.centre[2]
        right = x - self.centre[0] - (self.lean[0] * up if self.lean[0] else 0.0)
        front = y - self.centre[1] - (self.lean[1] * up if self.lean[1] else 0.0)
        return sum(
            _power(offset * (1.0 / half_axis), self.exponent)
            for offset, half_axis in zip((right, front, up), self.half_axes)
        )

    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest corner of the box around the shape, in mm."""
        reach = np.array(self.half_axes, dtype=float)
        reach[:2] += np.abs(self.lean) * self.half_axes[2]
        return np.array(self.centre) - reach, np.array(self.centre) + reach

    def grown(self, millimetres: float) -> "Shape":
        """The same shape with half axes longer by so much (shorter, if negative)."""
        x, y, z = (max(half_axis + millimetres, 1.0) for half_axis in self.half_axes)
        return replace(self, half_axes=(x, y, z))


@dataclass(frozen=True)
class Lesion:
    """A lesion: its shape, its mean HU, and its diameter in mm."""

    shape: Shape
    hu: float
    diameter: float


@dataclass(frozen=True)
class Patient:
    """
    A patient drawn at random: all that a scanner could see.

    Args:
        organs (`Mapping[str, Shape]`): Shapes by name: those of `ORGANS`, and the others that are painted.
        hu (`Mapping[str, float]`): Mean HU by tissue, in the phase of the scan.
        body (`tuple[float, float]`): Half width and half depth in mm.
        rim (`tuple[float, float]`): Thickness of the fat under the skin and of the wall of muscle, in mm.
        height (`tuple[float, float]`): Lowest and highest z of what was scanned, in mm.
        bowel (`tuple`): Shapes of loops, each with the HU of its content.
        vertebra (`tuple[float, float]`): Distance from vertebra to vertebra, and z of one of them, in mm.
        ribs (`tuple[float, float]`): Distance from rib to rib, and z of one of them at y = 0, in mm.
        lesion (`Lesion`, *optional*): The lesion.
    """

    organs: Mapping[str, Shape]
    hu: Mapping[str, float]
    body: tuple[float, float]
    rim: tuple[float, float]
    height: tuple[float, float]
    bowel: tuple[tuple[Shape, float], ...]
    vertebra: tuple[float, float]
    ribs: tuple[float, float]
    lesion: Lesion | None


# Shapes of an average patient: centre, half axes, exponent, lean.
TYPICAL_SHAPES: dict[str, Shape] = {
    "right lung": Shape((73.0, -2.0, 104.0), (55.0, 76.0, 102.0), 2.5),
    "left lung": Shape((-75.0, -4.0, 106.0), (54.0, 76.0, 100.0), 2.5),
    "heart": Shape((-18.0, 26.0, 62.0), (52.0, 42.0, 48.0), 2.0, (-0.25, 0.15)),
    "liver": Shape((68.0, 4.0, -48.0), (68.0, 72.0, 74.0), 2.4, (0.0, 0.1)),
    "left liver lobe": Shape((4.0, 38.0, -28.0), (62.0, 36.0, 36.0)),
    "spleen": Shape((-96.0, -30.0, -26.0), (36.0, 46.0, 60.0), 2.2, (0.1, -0.1)),
    "right kidney": Shape((62.0, -46.0, -122.0), (34.0, 30.0, 62.0), 2.2, (-0.12, 0.0)),
    "left kidney": Shape((-62.0, -46.0, -114.0), (34.0, 30.0, 62.0), 2.2, (0.12, 0.0)),
    "stomach": Shape((-48.0, 34.0, -36.0), (44.0, 36.0, 44.0), 2.0, (-0.2, 0.0)),
    "aorta": Shape((-16.0, -46.0, 0.0), (12.0, 12.0, 600.0), 2.0),
    "inferior vena cava": Shape((20.0, -40.0, -80.0), (13.0, 10.0, 150.0), 4.0),
    "vertebrae": Shape((0.0, -76.0, 0.0), (23.0, 18.0, 600.0), 2.5),
    "spinal canal": Shape((0.0, -101.0, 0.0), (11.0, 9.0, 600.0), 2.0),
}


def draw_patient(findings: PhantomFindings, generator: np.random.Generator) -> Patient:
    """
    Draws a patient with the given findings: size, shape and place of the organs, HU of the tissues, and the lesion.

    Args:
        findings (`PhantomFindings`): What the patient has; of the scan, the phase alone matters here.
        generator (`np.random.Generator`): Source of the draws.

    Returns:
        [`Patient`].
    """
    stature = generator.uniform(0.95, 1.05, size=3)
    organs = {name: _vary(shape, stature, generator) for name, shape in TYPICAL_SHAPES.items()}
    contrast = generator.uniform(0.92, 1.08)
    hu = {}
    for name, phases in ORGAN_HU.items():
        plain, enhanced = phases[0], phases[PHASES.index(findings.phase)]
        hu[name] = plain + contrast * (enhanced - plain) + generator.uniform(-5.0, 5.0)
    half_width, half_depth = 164.0 * stature[0], 116.0 * stature[1]
    bowel = []
    for _ in range(14):
        centre = (generator.uniform(-95, 95), generator.uniform(-5, 70), generator.uniform(-205, -110))
        half_axes = tuple(generator.uniform(12.0, 30.0, size=3))
        # One loop in four holds gas above its content.
        bowel.append((Shape(centre, half_axes), generator.choice([25.0, 40.0, 55.0])))  # type: ignore[arg-type]
        if generator.random() < 0.25:
            gas = Shape((centre[0], centre[1] + 6.0, centre[2]), tuple(0.5 * axis for axis in half_axes))  # type: ignore[arg-type]
            bowel.append((gas, -900.0))
    patient = Patient(
        organs=organs,
        hu=hu,
        body=(float(half_width), float(half_depth)),
        rim=(generator.uniform(9.0, 17.0), generator.uniform(10.0, 14.0)),
        height=(generator.uniform(-212.0, -204.0), generator.uniform(206.0, 214.0)),
        bowel=tuple(bowel),
        vertebra=(generator.uniform(29.0, 33.0), generator.uniform(0.0, 30.0)),
        ribs=(generator.uniform(26.0, 30.0), generator.uniform(0.0, 28.0)),
        lesion=None,
    )
    return replace(patient, lesion=draw_lesion(findings, patient, generator))


def draw_lesion(findings: PhantomFindings, patient: Patient, generator: np.random.Generator) -> Lesion:
    """
    Draws a lesion with the given findings at a place of its organ where it lies within it as far as possible.

    Args:
        findings (`PhantomFindings`): Organ, part, kind and size.
        patient (`Patient`): The patient without it.
        generator (`np.random.Generator`): Source of the draws.

    Returns:
        [`Lesion`].
    """
    organ = patient.organs[findings.organ]
    diameter = generator.uniform(*SIZE_RANGES[findings.size])
    radius = 0.5 * diameter
    share = generator.uniform(*PART_RANGE) * (1 if findings.part == "upper" else -1)
    up = share * organ.half_axes[2]
    # Candidates in the horizontal section of the organ at that height, and what a lesion there would reach.
    candidates = np.zeros((128, 3))
    candidates[:, 2] = organ.centre[2] + up
    for axis in (0, 1):
        middle = organ.centre[axis] + organ.lean[axis] * up
        candidates[:, axis] = middle + organ.half_axes[axis] * generator.uniform(-0.6, 0.6, size=128)
    directions = np.array([d for d in itertools.product((-1, 0, 1), repeat=3) if any(d)], dtype=float)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    reached = candidates[:, None] + (radius + 2.0) * directions  # (candidates, directions, xyz)
    x, y, z = np.moveaxis(reached, -1, 0)
    contained = organ.level(x, y, z) < 1
    for other in _painted_over(findings.organ):
        contained &= patient.organs[other].level(x, y, z) > 1
    contained_share = contained.mean(axis=1)
    best = np.flatnonzero(contained_share >= contained_share.max() - 1e-9)
    centre = candidates[best[generator.integers(len(best))]]
    organ_hu = patient.hu[_tissue_of(findings.organ)]
    hu = {
        "cyst": CYST_HU,
        "solid mass": max(organ_hu + SOLID_MASS_EXCESS_HU, SOLID_MASS_LEAST_HU),
        "calcification": CALCIFICATION_HU,
        "fat-containing lesion": FAT_LESION_HU,
    }[findings.kind]
    half_axes = radius * generator.uniform(0.94, 1.06, size=3)
    shape = Shape(tuple(map(float, centre)), tuple(map(float, half_axes)))  # type: ignore[arg-type]
    return Lesion(shape, hu + generator.uniform(-5.0, 5.0), diameter)


def scan_patient(
    patient: Patient,
    plane: str,
    generator: np.random.Generator,
    in_plane_spacing: tuple[float, float] = IN_PLANE_SPACING,
    slice_spacing: tuple[float, float] = SLICE_SPACING,
    noise_hu: tuple[float, float] = NOISE_HU,
) -> tuple[np.ndarray, np.ndarray]:
    """
    Scans a patient in thick slices of a plane, and stores the voxels in one of the 48 orders and directions of axes.

    Args:
        patient (`Patient`): The patient.
        plane (`str`): One of `PLANES`. An oblique scan is an axial one tilted about x or y.
        generator (`np.random.Generator`): Source of the draws.
        in_plane_spacing, slice_spacing (`tuple[float, float]`, *optional*): Lowest and highest spacing in mm.
        noise_hu (`tuple[float, float]`, *optional*): Lowest and highest standard deviation of the noise in HU. Noise is
            white, in the body alone: air around it is exactly -1000 HU, as scanners clip it.

    Returns:
        The HU (`np.ndarray` of int16 and shape `(I, J, K)`, in stored axis order), and the affine (`np.ndarray` of shape
        `(4, 4)`), which maps their index `(i, j, k, 1)` to RAS+ mm.
    """
    affine, shape = draw_grid(patient, plane, generator, in_plane_spacing, slice_spacing)
    # Thin slices around the middle of each thick one: index k' of theirs is slice (k' + 0.5) / SUBSLICES - 0.5.
    to_thick = np.diag([1.0, 1.0, 1.0 / SUBSLICES, 1.0])
    to_thick[2, 3] = 0.5 / SUBSLICES - 0.5
    thin = paint(patient, affine @ to_thick, (shape[0], shape[1], shape[2] * SUBSLICES))
    thick = thin.reshape(*shape, SUBSLICES).mean(axis=-1)
    noise = generator.standard_normal(shape, dtype=np.float32) * np.float32(generator.uniform(*noise_hu))
    noise[thick <= AIR_HU] = 0.0
    thick += noise
    voxels = np.clip(np.rint(thick), AIR_HU, 3071).astype(np.int16)
    return store_in_other_axes(voxels, affine, generator)


def draw_grid(
    patient: Patient,
    plane: str,
    generator: np.random.Generator,
    in_plane_spacing: tuple[float, float],
    slice_spacing: tuple[float, float],
) -> tuple[np.ndarray, tuple[int, int, int]]:
    """
    Draws the grid of a scan, with the slices along its last axis.

    Returns:
        The affine (`np.ndarray` of shape `(4, 4)`) to RAS+ mm, and the number of voxels along each axis.
    """
    margin = generator.uniform(4.0, 16.0, size=3)
    half_sizes = np.array([*patient.body, 0.5 * (patient.height[1] - patient.height[0])]) + margin
    middle = np.array([0.0, 0.0, 0.5 * (patient.height[0] + patient.height[1])])
    order = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0), "oblique": (0, 1, 2)}[plane]
    directions = np.eye(3)[:, order]
    extents = 2 * half_sizes[list(order)]
    if plane == "oblique":
        angle = math.radians(generator.uniform(*OBLIQUE_TILT_DEGREES)) * generator.choice([-1, 1])
        about = int(generator.integers(2))  # x or y
        across, cosine, sine = 1 - about, math.cos(angle), math.sin(angle)
        directions[:, :] = np.eye(3)
        directions[across, across], directions[across, 2] = cosine, -sine
        directions[2, across], directions[2, 2] = sine, cosine
        # Wide enough for the organs, which end some way from the ends of the body.
        extents = 2 * (np.abs(directions.T) @ (half_sizes * np.array([0.9, 0.9, 0.8])))
    in_plane = generator.uniform(*in_plane_spacing)
    spacing = np.array([in_plane, in_plane, generator.uniform(*slice_spacing)])
    if plane == "oblique":  # a larger field of view in as many voxels
        spacing[:2] *= 1.15
    shape = np.maximum(np.ceil(extents / spacing).astype(int), 2)
    affine = np.eye(4)
    affine[:3, :3] = directions * spacing
    affine[:3, 3] = middle - affine[:3, :3] @ ((shape - 1) / 2)
    return affine, (int(shape[0]), int(shape[1]), int(shape[2]))


def store_in_other_axes(
    voxels: np.ndarray, affine: np.ndarray, generator: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Permutes and reverses the stored axes at random, with the affine that keeps each voxel at its place."""
    order = [int(axis) for axis in generator.permutation(3)]
    reversed_axes = generator.random(3) < 0.5
    affine = affine.copy()
    affine[:, :3] = affine[:, order]
    voxels = voxels.transpose(order)
    for axis in map(int, np.flatnonzero(reversed_axes)):
        affine[:3, 3] += affine[:3, axis] * (voxels.shape[axis] - 1)
        affine[:3, axis] *= -1
        voxels = np.flip(voxels, axis)
    return np.ascontiguousarray(voxels), affine


def paint(patient: Patient, affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """
    HU of a patient at the points of a grid, without noise.

    Args:
        patient (`Patient`): The patient.
        affine (`np.ndarray` of shape `(4, 4)`): Maps an index of the grid to RAS+ mm.
        shape (`tuple[int, int, int]`): Voxels of the grid along its axes.

    Returns:
        `np.ndarray` of float32 and the given shape.
    """
    canvas = Canvas(affine, shape)
    x, y, z = canvas.coordinates()
    depth = 1.0 - (_power(x / patient.body[0], 2.4) + _power(y / patient.body[1], 2.4)) ** (1 / 2.4)
    depth = depth * patient.body[1]  # roughly mm below the skin, constant along z
    fat, wall = patient.rim
    tissue = np.where(depth > fat, np.float32(MUSCLE_HU), np.float32(FAT_HU))
    tissue = np.where(depth > fat + wall, np.float32(CAVITY_HU), tissue)
    tissue = np.where(depth > 0, tissue, np.float32(AIR_HU))
    canvas.hu[...] = tissue
    # Ribs: slanting bands in the wall of the chest.
    distance, start = patient.ribs
    band = (z + 0.35 * np.abs(y) - start) % distance < 0.38 * distance
    in_wall = (depth > fat + 1.0) & (depth < fat + wall)
    canvas.hu[np.broadcast_to(band & in_wall & (z > -70.0), shape)] = 380.0

    organs, hu = patient.organs, patient.hu
    canvas.fill(organs["stomach"], 28.0)
    for loop, content in patient.bowel:
        canvas.fill(loop, content)
    canvas.fill(organs["right lung"], hu["lung"])
    canvas.fill(organs["left lung"], hu["lung"])
    _paint_bronchi(canvas, organs)
    canvas.fill(organs["left liver lobe"], hu["liver"])
    canvas.fill(organs["liver"], hu["liver"])
    canvas.fill(organs["heart"], 0.5 * (hu["heart"] + MUSCLE_HU + 40.0))
    canvas.fill(organs["heart"].grown(-10.0), hu["heart"])
    canvas.fill(organs["spleen"], hu["spleen"])
    for side, medial in (("right", -1), ("left", 1)):
        kidney = organs[f"{side} kidney"]
        canvas.fill(kidney.grown(5.0), FAT_HU)
        canvas.fill(kidney, hu["renal cortex"])
        canvas.fill(kidney.grown(-9.0), hu["renal medulla"])
        x0, y0, z0 = kidney.centre
        pelvis = Shape((x0 + 0.55 * medial * kidney.half_axes[0], y0, z0), (13.0, 9.0, 11.0))
        canvas.fill(pelvis, hu["renal pelvis"])
    canvas.fill(organs["inferior vena cava"], hu["inferior vena cava"])
    canvas.fill(organs["aorta"], hu["aorta"])
    _paint_spine(canvas, patient)
    if patient.lesion is not None:
        canvas.fill(patient.lesion.shape, patient.lesion.hu)
    # What lies beyond the ends of the scanned body is padding.
    beyond = (z < patient.height[0]) | (z > patient.height[1])
    canvas.hu[np.broadcast_to(beyond, shape)] = AIR_HU
    canvas.hu[np.broadcast_to(depth <= 0, shape)] = AIR_HU
    return canvas.hu


class Canvas:
    """
    A grid of HU on which shapes are painted, each evaluated within the box around it alone.

    Args:
        affine (`np.ndarray` of shape `(4, 4)`): Maps an index of the grid to RAS+ mm.
        shape (`tuple[int, int, int]`): Voxels of the grid along its axes.
    """

    def __init__(self, affine: np.ndarray, shape: tuple[int, int, int]):
        self.affine, self.shape = affine, shape
        self.to_grid = np.linalg.inv(affine)
        self.hu = np.full(shape, AIR_HU, dtype=np.float32)

    def coordinates(self, box: tuple[slice, slice, slice] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        World x, y, z in mm of the grid's points, or of those in a box. Each is an array of three axes, of length 1 along
        those on which it does not depend: that makes scans along x, y and z fast.
        """
        ranges = [
            np.arange(size, dtype=np.float32)[slice(None) if box is None else box[axis]].reshape(
                [-1 if axis == other else 1 for other in range(3)]
            )
            for axis, size in enumerate(self.shape)
        ]
        world = []
        for row in self.affine[:3]:
            terms = [np.float32(row[axis]) * ranges[axis] for axis in range(3) if abs(row[axis]) > 1e-9]
            world.append(sum(terms, np.full((1, 1, 1), row[3], dtype=np.float32)))
        return world[0], world[1], world[2]

    def box_of(self, shape: Shape) -> tuple[slice, slice, slice]:
        """The part of the grid that holds a shape."""
        lowest, highest = shape.bounds()
        corners = np.array(list(itertools.product(*zip(lowest, highest))))
        indices = corners @ self.to_grid[:3, :3].T + self.to_grid[:3, 3]
        first = np.floor(indices.min(axis=0)).astype(int)
        last = np.ceil(indices.max(axis=0)).astype(int)
        i, j, k = (slice(max(0, low), max(0, high + 1)) for low, high in zip(first, last))
        return i, j, k

    def fill(self, shape: Shape, hu: float) -> None:
        """Paints a shape with one value, over what was there."""
        box = self.box_of(shape)
        region = self.hu[box]
        if region.size:
            region[np.broadcast_to(shape.level(*self.coordinates(box)) < 1, region.shape)] = hu


def _paint_bronchi(canvas: Canvas, organs: Mapping[str, Shape]) -> None:
    """Trachea, and vessels that fan out from the hila."""
    canvas.fill(Shape((2.0, -20.0, 190.0), (9.0, 8.0, 70.0), 3.0), AIR_HU + 20.0)
    for side, lateral in (("right lung", 1), ("left lung", -1)):
        x, y, z = organs[side].centre
        for up, front in ((0.5, 0.2), (0.1, -0.35), (-0.45, -0.1)):
            half = 0.35 * organs[side].half_axes[2]
            vessel = Shape(
                (x - 14.0 * lateral, y + front * 40.0, z + up * 60.0),
                (5.0, 5.0, half),
                2.0,
                (lateral * (0.5 if up >= 0 else -0.5), 0.0),
            )
            canvas.fill(vessel, -150.0)


def _paint_spine(canvas: Canvas, patient: Patient) -> None:
    """Vertebral bodies with discs between them, arch and canal."""
    column, canal = patient.organs["vertebrae"], patient.organs["spinal canal"]
    arch = canal.grown(6.0)
    canvas.fill(arch, 420.0)
    canvas.fill(canal, 25.0)
    box = canvas.box_of(column)
    region = canvas.hu[box]
    x, y, z = canvas.coordinates(box)
    level = column.level(x, y, np.float32(column.centre[2]))
    distance, start = patient.vertebra
    disc = (z - start) % distance < 0.22 * distance
    bone = np.where(level > 0.72, np.float32(450.0), np.float32(190.0))
    bone = np.where(disc, np.float32(80.0), bone)
    inside = np.broadcast_to(level < 1, region.shape)
    region[inside] = np.broadcast_to(bone, region.shape)[inside]


def _vary(shape: Shape, stature: np.ndarray, generator: np.random.Generator) -> Shape:
    """A shape as one patient has it: scaled with the body, moved by some mm, and a little longer or shorter on each axis."""
    slender = shape.half_axes[2] > 200  # runs through the whole scan
    moved = generator.normal(0.0, (2.5, 2.5, 0.0 if slender else 4.0)).clip(-8.0, 8.0)
    centre = np.array(shape.centre) * stature + moved
    half_axes = np.array(shape.half_axes) * stature * generator.uniform(0.94, 1.06, size=3)
    x, y, z = map(float, centre)
    a, b, c = map(float, half_axes)
    return replace(shape, centre=(x, y, z), half_axes=(a, b, c))


def _power(values: Any, exponent: float) -> Any:
    if exponent == 2.0:
        return values * values
    return np.abs(values) ** (exponent if not isinstance(values, np.ndarray) else values.dtype.type(exponent))


def _painted_over(organ: str) -> tuple[str, ...]:
    """What is painted over an organ, and so must not meet its lesion."""
    return {
        "right lung": ("heart", "liver"),
        "left lung": ("heart", "spleen"),
        "liver": ("heart", "right kidney", "inferior vena cava"),
        "spleen": ("left kidney",),
    }.get(organ, ())


def _tissue_of(organ: str) -> str:
    if "lung" in organ:
        return "lung"
    return "renal cortex" if "kidney" in organ else organ


__all__ = [
    "FACTORS",
    "KINDS",
    "ORGANS",
    "ORGAN_HU",
    "PARTS",
    "PHASES",
    "PLANES",
    "SIZES",
    "Lesion",
    "Patient",
    "PhantomFindings",
    "Shape",
    "draw_patient",
    "paint",
    "scan_patient",
]
