"""
Size, load time and exactness of prepared volumes by format, the measurement behind the default of `VolumeCache`; and how many
volumes a second come to training in batches.

Uses the CT beside the checkout (../shared/data/ct_body_hu.nii.gz) if there is one, else a synthetic volume, prepared by
the image processor to 128 x 256 x 256.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from med3dvlm import Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.train.data.augmentation import augment_laterality_safe
from med3dvlm.train.data.cache import CACHE_DTYPES, VolumeCache
from med3dvlm.train.data.collate import ConversationCollator
from med3dvlm.train.data.dataset import ConversationBuilder, ProcessedVolumes, StudyDataset, VolumeLoader
from med3dvlm.train.data.samples import SAMPLE_FEATURES
from med3dvlm.train.tokenizers import build_tiny_tokenizer


CT = Path(__file__).parents[2] / "shared" / "data" / "ct_body_hu.nii.gz"
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])  # (width, height, depth) to the left, to posterior, to superior
NUM_LOADS = 5
NUM_SCANS, BATCH_SIZE = 16, 4


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


def volumes_per_second(scan: Path, volumes: VolumeLoader, image_processor: Any, num_workers: int) -> float:
    """Of the batches of stage 2 or 3, with augmentation, from as many scans as there are samples; the second epoch."""
    rows = []
    for number in range(NUM_SCANS):
        copy = scan.with_name(f"scan-{number}.nii.gz")
        if not copy.exists():
            shutil.copy(scan, copy)
        sample = {"image": str(copy), "case": str(number), "task": "report", "question": "", "choices": []}
        rows.append({**sample, "answer": "A report.", "answer_choice": "", "question_type": 0})
    samples = Dataset.from_list(rows, features=SAMPLE_FEATURES)
    dataset = StudyDataset(samples, volumes, ConversationBuilder(), augment_laterality_safe)
    processor = Med3DVLMProcessor(image_processor, build_tiny_tokenizer(), image_seq_length=256)
    loader = DataLoader(
        dataset,
        BATCH_SIZE,
        num_workers=num_workers,
        collate_fn=ConversationCollator(processor),
        persistent_workers=num_workers > 0,
    )
    for _ in loader:  # fills the cache, and starts the workers
        pass
    start = time.perf_counter()
    for _ in loader:
        pass
    return NUM_SCANS / (time.perf_counter() - start)


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
        print(f"\nVolumeCache stores safetensors {default} unless told otherwise.\n")

        print(f"{'batches of ' + str(BATCH_SIZE):<22} {'workers':>7} {'volumes/s':>11}")
        kinds = {
            "scans": ProcessedVolumes(image_processor),
            f"VolumeCache {default}": VolumeCache(folder / "cache", image_processor),
        }
        for label, volumes in kinds.items():
            for num_workers in (0, 1):
                speed = volumes_per_second(scan, volumes, image_processor, num_workers)
                print(f"{label:<22} {num_workers:7} {speed:11.1f}")


if __name__ == "__main__":
    main()
