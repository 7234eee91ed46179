"""Writes tiny studies in the layouts of M3D, for the tests of readers and of the integrity check."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np


VQA_COLUMNS = ("Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C", "Choice D")
VQA_COLUMNS += ("Answer", "Answer Choice")
SHAPE = (5, 6, 4)  # stored, (width, height, depth)


def write_volume(path: Path, seed: int = 0, array: np.ndarray | None = None, affine: Any = None) -> Path:
    """A NIfTI file as preparation writes it: float32 in [0, 1], axes growing to the left, posterior, superior."""
    if array is None:
        array = np.random.default_rng(seed).random(SHAPE, dtype=np.float32)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = nibabel.Nifti1Image(array, np.diag([-1.0, -1.0, 1.0, 1.0]) if affine is None else affine)
    image.set_qform(image.affine, code=1)
    nibabel.save(image, path)
    return path


def write_cap(root: Path, cases: Mapping[str, Sequence[str]], ending: str = ".nii.gz") -> None:
    """`M3D_Cap.json` with two series for each case of a split; every case has a text of its own."""
    index: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for split, names in cases.items():
        for name in names:
            folder = root / "M3D_Cap_npy/ct_case" / name
            for series in ("Axial", "Sagittal"):
                write_volume(folder / f"{series}.nii.gz", seed=int(name) * 2 + (series == "Axial"))
                image = f"M3D_Cap_npy/ct_case/{name}/{series}{ending}"
                index[split].append({"image": image, "text": f"M3D_Cap_npy/ct_case/{name}/text.txt"})
            (folder / "text.txt").write_text(f"Findings of {name}.\n", encoding="utf-8")
    (root / "M3D_Cap_npy").mkdir(parents=True, exist_ok=True)
    (root / "M3D_Cap_npy/M3D_Cap.json").write_text(json.dumps(index))


def vqa_row(**cells: Any) -> dict[str, Any]:
    """A row of M3D-VQA; underscores in the names stand for spaces."""
    row = dict(zip(VQA_COLUMNS, ("M3D_Cap_npy/ct_case/1/Axial.nii.gz", "M3D_Cap_npy/ct_case/1/text.txt", 3)))
    row |= {
        "Question": "Which organ?",
        "Choice A": "liver",
        "Choice B": "spleen",
        "Choice C": "None",
        "Choice D": "NA",
    }
    row |= {"Answer": "spleen", "Answer Choice": "B"}
    return row | {name.replace("_", " "): value for name, value in cells.items()}


def write_vqa(root: Path, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = VQA_COLUMNS) -> Path:
    path = root / "M3D-VQA" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path
