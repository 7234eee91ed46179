"""Reading and orienting 3D volumes: NIfTI files, nibabel images, arrays and tensors, without copies of the voxels."""

import gzip
import io
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from transformers.utils import logging


try:
    import nibabel
except ImportError:
    nibabel = None


logger = logging.get_logger(__name__)

# Most voxels one volume may have. A damaged header can claim anything, and memory is reserved before a byte is read.
MAX_VOXELS = 2**30
# Deflate, the algorithm in gzip, cannot shrink data further than 1032 : 1.
MAX_GZIP_RATIO = 1100

UNKNOWN_ORIENTATION = (
    "The file does not say how the patient lies in it (qform_code and sform_code are 0). The default of the NIfTI "
    "standard was assumed: left and right may be swapped."
)


class InvalidVolumeError(ValueError):
    """A volume that cannot be used. The message names it, what was expected of it, and what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """
    Reference to one 3D volume, or to a series of them, whose voxels [`~Volume.read`] reads when they are needed.

    Attributes:
        name (`str`):
            Path of the file, or what the source was.
        data (`Any`):
            Array, or stand-in that reads the voxels when indexed, in stored axis order: `(i, j, k, ...)` for NIfTI
            and nibabel images, `(depth, height, width)` for plain arrays.
        shape (`tuple[int, ...]`):
            Of `data`. Axes after the third one hold a series of volumes.
        dtype (`np.dtype`):
            As stored, before the scale slope and intercept.
        affine (`np.ndarray` of shape `(4, 4)`, *optional*):
            Maps a voxel index `(i, j, k, 1)` to RAS+ mm. `None` for plain arrays.
        orientation_known (`bool`, *optional*, defaults to `True`):
            Whether the source says how its axes lie in the patient.
        notes (`tuple[str, ...]`, *optional*):
            Remarks on the source that its user should read.
    """

    name: str
    data: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray | None = None
    orientation_known: bool = True
    notes: tuple[str, ...] = ()

    @property
    def orientation(self) -> str | None:
        """Directions in which the stored axes grow, such as `"RAS"`; oblique axes count as the closest ones."""
        return None if self.affine is None else "".join(nibabel.aff2axcodes(self.affine))

    @property
    def num_volumes(self) -> int:
        """Volumes in the series; 1 for a single volume."""
        return math.prod(self.shape[3:])

    def read(self, volume_index: int | None = None) -> np.ndarray:
        """
        Reads the voxels, with the scale slope and intercept applied. Of a series, only the wanted part is read.

        Args:
            volume_index (`int`, *optional*):
                Which volume of a series, from 0. May be left out for a single volume.

        Returns:
            `np.ndarray` of three axes in stored order: real numbers of any type, possibly memory of the source.

        Raises:
            InvalidVolumeError: a series without `volume_index`, an index out of range, or damaged data.
        """
        if volume_index is None and self.num_volumes > 1:
            raise InvalidVolumeError(
                f"{self.name} is a series of {self.num_volumes} volumes, of shape {self.shape}: pick one with "
                f"`volume_index=`, from 0 to {self.num_volumes - 1}."
            )
        if volume_index is not None and not 0 <= volume_index < self.num_volumes:
            raise InvalidVolumeError(
                f"`volume_index` {volume_index} is out of range: {self.name} holds {self.num_volumes} volume(s), "
                f"so it must be from 0 to {self.num_volumes - 1}."
            )
        # First axis of the series fastest, as the volumes lie in a file.
        index = np.unravel_index(volume_index or 0, self.shape[3:], order="F") if self.shape[3:] else ()
        with _errors_naming(self.name):
            return np.asarray(self.data[(slice(None),) * 3 + tuple(map(int, index))])


def open_volume(source: Any) -> Volume:
    """
    Checks a source and refers to it, without reading its voxels.

    Args:
        source (`str`, `Path`, `bytes`, nibabel image, `np.ndarray`, `torch.Tensor` or [`Volume`]):
            A NIfTI file (`.nii`, `.nii.gz`), its content, an image, or a plain array of shape
            `(depth, height, width)` or `(1, depth, height, width)`.

    Returns:
        [`Volume`]. A [`Volume`] is returned as it is.

    Raises:
        FileNotFoundError: the path leads to no file.
        ImportError: a file is to be read and nibabel is not installed.
        InvalidVolumeError: the source is not a usable 3D volume.
        TypeError: the source is of another type.

    Example:

    ```python
    >>> volume = open_volume(np.zeros((1, 16, 32, 48)))
    >>> volume.name, volume.shape
    ('array of shape (1, 16, 32, 48)', (16, 32, 48))
    ```"""
    if isinstance(source, Volume):
        return source
    if isinstance(source, (str, Path)):
        return _open_file(_existing_file(source))
    if isinstance(source, (bytes, bytearray)):
        return _open_file(bytes(source))
    if isinstance(source, torch.Tensor):
        # NumPy knows none of the shorter floating-point types but float16.
        tensor = source.float() if source.is_floating_point() and source.itemsize < 4 else source
        return _open_array(tensor.numpy(force=True), f"tensor of shape {tuple(source.shape)}")
    if isinstance(source, np.ndarray):
        return _open_array(source, f"array of shape {source.shape}")
    if nibabel is not None and isinstance(source, nibabel.spatialimages.SpatialImage):
        return _open_image(source)
    raise TypeError(
        "Expected a volume as the path of a NIfTI file, the bytes of one, a nibabel image, a NumPy array or a torch "
        f"tensor, got {type(source).__name__}."
    )


def orient(array: np.ndarray, affine: np.ndarray | None, orientation: str) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Brings a volume to `(depth, height, width)` by swapping and flipping axes. Nothing is interpolated or copied.

    Args:
        array (`np.ndarray` of three axes):
            In stored order: `(i, j, k)` with an affine, `(depth, height, width)` without.
        affine (`np.ndarray` of shape `(4, 4)`, *optional*):
            Maps `(i, j, k, 1)` to RAS+ mm. Without it, the array is taken as it is.
        orientation (`str`):
            Directions in which width, height and depth are to grow, one letter each of L/R, P/A, S/I: with `"LPS"`
            width grows to the patient's left, height to posterior and depth to superior. Oblique axes count as the
            closest ones. `"none"` keeps the file's directions: width is its first axis and depth its last.

    Returns:
        The array as a view of shape `(depth, height, width)`, and the affine that maps its index `(d, h, w, 1)` to
        RAS+ mm.
    """
    if affine is None:
        return array, None
    if orientation != "none":
        wanted = nibabel.orientations.axcodes2ornt(tuple(orientation))
        transform = nibabel.orientations.ornt_transform(nibabel.orientations.io_orientation(affine), wanted)
        affine = affine @ nibabel.orientations.inv_ornt_aff(transform, array.shape)
        array = nibabel.orientations.apply_orientation(array, transform)
    return array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]  # (W, H, D) -> (D, H, W)


def spacing_of(affine: np.ndarray) -> tuple[float, float, float]:
    """Distances in mm between neighbouring voxels, in the order of the axes that the affine maps."""
    first, second, third = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    return first, second, third


def _open_array(array: np.ndarray, name: str) -> Volume:
    if array.ndim == 4 and len(array) == 1:
        array = array[0]  # (1, D, H, W) -> (D, H, W)
    if array.ndim == 4:
        raise InvalidVolumeError(
            f"Expected one channel, (1, depth, height, width), got an {name}, which has {len(array)}. Pick one, e.g. "
            "`volume[0]`, and pass several volumes as a list."
        )
    if array.ndim != 3:
        raise InvalidVolumeError(
            f"Expected a volume of shape (depth, height, width), got an {name}. Stack slices first, e.g. "
            "`np.stack(slices)`, and pass several volumes as a list."
        )
    _check_shape_and_dtype(array.shape, array.dtype, name)
    return Volume(name, array, array.shape, array.dtype)


def _open_image(image: Any) -> Volume:
    name = image.get_filename() or f"nibabel image of shape {image.shape}"
    dtype = np.dtype(getattr(image.dataobj, "dtype", None) or image.get_data_dtype())
    _check_shape_and_dtype(image.shape, dtype, name)
    if isinstance(image, nibabel.Nifti1Pair):
        is_known = any(int(image.header[code]) for code in ("qform_code", "sform_code"))
    else:
        is_known = not isinstance(image, nibabel.AnalyzeImage)  # the one format that has no place for it
    affine = image.header.get_best_affine() if image.affine is None else np.asarray(image.affine, dtype=np.float64)
    return _oriented_volume(name, image.dataobj, image.shape, dtype, affine, is_known)


def _open_file(content: Path | bytes) -> Volume:
    name = str(content) if isinstance(content, Path) else f"NIfTI file of {len(content)} bytes in memory"
    if nibabel is None:
        raise ImportError(f"{name}: reading NIfTI files needs nibabel. Install it: pip install nibabel")
    with _errors_naming(name):
        file = _NiftiFile(content, name)
    header, notes = file.header, ()
    is_known = bool(header["qform_code"] or header["sform_code"])
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # the sign of the third axis; the standard reads any other value as 1
    try:
        with np.errstate(all="ignore"):
            affine = header.get_best_affine()
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        raise InvalidVolumeError(
            f"{name} has an invalid orientation in its header ({error}). Export the scan again."
        ) from error
    _check_affine(affine, name)
    if not np.allclose(spacing_of(affine), header["pixdim"][1:4], rtol=0.01):
        notes = (
            f"The header gives voxels of {_lengths(header['pixdim'][1:4])} mm, its affine of "
            f"{_lengths(spacing_of(affine))} mm. The affine was used.",
        )
    return _oriented_volume(name, file, file.shape, file.dtype, affine, is_known, notes)


def _oriented_volume(
    name: str,
    data: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    affine: np.ndarray,
    is_known: bool,
    notes: tuple[str, ...] = (),
) -> Volume:
    """A volume with an affine, checked."""
    _check_affine(affine, name)
    if not is_known:
        logger.warning_once(UNKNOWN_ORIENTATION)
        notes = (UNKNOWN_ORIENTATION, *notes)
    return Volume(name, data, tuple(shape), dtype, affine, is_known, notes)


class _NiftiFile:
    """
    Voxels of a NIfTI file, read when indexed. nibabel repairs a bad header with no more than a log message; here the
    header is checked as it is, and against the size of the file, before any memory is reserved for voxels.
    """

    def __init__(self, content: Path | bytes, name: str):
        self.content, self.name = content, name
        self.is_compressed = False
        with self._open() as stream:
            self.is_compressed = stream.read(2) == b"\x1f\x8b"
        with self._open() as stream:
            self.header = _read_header(stream.read(540), name)
        self.shape = tuple(int(length) for length in self.header["dim"][1 : int(self.header["dim"][0]) + 1])
        try:
            self.dtype = self.header.get_data_dtype()
            self.slope, self.intercept = self.header.get_slope_inter()
        except nibabel.spatialimages.HeaderDataError as error:
            raise InvalidVolumeError(f"{name} has an invalid header: {error}. Export the scan again.") from error
        _check_shape_and_dtype(self.shape, self.dtype, name)
        spacing = self.header["pixdim"][1:4]
        if not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise InvalidVolumeError(
                f"{name} has an invalid voxel size in its header, {spacing.tolist()} mm: expected three positive "
                "lengths. Export the scan again, or correct `pixdim`."
            )
        self.offset = self._checked_offset()

    def __getitem__(self, index: tuple) -> np.ndarray:
        scaling = (1.0, 0.0) if self.slope is None else (self.slope, self.intercept)
        with self._open() as stream:
            proxy = nibabel.arrayproxy.ArrayProxy(stream, (self.shape, self.dtype, self.offset, *scaling))
            array = proxy[index]
            if self.is_compressed and array.size == math.prod(self.shape):
                while stream.read(2**20):  # to the end, where the checksum is
                    pass
        return array

    def _open(self) -> IO[bytes]:
        file = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb")
        # Told by the content: files compressed by hand often keep the wrong ending.
        return _GzipStream(file) if self.is_compressed else file  # type: ignore[return-value]

    def _checked_offset(self) -> int:
        """Where the voxels start, once the file has been found large enough to hold them."""
        offset = float(self.header["vox_offset"])
        minimum = self.header.single_vox_offset
        if offset == 0:  # means "right after the header"
            offset = minimum
        if not minimum <= offset < 2**62:  # not for NaN either
            raise InvalidVolumeError(
                f"{self.name} has an invalid header: its voxels start at byte {offset:g}, expected {minimum} or more. "
                "Export the scan again."
            )
        claimed = int(offset) + math.prod(self.shape) * self.dtype.itemsize
        size = len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size
        if claimed > size * (MAX_GZIP_RATIO if self.is_compressed else 1):
            raise InvalidVolumeError(
                f"{self.name} is truncated or damaged: its header claims {self.shape} voxels, {claimed} bytes, more "
                f"than a file of {size} bytes can hold. Copy or download it again."
            )
        return int(offset)


class _GzipStream(gzip.GzipFile):
    """A gzip stream that closes the file below it, too."""

    def __init__(self, file: IO[bytes]):
        super().__init__(fileobj=file)
        self._file = file

    def close(self) -> None:
        super().close()
        self._file.close()


def _read_header(raw: bytes, name: str) -> Any:
    """The NIfTI-1 or NIfTI-2 header in the first bytes of a file, unrepaired."""
    sizes = {int.from_bytes(raw[:4], order): code for order, code in (("little", "<"), ("big", ">"))}
    size = 348 if 348 in sizes else 540
    if size not in sizes:
        raise InvalidVolumeError(
            f"{name} is not a NIfTI file. Expected a .nii or .nii.gz file with one volume; convert a DICOM series with "
            "dcm2niix, and other formats with the software that wrote them."
        )
    if len(raw) < size:
        raise InvalidVolumeError(f"{name} is truncated or damaged: it ends in the header. Copy or download it again.")
    header_class = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    header = header_class(raw[:size], endianness=sizes[size], check=False)
    magic = header["magic"].item()
    if not magic.startswith(b"n+"):
        kind = "the header of a .hdr and .img pair" if magic.startswith(b"ni") else "an Analyze file or damaged"
        raise InvalidVolumeError(
            f"{name} is not a single-file NIfTI: it is {kind}. Save it as one .nii or .nii.gz file, e.g. with nibabel."
        )
    if not 1 <= header["dim"][0] <= 7:
        raise InvalidVolumeError(
            f"{name} is truncated or damaged: its header claims {header['dim'][0]} axes. Copy or download it again."
        )
    return header


def _existing_file(source: str | Path) -> Path:
    text = str(source)
    shown = text if len(text) <= 300 else f"{text[:300]}..."
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InvalidVolumeError(
            f"{shown} is an address, and this processor never opens a network: download the file first, then pass its "
            "path or its bytes."
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise InvalidVolumeError(
            f"{shown} is a folder. Expected one NIfTI file for each volume; convert a DICOM series with dcm2niix."
        )
    try:
        path.stat()
    except PermissionError as error:
        raise InvalidVolumeError(f"{shown} could not be read: {error.strerror}.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in it
        raise FileNotFoundError(
            f"There is no file {shown!r}. Check the path; a relative one starts at {Path.cwd()}."
        ) from error
    return path


def _check_shape_and_dtype(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    if len(shape) < 3:
        raise InvalidVolumeError(f"Expected a volume of three axes, got {name} of shape {shape}, a single image.")
    if min(shape) <= 0:
        raise InvalidVolumeError(f"{name} has no voxels: its shape is {shape}. Export or load the scan again.")
    if math.prod(shape[:3]) > MAX_VOXELS:
        raise InvalidVolumeError(
            f"{name} claims {shape[:3]} voxels, more than the {MAX_VOXELS} one volume may have: its header is damaged, "
            "or the scan must be resampled first."
        )
    if dtype.fields is not None:
        raise InvalidVolumeError(f"{name} holds colours ({dtype}), expected one real number for each voxel.")
    if dtype.kind == "c":
        raise InvalidVolumeError(
            f"{name} holds complex numbers ({dtype}), expected real ones: save the magnitude, e.g. `np.abs(volume)`."
        )
    if dtype.kind not in "biuf":
        raise InvalidVolumeError(f"{name} holds {dtype} values, expected integers or floating-point numbers.")


def _check_affine(affine: np.ndarray, name: str) -> None:
    if not np.isfinite(affine).all():
        raise InvalidVolumeError(f"{name} has NaN or infinite numbers in its affine. Export the scan again.")
    volume_ratio = abs(np.linalg.det(affine[:3, :3])) / max(math.prod(spacing_of(affine)), 1e-30)
    if volume_ratio < 1e-6:
        raise InvalidVolumeError(
            f"{name} has a singular affine: two of its axes are parallel, or one has no length. Export the scan again."
        )


@contextmanager
def _errors_naming(name: str) -> Iterator[None]:
    """Turns whatever reading may raise into an error that names the file and says what to do."""
    try:
        yield
    except InvalidVolumeError:
        raise
    except (EOFError, OSError, ValueError, zlib.error) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise InvalidVolumeError(f"{name} could not be read: {error.strerror}.") from error
        raise InvalidVolumeError(f"{name} is truncated or damaged ({error}): copy or download it again.") from error


def _lengths(values: Any) -> str:
    return " x ".join(f"{float(value):.4g}" for value in values)


__all__ = ["MAX_VOXELS", "InvalidVolumeError", "Volume", "open_volume", "orient", "spacing_of"]
