"""Flattening, and the code that travels with what is saved."""

import json
import sys

import pytest
from tiny import IMAGE_SIZE, tiny_dcformer_config, tiny_vlm_config
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from med3dvlm import DCFormerConfig, Med3DVLMConfig, Med3DVLMImageProcessor
from med3dvlm.hub_cards.remote_code import (
    LICENSE_HEADER,
    RemoteCodeError,
    carry_code,
    entry_modules,
    find_hub_modules,
    flatten,
    hub_modules,
    scrub_tokenizer_config,
    write_code,
)


ALLOWED = {"torch", "transformers", "numpy", "huggingface_hub", "safetensors"} | sys.stdlib_module_names
ENCODER_CODE = {
    "configuration_dcformer.py",
    "fused_dcformer.py",
    "fused_training.py",
    "modeling_dcformer.py",
    "strict_loading.py",
    "transformers_version.py",
}


@pytest.fixture
def tree(tmp_path):
    """Writes modules `{"folder/name.py": source}` and gives the table of them."""

    def write(**sources):
        for place, source in sources.items():
            folder, _, name = place.partition("__")
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / f"{name}.py").write_text(source)
        return find_hub_modules(sorted(path for path in tmp_path.iterdir() if path.is_dir()))

    return write


def test_imports_across_folders_become_those_of_siblings(tree):
    modules = tree(
        configuration__config_a="import math\n",
        modeling__layers_a="LAYERS = 1\n",
        modeling__model_a=(
            "from typing import TYPE_CHECKING\n"
            "from ..configuration.config_a import (\n    math,\n)\n"
            "from .layers_a import LAYERS  # noqa\n"
            "if TYPE_CHECKING:\n    from ..processing.pipe_a import Pipe\n"
            "note = 'from ..configuration.config_a'\n"
        ),
        processing__pipe_a="class Pipe: pass\n",
        processing__other_a="",
    )
    files = flatten(["model_a"], modules)
    assert list(files) == ["config_a.py", "layers_a.py", "model_a.py", "pipe_a.py"]
    assert files["model_a.py"] == (
        "from typing import TYPE_CHECKING\n"
        "from .config_a import (\n    math,\n)\n"
        "from .layers_a import LAYERS  # noqa\n"
        "if TYPE_CHECKING:\n    from .pipe_a import Pipe\n"
        "note = 'from ..configuration.config_a'\n"
    )


@pytest.mark.parametrize(
    "source, message",
    [
        ("from . import b", r"model_a\.py:2: `from \. import`.*write `from \.module`"),
        ("from .. import configuration", r"`from \.\. import`"),
        ("from ..configuration import config_a", r"`from \.\.configuration import`"),
        ("from ..a.b.c import d", r"`from \.\.a\.b\.c import`"),
        ("from ...configuration.config_a import d", r"`from \.\.\.configuration\.config_a import`"),
        ("from .sub.module import d", r"`from \.sub\.module import`"),
        ("from .config_a import d", r"not Hub code"),
        ("from .missing import d", r"not Hub code, which is \['config_a', 'model_a'\]"),
        ("from ..train.loop import d", r"not Hub code"),
        ("from .convert_original import d", r"not Hub code"),
        ("import med3dvlm.processing", r"import relatively"),
        ("def f():\n    from med3dvlm import DCFormerConfig", r"model_a\.py:3: .*import relatively"),
        ("from  ..configuration.config_a import d", r"write it on one line as"),
        ('"""\nfrom .config_a import d\n"""', r"model_a\.py:3: .*rephrase the text"),
    ],
)
def test_imports_without_a_meaning_on_the_hub_are_refused(tree, source, message):
    modules = tree(
        configuration__config_a="", modeling__model_a=f"import math\n{source}\n", modeling__convert_original=""
    )
    with pytest.raises(RemoteCodeError, match=message):
        flatten(["model_a"], modules)


def test_unknown_entries_and_double_names_are_refused(tree):
    with pytest.raises(RemoteCodeError, match="Expected a module of Hub code.*got 'missing'"):
        flatten(["missing"], tree(configuration__a=""))
    with pytest.raises(RemoteCodeError, match="have one name"):
        tree(configuration__a="", processing__a="")


@pytest.mark.parametrize("name", sorted(hub_modules()))
def test_each_shipped_module_needs_only_what_a_stranger_has(name, tmp_path):
    write_code(tmp_path, [name])
    files = {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        assert set(get_imports(path)) <= ALLOWED, path.name
        assert {file.rpartition("/")[2] for file in get_relative_import_files(path)} <= files
    assert not [file for file in files if "original" in file]


def test_a_configuration_carries_just_the_code_it_needs(tmp_path):
    tiny_dcformer_config().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == ENCODER_CODE
    assert {path.name for path in tmp_path.iterdir()} == ENCODER_CODE | {"config.json"}


def test_an_image_processor_carries_just_the_code_it_needs(tmp_path):
    Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE)).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == {"image_processing_med3dvlm.py", "volume_io.py"}


def test_a_processor_and_a_model_carry_the_pipeline(vlm, tmp_path):
    vlm.processor.save_pretrained(tmp_path / "processor")
    assert {path.name for path in (tmp_path / "processor").glob("*.py")} == {
        "image_processing_med3dvlm.py",
        "pipeline_med3dvlm.py",
        "processing_med3dvlm.py",
        "volume_io.py",
    }
    vlm.model.save_pretrained(tmp_path / "model")
    assert {"modeling_med3dvlm.py", "pipeline_med3dvlm.py"} <= {path.name for path in (tmp_path / "model").iterdir()}


def test_all_code_stands_below_its_licence_once(published, tmp_path):
    for folder in published.values():
        for path in folder.glob("*.py"):
            source = path.read_text()
            assert (
                source.startswith("# SPDX-License-Identifier: Apache-2.0\n")
                and source.count("SPDX-License-Identifier") == 1
            )
            assert source.removeprefix(LICENSE_HEADER)[:3] == '"""'  # the docstring follows
    names = {path.name: path.read_bytes() for path in published["vlm"].glob("*.py")}
    write_code(published["vlm"], ["modeling_med3dvlm"])
    assert names == {path.name: path.read_bytes() for path in published["vlm"].glob("*.py")}


def test_other_json_files_carry_nothing(tmp_path):
    tiny_dcformer_config().to_json_file(tmp_path / "notes.json")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.json"]


def test_subclasses_carry_the_code_too_and_their_own_modules_are_theirs(tmp_path):
    class OwnConfig(DCFormerConfig):
        model_type = "own"

        def __post_init__(self, **kwargs):
            super().__post_init__(**kwargs)
            self.auto_map = {**self.auto_map, "AutoModel": "modeling_own.OwnModel"}

    config = OwnConfig(image_size=IMAGE_SIZE)
    assert entry_modules(config) == ["configuration_dcformer", "modeling_dcformer"]
    config.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == ENCODER_CODE


def test_carrying_twice_is_carrying_once():
    before = Med3DVLMConfig.to_json_file
    carry_code(Med3DVLMConfig)
    assert Med3DVLMConfig.to_json_file is before


def test_references_to_another_repository_become_local(tmp_path):
    config = tiny_vlm_config()
    config.auto_map = {key: f"org/base--{reference}" for key, reference in config.auto_map.items()}
    config.custom_pipelines["image-text-to-text"]["impl"] = "org/base--pipeline_med3dvlm.Med3DVLMPipeline"
    config.save_pretrained(tmp_path)
    assert "org/base" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "pipeline_med3dvlm.py").is_file()


@pytest.mark.parametrize("name", ["/models/qwen", "../qwen", "models/qwen", "~/qwen", "qwen"])
def test_a_configuration_does_not_tell_where_its_parts_lay(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/qwen", "qwen"):
        (tmp_path / folder).mkdir(parents=True)
    config = tiny_vlm_config()
    config.text_config._name_or_path = name
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"].get("_name_or_path", "") == "" and "_name_or_path" not in saved


def test_a_configuration_keeps_the_repository_of_its_parts(tmp_path):
    config = tiny_vlm_config()
    config.text_config._name_or_path = "Qwen/Qwen2.5-7B-Instruct"
    config.save_pretrained(tmp_path)
    assert Med3DVLMConfig.from_pretrained(tmp_path).text_config._name_or_path == "Qwen/Qwen2.5-7B-Instruct"


def test_files_are_whole_and_nothing_is_left_beside_them(tmp_path, monkeypatch):
    (tmp_path / "strict_loading.py").write_text("old")
    monkeypatch.setattr("pathlib.Path.replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_code(tmp_path, ["strict_loading"])
    assert [path.name for path in tmp_path.iterdir()] == ["strict_loading.py"]
    assert (tmp_path / "strict_loading.py").read_text() == "old"


def test_scrubbing_leaves_only_what_the_author_wrote(tmp_path):
    path = tmp_path / "tokenizer_config.json"
    scrub_tokenizer_config(tmp_path)
    assert not path.exists()
    path.write_text(
        json.dumps({"pad_token": "ü", "is_local": True, "local_files_only": True, "name_or_path": "/home"})
    )
    scrub_tokenizer_config(tmp_path)
    assert path.read_text() == '{\n  "pad_token": "ü"\n}\n'
