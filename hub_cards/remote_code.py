"""
The code that travels with a saved model: our modules, flattened into the model's folder.

Hub code lies in three folders here and in one folder on the Hub, where transformers follows nothing but
`from .module import name`. Flattening rewrites `from ..folder.module import name` to that, and refuses what would only
fail on someone else's machine.
"""

import ast
import functools
import importlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, PROCESSOR_NAME

from .files import write_atomically
from .places import is_repository


PACKAGE = __name__.partition(".")[0]
HUB_FOLDERS = ("configuration", "modeling_med3dvlm", "processing")
# Package code that lies in a hub folder.
NEVER_SHIPPED = frozenset({"__init__", "convert_original", "original_layout", "original_plan", "original_source"})
# What transformers takes for a relative import: it reads lines, not Python, so docstrings count.
LINE_LIKE_RELATIVE_IMPORT = re.compile(r"^\s*(?:import\s+\.\S+\s*$|from\s+\.\S+\s+import)", re.MULTILINE)
# Written by loading a tokenizer, not by its author; the second and the third name the machine.
LEAKED_TOKENIZER_KEYS = ("is_local", "name_or_path", "cache_dir", "local_files_only", "trust_remote_code", "token")
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
# Begins every module that is written: beside weights of another licence, ours stays with the code.
LICENSE_HEADER = "# SPDX-License-Identifier: Apache-2.0\n# SPDX-FileCopyrightText: The Med3DVLM contributors\n"


class RemoteCodeError(ValueError):
    """A module cannot be shipped; the message names file and line."""


@dataclass(frozen=True)
class HubModule:
    """
    One module of Hub code.

    Args:
        name (`str`):
            Name without folder, unique among all Hub code.
        folder (`str`):
            The folder it lies in.
        path (`Path`):
            Its source file.
    """

    name: str
    folder: str
    path: Path


def find_hub_modules(folders: Iterable[Path]) -> dict[str, HubModule]:
    """
    All modules that may be shipped, by name.

    Args:
        folders (`Iterable[Path]`):
            The folders of Hub code.

    Raises:
        RemoteCodeError: two modules have one name, and would overwrite each other.
    """
    modules: dict[str, HubModule] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.py")):
            if path.stem in NEVER_SHIPPED:
                continue
            if path.stem in modules:
                raise RemoteCodeError(
                    f"{path} and {modules[path.stem].path} have one name, but all Hub code lands in one folder: rename "
                    "one of them."
                )
            modules[path.stem] = HubModule(path.stem, folder.name, path)
    return modules


@functools.cache
def hub_modules() -> dict[str, HubModule]:
    """All modules of this package that may be shipped, by name; from a checkout as from an installed wheel."""
    packages = [importlib.import_module(f"{PACKAGE}.{folder}") for folder in HUB_FOLDERS]
    return find_hub_modules(Path(package.__path__[0]) for package in packages)


def flatten(entries: Iterable[str], modules: Mapping[str, HubModule] | None = None) -> dict[str, str]:
    """
    Flattens modules and all they import.

    Args:
        entries (`Iterable[str]`):
            Names of the modules that `auto_map` and `custom_pipelines` name.
        modules (`Mapping[str, HubModule]`, *optional*):
            The modules that may be shipped; those of this package by default.

    Returns:
        `dict[str, str]`: source by file name, the entries and all they import relatively, those for type checkers
        included.

    Raises:
        RemoteCodeError: a module is not among `modules`, or has an import that has no meaning on the Hub.
    """
    modules = hub_modules() if modules is None else modules
    sources: dict[str, str] = {}
    names = list(entries)
    while names:
        name = names.pop()
        if f"{name}.py" in sources:
            continue
        if name not in modules:
            raise RemoteCodeError(f"Expected a module of Hub code, one of {sorted(modules)}, got {name!r}.")
        sources[f"{name}.py"], imported = flatten_module(modules[name], modules)
        names += imported
    return dict(sorted(sources.items()))


def flatten_module(module: HubModule, modules: Mapping[str, HubModule]) -> tuple[str, list[str]]:
    """
    Rewrites the relative imports of one module for a single folder; all else stays as it is.

    Args:
        module ([`HubModule`]):
            The module.
        modules (`Mapping[str, HubModule]`):
            The modules it may import.

    Returns:
        The new source, and the names of the modules it imports.

    Raises:
        RemoteCodeError: an import has no meaning on the Hub.
    """
    source = module.path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    imported, import_lines = [], set()

    def refuse(line: int, what: str, remedy: str) -> RemoteCodeError:
        return RemoteCodeError(f"{module.path}:{line}: {what} cannot be shipped to the Hub: {remedy}.")

    for node in ast.walk(ast.parse(source, filename=str(module.path))):
        if isinstance(node, ast.Import):
            absolute = next((alias.name for alias in node.names if alias.name.partition(".")[0] == PACKAGE), None)
            if absolute is not None:
                raise refuse(node.lineno, f"`import {absolute}`", "the package is not there; import relatively")
        if not isinstance(node, ast.ImportFrom):
            continue
        statement = f"from {'.' * node.level}{node.module or ''} import"
        if node.level == 0:
            if str(node.module).partition(".")[0] == PACKAGE:
                raise refuse(node.lineno, f"`{statement}`", "the package is not there; import relatively")
            continue
        *folder, name = (node.module or "").split(".")
        # `.module` is a sibling, `..folder.module` lies in another folder of Hub code.
        if not name or len(folder) != node.level - 1 or node.level > 2:
            raise refuse(node.lineno, f"`{statement}`", "write `from .module` or `from ..folder.module`")
        if name not in modules or modules[name].folder != (folder[0] if folder else module.folder):
            raise refuse(node.lineno, f"`{statement}`", f"the target is not Hub code, which is {sorted(modules)}")
        line = lines[node.lineno - 1]
        if not line[node.col_offset :].startswith(statement):
            raise refuse(node.lineno, f"`{line.strip()}`", f"write it on one line as `{statement}`")
        lines[node.lineno - 1] = line.replace(statement, f"from .{name} import", 1)
        imported.append(name)
        import_lines.add(node.lineno)

    flat = "".join(lines)
    for match in LINE_LIKE_RELATIVE_IMPORT.finditer(flat):
        line_number = flat.count("\n", 0, match.end()) + 1
        if line_number not in import_lines:
            raise refuse(
                line_number,
                f"`{lines[line_number - 1].strip()}`",
                "it is no import, but transformers would follow it as one; rephrase the text",
            )
    return flat, imported


def entry_modules(saved: Any) -> list[str]:
    """
    The modules that a configuration's or processor's `auto_map` and `custom_pipelines` name and that are ours.

    Args:
        saved (`PreTrainedConfig`, `ProcessorMixin` or `ImageProcessingMixin`):
            What is saved. References to another repository (`"org/name--module.Class"`) count by their module.

    Returns:
        `list[str]`: names of modules, without repetition. Modules that are not ours, a user's own, are left out: who
        wrote them ships them.
    """
    pipelines = (getattr(saved, "custom_pipelines", None) or {}).values()
    references = [*(getattr(saved, "auto_map", None) or {}).values(), *(pipeline["impl"] for pipeline in pipelines)]
    names = (reference.rpartition("--")[2].partition(".")[0] for reference in references)
    return [name for name in dict.fromkeys(names) if name in hub_modules()]


def write_code(folder: str | os.PathLike, entries: Iterable[str]) -> list[Path]:
    """
    Writes flattened modules and all they import, each below the licence of the code; each file appears whole or not at all.

    Args:
        folder (`str` or `os.PathLike`):
            An existing folder.
        entries (`Iterable[str]`):
            Names of modules, see [`entry_modules`].

    Returns:
        `list[Path]`: the files.
    """
    paths = []
    for file_name, source in _flatten_once(tuple(entries)).items():
        paths.append(Path(folder) / file_name)
        write_atomically((LICENSE_HEADER + source).encode(), paths[-1])
    return paths


@functools.cache
def _flatten_once(entries: tuple[str, ...]) -> dict[str, str]:
    return flatten(entries)


def scrub_tokenizer_config(folder: str | os.PathLike) -> None:
    """
    Removes from a folder's `tokenizer_config.json`, if there is one, what only says where the tokenizer was loaded
    from. Without it, saving what was loaded gives the same file again.
    """
    path = Path(folder) / TOKENIZER_CONFIG_NAME
    if not path.is_file():
        return
    config = json.loads(path.read_text(encoding="utf-8"))
    if any(key in config for key in LEAKED_TOKENIZER_KEYS):
        kept = {key: value for key, value in config.items() if key not in LEAKED_TOKENIZER_KEYS}
        # The format in which transformers writes this file.
        text = json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        write_atomically(text.encode(), path)


def forget_local_folders(config: PreTrainedConfig) -> None:
    """
    Clears where a configuration and its parts were loaded from, unless it is a repository of the Hub: a path tells about
    the machine, and one such as `models/qwen` passes for a repository elsewhere.
    """
    if not is_repository(config.name_or_path or ""):
        config._name_or_path = ""
    for part in _parts(config):
        forget_local_folders(part)


def carry_code(saved_class: type) -> None:
    """
    Makes all that writes an object's `config.json`, `processor_config.json` or `preprocessor_config.json` write the
    code beside it: `save_pretrained` of models and processors, checkpoints of Trainer, `push_to_hub`. Subclasses
    inherit it; doing it again changes nothing.

    All ways of saving pass through `to_json_file`. The way that transformers offers, `register_for_auto_class`, copies
    single files and knows nothing of folders.

    Args:
        saved_class (`type`):
            A class of configurations, processors or image processors.
    """
    original: Any = saved_class.to_json_file  # type: ignore[attr-defined]
    if getattr(original, "carries_code", False):
        return

    @functools.wraps(original)
    def to_json_file(self: Any, json_file_path: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        path = Path(json_file_path)
        entries = entry_modules(self) if path.name in (CONFIG_NAME, PROCESSOR_NAME, IMAGE_PROCESSOR_NAME) else []
        if entries:
            _refer_to_own_folder(self)
            _settle_dtype(self)
            for part in _parts(self):
                forget_local_folders(part)
        original(self, json_file_path, *args, **kwargs)
        if entries:
            write_code(path.parent, entries)
        if path.name == PROCESSOR_NAME:
            scrub_tokenizer_config(path.parent)

    to_json_file.carries_code = True  # type: ignore[attr-defined]
    saved_class.to_json_file = to_json_file  # type: ignore[attr-defined]


def _refer_to_own_folder(saved: Any) -> None:
    """Turns references to our modules in another repository into those beside the file: the code lies there now."""

    def own(reference: str) -> str:
        local = reference.rpartition("--")[2]
        return local if local.partition(".")[0] in hub_modules() else reference

    if getattr(saved, "auto_map", None):
        saved.auto_map = {auto_class: own(reference) for auto_class, reference in saved.auto_map.items()}
    if getattr(saved, "custom_pipelines", None):
        saved.custom_pipelines = {
            task: {**pipeline, "impl": own(pipeline["impl"])} for task, pipeline in saved.custom_pipelines.items()
        }


def _settle_dtype(saved: Any) -> None:
    """Gives the parts of a composite configuration its dtype, as loading does: saving what was loaded changes nothing."""
    if isinstance(saved, PreTrainedConfig) and saved.dtype is not None:
        for part in _parts(saved):
            part.dtype = saved.dtype


def _parts(saved: Any) -> list[PreTrainedConfig]:
    """The configurations that a composite one holds."""
    return [part for part in vars(saved).values() if isinstance(part, PreTrainedConfig)]


__all__ = [
    "HUB_FOLDERS",
    "LICENSE_HEADER",
    "HubModule",
    "RemoteCodeError",
    "carry_code",
    "entry_modules",
    "find_hub_modules",
    "flatten",
    "flatten_module",
    "forget_local_folders",
    "hub_modules",
    "scrub_tokenizer_config",
    "write_code",
]
