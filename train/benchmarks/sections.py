"""The measurements of `med3dvlm bench`. Each returns rows: plain values by name, for tables, JSON and plots."""

import gzip
import importlib.util
import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from ...configuration.configuration_dcformer import DCFormerConfig
from ...configuration.configuration_med3dvlm import Med3DVLMConfig
from ...configuration.configuration_vit3d import Vit3DConfig
from ...modeling_med3dvlm.modeling_dcformer import DCFormerModel
from ...modeling_med3dvlm.modeling_med3dvlm import Med3DVLMForConditionalGeneration
from ...modeling_med3dvlm.modeling_vit3d import Vit3DModel
from ...processing.image_processing_med3dvlm import Med3DVLMImageProcessor
from .baseline import PlainEncoder, prepare_with_other_libraries
from .measure import encoder_work, measure_limits, peak_memory, roofline_seconds, synchronise, time_in_turns


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Row = dict[str, Any]
# Of a profile.
OPERATIONS_SHOWN = 8


@dataclass(frozen=True)
class Settings:
    """
    What to measure.

    Args:
        device (`torch.device`): Where.
        runs (`int`): Calls of each function, in turns.
        dtypes (`tuple[str, ...]`): `"float32"`; `"bfloat16"` is autocast.
        variants (`tuple[str, ...]`): Encoders, the first of which is the one scaled, trained and asked.
        image_size (`tuple[int, int, int]`): Voxels, (depth, height, width).
        batch_sizes (`tuple[int, ...]`): Volumes at once, the first of which is used everywhere.
        scales (`tuple[float, ...]`): Factors on every axis of `image_size`, for the encoder.
        training_size (`tuple[int, int, int]`): Voxels of a volume in the training step.
        scan_shape (`tuple[int, int, int]`): Voxels of the scan to prepare, as NIfTI stores them.
        questions (`tuple[int, ...]`): Numbers of questions about one volume.
        new_tokens (`int`): Of one answer.
        language_sizes (`dict[str, int]`): Configuration of the language model, of the kind "llama".
    """

    device: torch.device
    runs: int = 7
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    variants: tuple[str, ...] = ("small",)
    image_size: tuple[int, int, int] = (128, 256, 256)
    batch_sizes: tuple[int, ...] = (1,)
    scales: tuple[float, ...] = (1.0,)
    training_size: tuple[int, int, int] = (64, 128, 128)
    scan_shape: tuple[int, int, int] = (512, 512, 300)
    questions: tuple[int, ...] = (1, 4)
    new_tokens: int = 16
    language_sizes: Any = None


# The sizes of SmolLM2-135M (its published config.json), a language model that two cores run.
SMALL_LANGUAGE_MODEL = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}


def precision(dtype: str, device: torch.device) -> Any:
    """Autocast for bfloat16, nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def encoder_like_trained(config: DCFormerConfig, device: torch.device) -> DCFormerModel:
    """A model with random weights and statistics, none of which is the 0 or 1 it starts from."""
    torch.manual_seed(0)
    model = DCFormerModel(config).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.to(device)


def relative_error(ours: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """The largest difference over all stages, as a share of the stage's largest magnitude."""
    return max(
        float((own.float() - other.float()).abs().max() / other.float().abs().max())
        for own, other in zip(ours, expected)
    )


def measure_machine(settings: Settings) -> Iterator[Row]:
    """The limits of the machine, for each type."""
    for dtype in settings.dtypes:
        limits = measure_limits(settings.device, DTYPES[dtype], settings.runs)
        yield {
            "dtype": dtype,
            "matmul_gflops": limits["matmul"] / 1e9,
            "convolution_gflops": limits["convolution"] / 1e9,
            "copy_gb_per_s": limits["copy"] / 1e9,
        }


@torch.no_grad()
def measure_encoder(settings: Settings) -> Iterator[Row]:
    """One forward pass: the plain formulation, our modules, the fused path, and Vit3D at the same input."""
    device = settings.device
    limits = {dtype: measure_limits(device, DTYPES[dtype]) for dtype in settings.dtypes}
    for variant, scale, batch_size in encoder_cases(settings):
        size = tuple(max(1, round(scale * length)) for length in settings.image_size)
        fused = encoder_like_trained(DCFormerConfig.from_variant(variant, image_size=size), device)
        fused.fused_inference = True
        plain = PlainEncoder.like(fused)
        modules = encoder_like_trained(fused.config, device)
        modules.fused_inference = False
        volumes = torch.rand(batch_size, 1, *size, device=device)
        functions: dict[str, Callable[[], Any]] = {
            "plain": partial(plain, volumes),
            "modules": partial(modules, volumes, output_hidden_states=True),
            "fused": partial(fused, volumes, output_hidden_states=True),
        }
        if all(length % patch == 0 for length, patch in zip(size, Vit3DConfig().patch_size)):
            functions["vit3d"] = partial(Vit3DModel(Vit3DConfig(image_size=size)).eval().to(device), volumes)
        exact = plain(volumes)
        for dtype in settings.dtypes:
            with precision(dtype, device):
                timings = time_in_turns(functions, device, settings.runs)
                errors = {
                    "plain": relative_error(functions["plain"](), exact),
                    "modules": relative_error(functions["modules"]().hidden_states, exact),
                    "fused": relative_error(functions["fused"]().hidden_states, exact),
                }
                peaks = {name: peak_memory(function, device) for name, function in functions.items()}
            work = encoder_work(fused.config, batch_size, size, DTYPES[dtype].itemsize)  # type: ignore[arg-type]
            least = roofline_seconds(work, limits[dtype])
            for name, timing in timings.items():
                peak, plain_peak = peaks[name], peaks["plain"]
                yield {
                    "variant": variant,
                    "image_size": list(size),
                    "batch_size": batch_size,
                    "dtype": dtype,
                    "path": name,
                    "seconds": timing.median,
                    "seconds_quartiles": [timing.lower, timing.upper],
                    "volumes_per_s": batch_size / timing.median,
                    "speedup": timings["plain"].median / timing.median,
                    "max_relative_error": errors.get(name),
                    "peak_mb": None if peak is None else peak / 1e6,
                    "peak_ratio": peak / plain_peak if peak is not None and plain_peak else None,
                    "times_roofline": timing.median / least if name != "vit3d" else None,
                }


def encoder_cases(settings: Settings) -> Iterator[tuple[str, float, int]]:
    """Every variant as it is, and the first at every scale and batch size."""
    seen = set()
    first, batch = settings.variants[0], settings.batch_sizes[0]
    variants = [(variant, settings.scales[0], batch) for variant in settings.variants]
    for case in variants + [(first, *case) for case in itertools.product(settings.scales, settings.batch_sizes)]:
        if case not in seen:
            seen.add(case)
            yield case


def training_step(model: torch.nn.Module, volumes: torch.Tensor, dtype: str) -> Callable[[], None]:
    """A function that makes one step of AdamW, in the form that is the HF Trainer's default."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        with precision(dtype, volumes.device):
            outputs = model(volumes)
        last = outputs[-1] if isinstance(outputs, list) else outputs.last_hidden_state
        last.float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_training(settings: Settings) -> Iterator[Row]:
    """One step of the encoder: forward, backward and AdamW, in the plain formulation and in ours."""
    device, variant = settings.device, settings.variants[0]
    config = DCFormerConfig.from_variant(variant, image_size=settings.training_size)
    volumes = torch.rand(max(2, settings.batch_sizes[0]), 1, *settings.training_size, device=device)
    for dtype in settings.dtypes:
        ours = encoder_like_trained(config, device).train()
        models = {"plain": PlainEncoder.like(ours), "ours": ours}
        functions = {name: training_step(model, volumes, dtype) for name, model in models.items()}
        timings = time_in_turns(functions, device, settings.runs)
        peaks = {name: peak_memory(function, device) for name, function in functions.items()}
        for name, timing in timings.items():
            peak, plain_peak = peaks[name], peaks["plain"]
            yield {
                "variant": variant,
                "image_size": list(settings.training_size),
                "batch_size": len(volumes),
                "dtype": dtype,
                "path": name,
                "seconds": timing.median,
                "seconds_quartiles": [timing.lower, timing.upper],
                "speedup": timings["plain"].median / timing.median,
                "peak_mb": None if peak is None else peak / 1e6,
                "peak_ratio": peak / plain_peak if peak is not None and plain_peak else None,
            }


def write_synthetic_ct(path: Path, shape: tuple[int, int, int]) -> None:
    """A CT-like volume in int16 HU: an elliptic body with noise in air without, stored as scanners store them."""
    rng = np.random.default_rng(0)
    x, y = (np.linspace(-1, 1, size, dtype=np.float32) for size in shape[:2])
    body = (x[:, None] / 0.85) ** 2 + (y[None, :] / 0.65) ** 2 < 1
    noise = rng.normal(scale=20, size=(*shape[:2], 16)).astype(np.int16)
    volume = np.full(shape, -1000, dtype=np.int16, order="F")
    for index in range(shape[2]):
        slice_ = noise[..., index % 16] + np.int16(200 * np.sin(index / 30))
        volume[..., index] = np.where(body, np.roll(slice_, 7 * index, axis=0) + np.int16(40), np.int16(-1000))
    header = nibabel.Nifti1Image(volume, np.diag([-0.8, -0.8, 1.5, 1.0]))
    with gzip.open(path, "wb", compresslevel=4) as stream:
        stream.write(header.to_bytes())


def measure_preparation(settings: Settings) -> Iterator[Row]:
    """A scan from its compressed file to `pixel_values`, beside the same steps by SimpleITK and MONAI if installed."""
    processor = Med3DVLMImageProcessor(image_size=list(settings.image_size), intensity_mode="window")
    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "scan.nii.gz"
        write_synthetic_ct(path, settings.scan_shape)
        functions: dict[str, Callable[[], Any]] = {"ours": lambda: processor(path)["pixel_values"][0]}
        if all(importlib.util.find_spec(name) is not None for name in ("SimpleITK", "monai")):
            window = (-1000.0, 1000.0)
            functions["simpleitk_monai"] = lambda: prepare_with_other_libraries(path, settings.image_size, window)
        timings = time_in_turns(functions, device, settings.runs)
        results = {name: function() for name, function in functions.items()}
        peaks = {name: peak_memory(function, device) for name, function in functions.items()}
        for name, timing in timings.items():
            other, peak, other_peak = timings.get("simpleitk_monai"), peaks[name], peaks.get("simpleitk_monai")
            yield {
                "scan_shape": list(settings.scan_shape),
                "file_mb": path.stat().st_size / 1e6,
                "image_size": list(settings.image_size),
                "path": name,
                "seconds": timing.median,
                "seconds_quartiles": [timing.lower, timing.upper],
                "speedup": None if other is None else other.median / timing.median,
                "peak_mb": None if peak is None else peak / 1e6,
                "peak_ratio": peak / other_peak if peak is not None and other_peak else None,
                "max_difference": float((results[name] - results["ours"]).abs().max()),
            }


def build_vlm(settings: Settings) -> Med3DVLMForConditionalGeneration:
    """A whole model with random weights, a small language model, and the first variant as its encoder."""
    torch.manual_seed(0)
    sizes = settings.language_sizes or SMALL_LANGUAGE_MODEL
    config = Med3DVLMConfig(
        vision_config=DCFormerConfig.from_variant(settings.variants[0], image_size=settings.image_size),
        text_config={"model_type": "llama", "eos_token_id": None, "pad_token_id": 0, "bos_token_id": None, **sizes},
        image_token_id=3,
    )
    return Med3DVLMForConditionalGeneration(config).eval().to(settings.device)


@torch.inference_mode()
def measure_generation(settings: Settings) -> Iterator[Row]:
    """An answer about a volume, beside the bare language model on the same number of tokens."""
    model = build_vlm(settings)
    bare = AutoModelForCausalLM.from_config(model.config.text_config).eval().to(settings.device)
    volumes = torch.rand(1, 1, *settings.image_size, device=settings.device)
    prompt = torch.tensor([[3] * model.config.image_seq_length + list(range(4, 36))], device=settings.device)
    text = torch.full_like(prompt, 5)
    length = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens, "do_sample": False}
    calls = []
    handle = model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    for dtype in settings.dtypes:
        with precision(dtype, settings.device):
            features = {"image": model.get_image_features(volumes)}

            def ask(features: dict[str, Any] = features) -> None:
                model.generate(input_ids=prompt, mm_encoder_outputs=features, **length)

            functions: dict[str, Callable[[], Any]] = {
                "bare language model": lambda: bare.generate(input_ids=text, **length),
                "volume encoded before": ask,
                "vision and projector": lambda: model.get_image_features(volumes),
                "whole answer": lambda: model.generate(input_ids=prompt, pixel_values=volumes, **length),
            }
            timings = time_in_turns(functions, settings.device, settings.runs)
            calls.clear()
            functions["whole answer"]()
            num_encodings = len(calls)
        reference = timings["bare language model"].median
        for name, timing in timings.items():
            has_overhead = name == "volume encoded before"
            yield {
                "dtype": dtype,
                "part": name,
                "prompt_tokens": prompt.shape[1],
                "new_tokens": settings.new_tokens,
                "seconds": timing.median,
                "seconds_quartiles": [timing.lower, timing.upper],
                "overhead": timing.median / reference - 1 if has_overhead else None,
                "encoder_calls": num_encodings if name == "whole answer" else None,
            }
    handle.remove()


@torch.inference_mode()
def measure_questions(settings: Settings) -> Iterator[Row]:
    """Several questions about one volume: encoded for each of them, and encoded once."""
    model, dtype = build_vlm(settings), settings.dtypes[0]
    volumes = torch.rand(1, 1, *settings.image_size, device=settings.device)
    prompt = torch.tensor([[3] * model.config.image_seq_length + list(range(4, 36))], device=settings.device)
    length = {"max_new_tokens": settings.new_tokens, "min_new_tokens": settings.new_tokens, "do_sample": False}
    for count in settings.questions:

        def each(count: int = count) -> None:
            for _ in range(count):
                model.generate(input_ids=prompt, pixel_values=volumes, **length)

        def once(count: int = count) -> None:
            features = {"image": model.get_image_features(volumes)}
            for _ in range(count):
                model.generate(input_ids=prompt, mm_encoder_outputs=features, **length)

        with precision(dtype, settings.device):
            timings = time_in_turns({"each": each, "once": once}, settings.device, max(1, settings.runs // 2))
        yield {
            "questions": count,
            "dtype": dtype,
            "seconds_encoded_each_time": timings["each"].median,
            "seconds_encoded_once": timings["once"].median,
            "speedup": timings["each"].median / timings["once"].median,
        }


def measure_profile(settings: Settings) -> Iterator[Row]:
    """Where the time of our forward pass and of our training step goes: the operations of PyTorch that take most."""
    device, dtype, variant = settings.device, settings.dtypes[0], settings.variants[0]
    config = DCFormerConfig.from_variant(variant, image_size=settings.image_size)
    encoder = encoder_like_trained(config, device)
    encoder.fused_inference = True
    volume = torch.rand(1, 1, *settings.image_size, device=device)
    volumes = torch.rand(max(2, settings.batch_sizes[0]), 1, *settings.training_size, device=device)

    @torch.inference_mode()
    def forward() -> None:
        with precision(dtype, device):
            encoder(volume)

    step = training_step(encoder_like_trained(config, device).train(), volumes, dtype)
    for name, function in (("forward pass, fused", forward), ("training step", step)):
        function()
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as profiler:
            for _ in range(settings.runs):
                function()
            synchronise(device)
        which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, which))
        total = sum(getattr(event, which) for event in events)
        for event in events[:OPERATIONS_SHOWN]:
            microseconds = getattr(event, which)
            yield {
                "what": name,
                "variant": variant,
                "dtype": dtype,
                "operation": event.key,
                "calls": event.count // settings.runs,
                "seconds": microseconds / 1e6 / settings.runs,
                "share": microseconds / total,
            }


SECTIONS: dict[str, Callable[[Settings], Iterator[Row]]] = {
    "machine": measure_machine,
    "encoder": measure_encoder,
    "training": measure_training,
    "preparation": measure_preparation,
    "generation": measure_generation,
    "questions": measure_questions,
    "profile": measure_profile,
}


__all__ = ["DTYPES", "SECTIONS", "SMALL_LANGUAGE_MODEL", "Settings", "build_vlm", "write_synthetic_ct"]
