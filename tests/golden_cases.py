"""Our models on the recorded weights and inputs of the original implementation.

Each `measure_*` returns one `Comparison` per recorded tensor. The tests hold them to the limits; run as a program, this
file prints them.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn


sys.path.insert(0, str(Path(__file__).parent / "goldens"))
import golden_io
import golden_weights

from med3dvlm import (
    DCFormerConfig,
    DCFormerModel,
    DCFormerSiglipConfig,
    DCFormerSiglipModel,
    Med3DVLMConfig,
    Med3DVLMForConditionalGeneration,
    Vit3DConfig,
    Vit3DModel,
)
from med3dvlm.modeling_med3dvlm.modeling_projector import PROJECTORS
from med3dvlm.modeling_med3dvlm.original_layout import (
    PROJECTOR_ROWS,
    Layout,
    dual_encoder_layout,
    encoder_layout,
    vision_language_layout,
)


FOLDERS = (Path(__file__).parent / "goldens", Path(__file__).parents[2] / "shared" / "goldens")
OUTPUT_LIMIT, GRADIENT_LIMIT = 1e-5, 5e-5  # of each tensor's largest magnitude
ENCODERS = ("nano", "naive", "tiny", "small", "base", "large", "small_full")


class Comparison(NamedTuple):
    """One tensor beside its golden: the largest difference, absolute and over the golden's largest magnitude."""

    golden: str
    tensor: str
    absolute: float
    relative: float
    limit: float


def find_golden(name: str) -> golden_io.Golden | None:
    """
    The golden `name`, or None where no folder has it. The recorded arrays of the larger encoders are too large for the
    repository: without them `arrays` is empty, and `meta` still has the layout and what each output amounts to.
    """
    for folder in FOLDERS:
        if (folder / f"{name}.npz").exists():
            return golden_io.load(name, folder)
    for folder in FOLDERS:
        if (path := folder / f"{name}.json").exists():
            return golden_io.Golden(json.loads(path.read_text()), {})
    return None


def compare(golden: golden_io.Golden, tensor: str, ours: torch.Tensor, limit: float = OUTPUT_LIMIT) -> Comparison:
    array = ours.detach().numpy()
    spec = golden.meta["outputs"][tensor]
    summary = golden_io.summary(array)  # mean and deviation also cover the elements that were not stored
    if golden.arrays:
        relative = golden_io.difference(golden, tensor, array)
        if "absmax" not in spec:  # integers: the number of elements that differ
            return Comparison(golden.meta["name"], tensor, relative, relative, 0.0)
    else:
        assert list(array.shape) == spec["shape"], f"{tensor}: shape {list(array.shape)}, golden {spec['shape']}"
        relative = abs(summary["absmax"] - spec["absmax"]) / spec["absmax"]
    gaps = [abs(summary[key] - spec[key]) / max(spec["absmax"], 1e-12) for key in ("mean", "std")]
    return Comparison(golden.meta["name"], tensor, relative * spec["absmax"], max(relative, *gaps), limit)


def golden_state(golden: golden_io.Golden, layout: dict | None = None) -> dict[str, np.ndarray]:
    return golden_weights.golden_state_dict(layout or golden.meta["layout"], golden.meta["salt"])


def golden_input(shape: list[int], salt: int = 0) -> torch.Tensor:
    return torch.from_numpy(golden_weights.golden_input(shape, salt))


def converted_state(state: dict[str, Any], layout: Layout, config: Any = None) -> dict[str, torch.Tensor]:
    """The recorded arrays, or tensors, of the original in our names."""
    converted: dict[str, torch.Tensor] = {}
    for original, value in state.items():
        names, change = layout.find(original)
        converted.update(zip(names, change.to_ours(torch.as_tensor(value), config)))
    return converted


def renaming(layout: Layout) -> Callable[[str], str]:
    """Our name for one of the original's."""
    return lambda key: layout.find(key)[0][0]


def load_exactly(model: nn.Module, state: dict[str, torch.Tensor]) -> nn.Module:
    """`model` with `state`, every tensor of both used."""
    model.load_state_dict(state, strict=True)
    return model.eval()


def tokens(hidden_state: torch.Tensor) -> torch.Tensor:
    return hidden_state.flatten(2).transpose(1, 2)  # (B, C, D, H, W) -> (B, N, C)


def measure_encoder(variant: str) -> Iterator[Comparison]:
    golden = find_golden(f"dcformer_{variant}")
    model = DCFormerModel(DCFormerConfig.from_variant(variant.removesuffix("_full")))
    assert model.num_parameters() == golden.meta["parameters"]
    load_exactly(model, converted_state(golden_state(golden), encoder_layout()))
    with torch.no_grad():
        outputs = model(golden_input(golden.meta["inputs"]["x"]["golden_input"]), output_hidden_states=True)
    for index, hidden_state in enumerate(outputs.hidden_states):
        yield compare(golden, f"hidden_{index}", tokens(hidden_state))


def gradient_norms(golden: golden_io.Golden, model: nn.Module, rename) -> Iterator[Comparison]:
    """The gradient's L2 norm of every parameter; norms that are zero in exact arithmetic are compared absolutely."""
    parameters = dict(model.named_parameters())
    for key, norms in golden.meta["grad_norms"].items():
        gap = abs(float(parameters[rename(key)].grad.double().norm()) - norms["l2"])
        is_zero = norms["l2_fp64"] < 1e-6
        limit = 1e-4 if is_zero else GRADIENT_LIMIT
        yield Comparison(golden.meta["name"], f"norm:{key}", gap, gap if is_zero else gap / norms["l2"], limit)


def measure_training_step() -> Iterator[Comparison]:
    golden = find_golden("dcformer_nano_train")
    model = DCFormerModel(DCFormerConfig.from_variant("nano"))
    load_exactly(model, converted_state(golden_state(golden), encoder_layout())).train()
    outputs = model(golden_input(golden.meta["inputs"]["x"]["golden_input"]), output_hidden_states=True)
    low, high = (tokens(outputs.hidden_states[stage]) for stage in (-2, -1))
    probes = [golden_weights.golden_tensor(name, low_or_high.shape) for name, low_or_high in
              (("probe_low", low), ("probe_high", high))]  # fmt: skip
    loss = (high * torch.from_numpy(probes[1])).sum() + (low * torch.from_numpy(probes[0])).sum()
    loss.backward()
    yield compare(golden, "hidden_3", low)
    yield compare(golden, "hidden_4", high)
    yield compare(golden, "loss", loss)
    buffers, parameters = dict(model.named_buffers()), dict(model.named_parameters())
    rename = renaming(encoder_layout())
    for output in golden.meta["outputs"]:
        kind, _, key = output.partition(":")
        if kind == "buffer":
            yield compare(golden, output, buffers[rename(key)])
        elif kind == "grad":
            gradient = parameters[rename(key)].grad
            if gradient.ndim == 5:
                gradient = gradient.permute(0, 1, 3, 4, 2)  # (out, in, D, H, W) -> (out, in, H, W, D)
            yield compare(golden, output, gradient, GRADIENT_LIMIT)
    yield from gradient_norms(golden, model, rename)


def measure_vit3d() -> Iterator[Comparison]:
    golden = find_golden("vit3d")
    model = Vit3DModel(Vit3DConfig(intermediate_size=4))
    assert model.num_parameters() == golden.meta["parameters"]
    load_exactly(model, converted_state(golden_state(golden), encoder_layout("vit3d"), model.config))
    with torch.no_grad():
        yield compare(
            golden, "tokens", model(golden_input(golden.meta["inputs"]["x"]["golden_input"])).last_hidden_state
        )


def measure_projector(name: str) -> Iterator[Comparison]:
    golden = find_golden(f"projector_{name}")
    fields = golden.meta["config"]
    projector_type = fields["mm_projector_type"]
    config = Med3DVLMConfig(
        text_config={"model_type": "qwen2", "hidden_size": fields["hidden_size"], "num_attention_heads": 4},
        image_token_id=0,
        projector_type=projector_type,
        low_level_tokens=fields.get("low_output_size", (1,)) if projector_type == "mixer" else (1,),
        high_level_tokens=fields.get("high_output_size", (1,)) if projector_type == "mixer" else (1,),
    )
    projector = PROJECTORS[projector_type](config)
    assert sum(parameter.numel() for parameter in projector.parameters()) == golden.meta["parameters"]
    load_exactly(projector, converted_state(golden_state(golden), Layout(PROJECTOR_ROWS[projector_type])))
    high = golden_input([2, 32, 768])
    low = golden_input([2, 256, 384])
    with torch.no_grad():
        yield compare(golden, "tokens", projector(low, high))


def dual_encoder(golden: golden_io.Golden, layout: dict, loss_type: str) -> DCFormerSiglipModel:
    model = DCFormerSiglipModel(
        DCFormerSiglipConfig(
            text_config={"model_type": "distilbert", "attn_implementation": "eager", **golden.meta["text_config"]},
            loss_type=loss_type,
        )
    )
    arrays = golden_state(golden, layout)
    state = converted_state(arrays, dual_encoder_layout(loss_type))
    if (
        loss_type == "softmax"
    ):  # ours holds the logarithm; `original_loss` takes the scale and its gradient as they are
        state["logit_scale"] = torch.from_numpy(arrays["logit_scale"]).reshape(1)
    return load_exactly(model, state)


def original_loss(images: torch.Tensor, texts: torch.Tensor, model: DCFormerSiglipModel, kind: str) -> tuple:
    """
    Logits and loss as the original computes them from the features, quirks included: in one process the temperature is
    used without exp and the sum is not divided, and the logits are averaged with their own transpose.
    """
    similarity = images @ texts.T
    if kind == "nce":
        logits = model.logit_scale * similarity
        labels = torch.arange(len(logits))
        loss = (nn.functional.cross_entropy(logits, labels) + nn.functional.cross_entropy(logits.T, labels)) / 2
        return (logits + logits.T) / 2, loss
    scale = model.logit_scale if kind == "sigmoid" else model.logit_scale.exp()
    logits = scale * similarity + model.logit_bias
    logits = (logits + logits.T) / 2
    signs = 2 * torch.eye(len(logits)) - 1
    loss = -nn.functional.logsigmoid(signs * logits).sum()
    return logits, loss if kind == "sigmoid" else loss / len(logits)


def encode(model: DCFormerSiglipModel, images: torch.Tensor, input_ids: np.ndarray, mask: np.ndarray) -> tuple:
    image_features = model.get_image_features(images).pooler_output
    text_features = model.get_text_features(torch.from_numpy(input_ids), torch.from_numpy(mask)).pooler_output
    return nn.functional.normalize(image_features, dim=-1), nn.functional.normalize(text_features, dim=-1)


def measure_dual_encoder(kind: str) -> Iterator[Comparison]:
    golden = find_golden(f"clip_{kind}")
    loss_type = "sigmoid" if kind == "sigmoid" else "softmax"
    model = dual_encoder(golden, golden.meta["layout"], loss_type)
    gains = golden.meta["inputs"]["images"]["then_multiply_sample_b_by"]
    images = golden_input([2, 1, 64, 128, 192]) * torch.tensor(gains).view(-1, 1, 1, 1, 1)
    image_features, text_features = encode(model, images, golden.arrays["input_ids"], golden.arrays["attention_mask"])
    logits, loss = original_loss(image_features, text_features, model, kind)
    loss.backward()
    yield compare(golden, "image_features", image_features)
    yield compare(golden, "text_features", text_features)
    yield compare(golden, "logits", logits)
    yield compare(golden, "loss", loss)
    parameters, rename = dict(model.named_parameters()), renaming(dual_encoder_layout(loss_type))
    for output in golden.meta["outputs"]:
        if output.startswith("grad:"):
            gradient = parameters[rename(output.removeprefix("grad:"))].grad
            yield compare(golden, output, gradient.reshape(golden.meta["outputs"][output]["shape"]), GRADIENT_LIMIT)
    yield from gradient_norms(golden, model, rename)


def measure_distributed_dual_encoder() -> Iterator[Comparison]:
    """The features of both ranks, and the original's gathered losses replayed in one process on all four pairs."""
    golden = find_golden("clip_ddp")
    layouts = {"gather": golden.meta["layout"]}
    layouts["nce"] = {key: shape for key, shape in golden.meta["layout"].items() if key not in ("t_prime", "bias")}
    layouts["nce"]["logit_scale"] = []
    inputs = golden.meta["inputs"]["rank r images"]["then_multiply_sample_b_by"]
    for kind, layout in layouts.items():
        model = dual_encoder(golden, layout, "sigmoid" if kind == "gather" else "softmax")
        images, texts = [], []
        for rank in range(2):
            volumes = golden_input([2, 1, 64, 128, 192], 1000 * (rank + 1))
            volumes = volumes * torch.tensor(inputs[f"rank{rank}"]).view(-1, 1, 1, 1, 1)
            arrays = golden.arrays
            features = encode(model, volumes, arrays[f"rank{rank}/input_ids"], attention_mask(arrays, rank))
            images.append(features[0])
            texts.append(features[1])
            if kind == "gather":
                yield compare(golden, f"rank{rank}/image_features", features[0])
                yield compare(golden, f"rank{rank}/text_features", features[1])
        logits, loss = original_loss(torch.cat(images), torch.cat(texts), model, kind)
        loss.backward()
        for rank in range(2):
            yield compare(golden, f"{kind}/rank{rank}/logits", logits)
            yield compare(golden, f"{kind}/rank{rank}/loss", loss)
        # Every rank holds the full gradient of the scalars. For the encoders the mean over ranks is the gradient.
        scalar = "t_prime" if kind == "gather" else "logit_scale"
        yield compare(golden, f"{kind}/rank0/grad:{scalar}", model.logit_scale.grad.reshape(()), GRADIENT_LIMIT)
        rename = renaming(dual_encoder_layout(model.config.loss_type))
        for key in ("mm_vision_proj.bias", "mm_language_proj.bias"):
            ours = dict(model.named_parameters())[rename(key)].grad.numpy()
            theirs = sum(golden.arrays[f"{kind}/rank{rank}/grad:{key}"] for rank in range(2)) / 2
            gap, largest = np.abs(ours - theirs).max(), np.abs(theirs).max()
            yield Comparison("clip_ddp", f"{kind}/mean grad:{key}", gap, gap / largest, GRADIENT_LIMIT)


def attention_mask(arrays: dict[str, np.ndarray], rank: int) -> np.ndarray:
    mask = np.ones_like(arrays[f"rank{rank}/input_ids"])
    mask[1, 10:] = 0
    return mask


def golden_vlm(golden: golden_io.Golden) -> Med3DVLMForConditionalGeneration:
    text_config = dict(golden.meta["llm_config"])
    rope = {"rope_type": "default", "rope_theta": text_config.pop("rope_theta")}
    config = Med3DVLMConfig(
        text_config={"model_type": "qwen2", "rope_parameters": rope, **text_config},
        image_token_id=160,
        prepend_image_token_embedding=True,
    )
    model = Med3DVLMForConditionalGeneration(config)
    assert model.num_parameters() == golden.meta["parameters"]
    return load_exactly(model, converted_state(golden_state(golden), vision_language_layout("mixer")))


def measure_vlm() -> Iterator[Comparison]:
    golden = find_golden("vlm")
    model = golden_vlm(golden)
    # The original writes image tokens from position 1 on: its first placeholder stays, its first text token is lost.
    input_ids, labels = (torch.from_numpy(golden.arrays[name]).clone() for name in ("input_ids", "labels"))
    input_ids[:, 256] = 160
    images = golden_input([1, 1, 128, 256, 256])
    with torch.no_grad():
        outputs = model(input_ids=input_ids, pixel_values=images, labels=labels)
    yield compare(golden, "image_features", outputs.image_hidden_states[:, 1:])
    yield compare(golden, "logits", outputs.logits)
    yield compare(golden, "loss", outputs.loss)
    generated = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        pixel_values=images,
        max_new_tokens=8,
        do_sample=False,
    )
    expected = golden.meta["generated_ids"]
    differing = sum(ours != theirs for ours, theirs in zip(generated[0, -8:].tolist(), expected))
    yield Comparison("vlm", "generated_ids", differing, differing, 0.0)


def measure_all() -> Iterator[Comparison]:
    for variant in ENCODERS:
        golden = find_golden(f"dcformer_{variant}")
        if golden is None:
            print(f"dcformer_{variant}: not in this checkout")
            continue
        if not golden.arrays:
            print(
                f"dcformer_{variant}: the arrays are not in this checkout; mean, deviation and largest magnitude are"
            )
        yield from measure_encoder(variant)
    yield from measure_training_step()
    yield from measure_vit3d()
    for name in ("linear", "mlp", "mhsa", "low_high_mlp", "mixer", "mixer_depth1"):
        yield from measure_projector(name)
    for kind in ("sigmoid", "nce"):
        yield from measure_dual_encoder(kind)
    yield from measure_distributed_dual_encoder()
    yield from measure_vlm()


if __name__ == "__main__":
    worst: dict[tuple[str, str], Comparison] = {}
    for comparison in measure_all():
        kind = "gradient norms" if comparison.tensor.startswith("norm:") else comparison.tensor
        key = (comparison.golden, kind)
        if key not in worst or comparison.relative / max(comparison.limit, 1e-12) > worst[key].relative / max(
            worst[key].limit, 1e-12
        ):
            worst[key] = comparison
    print("| golden | tensor | max absolute | max relative | limit | |\n| --- | --- | --- | --- | --- | --- |")
    for (golden, kind), comparison in worst.items():
        verdict = "ok" if comparison.relative <= comparison.limit else "EXCEEDED"
        print(
            f"| {golden} | {kind} | {comparison.absolute:.2e} | {comparison.relative:.2e} | {comparison.limit:.0e} | {verdict} |"
        )
