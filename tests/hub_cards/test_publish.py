"""Publishing to a folder and to the Hub, what is refused, and what a second time gives."""

import filecmp
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import IMAGE_SIZE, tiny_vlm, tiny_vlm_config
from torch import nn
from transformers import BertConfig, BertModel, GenerationConfig, Trainer, TrainingArguments
from typer.testing import CliRunner

from med3dvlm import (
    DCFormerModel,
    DCFormerSiglipModel,
    Med3DVLMForConditionalGeneration,
    Med3DVLMImageProcessor,
    Med3DVLMModel,
    Med3DVLMProcessor,
    Vit3DModel,
)
from med3dvlm.hub_cards.model_index import add_results_to_card
from med3dvlm.hub_cards.publish import (
    greedy_generation_config,
    hashes_of_files,
    load_model,
    publish,
    replaced_when_complete,
)
from med3dvlm.modeling_med3dvlm.convert_original import describe_provenance
from med3dvlm.train.cli import app


CLASSES = {
    "vlm": (Med3DVLMForConditionalGeneration, Med3DVLMProcessor),
    "siglip": (DCFormerSiglipModel, Med3DVLMProcessor),
    "encoder": (DCFormerModel, Med3DVLMImageProcessor),
    "vit3d": (Vit3DModel, Med3DVLMImageProcessor),
}
PROCESSING_CODE = {"image_processing_med3dvlm.py", "processing_med3dvlm.py", "pipeline_med3dvlm.py", "volume_io.py"}


@pytest.fixture(autouse=True)
def validated(monkeypatch):
    """The cards that the Hub was asked about; it finds no fault."""
    cards = []
    monkeypatch.setattr(ModelCard, "validate", lambda card: cards.append(card))
    return cards


def assert_same_files(left: Path, right: Path, ignored: set[str] = frozenset()) -> None:
    names = {path.name for path in left.iterdir()} - ignored
    assert names == {path.name for path in right.iterdir()} - ignored
    _, different, errors = filecmp.cmpfiles(left, right, names, shallow=False)
    assert not different and not errors


@pytest.mark.parametrize("kind", CLASSES)
def test_save_load_save_gives_the_same_files_to_the_bit(published, kind, tmp_path):
    for saved_class in CLASSES[kind]:
        saved_class.from_pretrained(published[kind]).save_pretrained(tmp_path / "saved")
    assert_same_files(tmp_path / "saved", published[kind], ignored={"README.md"})


@pytest.mark.parametrize("kind", CLASSES)
def test_publishing_what_was_published_gives_the_same_files_to_the_bit(published, kind, tmp_path):
    publish(str(published[kind]), tmp_path / "again", notes="Random weights.")
    assert_same_files(tmp_path / "again", published[kind])


SCORES = {
    "scores": [{"task": "closed_vqa", "metric": "accuracy", "group": "all", "value": 0.75, "count": 40}],
    "notes": ["Drawn scans."],
}
FIELDS = {
    "license": "mit",
    "datasets": ["org/data"],
    "training_data": "Phantoms.",
    "notes": "Small.",
    "language": "de",
}


@pytest.fixture
def scored(published, tmp_path):
    """A published folder whose card has all that a card may have."""
    folder = tmp_path / "scored"
    publish(published["vlm"], folder, base_model="org/base", title="A title", **FIELDS)
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: mit\n", "license: other\nlicense_name: own\n"))
    add_results_to_card(folder, SCORES, "Phantoms", "org/phantoms")
    return folder


def test_what_the_card_says_goes_along_with_the_folder(scored, tmp_path, monkeypatch):
    publish(scored, tmp_path / "again")
    old, new = (ModelCard.load(folder / "README.md") for folder in (scored, tmp_path / "again"))
    assert new.data.to_dict() == old.data.to_dict() and new.text == old.text
    assert_same_files(tmp_path / "again", scored, ignored={"README.md"})
    publish(tmp_path / "again", tmp_path / "third")
    assert_same_files(tmp_path / "again", tmp_path / "third")

    hub = Hub()
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    publish(scored, "org/name", push_to_hub=True)
    assert hub.files["README.md"].decode() == (tmp_path / "again" / "README.md").read_text().replace(
        "path/to/this/folder", "org/name"
    )


def test_what_is_given_anew_replaces_what_the_card_said(scored, tmp_path):
    publish(scored, tmp_path / "again", license="apache-2.0", training_data="M3D.", notes="", language=["en", "fr"])
    card = ModelCard.load(tmp_path / "again" / "README.md")
    data = card.data.to_dict()
    assert (data["license"], data["language"], data["base_model"]) == ("apache-2.0", ["en", "fr"], "org/base")
    assert "license_name" not in data and data["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.75
    assert "M3D." in card.text and "Phantoms.\n" not in card.text and "Small." not in card.text
    assert card.text.count("| Accuracy | all | 75.00 |") == 1 and card.text.count("**Drawn scans.**") == 1


def test_another_licence_has_no_name_or_link_of_the_older_one(scored, tmp_path):
    own = {"license": "other", "license_name": "ours", "license_link": "LICENSE"}

    def of_license(folder, **fields):
        publish(scored if folder == "first" else tmp_path / "first", tmp_path / folder, **fields)
        data = ModelCard.load(tmp_path / folder / "README.md").data.to_dict()
        return {name: value for name, value in data.items() if name.startswith("license")}

    assert of_license("first", license_name="ours", license_link="LICENSE") == own
    assert of_license("same", license="other") == own
    assert of_license("renamed", license_name="new") == {"license": "other", "license_name": "new"}
    assert of_license("known", license="mit") == {"license": "mit"}


def test_a_licence_of_its_own_is_named_on_the_command_line(published, tmp_path):
    command = ["publish", str(published["encoder"]), str(tmp_path / "own"), "--license", "other"]
    refused = CliRunner().invoke(app, command)
    assert (
        refused.exit_code == 2 and "--license other says nothing without a name: pass --license-name" in refused.stderr
    )
    result = CliRunner().invoke(app, [*command, "--license-name", "own", "--license-link", "LICENSE"])
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "own" / "README.md").read_text()
    assert "license: other\nlicense_name: own\nlicense_link: LICENSE\n" in text


def test_results_stay_behind_where_other_inputs_or_weights_are_published(scored, vlm, tmp_path):
    publish(scored, tmp_path / "inputs", processor=vlm.processor)
    text = (tmp_path / "inputs" / "README.md").read_text()
    assert "Phantoms." in text and "license_name: own" in text
    assert "model-index" not in text and "## Results" not in text
    publish(load_model(str(scored)), tmp_path / "memory", processor=vlm.processor)
    text = (tmp_path / "memory" / "README.md").read_text()
    assert "Not stated." in text and "model-index" not in text and "org/data" not in text


@pytest.mark.parametrize("name", ["model.safetensors", "processor_config.json", "chat_template.jinja"])
def test_a_card_of_other_files_is_not_believed(scored, tmp_path, name, caplog):
    """As after a training that saved into the folder."""
    place = scored / name
    if place.suffix != ".safetensors":
        place.write_text(place.read_text() + "\n")
    else:
        weights = load_file(place)
        save_file(
            {key: value + 1 if value.is_floating_point() else value for key, value in weights.items()},
            place,
            {"format": "pt"},
        )
    (scored / "conversion.json").write_text("{}")
    publish(scored, tmp_path / "again")
    text = (tmp_path / "again" / "README.md").read_text()
    assert "Not stated." in text and "model-index" not in text and "license: unknown" in text
    assert not (tmp_path / "again" / "conversion.json").exists()
    assert "have changed since its card was written" in caplog.text


@pytest.mark.parametrize("content", ["---\na: [\n---\n", "---\na text\n---\n", "# Mine\n"])
def test_a_readme_of_another_make_stops_nothing(published, tmp_path, content):
    folder = shutil.copytree(published["encoder"], tmp_path / "own")
    (folder / "README.md").write_text(content)
    publish(folder, tmp_path / "again")
    assert "Not stated." in (tmp_path / "again" / "README.md").read_text()


def test_the_record_of_a_conversion_goes_along(published, tmp_path):
    digest = "0123456789abcdef" * 4
    record = {
        "tool": "med3dvlm 0",
        "kind": "a model",
        "tensors": 3,
        "assumptions": ["LoRA alpha 32."],
        "source_files": {"model.bin": {"sha256": digest, "num_bytes": 12}},
    }
    publish(published["encoder"], tmp_path / "converted", training_data=describe_provenance(record))
    (tmp_path / "converted" / "conversion.json").write_text(json.dumps(record))
    publish(tmp_path / "converted", tmp_path / "again")
    assert_same_files(tmp_path / "converted", tmp_path / "again")
    place = tmp_path / "again"
    for number, said in enumerate(("M3D-Cap.", "CT-RATE.", "")):  # however often it is said anew
        publish(place, tmp_path / str(number), training_data=said)
        place = tmp_path / str(number)
        text = (place / "README.md").read_text()
        assert f"provenance\n\n{said}" in text and text.count(digest) == 1 and text.count("Assumed: LoRA") == 1
        assert number == 0 or "M3D-Cap" not in text
        assert json.loads((place / "conversion.json").read_text()) == record
    # What is said of a conversion is no longer true of weights without its record.
    (place / "conversion.json").unlink()
    publish(place, tmp_path / "other", training_data="M3D-Cap.")
    assert digest not in (tmp_path / "other" / "README.md").read_text()


def test_the_record_of_a_training_goes_along(published, encoder, tmp_path):
    record = {"tool": "med3dvlm 0", "commit": None, "settings": {"stage": "contrastive"}, "before": {}}
    publish(published["encoder"], tmp_path / "trained", training_data="Phantoms.", training_record=record)
    assert json.loads((tmp_path / "trained" / "training.json").read_text()) == record
    assert "`training.json` has the settings" in (tmp_path / "trained" / "README.md").read_text()
    publish(tmp_path / "trained", tmp_path / "again")
    assert_same_files(tmp_path / "trained", tmp_path / "again")
    assert hashes_of_files(tmp_path / "again") == hashes_of_files(published["encoder"])  # no answer depends on it
    # Of other weights it is not true.
    publish(encoder.model, tmp_path / "other", processor=encoder.processor)
    (tmp_path / "again" / "config.json").write_text((tmp_path / "again" / "config.json").read_text() + "\n")
    publish(tmp_path / "again", tmp_path / "changed")
    for name in ("other", "changed"):
        assert not (tmp_path / name / "training.json").exists()
        assert "training.json" not in (tmp_path / name / "README.md").read_text()


def test_a_published_folder_is_complete_and_readable(published):
    names = {path.name for path in published["vlm"].iterdir()}
    assert {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "processor_config.json",
    } <= names
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "modeling_med3dvlm.py"} <= names
    assert len({path.stat().st_mode for path in published["vlm"].iterdir()}) == 1
    assert not [path for path in published["vlm"].parent.iterdir() if path.name.startswith(".")]


def test_generation_is_greedy_and_ends_at_the_end_of_a_turn(vlm, tokenizer):
    model = SimpleNamespace(generation_config=GenerationConfig(do_sample=True, top_p=0.9, max_new_tokens=5))
    model.generation_config.update(repetition_penalty=1.05, no_repeat_ngram_size=3, num_beams=4)
    config = greedy_generation_config(model, tokenizer)
    assert config.do_sample is False and config.top_p is None and config.max_new_tokens == 5
    assert config.repetition_penalty is config.no_repeat_ngram_size is config.num_beams is None
    assert config.eos_token_id == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert config.pad_token_id == tokenizer.pad_token_id
    assert model.generation_config.do_sample is True

    plain = SimpleNamespace(eos_token_id=3, pad_token_id=None, bos_token_id=None, get_vocab=dict)
    config = greedy_generation_config(model, plain)
    assert (config.eos_token_id, config.pad_token_id) == (3, 3)
    plain.eos_token_id = None
    with pytest.raises(ValueError, match="no `eos_token`"):
        greedy_generation_config(model, plain)


def test_parts_are_assembled(vlm, siglip, encoder, tokenizer, tmp_path):
    image_processor = vlm.processor.image_processor
    publish(vlm.model, tmp_path / "vlm", processor=image_processor, tokenizer=tokenizer)
    assert json.loads((tmp_path / "vlm/processor_config.json").read_text())["image_seq_length"] == 8
    publish(siglip.model, tmp_path / "siglip", processor=image_processor, tokenizer=tokenizer)
    assert (tmp_path / "siglip/tokenizer.json").is_file()
    publish(encoder.model, tmp_path / "encoder", processor=vlm.processor)
    assert not (tmp_path / "encoder/tokenizer.json").exists()


def test_destination_must_be_empty_unless_a_model_may_be_replaced(encoder, tmp_path):
    def publish_again(destination, **options):
        return publish(encoder.model, destination, processor=encoder.processor, **options)

    (tmp_path / "empty").mkdir()
    assert publish_again(tmp_path / "empty") == str(tmp_path / "empty")
    with pytest.raises(FileExistsError, match="is not empty.*overwrite=True"):
        publish_again(tmp_path / "empty")
    (tmp_path / "empty" / "stale.py").write_text("")
    publish_again(tmp_path / "empty", overwrite=True)
    assert not (tmp_path / "empty" / "stale.py").exists()

    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        publish_again(tmp_path / "home", overwrite=True)
    with pytest.raises(FileExistsError, match="is not a folder"):
        publish_again(tmp_path / "home" / "thesis.tex", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "home"]


def test_a_failure_leaves_the_destination_as_it_was(encoder, tmp_path, monkeypatch):
    destination = tmp_path / "model"
    publish(encoder.model, destination, processor=encoder.processor)
    before = {path.name: path.read_bytes() for path in destination.iterdir()}

    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(Med3DVLMImageProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        publish(encoder.model, destination, processor=encoder.processor, overwrite=True)
    assert {path.name: path.read_bytes() for path in destination.iterdir()} == before
    with pytest.raises(OSError, match="disk full"):
        publish(encoder.model, tmp_path / "new", processor=encoder.processor)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == "new":
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_for_new)
    with pytest.raises(OSError, match="no"), replaced_when_complete(tmp_path / "model"):
        pass
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("place, done", [(2, False), (1, True), (2, True)])
def test_an_interrupt_between_two_moves_leaves_the_old_folder_or_the_new_one(tmp_path, monkeypatch, place, done):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    rename, calls = Path.rename, []

    def interrupt(self, target):
        calls.append(self)
        moved = rename(self, target) if done or len(calls) != place else None
        if len(calls) == place:
            raise KeyboardInterrupt
        return moved

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt), replaced_when_complete(tmp_path / "model") as folder:
        (folder / "new").write_text("")
    expected = "new" if done and place == 2 else "old"
    assert [path.name for path in (tmp_path / "model").iterdir()] == [expected]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_cannot_be_put_back_is_not_deleted(tmp_path, monkeypatch, caplog):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("")
    rename, calls = Path.rename, []

    def fail_twice(self, target):
        calls.append(self)
        if len(calls) > 1:
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_twice)
    with pytest.raises(OSError, match="no"), replaced_when_complete(tmp_path / "model"):
        pass
    (kept,) = tmp_path.glob(".model.*/old")
    assert (kept / "old").exists() and f"what was there lies in {kept}" in caplog.text


def misfit_processor(vlm, **changes):
    processor = vlm.processor
    fields = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, "image_seq_length": 8}
    return Med3DVLMProcessor(**{**fields, **changes})


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "Merge adapters first", lambda vlm: {"model": BertModel(BertConfig(hidden_size=12))}),
        (TypeError, "got torch.*Linear", lambda vlm: {"model": nn.Linear(1, 1)}),
        (TypeError, "rather than its base", lambda vlm: {"model": Med3DVLMModel(tiny_vlm_config())}),
        (TypeError, "Expected `processor` to be a Med3DVLMProcessor", lambda vlm: {"processor": object()}),
        (ValueError, "pass `processor`, a Med3DVLMProcessor", lambda vlm: {"processor": None}),
        (ValueError, "needs a tokenizer", lambda vlm: {"processor": vlm.processor.image_processor}),
        (ValueError, "has its own tokenizer", lambda vlm: {"tokenizer": object()}),
        (ValueError, "No Med3DVLMProcessor can be loaded from '/nowhere'", lambda vlm: {"processor": "/nowhere"}),
        (
            ValueError,
            r"`image_size` is \(32, 64, 96\), the processor's is \(8, 8, 8\)",
            lambda vlm: {
                "processor": misfit_processor(vlm, image_processor=Med3DVLMImageProcessor(image_size=[8, 8, 8]))
            },
        ),
        (
            ValueError,
            "`image_seq_length` is 8, the processor's is 5",
            lambda vlm: {"processor": misfit_processor(vlm, image_seq_length=5)},
        ),
        (
            ValueError,
            "`image_token_id` is 9, the processor's is 7",
            lambda vlm: {"model": tiny_vlm(image_token_id=9)},
        ),
        (
            ValueError,
            "99 tokens, the text model 50",
            lambda vlm: {"model": tiny_vlm(text_config={"vocab_size": 50})},
        ),
        (TypeError, "unexpected keyword argument 'licence'", lambda vlm: {"licence": "mit"}),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(vlm, tmp_path, error, message, arguments):
    given = {"model": vlm.model, "processor": vlm.processor, **arguments(vlm)}
    with pytest.raises(error, match=message):
        publish(given.pop("model"), tmp_path / "model", **given)
    assert not list(tmp_path.iterdir())


def test_adapters_are_refused(vlm, tmp_path):
    model = get_peft_model(tiny_vlm(), LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    with pytest.raises(TypeError, match="got peft.*Merge adapters first"):
        publish(model, tmp_path / "model", processor=vlm.processor)


def test_a_checkpoint_that_does_not_fit_is_refused_with_its_tensors(published, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(published["encoder"], source)
    weights = load_file(source / "model.safetensors")
    weights["extra.weight"] = torch.zeros(1)
    weights["stem.layers.0.conv_depth.bias"] = torch.zeros(3)
    del weights["stem.layers.1.conv_depth.bias"]
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="does not fit DCFormerModel") as error:
        publish(source, tmp_path / "model")
    for part in (
        "1 missing in the checkpoint: stem.layers.1.conv_depth.bias",
        "1 not part of the model: extra.weight",
        "stem.layers.0.conv_depth.bias (checkpoint (3,), model (4,))",
    ):
        assert part in str(error.value)
    assert not (tmp_path / "model").exists()


def test_a_folder_with_a_foreign_model_or_none_is_refused(tmp_path):
    BertConfig(architectures=["BertModel"]).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"to hold one of .*got `architectures` \['BertModel'\] and `model_type` 'bert'"
    ):
        load_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"a folder or a Hub repository `org/name`, got .*no such folder"):
        load_model(str(tmp_path / "none"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json.*Merge an adapter"):
        load_model(str(tmp_path / "empty"))


def test_precision_is_kept(encoder, tmp_path):
    model = DCFormerModel(encoder.model.config).to(torch.bfloat16)
    publish(model, tmp_path / "half", processor=encoder.processor)
    assert load_model(str(tmp_path / "half")).dtype == torch.bfloat16
    assert "Parameters (bfloat16)" in (tmp_path / "half" / "README.md").read_text()


def test_another_precision_is_asked_for_when_loading(encoder, tmp_path):
    encoder.model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path), dtype="float64")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float64}


def test_large_weights_are_sharded(vlm, tmp_path):
    publish(vlm.model, tmp_path / "model", processor=vlm.processor, max_shard_size="50KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").is_file()
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    loaded = load_model(str(tmp_path / "model"))
    assert all(torch.equal(left, right) for left, right in zip(loaded.parameters(), vlm.model.parameters()))


class Hub:
    """Stands in for `HfApi` and keeps what is uploaded. `existing` are the files of a repository that is there before."""

    def __init__(self, existing=None, private=False):
        self.created, self.files, self.options = [], {}, {}
        self.existing, self.private = existing, private

    def whoami(self):
        return {"name": "org"}

    def repo_exists(self, repo_id):
        return self.existing is not None

    def create_repo(self, repo_id, **options):
        self.created.append((repo_id, options))
        if self.existing is None:
            self.existing, self.private = [".gitattributes"], bool(options.get("private"))
        return type("RepoUrl", (str,), {"repo_id": repo_id})(f"https://hub/{repo_id}")

    def model_info(self, repo_id):
        siblings = [SimpleNamespace(rfilename=name) for name in self.existing]
        return SimpleNamespace(private=self.private, siblings=siblings)

    def upload_folder(self, repo_id, folder_path, **options):
        self.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.options = options

    def create_commit(self, repo_id, operations, **options):
        self.files = {operation.path_in_repo: Path(operation.path_or_fileobj).read_bytes() for operation in operations}


def test_publishing_to_the_hub_uploads_the_finished_folder(vlm, published, monkeypatch, validated):
    hub = Hub()
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    url = publish(vlm.model, "org/name", processor=vlm.processor, push_to_hub=True, license="apache-2.0", private=True)
    assert url == "https://hub/org/name"
    assert hub.created == [("org/name", {"private": True, "exist_ok": True})]
    assert set(hub.files) == {path.name for path in published["vlm"].iterdir()}
    assert 'model="org/name"' in hub.files["README.md"].decode()
    assert [card.data.license for card in validated] == ["apache-2.0"]
    stale = [
        "processor_config.json",
        "adapter_config.json",
        "training.json",
        "old.py",
        "model-00001-of-00002.safetensors",
    ]
    kept = ["LICENSE", "README.md", ".gitattributes", "evaluation/scores.json"]
    assert list(filter_repo_objects([*stale, *kept], allow_patterns=hub.options["delete_patterns"])) == stale


def test_a_repository_is_named_with_its_owner(encoder):
    with pytest.raises(ValueError, match="with its owner, such as org/med3dvlm, got 'name'"):
        publish(encoder.model, "name", processor=encoder.processor, push_to_hub=True, license="mit")


def test_a_path_is_no_repository_and_no_model_is_loaded_for_it(published, monkeypatch):
    monkeypatch.setattr("med3dvlm.hub_cards.publish.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=r"with its owner, such as org/med3dvlm, got '\.\./x'"):
        publish(published["vlm"], "../x", push_to_hub=True, license="mit")


@pytest.mark.parametrize(
    "hub, options, error, message",
    [
        (Hub([".gitattributes"]), {"private": True}, ValueError, "org/name exists and is public: make it private"),
        (Hub(["config.json"]), {"private": True, "overwrite": True}, ValueError, "exists and is public"),
        (Hub(["config.json"], True), {"private": True}, FileExistsError, r"holds config\.json.*`overwrite=True`"),
        (Hub(["old/model.safetensors"]), {}, FileExistsError, r"holds old/model\.safetensors.*`overwrite=True`"),
        (Hub([".gitattributes", "README.md"]), {}, FileExistsError, r"holds README\.md.*`overwrite=True`"),
    ],
)
def test_a_repository_that_exists_is_kept_from_readers_and_losses(encoder, monkeypatch, hub, options, error, message):
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    with pytest.raises(error, match=message):
        publish(encoder.model, "org/name", processor=encoder.processor, push_to_hub=True, license="mit", **options)
    assert not hub.files and not hub.created


@pytest.mark.parametrize("fault", ["nobody is logged in", "it holds a model", "the licence has no such form"])
def test_what_the_hub_will_refuse_is_found_before_a_model_is_loaded(published, monkeypatch, fault):
    def nobody():
        raise OSError("nobody is logged in")

    hub, given = Hub(["config.json"] if fault == "it holds a model" else None), {"license": "mit"}
    error, message = OSError, "nobody is logged in"
    if fault == "nobody is logged in":
        monkeypatch.setattr(hub, "whoami", nobody)
    elif fault == "it holds a model":
        error, message = FileExistsError, r"holds config\.json"
    else:
        error, message, given = ValueError, "must be an identifier of the Hub", {"license": "Apache 2.0"}
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    monkeypatch.setattr("med3dvlm.hub_cards.publish.load_model", lambda *_: pytest.fail("loaded"))
    with pytest.raises(error, match=message):
        publish(published["encoder"], "org/name", push_to_hub=True, **given)
    assert not hub.created


def test_a_card_that_the_hub_refuses_is_found_before_anything_is_made(encoder, monkeypatch):
    def refuse(card):
        raise ValueError(f"no such licence: {card.data.license}")

    hub = Hub()
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    monkeypatch.setattr(ModelCard, "validate", refuse)
    monkeypatch.setattr(DCFormerModel, "save_pretrained", lambda *_, **__: pytest.fail("saved"))
    with pytest.raises(ValueError, match="no such licence: mine"):
        publish(encoder.model, "org/name", processor=encoder.processor, push_to_hub=True, license="mine")
    assert not hub.created


def test_what_an_older_card_adds_is_validated_before_a_repository_is_made(scored, monkeypatch):
    def refuse(card):
        if "model-index" in card.data.to_dict():
            raise ValueError("no such results")

    hub = Hub()
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    monkeypatch.setattr(ModelCard, "validate", refuse)
    with pytest.raises(ValueError, match="no such results"):
        publish(scored, "org/name", push_to_hub=True)
    assert not hub.created and not hub.files


@pytest.mark.parametrize(
    "hub, options",
    [
        (Hub([".gitattributes", "LICENSE"]), {}),
        (Hub([".gitattributes", "README.md"]), {"overwrite": True}),
        (Hub(["config.json"]), {"overwrite": True}),
        (Hub(["config.json"], True), {"overwrite": True, "private": True}),
    ],
)
def test_a_repository_that_exists_takes_a_model_where_none_is_lost_unasked(encoder, monkeypatch, hub, options):
    monkeypatch.setattr("med3dvlm.hub_cards.publish.HfApi", lambda: hub)
    publish(encoder.model, "org/name", processor=encoder.processor, push_to_hub=True, license="mit", **options)
    assert "model.safetensors" in hub.files


def test_push_to_hub_of_a_model_and_a_processor_carries_the_code(vlm, monkeypatch):
    hub = Hub()
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: hub)
    card = SimpleNamespace(save=lambda path: Path(path).write_text(""))
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *args, **kwargs: card)
    vlm.model.push_to_hub("org/name")
    assert {"modeling_med3dvlm.py", "pipeline_med3dvlm.py", "strict_loading.py"} <= set(hub.files)
    vlm.processor.push_to_hub("org/name")
    assert set(hub.files) >= PROCESSING_CODE


def test_adapter_folder_carries_the_code_of_its_processor(vlm, tmp_path):
    model = get_peft_model(tiny_vlm(), LoraConfig(target_modules=r".*language_model.*\.q_proj"))
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[])
    Trainer(model, arguments, processing_class=vlm.processor).save_model(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert names >= PROCESSING_CODE | {"adapter_model.safetensors", "processor_config.json"}


def test_string_and_path_sources_are_the_same(published, tmp_path):
    publish(published["vit3d"], tmp_path / "path", repo_id="org/name")
    publish(str(published["vit3d"]), tmp_path / "string", repo_id="org/name")
    assert_same_files(tmp_path / "path", tmp_path / "string")
    assert tuple(load_model(str(tmp_path / "path")).config.image_size) == IMAGE_SIZE
