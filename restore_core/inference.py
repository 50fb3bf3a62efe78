"""A model folder as a function on photographs: uint8 of any sizes in, uint8 of the same sizes out, with a diagnosis."""

from collections import defaultdict
from collections.abc import Collection, Container, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from restore_core import checkpoint
from restore_core.checkpoint import ModelFolder
from restore_core.config import KINDS, Kind, ResidualUNetConfig, require
from restore_core.degradations import to_gray
from restore_core.metrics import to_uint8

Pixels = npt.NDArray[np.uint8]

TILE = 1024
"""Side of the largest square that is restored at once, pixels; a multiple of every network's coarsest scale."""
OVERLAP = 192
"""Pixels that neighbouring tiles share; they are blended over its middle quarter. See DECISIONS.md."""
BATCH_PIXELS = 2**20
"""Pixels of equal-sized images that go through the network together. About 500 bytes of memory each on the CPU."""

# Below all of these a photograph counts as undamaged and stays as it is. Found on validation photographs: see
# DECISIONS.md, "When is a photograph undamaged".
UNDAMAGED_SIGMA_255 = 2.5
UNDAMAGED_SHARE = 0.002
UNDAMAGED_GRAY = 0.5


@dataclass(frozen=True)
class Restored:
    pixels: Pixels
    """uint8 [H, W, 3]"""
    sigma: float
    """Standard deviation of what was removed from the surviving pixels, of 255."""
    flips: float | None
    """Share of single pixels that the network took for destroyed, 0 to 1; None without a survival gate."""
    patches: float | None
    """Share of the area in larger destroyed regions, 0 to 1; None without a survival gate."""
    gray: float
    """How much of the result's colour the input lacked, 0 (none) to 1 (all of it)."""

    def undamaged(self, *, gray_file: bool = False, repair: Container[Kind] = KINDS) -> bool:
        """Tell whether nothing worth changing was found, of the kinds of damage that are to be repaired.

        A file without colour channels has no colour to lose. Without a survival gate nothing passes for undamaged.
        """
        if self.flips is None or self.patches is None:
            return False
        return not (
            ("noise" in repair and self.sigma >= UNDAMAGED_SIGMA_255)
            or ("flips" in repair and self.flips >= UNDAMAGED_SHARE)
            or ("patches" in repair and self.patches >= UNDAMAGED_SHARE)
            or ("gray" in repair and not gray_file and self.gray >= UNDAMAGED_GRAY)
        )


class Restorer:
    """The network in memory, ready for images.

    Args:
        folder: weights and architecture.
        device: on CUDA it computes in bfloat16 autocast, on the CPU in float32.
        repair: the kinds of damage to repair; what the others did stays as it is.
        self_ensemble: average over the image and its mirror image; twice the work.

    Raises UsageError for a choice of `repair` that the network cannot keep apart.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        *,
        repair: Collection[Kind] = KINDS,
        self_ensemble: bool = False,
    ) -> None:
        check_repair(folder, repair)
        self.repair = repair
        self.self_ensemble = self_ensemble
        self.device = torch.device(device)
        self.model = checkpoint.load(folder, self.device)
        self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def __call__(self, images: list[Pixels]) -> list[Restored]:
        """Restore uint8 RGB images [H, W, 3] of any sizes, from 1x1 up; images of equal size share a batch."""
        same_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            same_size[image.shape].append(index)
        results: dict[int, Restored] = {}
        for (height, width, _), indices in same_size.items():
            size = max(1, BATCH_PIXELS // (height * width))
            for start in range(0, len(indices), size):
                part = indices[start : start + size]
                batch = torch.from_numpy(np.stack([images[index] for index in part])).permute(0, 3, 1, 2)
                results |= zip(part, self.restore(batch), strict=True)
        return [results[index] for index in range(len(images))]

    @torch.inference_mode()
    def restore(self, batch: Tensor) -> Iterator[Restored]:
        """Restore a batch of one size, uint8 [B, 3, H, W].

        Raises FloatingPointError if the result is NaN or Inf, MemoryError or torch.OutOfMemoryError.
        """
        batch = batch.to(self.device)
        try:
            image, survival = self._tiled(batch) if max(batch.shape[-2:]) > TILE else self._predict(batch)
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch has no exception of its own for it on CPUs
                raise MemoryError(str(error)) from error
            raise
        if not torch.isfinite(image).all():
            raise FloatingPointError("the network's output is not finite")
        output = to_uint8(image)
        diagnoses = diagnose(batch, output, survival)
        if survival is not None and len(self.repair) < len(KINDS):
            lost_colour = torch.tensor([gray >= UNDAMAGED_GRAY for gray in diagnoses[3]], device=self.device)
            output = repair_only(self.repair, batch, output, survival, lost_colour)
        pixels = output.permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return (Restored(*values) for values in zip(pixels, *diagnoses, strict=True))

    def _predict(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        image, survival = self._forward(batch)
        if not self.self_ensemble:
            return image, survival
        mirrored, mirrored_survival = self._forward(batch.flip(3))
        image = (image + mirrored.flip(3)) / 2
        if survival is not None and mirrored_survival is not None:
            survival = (survival + mirrored_survival.flip(3)) / 2
        return image, survival

    def _forward(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        x = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            prediction = self.model(x)
        survival = prediction.survival
        return prediction.image.float(), None if survival is None else survival.float()

    def _tiled(self, batch: Tensor) -> tuple[Tensor, Tensor | None]:
        """Overlapping tiles, weighted so that each fades out where the next one takes over."""
        count, _, height, width = batch.shape
        total = torch.zeros(count, 4, height, width, device=self.device)  # image and survival
        weights = torch.zeros(height, width, device=self.device)
        gated = False
        for top in _starts(height):
            for left in _starts(width):
                tile = batch[:, :, top : top + TILE, left : left + TILE]
                image, survival = self._predict(tile)
                gated = survival is not None
                both = torch.cat([image, survival], dim=1) if survival is not None else image
                rows = _fade(tile.shape[-2], top > 0, top + TILE < height)
                columns = _fade(tile.shape[-1], left > 0, left + TILE < width)
                weight = (rows[:, None] * columns[None, :]).to(self.device)
                total[:, : both.shape[1], top : top + TILE, left : left + TILE] += both * weight
                weights[top : top + TILE, left : left + TILE] += weight
        total /= weights
        return total[:, :3], total[:, 3:] if gated else None


def check_repair(folder: ModelFolder, repair: Collection[Kind]) -> None:
    """Raise UsageError for a choice of damages that the network cannot keep apart."""
    gated = isinstance(folder.architecture, ResidualUNetConfig) and folder.architecture.gate
    advice = f"model {folder.name} has no gate that tells damages apart; name all of {','.join(KINDS)}"
    require(gated or len(repair) == len(KINDS), "repair", ",".join(repair), advice)


def _starts(length: int) -> range:
    """First pixels of the tiles along one side, whole multiples of every network's coarsest scale."""
    return range(0, max(1, length - OVERLAP), TILE - OVERLAP)


def _fade(length: int, before: bool, after: bool) -> Tensor:
    """Weights along one side of a tile: ramps over the overlap, at those ends where a neighbour is."""
    weight = torch.ones(length)
    # What lies near a tile's border sees too little around it to count at all.
    ramp = ((torch.arange(OVERLAP) + 0.5) / OVERLAP * 4 - 1.5).clamp(0, 1)
    if before:
        weight[:OVERLAP] *= ramp[:length]
    if after:
        weight[-OVERLAP:] *= ramp.flip(0)
    return weight


def diagnose(
    damaged: Tensor, restored: Tensor, survival: Tensor | None
) -> tuple[list[float], list[float | None], list[float | None], list[float]]:
    """What was wrong with each image, read off what the network did to it: sigma, flips, patches, gray.

    Args:
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W], or None.
    """
    count = len(damaged)
    flipped, painted = destroyed_pixels(torch.ones_like(damaged[:, :1]).float() if survival is None else survival)
    patch_share = painted.float().mean(dim=(1, 2, 3))
    flip_share = flipped.float().sum(dim=(1, 2, 3)) / (~painted).sum(dim=(1, 2, 3)).clamp(min=1)

    before, after = to_gray(damaged).float(), to_gray(restored).float()  # lost colour is not noise
    kept = ~(flipped | painted)
    removed = (before - after)[:, :1].square() * kept
    luma_sigma = (removed.sum(dim=(1, 2, 3)) / kept.sum(dim=(1, 2, 3)).clamp(min=1)).sqrt()
    sigma = luma_sigma / (0.299**2 + 0.587**2 + 0.114**2) ** 0.5  # independent channels average out in the luma

    had, has = _colourfulness(damaged, kept), _colourfulness(restored, kept)
    gray = ((has - had) / has.clamp(min=1.0)).clamp(min=0.0)
    shares: list[list[float | None]] = [
        [None] * count if survival is None else list(share.tolist()) for share in (flip_share, patch_share)
    ]
    return sigma.tolist(), shares[0], shares[1], gray.tolist()


def destroyed_pixels(survival: Tensor) -> tuple[Tensor, Tensor]:
    """From the gate's logits [B, 1, H, W], two masks, bool [B, 1, H, W]: flipped pixels, pixels under patches."""
    destroyed = survival < 0
    # A patch is where nearly all of a neighbourhood is destroyed; flipped pixels stand among survivors.
    dense = F.avg_pool2d(destroyed.float(), 7, stride=1, padding=3, count_include_pad=False) > 0.8
    painted = (F.max_pool2d(dense.float(), 7, stride=1, padding=3) > 0) & destroyed
    return destroyed & ~painted, painted


def repair_only(
    repair: Container[Kind], damaged: Tensor, restored: Tensor, survival: Tensor, lost_colour: Tensor
) -> Tensor:
    """Take from the restored images what repairs the chosen damages, and the rest from the damaged ones.

    Args:
        repair: kinds of damage to repair.
        damaged, restored: uint8 [B, 3, H, W].
        survival: the gate's logits [B, 1, H, W].
        lost_colour: whether the image was diagnosed as gray, bool [B].

    Returns uint8 [B, 3, H, W].
    """
    flipped, painted = destroyed_pixels(survival)
    lost = lost_colour.reshape(-1, 1, 1, 1)
    result, untouched = restored, damaged
    if "gray" in repair:  # colour on a gray image, whose grain stays
        colour = restored.int() - to_gray(restored).int()
        untouched = torch.where(lost, (to_gray(damaged).int() + colour).clamp(0, 255).to(torch.uint8), damaged)
    else:
        result = torch.where(lost, to_gray(restored), restored)
    if "noise" not in repair:
        result = torch.where(flipped | painted, result, untouched)
    if "flips" not in repair:
        result = torch.where(flipped, damaged, result)
    if "patches" not in repair:
        result = torch.where(painted, damaged, result)
    return result


def _colourfulness(images: Tensor, kept: Tensor) -> Tensor:
    """Mean distance of the surviving, locally averaged colours from grey, of 255, [B]."""
    weight = F.avg_pool2d(kept.float(), 9, stride=1, padding=4, count_include_pad=False)
    local = F.avg_pool2d(images.float() * kept, 9, stride=1, padding=4, count_include_pad=False)
    local = local / weight.clamp(min=0.05)
    spread = (local - local.mean(dim=1, keepdim=True)).abs().mean(dim=1, keepdim=True)
    return (spread * weight).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3)).clamp(min=1e-6)
