"""Conversion of the original's files: the same numbers, to the bit where bits are moved, and strict."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import golden_cases
import original_files
import pytest
import torch
from original_files import save_bin, tensors_of
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from med3dvlm import (
    DCFormerModel,
    DCFormerSiglipModel,
    Med3DVLMConfig,
    Med3DVLMForConditionalGeneration,
    Med3DVLMImageProcessor,
    Med3DVLMProcessor,
    Vit3DConfig,
    Vit3DModel,
)
from med3dvlm.hub_cards.files import sha256_of
from med3dvlm.hub_cards.publish import publish
from med3dvlm.modeling_med3dvlm import convert_original
from med3dvlm.modeling_med3dvlm.convert_original import convert, convert_to_original
from med3dvlm.modeling_med3dvlm.modeling_projector import PROJECTORS
from med3dvlm.modeling_med3dvlm.original_layout import (
    PROJECTOR_ROWS,
    Layout,
    Row,
    dual_encoder_layout,
    encoder_layout,
    vision_language_layout,
)
from med3dvlm.modeling_med3dvlm.original_plan import make_plan
from med3dvlm.modeling_med3dvlm.original_source import open_source


pytestmark = pytest.mark.skipif(
    any(golden_cases.find_golden(name) is None for name in ("dcformer_nano", "clip_sigmoid", "vlm")),
    reason="the goldens are not in this checkout",
)


def assert_close(golden, tensor, ours):
    comparison = golden_cases.compare(golden, tensor, ours)
    assert comparison.relative <= comparison.limit, comparison


def assert_equal(ours: dict, theirs: dict):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]), name


def golden_image(golden):
    return golden_cases.golden_input(golden.meta["inputs"]["x"]["golden_input"])


@pytest.fixture(scope="module")
def encoder_file(tmp_path_factory):
    return save_bin(tensors_of("dcformer_nano"), tmp_path_factory.mktemp("original") / "pretrained_ViT.bin")


@pytest.fixture(scope="module")
def vlm_source(tmp_path_factory):
    return original_files.write_vlm(tmp_path_factory.mktemp("original") / "Med3DVLM-Qwen-2.5-7B")


@pytest.fixture(scope="module")
def converted_vlm(vlm_source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "vlm"
    convert(vlm_source, folder)
    return folder


# --- the table ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout, original, ours",
    [
        (encoder_layout(), "encoder.s0.0.3.c1.1.running_var", "stem.layers.3.norm_height.running_var"),
        (encoder_layout(), "encoder.s0.0.0.c3.0.bias", "stem.layers.0.conv_depth.bias"),
        (encoder_layout(), "encoder.s4.11.mlp.mlp.3.weight", "stages.3.layers.11.pwconv2.weight"),
        (encoder_layout(), "encoder.s2.0.proj.weight", "stages.1.downsampling_layer.weight"),
        (encoder_layout(prefix="vision_tower."), "vision_tower.encoder.s1.0.scale", "stages.0.layers.0.layer_scale"),
        (dual_encoder_layout("softmax"), "logit_scale", "logit_scale"),
        (
            vision_language_layout("mixer"),
            "model.mm_projector.high_mixer.1.mlp2.mm_projector.2.1.bias",
            "model.multi_modal_projector.high_mixer.1.channel_mlp.4.bias",
        ),
        (vision_language_layout("mixer"), "model.layers.3.x.bias", "model.language_model.layers.3.x.bias"),
    ],
)
def test_the_table_is_read_in_both_directions(layout, original, ours):
    assert layout.find(original)[0] == (ours,)
    assert layout.find_original(ours)[:2] == (original, (ours,))


def test_a_name_that_is_not_in_the_table_is_not_guessed():
    assert encoder_layout().find("encoder.s0.0.3.c4.0.bias") is None
    assert encoder_layout().find("encoder.s1.x.scale") is None
    assert Layout([Row("a.{linear}", "b.{2*linear}")]).find_original("b.3") is None


# --- the encoder -------------------------------------------------------------------------------------------------------


def test_encoder_equals_the_golden_and_goes_back_to_the_bit(encoder_file, tmp_path):
    golden = golden_cases.find_golden("dcformer_nano")
    record = convert(encoder_file, tmp_path / "ours")
    assert record["kind"] == "volume encoder (DCFormer-nano)"
    model = AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(model, DCFormerModel) and not model.training
    with torch.no_grad():
        outputs = model(golden_image(golden), output_hidden_states=True)
    for index, hidden_state in enumerate(outputs.hidden_states):
        assert_close(golden, f"hidden_{index}", golden_cases.tokens(hidden_state))

    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert_equal(torch.load(tmp_path / "back" / "pretrained_ViT.bin"), tensors_of("dcformer_nano"))


@pytest.mark.parametrize("variant", ["naive", "tiny", "small", "base", "large"])
def test_every_variant_is_told_by_its_sizes(variant, tmp_path):
    layout = golden_cases.find_golden(f"dcformer_{variant}").meta["layout"]
    state = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in layout.items()}
    plan = make_plan(open_source(save_bin(state, tmp_path / "pretrained_ViT.bin")), None, None)
    assert plan.kind == f"volume encoder (DCFormer-{variant})"


def test_vit3d_equals_the_golden_and_goes_back_to_the_bit(tmp_path):
    golden, state = golden_cases.find_golden("vit3d"), tensors_of("vit3d")
    convert(save_bin(state, tmp_path / "pretrained_ViT.bin"), tmp_path / "ours")
    model = Vit3DModel.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert_close(golden, "tokens", model(golden_image(golden)).last_hidden_state)
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert_equal(torch.load(tmp_path / "back" / "pretrained_ViT.bin"), state)


def m3d_state(width: int = 128) -> dict[str, torch.Tensor]:
    """Random weights in the layout of M3D-CLIP's volume encoder, narrower and with two layers."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "cls_token": (1, 1, width),
        "patch_embedding.position_embeddings": (1, 2048, width),
        "patch_embedding.patch_embeddings.1.weight": (width, 1024),
        "patch_embedding.patch_embeddings.1.bias": (width,),
        "norm.weight": (width,),
        "norm.bias": (width,),
    }
    for layer in range(2):
        block = f"blocks.{layer}."
        shapes |= {f"{block}{norm}.{kind}": (width,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {f"{block}mlp.linear1.weight": (96, width), f"{block}mlp.linear1.bias": (96,)}
        shapes |= {f"{block}mlp.linear2.weight": (width, 96), f"{block}mlp.linear2.bias": (width,)}
        shapes |= {f"{block}attn.qkv.weight": (3 * width, width)}
        shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def m3d_forward(state: dict[str, torch.Tensor], volume: torch.Tensor) -> torch.Tensor:
    """M3D-CLIP's volume encoder in plain formulas, tokens without the class token."""
    functional, width = torch.nn.functional, state["cls_token"].shape[-1]
    patches = volume[0, 0].reshape(8, 4, 16, 16, 16, 16).permute(0, 2, 4, 1, 3, 5).reshape(2048, 1024)
    embedding = "patch_embedding.patch_embeddings.1."
    tokens = patches @ state[embedding + "weight"].T + state[embedding + "bias"]
    tokens = torch.cat([state["cls_token"][0], tokens + state["patch_embedding.position_embeddings"][0]])

    def norm(values, name):
        return functional.layer_norm(values, (width,), state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)

    def linear(values, name):
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    for layer in range(2):
        block = f"blocks.{layer}."
        queries, keys, values = (
            part.reshape(-1, width // 64, 64).transpose(0, 1)
            for part in (norm(tokens, block + "norm1") @ state[block + "attn.qkv.weight"].T).split(width, dim=1)
        )
        weights = (queries @ keys.transpose(1, 2) / 8).softmax(-1)
        attended = (weights @ values).transpose(0, 1).reshape(-1, width)
        tokens = tokens + linear(attended, block + "attn.out_proj")
        hidden = functional.gelu(linear(norm(tokens, block + "norm2"), block + "mlp.linear1"))
        tokens = tokens + linear(hidden, block + "mlp.linear2")
    return norm(tokens, "norm")[1:]


def test_volume_encoder_of_m3d_equals_its_formulas_and_goes_back_to_the_bit(tmp_path):
    state = m3d_state()
    convert(save_bin(state, tmp_path / "pretrained_ViT.bin"), tmp_path / "ours")
    model = AutoModel.from_pretrained(tmp_path / "ours")
    volume = torch.rand(1, 1, 32, 256, 256, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, plain = model(volume).last_hidden_state[0], m3d_forward(state, volume)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert_equal(torch.load(tmp_path / "back" / "pretrained_ViT.bin"), state)


# --- the dual encoder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sigmoid", "nce"])
def test_dual_encoder_equals_the_golden_and_goes_back_to_the_bit(kind, tmp_path):
    golden, state = golden_cases.find_golden(f"clip_{kind}"), tensors_of(f"clip_{kind}")
    if kind == "sigmoid":
        state["t_prime"] = torch.tensor(2.659260036932778, dtype=torch.float64)  # no float32 holds it
    source = original_files.write_dual_encoder(tmp_path / "source", kind, state)
    convert(source, tmp_path / "ours", config=original_files.write_text_config(tmp_path / "text"))
    model = AutoModel.from_pretrained(tmp_path / "ours")
    assert isinstance(model, DCFormerSiglipModel) and model.config.image_size == (64, 128, 192)

    gains = golden.meta["inputs"]["images"]["then_multiply_sample_b_by"]
    images = golden_cases.golden_input([2, 1, 64, 128, 192]) * torch.tensor(gains).view(-1, 1, 1, 1, 1)
    ids, mask = (torch.from_numpy(golden.arrays[name]) for name in ("input_ids", "attention_mask"))
    with torch.no_grad():
        outputs = model(input_ids=ids, pixel_values=images, attention_mask=mask)
    assert "base_model: medicalai/ClinicalBERT" in (tmp_path / "ours" / "README.md").read_text()
    assert_close(golden, "image_features", outputs.image_embeds)
    assert_close(golden, "text_features", outputs.text_embeds)
    logits = outputs.logits_per_image
    if (
        kind == "nce"
    ):  # its scale counts without exp, and so it does here; the average with the transpose is the loss's
        assert_close(golden, "logits", (logits + logits.T) / 2)
    else:  # trained on several processes, the original takes the exponential of its temperature
        similarity = outputs.image_embeds @ outputs.text_embeds.T
        expected = state["t_prime"].exp() * similarity + state["bias"]
        torch.testing.assert_close(logits, expected.float(), rtol=1e-6, atol=1e-6)

    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert_equal(load_file(tmp_path / "back" / "model.safetensors"), state)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    assert {key: config[key] for key in original if key != "torch_dtype"} == {
        key: original[key] for key in original if key != "torch_dtype"
    }
    prefix = "vision_encoder."
    vision = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    assert_equal(torch.load(tmp_path / "back" / "pretrained_ViT.bin"), vision)


def test_scale_that_was_trained_since_does_not_come_back_as_it_was(tmp_path):
    source = original_files.write_dual_encoder(tmp_path / "source", "sigmoid")
    convert(source, tmp_path / "ours", config=original_files.write_text_config(tmp_path / "text"))
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    weights["logit_scale"] += 0.5
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors")["t_prime"] == weights["logit_scale"].double()


def test_scale_without_a_logarithm_is_refused(tmp_path):
    state = {**tensors_of("clip_nce"), "logit_scale": torch.tensor(-1.0)}
    source = original_files.write_dual_encoder(tmp_path / "source", "nce", state)
    with pytest.raises(ValueError, match=r"'logit_scale' is -1.0, which is no scale"):
        convert(source, tmp_path / "ours", config=original_files.write_text_config(tmp_path / "text"))
    assert not (tmp_path / "ours").exists()


def test_number_of_heads_of_the_text_encoder_is_asked_for_or_said_to_be_assumed(tmp_path):
    source = original_files.write_dual_encoder(tmp_path / "narrow", "sigmoid")
    with pytest.raises(ValueError, match="heads of a text encoder of width 48.*pass `config`"):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()

    golden = golden_cases.find_golden("clip_sigmoid")
    shapes = {
        name: [{48: 64}.get(size, size) for size in shape] if "language" in name else shape
        for name, shape in golden.meta["layout"].items()
    }
    state = {name: torch.ones(shape) for name, shape in shapes.items()}
    record = convert(original_files.write_dual_encoder(tmp_path / "wide", "sigmoid", state), tmp_path / "ours")
    assert record["assumptions"] == [
        "1 attention heads in the text encoder, as in ClinicalBERT; the files do not say."
    ]
    assert record["assumptions"][0] in (tmp_path / "ours" / "README.md").read_text()


# --- the projectors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["linear", "mlp", "mhsa", "low_high_mlp", "mixer", "mixer_depth1"])
def test_projector_equals_the_golden(name, tmp_path):
    golden, state = golden_cases.find_golden(f"projector_{name}"), tensors_of(f"projector_{name}")
    embeddings = torch.rand(9, 64)
    run = {f"model.mm_projector.{key}": value for key, value in state.items()}
    run["model.embed_tokens.weight"] = embeddings
    record = convert(save_bin(run, tmp_path / "mm_projector.bin"), tmp_path / "ours")
    fields = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert fields["projector_type"] == golden.meta["config"]["mm_projector_type"] and fields["text_hidden_size"] == 64
    assert record["tensors"] == len(state) + 1

    text_config = {"model_type": "qwen2", "hidden_size": fields["text_hidden_size"], "num_attention_heads": 4}
    kept = ("projector_type", "projector_depth", "low_level_tokens", "high_level_tokens")
    config = Med3DVLMConfig(text_config=text_config, image_token_id=0, **{key: fields[key] for key in kept})
    projector = PROJECTORS[config.projector_type](config)
    weights = load_file(tmp_path / "ours" / "projector.safetensors")
    assert torch.equal(weights.pop("language_model.embed_tokens.weight"), embeddings)
    projector.load_state_dict({key.removeprefix("multi_modal_projector."): value for key, value in weights.items()})
    with torch.no_grad():
        output = projector(golden_cases.golden_input([2, 256, 384]), golden_cases.golden_input([2, 32, 768]))
    assert_close(golden, "tokens", output)


def test_every_type_of_projector_is_converted():
    assert set(PROJECTOR_ROWS) == set(PROJECTORS)


# --- the vision-language model -----------------------------------------------------------------------------------------


def prompt_of(golden) -> tuple[str, list[int]]:
    """The golden's text, a space and words after the placeholder, and the ids with which the original computes."""
    ids = golden.arrays["input_ids"][0].tolist()
    return original_files.IMAGE_TOKEN + " " + " ".join(f"w{index}" for index in ids[256:]), ids


def test_vision_language_model_equals_the_golden(converted_vlm, tmp_path):
    golden = golden_cases.find_golden("vlm")
    processor = AutoProcessor.from_pretrained(converted_vlm)
    model = AutoModelForImageTextToText.from_pretrained(converted_vlm)
    assert processor.prompt_format == "original" and model.config.prepend_image_token_embedding

    text, ids = prompt_of(golden)
    content = [{"type": "image", "image": torch.rand(8, 9, 10)}, {"type": "text", "text": text.split(" ", 1)[1]}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    # 257 placeholders, and the original's text without its first token.
    assert inputs["input_ids"].tolist() == [[160] * 257 + ids[257:]]
    pixel_values = golden_cases.golden_input([1, 1, 128, 256, 256])
    labels = torch.from_numpy(golden.arrays["labels"])
    with torch.no_grad():
        outputs = model(input_ids=inputs["input_ids"], pixel_values=pixel_values, labels=labels)
    assert_close(golden, "image_features", outputs.image_hidden_states[:, 1:])
    assert_close(golden, "logits", outputs.logits)
    assert_close(golden, "loss", outputs.loss)
    generated = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        pixel_values=pixel_values,
        max_new_tokens=8,
    )
    assert generated[0, -8:].tolist() == golden.meta["generated_ids"]

    model.save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    shards = [load_file(file) for file in sorted(converted_vlm.glob("*.safetensors"))]
    assert len(shards) == 3
    assert_equal(saved, {name: value for shard in shards for name, value in shard.items()})


def test_a_stranger_loads_a_converted_folder(converted_vlm):
    program = f"""
import sys
sys.modules["med3dvlm"] = sys.modules["torchvision"] = None
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor
processor = AutoProcessor.from_pretrained({str(converted_vlm)!r}, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained({str(converted_vlm)!r}, trust_remote_code=True)
inputs = processor(images=torch.rand(8, 9, 10), text="<im_patch> w7 w8 w9", return_tensors="pt")
print(inputs["input_ids"][0, 255:].tolist(), model.generate(**inputs, max_new_tokens=3).shape[1])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd="/", env=environment, check=False
    )
    assert "[160, 160, 8, 9] 262" in result.stdout, result.stderr


def test_provenance_and_prompt_are_on_the_card(vlm_source, converted_vlm):
    record = json.loads((converted_vlm / "conversion.json").read_text())
    files = sorted(vlm_source.glob("*.safetensors"))
    assert record["source_files"] == {
        file.name: {"sha256": sha256_of(file), "num_bytes": file.stat().st_size} for file in files
    }
    assert record["tool"].startswith("med3dvlm ") and record["assumptions"] == []
    card = (converted_vlm / "README.md").read_text()
    assert all(sha256_of(file) in card for file in files)
    assert "reads no first token of the question" in card
    assert not [path for path in converted_vlm.parent.iterdir() if path.name.startswith(".")]
    assert len({path.stat().st_mode for path in converted_vlm.iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize("name, is_repository", [("org/base", True), ("../base", False)])
def test_a_path_that_the_original_was_loaded_from_is_no_base_model(name, is_repository, vlm_source, tmp_path):
    source = shutil.copytree(vlm_source, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "_name_or_path": name}))
    convert(source, tmp_path / "ours")
    assert ("base_model:" in (tmp_path / "ours/README.md").read_text()) is is_repository


def test_a_converted_model_can_be_published_again(converted_vlm, tmp_path):
    publish(str(converted_vlm), tmp_path / "again")
    processor = Med3DVLMProcessor.from_pretrained(tmp_path / "again")
    assert processor.prompt_format == "original" and processor.image_seq_length == 257


def test_prompts_that_the_original_was_not_trained_with_are_refused(converted_vlm):
    processor = Med3DVLMProcessor.from_pretrained(converted_vlm)
    volume = torch.rand(8, 9, 10)
    for text in ("w1 <im_patch> w2", "<im_patch>", "<im_patch> <im_patch> w2"):
        with pytest.raises(ValueError, match="begins with its one placeholder"):
            processor(images=[volume] * text.count("<im_patch>"), text=text)
    with pytest.raises(Exception, match="one question of the user"):
        processor.apply_chat_template([{"role": "system", "content": "Be brief."}])
    # Padding stands on the left, and the last placeholder overwrites the first token of each text, not a padding.
    processor.tokenizer.pad_token = "w159"
    texts = ["<im_patch> w7 w8 w9", "<im_patch> w7"]
    rows = processor(images=[[volume], [volume]], text=texts, padding=True, return_tensors="pt")["input_ids"].tolist()
    assert rows == [[160] * 257 + [8, 9], [159] * 2 + [160] * 257]
    assert processor(text="w1 w2")["input_ids"] == [[1, 2]]


def test_the_answer_ends_as_the_original_trains_it(converted_vlm):
    processor = Med3DVLMProcessor.from_pretrained(converted_vlm)
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "w7 w8"}]}]
    assert processor.apply_chat_template(chat) == "<im_patch> w7 w8"
    chat.append({"role": "assistant", "content": "w3"})
    assert processor.apply_chat_template(chat) == "<im_patch> w7 w8 w3w159"


@pytest.mark.parametrize("alpha, dtype", [(None, torch.float32), (4.0, torch.float32), (None, torch.bfloat16)])
def test_adapters_of_a_lora_run_are_merged(alpha, dtype, tmp_path):
    state = {
        name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors_of("vlm").items()
    }
    run = original_files.with_adapters(state)
    (tmp_path / "base").mkdir()
    fields = golden_cases.find_golden("vlm").meta["llm_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps({"model_type": "qwen2", **fields, "vocab_size": 200}))
    base_tokenizer = original_files.word_tokenizer([f"w{index}" for index in range(160)], eos_token="w159")
    record = convert(
        save_bin(run, tmp_path / "run" / "model_with_lora.bin"),
        tmp_path / "ours",
        config=tmp_path / "base",
        tokenizer=base_tokenizer,
        lora_alpha=alpha,
        max_shard_size=20_000_000,
    )
    assert record["lora_alpha"] == (alpha or 32)
    assert record["kind"].startswith("LoRA run") and any("alpha" in line for line in record["assumptions"]) == (
        alpha is None
    )
    merged = {}
    for file in (tmp_path / "ours").glob("*.safetensors"):
        merged |= load_file(file)
    name = "layers.1.mlp.down_proj"
    up, down = (run[f"base_model.model.model.{name}.lora_{part}.default.weight"] for part in "BA")
    expected = state[f"model.{name}.weight"].double() + (alpha or 32) / 2 * up.double() @ down.double()
    ours = merged[f"model.language_model.{name}.weight"]
    assert ours.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8  # half a step of rounding once
    torch.testing.assert_close(ours.double(), expected, rtol=tolerance, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], state["lm_head.weight"])
    model = Med3DVLMForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert model.config.image_token_id == 160 and model.dtype == dtype


def test_tokenizer_of_the_slow_kind_is_read(tmp_path):
    """The original loads Qwen's tokenizer with `use_fast=False`, which saves vocabulary and merges and no tokenizer.json."""
    source = original_files.write_vlm(tmp_path / "source", num_shards=1)
    for file in source.glob("*token*"):
        file.unlink()
    alphabet = list(dict.fromkeys("abcdefghijklmnopqrstuvwxyz0123456789.,?!:;-+*/()[]ABCDEFGHIJKLMNOPQRSTUVWXYZĠ"))
    merges = [("Ġ", letter) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    merges += [("Ġa", letter) for letter in "bcdefghijklmnopqrs"]
    words = [*alphabet, *("".join(merge) for merge in merges)]
    words += [f"unused{index}" for index in range(159 - len(words))]
    (source / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (source / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, merges)))
    special = {"159": "<|im_end|>", "160": original_files.IMAGE_TOKEN}
    (source / "added_tokens.json").write_text(json.dumps({word: int(index) for index, word in special.items()}))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {index: {"content": word, **flags} for index, word in special.items()},
        "additional_special_tokens": [original_files.IMAGE_TOKEN],
        "eos_token": "<|im_end|>",
        "pad_token": "<|im_end|>",
        "unk_token": None,
        "padding_side": "right",
        "model_max_length": 512,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    convert(source, tmp_path / "ours")
    processor = AutoProcessor.from_pretrained(tmp_path / "ours")
    assert type(processor.tokenizer).__name__.startswith("Qwen2Tokenizer") and processor.image_token_id == 160
    ids = processor(images=torch.rand(8, 9, 10), text="<im_patch> ab cd")["input_ids"][0]
    # The first token, " ab", is one piece; it is the one that is lost.
    assert ids == [160] * 257 + processor.tokenizer(" cd")["input_ids"]


def test_adapters_without_the_language_models_configuration_say_what_is_needed(tmp_path):
    file = save_bin(original_files.with_adapters(tensors_of("vlm")), tmp_path / "model_with_lora.bin")
    with pytest.raises(ValueError, match=r"there is no config.json beside it.*Pass `config`"):
        convert(file, tmp_path / "ours")
    (tmp_path / "config.json").write_text(json.dumps(original_files.vlm_config()))
    with pytest.raises(ValueError, match="no tokenizer beside it: pass `tokenizer`"):
        convert(file, tmp_path / "ours")


# --- strictness --------------------------------------------------------------------------------------------------------


def broken(change, name="dcformer_nano"):
    state = tensors_of(name)
    change(state)
    return state


LAST = "encoder.s4.0.mlp.mlp.3.bias"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop(LAST), rf"1 missing in the checkpoint: {LAST}"),
        (lambda state: state.update(extra=torch.ones(2)), "1 not part of the model: extra"),
        (
            lambda state: state.update({LAST: torch.ones(3)}),
            rf"1 of another shape: {LAST} \(checkpoint \(3,\), model \(256,\)\)",
        ),
        (
            lambda state: state.update({"encoder.s1.0.dwconv.c1.0.weight": torch.ones(32, 1, 1, 13, 1)}),
            r"c1.0.weight \(checkpoint \(32, 1, 1, 13, 1\), model \(32, 1, 13, 1, 1\)\)",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if "running" in name],
            r"48 missing in the checkpoint: .*, and 40 more",
        ),
        (
            lambda state: [state.pop(name) for name in list(state) if ".s4." in name],
            r"\[1, 1, 1, 1\] blocks.*Expected one of the original's",
        ),
        (lambda state: state.pop("encoder.s2.0.scale"), "expected a tensor 'encoder.s2.0.scale'"),
        (lambda state: state.update(step=3), "1 of its 193 entries are none: step"),
    ],
)
def test_what_does_not_fit_is_listed_and_nothing_is_written(change, message, tmp_path):
    file = save_bin(broken(change), tmp_path / "pretrained_ViT.bin")
    with pytest.raises(ValueError, match=message):
        convert(file, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["pretrained_ViT.bin"]


def test_what_the_hub_refuses_of_a_card_is_found_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match="`license` must be an identifier of the Hub.*got 'Apache 2.0'"):
        convert(tmp_path / "none", tmp_path / "ours", license="Apache 2.0")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("model.norm.weight"), "1 missing in the checkpoint: model.norm.weight"),
        (lambda state: state.pop("model.mm_projector.low_mixer.1.ln1.bias"), "1 missing.*low_mixer.1.ln1.bias"),
        (
            lambda state: state.update({"model.mm_projector.gate": torch.ones(1)}),
            "1 not part.*model.mm_projector.gate",
        ),
        (
            lambda state: state.update({"model.layers.1.mlp.up_proj.weight": torch.ones(128, 63)}),
            r"up_proj.weight \(checkpoint \(128, 63\), model \(128, 64\)\)",
        ),
    ],
)
def test_a_whole_model_must_fit_too(change, message, tmp_path):
    source = original_files.write_vlm(tmp_path / "source", state=broken(change, "vlm"))
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_unknown_sources_are_answered_with_what_is_known(tmp_path):
    file = save_bin({"fc.weight": torch.ones(2)}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"Found 1 tensors, fc.weight. Known are .*pretrained_ViT.bin"):
        convert(file, tmp_path / "ours")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        convert(tmp_path / "missing", tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no weights in it"):
        convert(tmp_path / "empty", tmp_path / "ours")
    (tmp_path / "text.bin").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"expected weights that `torch.save` wrote"):
        convert(tmp_path / "text.bin", tmp_path / "ours")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{")
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        convert(tmp_path / "cut.safetensors", tmp_path / "ours")
    clip = save_bin({"vision_encoder.patch_embedding.position_embeddings": torch.ones(1)}, tmp_path / "clip.bin")
    with pytest.raises(ValueError, match="M3D-CLIP as a whole.*Its volume encoder alone"):
        convert(clip, tmp_path / "ours")


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    class Attack:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"encoder.s0": Attack()}, tmp_path / "pretrained_ViT.bin")
    with pytest.raises(ValueError, match="can be read without running code"):
        convert(tmp_path / "pretrained_ViT.bin", tmp_path / "ours")
    assert not (tmp_path / "ran").exists()


def test_config_and_index_must_belong_to_the_weights(vlm_source, tmp_path):
    source = original_files.write_vlm(tmp_path / "source", num_shards=2)
    config = original_files.vlm_config()
    for changed, message in (
        ({"model_type": "llava"}, "its config.json says 'llava'"),
        ({"vision_select_layer": -1}, "expected `vision_select_layer` -2"),
    ):
        (source / "config.json").write_text(json.dumps({**config, **changed}))
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "ours")
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="`lora_alpha` was given"):
        convert(source, tmp_path / "ours", lora_alpha=8)
    short = original_files.word_tokenizer([f"w{index}" for index in range(90)], eos_token="w1")
    with pytest.raises(ValueError, match="the embeddings have 161 rows.*91 tokens"):
        convert(source, tmp_path / "ours", tokenizer=short)
    index = json.loads((source / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = index["weight_map"].pop("lm_head.weight")
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="1 in the index but not in the files: ghost; 1 in the files.*lm_head.weight"):
        convert(source, tmp_path / "ours")
    (source / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="names model-00002-of-00002.safetensors, which are missing"):
        convert(source, tmp_path / "ours")


def test_destination_is_not_replaced_unasked(encoder_file, tmp_path):
    convert(encoder_file, tmp_path / "ours")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(encoder_file, tmp_path / "ours")
    (tmp_path / "ours" / "stale").write_text("")
    convert(encoder_file, tmp_path / "ours", overwrite=True)
    assert not (tmp_path / "ours" / "stale").exists()
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    with pytest.raises(FileExistsError, match="is not empty"):
        convert_to_original(tmp_path / "ours", tmp_path / "back")
    convert_to_original(tmp_path / "ours", tmp_path / "back", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"no config\.json"):
        convert(encoder_file, tmp_path / "home", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "home", "ours"]


# --- resuming ----------------------------------------------------------------------------------------------------------


def test_a_conversion_that_was_ended_goes_on_with_what_is_whole(vlm_source, converted_vlm, tmp_path, monkeypatch):
    save_shard, saved = convert_original.save_shard, []

    def save_two(state, shard):
        if len(saved) == 2:
            shard.with_name(f".{shard.name}.tmp").write_bytes(b"half")
            raise KeyboardInterrupt
        saved.append(shard)
        return save_shard(state, shard)

    monkeypatch.setattr(convert_original, "save_shard", save_two)
    with pytest.raises(KeyboardInterrupt):
        convert(vlm_source, tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == [".ours.converting"]

    # The second shard is damaged in the meantime: it is made again, the first is kept.
    with saved[1].open("r+b") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"oops")
    again = []
    monkeypatch.setattr(
        convert_original, "save_shard", lambda state, shard: again.append(shard.name) or save_shard(state, shard)
    )
    record = convert(vlm_source, tmp_path / "ours")
    assert again == ["model-00002-of-00003.safetensors", "model-00003-of-00003.safetensors"]
    assert record == json.loads((converted_vlm / "conversion.json").read_text())
    assert {path.name: path.read_bytes() for path in (tmp_path / "ours").iterdir()} == {
        path.name: path.read_bytes() for path in converted_vlm.iterdir()
    }
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_progress_of_another_source_does_not_count(encoder_file, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    write_companion_files = convert_original.write_companion_files
    monkeypatch.setattr(convert_original, "write_companion_files", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(encoder_file, tmp_path / "ours")
    monkeypatch.setattr(convert_original, "write_companion_files", write_companion_files)
    state = {name: value + 1 for name, value in tensors_of("dcformer_nano").items()}
    convert(save_bin(state, tmp_path / "other" / "pretrained_ViT.bin"), tmp_path / "ours")
    convert_to_original(tmp_path / "ours", tmp_path / "back")
    assert_equal(torch.load(tmp_path / "back" / "pretrained_ViT.bin"), state)


def test_the_folder_that_was_being_replaced_comes_back(encoder_file, tmp_path):
    """As a process leaves it that was killed between taking the old folder away and putting the new one in its place."""
    old = tmp_path / ".ours.converting" / "old"
    convert(encoder_file, old)
    old_files = {path.name for path in old.iterdir()}
    with pytest.raises(FileExistsError, match="is not empty"):
        convert(encoder_file, tmp_path / "ours")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == old_files


@pytest.mark.slow
def test_memory_is_that_of_a_shard_and_a_killed_conversion_goes_on(tmp_path):
    specification = importlib.util.spec_from_file_location(
        "bench_convert", Path(__file__).with_name("bench_convert.py")
    )
    bench_convert = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(bench_convert)
    (tmp_path / "source").mkdir()
    largest = bench_convert.write_source(tmp_path / "source", 3, 0.5)
    command = [sys.executable, "-c", bench_convert.CONVERT, str(tmp_path / "source"), str(tmp_path / "ours")]
    work = tmp_path / ".ours.converting" / "new"

    def finished():
        return (
            {path.name: path.stat().st_mtime_ns for path in work.glob("model-*.safetensors")} if work.exists() else {}
        )

    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(finished()) < 3 and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = finished()
    assert len(before) >= 3 and not (tmp_path / "ours").exists()
    assert len(before) < len(list((tmp_path / "source").glob("*.safetensors")))

    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "ours").glob("model-*.safetensors")}
    # The last of them may have been written but not yet recorded.
    assert sum(after[name] == when for name, when in before.items()) >= len(before) - 1
    assert bench_convert.check_bytes(tmp_path / "source", tmp_path / "ours") == 2 * len(after)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["peak"] - figures["baseline"] <= 1.3 * largest


def test_what_a_call_that_was_ended_after_its_work_left_is_cleared_away(encoder_file, tmp_path):
    convert(encoder_file, tmp_path / "ours")
    leftovers = convert_original.place_beside(tmp_path / "ours") / "old"
    shutil.copytree(tmp_path / "ours", leftovers)
    convert(encoder_file, tmp_path / "ours", overwrite=True)
    assert (tmp_path / "ours" / "model.safetensors").is_file() and not leftovers.exists()


# --- the way back ------------------------------------------------------------------------------------------------------


def test_what_the_original_cannot_build_has_no_way_back(converted_vlm, tmp_path):
    from tiny import IMAGE_SIZE, tiny_dcformer_config, tiny_siglip

    processor = Med3DVLMImageProcessor(image_size=list(IMAGE_SIZE))
    publish(DCFormerModel(tiny_dcformer_config()), tmp_path / "encoder", processor=processor)
    with pytest.raises(ValueError, match=r"no DCFormer of \[1, 1, 1, 2, 1\] blocks"):
        convert_to_original(tmp_path / "encoder", tmp_path / "back")
    tokenizer = original_files.word_tokenizer([f"w{index}" for index in range(99)], pad_token="w1")
    publish(tiny_siglip(), tmp_path / "siglip", processor=processor, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="always has DCFormer-small"):
        convert_to_original(tmp_path / "siglip", tmp_path / "back")
    with pytest.raises(ValueError, match="has no way back"):
        convert_to_original(converted_vlm, tmp_path / "back")
    fields = {"image_size": IMAGE_SIZE, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    for change, message in (
        ({"num_attention_heads": 2, "head_dim": 32}, "`head_dim` 32 instead of 64"),
        ({"patch_size": (16, 32, 32)}, r"`patch_size` \(16, 32, 32\) instead of cubes"),
        ({"use_final_norm": True}, "both or neither"),
    ):
        model = Vit3DModel(Vit3DConfig(**{**fields, "num_attention_heads": 1, **change}))
        publish(model, tmp_path / "vit", processor=processor, overwrite=True)
        with pytest.raises(ValueError, match=f"no such vision transformer: .*{message}"):
            convert_to_original(tmp_path / "vit", tmp_path / "back")
    assert not (tmp_path / "back").exists()
