"""
Registers our classes with the Auto classes of transformers, and imports neither before someone else does.

`transformers.models.auto` costs seconds, because it imports torch, so `import med3dvlm` cannot register anything on the
spot. It installs a watcher of imports instead: as soon as a module of Auto classes has been imported, by whomever, our
classes are imported and registered with it.
"""

import importlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


PACKAGE = __name__.partition(".")[0]

# Where transformers keeps its Auto classes, in the order in which we register.
AUTO_MODULES: dict[str, tuple[str, ...]] = {
    "transformers.models.auto.configuration_auto": ("AutoConfig",),
    "transformers.models.auto.modeling_auto": (
        "AutoModel",
        "AutoBackbone",
        "AutoModelForImageTextToText",
        "AutoModelForMultimodalLM",
        "AutoModelForZeroShotImageClassification",
    ),
    "transformers.models.auto.image_processing_auto": ("AutoImageProcessor",),
    "transformers.models.auto.processing_auto": ("AutoProcessor",),
}

# What each Auto class gives for each of our configurations.
REGISTRATIONS: dict[str, dict[str, str]] = {
    "DCFormerConfig": {
        "AutoConfig": "DCFormerConfig",
        "AutoModel": "DCFormerModel",
        "AutoBackbone": "DCFormerBackbone",
        "AutoImageProcessor": "Med3DVLMImageProcessor",
    },
    "Vit3DConfig": {
        "AutoConfig": "Vit3DConfig",
        "AutoModel": "Vit3DModel",
        "AutoImageProcessor": "Med3DVLMImageProcessor",
    },
    "DCFormerSiglipConfig": {
        "AutoConfig": "DCFormerSiglipConfig",
        "AutoModel": "DCFormerSiglipModel",
        "AutoModelForZeroShotImageClassification": "DCFormerSiglipModel",
        "AutoImageProcessor": "Med3DVLMImageProcessor",
        "AutoProcessor": "Med3DVLMProcessor",
    },
    "Med3DVLMConfig": {
        "AutoConfig": "Med3DVLMConfig",
        "AutoModel": "Med3DVLMModel",
        "AutoModelForImageTextToText": "Med3DVLMForConditionalGeneration",
        "AutoModelForMultimodalLM": "Med3DVLMForConditionalGeneration",
        "AutoImageProcessor": "Med3DVLMImageProcessor",
        "AutoProcessor": "Med3DVLMProcessor",
    },
}


class _Depth(threading.local):
    value = 0


class ImportWatcher:
    """
    A finder on `sys.meta_path` that calls `on_import` whenever an outermost import of one of `packages` has finished.

    Only the outermost: `transformers.modeling_layers`, for one, imports the Auto classes in its first lines, and our
    models need the rest of it. Once the outermost import is over, no module of these packages is half executed in this
    thread. The call itself counts as an import, so the imports it makes do not call again.

    Args:
        packages (`Sequence[str]`):
            Names of top-level packages.
        on_import (`Callable[[], None]`):
            Called without arguments; also once by `__call__`.
    """

    def __init__(self, packages: Sequence[str], on_import: Callable[[], None]):
        self.packages = frozenset(packages)
        self.on_import = on_import
        self._depth = _Depth()

    def __call__(self) -> None:
        """Does what the end of an import does."""
        with self._importing():
            pass

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification that the other finders give, with a loader that tells when it has executed the module."""
        if name.partition(".")[0] not in self.packages:
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, "find_spec", None)
            spec = find_spec(name, path, target) if find_spec is not None and finder is not self else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module") and not isinstance(spec.loader, type):
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Any) -> None:
        exec_module = loader.exec_module

        def exec_module_and_tell(module: ModuleType) -> None:
            vars(loader).pop("exec_module", None)  # from here on the loader is as it was
            with self._importing():
                exec_module(module)

        # On the loader itself rather than in a wrapper: `inspect`, `pkgutil` and `linecache` ask loaders for more.
        loader.exec_module = exec_module_and_tell

    @contextmanager
    def _importing(self) -> Iterator[None]:
        self._depth.value += 1
        try:
            yield
            if self._depth.value == 1:
                self.on_import()
        finally:
            self._depth.value -= 1


_registered: set[str] = set()


def register_imported() -> None:
    """
    Registers our classes with every Auto class that has been imported by now, and gives those of our classes that have
    been imported the code to save. Does nothing a second time.
    """
    while pending := [name for name in AUTO_MODULES if name in sys.modules and name not in _registered]:
        _registered.add(pending[0])
        try:
            _register(pending[0])
        except (ImportError, AttributeError, TypeError) as error:
            # Whoever imported transformers may not want us at all: their import must not fail because ours does. The latter two
            # come of a transformers whose Auto classes are not those we know.
            warnings.warn(
                f"{PACKAGE} could not register its classes with {', '.join(AUTO_MODULES[pending[0]])}, because one of "
                f"its modules cannot be imported, or does not fit the installed transformers: {error}",
                stacklevel=2,
            )
    for name, module in list(sys.modules.items()):
        is_ours = name.startswith((f"{PACKAGE}.configuration.", f"{PACKAGE}.processing."))
        if is_ours and module is not None:  # None stands there for a module whose import is forbidden
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name and hasattr(value, "to_json_file"):
                    from .remote_code import carry_code  # only now: most imports of the package save nothing

                    carry_code(value)


def _register(auto_module: str) -> None:
    package, auto_classes = importlib.import_module(PACKAGE), importlib.import_module(auto_module)
    for config_name, names in REGISTRATIONS.items():
        for auto_name in AUTO_MODULES[auto_module]:
            if auto_name not in names:
                continue
            config_class, our_class = getattr(package, config_name), getattr(package, names[auto_name])
            auto_class = getattr(auto_classes, auto_name)
            if auto_name == "AutoConfig":
                auto_class.register(config_class.model_type, config_class, exist_ok=True)
            elif auto_name == "AutoImageProcessor":
                # "pil" is the backend that transformers takes where torchvision is missing; ours needs neither.
                auto_class.register(config_class, image_processor_classes={"pil": our_class}, exist_ok=True)
            else:
                auto_class.register(config_class, our_class, exist_ok=True)


_watcher = ImportWatcher(("transformers", PACKAGE), register_imported)


def install() -> None:
    """
    Registers our classes with the Auto classes that have been imported already, and from now on with each when it is
    imported. Called by the package's `__init__`; calling it again changes nothing.
    """
    if _watcher not in sys.meta_path:
        sys.meta_path.insert(0, _watcher)
        _watcher()


__all__ = ["AUTO_MODULES", "REGISTRATIONS", "ImportWatcher", "install", "register_imported"]
