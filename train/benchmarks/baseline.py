"""What the benchmark compares with: the encoder as its paper states it, and a preparation of scans by other libraries."""

from pathlib import Path

import torch
from torch import nn

from ...configuration.configuration_dcformer import DCFormerConfig
from ...modeling_med3dvlm.modeling_dcformer import DCFormerModel


class PlainDecomposedConv(nn.Module):
    """Three `Conv3d`, each followed by its `BatchNorm3d`, added up."""

    def __init__(self, in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1):
        super().__init__()
        half = size // 2
        shapes = {
            "depth": ((size, 1, 1), (half, 0, 0)),
            "height": ((1, size, 1), (0, half, 0)),
            "width": ((1, 1, size), (0, 0, half)),
        }
        for axis, (kernel, padding) in shapes.items():
            conv = nn.Conv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, groups=groups)
            setattr(self, f"conv_{axis}", conv)
            setattr(self, f"norm_{axis}", nn.BatchNorm3d(out_channels))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C', D', H', W')."""
        depth, height, width = (
            getattr(self, f"norm_{axis}")(getattr(self, f"conv_{axis}")(values))
            for axis in ("depth", "height", "width")
        )
        return height + width + depth


class PlainBlock(nn.Module):
    """Depthwise convolutions, then the MLP with channels last, scaled and added to the input."""

    def __init__(self, channels: int, size: int, mlp_ratio: int):
        super().__init__()
        self.dwconv = PlainDecomposedConv(channels, channels, size, groups=channels)
        self.pwconv1 = nn.Linear(channels, mlp_ratio * channels)
        self.act = nn.GELU()
        self.pwconv2 = nn.Linear(mlp_ratio * channels, channels)
        self.layer_scale = nn.Parameter(torch.ones(channels))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W)."""
        branch = self.dwconv(values).permute(0, 2, 3, 4, 1)  # (B, C, D, H, W) -> (B, D, H, W, C)
        branch = self.layer_scale * self.pwconv2(self.act(self.pwconv1(branch)))
        return values + branch.permute(0, 4, 1, 2, 3)  # (B, D, H, W, C) -> (B, C, D, H, W)


class PlainStage(nn.Module):
    """Pooling, a pointwise convolution and the blocks of a stage."""

    def __init__(self, config: DCFormerConfig, stage: int):
        super().__init__()
        channels = config.hidden_sizes[stage]
        self.pool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.downsampling_layer = nn.Conv3d(config.hidden_sizes[stage - 1], channels, kernel_size=1, bias=False)
        blocks = [
            PlainBlock(channels, config.kernel_sizes[stage], config.mlp_ratio) for _ in range(config.depths[stage])
        ]
        self.layers = nn.Sequential(*blocks)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C', D / 2, H / 2, W / 2), rounded up."""
        return self.layers(self.downsampling_layer(self.pool(values)))


class PlainStem(nn.Module):
    """Four dense decomposed convolutions without an activation."""

    def __init__(self, config: DCFormerConfig):
        super().__init__()
        width = config.hidden_sizes[0]
        first = PlainDecomposedConv(config.num_channels, width, config.kernel_sizes[0], stride=4)
        self.layers = nn.Sequential(first, *(PlainDecomposedConv(width, width, 3) for _ in range(3)))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, hidden_sizes[0], D / 4, H / 4, W / 4), rounded up."""
        return self.layers(pixel_values)


class PlainEncoder(nn.Module):
    """
    DCFormer as the paper states it, in the default layout and with no arrangement for speed. The names of its weights are
    those of [`DCFormerModel`], so that one's weights load into the other.

    Args:
        config ([`DCFormerConfig`]):
            With the default `hidden_act` and `batch_norm_eps`.
    """

    def __init__(self, config: DCFormerConfig):
        super().__init__()
        self.stem = PlainStem(config)
        self.stages = nn.ModuleList([PlainStage(config, stage) for stage in range(1, len(config.depths))])

    @classmethod
    def like(cls, model: DCFormerModel) -> "PlainEncoder":
        """The plain formulation of a model, with copies of its weights and in the same mode."""
        plain = cls(model.config)
        plain.load_state_dict(model.state_dict())
        first = next(model.parameters())
        return plain.to(first.device, first.dtype).train(model.training)

    def forward(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the stem and of every stage, `(B, C_i, D_i, H_i, W_i)`."""
        hidden_states = [self.stem(pixel_values)]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        return hidden_states


def prepare_with_other_libraries(
    path: str | Path, image_size: tuple[int, int, int], hu_range: tuple[float, float]
) -> torch.Tensor:
    """
    The steps of [`Med3DVLMImageProcessor`] on a CT by SimpleITK and MONAI.

    Args:
        path (`str` or `Path`):
            NIfTI file.
        image_size (`tuple[int, int, int]`):
            Voxels of the result, (depth, height, width).
        hu_range (`tuple[float, float]`):
            Window in HU.

    Returns:
        `torch.Tensor` of shape `(1, depth, height, width)`, in [0, 1].

    Raises:
        ImportError: SimpleITK or MONAI is not installed.
    """
    import monai.transforms as steps
    import SimpleITK

    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "LPS")
    volume = torch.from_numpy(SimpleITK.GetArrayFromImage(image))[None]  # (D, H, W) -> (1, D, H, W)
    lower, upper = hu_range
    transform = steps.Compose(
        [
            steps.ScaleIntensityRange(lower, upper, 0.0, 1.0, clip=True),
            steps.CropForeground(allow_smaller=True),
            steps.Resize(image_size, mode="trilinear", align_corners=False),
        ]
    )
    return transform(volume).as_tensor()


__all__ = ["PlainEncoder", "prepare_with_other_libraries"]
