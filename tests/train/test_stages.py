"""The three stages on five small scans: each trains what it says, publishes, and is what the next one starts from."""

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nibabel
import pytest
import torch
from m3d_layout import write_volume
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tiny import build_tiny_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
)
from typer.testing import CliRunner

from med3dvlm.train import stages
from med3dvlm.train.checkpoints import only_run_in
from med3dvlm.train.cli import app
from med3dvlm.train.data.augmentation import AUGMENTATIONS
from med3dvlm.train.data.manifest import write_example_manifest
from med3dvlm.train.data.preparation_record import COMMENT, MADE_BY
from med3dvlm.train.files import differing_keys
from med3dvlm.train.merge import merge_adapter
from med3dvlm.train.recipe import DataRecipe, Recipe, load_recipe, save_recipe
from med3dvlm.train.stages import (
    are_of_pictures,
    build_trainer,
    build_training_arguments,
    check_attention,
    choose_precision,
    describe_content,
    describe_recipe,
    fixed_settings,
    read_ahead,
    read_deepspeed_config,
    read_samples,
    run_recipe,
    splits_of,
)
from med3dvlm.train.tokenizers import train_word_piece_tokenizer
from med3dvlm.train.trainers import ContrastiveTrainer, GenerationTrainer, uses_deepspeed_autocast


ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import stage_program


# Small enough for a second; all axes differ.
QUICK = [
    "training.per_device_train_batch_size=2",
    "training.per_device_eval_batch_size=1",
    "training.bf16=false",
    "training.save_strategy=steps",
    "training.save_steps=1",
    "training.logging_steps=1",
    "training.eval_strategy=no",
    "training.report_to=none",
    "training.disable_tqdm=true",
    "data.cache=null",
    "data.max_text_length=400",
]
VISION = "model.vision={image_size: [32, 64, 96], hidden_sizes: [4, 6, 8, 10, 12], depths: [1, 1, 1, 1, 1]}"
TEXT = "model.text_encoder={model_type: bert, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 24}"
# The example has four reports to train on.
CONTRASTIVE = ("model.vision.variant=null", VISION, TEXT, "data.similar_reports=2")
LANGUAGE = (
    "model.language_model={model_type: qwen2, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, "
    "num_attention_heads: 4, num_key_value_heads: 2, tie_word_embeddings: true}"
)
# What starts from a vision-language model has one.
NO_LANGUAGE_MODEL = "model.language_model=null"
# A language model from random weights learns with the projector: nothing comes before.
PROJECTOR = (
    LANGUAGE,
    "model.tokenizer_size=300",
    "trained=[multi_modal_projector, language_model]",
    "model.projector={low_level_tokens: [6, 5], high_level_tokens: [2, 3]}",
)


def recipe_of(stage, manifest, output_dir, *overrides, start_from=None, max_steps=2):
    values = [f"data.root={manifest}", f"training.output_dir={output_dir}", f"training.max_steps={max_steps}", *QUICK]
    values += [f"model.start_from={start_from}"] if start_from else []
    return load_recipe(f"phantom/{stage}", [*values, *overrides])


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write_example_manifest(tmp_path_factory.mktemp("study") / "example")


@pytest.mark.parametrize("is_multiplied", [True, False])
def test_bfloat16_is_chosen_where_the_processor_multiplies_it(monkeypatch, is_multiplied):
    monkeypatch.setattr(stages, "multiplies_bfloat16", lambda device_type: is_multiplied)
    recipe = load_recipe("phantom/contrastive")
    assert recipe.training["bf16"] == "auto"
    assert choose_precision(recipe).training["bf16"] is is_multiplied
    said = load_recipe("phantom/contrastive", ["training.bf16=true"])
    assert choose_precision(said) is said


def test_bfloat16_that_a_gpu_emulates_is_not_chosen(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    recipe = load_recipe("phantom/contrastive", ["training.use_cpu=false"])
    assert choose_precision(recipe).training["bf16"] is False


def test_bfloat16_without_an_accelerator_is_that_of_the_cpu(monkeypatch):
    """What the message about a DeepSpeed that is not installed advises, on a CPU that multiplies bfloat16."""
    monkeypatch.setattr(stages, "multiplies_bfloat16", lambda device_type: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    recipe = load_recipe("paper/contrastive", ["training.deepspeed=null", "training.bf16=auto"])
    arguments = build_training_arguments(choose_precision(recipe))
    assert arguments.bf16 and arguments.device.type == "cpu"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert "use_cpu" not in choose_precision(recipe).training


@pytest.fixture(scope="module")
def contrastive(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("contrastive")
    recipe = recipe_of("contrastive", manifest, folder, *CONTRASTIVE)
    return run_recipe(recipe)


@pytest.fixture(scope="module")
def projector(manifest, contrastive, tmp_path_factory):
    folder = tmp_path_factory.mktemp("projector")
    return run_recipe(recipe_of("projector", manifest, folder, *PROJECTOR, start_from=contrastive))


@pytest.fixture(scope="module")
def finetuned(manifest, projector, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    return run_recipe(recipe_of("finetune", manifest, folder, start_from=projector))


@pytest.fixture(scope="module")
def language(manifest, tmp_path_factory):
    return run_recipe(recipe_of("language", manifest, tmp_path_factory.mktemp("language"), LANGUAGE))


def tensors(folder, name="model.safetensors"):
    return load_file(folder / name)


def test_the_command_trains_and_writes_for_tensorboard_unless_told_otherwise(manifest, tmp_path):
    assert build_training_arguments(load_recipe("paper/contrastive")).report_to == ["tensorboard"]
    values = [value for value in QUICK if "report_to" not in value and "bf16" not in value]
    places = [f"data.root={manifest}", f"training.output_dir={tmp_path}", "training.max_steps=1"]
    result = CliRunner().invoke(app, ["train", "phantom/language", *places, *values, LANGUAGE, "--json"])
    published = tmp_path / "published"
    assert json.loads(result.stdout) == {"recipe": "phantom/language", "published": str(published)}
    assert AutoModelForCausalLM.from_pretrained(published).config.hidden_size == 32
    assert list(tmp_path.glob("runs/**/events.out.tfevents.*"))
    saved = OmegaConf.load(tmp_path / "recipe.yaml").training
    assert saved.bf16 == "auto" and saved.use_cpu  # another machine may choose


def test_a_damaged_record_of_what_came_before_is_known_before_anything_is_read(tmp_path):
    (tmp_path / "training.json").write_text("{")
    places = [f"model.start_from={tmp_path}", f"model.language_model={tmp_path}", f"data.root={tmp_path}"]
    recipe = load_recipe("phantom/projector", [*places, f"training.output_dir={tmp_path / 'run'}"])
    with pytest.raises(ValueError, match=r"training\.json: expected a JSON object"):
        run_recipe(recipe)


def test_contrastive_stage_publishes_a_dual_encoder(contrastive):
    model = AutoModel.from_pretrained(contrastive)
    processor = AutoProcessor.from_pretrained(contrastive)
    assert model.config.model_type == "dcformer_siglip" and processor.image_processor.image_size == [32, 64, 96]
    summary = json.loads((contrastive.parent / "summary.json").read_text())
    assert (
        summary["stage"] == "contrastive"
        and summary["samples_per_second"] > 0
        and 0.05 < summary["peak_memory_gib"] < 64
    )
    for name in ("recipe.yaml", "curves.png", "curves.csv", "published/README.md"):
        assert (contrastive.parent / name).stat().st_size > 0


def test_a_description_stands_alone_where_nothing_but_places_differs_and_the_batch_is_its_own():
    def told(num_devices, *overrides):
        places = ["data.root=/data/own", "data.cache=cache", "training.output_dir=/runs/1", "training.save_steps=100"]
        recipe = load_recipe("paper/contrastive", [*places, "num_devices=8", *overrides])
        recipe.changed.pop("num_devices", None)  # where the recipe itself does not say it
        arguments = SimpleNamespace(train_batch_size=64, per_device_train_batch_size=64, world_size=num_devices)
        arguments.gradient_accumulation_steps = recipe.training.get("gradient_accumulation_steps", 1)
        return describe_recipe(recipe, arguments)

    begun = "Begun from the recipe `paper/contrastive`; "
    assert told(8) == told(8, "training.learning_rate=1e-4") == "Numbers of Xin et al. 2025, Section 3.4."
    assert told(1) == f"{begun}global batch 64 instead of 512."
    changes = ("training.learning_rate=2e-4", "model.text_encoder=/data/me/bert", "training.num_train_epochs=20")
    assert told(8, *changes) == (
        f"{begun}changed: `model.text_encoder=bert`, `training.num_train_epochs=20`, `training.learning_rate=0.0002`; "
        "global batch 512."
    )
    accumulated = "changed: `training.gradient_accumulation_steps=8`; global batch 512."
    assert told(1, "training.gradient_accumulation_steps=8") == begun + accumulated


def trainer_of(recipe):
    """The trainer of a recipe as a run builds it, which is not trained."""
    arguments = build_training_arguments(recipe)
    samples = {split: read_samples(recipe.data, split) for split in splits_of(arguments)}
    return build_trainer(recipe, arguments, samples, [])


@pytest.mark.parametrize(
    "identical_reports, augmentation, rate", [("match", "laterality_safe", 1e-4), ("distinct", "original", None)]
)
def test_the_contrastive_trainer_has_what_the_recipe_says(identical_reports, augmentation, rate, manifest, tmp_path):
    num_similar = 2 if identical_reports == "match" else 0  # similar reports need it
    options = [
        f"data.identical_reports={identical_reports}",
        f"data.similar_reports={num_similar}",
        f"data.augmentation={augmentation}",
        f"text_learning_rate={'null' if rate is None else rate}",
        "training.metric_for_best_model=image_to_text_recall_at_1_of_1",  # among the validation pairs, here one
        "training.learning_rate=1e-3",
        "training.eval_strategy=epoch",
        "training.seed=3",
        "training.data_seed=7",
    ]
    trainer = trainer_of(recipe_of("contrastive", manifest, tmp_path, *CONTRASTIVE, *options))
    assert type(trainer) is ContrastiveTrainer
    assert trainer.identical_reports_match is (identical_reports == "match")
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]}
    assert rates == ({1e-3} if rate is None else {1e-3, rate})
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert train.augmentation is AUGMENTATIONS[augmentation] and validation.augmentation is None
    assert train.build_item.is_drawn and (train.build_item.draw_similar is not None) is bool(num_similar)
    assert not validation.build_item.is_drawn and validation.build_item.draw_similar is None
    assert (len(train), len(validation)) == (4, 1)
    assert train.seed == validation.seed == 3 and trainer._get_train_sampler().seed == 7
    assert trainer.data_collator.max_length == train.build_item.max_length == 400


def test_a_best_checkpoint_by_what_is_not_measured_is_refused_before_training(manifest, tmp_path):
    options = ["training.metric_for_best_model=accuracy", "training.eval_strategy=epoch"]
    with pytest.raises(
        ValueError, match="`training.metric_for_best_model` must be one of eval_loss, .*got 'accuracy'"
    ):
        trainer_of(recipe_of("language", manifest, tmp_path, LANGUAGE, *options))
    # By its form before anything is read.
    for stage, name, known in (
        ("contrastive", "accuracy", "eval_loss, eval_image_to_text_recall_at_1_of_N, .*N being"),
        ("contrastive", "chance_recall_at_1_of_5", "eval_loss, "),
        ("finetune", "eval_image_to_text_recall_at_1_of_5", "eval_loss, with or without `eval_`,"),
    ):
        recipe = Recipe(stage=stage, data=DataRecipe(root="gone"), training={"metric_for_best_model": name})
        with pytest.raises(ValueError, match=rf"`training.metric_for_best_model`: expected one of {known}.*{name}"):
            run_recipe(recipe)
    for name in ("loss", "eval_text_to_image_deduplicated_recall_at_1_of_100"):
        stages.check_best_metric(Recipe(stage="contrastive", training={"metric_for_best_model": name}))


@pytest.mark.parametrize("stage", ["projector", "finetune"])
def test_the_generation_trainer_has_what_the_recipe_says(stage, manifest, request, tmp_path):
    overrides, before = {"projector": (PROJECTOR, "contrastive"), "finetune": ((), "projector")}[stage]
    options = [
        "data.augmentation=original",
        "data.questions_per_volume=2",
        "data.tasks=[closed_vqa, open_vqa, report]",
        "data.num_validation=1",
        "training.eval_strategy=epoch",
        "training.seed=3",
        "num_answers=5",
    ]
    start_from = request.getfixturevalue(before)
    trainer = trainer_of(recipe_of(stage, manifest, tmp_path, *overrides, *options, start_from=start_from))
    assert type(trainer) is GenerationTrainer and trainer.num_answers == 5
    train, validation = trainer.train_dataset, trainer.eval_dataset
    assert train.augmentation is AUGMENTATIONS["original"] and validation.augmentation is None
    images = train.samples["image"][:]
    assert len(train) == sum(-(-images.count(image) // 2) for image in set(images)) < len(images)
    assert validation.groups is None and len(validation) == 2  # a report and a closed question
    assert train.seed == validation.seed == trainer._get_train_sampler().seed == 3
    assert trainer.data_collator.max_length == 400


def test_the_language_trainer_has_what_the_recipe_says(manifest, tmp_path):
    options = ["data.questions_per_volume=2", "data.tasks=[closed_vqa, report]", "training.eval_strategy=epoch"]
    options += ["training.seed=3", "data.num_train=5"]
    trainer = trainer_of(recipe_of("language", manifest, tmp_path, LANGUAGE, *options))
    train, validation = trainer.train_dataset, trainer.eval_dataset
    cases = train.samples["case"][:]
    assert len(cases) == 5 and len(train) == sum(-(-cases.count(case) // 2) for case in set(cases))
    assert validation.groups is None and len(validation) == 2
    assert train.seed == validation.seed == trainer._get_train_sampler().seed == 3
    assert trainer.data_collator.max_length == 400


def test_projector_stage_takes_the_encoder_and_leaves_it_as_it_is(contrastive, projector):
    before, after = tensors(contrastive), tensors(projector)
    names = [name for name in before if name.startswith("vision_model.")]
    assert len(names) > 50 and any("running_mean" in name for name in names)
    for name in names:  # weights and running statistics, to the bit
        assert torch.equal(before[name], after["model.vision_tower" + name.removeprefix("vision_model")]), name


def test_language_stage_publishes_a_plain_language_model_that_stage_2_leaves_as_it_is(
    manifest, contrastive, language, tmp_path
):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(language), AutoTokenizer.from_pretrained(language)
    assert len(tokenizer) == model.config.vocab_size and tokenizer.convert_tokens_to_ids("<image>") < len(tokenizer)
    summary = json.loads((language.parent / "summary.json").read_text())
    assert summary["stage"] == "language" and summary["trained_parameters"] == summary["all_parameters"]

    overrides = [f"model.language_model={language}", "trained=[multi_modal_projector]"]
    overrides += ["model.projector={low_level_tokens: [6, 5], high_level_tokens: [2, 3]}"]
    published = run_recipe(recipe_of("projector", manifest, tmp_path, *overrides, start_from=contrastive))
    before, after = tensors(language), tensors(published)
    names = [name for name in before if name.startswith("model.")]
    assert len(names) > 20
    for name in names:
        assert torch.equal(before[name], after["model.language_model" + name.removeprefix("model")]), name


def test_paper_stage_2_changes_the_projector_alone(manifest, projector, tmp_path):
    published = run_recipe(recipe_of("projector", manifest, tmp_path, NO_LANGUAGE_MODEL, start_from=projector))
    before, after = tensors(projector), tensors(published)
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"multi_modal_projector"}
    summary = json.loads((tmp_path / "summary.json").read_text())
    in_projector = sum(tensor.numel() for name, tensor in before.items() if "multi_modal_projector" in name)
    assert summary["trained_parameters"] == in_projector < summary["all_parameters"]


def test_finetuning_changes_adapters_and_projector_alone(manifest, projector, tmp_path):
    """Also of what no adapter file holds: the other weights, and the statistics of batches."""
    recipe = recipe_of("finetune", manifest, tmp_path, "training.save_strategy=no", start_from=projector)
    samples = {"train": read_samples(recipe.data, "train")}
    trainer = build_trainer(recipe, build_training_arguments(recipe), samples, [])
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in changed if "lora_" in name}
    assert adapters and changed > adapters
    assert all("multi_modal_projector.modules_to_save" in name for name in changed - adapters)


def test_activation_checkpointing_changes_no_loss(manifest, projector, finetuned, tmp_path):
    run_recipe(recipe_of("finetune", manifest, tmp_path, "training.gradient_checkpointing=true", start_from=projector))
    assert losses(tmp_path) == pytest.approx(losses(finetuned.parent), rel=1e-5)


def test_finetuning_changes_adapters_and_projector_and_merges(projector, finetuned, tmp_path):
    adapter = tensors(finetuned, "adapter_model.safetensors")
    assert all("lora_" in name or "multi_modal_projector" in name for name in adapter)
    assert any(bool(tensor.abs().sum() > 0) for name, tensor in adapter.items() if "lora_B" in name)
    merged = Path(merge_adapter(finetuned, tmp_path / "merged"))
    before, after = tensors(projector), tensors(merged)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[1] for name in changed} == {"multi_modal_projector", "language_model"}
    assert all("_proj.weight" in name for name in changed if "language_model" in name)

    whole, adapted = (AutoModelForImageTextToText.from_pretrained(place).eval() for place in (merged, finetuned))
    processor = AutoProcessor.from_pretrained(finetuned)
    text = processor.image_token + "\nWhat is it?"
    inputs = processor(images=torch.rand(40, 50, 60), text=text, return_tensors="pt")
    torch.testing.assert_close(whole(**inputs).logits, adapted(**inputs).logits, atol=1e-5, rtol=1e-4)


def test_cards_say_what_was_changed_and_every_published_folder_has_the_record(
    manifest, contrastive, projector, language, tmp_path
):
    recipe = recipe_of("finetune", manifest, tmp_path / "run", "training.learning_rate=2e-4", start_from=projector)
    adapter = run_recipe(recipe)
    merged = Path(merge_adapter(adapter, tmp_path / "merged"))
    for folder in (adapter, merged):
        card = (folder / "README.md").read_text()
        assert "Begun from the recipe `phantom/finetune`; changed: " in card and "; global batch 2." in card
        assert "`training.learning_rate=0.0002`" in card and "Phantoms, for a laptop" not in card
        assert "recipe.yaml" not in card and "`training.json` has the settings" in card
    records = {folder: (folder / "training.json").read_text() for folder in (contrastive, language, adapter, merged)}
    assert not any(str(tmp_path.parent) in text or "manifest" in text for text in records.values())
    assert records[merged] == records[adapter]
    assert json.loads(records[language])["settings"]["stage"] == "language"
    record = json.loads(records[adapter])
    assert (record["settings"]["recipe"], record["settings"]["batch_size"]) == ("phantom/finetune", 2)
    assert record["settings"]["training"]["learning_rate"] == 2e-4
    assert record["settings"]["content"]["model.start_from"].keys() == {"model.safetensors"}
    before = record["before"]["start_from"]
    assert before["settings"]["stage"] == "projector"
    assert before["before"]["start_from"] == json.loads(records[contrastive])


def test_merging_refuses_what_does_not_fit(finetuned, projector, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no adapter_config.json. A whole model needs no merge"):
        merge_adapter(projector, tmp_path / "merged")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in finetuned.iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    from safetensors.torch import save_file

    weights = tensors(finetuned, "adapter_model.safetensors")
    lost = next(name for name in weights if "lora_A" in name)
    save_file({name: tensor for name, tensor in weights.items() if name != lost}, broken / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 missing: .*lora_A"):
        merge_adapter(broken, tmp_path / "merged")
    (broken / "adapter_model.safetensors").write_bytes((finetuned / "adapter_model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match="weights are damaged or cut short"):
        merge_adapter(broken, tmp_path / "merged")
    settings = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "gone/away/base"}))
    with pytest.raises(FileNotFoundError, match="'gone/away/base' is not there"):
        merge_adapter(broken, tmp_path / "merged")


def test_questions_that_share_a_volume_give_the_gradients_of_questions_one_by_one(manifest, projector, tmp_path):
    """All questions of the study in one step, without augmentation: the same loss, and the same step. Two share a scan."""
    runs = {}
    for number, batch_size in ((1, 50), (8, 50)):
        overrides = [
            NO_LANGUAGE_MODEL,
            f"data.questions_per_volume={number}",
            f"training.per_device_train_batch_size={batch_size}",
            "data.augmentation=none",
            "data.tasks=[closed_vqa, open_vqa, yes_no_vqa]",  # a request for a report is drawn
            "training.optim=sgd",
            "training.warmup_steps=0",
        ]
        place = tmp_path / str(number)
        runs[number] = run_recipe(
            recipe_of("projector", manifest, place, *overrides, start_from=projector, max_steps=1)
        )
    summaries = {number: json.loads((place.parent / "summary.json").read_text()) for number, place in runs.items()}
    assert summaries[1]["num_train_samples"] == summaries[8]["num_train_samples"] > 1
    speeds = summaries[8]["samples_per_second"] / summaries[8]["train"]["train_samples_per_second"]
    assert speeds == pytest.approx(5 / 4)  # questions and volumes
    assert summaries[8]["train"]["train_loss"] == pytest.approx(summaries[1]["train"]["train_loss"], rel=1e-5)
    start, one, shared = tensors(projector), tensors(runs[1]), tensors(runs[8])
    moved = {name: one[name] - start[name] for name in start}
    largest = max(float(value.abs().max()) for value in moved.values())
    assert largest > 0
    for name, value in moved.items():
        torch.testing.assert_close(shared[name] - start[name], value, rtol=1e-3, atol=1e-3 * largest, msg=name)


def test_attention_without_a_mask_for_every_token_is_refused():
    model = build_tiny_model()[0]
    check_attention(model, 100)
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'qwen2' has the attention 'flash_attention_2', not 'sdpa'"):
        check_attention(model, 100)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        (
            {"model_type": "gemma3_text", "sliding_window": 64},
            "a window of 64 tokens, less than `data.max_text_length` 100",
        ),
        ({"model_type": "mistral", "sliding_window": 64}, "a window of 64 tokens"),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}, "carry a state from token to token"),
        ({"model_type": "gemma3_text", "sliding_window": 128}, None),
        ({"model_type": "llama"}, None),
    ],
)
def test_layers_that_do_not_keep_to_the_mask_are_refused(fields, fault):
    sizes = {
        "vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**{**sizes, **fields}))
    if fault is None:
        check_attention(model, 100)
        return
    with pytest.raises(ValueError, match=fault):
        check_attention(model, 100)


def losses(output_dir):
    states = sorted(output_dir.glob("checkpoint-*/trainer_state.json"), key=lambda path: int(path.parent.name[11:]))
    return [entry["loss"] for entry in json.loads(states[-1].read_text())["log_history"] if "loss" in entry]


def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(manifest, projector, tmp_path):
    """Prompts, augmentation and order depend on seed, epoch and sample, so the losses are equal to the bit."""
    # Two steps an epoch: what is left after the damage goes on in the middle of the fourth.
    whole = recipe_of("projector", manifest, tmp_path / "whole", NO_LANGUAGE_MODEL, start_from=projector, max_steps=8)
    run_recipe(whole)
    first = recipe_of("projector", manifest, tmp_path / "parts", NO_LANGUAGE_MODEL, start_from=projector, max_steps=8)
    from med3dvlm.train import stages

    real, calls = stages.publish_result, []

    def fail_at_first(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    stages.publish_result = fail_at_first
    try:
        with pytest.raises(KeyboardInterrupt):
            run_recipe(first)
        # What a kill leaves: the newest checkpoint damaged, no result.
        (tmp_path / "parts" / "checkpoint-8" / "optimizer.pt").unlink()
        assert run_recipe(first) == tmp_path / "parts" / "published"
    finally:
        stages.publish_result = real
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 8
    one, other = (tensors(tmp_path / name / "published") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_finished_run_is_not_repeated_and_another_recipe_is_refused(manifest, projector, caplog):
    output_dir = projector.parent
    start_from = OmegaConf.load(output_dir / "recipe.yaml").model.start_from
    time_of_result = (projector / "model.safetensors").stat().st_mtime_ns
    recipe = recipe_of("projector", manifest, output_dir, *PROJECTOR, start_from=start_from)
    assert run_recipe(recipe) == projector
    # As an earlier version of the package wrote it, which did not have these fields.
    summary = json.loads((output_dir / "summary.json").read_text())
    del summary["settings"]["data"]["similar_reports"], summary["settings"]["text_learning_rate"]
    (output_dir / "summary.json").write_text(json.dumps(summary))
    assert run_recipe(recipe) == projector
    assert (projector / "model.safetensors").stat().st_mtime_ns == time_of_result
    recipe.data.cache = str(output_dir / "cache")
    with pytest.raises(ValueError, match=r"finished run with other settings \(data.is_cached\)"):
        run_recipe(recipe)
    recipe.data.cache, recipe.training["learning_rate"] = None, 1.0
    with pytest.raises(ValueError, match=r"finished run with other settings \(training.learning_rate\)"):
        run_recipe(recipe)


@pytest.mark.parametrize(
    "stage, cache, cache_dtype, is_cached",
    [
        ("projector", "cache", "float16", True),
        ("projector", None, "float16", False),
        ("projector", "cache", "float32", False),
        ("language", "cache", "float16", False),
    ],
)
def test_a_cache_that_rounds_is_part_of_a_run(stage, cache, cache_dtype, is_cached):
    recipe = Recipe(stage=stage, data=DataRecipe(cache=cache, cache_dtype=cache_dtype))
    assert fixed_settings(recipe)["data"]["is_cached"] is is_cached


@pytest.mark.parametrize("split", ["train", "validation"])
def test_broken_volumes_stop_or_are_left_out_and_listed(split, manifest, tmp_path):
    folder = shutil.copytree(manifest.parent, tmp_path / "study")
    copy = folder / manifest.name
    with copy.open("a") as file:
        file.write("scan_4.nii.gz,case_6,validation,Clear lungs.,,,,,\n")
    victim = Path(read_samples(recipe_of("contrastive", copy, tmp_path / "x").data, split)[0]["image"])
    victim.write_bytes(victim.read_bytes()[:200])
    options = (*CONTRASTIVE, "training.eval_strategy=epoch")
    with pytest.raises(ValueError, match="truncated or damaged"):
        run_recipe(recipe_of("contrastive", copy, tmp_path / "stop", *options))
    cache = f"data.cache={tmp_path / 'cache'}"
    with pytest.raises(ValueError, match="1 of 5 volumes cannot be read.*truncated or damaged"):
        run_recipe(recipe_of("contrastive", copy, tmp_path / "read_ahead", *options, cache))
    assert not list((tmp_path / "read_ahead").glob("checkpoint-*"))
    run_recipe(recipe_of("contrastive", copy, tmp_path / "skip", *options, "data.skip_broken=true"))
    rows = [json.loads(line) for line in (tmp_path / "skip" / "skipped.jsonl").read_text().splitlines()]
    assert [row["image"] for row in rows] == [victim.name] and "damaged" in rows[0]["reason"]


def test_missing_volumes_and_rows_without_a_text_stop_or_are_left_out_and_listed(manifest, tmp_path):
    folder = shutil.copytree(manifest.parent, tmp_path / "study")
    copy, whole = folder / manifest.name, manifest.read_text()
    copy.write_text(whole + "scan_9.nii.gz,case_9,train,A mass.,,,,,\n")
    with pytest.raises(FileNotFoundError, match=r"1 of the 5 scans .* row 13.*data\.skip_broken=true"):
        run_recipe(recipe_of("contrastive", copy, tmp_path / "stop", *CONTRASTIVE))
    without_text = "scan_4.nii.gz,case_4,train,,Where is it?,,,,\n"
    copy.write_text(whole + without_text)
    with pytest.raises(ValueError, match=r"1 empty texts .* row 13 .*data\.skip_broken=true"):
        read_samples(DataRecipe(root=str(copy), tasks=["report"]), "train")

    copy.write_text(whole + without_text + "scan_9.nii.gz,case_9,train,A mass.,,,,,\n")
    recipe = recipe_of("contrastive", copy, tmp_path / "skip", *CONTRASTIVE, "data.skip_broken=true")
    published, listing = run_recipe(recipe), tmp_path / "skip" / "skipped.jsonl"
    text, missing = map(json.loads, listing.read_text().splitlines())
    assert text == {"source": "manifest.csv", "row": "row 13", "column": "answer", "reason": "empty text"}
    assert missing["image"] == "scan_9.nii.gz" and missing["reason"]
    # A run that goes on leaves out the same ones, though one is there now.
    shutil.copy(folder / "scan_1.nii.gz", folder / "scan_9.nii.gz")
    shutil.rmtree(published)
    (tmp_path / "skip" / "summary.json").unlink()
    run_recipe(recipe)
    assert json.loads((tmp_path / "skip" / "summary.json").read_text())["num_train_samples"] == 4
    assert len(listing.read_text().splitlines()) == 2
    # The stage in words alone reads no volume.
    (folder / "scan_9.nii.gz").unlink()
    run_recipe(recipe_of("language", copy, tmp_path / "words", LANGUAGE, "data.skip_broken=true"))
    assert list(map(json.loads, (tmp_path / "words" / "skipped.jsonl").read_text().splitlines())) == [text]


def test_a_second_start_of_a_run_that_is_at_work_is_refused(manifest, tmp_path):
    recipe = recipe_of("language", manifest, tmp_path, LANGUAGE)
    half_written = tmp_path / "checkpoint-1"
    half_written.mkdir()
    with only_run_in(tmp_path), pytest.raises(BlockingIOError, match="another run is at work in this folder"):
        run_recipe(recipe)
    assert half_written.exists()
    half_written.rmdir()
    run_recipe(recipe)


def test_how_often_a_run_is_saved_may_change(manifest, tmp_path):
    """Also of a run that an earlier version began, which kept the strategy among what must stay."""
    recipe = recipe_of("language", manifest, tmp_path, LANGUAGE)
    run_recipe(recipe)
    summary = json.loads((tmp_path / "summary.json").read_text())
    summary["settings"]["training"]["save_strategy"] = "epoch"
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert run_recipe(recipe) == tmp_path / "published"
    recipe.training["save_strategy"] = "no"
    assert run_recipe(recipe) == tmp_path / "published"


def test_what_helps_against_a_validation_that_needs_too_much_memory_may_change(manifest, tmp_path):
    """Also of a run that an earlier version began; not where a checkpoint or a rate is chosen by the scores."""
    recipe = recipe_of("language", manifest, tmp_path, LANGUAGE)
    run_recipe(recipe)
    summary = json.loads((tmp_path / "summary.json").read_text())
    settings = summary["settings"]
    assert "num_answers" not in settings and "per_device_eval_batch_size" not in settings["training"]
    settings["num_answers"], settings["training"]["per_device_eval_batch_size"] = 4, 8
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    recipe.num_answers = 0
    recipe.training |= {"eval_accumulation_steps": 1, "torch_empty_cache_steps": 5, "ddp_timeout": 7200}
    recipe.training["per_device_eval_batch_size"] = 2
    assert run_recipe(recipe) == tmp_path / "published"
    chosen = (
        {"metric_for_best_model": "loss"},
        {"load_best_model_at_end": True},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    )
    for training in chosen:
        recipe = Recipe(training={"per_device_eval_batch_size": 2, **training})
        assert fixed_settings(recipe)["training"] == recipe.training


def test_what_is_published_was_not_rounded_by_the_last_validation(manifest, tmp_path):
    options = ("training.bf16_full_eval=true", "training.eval_strategy=steps", "training.eval_steps=2")
    published = run_recipe(recipe_of("language", manifest, tmp_path, LANGUAGE, *options))
    before, after = tensors(tmp_path / "checkpoint-2"), tensors(published)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert any(not torch.equal(value, value.bfloat16().float()) for value in after.values())
    assert json.loads((tmp_path / "summary.json").read_text())["validation"]["eval_loss"] > 0


def test_a_run_that_ends_with_its_best_checkpoint_says_which_and_draws_what_was(manifest, tmp_path):
    options = ["eval_strategy=steps", "eval_steps=1", "load_best_model_at_end=true", "learning_rate=0.01"]
    options += ["greater_is_better=true", "warmup_steps=0"]  # the loss falls, so that of the first step is taken
    run_recipe(recipe_of("language", manifest, tmp_path, LANGUAGE, *(f"training.{option}" for option in options)))
    summary = json.loads((tmp_path / "summary.json").read_text())
    table = [line.split(",") for line in (tmp_path / "curves.csv").read_text().splitlines()]
    first, last = (float(row[table[0].index("eval_loss")]) for row in table[1:])
    assert summary["best_step"] == 1 and summary["validation"]["eval_loss"] == pytest.approx(first, rel=1e-5)
    assert last < first


def test_a_broken_volume_in_the_first_process_ends_the_others_and_is_listed_by_it_alone(tmp_path, monkeypatch):
    """As the first process goes about it, and then another one, which hears from the first what [`done_by_first_process`] tells."""
    told, num_read = [], []

    class Broken:
        def load(self, path):
            num_read.append(path)
            if path == "1":
                raise ValueError("damaged")
            return torch.zeros(1)

    def first(action):
        try:
            told.append(action())
        except ValueError as error:
            told.append(error)
            raise
        return told[-1]

    def other(action):
        if isinstance(found := told.pop(0), ValueError):
            raise ValueError(f"The first process failed: ValueError: {found}")
        return json.loads(json.dumps(found))

    arguments = SimpleNamespace(output_dir=str(tmp_path), disable_tqdm=True)
    samples = {"train": stage_program.make_samples(3)}
    for process, begins in ((first, "1 of 3"), (other, "The first process failed: ValueError: 1 of 3")):
        monkeypatch.setattr(stages, "done_by_first_process", process)
        with pytest.raises(ValueError, match=rf"^{begins} volumes cannot be read, the first is 1: damaged"):
            read_ahead(DataRecipe(cache="cache"), arguments, samples, Broken())
        kept = read_ahead(DataRecipe(skip_broken=True), arguments, samples, Broken())
        assert list(kept["train"]["image"]) == ["0", "2"]
        if process is first:
            assert num_read
            num_read.clear()
            (tmp_path / "skipped.jsonl").unlink()
    assert not num_read and not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_data_publishes_nothing(manifest, tmp_path):
    options = (*CONTRASTIVE, "training.per_device_train_batch_size=32")
    recipe = recipe_of("contrastive", manifest, tmp_path, *options)
    assert recipe.training["dataloader_drop_last"]
    with pytest.raises(ValueError, match=r"at least 32 training samples .*, got 4: `dataloader_drop_last`"):
        run_recipe(recipe)
    assert not (tmp_path / "published").exists() and not (tmp_path / "summary.json").exists()


@pytest.mark.parametrize(
    "strategy, fault",
    [("steps", "at step 3 or shortly before: the loss is (nan|inf)"), ("no", "weights or statistics")],
)
def test_a_training_that_diverges_publishes_nothing(strategy, fault, manifest, tmp_path):
    options = [
        "learning_rate=1e30",
        "max_grad_norm=0",
        "warmup_steps=0",
        "save_strategy=no",
        f"logging_strategy={strategy}",
    ]
    options = [f"training.{option}" for option in options]
    recipe = recipe_of("language", manifest, tmp_path, LANGUAGE, *options, "training.logging_steps=3", max_steps=3)
    with pytest.raises(
        ValueError, match=rf"training diverged.* {fault}.* not finite.*smaller training\.learning_rate"
    ):
        run_recipe(recipe)
    assert not any((tmp_path / name).exists() for name in ("published", "_result", "summary.json"))


@pytest.mark.parametrize("fp16", [False, True])
def test_a_lost_loss_is_hidden_in_float16_alone_whose_scale_leaves_out_single_steps(fp16, tmp_path):
    recipe = Recipe(training={"output_dir": str(tmp_path), "fp16": fp16, "use_cpu": True})
    assert build_training_arguments(recipe).logging_nan_inf_filter is fp16


def test_a_summary_is_json_whatever_is_not_known(manifest, tmp_path, monkeypatch):
    """As on Windows, which does not tell the peak of memory."""
    monkeypatch.setattr(stages, "resource", None)
    run_recipe(recipe_of("language", manifest, tmp_path, LANGUAGE, max_steps=1))
    text = (tmp_path / "summary.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["peak_memory_gib"] is None


def test_a_training_that_ends_early_publishes_nothing(manifest, tmp_path, monkeypatch):
    def end_early(trainer, checkpoint):
        trainer.args.max_steps = 1
        output = trainer.train()
        trainer.state.max_steps = 2
        return output

    monkeypatch.setattr(stages, "train_or_finish", end_early)
    with pytest.raises(RuntimeError, match="training ended at step 1 of 2, so nothing is published"):
        run_recipe(recipe_of("language", manifest, tmp_path, LANGUAGE))
    assert not (tmp_path / "published").exists() and not (tmp_path / "summary.json").exists()


def test_other_data_or_weights_behind_the_same_paths_are_another_run(manifest, language, tmp_path):
    study = shutil.copytree(manifest.parent, tmp_path / "study") / manifest.name
    start = shutil.copytree(language, tmp_path / "start")
    recipe = recipe_of("language", study, tmp_path / "run", f"model.language_model={start}")
    published = run_recipe(recipe)
    assert run_recipe(recipe) == published

    def refused(key):
        with pytest.raises(ValueError, match=rf"finished run with other settings \({key}\)"):
            run_recipe(recipe)
        (tmp_path / "run" / "summary.json").rename(tmp_path / "summary.json")
        with pytest.raises(
            ValueError, match=rf"checkpoint-2 was written by a run with other settings \({key}: expected"
        ):
            run_recipe(recipe)
        (tmp_path / "summary.json").rename(tmp_path / "run" / "summary.json")

    text = study.read_text()
    study.write_text(text.replace("A nodule in the left lung", "A mass in the left lung"))
    refused(r"content\.data\.root\.train")
    study.write_text(text)
    weights = start / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused(r"content\.model\.language_model\.model\.safetensors")


def test_a_study_may_be_moved(manifest, tmp_path):
    def content(place):
        recipe = recipe_of("contrastive", place, tmp_path)
        return describe_content(recipe, {"train": read_samples(recipe.data, "train")})

    moved = shutil.copytree(manifest.parent, tmp_path / "elsewhere") / manifest.name
    assert content(moved) == content(manifest)
    renamed = moved.read_text().replace("scan_1", "other")
    (moved.parent / "scan_1.nii.gz").rename(moved.parent / "other.nii.gz")
    moved.write_text(renamed)
    assert content(moved) != content(manifest)


def test_a_finished_run_stays_finished_where_study_and_run_are_moved(manifest, tmp_path, monkeypatch):
    run_recipe(recipe_of("language", manifest, tmp_path / "run", LANGUAGE))
    moved = shutil.copytree(manifest.parent, tmp_path / "elsewhere")
    (tmp_path / "run").rename(tmp_path / "runs")
    monkeypatch.setattr(stages, "build_trainer", lambda *arguments: pytest.fail("trained again"))
    # The folder of a manifest serves as well as the file.
    for root in (moved / manifest.name, moved):
        assert run_recipe(recipe_of("language", root, tmp_path / "runs", LANGUAGE)) == tmp_path / "runs" / "published"


def test_validation_samples_of_a_manifest_are_limited_for_each_task(manifest, tmp_path):
    data = DataRecipe(root=str(manifest), tasks=["closed_vqa", "report", "yes_no_vqa"], num_validation=1)
    assert list(read_samples(data, "validation")["task"]) == ["closed_vqa", "report", "yes_no_vqa"]
    data.num_validation = 512
    assert len(read_samples(data, "validation")) == 3 and len(read_samples(data, "train")) == 8


def test_training_samples_are_drawn_from_all_and_the_same_each_time(manifest):
    data = DataRecipe(root=str(manifest), tasks=["closed_vqa", "report", "yes_no_vqa"], num_train=4)
    whole = read_samples(dataclasses.replace(data, num_train=None), "train")
    drawn = read_samples(data, "train")
    assert drawn.to_list() == read_samples(data, "train").to_list() == whole.shuffle(seed=0).to_list()[:4]
    assert drawn.to_list() != whole.to_list()[:4] and len(read_samples(data, "validation")) == 3
    data.num_train = 100
    all_rows = [sorted(map(repr, samples)) for samples in (read_samples(data, "train"), whole)]
    assert all_rows[0] == all_rows[1]


def test_a_task_named_twice_is_learnt_from_twice_and_validated_once(manifest):
    data = DataRecipe(root=str(manifest), tasks=["report", "closed_vqa", "closed_vqa"])
    for split, times in {"train": 2, "validation": 1}.items():
        once = read_samples(dataclasses.replace(data, tasks=["closed_vqa"]), split)
        twice = read_samples(data, split)
        assert len(once) and list(twice["task"]).count("closed_vqa") == times * len(once)


@pytest.mark.parametrize("rows", ["", "a.nii.gz,,Where?,Left.,validation\n"])
def test_data_without_validation_cases_say_how_to_train_without_them(rows, tmp_path):
    (tmp_path / "a.nii.gz").touch()
    manifest = tmp_path / "own.csv"
    manifest.write_text(f"image,report,question,answer,split\na.nii.gz,Normal.,,,train\n{rows}")
    with pytest.raises(ValueError, match=r"split '?validation.* training\.eval_strategy=no\.$"):
        read_samples(DataRecipe(root=str(manifest), tasks=["report"]), "validation")


def test_a_language_model_in_bfloat16_stays_so(manifest, contrastive, language, tmp_path):
    """What is published, and what `dtype="auto"` makes of it and of a checkpoint, is in the language model's precision."""
    tokenizer_and_model = shutil.copytree(language, tmp_path / "language")
    AutoModelForCausalLM.from_pretrained(language, dtype=torch.bfloat16).save_pretrained(tokenizer_and_model)
    again = recipe_of(
        "language", manifest, tmp_path / "again", f"model.language_model={tokenizer_and_model}", "model.dtype=bfloat16"
    )
    trainer = build_trainer(again, build_training_arguments(again), {"train": read_samples(again.data, "train")}, [])
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}  # what is trained
    overrides = [f"model.language_model={tokenizer_and_model}", "model.dtype=bfloat16", "training.bf16=true"]
    overrides += ["trained=[multi_modal_projector]", PROJECTOR[-1]]
    output = tmp_path / "projector"
    published = run_recipe(recipe_of("projector", manifest, output, *overrides, start_from=contrastive))
    saved = tensors(output / "checkpoint-2")
    assert {tensor.dtype for name, tensor in saved.items() if "projector" in name} == {torch.float32}
    assert {tensor.dtype for name, tensor in tensors(published).items() if tensor.is_floating_point()} == {
        torch.bfloat16
    }
    for place in (published, output / "checkpoint-2"):
        assert json.loads((place / "config.json").read_text())["dtype"] == "bfloat16"
        loaded = AutoModelForImageTextToText.from_pretrained(place, dtype="auto")
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}

    overrides = ["model.dtype=bfloat16", "training.bf16=true"]
    # A projector in float32 between an encoder and a language model in bfloat16 also is to validate and answer.
    overrides += ["training.eval_strategy=steps", "training.eval_steps=1", "num_answers=1"]
    adapter = run_recipe(recipe_of("finetune", manifest, tmp_path / "finetune", *overrides, start_from=published))
    assert {tensor.dtype for tensor in tensors(adapter, "adapter_model.safetensors").values()} == {torch.float32}
    merged = tensors(Path(merge_adapter(adapter, tmp_path / "merged")))
    assert {tensor.dtype for tensor in merged.values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_validation_writes_scores_and_answers(manifest, projector, tmp_path):
    overrides = ("training.eval_strategy=steps", "training.eval_steps=1", "num_answers=2")
    run_recipe(recipe_of("finetune", manifest, tmp_path, *overrides, start_from=projector))
    rows = [json.loads(line) for line in (tmp_path / "answers" / "step-00000002.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and set(rows[0]) == {"task", "question", "expected", "answer"}
    assert json.loads((tmp_path / "summary.json").read_text())["validation"]["eval_loss"] > 0


def test_a_word_piece_tokenizer_is_the_same_each_time():
    """Processes that train one each, and a run that is resumed, must number the same tokens alike."""
    texts = [
        "Nodules in both lungs, kidneys normal.",
        "A cyst of the liver. No fracture.",
        "Clear lungs; a large mass.",
    ]
    vocabularies = [train_word_piece_tokenizer(texts, 70).get_vocab() for _ in range(5)]
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)
    assert sorted(vocabularies[0].values()) == list(range(70)) and vocabularies[0]["[PAD]"] == 0
    tokenizer = train_word_piece_tokenizer(texts, 200)
    assert tokenizer.unk_token_id not in tokenizer(" ".join(texts))["input_ids"]
    assert len(tokenizer.all_special_tokens) == 5


@pytest.mark.parametrize("zero", [{"stage": 3}, {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}])
def test_shared_out_weights_that_could_not_be_published_are_refused(zero, tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    with pytest.raises(ValueError, match="mine.json: expected `stage3_gather_16bit_weights_on_model_save: true`"):
        read_deepspeed_config(str(path), bf16=False)
    path.write_text(json.dumps({"zero_optimization": {**zero, "stage": 2}}))
    assert read_deepspeed_config(str(path), bf16=False)["zero_optimization"]["stage"] == 2


def test_a_deepspeed_configuration_may_stand_in_the_recipe_and_is_checked_alike():
    given = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}}
    with pytest.raises(
        ValueError, match="`training.deepspeed`: expected `stage3_gather_16bit_weights_on_model_save: true`"
    ):
        read_deepspeed_config(given, bf16=True)
    with pytest.raises(ValueError, match="expected `stage3_gather_16bit_weights_on_model_save: true`"):
        build_training_arguments(
            load_recipe("paper/contrastive", ["training.deepspeed={zero_optimization: {stage: 3}}"])
        )
    given["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    config = read_deepspeed_config(given, bf16=True)
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"} and config["bf16"] == {"enabled": False}
    assert given["bf16"] == {"enabled": "auto"} and "torch_autocast" not in given
    for bf16 in (False, True):
        with pytest.raises(ValueError, match="the `dtype` \"bfloat16\" in `torch_autocast`, got 'float16'"):
            read_deepspeed_config({"torch_autocast": {"enabled": True, "dtype": "float16"}}, bf16=bf16)
    own = {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear"]}}
    autocast = {"enabled": True, "dtype": "bfloat16", **own["torch_autocast"]}
    assert read_deepspeed_config(own, bf16=True)["torch_autocast"] == autocast
    assert not uses_deepspeed_autocast(read_deepspeed_config(own, bf16=False))


def test_a_rate_of_the_text_encoder_needs_an_optimizer_that_is_not_deepspeeds():
    options = ["text_learning_rate=1e-5", "training.deepspeed={optimizer: {type: AdamW}}"]
    with pytest.raises(
        ValueError, match="Leave `optimizer` out of the DeepSpeed configuration, or set text_learning_rate=null"
    ):
        build_training_arguments(load_recipe("paper/contrastive", options))


def test_a_deepspeed_configuration_is_a_part_of_a_run_by_its_content(tmp_path, monkeypatch):
    def settings(source):
        recipe = Recipe(training={"deepspeed": str(source)})
        return stages.without_places({**fixed_settings(recipe), "content": {}})

    path, moved = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text('{"zero_optimization": {"stage": 2}}')
    shutil.copy(path, moved)
    monkeypatch.setenv("HOME", str(tmp_path))
    now = settings(path)
    assert now == settings(moved) == settings("~/a.json") and "a.json" not in json.dumps(now)
    # As an earlier version wrote it, the place of the file; one that is gone is not known.
    for source in (moved, tmp_path / "gone.json"):
        assert stages.bring_up_to_date({**now, "training": {"deepspeed": str(source)}}, now) == now
    path.write_text('{"zero_optimization": {"stage": 1}}')
    assert differing_keys(now, settings(path)) == ["training.deepspeed.zero_optimization.stage"]
    # What changes no number, such as where it is reported to, is free and not written down.
    path.write_text('{"zero_optimization": {"stage": 2, "reduce_bucket_size": 5}, "wandb": {"team": "a"}}')
    assert settings(path) == now == stages.bring_up_to_date(now, now)
    # One of the package goes by its name, and so does what says the same.
    packaged = settings("zero2")
    assert packaged["training"]["deepspeed"] == "zero2"
    path.write_text(json.dumps(stages.load_deepspeed_config("zero2")[1] | {"steps_per_print": 7}))
    assert settings(path) == packaged
    path.write_text("{")
    for source in ("zero2", stages.load_deepspeed_config("zero2")[1], str(path)):
        before = {**packaged, "training": {"deepspeed": source}}
        assert stages.bring_up_to_date(before, packaged) == packaged


@pytest.mark.parametrize(
    "content, fault",
    [
        ("{", "mine.json: expected a DeepSpeed configuration in JSON, got "),
        ("[]", "mine.json: expected a DeepSpeed configuration, a mapping, got list"),
        (
            '{"torch_autocast": null}',
            "mine.json: expected a mapping as `torch_autocast`, or to be without it, got None",
        ),
        (True, r"`training.deepspeed`: expected a JSON file, one of zero2, zero3, or a mapping, got True"),
        ("gone", "'gone': expected a JSON file, or one of this package: zero2, zero3"),
    ],
)
def test_what_is_no_deepspeed_configuration_is_refused(content, fault, tmp_path):
    source = content
    if isinstance(content, str) and content != "gone":
        source = tmp_path / "mine.json"
        source.write_text(content)
        source = str(source)
    with pytest.raises((ValueError, FileNotFoundError), match=fault):
        read_deepspeed_config(source, bf16=True)


def test_bfloat16_under_deepspeed_is_its_autocast():
    config = read_deepspeed_config("zero2", bf16=True)
    assert config["bf16"] == {"enabled": False}
    # No layer's gradients are summed in less than float32.
    autocast = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert config["torch_autocast"] == autocast and uses_deepspeed_autocast(config)
    assert read_deepspeed_config("zero3", bf16=True)["torch_autocast"] == autocast
    plain = read_deepspeed_config("zero2", bf16=False)
    assert "enabled" not in plain["torch_autocast"] and not uses_deepspeed_autocast(plain)
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    arguments = build_training_arguments(load_recipe("paper/contrastive"))
    assert arguments.bf16 is False and uses_deepspeed_autocast(arguments.deepspeed)


@pytest.mark.parametrize("name", ["fp16", "fp16_full_eval", "bf16_full_eval"])
def test_float16_under_deepspeed_is_refused_before_anything_is_read(name):
    recipe = load_recipe("paper/contrastive", [f"training.{name}=true", "training.deepspeed=nowhere.json"])
    assert recipe.training["bf16"]
    message = rf"`bf16: true` or float32, got `training.{name}`.*Set training.{name}=false and training.bf16=true"
    with pytest.raises(ValueError, match=message):
        build_training_arguments(recipe)


@pytest.mark.parametrize(
    "options, expected",
    [
        ([], 2),
        (["training.metric_for_best_model=loss"], 3),
        (["training.metric_for_best_model=loss", "training.save_total_limit=5"], 5),
        (["training.save_total_limit=null"], None),
    ],
)
def test_the_best_checkpoint_is_kept_beside_the_last_two(options, expected):
    recipe = load_recipe("phantom/language", ["data.root=data", "training.bf16=false", *options])
    assert build_training_arguments(recipe).save_total_limit == expected


def run_in_two_processes(recipe):
    """The published folder of a recipe that two processes run; whatever they publish is loaded by one."""
    folder = Path(recipe.training["output_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, folder / "given.yaml")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests" / "train" / "stage_program.py"), "recipe", str(folder / "given.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT / "tests")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert (folder / "summary.json").exists(), result.stderr[-3000:]
    return folder / "published"


@pytest.mark.slow
def test_zero_3_trains_publishes_and_resumes_every_stage(manifest, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    options = ("training.per_device_train_batch_size=1", "num_answers=1")
    vision = VISION.replace("depths", "sync_batch_norm: true, depths")
    stages = {
        "contrastive": (*CONTRASTIVE, vision),
        "projector": PROJECTOR,
        "finetune": ("training.eval_strategy=steps", "training.eval_steps=2"),
    }
    start_from = None
    for stage, overrides in stages.items():
        places = {name: tmp_path / stage / name for name in ("ddp", "zero3")}
        recipes = {
            name: recipe_of(stage, manifest, place, *options, *overrides, start_from=start_from)
            for name, place in places.items()
        }
        recipes["zero3"].training["deepspeed"] = "zero3"
        published = {name: run_in_two_processes(recipe) for name, recipe in recipes.items()}
        assert losses(places["zero3"]) == pytest.approx(losses(places["ddp"]), abs=1e-4)
        name = "adapter_model.safetensors" if stage == "finetune" else "model.safetensors"
        before, expected = (tensors(published[kind], name) for kind in ("zero3", "ddp"))
        assert {key: value.shape for key, value in before.items()} == {k: v.shape for k, v in expected.items()}

        shutil.rmtree(published["zero3"])
        shutil.rmtree(places["zero3"] / "checkpoint-2")
        (places["zero3"] / "summary.json").unlink()
        after = tensors(run_in_two_processes(recipes["zero3"]), name)
        assert all(torch.equal(before[key], after[key]) for key in before)
        start_from = published["zero3"]
    assert len((places["zero3"] / "answers" / "step-00000002.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["zero2", "zero3"])
def test_a_model_in_bfloat16_validates_and_answers_under_deepspeed(sharding, manifest, projector, tmp_path):
    pytest.importorskip("deepspeed", reason="needs deepspeed")
    overrides = ["model.dtype=bfloat16", "training.per_device_train_batch_size=1", "num_answers=1"]
    overrides += ["training.eval_strategy=steps", "training.eval_steps=1"]
    recipe = recipe_of("finetune", manifest, tmp_path, *overrides, start_from=projector)
    recipe.training |= {"deepspeed": sharding, "bf16": True}
    published = run_in_two_processes(recipe)
    assert {tensor.dtype for tensor in tensors(published, "adapter_model.safetensors").values()} == {torch.float32}
    assert len(losses(tmp_path)) == 2 and all(math.isfinite(loss) for loss in losses(tmp_path))
    assert len((tmp_path / "answers" / "step-00000002.jsonl").read_text().splitlines()) == 1


def test_prepared_volumes_are_told_from_stacks_of_pictures_by_all_that_are_looked_at(tmp_path):
    """Without a record, only those in the layout of M3D are taken for the original's; a group's own CT are not."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own/manifest.csv").write_text("image,report\n")

    def make(number, **source):
        path = write_volume(tmp_path / f"{number}.nii.gz")
        if source:
            image, content = nibabel.load(path), json.dumps({"made_by": MADE_BY, "source": source}).encode()
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension(COMMENT, content))
            nibabel.save(nibabel.Nifti1Image(image.get_fdata(), image.affine, image.header), path)
        return str(path)

    foreign, slices, scan = make(0), make(1, source_entries="x"), make(2, source_size="3")
    own, m3d = str(tmp_path / "own"), str(tmp_path)
    assert are_of_pictures(m3d, [foreign]) and not are_of_pictures(own, [foreign])
    assert not are_of_pictures(str(tmp_path / "own/manifest.csv"), [foreign])
    assert are_of_pictures(own, [slices]) and not are_of_pictures(m3d, [scan])
    assert not are_of_pictures(m3d, [slices, slices, scan]) and are_of_pictures(m3d, [foreign, slices])
