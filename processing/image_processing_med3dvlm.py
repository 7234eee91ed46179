"""The one way from a scan to `pixel_values`: orientation, intensity, foreground, size."""

import difflib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ImagesKwargs, Unpack
from transformers.utils import PROCESSOR_NAME

from .volume_io import (
    InvalidVolumeError,
    Volume,
    check_orientation,
    flatten_volumes,
    open_volume,
    orient,
    read_stored_voxels,
    scale_stored,
    spacing_of,
)


# Windows in which CT is read, (lower, upper) in HU: level minus and plus half the width. Lung W1500 L-600, brain W80 L40,
# mediastinum W350 L50 and liver W150 L30 as in Radiopaedia, "Windowing (CT)"; soft tissue W400 L40 and bone W1500 L300 are
# common presets of viewers. "wide" spans from air to dense bone.
CT_WINDOWS: dict[str, tuple[float, float]] = {
    "wide": (-1000.0, 1000.0),
    "soft_tissue": (-160.0, 240.0),
    "lung": (-1350.0, 150.0),
    "bone": (-450.0, 1050.0),
    "brain": (0.0, 80.0),
    "mediastinum": (-125.0, 225.0),
    "liver": (-45.0, 105.0),
}
INTENSITY_MODES = ("auto", "window", "percentile", "minmax", "none")
# A volume that reaches down to here has air in HU: fat, the darkest tissue, ends near -150.
HU_OF_AIR = -200.0
# The mean of a CT lies below dense bone, whatever is in it. MR that was resampled can undershoot zero, but not this.
HU_OF_DENSE_BONE = 1000.0
# The air around a patient is -1000 HU; noise and resampling leave it below this.
HU_OF_OUTSIDE_AIR = -800.0
# Planes of a scan that are floating-point numbers at the same time, about.
PLANES_AT_ONCE = 4
# Of a CT's voxels, those above dense bone are a few in a hundred: never a share like this.
TOO_MUCH_DENSE_BONE = 0.25
# The densest voxel of a CT, where 12 bits hold -1024 to 3071 HU.
HIGHEST_HU = 3071.0
# The one mode that uses an option.
MODE_OF_OPTION = {"hu_range": "window", "intensity_percentiles": "percentile"}
# Options every image processor of transformers knows, and what to do instead for a volume.
OPTIONS_OF_PICTURES = {
    **dict.fromkeys(("size", "crop_size", "pad_size", "resample", "do_center_crop", "do_pad"), "use `image_size`"),
    **dict.fromkeys(
        ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std"), "use `intensity_mode`"
    ),
    **dict.fromkeys(("data_format", "input_data_format"), "leave it out"),
}
# What transformers writes into a saved processor beside its options.
SAVED_BESIDE_OPTIONS = ("auto_map", "feature_extractor_type", "image_processor_type", "processor_class")


class Med3DVLMImageProcessorKwargs(ImagesKwargs, total=False):
    """
    Options of [`Med3DVLMImageProcessor`].

    image_size (`list[int]`):
        Voxels of the output along `(depth, height, width)`.
    orientation (`str`):
        Directions in which `(width, height, depth)` grow, or `"none"` for the stored axes.
    intensity_mode (`str`):
        `"auto"`, `"window"`, `"percentile"`, `"minmax"` or `"none"`.
    hu_range (`str` or `list[float]`):
        A name in `CT_WINDOWS`, or `(lower, upper)` in HU.
    intensity_percentiles (`list[float]`):
        `(lower, upper)` in percent.
    do_crop_foreground (`bool`):
        Whether to crop to the voxels above 0.
    volume_index (`int`):
        Which volume of a 4D series to take, from 0.
    return_report (`bool`):
        Whether to return what was done, as `preprocessing_report`.
    """

    # In quotes, transformers leaves the checks to the processor, whose errors say what to do.
    image_size: "list[int] | tuple[int, ...]"
    orientation: "str"
    intensity_mode: "str"
    hu_range: "str | list[float] | tuple[float, ...]"
    intensity_percentiles: "list[float] | tuple[float, ...]"
    do_crop_foreground: "bool"
    volume_index: "int | None"
    return_report: "bool | None"


class Med3DVLMImageProcessor(BaseImageProcessor):
    r"""
    Prepares 3D scans as the M3D-Cap data were prepared, in this order:

    1. orientation: axes `(depth, height, width)` that grow to superior, posterior and left, from the file's affine; an
       array without an affine is taken as it is;
    2. intensity: to [0, 1] in float32;
    3. foreground: the smallest box around the voxels above 0;
    4. size: trilinear to `image_size` (`align_corners=False`, no antialiasing), not rescaled afterwards.

    Args:
        image_size (`list[int]`, *optional*, defaults to `[128, 256, 256]`):
            Voxels of the output along `(depth, height, width)`.
        orientation (`str`, *optional*, defaults to `"LPS"`):
            Directions in which `(width, height, depth)` grow; `"none"` keeps the stored axes, the last as the depth.
        intensity_mode (`str`, *optional*, defaults to `"auto"`):
            `"window"` clips to `hu_range` and scales to [0, 1], for CT in HU; `"minmax"` scales the volume's own range;
            `"percentile"` clips to `intensity_percentiles` of all voxels and scales, for MR; `"none"` takes values that
            are in [0, 1] already; `"auto"` is `"window"` for a volume with air in HU (a minimum of -200 or less, and a
            mean of at most 1000), and `"minmax"` for every other.
        hu_range (`str` or `list[float]`, *optional*, defaults to `[-1000.0, 1000.0]`):
            Window in HU, `(lower, upper)` or a name: "wide", "soft_tissue", "lung", "bone", "brain", "mediastinum",
            "liver".
        intensity_percentiles (`list[float]`, *optional*, defaults to `[0.5, 99.5]`):
            Percentiles of the mode `"percentile"`.
        do_crop_foreground (`bool`, *optional*, defaults to `True`):
            Whether to crop to the foreground.
        do_resize (`bool`, *optional*, defaults to `True`):
            Whether to resize to `image_size`.

    Raises:
        ValueError: an option has a value that cannot be, or no option has its name.

    Example:

    ```python
    >>> import numpy as np
    >>> from med3dvlm import Med3DVLMImageProcessor

    >>> processor = Med3DVLMImageProcessor(image_size=[16, 32, 48], hu_range="lung")
    >>> scan = np.random.default_rng(0).integers(-1000, 1000, size=(20, 40, 40))
    >>> inputs = processor(scan, return_report=True)
    >>> inputs["pixel_values"].shape
    torch.Size([1, 1, 16, 32, 48])
    >>> inputs["preprocessing_report"][0]["intensity_mode"], inputs["preprocessing_report"][0]["intensity_range"]
    ('window', [-1350.0, 150.0])
    ```"""

    model_input_names = ["pixel_values"]
    valid_kwargs = Med3DVLMImageProcessorKwargs

    image_size = [128, 256, 256]
    orientation = "LPS"
    intensity_mode = "auto"
    hu_range = [-1000.0, 1000.0]
    intensity_percentiles = [0.5, 99.5]
    do_crop_foreground = True
    do_resize = True
    # The inherited values concern pictures, and would be written beside ours.
    rescale_factor = None
    default_to_square = None

    def __init__(self, **kwargs: Unpack[Med3DVLMImageProcessorKwargs]):
        check_option_names(kwargs, [*self.valid_kwargs.__annotations__, *SAVED_BESIDE_OPTIONS])
        if kwargs.get("device") is not None:
            raise ValueError("`device` belongs to a call, not to a processor that is saved: pass it with the volumes.")
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name) for name in self._valid_kwargs_names})
        self.volume_index = self.return_report = None  # of one call, not of a processor
        self.auto_map = {"AutoImageProcessor": "image_processing_med3dvlm.Med3DVLMImageProcessor"}

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """
        As `BaseImageProcessor.from_dict`.

        Raises:
            ValueError: also where an argument is nearly the name of an option. All others that are not known pass, as
                they do in transformers, since what a tokenizer or a download is asked for comes through here too.
        """
        if not kwargs.get("return_unused_kwargs"):
            ours = cls.valid_kwargs.__annotations__.keys() - ImagesKwargs.__annotations__.keys()
            check_option_names((name for name in kwargs if _nearest(name, ours, "{}", cutoff=0.8)), ours)
        return super().from_dict(image_processor_dict, **kwargs)

    def save_pretrained(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> Any:
        """
        As `BaseImageProcessor.save_pretrained`.

        Raises:
            ValueError: the folder has a processor with other options for volumes, which loading would prefer to these.
        """
        path = Path(save_directory) / PROCESSOR_NAME
        whole = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if "image_processor" in whole:
            ours = json.loads(self.to_json_string())
            theirs = whole["image_processor"]
            differing = [name for name in self._valid_kwargs_names if ours.get(name) != theirs.get(name)]
            if differing:
                raise ValueError(
                    f"{path}: the processor in this folder has other values of {', '.join(map(repr, differing))}, and loading "
                    "prefers them to those of an image processor beside it. Load the processor, put this image processor into "
                    "it, `processor.image_processor = image_processor`, and save the processor."
                )
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        """
        Prepares one volume or lists of them: see the class for the steps, and `fetch_images` for what a volume is.

        Args:
            images (`Any`):
                The volumes.
            kwargs:
                Any option of the processor, for this call; and `volume_index` (`int`), which volume of a 4D series to
                take, from 0; `return_report` (`bool`), whether to add `preprocessing_report`, see `prepare_volume`;
                `return_tensors` (`str`); `device` (`str` or `torch.device`), where the result is put.

        Returns:
            [`~transformers.BatchFeature`] with `pixel_values` (`torch.FloatTensor` of shape `(num_volumes, 1, depth,
            height, width)`, in [0, 1]).

        Raises:
            InvalidVolumeError: a volume cannot be used.
            ValueError: an option has a value that cannot be, or no option has its name.
        """
        check_option_names(kwargs, [*self._valid_kwargs_names, "image_like_kwargs"])
        batch = super().preprocess(images, *args, **kwargs)
        given = [name for name in MODE_OF_OPTION if kwargs.get(name) is not None]
        for report in batch.get("preprocessing_report", []):
            report["warnings"] += warn_of_unused(given, report["intensity_mode"])
        return batch

    def _standardize_kwargs(self, **kwargs: Any) -> dict[str, Any]:
        return {name: as_plain_numbers(value) for name, value in super()._standardize_kwargs(**kwargs).items()}

    def fetch_images(self, images: Any) -> Any:
        """
        Finds volumes without reading their voxels; lists stay lists. Called before every other step, so this is the one
        place that decides what counts as a volume: see `open_volume`.
        """
        if isinstance(images, (list, tuple)):
            return [self.fetch_images(entry) for entry in images]
        if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 5:
            return flatten_volumes(images)
        return open_volume(images)

    def _validate_preprocess_kwargs(
        self,
        image_size: Any = None,
        orientation: Any = None,
        intensity_mode: Any = None,
        hu_range: Any = None,
        intensity_percentiles: Any = None,
        do_crop_foreground: Any = None,
        do_resize: Any = None,
        volume_index: Any = None,
        **kwargs: Any,
    ) -> None:
        for name, remedy in OPTIONS_OF_PICTURES.items():
            if kwargs.get(name):
                raise ValueError(f"`{name}` is an option of pictures, and does nothing to a volume: {remedy}.")
        if not is_sequence_of(image_size, int, 3) or min(image_size) < 1:
            raise ValueError(
                f"`image_size` must be three positive numbers of voxels (depth, height, width), got {image_size!r}."
            )
        check_orientation(orientation)
        if intensity_mode not in INTENSITY_MODES:
            raise ValueError(f"`intensity_mode` {_unknown(intensity_mode, INTENSITY_MODES)}")
        resolve_hu_range(hu_range)
        if not (is_sequence_of(intensity_percentiles, (int, float), 2)
                and 0 <= intensity_percentiles[0] < intensity_percentiles[1] <= 100):  # fmt: skip
            raise ValueError(
                "`intensity_percentiles` must be two numbers from 0 to 100, the lower first, got "
                f"{intensity_percentiles!r}."
            )
        for name, value in {"do_crop_foreground": do_crop_foreground, "do_resize": do_resize}.items():
            if not isinstance(value, bool):
                raise ValueError(f"`{name}` must be True or False, got {value!r}.")
        if volume_index is not None and (isinstance(volume_index, bool) or not isinstance(volume_index, int)):
            raise ValueError(f"`volume_index` must be a whole number, counted from 0, got {volume_index!r}.")

    def _preprocess_image_like_inputs(
        self,
        images: Any,
        *args: Any,
        volume_index: int | None = None,
        return_report: bool | None = None,
        return_tensors: str | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        volumes = flatten_volumes(self.fetch_images(images))
        if not volumes:
            raise InvalidVolumeError("Expected at least one volume, got an empty list.")
        pixel_values, reports = [], []
        for volume in volumes:
            prepared, report = self.prepare_volume(volume, volume_index, **kwargs)
            pixel_values.append(prepared.unsqueeze(0).to(device=device))  # (D, H, W) -> (1, D, H, W)
            reports.append(report)
        shapes = sorted({tuple(prepared.shape[1:]) for prepared in pixel_values})
        if len(shapes) > 1 and return_tensors is not None:
            raise ValueError(
                f"Volumes of different sizes {shapes} (depth, height, width) do not make a batch: leave `do_resize` on, "
                "or leave out `return_tensors` for a list."
            )
        data = {"pixel_values": torch.stack(pixel_values) if len(shapes) == 1 else pixel_values}
        batch = BatchFeature(data, tensor_type=return_tensors)
        if return_report:
            batch["preprocessing_report"] = reports
        return batch

    def prepare_volume(
        self,
        volume: Volume,
        volume_index: int | None,
        image_size: Any,
        orientation: str,
        intensity_mode: str,
        hu_range: Any,
        intensity_percentiles: Any,
        do_crop_foreground: bool,
        do_resize: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        r"""
        Prepares one volume.

        Returns:
            `torch.Tensor` of shape `(depth, height, width)`, and the report, whose entries are plain numbers and texts:

            - `source`, `source_dtype`, `source_shape` (stored axes), `source_spacing` (mm, stored axes),
              `source_orientation` (directions of the stored axes) and `is_orientation_known`;
            - `orientation`, `oriented_shape` and `oriented_spacing` (mm), in (depth, height, width);
            - `source_range` (lowest and highest value), `intensity_mode` (the one used), `intensity_range` (what became
              0 and 1, in the source's values) and `clipped_fraction`;
            - `crop_box` (`[[start, stop], ...]` in the oriented volume);
            - `shape`, `spacing` (mm) and `affine` of the result: the affine maps its voxel `(d, h, w, 1)` to RAS+ mm;
            - `warnings`.

            What depends on an affine is None where there is none.

        Raises:
            InvalidVolumeError: the voxels cannot be used with these options.
        """
        stored, slope, intercept = read_stored_voxels(volume, volume_index)
        stored, affine = orient(stored, volume.affine, orientation)
        scan = Scan(stored, slope, intercept, volume.name)
        oriented_shape = list(stored.shape)
        intensity = find_intensity(scan, intensity_mode, resolve_hu_range(hu_range), intensity_percentiles)
        crop_box = foreground_box(scan, intensity) if do_crop_foreground else [[0, size] for size in oriented_shape]
        cropped = scan.stored[tuple(slice(start, stop) for start, stop in crop_box)]
        voxels = resize_planes(scan, cropped, intensity, tuple(image_size) if do_resize else cropped.shape)
        grid_affine = affine_of_grid(affine, crop_box, cropped.shape, voxels.shape)
        num_below, num_above = scan.count_outside(intensity)

        report: dict[str, Any] = {
            "source": volume.name,
            "source_dtype": volume.dtype.name,
            "source_shape": list(volume.shape),
            "source_spacing": _as_list(spacing_of(volume.affine)),
            "source_orientation": volume.axis_codes,
            "is_orientation_known": volume.is_orientation_known,
            "orientation": orientation if affine is not None else "none",
            "oriented_shape": oriented_shape,
            "oriented_spacing": _as_list(spacing_of(affine)),
            "source_range": [scan.lowest, scan.highest],
            "intensity_mode": intensity.mode,
            "intensity_range": [intensity.lower, intensity.upper],
            "clipped_fraction": (num_below + num_above) / stored.size,
            "crop_box": crop_box,
            "shape": list(voxels.shape),
            "spacing": _as_list(spacing_of(grid_affine)),
            "affine": grid_affine.tolist() if grid_affine is not None else None,
        }
        report["warnings"] = find_warnings(report, intensity_mode, num_above / stored.size)
        if volume.conflict is not None:
            report["warnings"].append(
                f"The header contradicts itself: {volume.conflict}. Check left and right, and the voxel size, against the "
                "original images."
            )
        return voxels, report


def warn_of_unused(given: Iterable[str], used_mode: str) -> list[str]:
    """What to say of options that were given for a call, but are those of another `intensity_mode` than the used one."""
    return [
        f"`{name}` was given but not used, because the intensity mode is '{used_mode}': pass "
        f'`intensity_mode="{MODE_OF_OPTION[name]}"` with it.'
        for name in given
        if MODE_OF_OPTION[name] != used_mode
    ]


def check_option_names(given: Iterable[str], known: Iterable[str]) -> None:
    """
    Raises:
        ValueError: an option is not known; transformers would leave it out and go on.
    """
    known = sorted(known)
    for name in given:
        if name not in known:
            raise ValueError(f"There is no option `{name}`{_nearest(name, known, '; did you mean `{}`?')}")


def as_plain_numbers(value: Any) -> Any:
    """NumPy's numbers and arrays as Python's, which JSON can hold; all else as it is."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return type(value)(as_plain_numbers(entry) for entry in value)
    return value


def is_sequence_of(value: Any, types: Any, length: int) -> bool:
    """Whether `value` is a list or tuple of that length whose entries are of these types, and no booleans."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == length
        and all(isinstance(entry, types) and not isinstance(entry, bool) for entry in value)
    )


def resolve_hu_range(hu_range: Any) -> tuple[float, float]:
    """
    `(lower, upper)` in HU of a window given by name or by numbers.

    Raises:
        ValueError: there is no window of that name, or the numbers make none.
    """
    if isinstance(hu_range, str):
        if hu_range not in CT_WINDOWS:
            raise ValueError(f"`hu_range` {_unknown(hu_range, CT_WINDOWS)}, or two numbers (lower, upper) in HU.")
        return CT_WINDOWS[hu_range]
    lower, upper = hu_range if is_sequence_of(hu_range, (int, float), 2) else (math.nan, math.nan)
    if not (math.isfinite(lower) and math.isfinite(upper) and lower < upper):
        raise ValueError(f"`hu_range` must be two numbers (lower, upper) in HU, the lower first, got {hu_range!r}.")
    return float(lower), float(upper)


@dataclass(frozen=True)
class Intensity:
    """
    How values become [0, 1].

    Args:
        mode (`str`): The one used.
        lower (`float`), upper (`float`): The values that become 0 and 1.
    """

    mode: str
    lower: float
    upper: float

    def apply_(self, values: torch.Tensor) -> torch.Tensor:
        """Scales float32 values in place, and returns them."""
        if self.mode == "none":
            return values
        if self.mode == "minmax":
            span = torch.tensor(self.upper, dtype=torch.float32) - torch.tensor(self.lower, dtype=torch.float32)
            return values.sub_(self.lower).div_(float(span))  # not 0: constant volumes are refused
        return values.clamp_(self.lower, self.upper).sub_(self.lower).div_(self.upper - self.lower)


class Scan:
    """
    The voxels of an oriented volume, kept as they are stored: only planes of them ever become floating-point numbers.
    Conversion keeps the order of values, so extremes are found among the stored ones.

    Args:
        stored (`np.ndarray` of shape `(depth, height, width)`):
            The voxels; a view in any layout.
        slope (`float`), intercept (`float`):
            To be applied to them.
        name (`str`):
            What messages call the volume.

    Attributes:
        lowest (`float`), highest (`float`):
            Values of all voxels.
        axis_maxima (`list[torch.Tensor]`):
            The highest value at each position along depth, height and width.

    Raises:
        InvalidVolumeError: a voxel is not finite, or all have the same value.
    """

    def __init__(self, stored: np.ndarray, slope: float, intercept: float, name: str):
        self.stored, self.slope, self.intercept, self.name = stored, slope, intercept, name
        # As the memory lies: the slowest axis first, all growing.
        order = sorted(range(3), key=lambda axis: -abs(stored.strides[axis]))
        forward = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in stored.strides)
        self.in_memory = stored[forward].transpose(order)

        lowest, maxima = [], []
        across = self.in_memory[0].copy()
        for plane in self.in_memory:
            lowest.append(plane.min())
            maxima.append(plane.max())
            np.maximum(across, plane, out=across)
        found = dict(zip(order, (np.array(maxima), across.max(axis=1), across.max(axis=0))))
        self.axis_maxima = [self.as_float(found[axis][forward[axis]]) for axis in range(3)]
        # NaN if there is one
        self.lowest = float(self.as_float(np.array(lowest)).min())
        self.highest = float(self.axis_maxima[0].max())
        if not (math.isfinite(self.lowest) and math.isfinite(self.highest)):
            num_bad = sum(int((~torch.isfinite(self.as_float(plane))).sum()) for plane in self.in_memory)
            raise InvalidVolumeError(
                f"{name}: {num_bad} of {stored.size} voxels are NaN or infinite. Fill them first, e.g. with -1000 HU "
                "outside the scanned region."
            )
        if self.lowest == self.highest:
            raise InvalidVolumeError(f"{name}: all voxels are {self.lowest:g}: the volume shows nothing.")

    def as_float(self, part: np.ndarray) -> torch.Tensor:
        """A float32 copy of stored voxels, with slope and intercept applied."""
        return torch.from_numpy(np.array(scale_stored(part, self.slope, self.intercept), dtype=np.float32, order="C"))

    def mean(self) -> float:
        """Of all values."""
        is_integer = self.stored.dtype.kind in "bui"
        total = sum(float(plane.sum(dtype=np.int64 if is_integer else np.float64)) for plane in self.in_memory)
        return total / self.stored.size * self.slope + self.intercept

    def percentiles(self, percentiles: list[float] | tuple[float, ...]) -> tuple[float, float]:
        """Of all values."""
        # Between truth values NumPy has no way to interpolate.
        values = self.in_memory.view(np.uint8) if self.stored.dtype == bool else self.in_memory
        lower, upper = np.percentile(values, percentiles) * self.slope + self.intercept
        return float(lower), float(upper)

    def count_outside(self, intensity: Intensity) -> tuple[int, int]:
        """How many voxels lie below the value that became 0, and above the one that became 1."""
        lower, upper = np.float32(intensity.lower), np.float32(intensity.upper)
        if lower <= self.lowest and self.highest <= upper:
            return 0, 0
        is_short = (
            self.stored.dtype.kind in "ui" and self.stored.itemsize <= 2 and (self.slope, self.intercept) == (1, 0)
        )
        # Whole numbers are compared as such.
        bounds = (math.ceil(lower), math.floor(upper)) if is_short else (lower, upper)
        num_below = num_above = 0
        for plane in self.in_memory:
            values = plane if is_short else self.as_float(plane).numpy()
            num_below += int(np.count_nonzero(values < bounds[0]))
            num_above += int(np.count_nonzero(values > bounds[1]))
        return num_below, num_above


def is_ct_in_hu(lowest: float, highest: float, mean: Callable[[], float]) -> bool:
    """Whether `intensity_mode` "auto" takes values for CT in HU, by their ends and, only where these do not tell, their mean."""
    return lowest <= HU_OF_AIR and (highest <= HU_OF_DENSE_BONE or mean() <= HU_OF_DENSE_BONE)


def find_intensity(
    scan: Scan, mode: str, hu_range: tuple[float, float], percentiles: list[float] | tuple[float, ...]
) -> Intensity:
    """
    Finds out how the values of a scan are to be scaled.

    Args:
        scan ([`Scan`]):
            The volume.
        mode (`str`), hu_range (`tuple[float, float]`), percentiles (`list[float]`):
            As in [`Med3DVLMImageProcessor`].

    Returns:
        [`Intensity`]

    Raises:
        InvalidVolumeError: the values contradict the mode, or nothing of the volume lies in its range.
    """
    name, lowest, highest = scan.name, scan.lowest, scan.highest
    if mode == "auto":
        mode = "window" if is_ct_in_hu(lowest, highest, scan.mean) else "minmax"
    if mode == "none":
        if lowest < 0 or highest > 1:
            raise InvalidVolumeError(
                f"{name}: `intensity_mode` 'none' expects values in [0, 1], got {lowest:g} to {highest:g}. Use 'window' "
                "for CT in HU, 'minmax' or 'percentile' for other images, or 'auto'."
            )
        return Intensity(mode, 0.0, 1.0)
    if mode == "minmax":
        return Intensity(mode, lowest, highest)

    if mode == "window":
        is_8_bit = scan.stored.dtype.kind in "bu" and scan.stored.itemsize == 1 and highest <= 255
        if lowest >= 0 and (highest <= 1 or is_8_bit):
            looks_like = "scaled to [0, 1] already" if highest <= 1 else "an 8-bit export"
            raise InvalidVolumeError(
                f"{name}: `intensity_mode` 'window' expects CT in HU, got values from {lowest:g} to {highest:g}, which "
                f"look like {looks_like}. Use 'none' for values in [0, 1], 'minmax' for 8-bit images, or 'auto'."
            )
        lower, upper = hu_range
    else:
        lower, upper = scan.percentiles(percentiles)
        if lower == upper:
            raise InvalidVolumeError(
                f"{name}: the percentiles {tuple(percentiles)} are both {lower:g}: most voxels have one value. Use "
                "'minmax', or percentiles further apart."
            )
    intensity = Intensity(mode, lower, upper)
    scaled_lowest, scaled_highest = intensity.apply_(torch.tensor([lowest, highest]))
    if scaled_lowest == scaled_highest:
        raise InvalidVolumeError(
            f"{name}: no voxel lies within the window {lower:g} to {upper:g}; the values go from {lowest:g} to "
            f"{highest:g}. Choose another `hu_range`, or check that the values are HU."
        )
    return intensity


def foreground_box(scan: Scan, intensity: Intensity) -> list[list[int]]:
    """
    The smallest box around the voxels above 0 after scaling, as `[[start, stop], ...]` along (depth, height, width).

    Raises:
        InvalidVolumeError: no voxel is above 0.
    """
    occupied = [(intensity.apply_(maxima.clone()) > 0).nonzero() for maxima in scan.axis_maxima]
    if not len(occupied[0]):
        raise InvalidVolumeError(f"{scan.name}: no voxel is above 0 after scaling: there is no foreground to crop to.")
    return [[int(positions[0]), int(positions[-1]) + 1] for positions in occupied]


def resize_planes(scan: Scan, cropped: np.ndarray, intensity: Intensity, size: tuple[int, ...]) -> torch.Tensor:
    """
    Scales a part of a scan to [0, 1] and resizes it, trilinear (`align_corners=False`, no antialiasing): some planes at a
    time, first within them and then along the depth, which are the terms of `torch.nn.functional.interpolate`.

    Args:
        scan ([`Scan`]), intensity ([`Intensity`]):
            The volume, and how its values are scaled.
        cropped (`np.ndarray` of shape `(depth, height, width)`):
            A part of `scan.stored`.
        size (`tuple[int, int, int]`):
            Voxels of the result.

    Returns:
        `torch.Tensor` of shape `size`, in float32.
    """
    result = torch.empty(size)
    below, above, weights = linear_positions(len(cropped), size[0])
    for start in range(0, size[0], PLANES_AT_ONCE):
        stop = min(start + PLANES_AT_ONCE, size[0])
        first, last = int(below[start]), int(above[stop - 1])
        needed = torch.unique(torch.cat([below[start:stop], above[start:stop]]))
        # Neighbouring planes are one view of the scan, others have to be picked.
        planes = cropped[first : last + 1] if len(needed) == last - first + 1 else cropped[needed.numpy()]
        values = intensity.apply_(scan.as_float(planes))
        if values.shape[1:] != tuple(size[1:]):
            # Trilinear here too, to the same number of planes: to the bit the terms of all three axes at once.
            in_planes = (len(values), *size[1:])
            values = nn.functional.interpolate(values[None, None], size=in_planes, mode="trilinear")[0, 0]
        lower, upper = (values[torch.searchsorted(needed, places[start:stop])] for places in (below, above))
        share = weights[start:stop, None, None]
        torch.addcmul(upper.mul_(share), lower, 1 - share, out=result[start:stop])
    return result


def linear_positions(size: int, new_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """
    Along one axis, for each position of the resized one: the two old positions around it, and the weight of the second.
    """
    # Rounded to float32 where torch does.
    scale = torch.tensor(size / new_size, dtype=torch.float32).double()
    positions = ((torch.arange(new_size) + 0.5) * scale - 0.5).float().clamp_(min=0)
    below = positions.long().clamp_(max=size - 1)
    return below, (below + 1).clamp_(max=size - 1), (positions - below).clamp_(0, 1)


def affine_of_grid(
    affine: np.ndarray | None, crop_box: list[list[int]], cropped_shape: Any, shape: Any
) -> np.ndarray | None:
    """
    Affine of the cropped and resized grid. With `align_corners=False`, voxel `x` of the result lies at
    `start + (x + 0.5) * scale - 0.5` of the oriented volume, where `scale` is the cropped size over the new one.
    """
    if affine is None:
        return None
    to_source = np.eye(4)
    for axis, (start, _) in enumerate(crop_box):
        scale = cropped_shape[axis] / shape[axis]
        to_source[axis, axis] = scale
        to_source[axis, 3] = start + 0.5 * scale - 0.5
    return affine @ to_source


def find_warnings(report: dict[str, Any], requested_mode: str, fraction_above: float) -> list[str]:
    """
    What a reader of a report should look at twice.

    Args:
        report (`dict`):
            All else of the report.
        requested_mode (`str`):
            The `intensity_mode` asked for.
        fraction_above (`float`):
            Of the voxels, those above the value that became 1.
    """
    warnings = []
    (lowest, highest), spacing = report["source_range"], report["oriented_spacing"]
    used_mode = report["intensity_mode"]
    if report["source_orientation"] is not None and not report["is_orientation_known"]:
        warnings.append("The file does not say how the patient lies: left and right are a convention, not a fact.")
    if report["source_orientation"] is None:
        warnings.append("An array has no affine: it was taken to be in the order (depth, height, width) of the model.")
    if spacing is not None and (max(spacing) > 10 or min(spacing) < 0.05):
        warnings.append(
            f"Voxels are {min(spacing):.3g} to {max(spacing):.3g} mm apart: check the units of the header."
        )
    if requested_mode == "auto" and used_mode == "minmax" and lowest < 0:
        warnings.append("Negative values, but not as in CT: scaled by their own range. For CT in HU ask for 'window'.")
    if requested_mode == "auto" and used_mode == "window" and lowest > HU_OF_OUTSIDE_AIR:
        warnings.append(
            f"Read as CT because of values down to {lowest:g}, yet none is as low as air (-1000 HU): for other images ask "
            "for 'percentile'."
        )
    upper = report["intensity_range"][1]
    is_bone_rare = upper < HU_OF_DENSE_BONE or fraction_above < TOO_MUCH_DENSE_BONE
    if requested_mode == "auto" and used_mode == "window" and not is_bone_rare:
        warnings.append(
            f"Read as CT because of values down to {lowest:g}, yet {100 * fraction_above:.0f} % of the voxels lie above "
            f"{upper:g}, which no CT has: for other images, such as phases of MR, ask for 'minmax' or 'percentile'."
        )
    if used_mode == "window" and lowest >= 0 and highest <= 255:
        warnings.append(
            f"Values from {lowest:g} to {highest:g} look like an 8-bit export, which is not HU: unless they are HU, ask for "
            "'minmax'."
        )
    if used_mode in ("window", "minmax") and lowest >= 0 and highest > 1500:
        advice = "HU may be stored with an offset, often of 1024. Subtract it"
        if lowest == 0 and highest <= HIGHEST_HU:  # which of the two, the values alone do not say
            advice += "; or all around the patient or the brain was set to 0. Then the values are HU: ask for 'window'"
        warnings.append(f"No negative values: if this is CT, {advice}.")
    return warnings


def format_preprocessing_report(report: dict[str, Any]) -> str:
    """
    One volume's report as a table for a reader, lengths in mm and axes as (depth, height, width) unless said otherwise.

    Args:
        report (`dict`):
            An entry of `preprocessing_report`.
    """

    def numbers(values: Any, unit: str = "") -> str:
        return "not known" if values is None else " x ".join(f"{value:.4g}" for value in values) + unit

    low, high = report["source_range"]
    lower, upper = report["intensity_range"]
    known = "" if report["is_orientation_known"] else " (not stated by the file)"
    rows = {
        "source": report["source"],
        "stored": f"{numbers(report['source_shape'])} voxels of {report['source_dtype']}, "
        f"{numbers(report['source_spacing'], ' mm')}, axes {report['source_orientation'] or 'of an array'}{known}",
        "oriented": f"{numbers(report['oriented_shape'])} voxels (depth, height, width), "
        f"{numbers(report['oriented_spacing'], ' mm')}, orientation {report['orientation']}",
        "values": f"{low:.6g} to {high:.6g}",
        "intensity": f"{report['intensity_mode']}: {lower:.6g} became 0 and {upper:.6g} became 1, "
        f"{100 * report['clipped_fraction']:.1f} % of the voxels lay outside",
        "foreground": ", ".join(
            f"{axis} {start}:{stop}" for axis, (start, stop) in zip(("depth", "height", "width"), report["crop_box"])
        ),
        "given to model": f"{numbers(report['shape'])} voxels, {numbers(report['spacing'], ' mm')}",
    }
    for number, warning in enumerate(report["warnings"], start=1):
        rows[f"warning {number}"] = warning
    width = max(map(len, rows))
    return "\n".join(f"{label:<{width}}  {value}" for label, value in rows.items())


def _nearest(word: str, words: Iterable[str], hint: str, cutoff: float = 0.6) -> str:
    """`hint` filled with the word that may have been meant; nothing if none is near."""
    return "".join(hint.format(near) for near in difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff))


def _unknown(value: Any, valid: Iterable[str]) -> str:
    hint = _nearest(str(value), valid, " (did you mean {!r}?)")
    return f"must be one of {', '.join(map(repr, valid))}; got {value!r}{hint}"


def _as_list(values: tuple[float, ...] | None) -> list[float] | None:
    return None if values is None else list(values)


__all__ = ["CT_WINDOWS", "Med3DVLMImageProcessor", "Med3DVLMImageProcessorKwargs", "format_preprocessing_report"]
