import importlib
import subprocess
import sys

import nibabel
import numpy as np
import pytest
import torch
from tiny import build_tiny_model

from med3dvlm import Med3DVLMForConditionalGeneration, Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.train.evaluation import asked, folders
from med3dvlm.train.evaluation.loading import build_volumes, load_for_evaluation
from med3dvlm.train.evaluation.settings import EvaluationSettings, Work
from med3dvlm.train.recipe import DataRecipe
from med3dvlm.train.stages import build_volume_loader
from med3dvlm.train.tokenizers import build_tiny_tokenizer


def test_prepared_volumes_of_another_size_are_seen_as_in_training(tmp_path):
    voxels = np.random.default_rng(0).random((8, 6, 4), dtype=np.float32)
    path = str(tmp_path / "volume.nii.gz")
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    processor = Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=[2, 6, 4]), build_tiny_tokenizer())
    trained = build_volume_loader(DataRecipe(volumes="prepared"), processor.image_processor).load(path)
    settings = EvaluationSettings("study", ("report",), prepared=True)
    evaluated = build_volumes(processor, settings, Work()).load(path)
    assert evaluated.shape == (2, 6, 4) and torch.equal(evaluated, trained)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    for part in build_tiny_model():
        part.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("device, device_map", [("cuda:1", {"": "cuda:1"}), ("cpu", None)])
def test_weights_are_loaded_in_their_precision_and_onto_the_gpu_at_once(device, device_map, saved, monkeypatch):
    asked = {}

    class Loaded:
        def eval(self):
            return self

        def to(self, place):
            asked["place"] = place
            return self

    monkeypatch.setattr(
        Med3DVLMForConditionalGeneration,
        "from_pretrained",
        lambda source, **options: asked.update(options) or Loaded(),
    )
    settings = EvaluationSettings("study", ("report",), dtype="bfloat16")
    load_for_evaluation(saved, Med3DVLMForConditionalGeneration, settings, Work(device=device))
    assert asked == {"dtype": "bfloat16", "device_map": device_map, "place": device}


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_precision_gives_the_weights_of_the_file_rounded_to_it(dtype, saved):
    settings = EvaluationSettings("study", ("report",), dtype=dtype)
    loaded, _ = load_for_evaluation(saved, Med3DVLMForConditionalGeneration, settings, Work(device="cpu"))
    expected = Med3DVLMForConditionalGeneration.from_pretrained(saved, dtype="auto").to(
        torch.float32 if dtype == "auto" else getattr(torch, dtype)
    )
    found = loaded.state_dict()
    for name, value in expected.state_dict().items():
        assert torch.equal(found[name], value), name


def test_a_wrong_option_is_known_before_torch_is_loaded(tmp_path):
    program = """
import sys
from typer.testing import CliRunner
import med3dvlm.train.evaluation.settings
from med3dvlm.train.cli import app
result = CliRunner().invoke(app, ["evaluate", "report", "--predictions", "p", "--split", "tset", *sys.argv[1:]])
assert result.exit_code == 2 and "--split: expected one of train" in result.output, result.output
print(*sorted({"torch", "datasets"} & set(sys.modules)))
"""
    command = [sys.executable, "-c", program, "-d", str(tmp_path), "-o", str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.strip() == "", result.stderr + result.stdout


def test_folders_and_what_is_asked_need_no_training_stage_and_no_metric(monkeypatch):
    for name in (
        "bert_score",
        "evaluate",
        "matplotlib",
        "nltk",
        "omegaconf",
        "peft",
        "rouge_score",
        "sacrebleu",
        "sklearn",
    ):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "med3dvlm.train.stages", None)
    kept = sys.modules[asked.__package__]
    monkeypatch.setattr("med3dvlm.train.evaluation", kept)  # is put back, as the modules are
    for name in [name for name in sys.modules if name.startswith(f"{kept.__name__}.") or name == kept.__name__]:
        monkeypatch.delitem(sys.modules, name)
    for module in (asked, folders):
        assert importlib.import_module(module.__name__) is not module
