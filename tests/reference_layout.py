"""Where each tensor of the original implementation stands in ours: names, and axes where they differ.

The original convolves (H, W, D) grids, ours (D, H, W); its patches and their voxels are in (H, W, D) order too.
"""

import re
from collections.abc import Callable

import numpy as np
import torch


AXES = {"1": "height", "2": "width", "3": "depth"}  # the branch c1 runs along H, c2 along W, c3 along D
PARTS = {"0": "conv", "1": "norm"}

ENCODER_KEYS: list[tuple[str, Callable[[re.Match], str] | str]] = [
    (r"^encoder\.s0\.0\.(\d)\.c(\d)\.(\d)\.", lambda m: f"stem.layers.{m[1]}.{PARTS[m[3]]}_{AXES[m[2]]}."),
    (r"^encoder\.s(\d)\.0\.proj\.", lambda m: f"stages.{int(m[1]) - 1}.downsampling_layer."),
    (r"^encoder\.s(\d)\.(\d+)\.", lambda m: f"stages.{int(m[1]) - 1}.layers.{m[2]}."),
    (r"dwconv\.c(\d)\.(\d)\.", lambda m: f"dwconv.{PARTS[m[2]]}_{AXES[m[1]]}."),
    (r"mlp\.mlp\.0\.", "pwconv1."),
    (r"mlp\.mlp\.3\.", "pwconv2."),
    (r"scale$", "layer_scale"),
]
PROJECTOR_KEYS: dict[str, list[tuple[str, Callable[[re.Match], str] | str]]] = {
    "linear": [(r"^", "projection.")],
    "mlp": [(r"^mm_projector\.0\.", "mlp.0."), (r"^mm_projector\.1\.1\.", "mlp.2.")],
    "low_high_mlp": [
        (r"^low_up_mlp\.", "low_projection."),
        (r"^high_up_mlp\.", "high_projection."),
        (r"^mm_projector\.1\.", "mlp.1."),
    ],
    "mixer": [
        (r"\.ln1\.", ".token_norm."),
        (r"\.ln2\.", ".channel_norm."),
        (r"\.mlp1\.mm_projector\.", ".token_mlp."),
        (r"\.mlp2\.mm_projector\.", ".channel_mlp."),
        (r"_mlp\.1\.1\.", "_mlp.2."),
    ],
    "mhsa": [
        (r"^mlp\.linear1\.", "fc1."),
        (r"^mlp\.linear2\.", "fc2."),
        (r"^norm1\.", "attention_norm."),
        (r"^norm2\.", "mlp_norm."),
        (r"^out_layer\.", "projection."),
    ],
}
DUAL_ENCODER_KEYS = [
    (r"^language_encoder\.", "text_model."),
    (r"^mm_vision_proj\.", "visual_projection."),
    (r"^mm_language_proj\.", "text_projection."),
    (r"^t_prime$", "logit_scale"),
    (r"^bias$", "logit_bias"),
]


def rename(key: str, table: list) -> str:
    """`key` after every substitution of `table`."""
    for pattern, replacement in table:
        key = re.sub(pattern, replacement, key)
    return key


def encoder_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor of the encoder with its kernel axes in our order: (out, in, H, W, D) -> (out, in, D, H, W)."""
    return value.permute(0, 1, 4, 2, 3) if value.ndim == 5 else value


def encoder_state(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {rename(key, ENCODER_KEYS): encoder_tensor(torch.from_numpy(value)) for key, value in arrays.items()}


def projector_state(arrays: dict[str, np.ndarray], projector_type: str) -> dict[str, torch.Tensor]:
    table = PROJECTOR_KEYS[projector_type]
    return {rename(key, table): torch.from_numpy(value) for key, value in arrays.items()}


def dual_encoder_key(key: str) -> str:
    if key.startswith("vision_encoder."):
        return "vision_model." + rename(key.removeprefix("vision_encoder."), ENCODER_KEYS)
    return rename(key, DUAL_ENCODER_KEYS)


def dual_encoder_state(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    state = {}
    for key, value in arrays.items():
        tensor = torch.from_numpy(value)
        tensor = encoder_tensor(tensor) if key.startswith("vision_encoder.") else tensor
        state[dual_encoder_key(key)] = tensor.reshape(1) if tensor.ndim == 0 and "num_batches" not in key else tensor
    return state


def vlm_state(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tower, projector = "model.vision_tower.vision_tower.", "model.mm_projector."
    state = {}
    for key, value in arrays.items():
        tensor = torch.from_numpy(value)
        if key.startswith(tower):
            key = "model.vision_tower." + rename(key.removeprefix(tower), ENCODER_KEYS)
            tensor = encoder_tensor(tensor)
        elif key.startswith(projector):
            key = "model.multi_modal_projector." + rename(key.removeprefix(projector), PROJECTOR_KEYS["mixer"])
        elif key.startswith("model."):
            key = "model.language_model." + key.removeprefix("model.")
        state[key] = tensor
    return state


def vit3d_state(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The transformer's tensors; tokens and voxels go from (H, W, D) to (D, H, W) order, qkv into three."""
    table = [
        (r"^encoder\.to_patch_embedding\.1\.", "embeddings.voxel_norm."),
        (r"^encoder\.to_patch_embedding\.2\.", "embeddings.projection."),
        (r"^encoder\.to_patch_embedding\.3\.", "embeddings.token_norm."),
        (r"^encoder\.cls_token", "embeddings.cls_token"),
        (r"^encoder\.pos_embedding", "embeddings.position_embeddings"),
        (r"^encoder\.transformer\.layers\.(\d+)\.0\.norm\.", r"layers.\1.attention_norm."),
        (r"^encoder\.transformer\.layers\.(\d+)\.0\.to_qkv\.", r"layers.\1.attention.to_qkv."),
        (r"^encoder\.transformer\.layers\.(\d+)\.0\.to_out\.0\.", r"layers.\1.attention.out_proj."),
        (r"^encoder\.transformer\.layers\.(\d+)\.1\.net\.0\.", r"layers.\1.mlp_norm."),
        (r"^encoder\.transformer\.layers\.(\d+)\.1\.net\.1\.", r"layers.\1.fc1."),
        (r"^encoder\.transformer\.layers\.(\d+)\.1\.net\.4\.", r"layers.\1.fc2."),
    ]
    state = {}
    for key, value in arrays.items():
        key, tensor = rename(key, table), torch.from_numpy(value)
        if key.startswith(("embeddings.voxel_norm.", "embeddings.projection.weight")):
            voxels = tensor.unflatten(-1, (32, 32, 32))  # (..., h, w, d)
            tensor = voxels.movedim(-1, -3).flatten(-3)  # (..., h, w, d) -> (..., d * h * w)
        elif key == "embeddings.position_embeddings":
            patches = (
                tensor[:, 1:].unflatten(1, (8, 8, 4)).permute(0, 3, 1, 2, 4).flatten(1, 3)
            )  # (h, w, d) -> (d, h, w)
            tensor = torch.cat([tensor[:, :1], patches], dim=1)
        if key.endswith("to_qkv.weight"):
            for name, part in zip("qkv", tensor.chunk(3)):
                state[key.replace("to_qkv", f"{name}_proj")] = part
        else:
            state[key] = tensor
    return state
