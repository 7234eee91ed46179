"""The README's snippets run, in order, beside a published model and a scan with the names they use; its commands, and those of
docs/, are understood, and its links lead to files."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from nibabel.testing import data_path
from tiny import build_tiny_model
from transformers import AutoModelForImageTextToText
from typer.core import TyperGroup

from med3dvlm import DCFormerSiglipConfig, DCFormerSiglipModel, Med3DVLMProcessor
from med3dvlm.hub_cards.publish import publish
from med3dvlm.train.cli import app
from med3dvlm.train.data.augmentation import augment_laterality_safe
from med3dvlm.train.merge import merge_adapter
from med3dvlm.train.recipe import load_recipe


UsageError = typer.BadParameter.__mro__[1]  # of click, which newer releases of typer have inside
README = Path(__file__).parents[1] / "README.md"
PHANTOMS = README.parent / "docs" / "phantoms.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    model, processor = build_tiny_model()
    publish(model, folder / "org" / "med3dvlm", processor=processor)
    text_config = {
        "model_type": "bert",
        "vocab_size": len(processor.tokenizer),
        "hidden_size": 16,
        "num_hidden_layers": 1,
    }
    text_config |= {"num_attention_heads": 2, "intermediate_size": 24}
    config = DCFormerSiglipConfig(vision_config=model.config.vision_config, text_config=text_config, projection_dim=8)
    pair_processor = Med3DVLMProcessor(processor.image_processor, processor.tokenizer)
    publish(DCFormerSiglipModel(config), folder / "org" / "dcformer-siglip", processor=pair_processor)
    shutil.copy(Path(data_path) / "standard.nii.gz", folder / "scan.nii.gz")
    return folder


def test_there_are_snippets():
    assert len(SNIPPETS) >= 4


OWN_SCANS = next(number for number, snippet in enumerate(SNIPPETS) if "write_example_manifest" in snippet)


# That of own scans runs below.
@pytest.mark.parametrize("number", [number for number in range(len(SNIPPETS)) if number != OWN_SCANS])
def test_snippet_runs(number, surroundings, monkeypatch, capsys):
    monkeypatch.chdir(surroundings)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_own_scans_train_in_float32_on_a_model_in_float32(surroundings, tmp_path, monkeypatch, capsys):
    shutil.copytree(surroundings / "org", tmp_path / "org")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(SNIPPETS[OWN_SCANS], "README snippet of own scans", "exec"), names)
    assert capsys.readouterr().out.strip()
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32}


def test_own_scans_train_in_float32_on_a_model_in_bfloat16_and_anew_in_each_epoch(surroundings, tmp_path, monkeypatch):
    model = AutoModelForImageTextToText.from_pretrained(surroundings / "org" / "med3dvlm", dtype=torch.bfloat16)
    publish(model, tmp_path / "org/med3dvlm", processor=surroundings / "org" / "med3dvlm")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(SNIPPETS[OWN_SCANS], "README snippet of own scans", "exec"), names)
    trained = [parameter for parameter in names["model"].parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    assert {parameter.dtype for parameter in names["model"].parameters()} == {torch.float32, torch.bfloat16}
    dataset, trainer = names["dataset"], names["trainer"]
    assert dataset.augmentation is augment_laterality_safe
    assert (Path(merge_adapter("finetuned/adapter", "published/own")) / "model.safetensors").is_file()
    trainer.state.epoch = 2.5  # resumed within the third epoch
    trainer.callback_handler.on_epoch_begin(trainer.args, trainer.state, trainer.control)
    assert dataset.draw(0)[1].initial_seed() == dataset.draw(2 * len(dataset))[1].initial_seed()


def test_targets_of_the_readme_exist():
    makefile = (README.parent / "Makefile").read_text()
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (README, PHANTOMS))
    targets = re.findall(r"(?:`|^)make ([a-z-]+)", pages, flags=re.MULTILINE)
    assert len(targets) > 5
    for target in targets:
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("page", [README, README.parent / "CONTRIBUTING.md", PHANTOMS], ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert links or page.name == "CONTRIBUTING.md"
    for name, heading in links:
        target = page.parent / name
        assert target.is_file(), name
        titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert not heading or heading[1:] in [
            re.sub(r"[^a-z -]", "", title.lower()).replace(" ", "-") for title in titles
        ]


def commands_of(page):
    """The arguments of each call of `med3dvlm`, in console blocks and in the text; of a part of a call, too."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```console\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    lines += [line.replace("\n", " ") for line in re.findall(r"`(med3dvlm [^`]+)`", text)]
    for line in lines:
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            if words[:1] == ["med3dvlm"]:
                yield words[1:]
            words = []


def resolve(words):
    """The command that is named, and the words that are left for it."""
    command, left = typer.main.get_command(app), list(words)
    while left and isinstance(command, TyperGroup) and left[0] in command.commands:
        command = command.commands[left.pop(0)]
    return command, left


# Without what is only the name of a command, as `med3dvlm merge` in a sentence.
COMMANDS = [words for page in (README, PHANTOMS) for words in commands_of(page) if resolve(words)[1]]


def test_there_are_commands():
    assert len(list(commands_of(PHANTOMS))) > 10
    assert len(COMMANDS) >= 36 and any(words[:2] == ["evaluate", "dependence"] for words in COMMANDS)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command_of_the_readme_is_understood(words):
    command, left = resolve(words)
    assert not isinstance(command, TyperGroup), f"there is no such command: {' '.join(words)}"
    if "--help" in left:
        return
    numbers = {"N": "2"}  # as in `--cases N`
    context = command.make_context(command.name, [numbers.get(word, word) for word in left])
    if command.name == "train":
        load_recipe(context.params["recipe"], context.params["overrides"])


@pytest.mark.parametrize(
    "line", ["evaluate vqa -d data -o out --case 3", "phantoms DST", "train paper/finetune x.y=1"]
)
def test_a_command_that_is_not_there_is_noticed(line):
    with pytest.raises((AssertionError, UsageError, ValueError)):
        test_command_of_the_readme_is_understood(line.split())
