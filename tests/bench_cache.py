"""
Size, load time and exactness of prepared volumes by format: the measurement behind the default of `VolumeCache`.

Uses the CT beside the checkout (../shared/data/ct_body_hu.nii.gz) if there is one, else a synthetic volume, prepared by
the image processor to 128 x 256 x 256.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from med3dvlm import Med3DVLMImageProcessor
from med3dvlm.train.data.cache import CACHE_DTYPES, VolumeCache


CT = Path(__file__).parents[2] / "shared" / "data" / "ct_body_hu.nii.gz"
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # (width, height, depth) to the left, to posterior, to superior
NUM_LOADS = 5


def synthetic_ct() -> nibabel.Nifti1Image:
    """An ellipsoid of soft tissue with texture and noise in air, in HU."""
    generator = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, size) for size in (220, 180, 90)), indexing="ij"))
    texture = 60 * np.sin(9 * grid[0]) * np.cos(7 * grid[1]) * np.sin(5 * grid[2])
    tissue = np.where((grid**2).sum(axis=0) < 0.8, 40 + texture, -1000)
    voxels = np.clip(tissue + generator.normal(scale=15, size=tissue.shape), -1024, 1500)
    return nibabel.Nifti1Image(voxels.astype(np.int16), np.diag([1.5, 1.5, 4, 1]))


def milliseconds(load: Callable[[], Any]) -> float:
    """Median time of a load, of a file that the system has in memory."""
    times = []
    for _ in range(NUM_LOADS):
        start = time.perf_counter()
        load()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def write_nifti(volume: torch.Tensor, path: Path, dtype: type) -> None:
    stored = volume.numpy().transpose(2, 1, 0)  # (D, H, W) -> (W, H, D)
    if dtype is np.int16:
        image = nibabel.Nifti1Image(np.round(stored * 32767).astype(np.int16), AFFINE)
        image.header.set_slope_inter(1 / 32767, 0)
    else:
        image = nibabel.Nifti1Image(stored, AFFINE)
    nibabel.save(image, path)


def main() -> None:
    torch.set_num_threads(1)  # as in a worker of a data loader
    source = CT if CT.exists() else synthetic_ct()
    image_processor = Med3DVLMImageProcessor()
    prepared = Med3DVLMImageProcessor(intensity_mode="none", do_crop_foreground=False)
    start = time.perf_counter()
    volume = image_processor(source)["pixel_values"][0, 0]
    scan_ms = 1000 * (time.perf_counter() - start)
    name = CT.name if CT.exists() else "a synthetic volume"
    print(f"{name}, prepared to {tuple(volume.shape)} in {scan_ms:.0f} ms; one thread, files in the system's memory\n")

    rows: list[tuple[str, Path, Callable[[], torch.Tensor]]] = []
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        for dtype in (np.int16, np.float32):
            path = folder / f"{dtype.__name__}.nii.gz"
            write_nifti(volume, path, dtype)
            rows.append((f"nii.gz {dtype.__name__}", path, lambda path=path: prepared(path)["pixel_values"][0, 0]))
        path = folder / "float32.npy"
        np.save(path, volume.numpy())
        rows.append(("npy float32", path, lambda path=path: torch.from_numpy(np.load(path))))
        for name, (dtype, _) in CACHE_DTYPES.items():
            path = folder / f"{name}.safetensors"
            is_byte = dtype is torch.uint8
            stored = volume.mul(255).round().to(dtype) if is_byte else volume.to(dtype)
            save_file({"volume": stored}, path)

            def load(path: Path = path, is_byte: bool = is_byte) -> torch.Tensor:
                loaded = load_file(path)["volume"].to(torch.float32, copy=True)
                return loaded.div_(255) if is_byte else loaded

            rows.append((f"safetensors {name}", path, load))
        scan = folder / "scan.nii.gz"
        nibabel.save(nibabel.load(source) if isinstance(source, Path) else source, scan)
        for name in CACHE_DTYPES:
            cache = VolumeCache(folder / "cache", image_processor, name)
            cache.load(str(scan))
            rows.append((f"VolumeCache {name}", cache.path_of(str(scan)), lambda cache=cache: cache.load(str(scan))))

        print(f"{'format':<22} {'MB':>7} {'load ms':>9} {'max error':>11} {'stated bound':>13}")
        for label, path, load_row in rows:
            error = float((load_row() - volume).abs().max())
            bound = CACHE_DTYPES[label.split()[1]][1] if label.startswith("VolumeCache") else None
            stated = "" if bound is None else f"{bound:.2g}"
            size = path.stat().st_size / 1e6
            print(f"{label:<22} {size:7.2f} {milliseconds(load_row):9.1f} {error:11.2g} {stated:>13}")
    default = VolumeCache.__init__.__defaults__[0]  # type: ignore[index]
    print(f"\nVolumeCache stores safetensors {default} unless told otherwise.")


if __name__ == "__main__":
    main()
