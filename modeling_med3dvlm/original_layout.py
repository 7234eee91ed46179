"""
Where each tensor of the original implementation stands in ours: the one table of names, read in both directions.

A row has the original's name, ours, and what happens to the values in between. `{layer}` stands for a number,
`{rest}` for the end of the name; `{stage-1}` and `{2*linear}` say how our number follows from the original's. The
original moves the depth axis last and convolves (H, W, D) grids, ours are (D, H, W).
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Change:
    """
    What happens to the values of a tensor on its way.

    Args:
        to_ours (`Callable`):
            The original's tensor and the configuration of the volume encoder -> our tensors, one for each of our names.
        to_original (`Callable`):
            Our tensors and the configuration -> the original's tensor.
        is_exact (`bool`, *optional*, defaults to `True`):
            Whether the way back gives the same bits. Where it does not, a conversion records the original value.
    """

    to_ours: Callable[[torch.Tensor, Any], tuple[torch.Tensor, ...]]
    to_original: Callable[[tuple[torch.Tensor, ...], Any], torch.Tensor]
    is_exact: bool = True


def voxels_to_ours(value: torch.Tensor, config: Any) -> torch.Tensor:
    """The voxels of a patch, the last axis: (..., h * w * d) -> (..., d * h * w)."""
    depth, height, width = config.patch_size
    return value.unflatten(-1, (height, width, depth)).movedim(-1, -3).flatten(-3)


def voxels_to_original(value: torch.Tensor, config: Any) -> torch.Tensor:
    """(..., d * h * w) -> (..., h * w * d)."""
    return value.unflatten(-1, tuple(config.patch_size)).movedim(-3, -1).flatten(-3)


def positions_to_ours(value: torch.Tensor, config: Any) -> torch.Tensor:
    """Positions of the class token and of the patches: (1, 1 + h * w * d, C) -> (1, 1 + d * h * w, C)."""
    depth, height, width = config.grid()
    patches = (
        value[:, 1:].unflatten(1, (height, width, depth)).permute(0, 3, 1, 2, 4)
    )  # (1, h, w, d, C) -> (1, d, h, w, C)
    return torch.cat([value[:, :1], patches.flatten(1, 3)], dim=1)


def positions_to_original(value: torch.Tensor, config: Any) -> torch.Tensor:
    """(1, 1 + d * h * w, C) -> (1, 1 + h * w * d, C)."""
    patches = value[:, 1:].unflatten(1, config.grid()).permute(0, 2, 3, 1, 4)  # (1, d, h, w, C) -> (1, h, w, d, C)
    return torch.cat([value[:, :1], patches.flatten(1, 3)], dim=1)


def in_single_precision(value: torch.Tensor) -> torch.Tensor:
    """A scalar of shape (1,); the original's temperature alone is a double, because it was made from a Python number."""
    return value.reshape(1).float() if value.dtype == torch.float64 else value.reshape(1)


AS_IT_IS = Change(lambda value, _: (value,), lambda values, _: values[0])
# (out, in, H, W, D) -> (out, in, D, H, W)
KERNEL = Change(lambda value, _: (value.permute(0, 1, 4, 2, 3),), lambda values, _: values[0].permute(0, 1, 3, 4, 2))
SCALAR = Change(lambda value, _: (value.reshape(1),), lambda values, _: values[0].reshape(()))
TEMPERATURE = Change(
    lambda value, _: (in_single_precision(value),), lambda values, _: values[0].reshape(()).double(), is_exact=False
)
# With the loss `nce` the original multiplies by the scale itself, ours by its exponential.
LOGARITHM = Change(
    lambda value, _: (value.double().log().to(value.dtype).reshape(1),),
    lambda values, _: values[0].double().exp().to(values[0].dtype).reshape(()),
    is_exact=False,
)
VOXELS = Change(
    lambda value, config: (voxels_to_ours(value, config),),
    lambda values, config: voxels_to_original(values[0], config),
)
POSITIONS = Change(
    lambda value, config: (positions_to_ours(value, config),),
    lambda values, config: positions_to_original(values[0], config),
)
# Queries, keys and values, one above the other.
STACKED = Change(lambda value, _: value.chunk(3), lambda values, _: torch.cat(values))
# The class token of M3D's transformer has no position, which is a position of zeros.
NO_CLASS_POSITION = Change(
    lambda value, _: (torch.cat([torch.zeros_like(value[:, :1]), value], dim=1),), lambda values, _: values[0][:, 1:]
)


class Row(NamedTuple):
    """One row of the table: the original's name, ours (several where a tensor is split), and the change of values."""

    original: str
    ours: str | tuple[str, ...]
    change: Change = AS_IT_IS


# The axis along which each branch of a decomposed convolution runs.
BRANCHES = {"c1": "height", "c2": "width", "c3": "depth"}

DCFORMER = [
    *(
        row
        for branch, axis in BRANCHES.items()
        for row in (
            Row(f"encoder.s0.0.{{layer}}.{branch}.0.weight", f"stem.layers.{{layer}}.conv_{axis}.weight", KERNEL),
            Row(f"encoder.s0.0.{{layer}}.{branch}.0.bias", f"stem.layers.{{layer}}.conv_{axis}.bias"),
            Row(f"encoder.s0.0.{{layer}}.{branch}.1.{{rest}}", f"stem.layers.{{layer}}.norm_{axis}.{{rest}}"),
            Row(
                f"encoder.s{{stage}}.{{block}}.dwconv.{branch}.0.weight",
                f"stages.{{stage-1}}.layers.{{block}}.dwconv.conv_{axis}.weight",
                KERNEL,
            ),
            Row(
                f"encoder.s{{stage}}.{{block}}.dwconv.{branch}.0.bias",
                f"stages.{{stage-1}}.layers.{{block}}.dwconv.conv_{axis}.bias",
            ),
            Row(
                f"encoder.s{{stage}}.{{block}}.dwconv.{branch}.1.{{rest}}",
                f"stages.{{stage-1}}.layers.{{block}}.dwconv.norm_{axis}.{{rest}}",
            ),
        )
    ),
    Row("encoder.s{stage}.0.proj.weight", "stages.{stage-1}.downsampling_layer.weight", KERNEL),
    Row("encoder.s{stage}.{block}.mlp.mlp.0.{rest}", "stages.{stage-1}.layers.{block}.pwconv1.{rest}"),
    Row("encoder.s{stage}.{block}.mlp.mlp.3.{rest}", "stages.{stage-1}.layers.{block}.pwconv2.{rest}"),
    Row("encoder.s{stage}.{block}.scale", "stages.{stage-1}.layers.{block}.layer_scale"),
]

VIT3D = [
    Row("encoder.to_patch_embedding.1.{rest}", "embeddings.voxel_norm.{rest}", VOXELS),
    Row("encoder.to_patch_embedding.2.weight", "embeddings.projection.weight", VOXELS),
    Row("encoder.to_patch_embedding.2.bias", "embeddings.projection.bias"),
    Row("encoder.to_patch_embedding.3.{rest}", "embeddings.token_norm.{rest}"),
    Row("encoder.cls_token", "embeddings.cls_token"),
    Row("encoder.pos_embedding", "embeddings.position_embeddings", POSITIONS),
    Row("encoder.transformer.layers.{layer}.0.norm.{rest}", "layers.{layer}.attention_norm.{rest}"),
    Row(
        "encoder.transformer.layers.{layer}.0.to_qkv.weight",
        tuple(f"layers.{{layer}}.attention.{name}_proj.weight" for name in "qkv"),
        STACKED,
    ),
    Row("encoder.transformer.layers.{layer}.0.to_out.0.{rest}", "layers.{layer}.attention.out_proj.{rest}"),
    Row("encoder.transformer.layers.{layer}.1.net.0.{rest}", "layers.{layer}.mlp_norm.{rest}"),
    Row("encoder.transformer.layers.{layer}.1.net.1.{rest}", "layers.{layer}.fc1.{rest}"),
    Row("encoder.transformer.layers.{layer}.1.net.4.{rest}", "layers.{layer}.fc2.{rest}"),
]

# The vision transformer of M3D (Bai et al. 2024), whose axes are (D, H, W) like ours.
M3D_VIT = [
    Row("patch_embedding.patch_embeddings.1.{rest}", "embeddings.projection.{rest}"),
    Row("patch_embedding.position_embeddings", "embeddings.position_embeddings", NO_CLASS_POSITION),
    Row("cls_token", "embeddings.cls_token"),
    Row("blocks.{layer}.norm1.{rest}", "layers.{layer}.attention_norm.{rest}"),
    Row(
        "blocks.{layer}.attn.qkv.weight",
        tuple(f"layers.{{layer}}.attention.{name}_proj.weight" for name in "qkv"),
        STACKED,
    ),
    Row("blocks.{layer}.attn.out_proj.{rest}", "layers.{layer}.attention.out_proj.{rest}"),
    Row("blocks.{layer}.norm2.{rest}", "layers.{layer}.mlp_norm.{rest}"),
    Row("blocks.{layer}.mlp.linear1.{rest}", "layers.{layer}.fc1.{rest}"),
    Row("blocks.{layer}.mlp.linear2.{rest}", "layers.{layer}.fc2.{rest}"),
    Row("norm.{rest}", "norm.{rest}"),
]

# By projector type. The first row of each is what tells the types apart.
PROJECTOR_ROWS = {
    "mixer": [
        row
        for stream in ("low", "high")
        for row in (
            Row(f"{stream}_mixer.{{layer}}.ln1.{{rest}}", f"{stream}_mixer.{{layer}}.token_norm.{{rest}}"),
            Row(f"{stream}_mixer.{{layer}}.ln2.{{rest}}", f"{stream}_mixer.{{layer}}.channel_norm.{{rest}}"),
            *(
                row
                for original, ours in (("mlp1", "token_mlp"), ("mlp2", "channel_mlp"))
                for row in (
                    Row(
                        f"{stream}_mixer.{{layer}}.{original}.mm_projector.0.{{rest}}",
                        f"{stream}_mixer.{{layer}}.{ours}.0.{{rest}}",
                    ),
                    Row(
                        f"{stream}_mixer.{{layer}}.{original}.mm_projector.{{linear}}.1.{{rest}}",
                        f"{stream}_mixer.{{layer}}.{ours}.{{2*linear}}.{{rest}}",
                    ),
                )
            ),
        )
    ],
    "low_high_mlp": [
        Row("low_up_mlp.{rest}", "low_projection.{rest}"),
        Row("high_up_mlp.{rest}", "high_projection.{rest}"),
        Row("mm_projector.{linear}.{rest}", "mlp.{linear}.{rest}"),
    ],
    "mhsa": [
        Row("q_proj.{rest}", "q_proj.{rest}"),
        Row("k_proj.{rest}", "k_proj.{rest}"),
        Row("v_proj.{rest}", "v_proj.{rest}"),
        Row("out_proj.{rest}", "out_proj.{rest}"),
        Row("norm1.{rest}", "attention_norm.{rest}"),
        Row("norm2.{rest}", "mlp_norm.{rest}"),
        Row("mlp.linear1.{rest}", "fc1.{rest}"),
        Row("mlp.linear2.{rest}", "fc2.{rest}"),
        Row("out_layer.{rest}", "projection.{rest}"),
    ],
    "mlp": [
        Row("mm_projector.0.{rest}", "mlp.0.{rest}"),
        Row("mm_projector.{linear}.1.{rest}", "mlp.{2*linear}.{rest}"),
    ],
    "linear": [Row("weight", "projection.weight"), Row("bias", "projection.bias")],
}

PROJECTIONS = [
    Row("language_encoder.{rest}", "text_model.{rest}"),
    Row("mm_vision_proj.{rest}", "visual_projection.{rest}"),
    Row("mm_language_proj.{rest}", "text_projection.{rest}"),
]
# By our loss.
SCALARS = {
    "sigmoid": [Row("t_prime", "logit_scale", TEMPERATURE), Row("bias", "logit_bias", SCALAR)],
    "softmax": [Row("logit_scale", "logit_scale", LOGARITHM)],
}

LANGUAGE_MODEL = [
    Row("model.embed_tokens.{rest}", "model.language_model.embed_tokens.{rest}"),
    Row("model.layers.{rest}", "model.language_model.layers.{rest}"),
    Row("model.norm.{rest}", "model.language_model.norm.{rest}"),
    Row("lm_head.{rest}", "lm_head.{rest}"),
]

VISION_ENCODERS = {"dcformer": DCFORMER, "vit3d": VIT3D}


def prefixed(rows: Iterable[Row], original: str, ours: str) -> list[Row]:
    """The rows of a part of a larger model."""
    return [
        Row(
            original + row.original,
            ours + row.ours if isinstance(row.ours, str) else tuple(ours + name for name in row.ours),
            row.change,
        )
        for row in rows
    ]


FIELD = re.compile(r"\{(?:(\d+)\*)?(\w+?)(?:-(\d+))?\}")


class Pattern:
    """One side of a row: names with numbers in them."""

    def __init__(self, template: str):
        self.template = template
        self.fields = {name: (int(factor or 1), int(offset or 0)) for factor, name, offset in FIELD.findall(template)}
        pieces = FIELD.split(template)  # text, then factor, name, offset and text again and again
        pattern = re.escape(pieces[0])
        for name, text in zip(pieces[2::4], pieces[4::4]):
            pattern += (r"(?P<rest>.+)" if name == "rest" else rf"(?P<{name}>\d+)") + re.escape(text)
        self.regex = re.compile(pattern)

    def read(self, name: str) -> dict[str, str | int] | None:
        """The original's numbers behind a name, or None where it is none of these."""
        match = self.regex.fullmatch(name)
        if match is None:
            return None
        values: dict[str, str | int] = {}
        for field, (factor, offset) in self.fields.items():
            if field == "rest":
                values[field] = match[field]
                continue
            number, remainder = divmod(int(match[field]) + offset, factor)
            if remainder:
                return None
            values[field] = number
        return values

    def write(self, values: dict[str, str | int]) -> str:
        """The name for the original's numbers."""

        def fill(match: re.Match) -> str:
            value = values[match[2]]
            return value if isinstance(value, str) else str(value * int(match[1] or 1) - int(match[3] or 0))

        return FIELD.sub(fill, self.template)


class Layout:
    """
    The table of one kind of checkpoint, compiled.

    Args:
        rows (`Iterable[Row]`):
            The rows; the first that fits counts.
    """

    def __init__(self, rows: Iterable[Row]):
        self.rows = [
            (
                Pattern(row.original),
                tuple(map(Pattern, (row.ours,) if isinstance(row.ours, str) else row.ours)),
                row.change,
            )
            for row in rows
        ]

    def find(self, original: str) -> tuple[tuple[str, ...], Change] | None:
        """Our names for one of the original's, and the change of values; None where the table has no row for it."""
        for pattern, ours, change in self.rows:
            if (values := pattern.read(original)) is not None:
                return tuple(name.write(values) for name in ours), change
        return None

    def find_original(self, ours: str) -> tuple[str, tuple[str, ...], Change] | None:
        """The original's name for one of ours, all of our names that it is made from, and the change of values."""
        for pattern, names, change in self.rows:
            for name in names:
                if (values := name.read(ours)) is not None:
                    return pattern.write(values), tuple(other.write(values) for other in names), change
        return None


def encoder_layout(vision_type: str = "dcformer", prefix: str = "") -> Layout:
    """The layout of a volume encoder alone, `pretrained_ViT.bin`; `"m3d"` is the one of M3D-CLIP."""
    rows = M3D_VIT if vision_type == "m3d" else VISION_ENCODERS[vision_type]
    return Layout(prefixed(rows, prefix, ""))


def dual_encoder_layout(loss_type: str, vision_type: str = "dcformer") -> Layout:
    """The layout of the dual encoder, `DCFormer_SigLIP`, by our loss."""
    vision = prefixed(VISION_ENCODERS[vision_type], "vision_encoder.", "vision_model.")
    return Layout([*vision, *PROJECTIONS, *SCALARS[loss_type]])


def vision_language_layout(projector_type: str) -> Layout:
    """The layout of the whole model with a DCFormer, the only volume encoder with which the original's runs."""
    return Layout(
        [
            *prefixed(DCFORMER, "model.vision_tower.vision_tower.", "model.vision_tower."),
            *prefixed(PROJECTOR_ROWS[projector_type], "model.mm_projector.", "model.multi_modal_projector."),
            *LANGUAGE_MODEL,
        ]
    )


def find_projector_type(names: Iterable[str], prefix: str = "") -> str | None:
    """The type of the projector that has these tensors; None if it is none of the original's."""
    names = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    for projector_type, rows in PROJECTOR_ROWS.items():
        first = Pattern(rows[0].original)
        if any(first.read(name) is not None for name in names):
            return projector_type
    return None


__all__ = [
    "AS_IT_IS",
    "PROJECTOR_ROWS",
    "Change",
    "Layout",
    "Row",
    "dual_encoder_layout",
    "encoder_layout",
    "find_projector_type",
    "prefixed",
    "vision_language_layout",
]
