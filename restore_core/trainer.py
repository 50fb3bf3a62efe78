"""One training process: a step, an epoch, an evaluation, and the state to go on from. No Ray here.

B batch, S side of the training samples, K side of the canvas that holds a photograph in its upper left corner.
"""

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from restore_core.config import TrainConfig, to_dict
from restore_core.degradations import (
    STANDARD,
    Damage,
    Generator,
    degrade,
    draw_damage,
    fixed_damage,
    seed_of,
    to_device,
)
from restore_core.errors import DivergedError
from restore_core.metrics import batch_psnr, to_uint8
from restore_core.model import Prediction, build, count_macs, count_parameters, exact_float32, gpu_bfloat16
from restore_core.overlays import draw_overlays

STATE_TENSORS = "state.safetensors"
STATE_FILE = "state.json"
LOSS_CHECK_STEPS = 20  # reading the loss waits for the device, so not at every step
SMALLEST_ERROR = 1e-7  # 0.08 of 255, squared: keeps the root's slope finite where an image is perfect
CENTRAL_CROP = 0.64  # share of the shorter side: the central 160 of LFW's 250 pixels, which the face fills
CENTRAL_JITTER = 0.1  # of that side: how far size and place of the central training crops vary
VALIDATION = {
    name: STANDARD[name]
    for name in (
        "clean", "noise_25", "noise_50", "flips_10", "flips_30", "patches_15", "coloured_patches_15", "gray", "mixed",
        "all",
    )
}  # fmt: skip
"""The fixed damages that validation reports after every epoch, as arguments of `fixed_damage`."""


@dataclass(frozen=True)
class Photographs:
    """Clean photographs of any sizes in equal canvases."""

    keys: list[str]
    pixels: npt.NDArray[np.uint8] | Tensor
    """uint8 RGB [B, K, K, 3]; outside height x width is padding."""
    height: npt.NDArray[np.int32] | Tensor
    """int32 [B]"""
    width: npt.NDArray[np.int32] | Tensor
    """int32 [B]"""

    @staticmethod
    def of(keys: list[str], pixels: list[bytes], heights: list[int], widths: list[int], canvas: int) -> "Photographs":
        """From flat uint8 RGB bytes, each height x width x 3."""
        canvases = np.zeros((len(keys), canvas, canvas, 3), np.uint8)
        for index, (data, height, width) in enumerate(zip(pixels, heights, widths, strict=True)):
            canvases[index, :height, :width] = np.frombuffer(data, np.uint8).reshape(height, width, 3)
        return Photographs(keys, canvases, np.array(heights, np.int32), np.array(widths, np.int32))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, rows: slice) -> "Photographs":
        return Photographs(self.keys[rows], self.pixels[rows], self.height[rows], self.width[rows])


class Trainer:
    """The weights on their way: network, moving average, optimizer and the place in the schedule.

    Args:
        config: what to train and how.
        steps_per_epoch: optimizer steps in an epoch, with as many processes as there are now; the learning rate reaches
            zero after the last epoch's last step.
        device: where everything is computed.
        distribute: wraps the network for data-parallel training; each process then gives its share of each batch.
    """

    def __init__(
        self,
        config: TrainConfig,
        steps_per_epoch: int,
        device: torch.device | str = "cpu",
        distribute: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> None:
        torch.manual_seed(config.seed)
        exact_float32()
        self.config = config
        self.device = torch.device(device)
        # channels_last is what the convolutions run on, on CPUs too (1.1 to 1.3 times faster steps than contiguous)
        self.model: nn.Module = build(config.model).to(self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(),
            lr=config.optimizer.learning_rate,
            weight_decay=config.optimizer.weight_decay,
            fused=True,  # one pass over the weights instead of a dozen
        )
        self.distributed = distribute(self.model)
        fast = fast_bfloat16(self.device)
        self.precision = ("bfloat16" if fast else "float32") if config.precision == "auto" else config.precision
        """What the network is computed in; a run goes on in what it began with."""
        self.epoch = 0
        self.steps = 0
        self.steps_per_epoch = max(1, steps_per_epoch)
        self.history: list[dict[str, float]] = []
        """One row per finished epoch."""

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with the weights of a finished network instead of random ones.

        It has the same architecture, or fewer residual blocks: then the new ones are identities at first, so that the
        larger network begins as good as the finished one (Net2Net, Chen 2016).
        """
        state = self.model.state_dict()
        for name in state.keys() - weights.keys():
            if "second" in name.split("."):  # the last convolution of a residual block
                state[name].zero_()
        state |= weights
        self.model.load_state_dict(state)
        self.average.load_state_dict(state)

    # --- training

    def train_epoch(self, batches: Iterable[Photographs]) -> dict[str, float]:
        """Train on every batch once. Returns mean loss, samples per second and other figures of the epoch.

        Raises DivergedError when the loss is not finite, ValueError when there is no batch.
        """
        torch.manual_seed(seed_of(self.config.seed, "dropout", self.epoch) + _rank() & 2**63 - 1)
        self.distributed.train()
        total = torch.zeros((), device=self.device)
        samples = 0
        started = time.perf_counter()
        step = -1
        for step, batch in enumerate(batches):
            size = self.sample_size(step)
            part = self.fitting(batch, size)
            total += self.step(part, size, min(1.0, step / self.steps_per_epoch))
            samples += len(part)
            if step % LOSS_CHECK_STEPS == 0:
                self._check_loss(total, step)
        if step < 0:
            raise ValueError("an epoch without a single batch: no training photograph could be decoded")
        mean = self._check_loss(total, step) / (step + 1)
        samples *= _world_size()
        self.epoch += 1
        return {
            "epoch": self.epoch,
            "size": max(self.config.sizes(self.epoch - 1)),
            "steps": self.steps,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "samples": samples,
            "train_loss": mean,
            "samples_per_second": samples / max(1e-9, time.perf_counter() - started),
        }

    def sample_size(self, step: int) -> int:
        """Side of the samples of a step, the same on all workers."""
        sizes = self.config.sizes(self.epoch)
        return sizes[seed_of(self.config.seed, "size", self.epoch, step) % len(sizes)]

    def fitting(self, batch: Photographs, size: int) -> Photographs:
        """As many of the photographs as this worker can take at once at that size."""
        most = self.config.step_pixels // _world_size() // size**2
        return batch[: max(1, most)]

    def step(self, batch: Photographs, size: int, share: float = 0.0) -> Tensor:
        """One optimizer step on random crops of side `size` with random damages. Returns the loss, detached.

        `share` of this epoch has been done before, 0 to 1.
        """
        config = self.config.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * self._schedule(share)
        seeds = [seed_of(self.config.seed, "train", self.epoch, key) for key in batch.keys]
        generator = Generator(seeds, self.device)
        clean = random_crops(batch, size, self.config, generator)
        if self.config.overlay_share:
            clean = draw_overlays(clean, self.config.overlay_share, generator)
        damaged, destroyed = degrade(clean, draw_damage(self.config.damage, generator), generator)
        loss = self.loss(self._predict(self.distributed, damaged), clean, destroyed)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.model.parameters(), config.clip_norm)
        self.optimizer.step()
        self.steps += 1
        self._update_average()
        return loss.detach()

    def loss(self, prediction: Prediction, clean: Tensor, destroyed: Tensor) -> Tensor:
        """Root of each image's mean squared error, averaged; and the cross-entropy of the survival gate, if any.

        Each image pulls equally hard, however badly damaged, and towards the mean of what it may have been, which is
        what PSNR rewards. Absolute error (as in DRUNet, Zhang 2021) pulls towards the median, and PSNR's logarithm
        (NAFNet, Chen 2022) hardest for images that are nearly right already. The numbers are in DECISIONS.md.
        """
        error = (prediction.image.float() - clean.float() / 255).square().mean(dim=(1, 2, 3))
        loss: Tensor = ((error + SMALLEST_ERROR).sqrt() - SMALLEST_ERROR**0.5).mean()
        if prediction.survival is not None:
            gate = F.binary_cross_entropy_with_logits(prediction.survival.float(), (~destroyed).float())
            loss = loss + self.config.optimizer.gate_weight * gate
        return loss

    def _schedule(self, share: float) -> float:
        """By epochs, not by steps: those become smaller and more where workers are lost."""
        progress = min(1.0, (self.epoch + share) / self.config.epochs)
        warmup = min(1.0, max((self.steps + 1) / max(1, self.config.optimizer.warmup_steps), 10 * progress))
        return warmup * 0.5 * (1 + math.cos(math.pi * progress))

    def _update_average(self) -> None:
        # The average of the first steps would be mostly initial weights, so it starts with a short memory.
        decay = min(self.config.optimizer.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
            for mine, theirs in zip(self.average.buffers(), self.model.buffers(), strict=True):
                mine.copy_(theirs)

    def _check_loss(self, total: Tensor, step: int) -> float:
        """The mean over the workers, so that all of them stop at the same step."""
        mean = total.clone()
        if _world_size() > 1:
            distributed.all_reduce(mean)
        if not math.isfinite(mean.item()):
            raise DivergedError(
                f"the training loss is {mean.item()} in epoch {self.epoch + 1} at or before step {step + 1}; "
                f"lower --learning-rate (now {self.config.optimizer.learning_rate:g}) and use a new --name"
            )
        return mean.item() / _world_size()

    def _predict(self, model: nn.Module, images: Tensor) -> Prediction:
        x = (images.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return model(x)  # type: ignore[no-any-return]

    # --- evaluation

    @torch.no_grad()
    def evaluate(self, photographs: Photographs) -> dict[str, float]:
        """The moving average's loss on fixed random damages, and its mean PSNR (dB) for each fixed damage.

        The samples are central crops at `val_size`, the same at every call.
        """
        clean = central_crops(photographs, self.config.val_size).to(self.device)
        generator = self._validation_generator("loss", photographs.keys)
        damage = draw_damage(self.config.damage, generator)
        damaged, destroyed = degrade(clean, damage, generator)
        losses = []
        for rows in _slices(len(clean), self.config.batch_size):
            prediction = self._predict(self.average, damaged[rows])
            losses.append(self.loss(prediction, clean[rows], destroyed[rows]).item() * len(clean[rows]))
        result = {"val_loss": sum(losses) / len(clean)}
        for name, strengths in VALIDATION.items():
            damaged, _ = self.validation_damage(name, clean, photographs.keys)
            result[f"psnr_{name}"] = batch_psnr(self.restore(damaged), clean).clamp(max=100).mean().item()
            result[f"identity_{name}"] = batch_psnr(damaged, clean).clamp(max=100).mean().item() if strengths else 100.0
        return result

    def validation_damage(self, name: str, clean: Tensor, keys: list[str]) -> tuple[Tensor, Tensor]:
        """The samples uint8 [B, 3, S, S] with one of the fixed damages of `VALIDATION`, and the destroyed pixels."""
        generator = self._validation_generator(name, keys)
        damage: Damage = fixed_damage(generator, **VALIDATION[name])  # type: ignore[arg-type]
        return degrade(clean, damage, generator)

    @torch.no_grad()
    def restore(self, damaged: Tensor) -> Tensor:
        """Restore uint8 [B, 3, H, W] with the moving average. Returns uint8 of the same shape."""
        batches = [
            to_uint8(self._predict(self.average, damaged[rows]).image)
            for rows in _slices(len(damaged), self.config.batch_size)
        ]
        return torch.cat(batches)

    def _validation_generator(self, name: str, keys: list[str]) -> Generator:
        # Not of the run's seed: what runs come to is compared.
        return Generator([seed_of(0, "validation", name, key) for key in keys], self.device)

    def card(self, last: Mapping[str, float], trained: dict[str, Any]) -> dict[str, Any]:
        """What is written beside the weights (see `checkpoint.save`): how it was `trained`, the `last` evaluation."""
        return {
            "trained": {**trained, "precision": self.precision, "config": to_dict(self.config)},
            "parameters": count_parameters(self.average),
            "macs_at_48_px": count_macs(self.config.model, 48, 48),
            "validation": {
                "size": self.config.val_size,
                "psnr_db": {name: round(last[f"psnr_{name}"], 2) for name in VALIDATION},
                "identity_psnr_db": {name: round(last[f"identity_{name}"], 2) for name in VALIDATION},
            },
        }

    # --- state

    def save_state(self, folder: Path) -> None:
        """Everything needed to go on after the last finished epoch, as safetensors and JSON."""
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.state_dict().items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in values.items()}
        safetensors.torch.save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / STATE_TENSORS
        )
        state = {"epoch": self.epoch, "steps": self.steps, "precision": self.precision, "history": self.history}
        (folder / STATE_FILE).write_text(json.dumps(state))

    def load_state(self, folder: Path) -> None:
        """Go on from `save_state`."""
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
        for name, tensor in safetensors.torch.load_file(folder / STATE_TENSORS).items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        self.model.load_state_dict(parts["model"])
        self.average.load_state_dict(parts["average"])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimizer"].items():
            index, _, field = name.partition(".")
            # In the weights' own memory order, which the fused optimizer takes for granted.
            moments.setdefault(int(index), {})[field] = (
                tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor
            )
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        state: dict[str, Any] = json.loads((folder / STATE_FILE).read_text())
        self.epoch, self.steps, self.history = state["epoch"], state["steps"], state["history"]
        self.precision = state["precision"]


# --- Samples from photographs --------------------------------------------------------------------------------------


def random_crops(batch: Photographs, size: int, config: TrainConfig, generator: Generator) -> Tensor:
    """A random square of each photograph, mirrored half of the time, as uint8 [B, 3, size, size] on the device.

    With probability `central_share` it is the central crop, give or take, with `whole_share` the largest square; else
    its side is `crop_min` to 1 of the photograph's shorter side, and it lies anywhere. Crops smaller than `size` grow
    to it as far as the photograph goes, since what is enlarged is smoother than photographs are.
    """
    device = generator.seeds.device
    height, width = _sides(batch, device)
    draw = generator.uniform(5)
    shorter = torch.minimum(height, width)
    jitter = (2 * draw[:, :3] - 1) * CENTRAL_JITTER  # [B, 3] of side, top and left
    central = draw[:, 4] < config.central_share
    whole = ~central & (draw[:, 4] < config.central_share + config.whole_share)
    anywhere = config.crop_min + (1 - config.crop_min) * draw[:, 0]
    share = torch.where(central, CENTRAL_CROP * (1 + jitter[:, 0]), torch.where(whole, 1.0, anywhere))
    side = (shorter * share).clamp(min=size).minimum(shorter)
    room = height - side, width - side
    top, left = (
        torch.where(central, (space / 2 + side * jitter[:, axis]).clamp(min=0).minimum(space), space * draw[:, axis])
        for axis, space in enumerate(room, start=1)
    )
    return resize_crops(batch, size, top, left, side, mirrored=draw[:, 3] < 0.5)


def central_crops(batch: Photographs, size: int, share: float = CENTRAL_CROP) -> Tensor:
    """The central square, `share` of the shorter side wide, as uint8 [B, 3, size, size] on the CPU.

    Where that has fewer than `size` pixels a side the square is larger, as far as the photograph goes.
    """
    height, width = _sides(batch, torch.device("cpu"))
    shorter = torch.minimum(height, width)
    side = (shorter * share).round().clamp(min=size).minimum(shorter)
    top, left = ((height - side) / 2).floor(), ((width - side) / 2).floor()
    return resize_crops(batch, size, top, left, side, mirrored=torch.zeros(len(batch), dtype=torch.bool))


def resize_crops(batch: Photographs, size: int, top: Tensor, left: Tensor, side: Tensor, mirrored: Tensor) -> Tensor:
    """Pillow's `crop(box).resize((size, size), LANCZOS)` for a batch of boxes, as two matrix products.

    `top`, `left`, `side`: float [B], pixels, need not be whole; `mirrored`: bool [B]. Returns uint8 [B, 3, size, size].
    """
    device = top.device
    pixels = _on(device, batch.pixels)  # [B, K, K, 3]
    canvas = pixels.shape[1]
    rows = _lanczos(size, canvas, top, side)  # [B, S, K]
    columns = _lanczos(size, canvas, left, side)
    columns = torch.where(mirrored[:, None, None], columns.flip(1), columns)
    # Rows first and rounded in between, as Pillow does it. One plain product of matrices per photograph and side: five
    # times as fast as broadcasting over the colours.
    count = len(batch)
    x = pixels.permute(0, 3, 1, 2).contiguous().float().view(count, 3 * canvas, canvas)
    x = (x @ columns.transpose(1, 2)).round().clamp(0, 255)  # [B, 3K, S]
    x = x.view(count, 3, canvas, size).transpose(1, 2).reshape(count, canvas, 3 * size)
    x = (rows @ x).round().clamp(0, 255)  # [B, S, 3S]
    return x.view(count, size, 3, size).transpose(1, 2).to(torch.uint8)


def _lanczos(size: int, canvas: int, start: Tensor, side: Tensor) -> Tensor:
    """Resampling weights [B, size, canvas] that map the pixels in start .. start + side to `size` pixels."""
    scale = (side / size)[:, None, None]  # source pixels per target pixel
    stretch = scale.clamp(min=1)  # a low-pass filter when shrinking
    target = torch.arange(size, device=start.device)[None, :, None] + 0.5
    source = torch.arange(canvas, device=start.device)[None, None, :] + 0.5
    distance = (source - (start[:, None, None] + target * scale)) / stretch
    weights = torch.sinc(distance) * torch.sinc(distance / 3) * (distance.abs() < 3)
    inside = (source > start[:, None, None]) & (source < (start + side)[:, None, None] + 0.5)
    weights = weights * inside
    return weights / weights.sum(dim=2, keepdim=True)


def _sides(batch: Photographs, device: torch.device) -> tuple[Tensor, Tensor]:
    return _on(device, batch.height).float(), _on(device, batch.width).float()


def _on(device: torch.device, values: npt.NDArray[Any] | Tensor) -> Tensor:
    if isinstance(values, Tensor):
        return values.to(device)
    return to_device(torch.as_tensor(np.require(values, requirements=["C", "W"])), device)


def fast_bfloat16(device: torch.device) -> bool:
    """Whether convolutions are faster in bfloat16 than in float32 there: on most GPUs, and on CPUs with AMX tiles."""
    if device.type == "cuda":
        return gpu_bfloat16(device)
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _world_size() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def _slices(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))
