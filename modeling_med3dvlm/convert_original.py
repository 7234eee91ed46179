"""
The weights of the original implementation (Xin et al. 2025) as published folders of ours, and back.

Tensors go from file to file, a shard at a time; no model is built but on the meta device, which tells the names and
shapes that must come out. The names are in `original_layout`, what a source is says `original_plan`.
"""

import json
import math
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging
from typing_extensions import Unpack

from ..configuration.configuration_dcformer import DCFORMER_VARIANTS, DCFormerConfig
from ..configuration.configuration_dcformer_siglip import DCFormerSiglipConfig
from ..configuration.configuration_vit3d import Vit3DConfig
from ..hub_cards.files import sha256_of, write_json_atomically
from ..hub_cards.model_card import CardFields, check_fields, create_model_card
from ..hub_cards.places import has_form_of_owned_repository
from ..hub_cards.publish import (
    CONVERSION_NAME,
    check_destination,
    check_fit,
    load_model,
    put_in_place,
    write_companions,
)
from ..processing.processing_med3dvlm import Med3DVLMProcessor
from .modeling_dcformer import DCFormerModel
from .modeling_dcformer_siglip import DCFormerSiglipModel
from .modeling_med3dvlm import Med3DVLMForConditionalGeneration
from .modeling_vit3d import Vit3DModel
from .original_layout import AS_IT_IS, Change, Layout, dual_encoder_layout, encoder_layout
from .original_plan import Plan, check_plan, make_plan
from .original_source import (
    PRETRAINED_VIT,
    Reader,
    Source,
    few,
    list_tensors,
    open_source,
    read_json,
    read_tensor,
)


logger = logging.get_logger(__name__)

TOOL = f"med3dvlm {version('med3dvlm')}"
PROGRESS_NAME = "progress.json"
PROJECTOR_WEIGHTS = "projector.safetensors"
# Alpha is not in the file of a LoRA run; this is what the original's scripts train and merge with.
ORIGINAL_LORA_ALPHA = 32


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    tokenizer: Any = None,
    lora_alpha: float | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    **card_fields: Unpack[CardFields],
) -> dict[str, Any]:
    """
    Converts weights of the original implementation to a published folder of ours. What they are is read from the files.
    Every tensor finds its place, or nothing is written. A conversion that was ended, even killed, is continued by the same
    call: finished shards are checked and kept.

    Args:
        source (`str` or `os.PathLike`):
            A file (`.bin` or `.safetensors`) or a folder.
        destination (`str` or `os.PathLike`):
            The new folder, which appears when it is complete.
        config (`str` or `os.PathLike`, *optional*):
            Folder or `config.json` of the language model (or of the dual encoder's text encoder), where none lies beside
            the weights.
        tokenizer (`str`, `os.PathLike` or `PreTrainedTokenizerBase`, *optional*):
            Where none lies beside the weights: a tokenizer, its folder or its repository.
        lora_alpha (`float`, *optional*):
            Alpha of a LoRA run; 32, as in the original's scripts, by default.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a model that is there.
        max_shard_size (`int`, *optional*, defaults to 5e9):
            Bytes of a shard, where the source is one file; several are converted to as many.
        card_fields (*optional*):
            For the card, see [`~hub_cards.model_card.CardFields`].

    Returns:
        `dict`: what `conversion.json` in the new folder holds, the hashes of the source files among it.

    Raises:
        FileExistsError: the destination holds files that are not to be replaced.
        FileNotFoundError: there is no source, or a part of it is missing.
        ValueError: the source is none of the known artefacts, a tensor is missing, left over or of another shape, or
            something that the files do not say was not given; or the Hub refuses what the card is to say.
    """
    destination = Path(destination).absolute()
    check_new(destination, overwrite)
    check_fields(card_fields)
    opened = open_source(Path(source))
    plan = make_plan(opened, config, tokenizer)
    if lora_alpha is not None and not opened.has_adapters:
        raise ValueError(f"{opened.path}: `lora_alpha` was given, but there are no adapters in it: leave it out.")
    if opened.has_adapters and lora_alpha is None:
        lora_alpha = ORIGINAL_LORA_ALPHA
        plan.assumptions.append(f"LoRA alpha {lora_alpha}, as in the original's scripts; the file does not say.")
    check_plan(opened, plan)

    with workplace(destination, describe_task(opened, plan, lora_alpha, max_shard_size)) as (folder, progress):
        shards = split_in_shards(opened, max_shard_size)
        single = SAFE_WEIGHTS_NAME if plan.projector_config is None else PROJECTOR_WEIGHTS
        weight_map: dict[str, str] = {}
        exact: dict[str, Any] = {}
        for index, names in enumerate(logging.tqdm(shards, desc="converting", unit="shard")):
            number = f"-{index + 1:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
            shard = folder / single.replace(".safetensors", f"{number}.safetensors")
            write_shard(opened, plan, names, shard, progress, lora_alpha)
            weight_map.update(dict.fromkeys(progress.shards[shard.name]["tensors"], shard.name))
            exact.update(progress.shards[shard.name]["exact"])
        for file in opened.files:
            progress.hash_source(file)
        record = {
            "tool": TOOL,
            "direction": "from the original",
            "kind": plan.kind,
            "source": opened.path.name,
            "source_files": progress.sources,
            "tensors": len(opened.tensors),
            "assumptions": plan.assumptions,
            "exact_scalars": exact,
            **({"lora_alpha": lora_alpha} if opened.has_adapters else {}),
        }
        if len(shards) > 1:
            write_index(folder, plan.expected, weight_map, opened)
        base_model = opened.config.get("language_model_name_or_path") or opened.config.get("_name_or_path") or ""
        if has_form_of_owned_repository(base_model):
            card_fields.setdefault("base_model", base_model)
        write_companion_files(folder, plan, record, card_fields)
        write_json_atomically(record, folder / CONVERSION_NAME)
        put_in_place(folder, destination, folder.parent / "old")
    return record


def check_new(destination: Path, overwrite: bool) -> None:
    """
    Checks the destination, and puts back the folder there that an earlier call took away and was ended before it put the
    new one in its place.

    Raises:
        FileExistsError: the destination holds files, and they are no conversion or must not be replaced.
    """
    old = place_beside(destination) / "old"
    if old.exists() and not destination.exists():
        old.rename(destination)
    elif old.exists() and (destination / CONVERSION_NAME).is_file():  # ended after that: what was replaced may go
        shutil.rmtree(old)
    if not (overwrite and (destination / CONVERSION_NAME).is_file()):
        check_destination(destination, overwrite)


class Progress:
    """
    What a conversion has done, in a file that the next one reads if this one is ended.

    Args:
        path (`Path`):
            The file.
        task (`dict`):
            What is converted, and how; the progress of another task does not count.
    """

    def __init__(self, path: Path, task: dict[str, Any]):
        self.path, self.task = path, task
        self.shards: dict[str, dict[str, Any]] = {}
        self.sources: dict[str, dict[str, Any]] = {}
        if path.is_file():
            state = read_json(path)
            if state["task"] == task:
                self.shards, self.sources = state["shards"], state["sources"]

    def write(self) -> None:
        write_json_atomically({"task": self.task, "shards": self.shards, "sources": self.sources}, self.path)

    def is_done(self, shard: Path) -> bool:
        """Whether a shard was finished, and is to the bit what it was then."""
        done = self.shards.get(shard.name)
        return done is not None and shard.is_file() and sha256_of(shard) == done["sha256"]

    def hash_source(self, file: Path) -> None:
        """Records a source file, once."""
        if file.name not in self.sources:
            self.sources[file.name] = {"sha256": sha256_of(file), "num_bytes": file.stat().st_size}
            self.write()


def place_beside(destination: Path) -> Path:
    """The folder that a conversion works in."""
    return destination.parent / f".{destination.name}.converting"


@contextmanager
def workplace(destination: Path, task: dict[str, Any]) -> Iterator[tuple[Path, Progress]]:
    """
    The folder beside the destination in which the new one grows, under a name that the next call finds again. It stays
    when the block ends with an error, and goes when it ends well.
    """
    place = place_beside(destination)
    progress = Progress(place / PROGRESS_NAME, task)
    if place.exists() and not progress.shards:
        shutil.rmtree(place)  # of another task, or with nothing to keep
    folder = place / "new"
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.name not in progress.shards:  # half written
            path.unlink()
    yield folder, progress
    shutil.rmtree(place)


def describe_task(source: Source, plan: Plan, lora_alpha: float | None, max_shard_size: int) -> dict[str, Any]:
    """What tells one conversion from another: a file that was changed in between is another one."""
    files = {str(file.absolute()): [file.stat().st_size, file.stat().st_mtime_ns] for file in source.files}
    return {
        "tool": TOOL,
        "kind": plan.kind,
        "image_size": list(plan.vision_config.image_size),
        "files": files,
        "lora_alpha": lora_alpha,
        "max_shard_size": max_shard_size,
    }


def split_in_shards(source: Source, max_shard_size: int) -> list[list[str]]:
    """The tensors of each output file: those of one source file, or of a single one as many as fit."""
    if len(source.files) > 1:
        by_file = defaultdict(list)
        for name, tensor in source.tensors.items():
            by_file[tensor.file].append(name)
        return [by_file[file] for file in source.files]
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in source.tensors.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.num_bytes
    return shards


def write_shard(
    source: Source, plan: Plan, names: Sequence[str], shard: Path, progress: Progress, lora_alpha: float | None
) -> None:
    """Converts the tensors `names` to one file, unless it is there from an earlier call."""
    if progress.is_done(shard):
        logger.info(f"{shard.name} is done.")
        return
    state: dict[str, torch.Tensor] = {}
    exact: dict[str, Any] = {}
    reader = Reader()
    # The largest first: what is mapped is on top of what has been read, and is smallest at the end.
    for name in sorted(names, key=lambda name: -source.tensors[name].num_bytes):
        value = read_tensor(reader, source.tensors[name], lora_alpha)
        found = plan.layout.find(name)
        assert found is not None
        ours, change = found
        if not change.is_exact:
            exact[name] = {"value": float(value), "dtype": str(value.dtype).removeprefix("torch.")}
            if change.to_ours(value, plan.vision_config)[0].isfinite().logical_not().any():
                raise ValueError(f"{source.path}: {name!r} is {float(value)}, which is no scale.")
        for key, tensor in zip(ours, change.to_ours(value, plan.vision_config)):
            state[key] = tensor.contiguous() if len(ours) == 1 else tensor.clone()
    reader.close()
    written = sorted(state)
    progress.shards[shard.name] = {"sha256": save_shard(state, shard), "tensors": written, "exact": exact}
    progress.write()


def save_shard(state: dict[str, torch.Tensor], shard: Path) -> str:
    """Writes a safetensors file that appears when it is on the disk, lets go of `state`, and returns the file's hash."""
    temporary = shard.with_name(f".{shard.name}.tmp")
    save_file(state, temporary, metadata={"format": "pt"})
    state.clear()
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(shard)
    return sha256_of(shard)


def write_index(
    folder: Path, expected: Mapping[str, tuple[int, ...]], weight_map: Mapping[str, str], source: Source
) -> None:
    """The index of a sharded model, as transformers writes it."""
    total_size = sum(tensor.num_bytes for tensor in source.tensors.values())
    metadata = {"total_parameters": sum(map(math.prod, expected.values())), "total_size": total_size}
    content = json.dumps({"metadata": metadata, "weight_map": dict(weight_map)}, indent=2, sort_keys=True) + "\n"
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(content, encoding="utf-8")


def write_companion_files(folder: Path, plan: Plan, record: Mapping[str, Any], card_fields: CardFields) -> None:
    """All of the new folder that is no weight: configuration, code, processor, tokenizer, card."""
    provenance = describe_provenance(record)
    if plan.model is None:
        assert plan.projector_config is not None
        config = plan.projector_config
        fields = {
            "model_type": "med3dvlm_projector",
            "text_hidden_size": config.text_config.hidden_size,
            **{
                name: getattr(config, name)
                for name in ("projector_type", "projector_depth", "low_level_tokens", "high_level_tokens")
            },
        }
        write_json_atomically(fields, folder / CONFIG_NAME)
        card = PROJECTOR_CARD.format(kind=record["kind"], provenance=provenance, weights=PROJECTOR_WEIGHTS)
        (folder / "README.md").write_text(card, encoding="utf-8")
        return
    model = plan.model
    model.config.dtype = common_dtype(folder)
    model.config.architectures = [type(model).__name__]
    nn.Module.to(model, model.config.dtype)  # the card names the precision
    check_fit(model.config, plan.processor)
    card_fields.setdefault("notes", notes_of(plan))
    card_fields.setdefault("training_data", provenance)
    card = create_model_card(model, plan.processor, **card_fields)
    model.config.save_pretrained(folder)
    write_companions(folder, model, plan.processor, card)


def common_dtype(folder: Path) -> torch.dtype:
    """The precision of most weights; a model is loaded in one."""
    counts: Counter[torch.dtype] = Counter()
    for shard in sorted(folder.glob("*.safetensors")):
        for tensor in list_tensors(shard).values():
            if tensor.dtype.is_floating_point:
                counts[tensor.dtype] += math.prod(tensor.shape)
    return counts.most_common(1)[0][0]


def describe_provenance(record: Mapping[str, Any]) -> str:
    """For the card: where the weights come from."""
    lines = [
        f"Converted from weights of the original implementation by {record['tool']}: {record['kind']}, "
        f"{record['tensors']} tensors, values as they were. What they were trained on is not in the files; ask those who "
        "published them, and mind their licence.",
        "",
        *(
            f"- `{name}`, {file['num_bytes']:,} bytes, SHA-256 `{file['sha256']}`"
            for name, file in record["source_files"].items()
        ),
        *(f"- Assumed: {assumption}" for assumption in record["assumptions"]),
    ]
    return "\n".join(lines)


def notes_of(plan: Plan) -> str:
    """What the reader of the card must know first."""
    if isinstance(plan.model, Med3DVLMForConditionalGeneration):
        return (
            "Weights of the original Med3DVLM, converted. Its prompt is the placeholders and then the question, without a "
            "chat format, and it reads no first token of the question: it was trained so, and the processor here prepares "
            "the same."
        )
    return "Weights of the original implementation, converted."


PROJECTOR_CARD = """# Projector of a Med3DVLM

{kind}. A projector is a part of a model: `{weights}` holds it under the names it has in `Med3DVLMModel`, and the input
embeddings where the original's file has them. Put it into a model with the same projector:

```python
from safetensors.torch import load_file

result = model.model.load_state_dict(load_file("{weights}"), strict=False)
assert not result.unexpected_keys
```

The original does not read the embeddings back from its file; leave them out to do the same.

{provenance}
"""


# --- back to the original ----------------------------------------------------------------------------------------------


def convert_to_original(
    source: str | os.PathLike, destination: str | os.PathLike, *, overwrite: bool = False
) -> dict[str, Any]:
    """
    Writes an encoder or a dual encoder of ours as the original writes its own: `pretrained_ViT.bin`, and for a dual
    encoder its `config.json`, `model.safetensors` and tokenizer too.

    Args:
        source (`str` or `os.PathLike`):
            Folder or repository of a published [`DCFormerModel`], [`Vit3DModel`] or [`DCFormerSiglipModel`].
        destination (`str` or `os.PathLike`):
            The new folder, which appears when it is complete.
        overwrite (`bool`, *optional*, defaults to `False`):
            Whether to replace a conversion that is there.

    Returns:
        `dict`: what `conversion.json` in the new folder holds.

    Raises:
        FileExistsError: the destination holds files that are not to be replaced.
        OSError: there is no model.
        ValueError: the model is one that the original cannot build; the message says what differs.
    """
    destination = Path(destination).absolute()
    check_new(destination, overwrite)
    model = load_model(os.fspath(source))
    exact = {}
    if (Path(source) / CONVERSION_NAME).is_file():
        exact = read_json(Path(source) / CONVERSION_NAME).get("exact_scalars", {})
    if isinstance(model, DCFormerSiglipModel):
        check_original_builds_dual_encoder(model.config)
        vision_config = model.config.vision_config
        layout = dual_encoder_layout(model.config.loss_type, vision_config.model_type)
    elif isinstance(model, (DCFormerModel, Vit3DModel)):
        check_original_builds_encoder(model.config)
        vision_config = model.config
        layout = encoder_layout("m3d" if getattr(vision_config, "use_final_norm", False) else vision_config.model_type)
    else:
        raise ValueError(
            f"{source}: a {type(model).__name__} has no way back: the original's language model reads its prompts in another "
            "way. Encoders and dual encoders have one."
        )
    state = state_to_original(model.state_dict(), layout, vision_config, exact)
    files = sorted(Path(source).glob("*.safetensors")) if Path(source).is_dir() else []
    record = {
        "tool": TOOL,
        "direction": "to the original",
        "kind": type(model).__name__,
        "source": Path(source).name,
        "source_files": {file.name: {"sha256": sha256_of(file), "num_bytes": file.stat().st_size} for file in files},
        "tensors": len(state),
    }
    with workplace(destination, {}) as (folder, _):
        if isinstance(model, DCFormerSiglipModel):
            save_file(state, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
            write_json_atomically(original_config(model, state), folder / CONFIG_NAME)
            (folder / SAFE_WEIGHTS_NAME).chmod((folder / CONFIG_NAME).stat().st_mode)
            Med3DVLMProcessor.from_pretrained(os.fspath(source)).tokenizer.save_pretrained(folder)
            prefix = "vision_encoder."
            state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        torch.save(state, folder / PRETRAINED_VIT)
        write_json_atomically(record, folder / CONVERSION_NAME)
        put_in_place(folder, destination, folder.parent / "old")
    return record


def state_to_original(
    state: Mapping[str, torch.Tensor], layout: Layout, vision_config: Any, exact: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """
    A state dict of ours in the original's names.

    Raises:
        ValueError: the original has no place for a tensor.
    """
    converted: dict[str, torch.Tensor] = {}
    left = []
    for ours in state:
        found = layout.find_original(ours)
        if found is None:
            left.append(ours)
            continue
        name, parts, change = found
        if name not in converted:
            values = tuple(state[part] for part in parts)
            converted[name] = restore_exactly(name, values, change, vision_config, exact)
    if left:
        raise ValueError(f"The original has no place for {len(left)} tensors: {few(left)}.")
    return converted


def restore_exactly(
    name: str, values: tuple[torch.Tensor, ...], change: Change, vision_config: Any, exact: Mapping[str, Any]
) -> torch.Tensor:
    """A tensor of the original; a scalar that its conversion rounded comes back as it was, unless it was trained since."""
    if change is AS_IT_IS:
        return values[0]
    if not change.is_exact and name in exact:
        original = torch.tensor(exact[name]["value"], dtype=getattr(torch, exact[name]["dtype"]))
        if torch.equal(change.to_ours(original, vision_config)[0].to(values[0].dtype), values[0]):
            return original
    return change.to_original(values, vision_config).contiguous()


def check_original_builds_encoder(config: Any) -> None:
    """
    Raises:
        ValueError: the original has no such encoder.
    """
    if config.model_type == "vit3d":
        check_original_builds_vit3d(config)
        return
    sizes = {"depths": tuple(config.depths), "hidden_sizes": tuple(config.hidden_sizes)}
    if sizes not in DCFORMER_VARIANTS.values():
        raise ValueError(
            f"The original has no DCFormer of {list(config.depths)} blocks and {list(config.hidden_sizes)} channels, only "
            f"{', '.join(DCFORMER_VARIANTS)}."
        )
    default = DCFormerConfig()
    for name in ("kernel_sizes", "mlp_ratio", "hidden_act", "batch_norm_eps", "num_channels"):
        ours, theirs = (getattr(one, name) for one in (config, default))
        if (list(ours) if isinstance(ours, (list, tuple)) else ours) != (
            list(theirs) if isinstance(theirs, (list, tuple)) else theirs
        ):
            raise ValueError(f"The original's DCFormer has `{name}` {theirs}, this one {ours}.")


def check_original_builds_vit3d(config: Any) -> None:
    """
    What the tensors do not tell, and the original's code takes for granted.

    Raises:
        ValueError: the original would compute something else with these weights.
    """
    default, patch = Vit3DConfig(), tuple(config.patch_size)
    is_m3d = config.use_final_norm and not config.use_patch_norm
    faults = [
        f"`{name}` {getattr(config, name)} instead of {getattr(default, name)}"
        for name in ("head_dim", "hidden_act", "layer_norm_eps")
        if getattr(config, name) != getattr(default, name)
    ]
    if not is_m3d and (config.use_final_norm, config.use_patch_norm) != (False, True):
        faults.append("`use_final_norm` and `use_patch_norm` both or neither, instead of one of them")
    if (is_m3d and patch != (4, 16, 16)) or (not is_m3d and len(set(patch)) > 1):
        faults.append(f"`patch_size` {patch} instead of {'(4, 16, 16)' if is_m3d else 'cubes'}")
    if faults:
        raise ValueError(f"The original has no such vision transformer: {'; '.join(faults)}.")


def check_original_builds_dual_encoder(config: DCFormerSiglipConfig) -> None:
    """
    Raises:
        ValueError: the original has no such dual encoder.
    """
    vision_config: Any = config.vision_config
    small = DCFORMER_VARIANTS["small"]
    if vision_config.model_type != "dcformer" or tuple(vision_config.hidden_sizes) != small["hidden_sizes"]:
        raise ValueError(
            "The original's dual encoder always has DCFormer-small as volume encoder, this one has another."
        )
    check_original_builds_encoder(vision_config)
    if config.text_pooling != "cls":
        raise ValueError(
            f"The original takes the first token's vector of a text, this model has `text_pooling` {config.text_pooling!r}."
        )
    if not hasattr(config.text_config, "dim"):
        raise ValueError(
            "The original asks its text encoder for `dim`, which DistilBERTs such as ClinicalBERT have and "
            f"{config.text_config.model_type!r} has not."
        )


def original_config(model: DCFormerSiglipModel, state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The `config.json` of the original's dual encoder."""
    config: Any = model.config
    depth, height, width = config.image_size
    scale = state["t_prime" if config.loss_type == "sigmoid" else "logit_scale"]
    fields = {
        "architectures": ["DEC_CLIP"],
        "model_type": "dec_clip",
        "vision_encoder": "dcformer",
        "language_model_name_or_path": config.text_config._name_or_path or "medicalai/ClinicalBERT",
        "input_size": [height, width, depth],
        "dim": 768,
        "depth": 12,
        "hidden_size": config.projection_dim,
        "mlp_depth": 2,
        "loss_type": "sigmoid" if config.loss_type == "sigmoid" else "nce",
        "t_prime": float(scale),
        "bias": float(state["bias"]) if config.loss_type == "sigmoid" else 0.0,
        "gather_loss": True,
        "local_loss": False,
        "efficient_loss": False,
        "torch_dtype": str(state["mm_vision_proj.weight"].dtype).removeprefix("torch."),
    }
    return fields


__all__ = ["convert", "convert_to_original"]
