"""Registration happens whatever is imported first, and costs nothing before that."""

import sys
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import pytest
import transformers

import med3dvlm
from med3dvlm.hub_cards import registration
from med3dvlm.hub_cards.registration import REGISTRATIONS, ImportWatcher, install, register_imported


# What a process may import first.
FIRST_IMPORTS = {
    "package": "import med3dvlm",
    "package, then one architecture": (
        "import med3dvlm; from transformers.models.llama.modeling_llama import LlamaModel"
    ),
    "package, then pipeline": "import med3dvlm; from transformers import pipeline",
    "transformers in use": "from transformers import AutoModel, AutoProcessor, AutoConfig; "
    "AutoModel.from_config(AutoConfig.for_model('bert', hidden_size=8, num_hidden_layers=1, num_attention_heads=1, "
    "intermediate_size=8, vocab_size=9)); import med3dvlm",
    "configuration": "from med3dvlm.configuration.configuration_med3dvlm import Med3DVLMConfig",
    "model": "from med3dvlm.modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration",
    "image processor": "from med3dvlm.processing.image_processing_med3dvlm import Med3DVLMImageProcessor",
    "pipeline": "from med3dvlm.processing.pipeline_med3dvlm import Med3DVLMPipeline",
}
CHECK = """
import sys
sys.modules["torchvision"] = None
{first}
import transformers, med3dvlm
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from med3dvlm.hub_cards.registration import REGISTRATIONS
for config_name, names in REGISTRATIONS.items():
    config_class = getattr(med3dvlm, config_name)
    for auto_name, name in names.items():
        expected, auto_class = getattr(med3dvlm, name), getattr(transformers, auto_name)
        if auto_name == "AutoConfig":
            found = type(auto_class.for_model(config_class.model_type))
        elif auto_name == "AutoProcessor":
            found = PROCESSOR_MAPPING[config_class]
        elif auto_name == "AutoImageProcessor":
            found = IMAGE_PROCESSOR_MAPPING[config_class]["pil"]
        else:
            found = auto_class._model_mapping[config_class]
        assert found is expected, (config_name, auto_name, found)
        saves = getattr(expected, "to_json_file", None)
        assert saves is None or saves.carries_code, expected
"""


@pytest.fixture(scope="module")
def outcomes(run_python):
    """What each order of imports printed, two at a time: each process imports torch."""
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(
            lambda first: run_python("-W", "error", "-c", CHECK.format(first=first), check=False),
            FIRST_IMPORTS.values(),
        )
        return dict(zip(FIRST_IMPORTS, outputs))


@pytest.mark.parametrize("order", FIRST_IMPORTS)
def test_all_classes_are_registered_whatever_is_imported_first(outcomes, order):
    assert outcomes[order] == ""


def test_importing_the_package_imports_neither_torch_nor_the_auto_classes(run_python):
    code = "import sys, transformers, med3dvlm; print({'torch', 'transformers.models.auto'} & set(sys.modules))"
    assert run_python("-c", code).strip() == "set()"


def test_every_configuration_and_its_auto_map_are_in_the_table():
    configs = {name for name in med3dvlm.__all__ if name.endswith("Config")}
    assert set(REGISTRATIONS) == configs
    for name, registered in REGISTRATIONS.items():
        auto_map = getattr(med3dvlm, name)().auto_map
        assert {key: reference.rpartition(".")[2] for key, reference in auto_map.items()}.items() <= registered.items()


def test_registering_again_changes_nothing():
    before = list(sys.meta_path)
    install()
    register_imported()
    assert sys.meta_path == before
    assert isinstance(transformers.AutoConfig.for_model("dcformer"), med3dvlm.DCFormerConfig)


def test_a_part_that_cannot_be_imported_is_a_warning_not_an_error_of_transformers(run_python):
    code = """
import sys
sys.modules["torchvision"] = None
import med3dvlm
sys.modules["med3dvlm.processing.volume_io"] = None
from transformers import AutoModel, AutoProcessor
"""
    output = run_python("-c", code)
    assert "could not register its classes with AutoProcessor" in output and "volume_io" in output


@pytest.mark.parametrize("error", [AttributeError, TypeError])
def test_auto_classes_of_another_transformers_are_a_warning_too(error, monkeypatch):
    def refuse(*arguments, **options):
        raise error("no argument `exist_ok`")

    monkeypatch.setattr(transformers.AutoConfig, "register", refuse)
    monkeypatch.setattr(registration, "_registered", set())
    with pytest.warns(UserWarning, match="could not register.*AutoConfig.*no argument `exist_ok`"):
        register_imported()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `watched` whose module `outer` imports `inner` in its first line."""
    (tmp_path / "watched").mkdir()
    (tmp_path / "watched" / "__init__.py").write_text("")
    (tmp_path / "watched" / "inner.py").write_text("value = 1\n")
    (tmp_path / "watched" / "outer.py").write_text("from . import inner\nvalue = 2\n")
    (tmp_path / "watched" / "broken.py").write_text("from . import inner\nraise ImportError('no')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "watched"
    for name in [name for name in sys.modules if name.partition(".")[0] == "watched"]:
        del sys.modules[name]


def watch(monkeypatch, on_import):
    watcher = ImportWatcher(["watched"], on_import)
    monkeypatch.setattr(sys, "meta_path", [watcher, *sys.meta_path])


def test_watcher_calls_once_the_outermost_import_is_over(package, monkeypatch):
    seen = []
    watch(monkeypatch, lambda: seen.append(getattr(sys.modules.get("watched.outer"), "value", None)))
    import watched.outer

    assert seen == [None, 2]  # the package itself, then `outer`, complete; `inner` was part of it
    assert "exec_module" not in vars(watched.outer.__loader__)


def test_watcher_does_not_call_for_its_own_imports(package, monkeypatch):
    calls = []

    def import_more():
        calls.append(1)
        import watched.outer  # noqa: F401

    watch(monkeypatch, import_more)
    import watched.inner  # noqa: F401

    assert calls == [1]  # at the end of the package, from where all else was imported


def test_watcher_recovers_from_a_failing_import(package, monkeypatch):
    calls = []
    watch(monkeypatch, lambda: calls.append(1))
    with pytest.raises(ImportError, match="no"):
        import watched.broken
    assert len(calls) == 1
    import watched.outer

    assert isinstance(watched.outer, ModuleType) and len(calls) == 2
