"""Synthetic M3D-Cap style case folders for testing the volume preparation.

``make_slices(folder, salt)`` writes four cases below ``folder``:

``000001/Axial_non_contrast/{0..39}.png``
    40 grey slices, 200 wide and 180 high. The anatomy is an ellipsoid inside a
    border of exact zeros that differs on all six sides, so cropping the
    foreground changes the result.

``000002/Pöschl_C__delayed/{1..26}.png`` (numbers without leading zeros)
    19 grey slices 300 wide and 280 high, one palette slice (7) and one RGBA
    slice (12) of that size, three slices of width 290 (5, 16, 23) which are the
    minority, one damaged file (19), and one slice saved as 8-bit grey with alpha
    (25). No pixel is 0, so subtracting the minimum matters. ``notes.db`` in the
    folder is not an image.

``000003``
    An empty series folder.

Each case has a ``report.txt``: with a ``study_findings:`` part that runs to the
end (000001), with ``discussion:`` followed by a too short ``study_findings:``
part (000002), with neither heading (000003), and with a too short
``study_findings:`` part and no ``discussion:`` (000004, which has no series).

Needs numpy and Pillow. PNG is lossless, so the pixels are the same everywhere.
"""

import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


REPORTS = {
    "000001": (
        "image_caption: axial slices\n"
        "study_findings: The liver is normal.\nNo free fluid.\n\n"
        "discussion: unremarkable study\n"
    ),
    "000002": "title: x\ndiscussion: Late phase.\nCyst in the left kidney. \nstudy_findings: n / a\n",
    "000003": "  A scan without headings.\nSecond line.  \n",
    "000004": "caption: one image\nstudy_findings: -\n",
}


def _generator(salt, name):
    return np.random.Generator(np.random.Philox(key=zlib.crc32(f"{salt}:slices:{name}".encode())))


def _pattern(depth, height, width, salt, name):
    """Integer-valued texture in 0..255 with structure on every axis."""
    rng = _generator(salt, name)
    coarse = rng.integers(40, 200, size=(-(-depth // 4), -(-height // 10), -(-width // 10)))
    blocks = coarse.repeat(4, 0).repeat(10, 1).repeat(10, 2)[:depth, :height, :width]
    return blocks + rng.integers(0, 50, size=(depth, height, width))


def case_one(salt):
    """uint8 volume (40, 180, 200): zero outside an off-centre ellipsoid."""
    depth, height, width = 40, 180, 200
    z, y, x = np.ogrid[:depth, :height, :width]
    # integer arithmetic: the mask is the same on every machine
    inside = (z - 18) ** 2 * 70**2 * 75**2 + (y - 85) ** 2 * 15**2 * 75**2 + (x - 110) ** 2 * 15**2 * 70**2
    mask = inside <= 15**2 * 70**2 * 75**2
    return np.where(mask, _pattern(depth, height, width, salt, "one"), 0).astype(np.uint8)


def case_two(salt):
    """Pillow images by slice number; ``None`` stands for the damaged file."""
    volume = np.clip(_pattern(26, 280, 300, salt, "two"), 1, 255).astype(np.uint8)
    rng = _generator(salt, "two-extra")
    other_alpha = rng.integers(0, 256, size=(280, 300)).astype(np.uint8)
    images = {}
    for number in range(1, 27):
        plane = volume[number - 1]
        if number == 7:
            image = Image.fromarray(plane).convert("P")
            image.putpalette(rng.integers(1, 256, size=768).astype(np.uint8).tobytes())
        elif number == 12:
            other = rng.integers(1, 256, size=(280, 300, 3)).astype(np.uint8)
            image = Image.fromarray(np.dstack([plane, other]))
        elif number in (5, 16, 23):
            image = Image.fromarray(np.ascontiguousarray(plane[:, :290]))
        elif number == 19:
            image = None
        elif number == 25:
            image = Image.fromarray(np.dstack([plane, other_alpha]))
        else:
            image = Image.fromarray(plane)
        images[number] = image
    return images


def make_slices(folder, salt=0):
    folder = Path(folder)
    for case, report in REPORTS.items():
        (folder / case).mkdir(parents=True, exist_ok=True)
        (folder / case / "report.txt").write_text(report)

    series = folder / "000001" / "Axial_non_contrast"
    series.mkdir(exist_ok=True)
    for index, plane in enumerate(case_one(salt)):
        Image.fromarray(plane).save(series / f"{index}.png")

    series = folder / "000002" / "P\u00f6schl_C__delayed"
    series.mkdir(exist_ok=True)
    for number, image in case_two(salt).items():
        if image is None:
            (series / f"{number}.png").write_bytes(b"not a picture")
        else:
            image.save(series / f"{number}.png")
    (series / "notes.db").write_bytes(b"")

    (folder / "000003" / "Sagittal_empty").mkdir(exist_ok=True)


if __name__ == "__main__":
    make_slices(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 0)
