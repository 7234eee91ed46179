"""A compact cache of processed volumes: what the image processor made of a scan, one safetensors file for each."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers.utils import logging

from ..files import write_atomically
from .dataset import ProcessedVolumes, VolumeLoader
from .preparation_record import check_not_prepared, prepared_options
from .slices import open_scan


logger = logging.get_logger(__name__)

# Counts up when the same settings would give other files.
FORMAT_VERSION = 1
# How values in [0, 1] are stored, and the largest error of a value: half the distance between neighbours. float16 has 11
# significant bits, so between 0.5 and 1 its neighbours are 2**-11 apart.
CACHE_DTYPES: dict[str, tuple[torch.dtype, float]] = {
    "float32": (torch.float32, 0.0),
    "float16": (torch.float16, 2.0**-12),
    "uint8": (torch.uint8, 0.5 / 255),
}
TENSOR_NAME = "volume"


class VolumeCache:
    """
    Processed volumes, kept in a folder for the next epoch and the next run.

    The first load of a scan runs the image processor and stores the result; it already returns the stored values, so that
    all epochs see the same ones to the bit. A file is used only while the size and the time of change of its scan are those
    it was made from; volumes of other settings lie in another subfolder, so nothing is mixed. Several processes may fill one
    cache at a time.

    Args:
        folder (`str` or `Path`):
            Folder of the cache. It may be deleted at any time.
        image_processor ([`Med3DVLMImageProcessor`]):
            The one image processor.
        dtype (`str`, *optional*, defaults to `"float16"`):
            `"float16"` (error of a value at most 2**-12), `"uint8"` (at most 1/510; half the size), or `"float32"`.
        options (`Mapping`, *optional*):
            Options that replace the processor's own.

    Raises:
        ValueError: `dtype` is not one of them.

    Example:

    ```python
    >>> from med3dvlm import Med3DVLMImageProcessor
    >>> from med3dvlm.train.data.cache import VolumeCache

    >>> cache = VolumeCache("cache", Med3DVLMImageProcessor(image_size=[64, 64, 64]))
    >>> cache.load("scan.nii.gz").shape  # doctest: +SKIP
    torch.Size([64, 64, 64])
    ```"""

    def __init__(
        self,
        folder: str | Path,
        image_processor: Any,
        dtype: str = "float16",
        options: Mapping[str, Any] | None = None,
    ):
        if dtype not in CACHE_DTYPES:
            raise ValueError(f"Expected the precision of a cache to be one of {sorted(CACHE_DTYPES)}, got {dtype!r}.")
        self.image_processor, self.dtype, self.options = image_processor, dtype, dict(options or {})
        self.fingerprint = fingerprint_of(image_processor, dtype, self.options)
        self.folder = Path(folder) / self.fingerprint

    def load(self, path: str) -> torch.Tensor:
        """
        The volume of the scan at `path`, a NIfTI file or a folder of slices.

        Returns:
            `torch.Tensor` of shape `(depth, height, width)`, float32 in [0, 1].

        Raises:
            FileNotFoundError: there is no such scan.
            InvalidVolumeError: the scan cannot be used.
            ValueError: it is a prepared volume, and the options are those of scans.
            RuntimeError: the cache cannot be written, which says nothing about the scan.
        """
        source = describe_source(Path(path))
        file = self.path_of(path)
        stored = self._read(file, source)
        if stored is None:
            stored = self._make(path, file, source)
        # A copy even of float32: the stored values may be the file itself, mapped into memory. NumPy asks the system for
        # large pages, which makes this three times as fast as in memory of torch.
        volume = torch.from_numpy(np.empty(stored.shape, dtype=np.float32)).copy_(stored)
        return volume.div_(255) if self.dtype == "uint8" else volume

    def path_of(self, path: str) -> Path:
        """The file of the cache for the scan at `path`."""
        absolute = os.path.abspath(path)  # noqa: PTH100 -- `resolve` would follow links, which may change
        name = hashlib.blake2b(absolute.encode(), digest_size=16).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def _read(self, file: Path, source: dict[str, str]) -> torch.Tensor | None:
        """The stored volume; None if there is none, or one of an earlier state of the scan."""
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                if any(metadata.get(name) != value for name, value in source.items()):
                    return None
                return content.get_tensor(TENSOR_NAME)
        except FileNotFoundError:
            return None
        except SafetensorError as error:
            logger.warning(f"{file}: damaged ({error}); the volume is processed again.")
            return None

    def _make(self, path: str, file: Path, source: dict[str, str]) -> torch.Tensor:
        check_not_prepared(path, self.options)
        scan, dropped = open_scan(path)
        inputs = self.image_processor(scan, return_report=True, **self.options)
        volume, report = inputs["pixel_values"][0, 0], inputs["preprocessing_report"][0]
        report.pop("source")  # a path may name a patient
        dtype, _ = CACHE_DTYPES[self.dtype]
        stored = volume.clamp(0, 1).mul(255).round().to(dtype) if self.dtype == "uint8" else volume.to(dtype)
        metadata = {
            **source,
            "format_version": str(FORMAT_VERSION),
            "settings": self.fingerprint,
            "dtype": self.dtype,
            "preprocessing_report": json.dumps(report),
            "dropped_slices": json.dumps(dropped),
        }
        content = save({TENSOR_NAME: stored.contiguous()}, metadata)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(content, file)
        except OSError as error:
            raise RuntimeError(
                f"{file}: the cache cannot be written ({error.strerror}). Free some space, or choose another folder."
            ) from error
        return stored


def volume_loader(
    image_processor: Any, prepared: bool = False, cache: str | Path | None = None, dtype: str = "float16"
) -> VolumeLoader:
    """
    What brings volumes through the image processor.

    Args:
        image_processor ([`Med3DVLMImageProcessor`]):
            The one image processor.
        prepared (`bool`, *optional*, defaults to `False`):
            Whether the volumes were prepared before, so that they are at most resized.
        cache (`str` or `Path`, *optional*):
            Folder of a [`VolumeCache`]; without it each load processes the volume.
        dtype (`str`, *optional*, defaults to `"float16"`):
            Precision of the cache.

    Returns:
        [`VolumeLoader`].

    Raises:
        ValueError: `dtype` is no precision of a cache.
    """
    options = prepared_options(prepared)
    if cache is None:
        return ProcessedVolumes(image_processor, options)
    return VolumeCache(Path(cache).expanduser(), image_processor, dtype, options)


def settings_of(image_processor: Any, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of an image processor that decide about its volumes, with the options that replace some."""
    settings = {**image_processor.to_dict(), **(options or {})}
    for name in ("auto_map", "image_processor_type", "processor_class"):
        settings.pop(name, None)
    return settings


def fingerprint_of(image_processor: Any, dtype: str, options: Mapping[str, Any]) -> str:
    """A short name for all that decides what is stored: the processor's settings, the options, and the format."""
    described = {"settings": settings_of(image_processor, options), "dtype": dtype, "version": FORMAT_VERSION}
    content = json.dumps(described, sort_keys=True, default=list)
    return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()


def describe_source(path: Path) -> dict[str, str]:
    """
    Size and time of change of a scan; of a folder, those of its files together.

    Raises:
        FileNotFoundError: there is no such scan.
    """
    try:
        is_folder = path.is_dir()
        files = sorted(path.iterdir()) if is_folder else [path]
        stats = [_stat_of_entry(file) if is_folder else file.stat() for file in files]
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: there is no such scan. Check the path in the data set.") from error
    state = {
        "source_files": str(len(stats)),
        "source_size": str(sum(stat.st_size for stat in stats)),
        "source_mtime_ns": str(max((stat.st_mtime_ns for stat in stats), default=0)),
    }
    if is_folder:
        # Sums do not show which of the slices is another one.
        entries = [(file.name, stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats)]
        state["source_entries"] = hashlib.blake2b(json.dumps(entries).encode(), digest_size=16).hexdigest()
    return state


def _stat_of_entry(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except FileNotFoundError:
        return file.lstat()  # a link that leads nowhere: one damaged slice, not the end of its series


__all__ = ["CACHE_DTYPES", "VolumeCache", "describe_source", "fingerprint_of", "settings_of", "volume_loader"]
