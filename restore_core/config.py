"""What can be chosen: networks, damages, training. Standard library only, so that `--help` answers at once.

Every choice is a keyword-only frozen dataclass; a bad value raises `UsageError` with the field's name in the message.
"""

import dataclasses
import json
import math
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from restore_core.errors import UsageError


def require(condition: bool, option: str, value: object, advice: str) -> None:
    """Raise `UsageError` in the project's one form, `--option value: advice`, unless `condition` holds."""
    if not condition:
        raise UsageError(f"--{option.replace('_', '-')} {value}: {advice}")


Kind = Literal["noise", "flips", "patches", "gray"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The four kinds of damage."""


def parse_repair(text: str) -> tuple[Kind, ...]:
    """`"noise,gray"` -> the kinds of damage to repair. Raises UsageError."""
    names = [part for part in re.split(r"[,\s]+", text) if part]
    for name in names or ["''"]:
        require(name in KINDS, "repair", name, f"no such kind of damage; name some of {','.join(KINDS)}")
    return tuple(kind for kind in KINDS if kind in names)


MAX_SCALES, MAX_CHANNELS, MAX_BLOCKS = 10, 2**16, 64
"""Bounds of networks, so that a damaged config.json is refused before it fills the memory."""


@dataclass(frozen=True, kw_only=True)
class AutoencoderConfig:
    """The convolutional autoencoder of the project's origin (RED-Net, Mao 2016; U-Net, Ronneberger 2015)."""

    kind: Literal["autoencoder"] = "autoencoder"
    depth: int = 4
    """Encoder blocks; each halves height and width."""
    base_channels: int = 32
    """Channels after the first encoder block; each further block doubles them."""
    kernel_size: Literal[3, 5] = 3
    """Side of the convolution kernels, pixels."""
    skips: bool = True
    """Concatenate each decoder stage with the matching encoder output (the last with the input image)."""
    resample: Literal["strided", "pool"] = "strided"
    """Halve and double by stride-2 (transposed) convolutions, or by MaxPool and nearest Upsample."""
    dropout: float = 0.1
    """Share of the encoder's values set to zero in training, 0 to below 1."""

    def __post_init__(self) -> None:
        require(1 <= self.depth <= MAX_SCALES, "model.depth", self.depth, f"use 1 to {MAX_SCALES}")
        require(
            self.base_channels >= 1 and self.base_channels * 2 ** (self.depth - 1) <= MAX_CHANNELS,
            "model.base_channels", self.base_channels, f"use 1 or more, and not over {MAX_CHANNELS} at the last block",
        )  # fmt: skip
        require(self.kernel_size in (3, 5), "model.kernel_size", self.kernel_size, "use 3 or 5")
        require(self.resample in ("strided", "pool"), "model.resample", self.resample, "use strided or pool")
        require(0 <= self.dropout < 1, "model.dropout", self.dropout, "use a share from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class ResidualUNetConfig:
    """A residual encoder-decoder without normalisation, with additive skips (after DRUNet, Zhang 2021, section III-A).

    Beyond DRUNet: it estimates which pixels survived, keeps those near the input and invents only the others.
    """

    kind: Literal["residual_unet"] = "residual_unet"
    channels: tuple[int, ...] = (24, 48, 96, 160, 192)
    """Channels at each scale, from full resolution down; each further scale halves height and width."""
    blocks: tuple[int, ...] = (2, 2, 2, 2, 2)
    """Residual blocks (two 3x3 convolutions each) at each scale, on the way down and again on the way up."""
    gate: bool = True
    """Predict for each pixel whether it survived: output = g (input + residual) + (1 - g) content."""

    def __post_init__(self) -> None:
        scales = len(self.channels)
        require(1 <= scales <= MAX_SCALES, "model.channels", self.channels, f"name 1 to {MAX_SCALES} scales")
        require(
            all(1 <= c <= MAX_CHANNELS for c in self.channels),
            "model.channels", self.channels, f"use 1 to {MAX_CHANNELS} channels per scale",
        )  # fmt: skip
        require(len(self.blocks) == scales, "model.blocks", self.blocks, "name as many as scales")
        require(
            all(1 <= b <= MAX_BLOCKS for b in self.blocks),
            "model.blocks", self.blocks, f"use 1 to {MAX_BLOCKS} blocks per scale",
        )  # fmt: skip

    def extends(self, other: object) -> bool:
        """Whether this is the same network, or the same with more residual blocks."""
        return (
            isinstance(other, ResidualUNetConfig)
            and (self.channels, self.gate) == (other.channels, other.gate)
            and all(mine >= theirs for mine, theirs in zip(self.blocks, other.blocks, strict=True))
        )


ModelConfig = AutoencoderConfig | ResidualUNetConfig
Precision = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class DamageConfig:
    """How training damages are drawn: each of the four on its own, each with its own strength, in random order.

    The share of undamaged samples follows: (1 - alone_share) times the product of (1 - share) over the four.
    """

    noise_share: float = 0.5
    """Share of samples with Gaussian noise, 0 to 1."""
    noise_sigma_max: float = 75.0
    """Largest standard deviation, of 255."""
    flips_share: float = 0.5
    """Share of samples with flipped pixels, 0 to 1."""
    flips_max: float = 0.5
    """Largest probability that a pixel is replaced, 0 to 1."""
    patches_share: float = 0.5
    """Share of samples with patches, 0 to 1."""
    patches_area_max: float = 0.25
    """Largest share of the area under patches, 0 to 1."""
    gray_share: float = 0.3
    """Share of samples whose colour is lost, 0 to 1."""
    alone_share: float = 0.0
    """Share of samples, 0 to 1, that get one of the four alone, in proportion to the shares above. Drawn each on its
    own, single damages are rare, though most photographs suffer from one."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            top = 255.0 if field.name == "noise_sigma_max" else 1.0
            require(0 <= value <= top, f"damage.{field.name}", value, f"use a number from 0 to {top:g}")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay to zero, gradient clipping and an exponential moving average."""

    learning_rate: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Decoupled weight decay (Loshchilov 2019)."""
    warmup_steps: int = 200
    """Optimizer steps of linear warm-up; it ends after a tenth of the training at the latest."""
    clip_norm: float = 1.0
    """Gradients of a larger norm are scaled down to it."""
    ema_decay: float = 0.999
    """Decay of the weights' moving average, which is what is evaluated and shipped; 0 is no averaging."""
    gate_weight: float = 0.1
    """Weight of the cross-entropy of the survival gate beside the root mean square error of the image."""

    def __post_init__(self) -> None:
        require(0 < self.learning_rate < math.inf, "learning_rate", self.learning_rate, "use a number above 0")
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "use 0 or more")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "use 0 or more")
        require(self.clip_norm > 0, "optimizer.clip_norm", self.clip_norm, "use a number above 0")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "use a number from 0 to below 1")
        require(self.gate_weight >= 0, "optimizer.gate_weight", self.gate_weight, "use 0 or more")


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Some epochs of training at the same sizes."""

    sizes: tuple[int, ...]
    """Sides of the square training samples, pixels; each step takes one of them at random."""
    epochs: int
    """Passes over the training photographs."""


def parse_schedule(text: str) -> tuple[Phase, ...]:
    """`"48:40,48+96:10"` -> 40 epochs at 48 pixels, then 10 at 48 or 96 pixels, at random. Raises UsageError."""
    phases = []
    for part in text.split(","):
        sides, colon, epochs = part.partition(":")
        numbers = [number.strip() for number in (*sides.split("+"), epochs)]
        valid = colon and all(number.isdecimal() and int(number) >= 1 for number in numbers)
        require(bool(valid), "schedule", text, "write SIZE:EPOCHS,SIZE+SIZE:EPOCHS,..., such as 48:40,48+96:10")
        *sizes, count = (int(number) for number in numbers)
        phases.append(Phase(sizes=tuple(sizes), epochs=count))
    return tuple(phases)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides the weights, besides the data."""

    model: ModelConfig = ResidualUNetConfig()
    damage: DamageConfig = DamageConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    phases: tuple[Phase, ...] = (Phase(sizes=(48,), epochs=20),)
    batch_size: int = 32
    """Samples per optimizer step, over all workers together."""
    step_pixels: int = 2**19
    """Where a step's samples would have more pixels than this together, it takes fewer of them: bounds the memory."""
    canvas: int = 256
    """Photographs are brought to at most this many pixels a side before random crops are taken from them."""
    crop_min: float = 0.45
    """Smallest side of a random crop, as a share of the photograph's shorter side. No crop is enlarged to its size."""
    central_share: float = 0.75
    """Share of the samples cut around the middle, where an aligned photograph has its face."""
    whole_share: float = 0.0
    """Share of the samples that are the largest square of the photograph; those left over are cut anywhere."""
    overlay_share: float = 0.0
    """Share of the samples with borders, letters, shapes or other photographs in them, which are no damage, 0 to 1."""
    val_size: int = 64
    """Side of the validation samples, pixels."""
    val_images: int = 64
    """Validation photographs damaged in each way after every epoch; at most the whole split."""
    precision: Precision = "auto"
    """Of the network's arithmetic (the weights are float32): auto is bfloat16 where the device computes faster in it
    (GPUs since Ampere, CPUs with AMX), else float32."""
    seed: int = 0
    """Run seed, 64 bits: with the same data and number of workers it gives the same weights, on CPUs. GPUs do not add
    up in the same order every time."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "step_pixels", "canvas", "val_size", "val_images"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "use 1 or more")
        require(0 < self.crop_min <= 1, "crop_min", self.crop_min, "use a share above 0, up to 1")
        require(0 <= self.central_share <= 1, "central_share", self.central_share, "use a share from 0 to 1")
        require(
            0 <= self.whole_share <= 1 - self.central_share,
            "whole_share", self.whole_share, "use a share from 0 to 1 - central_share",
        )  # fmt: skip
        require(0 <= self.overlay_share <= 1, "overlay_share", self.overlay_share, "use a share from 0 to 1")
        for size in (self.val_size, *(size for phase in self.phases for size in phase.sizes)):
            require(size <= self.canvas, "canvas", self.canvas, f"use {size} or more, the side of the largest samples")
        require(-(2**63) <= self.seed < 2**63, "seed", self.seed, "use a number of 64 bits")

    @property
    def epochs(self) -> int:
        return sum(phase.epochs for phase in self.phases)

    def sizes(self, epoch: int) -> tuple[int, ...]:
        """Sides of the samples in an epoch, counted from 0."""
        for phase in self.phases:
            if epoch < phase.epochs:
                return phase.sizes
            epoch -= phase.epochs
        raise IndexError(f"epoch is past the last of {self.epochs}")


def to_dict(config: object) -> dict[str, Any]:
    """A config dataclass as plain JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # type: ignore[call-overload, no-any-return]


def model_config(values: dict[str, Any]) -> ModelConfig:
    """The inverse of `to_dict` for networks. Raises UsageError that names the unknown kind or field."""
    kinds = {"autoencoder": AutoencoderConfig, "residual_unet": ResidualUNetConfig}
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UsageError(f"architecture kind {kind!r}: use one of {', '.join(kinds)}")
    known = {field.name: field.default for field in dataclasses.fields(kinds[kind])}
    if unknown := sorted(set(values) - set(known)):
        raise UsageError(f"architecture field {unknown[0]!r} is not known to {kind}; it has {', '.join(sorted(known))}")
    arguments = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    for name, value in arguments.items():
        if not _same_type(value, known[name]):
            raise UsageError(f"architecture field {name!r} is {value!r}; use a value like {known[name]!r}")
    return kinds[kind](**arguments)  # type: ignore[no-any-return]


def _same_type(value: object, example: object) -> bool:
    if isinstance(example, tuple):
        return isinstance(value, tuple) and all(_same_type(item, example[0]) for item in value)
    return type(value) is type(example) or (isinstance(example, float) and type(value) is int)


# The bundled model `faces`; its card says how it was trained and what came of it.
_FACES = TrainConfig(
    model=ResidualUNetConfig(channels=(32, 64, 128, 256, 256), blocks=(2, 4, 3, 2, 2)),
    damage=DamageConfig(noise_share=0.6, flips_share=0.3, patches_share=0.45, gray_share=0.2, alone_share=0.5),
    # At a rate of 1e-3 the loss jumped in the second epoch, at 7e-4 in the sixth.
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup_steps=300),
    phases=parse_schedule("48:20,48+64+96:10,48+64+128+250:12"),
    batch_size=32,
    central_share=0.6,
    whole_share=0.2,
    overlay_share=0.25,
)

PRESETS: dict[str, TrainConfig] = {
    # Proves that everything works: about a minute on 2 CPU cores, and restores nothing worth seeing.
    "smoke": TrainConfig(
        model=ResidualUNetConfig(channels=(8, 16), blocks=(1, 1)),
        optimizer=OptimizerConfig(warmup_steps=5, ema_decay=0.9),
        phases=parse_schedule("32:2"),
        batch_size=8,
        val_size=32,
        val_images=8,
    ),
    # The project's origin: the strided autoencoder with skips at 48 pixels, 20 epochs.
    "origin": TrainConfig(model=AutoencoderConfig(), phases=parse_schedule("48:20")),
    "faces": _FACES,
    # The bundled model `faces-fast`: a tenth of the multiply-adds of `faces`, for CPUs.
    "faces-fast": dataclasses.replace(
        _FACES,
        model=ResidualUNetConfig(channels=(16, 32, 48, 96, 192), blocks=(1, 1, 1, 1, 2)),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=300),
        phases=parse_schedule("48:20,48+64+96:5,48+64+128+250:3"),
    ),
}
"""What `jobs/train.py --preset` takes, once the name is in `Train.preset` there too; options such as `--schedule` and
`--learning-rate` change one part."""

VARIANTS: dict[str, ModelConfig] = {
    "base": AutoencoderConfig(),
    "kernel-5": AutoencoderConfig(kernel_size=5),
    "depth-3": AutoencoderConfig(depth=3),
    "depth-5": AutoencoderConfig(depth=5),
    "more-kernels": AutoencoderConfig(base_channels=64),
    "no-skips": AutoencoderConfig(skips=False),
    "pool": AutoencoderConfig(resample="pool"),
    "no-dropout": AutoencoderConfig(dropout=0.0),
    # The successor, as small as `base`: 2.27 million parameters to its 2.17, 156 million multiply-adds at 48 px to 163.
    "residual": ResidualUNetConfig(channels=(20, 40, 80, 160, 192), blocks=(1, 1, 1, 1, 1)),
}
"""What `jobs/search.py --variants` compares: the origin's autoencoder, each time with one thing changed."""
