"""Files as the original implementation writes them, with the deterministic weights of the goldens."""

import json
from pathlib import Path

import golden_cases
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


IMAGE_TOKEN = "<im_patch>"


def tensors_of(name: str) -> dict[str, torch.Tensor]:
    """The tensors of a golden, under the original's names."""
    golden = golden_cases.find_golden(name)
    return {key: torch.from_numpy(value) for key, value in golden_cases.golden_state(golden).items()}


def word_tokenizer(words: list[str], **special: str) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are words, with ids in their order."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", **special)


def save_bin(state: dict[str, torch.Tensor], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def save_sharded(state: dict[str, torch.Tensor], folder: Path, num_shards: int) -> None:
    """safetensors shards and their index, as `save_pretrained` of transformers writes them."""
    names, weight_map = list(state), {}
    size = -(-len(names) // num_shards)
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: state[name].contiguous() for name in names[index * size : (index + 1) * size]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index_file = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_file))


def write_dual_encoder(folder: Path, kind: str, state: dict[str, torch.Tensor] | None = None) -> Path:
    """The folder that contrastive training leaves, `kind` being the golden's name of the loss."""
    folder.mkdir(parents=True)
    state = tensors_of(f"clip_{kind}") if state is None else state
    config = {
        "model_type": "dec_clip",
        "architectures": ["DEC_CLIP"],
        "vision_encoder": "dcformer",
        "language_model_name_or_path": "medicalai/ClinicalBERT",
        "input_size": [128, 192, 64],  # (height, width, depth), none like the other: a wrong order shows
        "dim": 768,
        "depth": 12,
        "hidden_size": 768,
        "mlp_depth": 2,
        "loss_type": "sigmoid" if kind == "sigmoid" else "nce",
        "torch_dtype": "float64",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    word_tokenizer([f"w{index}" for index in range(120)], pad_token="w1").save_pretrained(folder)
    return folder


def write_text_config(folder: Path) -> Path:
    """The configuration of the small DistilBERT of the goldens."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = golden_cases.find_golden("clip_sigmoid").meta["text_config"]
    (folder / "config.json").write_text(json.dumps({"model_type": "distilbert", **fields}))
    return folder


def vlm_config() -> dict:
    """`config.json` of the merged model."""
    meta = golden_cases.find_golden("vlm").meta
    return {
        "model_type": "vlm_qwen",
        "architectures": "VLMQwenForCausalLM",
        **meta["llm_config"],
        **{key: value for key, value in meta["vision_args"].items() if key != "freeze_vision_tower"},
        "low_input_size": [256, 384],
        "high_input_size": [32, 768],
        "mm_hidden_size": 768,
        "tune_mm_mlp_adapter": False,
        "torch_dtype": "float32",
        "transformers_version": "4.48.3",
        "use_cache": True,
    }


def vlm_tokenizer() -> PreTrainedTokenizerFast:
    words = [f"w{index}" for index in range(160)]
    return word_tokenizer([*words, IMAGE_TOKEN], eos_token="w159", additional_special_tokens=[IMAGE_TOKEN])


def write_vlm(folder: Path, num_shards: int = 3, state: dict[str, torch.Tensor] | None = None) -> Path:
    """The folder that the merge script leaves."""
    folder.mkdir(parents=True)
    state = tensors_of("vlm") if state is None else state
    (folder / "config.json").write_text(json.dumps(vlm_config()))
    save_sharded(state, folder, num_shards)
    vlm_tokenizer().save_pretrained(folder)
    tower = "model.vision_tower."
    save_bin(
        {key.removeprefix("model."): value for key, value in state.items() if key.startswith(tower)},
        folder / "vision_tower.bin",
    )
    return folder


def with_adapters(state: dict[str, torch.Tensor], rank: int = 2) -> dict[str, torch.Tensor]:
    """A merged model's tensors as those of a LoRA run on all linear layers of its blocks, adapters random."""
    generator = torch.Generator().manual_seed(0)
    run = {}
    for name, value in state.items():
        module, _, parameter = name.rpartition(".")
        is_adapted = name.startswith("model.layers.") and ("_proj" in module)
        key = f"base_model.model.{module}.base_layer.{parameter}" if is_adapted else f"base_model.model.{name}"
        run[key] = value
        if is_adapted and parameter == "weight":
            down = torch.randn(rank, value.shape[1], generator=generator)
            up = torch.randn(value.shape[0], rank, generator=generator)
            run[f"base_model.model.{module}.lora_A.default.weight"] = 0.1 * down
            run[f"base_model.model.{module}.lora_B.default.weight"] = 0.1 * up
    return run
