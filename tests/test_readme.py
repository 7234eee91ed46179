"""The README's snippets run, in order, beside a published model and a scan with the names they use."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from nibabel.testing import data_path
from transformers import AutoModelForImageTextToText

from med3dvlm.hub_cards.publish import publish
from med3dvlm.train.demo import build_tiny_model


README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    model, processor = build_tiny_model()
    publish(model, folder / "org" / "med3dvlm", processor=processor)
    shutil.copy(Path(data_path) / "standard.nii.gz", folder / "scan.nii.gz")
    return folder


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, surroundings, monkeypatch, capsys):
    monkeypatch.chdir(surroundings)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_own_scans_train_in_float32_on_a_model_in_bfloat16_and_anew_in_each_epoch(surroundings, tmp_path, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(surroundings / "org" / "med3dvlm", dtype=torch.bfloat16)
    publish(model, tmp_path / "org/med3dvlm", processor=surroundings / "org" / "med3dvlm")
    monkeypatch.chdir(tmp_path)
    (snippet,) = [snippet for snippet in SNIPPETS if "write_example_manifest" in snippet]
    names: dict = {}
    exec(compile(snippet.replace("bf16=", "use_cpu=True, bf16="), "README snippet of own scans", "exec"), names)
    trained = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32, torch.bfloat16}
    dataset, trainer = names["dataset"], names["trainer"]
    trainer.state.epoch = 2.5  # resumed within the third epoch
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert dataset.draw(0)[1].initial_seed() == dataset.draw(2 * len(dataset))[1].initial_seed()


def test_commands_of_the_readme_exist():
    makefile = (README.parent / "Makefile").read_text()
    for target in re.findall(r"make ([a-z-]+)", README.read_text()):
        assert f"\n{target}:" in makefile
