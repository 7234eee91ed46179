import json
import shutil

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers.integrations import PeftAdapterMixin

from med3dvlm import DCFormerModel, DCFormerSiglipModel, Med3DVLMForConditionalGeneration


def save_changed(model, folder, change):
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def remove(key):
    return lambda state: state.pop(key)


def add(key):
    return lambda state: state.update({key: torch.zeros(2)})


def reshape(key):
    return lambda state: state.update({key: torch.zeros(3, 3)})


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("stages.1.layers.0.layer_scale"), "- 1 missing in the checkpoint: stages.1.layers.0.layer_scale"),
        (remove("stem.layers.0.norm_depth.running_mean"), "missing.*stem.layers.0.norm_depth.running_mean"),
        (add("head.weight"), "- 1 not part of the model: head.weight"),
        (
            reshape("stages.0.layers.0.pwconv1.weight"),
            r"- 1 of another shape: stages.0.layers.0.pwconv1.weight \(checkpoint \(3, 3\), model \(24, 6\)\)",
        ),
    ],
    ids=["missing parameter", "missing buffer", "unexpected", "misshapen"],
)
def test_checkpoint_that_does_not_fit_is_refused_and_listed(change, message, tmp_path):
    model = DCFormerModel(tiny.tiny_dcformer_config())
    save_changed(model, tmp_path, change)
    with pytest.raises(ValueError, match=message) as caught:
        DCFormerModel.from_pretrained(tmp_path)
    assert "strict=False" in str(caught.value)
    DCFormerModel.from_pretrained(tmp_path, strict=False)


def test_all_kinds_of_models_are_strict(tmp_path):
    for model, key in (
        (tiny.tiny_siglip(), "logit_scale"),
        (tiny.tiny_vlm(), "model.multi_modal_projector.low_mixer.0.token_norm.bias"),
    ):
        folder = tmp_path / type(model).__name__
        save_changed(model, folder, remove(key))
        with pytest.raises(ValueError, match=f"missing in the checkpoint: {key}"):
            type(model).from_pretrained(folder)


@pytest.mark.parametrize("make, part", [(tiny.tiny_siglip, "vision_model"), (tiny.tiny_vlm, "model.vision_tower")])
def test_encoder_of_a_whole_model_is_refused_with_the_way_to_take_it(make, part, tmp_path):
    whole = make()
    whole.save_pretrained(tmp_path)
    for strict in (True, False):  # not strict is no licence for an encoder that is random throughout
        with pytest.raises(ValueError, match=rf"as its part `{part}`.*whole.{part}.state_dict\(\)"):
            DCFormerModel.from_pretrained(tmp_path, config=whole.config.vision_config, strict=strict)
    encoder = DCFormerModel(whole.config.vision_config).eval()
    encoder.load_state_dict(whole.get_submodule(part).state_dict())
    volumes = tiny.random_volumes(1)
    expected = whole.get_submodule(part)(volumes).last_hidden_state
    assert torch.equal(encoder(volumes).last_hidden_state, expected)


def test_other_shapes_can_be_forgiven_alone(tmp_path):
    model = DCFormerModel(tiny.tiny_dcformer_config())
    save_changed(model, tmp_path, reshape("stages.0.layers.0.pwconv1.weight"))
    DCFormerModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="1 of another shape"):
        DCFormerModel.from_pretrained(tmp_path, ignore_mismatched_sizes=False)
    save_changed(model, tmp_path, remove("stages.1.layers.0.layer_scale"))
    with pytest.raises(ValueError, match="1 missing"):
        DCFormerModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Folder of an adapter, and its base model in the folder `base` within."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    folder = tmp_path_factory.mktemp("adapter")
    model = tiny.tiny_vlm()
    model.save_pretrained(folder / "base")
    settings = peft.LoraConfig(
        r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]
    )
    base = Med3DVLMForConditionalGeneration.from_pretrained(folder / "base")
    peft.get_peft_model(base, settings).save_pretrained(folder)
    return folder


KEY_OF_BASE = "model.language_model.norm.weight"
KEY_OF_ADAPTER = "base_model.model.model.language_model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("base/model.safetensors", remove(KEY_OF_BASE), rf"base' does not fit .*\n- 1 missing .*: {KEY_OF_BASE}"),
        (
            "base/model.safetensors",
            reshape(KEY_OF_BASE),
            rf"base' does not fit .*\n- 1 of another shape: {KEY_OF_BASE}",
        ),
        ("base/model.safetensors", add("other"), r"base' does not fit .*\n- 1 not part of the model: other"),
        ("adapter_model.safetensors", remove(KEY_OF_ADAPTER), "own' does not fit .*\n- 1 missing .*lora_A"),
        ("adapter_model.safetensors", reshape(KEY_OF_ADAPTER), "own' does not fit .*\n- 1 of another shape: .*lora_A"),
    ],
    ids=["base missing", "base misshapen", "base unexpected", "adapter missing", "adapter misshapen"],
)
def test_an_adapter_is_loaded_only_onto_a_base_that_is_whole(file, change, message, adapter, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(folder / "base")
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    assert Med3DVLMForConditionalGeneration.from_pretrained(folder)._hf_peft_config_loaded
    state = load_file(folder / file)
    change(state)
    save_file(state, folder / file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message):
        Med3DVLMForConditionalGeneration.from_pretrained(folder)
    Med3DVLMForConditionalGeneration.from_pretrained(folder, strict=False)


def test_a_transformers_without_its_private_mark_of_adapters_loads_models_all_the_same(tmp_path, monkeypatch):
    DCFormerModel(tiny.tiny_dcformer_config()).save_pretrained(tmp_path)
    monkeypatch.delattr(PeftAdapterMixin, "_hf_peft_config_loaded")
    DCFormerModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("keep", [4, 0.5])
def test_damaged_weights_are_refused_by_name(keep, tmp_path):
    DCFormerModel(tiny.tiny_dcformer_config()).save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: keep if keep > 1 else int(len(content) * keep)])
    with pytest.raises(OSError, match=rf"{tmp_path}: its weights are truncated or damaged .*download them again"):
        DCFormerModel.from_pretrained(tmp_path)


def test_loading_report_is_still_returned_when_asked_for(tmp_path):
    tiny.tiny_siglip().save_pretrained(tmp_path)
    model, info = DCFormerSiglipModel.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, DCFormerSiglipModel) and not info["missing_keys"]


def test_long_lists_are_cut_with_a_count(tmp_path):
    tiny.tiny_vlm().save_pretrained(tmp_path)
    config = tiny.tiny_vlm_config(vision_config=tiny.tiny_dcformer_config(depths=(1, 1, 1, 3, 1)))
    with pytest.raises(ValueError, match=r"missing in the checkpoint: .*, and \d+ more"):
        Med3DVLMForConditionalGeneration.from_pretrained(tmp_path, config=config)
