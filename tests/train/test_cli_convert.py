"""`med3dvlm convert` as it is typed."""

import json

import golden_cases
import original_files
import pytest
import torch
from typer.testing import CliRunner

from med3dvlm.train.cli import app


pytestmark = pytest.mark.skipif(
    golden_cases.find_golden("dcformer_nano") is None, reason="the golden dcformer_nano is not in this checkout"
)


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path):
    return original_files.save_bin(original_files.tensors_of("dcformer_nano"), tmp_path / "pretrained_ViT.bin")


def test_there_and_back(run, source, tmp_path):
    result = run(source, tmp_path / "ours", "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["kind"] == "volume encoder (DCFormer-nano)" and record["destination"] == str(tmp_path / "ours")
    assert "license: unknown\n" in (tmp_path / "ours" / "README.md").read_text()

    own = ("--license", "other", "--license-name", "own", "--license-link", "LICENSE")
    result = run(source, tmp_path / "ours", "--overwrite", *own)
    assert result.exit_code == 0 and "192 tensors" in result.stdout
    assert "assumed: Volumes of 128 x 256 x 256" in result.stderr
    text = (tmp_path / "ours" / "README.md").read_text()
    assert "license: other\nlicense_name: own\nlicense_link: LICENSE\n" in text

    result = run(tmp_path / "ours", tmp_path / "back", "--to-original")
    assert result.exit_code == 0, result.output
    back, state = torch.load(tmp_path / "back" / "pretrained_ViT.bin"), torch.load(source)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.bin", "ours"], "missing.bin: no such file or folder"),
        (["pretrained_ViT.bin", "taken"], "is not empty: choose another folder, or pass --overwrite"),
        (["pretrained_ViT.bin", "ours", "--tokenizer", "x"], "neither --config nor --tokenizer has a place here"),
        (["pretrained_ViT.bin", "ours", "--lora-alpha", "4"], "--lora-alpha was given, but there are no adapters"),
        (["pretrained_ViT.bin", "ours", "--license", "other"], "without a name: pass --license-name, such as"),
        (["ours", "back", "--to-original", "--lora-alpha", "4"], "--to-original takes no other option"),
        (["ours", "back", "--to-original", "--license-name", "own"], "--to-original takes no other option"),
        (["taken", "back", "--to-original"], "has no config.json"),
    ],
)
def test_bad_input_is_answered_in_one_line(arguments, message, run, source, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("")
    places = [tmp_path / argument if index < 2 else argument for index, argument in enumerate(arguments)]
    result = run(*places)
    assert result.exit_code == 2 and message in result.stderr, result.output
    assert result.stderr.splitlines()[-1].startswith("med3dvlm: ")
    assert not (tmp_path / "ours").exists() and not (tmp_path / "back").exists()


def test_what_does_not_fit_is_listed(run, tmp_path):
    state = original_files.tensors_of("dcformer_nano")
    state["extra"] = state.pop("encoder.s1.0.scale").clone()
    state["encoder.s1.0.scale"] = torch.ones(31)
    result = run(original_files.save_bin(state, tmp_path / "pretrained_ViT.bin"), tmp_path / "ours")
    assert result.exit_code == 2 and "[32, 31, 64, 128, 256] channels" in result.stderr
