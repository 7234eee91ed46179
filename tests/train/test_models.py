from dataclasses import replace

import pytest
import torch
from tiny import build_tiny_model, tiny_siglip, tiny_vit3d_config, tiny_vlm, tiny_vlm_config
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, PreTrainedTokenizerFast

from med3dvlm import Med3DVLMImageProcessor, Med3DVLMProcessor
from med3dvlm.hub_cards.model_card import find_base_model
from med3dvlm.hub_cards.publish import publish
from med3dvlm.train.models import (
    add_lora,
    build_dual_encoder,
    build_language_model,
    build_vision_language_model,
    choose_trained_parts,
    load_vision_language_model,
    load_volume_encoder,
)
from med3dvlm.train.recipe import ModelRecipe
from med3dvlm.train.tokenizers import build_tiny_tokenizer, train_word_piece_tokenizer


TEXTS = ["Nodule in the left lung.", "No nodule."]


def assert_equal_weights(expected, found):
    """Of text encoders; a dual encoder's has no pooler."""
    expected = {name: value for name, value in expected.state_dict().items() if not name.startswith("pooler.")}
    found = found.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("is_relative", [True, False])
def test_text_models_forget_the_folder_they_were_loaded_from(is_relative, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fields = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    bert = AutoModel.from_config(BertConfig(**fields, intermediate_size=8))
    bert.save_pretrained("models/bert")
    train_word_piece_tokenizer(TEXTS, 40).save_pretrained("models/bert")
    AutoModelForCausalLM.from_config(tiny_vlm_config().text_config).save_pretrained("models/qwen")
    build_tiny_tokenizer().save_pretrained("models/qwen")
    place = "models" if is_relative else str(tmp_path / "models")

    vision = {"image_size": (32, 64, 96), "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 1, 1)}
    dual_encoder, _ = build_dual_encoder(ModelRecipe(text_encoder=f"{place}/bert", vision=vision), TEXTS)
    assert_equal_weights(bert, dual_encoder.text_model)
    language_model, _ = build_language_model(ModelRecipe(language_model=f"{place}/qwen"), TEXTS)
    config = tiny_vlm_config()
    config.text_config = language_model.config
    monkeypatch.chdir("/")  # where `models/qwen` would pass for a repository
    for saved in (dual_encoder.config, config):
        saved.save_pretrained(tmp_path / "saved")
        assert "models" not in (tmp_path / "saved" / "config.json").read_text()
        assert find_base_model(saved) is None


@pytest.mark.parametrize("kind", ["dual encoder", "volume encoder"])
def test_a_published_volume_encoder_gets_a_new_text_encoder(kind, tmp_path):
    published = tiny_siglip()
    part = published if kind == "dual encoder" else published.vision_model
    part.to(torch.bfloat16).save_pretrained(tmp_path / "published")
    image_processor = Med3DVLMImageProcessor(
        image_size=[32, 64, 96], hu_range=[-100.0, 300.0], do_crop_foreground=False
    )
    image_processor.save_pretrained(tmp_path / "published")
    recipe = ModelRecipe(
        vision=str(tmp_path / "published"),
        text_encoder={"model_type": "bert", "hidden_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2},
        tokenizer_size=40,
        dual_encoder={"projection_dim": 7},
        image_processor={"hu_range": [-200.0, 400.0]},
    )
    model, processor = build_dual_encoder(recipe, TEXTS)
    expected, found = published.float().vision_model.state_dict(), model.vision_model.state_dict()
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    hidden_sizes = published.config.vision_config.hidden_sizes
    assert list(model.config.vision_config.hidden_sizes) == list(hidden_sizes)
    assert model.text_model.config.hidden_size == 12 and model.config.projection_dim == 7
    assert processor.image_processor.do_crop_foreground is False
    assert list(processor.image_processor.hu_range) == [-200.0, 400.0]
    with pytest.raises(ValueError, match="There is no option `window`"):
        build_dual_encoder(replace(recipe, image_processor={"window": "lung"}), TEXTS)
    with pytest.raises(ValueError, match=r"makes volumes of \(64, 64, 64\), .* takes \(32, 64, 96\)"):
        build_dual_encoder(replace(recipe, image_processor={"image_size": [64, 64, 64]}), TEXTS)


@pytest.mark.parametrize("whiten_text", [False, True])
def test_reports_are_whitened_where_the_recipe_says_so(whiten_text):
    reports = [f"{kind} in the {side} {organ}." for kind in ("Cyst", "Mass") for side in ("left", "right") for organ in
               ("lung", "kidney")]  # fmt: skip
    fields = {"model_type": "bert", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = ModelRecipe(
        vision={"image_size": (32, 64, 96), "hidden_sizes": (4, 6, 8, 10, 12), "depths": (1, 1, 1, 1, 1)},
        text_encoder={**fields, "intermediate_size": 24},
        tokenizer_size=60,
        dual_encoder={"projection_dim": 20},
        whiten_text=whiten_text,
    )
    torch.manual_seed(0)
    model, processor = build_dual_encoder(recipe, reports, reports)
    inputs = processor.tokenizer(reports, padding=True, return_tensors="pt")
    with torch.no_grad():
        vectors = model.eval().get_text_features(inputs["input_ids"], inputs["attention_mask"]).pooler_output
    variances = torch.linalg.eigvalsh(torch.cov(vectors.double().T, correction=0))
    is_kept = variances > 0.5
    if whiten_text:
        torch.testing.assert_close(variances, is_kept.double(), atol=1e-3, rtol=0)
    assert bool(is_kept.any()) is whiten_text


def test_the_image_processor_of_a_published_model_is_adjusted_and_what_is_unused_is_said(tmp_path, caplog):
    model, processor = build_tiny_model()
    publish(model, tmp_path / "published", processor=processor)
    recipe = ModelRecipe(
        start_from=str(tmp_path / "published"),
        image_processor={"intensity_mode": "percentile"},
        projector={"projector_type": "mlp"},
    )
    _, found = load_vision_language_model(recipe)
    assert found.image_processor.intensity_mode == "percentile"
    assert list(found.image_processor.image_size) == list(processor.image_processor.image_size)
    assert "`model.projector`: not used" in caplog.text
    with pytest.raises(ValueError, match="leave `image_size` out"):
        load_vision_language_model(replace(recipe, image_processor={"image_size": [64, 64, 64]}))


def test_a_dual_encoder_that_is_trained_on_is_float32_whatever_its_files_are(tmp_path):
    _, processor = build_tiny_model()
    tiny_siglip().to(torch.bfloat16).save_pretrained(tmp_path)
    Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=[32, 64, 96]), processor.tokenizer).save_pretrained(tmp_path)
    model, _ = build_dual_encoder(ModelRecipe(start_from=str(tmp_path)), TEXTS)
    assert {value.dtype for value in model.parameters()} == {torch.float32}


@pytest.fixture(scope="module")
def dual_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dual_encoder")
    tiny_siglip().save_pretrained(folder)
    Med3DVLMProcessor(Med3DVLMImageProcessor(image_size=[32, 64, 96]), build_tiny_tokenizer()).save_pretrained(folder)
    return str(folder)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    "language_model, message",
    [
        ({"model_type": "phi", **SIZES}, "PhiForCausalLM has a bias in its head"),
        ({"model_type": "granite", "logits_scaling": 8.0, **SIZES}, "`logits_scaling` 8.0, which"),
        ({"model_type": "cohere", **SIZES}, "`logit_scale` 0.0625"),
        ({"model_type": "gemma2", "head_dim": 8, **SIZES}, "`final_logit_softcapping` 30.0"),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_language_models_that_score_in_another_way_are_refused(language_model, message, dual_encoder):
    recipe = ModelRecipe(start_from=dual_encoder, language_model=language_model, tokenizer_size=300)
    with pytest.raises(ValueError, match=rf"the product of hidden state and head.*{message}"):
        build_vision_language_model(recipe, TEXTS)


@pytest.mark.parametrize(
    "language_model",
    [
        {"model_type": "granite", "logits_scaling": 1.0, **SIZES},
        {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32, **SIZES},
    ],
    ids=lambda value: value["model_type"],
)
def test_other_language_models_become_a_part_that_is_saved_and_loaded(language_model, dual_encoder, tmp_path):
    fields = {"projector": {"low_level_tokens": [6, 5], "high_level_tokens": [2, 3]}, "tokenizer_size": 300}
    model, processor = build_vision_language_model(
        ModelRecipe(start_from=dual_encoder, language_model=language_model, **fields), TEXTS
    )
    ids = processor.tokenizer("No nodule.", return_tensors="pt")["input_ids"]
    model.eval().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_other_models_are_no_volume_encoder(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"expected a dual encoder or one of the volume encoders .*'dcformer'.*got .*'bert'"
    ):
        load_volume_encoder(str(tmp_path))


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_head_is_trained_in_float32_with_its_language_model(is_tied):
    model = tiny_vlm(text_config={"tie_word_embeddings": is_tied}, tie_word_embeddings=is_tied).to(torch.bfloat16)
    choose_trained_parts(model, ["language_model"])
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is is_tied
    for parameter in (model.lm_head.weight, *model.model.language_model.parameters()):
        assert parameter.requires_grad and parameter.dtype == torch.float32
    frozen = [*model.model.vision_tower.parameters(), *model.model.multi_modal_projector.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)


@pytest.mark.parametrize("vision", ["dcformer", "vit3d"])
def test_adapters_are_on_the_linear_layers_of_the_language_models_blocks_alone(vision):
    fields = {"vision_config": tiny_vit3d_config()} if vision == "vit3d" else {}
    model = tiny_vlm(**fields)
    expected = {
        f"model.language_model.layers.{name}"
        for name, module in model.model.language_model.layers.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    adapted = add_lora(model, {"r": 2}, [])
    found = {name for name, module in adapted.base_model.model.named_modules() if hasattr(module, "lora_A")}
    assert len(expected) == 14 and found == expected


def test_language_models_whose_layers_would_get_no_adapter_are_refused():
    model = tiny_vlm(text_config={"model_type": "phi3"})
    with pytest.raises(
        ValueError, match=r"got gate_up_proj, qkv_proj in Phi3Model, which.*lora\.target_modules='"
    ) as error:
        add_lora(model, {"r": 2}, [])
    pattern = str(error.value).split("target_modules='")[1].removesuffix("'.")
    adapted = add_lora(model, {"r": 2, "target_modules": pattern}, [])
    found = {name.rpartition(".")[2] for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    assert found == {"down_proj", "gate_up_proj", "o_proj", "qkv_proj"}


def test_a_pretrained_language_model_learns_the_placeholder(tmp_path):
    """As Qwen2.5 does, whose tokenizer has none: one more token, one more row, and the others stay."""
    words = {word: number for number, word in enumerate(["<pad>", "<eos>", "<unk>", *(f"w{n}" for n in range(96))])}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_config(tiny_vlm_config().text_config)
    plain.save_pretrained(tmp_path)
    model, tokenizer = build_language_model(ModelRecipe(language_model=str(tmp_path)), [])
    weights, before = model.get_input_embeddings().weight, plain.get_input_embeddings().weight
    assert len(before) == len(words) == 99
    assert tokenizer("<image>")["input_ids"] == [99] and len(weights) == 100
    assert torch.equal(weights[:99], before)
