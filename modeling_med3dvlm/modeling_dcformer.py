"""DCFormer: an encoder of 3D volumes whose convolutions are decomposed into three one-dimensional ones.

Ates et al., "DCFormer: Efficient 3D Vision-Language Modeling with Decomposed Convolutions" (2025).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPoolingAndNoAttention
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from ..configuration.configuration_dcformer import DCFormerConfig
from .fused_dcformer import FUSED_DTYPES, compute_dtype, fused_hidden_states
from .fused_training import decomposed_conv_in_training
from .strict_loading import StrictLoadingMixin


class _SumOverProcesses(torch.autograd.Function):
    """The sum of the processes' tensors, on each of them. Every process's result depends on it: backward sums as well."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor) -> torch.Tensor:
        total = tensor.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return _SumOverProcesses.apply(gradient)


def _is_plain(module: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Whether calling a module does what its class says and nothing else, so that it can be computed in another way."""
    has_hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )
    return type(module) in kinds and not has_hooks


def _number_of_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class DCFormerBatchNorm3d(nn.BatchNorm3d):
    """
    Batch normalisation that is frozen with its weight: it then uses its running statistics in training too, and leaves
    them alone. Otherwise an encoder whose weights are frozen would go on changing, and adapters, which save no
    statistics, would be reloaded onto another encoder than they were trained on.

    Args:
        num_features (`int`):
            Channels.
        synchronised (`bool`, *optional*, defaults to `False`):
            Whether training normalises with the statistics of the batches of all processes of `torch.distributed`. They
            may be of different sizes. `torch.nn.SyncBatchNorm` does the same, on GPUs only.
        kwargs:
            Passed to `torch.nn.BatchNorm3d`.
    """

    def __init__(self, num_features: int, synchronised: bool = False, **kwargs: Any):
        super().__init__(num_features, **kwargs)
        self.synchronised = synchronised

    @property
    def uses_own_batch(self) -> bool:
        """Whether it normalises with the statistics of this process's batch."""
        is_shared = self.synchronised and _number_of_processes() > 1
        return self.training and self.weight.requires_grad and not is_shared

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W)."""
        if self.training and not self.weight.requires_grad:
            return nn.functional.batch_norm(
                hidden_states,
                self.running_mean,
                self.running_var,
                self.weight,
                self.bias,
                training=False,
                eps=self.eps,
            )
        if self.training and not self.uses_own_batch:
            return self._normalise_over_processes(hidden_states)
        return super().forward(hidden_states)

    def _normalise_over_processes(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W): this process's part of what one process would make of all batches."""
        # As `torch.nn.BatchNorm3d`, which keeps the statistics of half-precision values in float32.
        values = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        sample_axes, per_channel = (0, 2, 3, 4), (-1, 1, 1, 1)
        own_count = values.new_full((1,), values.numel() // values.shape[1])
        totals = _SumOverProcesses.apply(torch.cat([values.sum(dim=sample_axes), own_count]))
        count = totals[-1].detach()
        mean = totals[:-1] / count
        # Squares of centred values: in `mean(x^2) - mean(x)^2` the variance of a channel far from zero would cancel out.
        centred = values - mean.view(per_channel)
        squares = _SumOverProcesses.apply(centred.square().sum(dim=sample_axes))
        self.move_running_statistics(mean, squares / (count - 1))
        factor = self.weight * torch.rsqrt(squares / count + self.eps)
        return (centred * factor.view(per_channel) + self.bias.view(per_channel)).to(hidden_states.dtype)

    @torch.no_grad()
    def move_running_statistics(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """As `torch.nn.BatchNorm3d` in training, for the `(C,)` mean and unbiased variance of a batch."""
        if self.running_mean is None or self.running_var is None:
            return
        momentum = self.momentum or 0.0
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:  # the average of all batches
                momentum = 1 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), momentum)


class DCFormerDecomposedConv(nn.Module):
    """
    A 3D convolution decomposed along the axes: the sum of three parallel one-dimensional convolutions, each with its
    own batch normalisation (Ates et al. 2025).

    Args:
        config ([`DCFormerConfig`]):
            Configuration of the encoder.
        in_channels (`int`), out_channels (`int`):
            Channels of the input and the output.
        kernel_size (`int`):
            Voxels each convolution spans on its own axis.
        stride (`int`, *optional*, defaults to 1):
            Step of the output grid on all three axes.
        groups (`int`, *optional*, defaults to 1):
            Groups of channels; as many as channels makes it depthwise.

    Attributes:
        fused_training (`bool`):
            Whether training on a CPU in float32 or float64 takes the shorter way of `fused_training.py`, where the layers
            are those made here and have no hooks: the same gradients up to rounding, but none of second order and no
            transformations of `torch.func`. Set it to `False` on the class, or on a layer, to call the modules.
    """

    fused_training = True

    def __init__(
        self,
        config: DCFormerConfig,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        groups: int = 1,
    ):
        super().__init__()
        conv = partial(nn.Conv3d, in_channels, out_channels, stride=stride, groups=groups)
        norm = partial(
            DCFormerBatchNorm3d,
            out_channels,
            synchronised=config.sync_batch_norm,
            eps=config.batch_norm_eps,
            momentum=config.batch_norm_momentum,
        )
        size, padding = kernel_size, kernel_size // 2
        # The biases do nothing in training, where the normalisation removes them, but published weights have them.
        self.conv_depth = conv(kernel_size=(size, 1, 1), padding=(padding, 0, 0))
        self.conv_height = conv(kernel_size=(1, size, 1), padding=(0, padding, 0))
        self.conv_width = conv(kernel_size=(1, 1, size), padding=(0, 0, padding))
        self.norm_depth = norm()
        self.norm_height = norm()
        self.norm_width = norm()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size, in_channels, depth, height, width)`):
                The input grid.

        Returns:
            `torch.Tensor` of shape `(batch_size, out_channels, depth', height', width')`, each axis divided by the
            stride and rounded up.
        """
        if self.training and self.fused_training and self._can_be_fused(hidden_states):
            return decomposed_conv_in_training(self, hidden_states)
        return (
            self.norm_height(self.conv_height(hidden_states))
            + self.norm_width(self.conv_width(hidden_states))
            + self.norm_depth(self.conv_depth(hidden_states))
        )

    @property
    def has_own_convolutions(self) -> bool:
        """Whether the convolutions are of the kind made here: padded with zeros, without dilation, with biases."""
        return all(
            type(conv) is nn.Conv3d
            and conv.bias is not None
            and conv.padding_mode == "zeros"
            and conv.dilation == (1, 1, 1)
            for conv in (self.conv_depth, self.conv_height, self.conv_width)
        )

    def _can_be_fused(self, hidden_states: torch.Tensor) -> bool:
        """Whether `fused_training.py` gives what the modules give, and sooner: see the class."""
        if not hidden_states.is_cpu or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return False
        if not self.has_own_convolutions:
            return False
        if hidden_states.dtype not in (torch.float32, torch.float64):
            return False
        for module in self.children():
            if not _is_plain(module, (nn.Conv3d, DCFormerBatchNorm3d)):
                return False
            if isinstance(module, DCFormerBatchNorm3d) and not module.uses_own_batch:
                return False
        parameters = list(self.parameters())
        if not parameters:  # a replica of `nn.DataParallel`, whose weights are no parameters
            return False
        if any(type(tensor) is not nn.Parameter or tensor.dtype != hidden_states.dtype for tensor in parameters):
            return False
        positions = hidden_states.shape[0] * math.prod(
            -(-size // self.conv_depth.stride[0]) for size in hidden_states.shape[2:]
        )
        return positions > 1


@contextmanager
def _running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within it, batch normalisations in training use the batch's statistics and leave their running ones alone."""
    norms = [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm3d)]
    kept = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            # Not `track_running_stats = False`: that saves fewer tensors, and checkpointing insists on the same number.
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, kept):
            norm.momentum, norm.num_batches_tracked = momentum, num_batches_tracked


class _StatisticsOnce:
    """Calls `function`, a part of `module`, and moves the running statistics at the first call only."""

    def __init__(self, module: nn.Module, function: Callable[..., torch.Tensor]):
        self.module, self.function, self.called = module, function, False

    def __call__(self, *args: torch.Tensor) -> torch.Tensor:
        if not self.called:
            self.called = True
            return self.function(*args)
        with _running_statistics_kept(self.module):
            return self.function(*args)


class DCFormerCheckpointingLayer(GradientCheckpointingLayer):
    """
    A layer with batch normalisations that can be checkpointed. Checkpointing runs a layer a second time in the backward
    pass, which would move the running statistics twice for each step.
    """

    @property
    def _gradient_checkpointing_func(self) -> Callable[..., torch.Tensor]:
        def checkpoint(function: Callable[..., torch.Tensor], *args: torch.Tensor) -> torch.Tensor:
            return self._checkpoint(_StatisticsOnce(self, function), *args)

        return checkpoint

    @_gradient_checkpointing_func.setter
    def _gradient_checkpointing_func(self, function: Callable[..., torch.Tensor]) -> None:
        self._checkpoint = function


class DCFormerStemLayer(DCFormerCheckpointingLayer, DCFormerDecomposedConv):
    """A dense decomposed convolution of the stem, checkpointed on its own: the stem's activations are the largest."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As [`DCFormerDecomposedConv`]; named here because checkpointing wraps the `forward` of the layer's own class."""
        return DCFormerDecomposedConv.forward(self, hidden_states)


class DCFormerStem(nn.Module):
    """
    Four dense decomposed convolutions, the first of stride 4. No activation stands between them: published weights
    were trained without one, which makes the stem an affine map at inference.
    """

    def __init__(self, config: DCFormerConfig):
        super().__init__()
        self.num_channels, width = config.num_channels, config.hidden_sizes[0]
        self.layers = nn.ModuleList(
            [DCFormerStemLayer(config, config.num_channels, width, config.kernel_sizes[0], stride=4)]
            + [DCFormerStemLayer(config, width, width, kernel_size=3) for _ in range(3)]
        )

    def check_input(self, pixel_values: torch.Tensor) -> None:
        """
        Raises:
            ValueError: `pixel_values` has another number of axes or channels.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"Expected `pixel_values` of shape (batch_size, {self.num_channels}, depth, height, width), got "
                f"{tuple(pixel_values.shape)}. Prepare volumes with Med3DVLMImageProcessor, which gives this shape."
            )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, num_channels, D, H, W) -> (B, hidden_sizes[0], D / 4, H / 4, W / 4), rounded up."""
        self.check_input(pixel_values)
        first: Any = self.layers[0]
        hidden_states = pixel_values.to(first.conv_depth.weight.dtype)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class DCFormerLayer(DCFormerCheckpointingLayer):
    """One block: a depthwise decomposed convolution and an MLP over the channels, scaled and added to the input."""

    def __init__(self, config: DCFormerConfig, channels: int, kernel_size: int):
        super().__init__()
        self.dwconv = DCFormerDecomposedConv(config, channels, channels, kernel_size, groups=channels)
        self.pwconv1 = nn.Linear(channels, config.mlp_ratio * channels)
        self.act = ACT2FN[config.hidden_act]
        self.pwconv2 = nn.Linear(config.mlp_ratio * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), config.layer_scale_init_value))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C, D, H, W)."""
        residual = hidden_states
        hidden_states = self.dwconv(hidden_states).permute(0, 2, 3, 4, 1)  # (B, C, D, H, W) -> (B, D, H, W, C)
        hidden_states = self.layer_scale * self.pwconv2(self.act(self.pwconv1(hidden_states)))
        return residual + hidden_states.permute(0, 4, 1, 2, 3)  # (B, D, H, W, C) -> (B, C, D, H, W)


class DCFormerStage(nn.Module):
    """Max pooling that halves the grid, a pointwise convolution to the stage's channels, and the stage's blocks."""

    def __init__(self, config: DCFormerConfig, stage: int):
        super().__init__()
        in_channels, channels = config.hidden_sizes[stage - 1], config.hidden_sizes[stage]
        self.pool = nn.MaxPool3d(kernel_size=3, stride=2, padding=1)
        self.downsampling_layer = nn.Conv3d(in_channels, channels, kernel_size=1, bias=False)
        self.layers = nn.ModuleList(
            [DCFormerLayer(config, channels, config.kernel_sizes[stage]) for _ in range(config.depths[stage])]
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C', D / 2, H / 2, W / 2), rounded up."""
        hidden_states = self._project(self.pool(hidden_states))
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states

    def _project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, C, D, H, W) -> (B, C', D, H, W), a pointwise convolution, which with channels last is a matrix product."""
        layer = self.downsampling_layer
        if hidden_states.is_contiguous() or not _is_plain(layer, (nn.Conv3d,)):
            return layer(hidden_states)
        rows = hidden_states.permute(0, 2, 3, 4, 1)  # (B, C, D, H, W) -> (B, D, H, W, C)
        return nn.functional.linear(rows, layer.weight.flatten(1)).permute(0, 4, 1, 2, 3)


class DCFormerPreTrainedModel(StrictLoadingMixin, PreTrainedModel):
    """Initialisation and capabilities shared by the DCFormer models."""

    config: DCFormerConfig
    base_model_prefix = "dcformer"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["DCFormerStemLayer", "DCFormerLayer"]
    # There is no attention to choose, but a composite model hands its choice to all parts, and each must accept it.
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """PyTorch's own initial weights, with which the published encoders were trained; constants where raw."""
        if isinstance(module, (nn.Conv3d, nn.Linear)):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        else:
            super()._init_weights(module)
        if isinstance(module, DCFormerLayer):
            init.constant_(module.layer_scale, self.config.layer_scale_init_value)


# What the fused path knows the insides of. Anything else, such as an adapter or a quantised layer, is called as a module.
PLAIN_MODULES = (
    DCFormerBatchNorm3d,
    DCFormerDecomposedConv,
    DCFormerLayer,
    DCFormerStage,
    DCFormerStem,
    DCFormerStemLayer,
    nn.Conv3d,
    nn.Linear,
    nn.MaxPool3d,
    nn.ModuleList,
)


class DCFormerModel(DCFormerPreTrainedModel):
    """
    The encoder of a 3D volume: a stem and four stages, each with half the grid of the one before.

    At inference the same numbers, up to rounding, are reached by a shorter way, see `fused_dcformer.py`. It is taken
    where no gradient can flow, every batch normalisation uses its running statistics, the layers are those made here,
    without hooks, and the type is float32, float64 or bfloat16. It changes nothing in the weights or their names. Grids
    are then views with channels last in memory.

    Attributes:
        fused_inference (`bool`, *optional*):
            Whether to take it: `False` never; `True` on CPUs and on CUDA, where the above holds; `None`, the default, the
            same, but on CPUs only, where it has been measured.

    Example:

    ```python
    >>> import torch
    >>> from med3dvlm import DCFormerConfig, DCFormerModel

    >>> model = DCFormerModel(DCFormerConfig.from_variant("nano")).eval()
    >>> outputs = model(torch.rand(1, 1, 32, 64, 96), output_hidden_states=True)
    >>> [tuple(hidden_state.shape[1:]) for hidden_state in outputs.hidden_states]
    [(32, 8, 16, 24), (32, 4, 8, 12), (64, 2, 4, 6), (128, 1, 2, 3), (256, 1, 1, 2)]
    >>> outputs.pooler_output.shape
    torch.Size([1, 256])
    ```"""

    fused_inference: bool | None = None

    def __init__(self, config: DCFormerConfig):
        super().__init__(config)
        self.stem = DCFormerStem(config)
        self.stages = nn.ModuleList([DCFormerStage(config, stage) for stage in range(1, len(config.depths))])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The stem, which plays the part of an embedding."""
        return self.stem

    def can_be_fused(self, pixel_values: torch.Tensor) -> bool:
        """Whether the fused path gives what the modules give: see the class. `fused_inference` is not asked."""
        parameters = list(self.parameters())
        if not parameters:  # a replica of `nn.DataParallel`, whose weights are no parameters
            return False
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (pixel_values, *parameters)):
            return False
        first = parameters[0]
        if first.device.type not in ("cpu", "cuda") or compute_dtype(first) not in FUSED_DTYPES:
            return False
        if any(tensor.dtype != first.dtype for tensor in parameters):
            return False
        # A tensor of a class of its own is a shard, or quantised. While a graph is traced, all have one.
        if not torch.compiler.is_compiling() and any(type(tensor) is not nn.Parameter for tensor in parameters):
            return False
        activations = {type(layer.act) for stage in self.stages for layer in stage.layers}
        for module in self.modules():
            if isinstance(module, DCFormerBatchNorm3d) and module.training and module.weight.requires_grad:
                return False
            if isinstance(module, DCFormerDecomposedConv) and not module.has_own_convolutions:
                return False
            if module is self:
                continue
            if not _is_plain(module, (*PLAIN_MODULES, *activations)):
                return False
        return True

    def _hidden_states(self, pixel_values: torch.Tensor) -> list[torch.Tensor]:
        """The outputs of the stem and of every stage."""
        self.stem.check_input(pixel_values)
        is_wanted = pixel_values.is_cpu if self.fused_inference is None else self.fused_inference
        if is_wanted and self.can_be_fused(pixel_values):
            in_blocks = pixel_values.is_cpu and not torch.compiler.is_compiling()
            return fused_hidden_states(self, pixel_values, in_blocks)
        hidden_states = [self.stem(pixel_values)]
        for stage in self.stages:
            hidden_states.append(stage(hidden_states[-1]))
        return hidden_states

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPoolingAndNoAttention:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, depth, height, width)`):
                Volumes scaled to [0, 1], as the image processor gives them; any size.
            output_hidden_states (`bool`, *optional*):
                Whether to return the output of the stem and of every stage.

        Returns:
            [`~transformers.modeling_outputs.BaseModelOutputWithPoolingAndNoAttention`]:

            - **last_hidden_state** (`torch.Tensor` of shape `(batch_size, hidden_sizes[-1], D, H, W)`): the last stage.
            - **pooler_output** (`torch.Tensor` of shape `(batch_size, hidden_sizes[-1])`): its mean over the grid.
            - **hidden_states** (`tuple` of `torch.Tensor` of shape `(batch_size, hidden_sizes[i], D_i, H_i, W_i)`): the
              stem and the stages, strides 4, 8, 16, 32 and 64; only with `output_hidden_states`.

        Raises:
            ValueError: `pixel_values` has another number of axes or channels.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states

        all_hidden_states = self._hidden_states(pixel_values)
        return BaseModelOutputWithPoolingAndNoAttention(
            last_hidden_state=all_hidden_states[-1],
            pooler_output=all_hidden_states[-1].mean(dim=(2, 3, 4)),  # (B, C, D, H, W) -> (B, C)
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
        )


class DCFormerBackbone(BackboneMixin, DCFormerModel):
    """
    DCFormer as a backbone of dense predictors: returns the feature maps that `config.out_features` names. Its weights
    are those of [`DCFormerModel`], key for key.

    Example:

    ```python
    >>> import torch
    >>> from med3dvlm import DCFormerBackbone, DCFormerConfig

    >>> config = DCFormerConfig.from_variant("nano", out_features=["stage2", "stage3"])
    >>> backbone = DCFormerBackbone(config).eval()
    >>> [tuple(feature_map.shape) for feature_map in backbone(torch.rand(1, 1, 32, 64, 96)).feature_maps]
    [(1, 64, 2, 4, 6), (1, 128, 1, 2, 3)]
    ```"""

    has_attentions = False

    def __init__(self, config: DCFormerConfig):
        super().__init__(config)
        self.num_features = list(config.hidden_sizes)

    @can_return_tuple
    def forward(  # type: ignore[override]
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, num_channels, depth, height, width)`):
                Volumes scaled to [0, 1].
            output_hidden_states (`bool`, *optional*):
                Whether to return all stages beside the chosen ones.

        Returns:
            [`~transformers.modeling_outputs.BackboneOutput`] whose `feature_maps` are a `tuple` of `torch.Tensor` of
            shape `(batch_size, channels, D_i, H_i, W_i)`, one for each name in `out_features`.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        outputs = DCFormerModel.forward(self, pixel_values, output_hidden_states=True, return_dict=True)
        return BackboneOutput(
            feature_maps=tuple(outputs.hidden_states[index] for index in self.out_indices),
            hidden_states=outputs.hidden_states if output_hidden_states else None,
        )


__all__ = ["DCFormerBackbone", "DCFormerModel", "DCFormerPreTrainedModel"]
