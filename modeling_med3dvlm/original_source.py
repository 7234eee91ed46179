"""Files of weights that the original implementation or the Hub wrote: what is in them, and their tensors one by one."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME


# Files that the original writes beside or instead of a Hugging Face folder.
PRETRAINED_VIT = "pretrained_ViT.bin"
LONE_FILES = (PRETRAINED_VIT, "mm_projector.bin", "model_with_lora.bin")
LORA_PREFIX = "base_model.model."
# Bytes read from a mapped file before it is mapped anew: pages that were read count as memory of the process.
MAPPED_BYTES = 64 * 2**20
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """
    A tensor in a file, which nobody has read yet.

    Args:
        file (`Path`):
            The file.
        keys (`tuple[str, ...]`):
            Its name there; with an adapter on it those of the base weight, of `lora_A` and of `lora_B`.
        shape (`tuple[int, ...]`), dtype (`torch.dtype`):
            What is read.
    """

    file: Path
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Source:
    """
    What the user gave.

    Args:
        path (`Path`):
            File or folder.
        files (`list[Path]`):
            Files of weights.
        tensors (`dict[str, StoredTensor]`):
            By the original's name, without the wrappers of peft.
        config (`dict`):
            The `config.json` beside the weights; empty where there is none.
        has_adapters (`bool`):
            Whether it is a LoRA run.
    """

    path: Path
    files: list[Path]
    tensors: dict[str, StoredTensor]
    config: dict[str, Any]
    has_adapters: bool = False

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def shape(self, name: str) -> tuple[int, ...]:
        """
        Raises:
            ValueError: there is no such tensor, so that the sizes of the model are not known.
        """
        if name not in self.tensors:
            raise ValueError(f"{self.path}: expected a tensor {name!r}, from which sizes follow; there is none.")
        return self.tensors[name].shape

    def count(self, template: str) -> int:
        """Number of `N` = 0, 1, ... for which there is a tensor that begins with `template.format(N)`."""
        number = 0
        while any(name.startswith(template.format(number)) for name in self.tensors):
            number += 1
        return number


def open_source(path: Path) -> Source:
    """
    Finds the files of weights and what is in them, without reading a weight.

    Raises:
        FileNotFoundError: there is no such file or folder, no weights in it, or a shard is missing.
        ValueError: a file cannot be read, or two hold the same tensor.
    """
    path = path.expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = find_weights(path)
    else:
        raise FileNotFoundError(
            f"{path}: no such file or folder. Give a file or folder with weights of the original; a repository on the Hub "
            "has to be downloaded first."
        )
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in list_tensors(file).items():
            if name in tensors:
                raise ValueError(
                    f"{path}: {name!r} is in {tensors[name].file.name} and in {file.name}: remove one of them."
                )
            tensors[name] = tensor
    check_index(path, tensors)
    folder = path if path.is_dir() else path.parent
    has_config = (folder / CONFIG_NAME).is_file()
    config = read_json(folder / CONFIG_NAME) if has_config else {}
    source = Source(path, files, tensors, config)
    if any(name.startswith(LORA_PREFIX) for name in tensors):
        source.tensors, source.has_adapters = unwrap_adapters(tensors, path), True
    return source


def find_weights(folder: Path) -> list[Path]:
    """
    The files of weights of a folder: those of a Hugging Face folder, or the one file that the original's training wrote.

    Raises:
        FileNotFoundError: there are none, or a shard that the index names is missing.
        ValueError: there are several of the original's own.
    """
    for single in (SAFE_WEIGHTS_NAME, "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise FileNotFoundError(f"{folder}: {index.name} names {', '.join(missing)}, which are missing.")
            return files
        if (folder / single).is_file():
            return [folder / single]
    files = [folder / name for name in LONE_FILES if (folder / name).is_file()]
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{folder}: it has {names}. Name the one to convert.")
    if not files:
        raise FileNotFoundError(
            f"{folder}: no weights in it. Expected {SAFE_WEIGHTS_NAME}, its index and shards, pytorch_model.bin, or one of "
            f"{', '.join(LONE_FILES)}."
        )
    return files


def check_index(path: Path, tensors: Mapping[str, StoredTensor]) -> None:
    """
    Raises:
        ValueError: the index of a sharded folder and its files do not hold the same tensors.
    """
    for single in (SAFE_WEIGHTS_NAME, "pytorch_model.bin"):
        index = path / f"{single}.index.json"
        if path.is_dir() and index.is_file():
            weight_map = read_json(index)["weight_map"]
            faults = [
                f"{len(names)} {kind}: {few(names)}"
                for kind, names in {
                    "in the index but not in the files": sorted(set(weight_map) - set(tensors)),
                    "in the files but not in the index": sorted(set(tensors) - set(weight_map)),
                }.items()
                if names
            ]
            if faults:
                raise ValueError(f"{path}: {index.name} does not fit its files. {'; '.join(faults)}.")
            return


def list_tensors(file: Path) -> dict[str, StoredTensor]:
    """
    The tensors of a file; no weight is read.

    Raises:
        ValueError: it is neither a safetensors file nor one that `torch.save` wrote, or it holds something else.
    """
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as opened:
                slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
                return {
                    name: StoredTensor(file, (name,), tuple(part.get_shape()), DTYPES[part.get_dtype()])
                    for name, part in slices.items()
                }
        except (SafetensorError, KeyError) as error:
            raise ValueError(f"{file}: not a complete safetensors file of common numbers ({error}).") from error
    return {
        name: StoredTensor(file, (name,), tuple(tensor.shape), tensor.dtype) for name, tensor in load_bin(file).items()
    }


def load_bin(file: Path) -> dict[str, torch.Tensor]:
    """
    A file of `torch.save`, mapped into memory and read without running any code in it.

    Raises:
        ValueError: it is none, or holds something else than named tensors.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises whatever its readers meet
        raise ValueError(
            f"{file}: expected weights that `torch.save` wrote, which can be read without running code. "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
        ) from error
    if not isinstance(state, Mapping) or not state:
        raise ValueError(f"{file}: expected a state dict of named tensors, got {type(state).__name__}.")
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        raise ValueError(
            f"{file}: expected a state dict of tensors, {len(others)} of its {len(state)} entries are none: {few(others)}."
        )
    return dict(state)


def unwrap_adapters(tensors: Mapping[str, StoredTensor], path: Path) -> dict[str, StoredTensor]:
    """
    The tensors of a LoRA run under the names that they have once its adapters are merged.

    Raises:
        ValueError: an adapter lacks a part.
    """
    merged: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        if ".lora_A." in name or ".lora_B." in name:
            continue
        plain = name.removeprefix(LORA_PREFIX).replace(".base_layer.", ".")
        module, _, parameter = name.rpartition(".base_layer.")
        if module and parameter == "weight":
            parts = (name, f"{module}.lora_A.default.weight", f"{module}.lora_B.default.weight")
            missing = [part for part in parts if part not in tensors]
            if missing:
                raise ValueError(f"{path}: the adapter of {plain!r} lacks {few(missing)}.")
            down, up = (tensors[part].shape for part in parts[1:])
            if (up[0], down[1]) != tensor.shape or up[1] != down[0]:
                raise ValueError(
                    f"{path}: the adapter of {plain!r} has shapes {down} and {up}, which do not fit its weight {tensor.shape}."
                )
            tensor = StoredTensor(tensor.file, parts, tensor.shape, tensor.dtype)
        merged[plain] = tensor
    used = {key for tensor in merged.values() for key in tensor.keys}
    if left := sorted(set(tensors) - used):
        raise ValueError(f"{path}: {len(left)} tensors of adapters belong to no base weight: {few(left)}.")
    return merged


class Reader:
    """Reads tensors of files that are mapped into memory, and lets go of the mapping before it grows."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._read: Callable[[str], torch.Tensor] | None = None
        self._close: Callable[[], Any] = lambda: None
        self._num_bytes = 0

    def __call__(self, file: Path, key: str) -> torch.Tensor:
        """A tensor of a file, in memory of its own."""
        if self._read is None or file != self._file or self._num_bytes > MAPPED_BYTES:
            self.close()
            if file.suffix == ".safetensors":
                opened = safe_open(file, framework="pt").__enter__()
                self._read, self._close = opened.get_tensor, lambda: opened.__exit__(None, None, None)
            else:
                self._read, self._close = load_bin(file).__getitem__, lambda: None
            self._file, self._num_bytes = file, 0
        tensor = self._read(key).clone()
        self._num_bytes += tensor.numel() * tensor.element_size()
        return tensor

    def close(self) -> None:
        """Lets go of the file."""
        self._read = None
        self._close()
        self._close = lambda: None


def read_tensor(reader: Reader, tensor: StoredTensor, lora_alpha: float | None) -> torch.Tensor:
    """A tensor, its adapter added: W + alpha / r * B A, computed in single precision at least, rounded once."""
    weight = reader(tensor.file, tensor.keys[0])
    if len(tensor.keys) == 1:
        return weight
    assert lora_alpha is not None
    down, up = (reader(tensor.file, key) for key in tensor.keys[1:])
    precision = torch.promote_types(weight.dtype, torch.float32)
    delta = up.to(precision) @ down.to(precision) * (lora_alpha / down.shape[0])
    return delta.add_(weight).to(weight.dtype)


def few(names: Iterable[str], most: int = 5) -> str:
    """The first names of many."""
    names = list(names)
    return ", ".join(names[:most]) + (f", and {len(names) - most} more" if len(names) > most else "")


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: it is no JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error}).") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}.")
    return content


__all__ = [
    "PRETRAINED_VIT",
    "Reader",
    "Source",
    "StoredTensor",
    "few",
    "list_tensors",
    "open_source",
    "read_json",
    "read_tensor",
]
