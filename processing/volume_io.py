"""Reading and orienting 3D volumes: NIfTI files, nibabel images, arrays and tensors, without copies of the voxels."""

import base64
import gzip
import io
import math
import re
import stat
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from urllib.parse import unquote

import numpy as np
import torch
from transformers.utils import logging


try:
    import nibabel
except ImportError:
    nibabel = None  # type: ignore[assignment]
try:  # inflates several times faster than the standard library
    from isal import igzip as gzip_reader
    from isal.isal_zlib import error as InflateError
except ImportError:
    gzip_reader, InflateError = gzip, zlib.error  # type: ignore[misc]


logger = logging.get_logger(__name__)

# Most voxels one volume may have. A damaged header can claim anything, and memory is reserved before a byte is read.
MAX_VOXELS = 2**30
# Deflate, the algorithm in gzip, cannot shrink data further than 1032 : 1.
MAX_GZIP_RATIO = 1100

AXIS_OF_LETTER = {"L": 0, "R": 0, "P": 1, "A": 1, "I": 2, "S": 2}


class InvalidVolumeError(ValueError):
    """A volume that cannot be used. The message names it, what was expected of it, and what to do."""


@dataclass(frozen=True, eq=False)
class Volume:
    """
    Reference to one 3D volume, or to a series of them; [`read_voxels`] reads the voxels when they are needed.

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
        is_orientation_known (`bool`, *optional*, defaults to `False`):
            Whether the source says how its axes lie in the patient.
        conflict (`str`, *optional*):
            What a NIfTI header says in two different ways, and which of them is the affine.
    """

    name: str
    data: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    affine: np.ndarray | None = None
    is_orientation_known: bool = False
    conflict: str | None = None

    @property
    def axis_codes(self) -> str | None:
        """Directions in which the stored axes grow, such as `"RAS"`; oblique axes count as the closest ones."""
        return None if self.affine is None else "".join(nibabel.aff2axcodes(self.affine))


def open_volume(source: Any) -> Volume:
    """
    Checks a source and refers to it. The voxels of a file stay unread.

    Args:
        source (`str`, `Path`, `bytes`, nibabel image, `np.ndarray`, `torch.Tensor` or [`Volume`]):
            A NIfTI file (`.nii`, `.nii.gz`), its content, also in base64 as `data:...;base64,...`, an image, or a plain array
            of shape `(depth, height, width)` or `(1, depth, height, width)`.

    Returns:
        [`Volume`]. A [`Volume`] is returned as it is.

    Raises:
        FileNotFoundError: the path leads to no file.
        ImportError: a file is to be read and nibabel is not installed.
        InvalidVolumeError: the source is not a usable 3D volume.

    Example:

    ```python
    >>> volume = open_volume(np.zeros((1, 16, 32, 48)))
    >>> volume.name, volume.shape
    ('array of shape (1, 16, 32, 48)', (16, 32, 48))
    ```"""
    if isinstance(source, Volume):
        return source
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _open_file(_decode_data_uri(source))
    if isinstance(source, (str, Path)):
        return _open_file(_existing_file(source))
    if isinstance(source, (bytes, bytearray)):
        return _open_file(bytes(source))
    if isinstance(source, torch.Tensor):
        if source.layout != torch.strided:
            raise InvalidVolumeError(
                f"tensor of shape {tuple(source.shape)}: expected a dense tensor, got a sparse one: call `.to_dense()` first."
            )
        if getattr(source, "affine", None) is not None:  # a plain tensor has none
            raise InvalidVolumeError(
                f"{type(source).__name__} of shape {tuple(source.shape)}: expected a plain tensor in the order (depth, height, "
                "width), got one with an affine, which would be ignored. Pass the file, or "
                "`nibabel.Nifti1Image(tensor[0].numpy(), tensor.affine.numpy())`; or `tensor.as_tensor()`, if its axes are in "
                "that order."
            )
        # Of the floating-point types shorter than float32, NumPy knows but one.
        tensor = source.float() if source.is_floating_point() and source.itemsize < 4 else source
        return _open_array(tensor.numpy(force=True), f"tensor of shape {tuple(source.shape)}")
    if isinstance(source, np.ndarray):
        if np.ma.is_masked(source):
            raise InvalidVolumeError(
                f"array of shape {source.shape}: {np.ma.count_masked(source)} of its voxels are masked, and have no value: "
                "give them one, e.g. call `.filled(-1000)` first for CT in HU."
            )
        return _open_array(source, f"array of shape {source.shape}")
    if nibabel is not None and isinstance(source, nibabel.spatialimages.SpatialImage):
        return _open_image(source)
    raise InvalidVolumeError(
        "Expected a volume as the path of a NIfTI file, the bytes of one, a nibabel image, a NumPy array or a torch "
        f"tensor, got {type(source).__name__}."
    )


def flatten_volumes(sources: Any) -> list[Volume]:
    """
    Opens every volume in nested lists, in order.

    Args:
        sources (`Any`):
            What [`open_volume`] takes, or lists of it, nested or not. An array of shape
            `(batch_size, 1, depth, height, width)` counts as a list.

    Returns:
        `list[Volume]`.
    """
    is_batch = isinstance(sources, (np.ndarray, torch.Tensor)) and sources.ndim == 5
    if is_batch or isinstance(sources, (list, tuple)):
        return [volume for source in sources for volume in flatten_volumes(source)]
    return [open_volume(sources)]


def read_voxels(volume: Volume, volume_index: int | None = None) -> np.ndarray:
    """
    Reads the voxels of one volume, with the scale slope and intercept applied. Of a series, only the part wanted.

    Args:
        volume ([`Volume`]):
            As [`open_volume`] returned it.
        volume_index (`int`, *optional*):
            Which volume of a series, from 0. May be left out for a single volume.

    Returns:
        `np.ndarray` of three axes in stored order: real numbers of any type, possibly memory of the source.

    Raises:
        InvalidVolumeError: a series without `volume_index`, an index out of range, or damaged data.
    """
    with _errors_naming(volume.name):
        return np.asarray(volume.data[_index_of(volume, volume_index)])


def read_stored_voxels(volume: Volume, volume_index: int | None = None) -> tuple[np.ndarray, float, float]:
    """
    Reads the voxels of one volume as they are stored, which takes less memory than [`read_voxels`].

    Args:
        volume ([`Volume`]), volume_index (`int`, *optional*):
            As for [`read_voxels`].

    Returns:
        `np.ndarray` of three axes in stored order, and the scale slope (above 0) and intercept that are still to be
        applied, see [`scale_stored`].

    Raises:
        InvalidVolumeError: as [`read_voxels`].
    """
    if not isinstance(volume.data, _NiftiFile) or volume.data.slope is None or not volume.data.slope > 0:
        return read_voxels(volume, volume_index), 1.0, 0.0
    with _errors_naming(volume.name):
        return volume.data.read(_index_of(volume, volume_index), 1.0, 0.0), volume.data.slope, volume.data.intercept


def scale_stored(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Applies the scale slope and intercept to stored voxels as nibabel does: to the bit what [`read_voxels`] gives."""
    if (slope, intercept) == (1.0, 0.0):
        return stored
    return nibabel.volumeutils.apply_read_scaling(stored, np.float64(slope), np.float64(intercept))


def _index_of(volume: Volume, volume_index: int | None) -> tuple[Any, ...]:
    """What selects one volume of a series in its data, once it is known to exist."""
    count = math.prod(volume.shape[3:])
    if volume_index is None and count > 1:
        raise InvalidVolumeError(
            f"{volume.name}: a series of {count} volumes, of shape {volume.shape}. Pick one with `volume_index`, from 0 "
            f"to {count - 1}, or save it as a file of its own where a list of scans is read."
        )
    if volume_index is not None and not 0 <= volume_index < count:
        raise InvalidVolumeError(
            f"{volume.name}: `volume_index` {volume_index} is not in this file, which has {count} "
            f"{'volume' if count == 1 else 'volumes'}, counted from 0."
        )
    # In a file, the first axis of a series is the fastest.
    index = np.unravel_index(volume_index or 0, volume.shape[3:], order="F") if volume.shape[3:] else ()
    return (slice(None),) * 3 + tuple(map(int, index))


def check_orientation(orientation: Any) -> None:
    """
    Raises:
        ValueError: `orientation` is neither a code such as `"LPS"` nor `"none"`.
    """
    if orientation == "none":
        return
    letters = list(orientation) if isinstance(orientation, str) else []
    if len(letters) != 3 or {AXIS_OF_LETTER.get(letter) for letter in letters} != {0, 1, 2}:
        raise ValueError(
            "`orientation` must have one letter each of L/R, P/A and I/S, the directions in which (width, height, "
            f'depth) grow, such as "LPS", or be "none" for the stored axes; got {orientation!r}.'
        )


def orient(array: np.ndarray, affine: np.ndarray | None, orientation: str) -> tuple[np.ndarray, np.ndarray | None]:
    """
    Brings a volume to `(depth, height, width)` by swapping and flipping axes. Nothing is interpolated or copied.

    Args:
        array (`np.ndarray` of three axes):
            In stored order: `(i, j, k)` with an affine, `(depth, height, width)` without.
        affine (`np.ndarray` of shape `(4, 4)`, *optional*):
            Maps `(i, j, k, 1)` to RAS+ mm. Without it, the array is returned as it is.
        orientation (`str`):
            Directions in which `(width, height, depth)` are to grow: with `"LPS"` to the patient's left, to posterior
            and to superior. Oblique axes count as the closest ones. `"none"` keeps the stored directions: the first
            axis becomes the width, the last the depth.

    Returns:
        The array as a view of shape `(depth, height, width)`, and the affine that maps its index `(d, h, w, 1)` to
        RAS+ mm.
    """
    if affine is None:
        return array, None
    if orientation != "none":
        transform = nibabel.orientations.ornt_transform(
            nibabel.orientations.io_orientation(affine), nibabel.orientations.axcodes2ornt(tuple(orientation))
        )
        affine = affine @ nibabel.orientations.inv_ornt_aff(transform, array.shape)
        array = nibabel.orientations.apply_orientation(array, transform)
    return array.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]]  # (W, H, D) -> (D, H, W)


def spacing_of(affine: np.ndarray | None) -> tuple[float, ...] | None:
    """Distances in mm between neighbouring voxels, along the three axes that the affine maps; `None` without one."""
    return None if affine is None else tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist())


def _open_array(array: np.ndarray, name: str) -> Volume:
    if array.ndim == 4:
        if len(array) != 1:
            remedy = (
                "the channels seem to stand last: pick one channel, `volume[..., 0]`."
                if array.shape[-1] in (1, 3, 4)
                else "pick one channel or one volume of the series, along the axis where they stand; or pass the file or the "
                "nibabel image with `volume_index`, which also knows how the patient lies."
            )
            raise InvalidVolumeError(
                f"{name}: expected one channel, (1, depth, height, width), got four axes of {array.shape}: {remedy} Several "
                "volumes are passed as a list."
            )
        array = array[0]  # (1, D, H, W) -> (D, H, W)
    if array.ndim != 3:
        raise InvalidVolumeError(
            f"{name}: expected a volume of shape (depth, height, width), got {array.shape}. Stack slices first, e.g. "
            "`np.stack(slices)`; several volumes are passed as a list."
        )
    _check_shape_and_dtype(array.shape, array.dtype, name)
    return Volume(name, array, array.shape, array.dtype)


def _open_image(image: Any) -> Volume:
    name = image.get_filename() or f"nibabel image of shape {image.shape}"
    dtype = np.dtype(getattr(image.dataobj, "dtype", None) or image.get_data_dtype())
    _check_shape_and_dtype(image.shape, dtype, name)
    if isinstance(image, nibabel.Minc1Image) and len(image.shape) > 3:  # the one format whose first axis is the time
        raise InvalidVolumeError(f"{name}: a MINC series, of shape {image.shape}; save one volume as NIfTI.")
    if isinstance(image, nibabel.Nifti1Pair):
        is_known = any(int(image.header[code]) for code in ("qform_code", "sform_code"))
    else:
        is_known = not isinstance(image, nibabel.AnalyzeImage)  # the one format that has no place for it
    conflict = None
    affine = image.header.get_best_affine() if image.affine is None else np.asarray(image.affine, dtype=np.float64)
    if isinstance(image, nibabel.Nifti1Pair):
        affine = np.diag([_millimetres(image.header)] * 3 + [1.0]) @ affine
        conflict = _conflict_of(image.header)
    return _volume_with_affine(name, image.dataobj, image.shape, dtype, affine, is_known, conflict)


def _open_file(content: Path | bytes) -> Volume:
    name = str(content) if isinstance(content, Path) else f"NIfTI file of {len(content)} bytes in memory"
    if nibabel is None:
        raise ImportError(f"{name}: reading NIfTI files needs nibabel. Install it: pip install nibabel")
    with _errors_naming(name):
        file = _NiftiFile(content, name)
    header = file.header
    if header["pixdim"][0] not in (-1, 1):
        header["pixdim"][0] = 1  # the sign of the third axis; the standard reads any other value as 1
    try:
        with np.errstate(all="ignore"):
            affine = header.get_best_affine()
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        raise InvalidVolumeError(
            f"{name}: the orientation in its header is invalid ({error}). Export it again."
        ) from error
    is_known = bool(header["qform_code"] or header["sform_code"])
    affine = np.diag([_millimetres(header)] * 3 + [1.0]) @ affine
    return _volume_with_affine(name, file, file.shape, file.dtype, affine, is_known, _conflict_of(header))


def _conflict_of(header: Any) -> str | None:
    """How the two affines of a NIfTI header differ in the directions of the axes or, by more than 1 %, in the voxel size."""
    if not (header["sform_code"] > 0 and header["qform_code"] > 0):
        return None
    codes = f"sform_code {int(header['sform_code'])}, qform_code {int(header['qform_code'])}"
    axes, spacings = [], []
    try:
        with np.errstate(all="ignore"):
            for affine in (header.get_sform(), header.get_qform()):
                axes.append("".join(map(str, nibabel.aff2axcodes(affine))))
                spacings.append(np.linalg.norm(affine[:3, :3], axis=0) * _millimetres(header))
    except (nibabel.spatialimages.HeaderDataError, ValueError) as error:
        return f"the qform cannot be read ({error}), and the sform was used ({codes})"
    if axes[0] == axes[1] and np.allclose(*spacings, rtol=0.01, atol=0):
        return None
    sform, qform = (
        f"axes {letters} of {' x '.join(f'{step:.4g}' for step in spacing)} mm"
        for letters, spacing in zip(axes, spacings)
    )
    return f"the sform says {sform}, the qform {qform}, and the sform was used ({codes})"


def _millimetres(header: Any) -> float:
    """Millimetres in the unit of length that a NIfTI header names (`xyzt_units`, bits 0 to 2); mm if it names none."""
    return {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)  # 1 is the metre, 3 the micrometre


def _volume_with_affine(
    name: str,
    data: Any,
    shape: tuple[int, ...],
    dtype: np.dtype,
    affine: np.ndarray,
    is_known: bool,
    conflict: str | None,
) -> Volume:
    if not np.isfinite(affine).all():
        raise InvalidVolumeError(
            f"{name}: expected an affine of finite numbers, got NaN or infinity. Export it again."
        )
    with np.errstate(all="ignore"):
        matrix = affine[:3, :3]
        box = np.prod(np.linalg.norm(matrix, axis=0))  # what axes at right angles would span
        is_singular = not abs(np.linalg.det(matrix)) > 1e-6 * box
        # An axis may also be lost to rounding next to a far longer one; nibabel then finds no direction for it.
        is_singular = is_singular or bool(np.isnan(nibabel.orientations.io_orientation(affine)).any())
    if is_singular:
        raise InvalidVolumeError(
            f"{name}: the affine is singular: two axes are parallel, or one has no length. Export it again."
        )
    if not is_known:
        logger.warning_once(
            "A volume does not say how the patient lies (qform_code and sform_code are 0); the convention of nibabel "
            "is assumed, and left and right may be swapped. The preprocessing report names the file."
        )
    return Volume(name, data, tuple(map(int, shape)), dtype, affine, is_known, conflict)


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
        if isinstance(content, Path) and self.is_compressed and content.suffix.lower() != ".gz":
            raise InvalidVolumeError(
                f"{name}: it is gzip-compressed, which its name denies, and other software would stumble over it. "
                "Rename it to end in .nii.gz."
            )
        with self._open() as stream:
            self.header = _read_header(stream.read(540), name)
        self.shape = tuple(int(length) for length in self.header["dim"][1 : int(self.header["dim"][0]) + 1])
        try:
            self.dtype = self.header.get_data_dtype()
            self.slope, self.intercept = self.header.get_slope_inter()
        except (nibabel.spatialimages.HeaderDataError, KeyError) as error:  # KeyError: a data type that does not exist
            raise InvalidVolumeError(
                f"{name}: its header is invalid, in the data type or the scaling ({error}). Export it again."
            ) from error
        _check_shape_and_dtype(self.shape, self.dtype, name)
        spacing = self.header["pixdim"][1:4]
        if not (np.isfinite(spacing).all() and (spacing > 0).all()):
            raise InvalidVolumeError(
                f"{name}: expected a positive voxel size in mm on each axis, the header has {spacing.tolist()}. Export "
                "it again, or correct `pixdim`."
            )
        self.offset, size = self._find_voxels()
        if self.is_compressed and isinstance(content, bytes):
            # In memory anyway, so unpacked once. Not before the size is known to be sane.
            with self._open(gzip_reader) as stream:
                self.content = stream.read(size)
                _read_to_the_checksum(stream)
            self.is_compressed = False

    def __getitem__(self, index: tuple) -> np.ndarray:
        return self.read(index, *((1.0, 0.0) if self.slope is None else (self.slope, self.intercept)))

    def read(self, index: tuple, *scaling: float) -> np.ndarray:
        """The voxels at an index, with this slope and intercept in place of the header's."""
        with self._open(gzip_reader) as stream:
            proxy = nibabel.arrayproxy.ArrayProxy(stream, (self.shape, self.dtype, self.offset, *scaling))
            array = proxy[index]
            if self.is_compressed and array.size == math.prod(self.shape):
                _read_to_the_checksum(stream)
        return array

    def _open(self, reader: Any = gzip) -> IO[bytes]:
        """The file, unpacked. The faster reader stumbles over a file cut off behind the part asked for: not for headers."""
        if isinstance(self.content, bytes):
            stream: Any = io.BytesIO(self.content)
            return reader.open(stream) if self.is_compressed else stream
        return reader.open(self.content) if self.is_compressed else self.content.open("rb")

    def _find_voxels(self) -> tuple[int, int]:
        """Bytes before the voxels and bytes in all, once the file has been found large enough to hold them."""
        offset = float(self.header["vox_offset"])
        minimum = self.header.single_vox_offset
        if offset == 0:  # means "right after the header"
            offset = minimum
        if not minimum <= offset < 2**62:  # not for NaN either
            raise InvalidVolumeError(
                f"{self.name}: its header is invalid: the voxels start at byte {offset:g}, expected {minimum} or more. "
                "Export it again."
            )
        claimed = int(offset) + math.prod(self.shape) * self.dtype.itemsize
        size = len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size
        if claimed > size * (MAX_GZIP_RATIO if self.is_compressed else 1):
            raise InvalidVolumeError(
                f"{self.name}: truncated or damaged: the header claims {self.shape} voxels, {claimed} bytes, and a file "
                f"of {size} bytes cannot hold them. Copy or download it again."
            )
        return int(offset), claimed


def _read_header(raw: bytes, name: str) -> Any:
    """The NIfTI-1 or NIfTI-2 header at the beginning of a file, unrepaired."""
    codes = {int.from_bytes(raw[:4], "little"): "<", int.from_bytes(raw[:4], "big"): ">"}
    size = 348 if 348 in codes else 540
    if size not in codes:
        raise InvalidVolumeError(
            f"{name}: not a NIfTI file. Expected a .nii or .nii.gz file with one volume; convert a DICOM series with "
            "dcm2niix, and other formats with the software that wrote them."
        )
    if len(raw) < size:
        raise InvalidVolumeError(
            f"{name}: truncated or damaged: it ends within the header. Copy or download it again."
        )
    header_class = nibabel.Nifti1Header if size == 348 else nibabel.Nifti2Header
    header = header_class(raw[:size], endianness=codes[size], check=False)
    magic = header["magic"].item()
    if not magic.startswith(b"n+"):
        kind = "a header whose voxels lie in a second file" if magic.startswith(b"ni") else "Analyze, or damaged"
        raise InvalidVolumeError(
            f"{name}: expected one file with header and voxels, got {kind}. Save it as .nii or .nii.gz, e.g. with "
            "nibabel."
        )
    if not 1 <= header["dim"][0] <= 7:
        raise InvalidVolumeError(
            f"{name}: truncated or damaged: the header claims {header['dim'][0]} axes. Copy or download it again."
        )
    return header


def _read_to_the_checksum(stream: IO[bytes]) -> None:
    """Reads a gzip stream to its end, where the checksum of what came before is compared."""
    while stream.read(2**20):
        pass


def _decode_data_uri(source: str) -> bytes:
    """
    The bytes of an address `data:...;base64,...`, as chats carry files (RFC 2397), also where it is percent-encoded or its lines
    are broken. What it holds is not shown: it may be a patient's.
    """
    kind, _, content = source.partition(",")
    try:
        if not kind.lower().endswith(";base64"):
            raise ValueError("there is no `;base64,`")
        return base64.b64decode("".join(unquote(content).split()), validate=True)
    except ValueError as error:
        raise InvalidVolumeError(
            f"data address of {len(source)} characters: expected `data:...;base64,` and the content of a NIfTI file in base64: "
            f"{error}. Encode it again, or pass the file's path or its bytes."
        ) from error


def _existing_file(source: str | Path) -> Path:
    text = str(source)
    shown = text if len(text) <= 300 else f"{text[:300]}..."
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):
        raise InvalidVolumeError(
            f"{shown}: expected a local file, got an address. Nothing is downloaded here: fetch it first, and pass its "
            "path or its bytes."
        )
    path = Path(source)
    try:
        mode = path.stat().st_mode
    except PermissionError as error:
        raise InvalidVolumeError(f"{shown}: it could not be read: {error.strerror}.") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in it
        raise FileNotFoundError(
            f"{shown}: there is no such file. Check the path; a relative one starts at {Path.cwd()}."
        ) from error
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "something that is not a file"
        if stat.S_ISDIR(mode) and any(entry.suffix.lower() in (".png", ".jpeg", ".jpg") for entry in path.iterdir()):
            raise InvalidVolumeError(
                f"{shown}: expected one NIfTI file for each volume, got a folder of pictures. Make a file of them with "
                "`med3dvlm prepare m3d-cap`, or stack them into an array (depth, height, width) and pass that."
            )
        raise InvalidVolumeError(
            f"{shown}: expected one NIfTI file for each volume, got {kind}. Convert a DICOM series with dcm2niix."
        )
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        raise InvalidVolumeError(
            f"{shown}: expected a NIfTI file, .nii or .nii.gz, got {path.suffix or 'a name without ending'}. Convert a "
            "DICOM series with dcm2niix, and other formats with the software that wrote them."
        )
    return path


def _check_shape_and_dtype(shape: tuple[int, ...], dtype: np.dtype, name: str) -> None:
    if len(shape) < 3:
        raise InvalidVolumeError(f"{name}: expected three axes, got {len(shape)}, of shape {shape}: a single image.")
    if min(shape) <= 0:
        raise InvalidVolumeError(f"{name}: the volume is empty: expected voxels on every axis, got {shape}.")
    if min(shape[:3]) == 1:
        raise InvalidVolumeError(f"{name}: expected a volume, got a single slice, of shape {shape[:3]}.")
    if math.prod(shape[:3]) > MAX_VOXELS:
        raise InvalidVolumeError(
            f"{name}: {shape[:3]} voxels are more than any scan has (at most {MAX_VOXELS}): the header is damaged, or the "
            "volume must be resampled first."
        )
    if dtype.fields is not None:
        raise InvalidVolumeError(f"{name}: it holds colours ({dtype}), expected one channel: save it as grey values.")
    if dtype.kind == "c":
        raise InvalidVolumeError(
            f"{name}: it holds complex numbers ({dtype}), expected real ones: save the magnitude, e.g. `np.abs(volume)`."
        )
    if dtype.kind not in "biuf":
        raise InvalidVolumeError(f"{name}: expected one real number a voxel, got {dtype}.")


@contextmanager
def _errors_naming(name: str) -> Iterator[None]:
    """Turns whatever reading may raise into an error that names the file and says what to do."""
    try:
        yield
    except InvalidVolumeError:
        raise
    except (EOFError, OSError, ValueError, zlib.error, InflateError) as error:
        raise InvalidVolumeError(f"{name}: truncated or damaged ({error}). Copy or download it again.") from error


__all__ = [
    "InvalidVolumeError",
    "Volume",
    "check_orientation",
    "flatten_volumes",
    "open_volume",
    "orient",
    "read_stored_voxels",
    "read_voxels",
    "scale_stored",
    "spacing_of",
]
