"""The networks: a damaged photograph in, a restored one out; any height and width from 1x1 up.

Shapes: B batch, C channels, H height, W width. Images are float RGB in 0..1 (the output may leave the range slightly).
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restore_core.config import AutoencoderConfig, ModelConfig, ResidualUNetConfig


class Prediction(NamedTuple):
    image: Tensor
    """Restored, float [B, 3, H, W]."""
    survival: Tensor | None
    """Logit that the pixel still shows the photograph (neither flipped nor painted over), float [B, 1, H, W]."""
    kept: Tensor | None = None
    """What `image` would be if all pixels did, float [B, 3, H, W]; of a network with such a gate only."""


def each(change: Callable[..., Tensor], *predictions: Prediction) -> Prediction:
    """`change` of the predictions' images, of their survivals, and so on; None stays None."""
    parts = (None if part[0] is None else change(*part) for part in zip(*predictions, strict=True))
    return Prediction(*parts)  # type: ignore[arg-type]


# --- The autoencoder of the project's origin -----------------------------------------------------------------------


class EncoderBlock(nn.Sequential):
    """Convolution, stride-2 convolution (or convolution and MaxPool), dropout, batch norm.

    [B, C, H, W] -> [B, C', H/2, W/2]
    """

    def __init__(self, channels_in: int, channels: int, config: AutoencoderConfig) -> None:
        k = config.kernel_size
        strided = config.resample == "strided"
        super().__init__(
            nn.Conv2d(channels_in, channels, k, padding=k // 2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, k, padding=k // 2, stride=2 if strided else 1),
            nn.ReLU(),
            nn.Identity() if strided else nn.MaxPool2d(2),
            nn.Dropout(config.dropout),
            nn.BatchNorm2d(channels),
        )


class DecoderBlock(nn.Module):
    """Stride-2 transposed convolution (or Upsample), concatenation with the skip, two convolutions. Doubles H and W."""

    def __init__(self, channels_in: int, skip_channels: int, channels: int, config: AutoencoderConfig) -> None:
        super().__init__()
        k = config.kernel_size
        if config.resample == "strided":
            self.up: nn.Module = nn.ConvTranspose2d(
                channels_in, channels, k, stride=2, padding=k // 2, output_padding=1
            )
        else:
            self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels_in, channels, k, padding=k // 2))
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels + skip_channels, channels, k, padding=k // 2),
            nn.ReLU(),
            nn.Conv2d(channels, channels, k, padding=k // 2),
            nn.ReLU(),
        )

    def forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        x = F.relu(self.up(x))  # [B, C, 2H, 2W]
        if skip is not None:
            x = torch.cat([x, skip], dim=1)  # [B, C + S, 2H, 2W]
        return self.convolutions(x)  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """Encoder blocks down, decoder blocks up, each joined with the matching encoder output, the last with the input."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.multiple = 2**config.depth
        self.skips = config.skips
        channels = [3] + [config.base_channels * 2**level for level in range(config.depth)]
        self.encoder = nn.ModuleList(
            EncoderBlock(channels[level], channels[level + 1], config) for level in range(config.depth)
        )
        self.decoder = nn.ModuleList(
            DecoderBlock(
                channels[level + 1],
                channels[level] if config.skips else 0,
                channels[level] if level else config.base_channels,
                config,
            )
            for level in reversed(range(config.depth))
        )
        self.output = nn.Conv2d(config.base_channels, 3, config.kernel_size, padding=config.kernel_size // 2)

    def forward(self, image: Tensor) -> Prediction:
        x = pad_to_multiple(image, self.multiple)  # [B, 3, H', W']
        outputs = [x]
        for block in self.encoder:
            outputs.append(block(outputs[-1]))  # level i: [B, base * 2^(i-1), H'/2^i, W'/2^i]
        x = outputs.pop()
        for block in self.decoder:
            skip = outputs.pop()
            x = block(x, skip if self.skips else None)
        return Prediction(self.output(x)[..., : image.shape[-2], : image.shape[-1]], None)


# --- The residual encoder-decoder ----------------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x))), 3x3, no normalisation (EDSR, Lim 2017, section 3.1). Shape is kept.

    In place where it can be: at the finest scale each array more is an eighth of what a tile needs.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        # Without normalisation the residual branches must start small, or the sum grows with depth (Fixup, Zhang 2019).
        with torch.no_grad():
            self.second.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.relu(self.first(x), inplace=True)).add_(x)  # type: ignore[no-any-return]


class ResidualUNet(nn.Module):
    """DRUNet's shape: residual blocks at each scale, 2x2 strided (transposed) convolutions between, additive skips.

    Args:
        config: its sizes.
        block: makes a block for a number of channels; others than ours are compared in benchmarks/blocks.py.
    """

    def __init__(self, config: ResidualUNetConfig, block: Callable[[int], nn.Module] = ResidualBlock) -> None:
        super().__init__()
        channels = config.channels
        pairs = list(pairwise(channels))
        stages = list(zip(channels, config.blocks, strict=True))
        self.multiple = 2 ** (len(channels) - 1)
        self.gate = config.gate
        self.head = nn.Conv2d(3, channels[0], 3, padding=1)
        self.encoder = nn.ModuleList(_repeat(block, c, count) for c, count in stages[:-1])
        self.down = nn.ModuleList(nn.Conv2d(fine, coarse, 2, stride=2) for fine, coarse in pairs)
        self.bottleneck = _repeat(block, *stages[-1])
        self.up = nn.ModuleList(nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in pairs[::-1])
        self.decoder = nn.ModuleList(_repeat(block, c, count) for c, count in stages[-2::-1])
        self.tail = nn.Conv2d(channels[0], 7 if config.gate else 3, 3, padding=1)

    def forward(self, image: Tensor) -> Prediction:
        height, width = image.shape[-2:]
        x = self.head(pad_to_multiple(image, self.multiple))  # [B, C0, H', W']
        skips = []
        for blocks, down in zip(self.encoder, self.down, strict=True):
            x = blocks(x)
            skips.append(x)
            x = down(x)  # [B, Ci+1, H'/2^(i+1), W'/2^(i+1)]
        x = self.bottleneck(x)
        for up, blocks in zip(self.up, self.decoder, strict=True):
            x = blocks(up(x).add_(skips.pop()))
        return self.merge(image, self.tail(x)[..., :height, :width])

    def merge(self, image: Tensor, x: Tensor) -> Prediction:
        """The prediction from the image and what the network says of it, [B, 7 or 3, H, W]."""
        if not self.gate:
            return Prediction(image + x, None)
        residual, content, survival = x.split_with_sizes([3, 3, 1], dim=1)
        g = torch.sigmoid(survival)
        kept = image + residual
        return Prediction(g * kept + (1 - g) * (content + 0.5), survival, kept)


def _repeat(block: Callable[[int], nn.Module], channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(block(channels) for _ in range(count)))


# --- For every network ---------------------------------------------------------------------------------------------


def build(config: ModelConfig) -> Autoencoder | ResidualUNet:
    """A network with fresh weights from torch's global generator."""
    return Autoencoder(config) if isinstance(config, AutoencoderConfig) else ResidualUNet(config)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Repeat the lower and right border until height and width are multiples. [B, C, H, W] -> [B, C, H', W']"""
    height, width = image.shape[-2:]
    below, right = -height % multiple, -width % multiple
    return F.pad(image, (0, right, 0, below), mode="replicate") if below or right else image


def gpu_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU with bfloat16 convolutions: before Ampere (compute capability 8) cuDNN has none.

    `torch.cuda.is_bf16_supported` says yes of older ones too, since it counts what is emulated.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def exact_float32() -> None:
    """On GPUs float32 is float32, and not TF32 with its 10 bits of mantissa, which cuDNN takes unless told."""
    torch.backends.cudnn.allow_tf32 = False


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def count_macs(config: ModelConfig, height: int, width: int) -> int:
    """Multiply-adds of the (transposed) convolutions for one image of height x width pixels; nothing is computed."""
    with torch.device("meta"):
        return macs_of(build(config), height, width)


def macs_of(model: nn.Module, height: int, width: int) -> int:
    """The same of a network that was built on the device `meta`, where nothing is computed."""
    total = 0

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.ConvTranspose2d)
        positions = output if isinstance(module, nn.Conv2d) else inputs[0]
        total += positions.shape[-2] * positions.shape[-1] * module.weight.numel()

    model.eval()  # batch norm would refuse a training batch of one value a channel
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(add)
    model(torch.empty(1, 3, height, width, device="meta"))
    return total
