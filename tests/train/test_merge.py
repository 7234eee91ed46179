"""What the card of a merged model says, and what it must not."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard


pytest.importorskip("peft", reason="needs the extra `train`")

from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import build_tiny_model
from typer.testing import CliRunner

from med3dvlm.hub_cards.model_index import add_results_to_card
from med3dvlm.hub_cards.publish import load_model, publish
from med3dvlm.train.cli import app
from med3dvlm.train.merge import Med3DVLMForConditionalGeneration, merge_adapter, publish_adapter, read_adapter_card


SCORES = {"scores": [{"task": "closed_vqa", "metric": "accuracy", "group": "all", "value": 0.75, "count": 40}]}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A published base model whose card has scores and the record of a conversion."""
    folder = tmp_path_factory.mktemp("models") / "base"
    model, processor = build_tiny_model()
    fields = {"license": "mit", "datasets": ["org/reports"], "base_model": "org/language-model", "language": "de"}
    publish(model, folder, processor=processor, training_data="Reports.", notes="Stage 2.", **fields)
    add_results_to_card(folder, SCORES, "Phantoms", "phantoms")
    (folder / "conversion.json").write_text("{}")
    return folder


@pytest.fixture
def adapter(base, tmp_path):
    settings = LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    get_peft_model(load_model(str(base)), settings).save_pretrained(tmp_path / "saved")
    _, processor = build_tiny_model()
    publish_adapter(
        tmp_path / "saved", tmp_path / "adapter", processor, "Result of `finetune`.\n\nMore.", "Questions.\n\n- VQA"
    )
    return tmp_path / "adapter"


def test_the_card_says_what_holds_for_adapter_and_base_together(base, adapter, tmp_path):
    add_results_to_card(adapter, SCORES, "Phantoms", "phantoms")
    merge_adapter(adapter, tmp_path / "merged")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["datasets"], data["language"]) == ("org/language-model", ["org/reports"], "de")
    assert data["license"] == "unknown" and "model-index" not in data
    assert "Questions.\n\n- VQA\n\nThe base model, before that: Reports." in card.text
    assert "> Result of `finetune`.\n>\n> More." in card.text and "Stage 2." not in card.text
    assert "Accuracy" not in card.text and not (tmp_path / "merged" / "conversion.json").exists()


def test_the_record_of_the_adapters_training_goes_along(base, adapter, tmp_path):
    assert not (adapter / "training.json").exists() and "training.json" not in (adapter / "README.md").read_text()
    record = {"tool": "med3dvlm 1", "before": {"start_from": {"tool": "med3dvlm 0"}}}
    _, processor = build_tiny_model()
    publish_adapter(tmp_path / "saved", adapter, processor, "A note.", "Questions.", training_record=record)
    merge_adapter(adapter, tmp_path / "merged")
    for folder in (adapter, tmp_path / "merged"):
        assert json.loads((folder / "training.json").read_text()) == record
        card = (folder / "README.md").read_text()
        assert "`training.json` has the settings" in card and "licensed under Apache-2.0" in card
        assert list(folder.glob("*.py"))  # the code whose licence that is
    assert read_adapter_card(str(adapter)) == {"notes": "A note.", "training_data": "Questions."}


def test_what_is_given_takes_the_place_of_what_the_cards_say(base, adapter, tmp_path):
    path = adapter / "README.md"
    text = path.read_text().replace("tags:", "license: cc-by-4.0\nlanguage: [en, de]\ndatasets: org/questions\ntags:")
    path.write_text(text)
    merge_adapter(adapter, tmp_path / "merged", license="apache-2.0", notes="Mine.", datasets=None)
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert (card.data.license, card.data.language) == ("apache-2.0", ["en", "de"])
    assert card.data.datasets == ["org/reports", "org/questions"]
    assert "> Mine.\n" in card.text and "Result of" not in card.text and "Questions." in card.text
    assert read_adapter_card(str(adapter))["license"] == "cc-by-4.0"


def licence_of(folder):
    metadata = ModelCard.load(folder / "README.md").data.to_dict()
    return {name: value for name, value in metadata.items() if name.startswith("license")}


def test_a_licence_of_its_own_goes_along_whole_or_not_at_all(base, adapter, tmp_path):
    path, own = adapter / "README.md", {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    lines = "".join(f"{name}: {value}\n" for name, value in own.items())
    path.write_text(path.read_text().replace("tags:", f"{lines}tags:"))
    merge_adapter(adapter, tmp_path / "merged")
    assert licence_of(tmp_path / "merged") == own
    merge_adapter(adapter, tmp_path / "known", license="mit")
    assert licence_of(tmp_path / "known") == {"license": "mit"}


def test_a_licence_of_its_own_is_named_on_the_command_line(base, adapter, tmp_path):
    command = ["merge", str(adapter), str(tmp_path / "merged"), "--license", "other"]
    refused = CliRunner().invoke(app, command)
    assert refused.exit_code == 2
    assert "--license other says nothing without a name: pass --license-name" in refused.stderr
    result = CliRunner().invoke(app, [*command, "--license-name", "own", "--license-link", "LICENSE"])
    assert result.exit_code == 0, result.stderr
    expected = {"license": "other", "license_name": "own", "license_link": "LICENSE"}
    assert licence_of(tmp_path / "merged") == expected


def test_a_licence_that_the_hub_refuses_is_found_before_the_base_is_loaded(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(Med3DVLMForConditionalGeneration, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(ValueError, match="must be an identifier of the Hub"):
        merge_adapter(adapter, tmp_path / "merged", license="Apache 2.0")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_nan_is_not_merged(base, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    next(tensor for name, tensor in weights.items() if "lora_B" in name).fill_(float("nan"))
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="NaN"):
        merge_adapter(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_cards_of_another_make_and_repositories_say_nothing(base, adapter, tmp_path):
    (adapter / "README.md").write_text("---\nlibrary_name: peft\nlicense: mit\n---\n# Model Card for Model ID\n")
    (base / "README.md").rename(tmp_path / "README.md")
    try:
        merge_adapter(adapter, tmp_path / "merged")
    finally:
        (tmp_path / "README.md").rename(base / "README.md")
    card = ModelCard.load(tmp_path / "merged" / "README.md")
    assert card.data.license == "unknown" and "Not stated." in card.text
    merge_adapter(adapter, tmp_path / "of_known_base")
    text = (tmp_path / "of_known_base" / "README.md").read_text()
    assert "Of the adapter: not stated.\n\nThe base model, before that: Reports." in text
    assert read_adapter_card("org/adapter") == {} == read_adapter_card(str(Path(tmp_path) / "nowhere"))


@pytest.mark.parametrize("name", ["runs/gone", "runs/of/three", "gone"])
def test_a_base_that_is_gone_is_named_whatever_its_name_looks_like(name, adapter, tmp_path):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": name}))
    with pytest.raises(FileNotFoundError, match=f"its base model '{name}' is not there. Put it back"):
        merge_adapter(adapter, tmp_path / "merged")
