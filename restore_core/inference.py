"""A model folder as a function on photographs: uint8 of any sizes in, uint8 of the same sizes out, with a diagnosis."""

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from restore_core import checkpoint, holes, memory, streaming, strips, tiles
from restore_core.checkpoint import ModelFolder
from restore_core.config import KINDS, Kind, Precision, ResidualUNetConfig, require
from restore_core.degradations import to_device
from restore_core.diagnosis import (
    CONTEXT,
    UNDAMAGED_GRAY,
    UNDAMAGED_SHARE,
    UNDAMAGED_SIGMA_255,
    Diagnosis,
    diagnose,
    evidence,
    filled,
    kept_still,
    repair_only,
    verdict,
)
from restore_core.errors import UsageError
from restore_core.false_patches import without_false_patches
from restore_core.metrics import to_uint8
from restore_core.model import (
    Autoencoder,
    Prediction,
    ResidualUNet,
    each,
    exact_float32,
    gpu_bfloat16,
    pad_to_multiple,
)

Pixels = npt.NDArray[np.uint8]

TILE = 1024
"""Side of the largest square that is restored at once, pixels; a multiple of every network's coarsest scale."""
SMALLER_TILES = (512, 256)
"""What is tried in turn where memory does not suffice for that."""
OVERLAP = 256
"""Pixels that neighbouring tiles or columns share, three quarters of the side of smaller ones. See DECISIONS.md."""
BATCH_PIXELS = {"cpu": 2**17, "cuda": 2**20}
"""Pixels of equal-sized images that go through the network together. More do not fit a CPU's caches: 2**20 took 1.1 to
1.5 times as long there. About 500 bytes of memory each."""
NATIVE_VALUES = 20480
"""A convolution of one image of no more values than this is not oneDNN's but torch's own, which rounds otherwise
(torch 2.13, aten/src/ATen/native/Convolution.cpp, `use_mkldnn`)."""
COLUMN_TILES = 2
"""The residual encoder-decoder goes through large pictures from top to bottom, in columns so many tiles wide."""
STRIP_PIXELS = {"cpu": 2**18, "cuda": 2**21}
"""How much of such a column it is given at once; as much less as tiles are smaller."""
MARGIN = 64
"""Patches are looked at again in a tile's rows at once and so many above and below: a sky should be seen with what is
around it."""
SEAM = 32
"""Over so many rows what was said of one such band fades into what was said of the next."""
IDLE_BYTES = 640 * 2**20
"""If more than that lies unused after some rows of a large picture, libraries (300 MB) included, it is given back to
the system: the gaps that one picture's pieces leave do not fit another's. See DECISIONS.md."""
LARGE_PIXELS = 2**22
"""What counts as large there; after such a picture all is given back. Beside smaller ones it is kept for the next."""
BLOCK = {"cpu": 512, "cuda": 2048}
"""Side of the squares in which a picture in tiles is diagnosed, pixels. A GPU waits for each of their small steps."""
WILD_SHARE = 0.01
"""More than this below -1 or above 2, where 0 is black and 1 is white, is no photograph."""
OUT_OF_MEMORY = (
    "allocate memory", "bad_alloc", "out of memory", "could not create a memory", "ALLOC_FAILED",
    # cuDNN, where none of its algorithms finds the memory that it works in
    "unable to find an engine", "valid cuDNN algorithm",
)  # fmt: skip
"""What torch, oneDNN and CUDA call it in exceptions that have no type of their own for it."""
CPU = torch.device("cpu")


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
    note: str | None = None
    """What was done about memory that ran out, one line; None where it did not."""
    destroyed: holes.Destroyed | None = None
    """Which pixels the network took for that, while it is at work."""

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


@dataclass(frozen=True)
class Rung:
    """How much goes through the network at once, and where: one step of the ladder that leads out of memory's way.

    It goes from a batch over halves of it to single images, then to smaller tiles, then from the GPU to the CPU.
    """

    batch: int
    """Images of one size."""
    tile: int
    """Images with a longer side go through in pieces: tiles of that side, or columns `COLUMN_TILES` times as wide."""
    device: torch.device

    def below(self, side: int) -> "Rung | None":
        """The next one for images whose longer side is `side` pixels; None at the foot."""
        if self.batch > 1:
            return replace(self, batch=self.batch // 2)
        for tile in SMALLER_TILES:
            if tile < min(side, self.tile):
                return replace(self, tile=tile)
        return None if self.device == CPU else Rung(1, TILE, CPU)

    def note(self, first: "Rung") -> str | None:
        """What to write down about a picture that was begun on the rung `first` and done on this one."""
        if self == first:
            return None
        if self.device != first.device:
            small = f" in tiles of {self.tile} pixels" if self.tile < TILE else ""
            return f"out of memory on {first.device}; done on the {self.device}{small}"
        if self.tile != first.tile:
            return f"out of memory in tiles of {first.tile} pixels; done in tiles of {self.tile}"
        return f"out of memory in a batch of {first.batch}; done in a batch of {self.batch}"


class Restorer:
    """The network in memory, ready for images, also of several threads: a GPU copies one's beside another's work.

    Args:
        folder: weights and architecture.
        device: where the network is.
        repair: the kinds of damage to repair; what the others did stays as it is.
        self_ensemble: average over the image and its mirror image; twice the work.
        precision: bfloat16 by autocast, or float32; auto is the former on GPUs that have it and the latter elsewhere.

    Raises UsageError for a choice of `repair` that the network cannot keep apart, and for bfloat16 on a GPU without it.
    """

    def __init__(
        self,
        folder: ModelFolder,
        device: torch.device | str = "cpu",
        *,
        repair: Collection[Kind] = KINDS,
        self_ensemble: bool = False,
        precision: Precision = "auto",
    ) -> None:
        check_repair(folder, repair)
        exact_float32()
        self.folder = folder
        self.repair = repair
        self.self_ensemble = self_ensemble
        self.precision = precision
        self.device = torch.device(device)
        if precision == "bfloat16" and self.device.type == "cuda" and not gpu_bfloat16(self.device):
            raise UsageError("--precision bfloat16: GPUs have it since Ampere, and this is an older one; leave it out")
        self.networks: dict[torch.device, Autoencoder | ResidualUNet] = {}
        self._thread = threading.local()
        self.network(self.device)

    def network(self, device: torch.device) -> Autoencoder | ResidualUNet:
        """The network on a device; on the CPU beside a GPU only once it is needed there."""
        if device not in self.networks:
            network = checkpoint.load(self.folder, device)
            if device == CPU:
                never_alone(network)
            self.networks[device] = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self.networks[device]

    def __call__(self, images: list[Pixels]) -> list[Restored]:
        """Restore uint8 RGB images [H, W, 3] of any sizes, from 1x1 up; images of equal size share a batch.

        Raises FloatingPointError where a result is NaN, Inf or far out of range, and MemoryError where memory does not
        even suffice for the smallest tiles.
        """
        return [replace(result, destroyed=None) for result in self._restored(images)]

    def _restored(self, images: list[Pixels]) -> list[Restored]:
        """The same, and which pixels were destroyed."""
        same_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            same_size[image.shape].append(index)
        results: dict[int, Restored] = {}
        with self._own_stream():
            for indices in same_size.values():
                results |= zip(indices, self._of_one_size([images[index] for index in indices]), strict=True)
        return [results[index] for index in range(len(images))]

    def _own_stream(self) -> contextlib.AbstractContextManager[object]:
        """What a GPU is given to do waits only for what the same thread gave it."""
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        if not hasattr(self._thread, "stream"):
            self._thread.stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            self._thread.stream.wait_stream(torch.cuda.default_stream(self.device))  # which brings the weights
        return torch.cuda.stream(self._thread.stream)

    def _of_one_size(self, images: list[Pixels]) -> list[Restored]:
        height, width, _ = images[0].shape
        together = BATCH_PIXELS[self.device.type] // (height * width) if max(height, width) <= TILE else 1
        first = rung = Rung(max(1, min(together, len(images))), TILE, self.device)
        results: list[Restored] = []
        while len(results) < len(images):
            part = images[len(results) : len(results) + rung.batch]
            restored = self._try(part, rung)
            if restored is not None:
                results += [replace(result, note=_joined(rung.note(first), result.note)) for result in restored]
                continue
            release_memory()
            below = replace(rung, batch=len(part)).below(max(height, width))
            if below is None:
                raise MemoryError(f"not enough memory to restore {width} x {height} pixels")
            rung = below
        return results

    def _try(self, images: list[Pixels], rung: Rung) -> list[Restored] | None:
        """None when memory ran out. By the return what was taken is free again: no exception holds it any more."""
        try:
            if max(images[0].shape) > rung.tile:
                return [self._in_pieces(image, rung) for image in images]
            return self._whole(images, rung.device)
        except MemoryError:
            return None
        except RuntimeError as error:  # torch.OutOfMemoryError among them
            if any(text in str(error) for text in OUT_OF_MEMORY):
                return None
            raise

    @torch.inference_mode()
    def _whole(self, images: list[Pixels], device: torch.device) -> list[Restored]:
        """Images of one size as one batch."""
        batch = to_device(torch.from_numpy(np.stack(images)), device).permute(0, 3, 1, 2)  # [B, 3, H, W]
        image, survival = self._predict(batch, device)
        output = to_uint8(image)
        found, notes, gates = diagnose(batch, output, survival), dict[int, str | None](), None
        if survival is not None:
            flipped = [index for index, diagnosis in enumerate(found) if diagnosis.has_flips]
            if flipped:  # once more, without them: see `filled`
                some, gate = batch[flipped], survival[flipped]
                without = filled(some, output[flipped], gate, [found[index] for index in flipped])
                after = to_uint8(self._predict(without, device)[0])
                output[flipped] = after
                for index, diagnosis in zip(flipped, diagnose(some, after, gate), strict=True):
                    found[index] = diagnosis
            output = kept_still(batch, output, survival, found)
            gates = (survival[:, 0] < 0).cpu().numpy()
            regions = [
                (at, region) for at, gate in enumerate(gates) for region in self._hole_regions(gate, *gate.shape)
            ]
            results = output.permute(0, 2, 3, 1)
            places = [(images[at][region], results[at][region], gates[at][region]) for at, region in regions]
            for (at, _), note in zip(regions, self._look_again(places), strict=True):
                notes[at] = _joined(notes.get(at), note)
            if len(self.repair) < len(KINDS):
                gate = torch.where(torch.from_numpy(gates)[:, None].to(device), -1.0, 1.0)
                output = repair_only(self.repair, batch, output, gate, found)
        pixels = _from_device(output.permute(0, 2, 3, 1).contiguous()).numpy()
        return [
            Restored(result, *diagnosis, notes.get(index), None if gates is None else gates[index])
            for index, (result, diagnosis) in enumerate(zip(pixels, found, strict=True))
        ]

    @torch.inference_mode()
    def _in_pieces(self, image: Pixels, rung: Rung) -> Restored:
        """One image, in memory that grows with it by no more than the result, two columns of it and a bit a pixel."""
        height, width, _ = image.shape
        destroyed: strips.Mask | None = None
        column = COLUMN_TILES * rung.tile
        from_top = partial(self._from_top, rung=rung), column, min(OVERLAP, column * 3 // 4)
        if isinstance(self.network(rung.device), ResidualUNet):
            output, destroyed = strips.predict(image, *from_top)
        else:
            output = tiles.predict(
                image,
                lambda batch: self._predict(batch.to(rung.device), rung.device)[0],
                tile=rung.tile,
                overlap=min(OVERLAP, rung.tile * 3 // 4),
            )

        def tensors(at: tuple[slice, slice]) -> tuple[Tensor, Tensor, Tensor | None]:
            """Before, after, and survival as far as it is still known: by its sign."""
            before, after = (tiles.batch_of(pixels[at]).to(rung.device) for pixels in (image, output))
            if destroyed is None:
                return before, after, None
            gone = torch.from_numpy(destroyed[at])[None, None].to(rung.device)
            return before, after, torch.where(gone, -1.0, 1.0)

        side = min(BLOCK[rung.device.type], rung.tile * BLOCK[rung.device.type] // BLOCK["cpu"])
        blocks = list(tiles.blocks(height, width, side, CONTEXT))

        def diagnosed() -> Diagnosis:
            sums = sum(evidence(*tensors(block.around), *block.within).cpu() for block in blocks)
            assert isinstance(sums, Tensor)
            return verdict(sums, gated=destroyed is not None)[0]

        def change(change_block: Callable[[Tensor, Tensor, Tensor, list[Diagnosis]], Tensor]) -> None:
            for block in blocks:
                before, after, survival = tensors(block.around)
                assert survival is not None
                changed = change_block(before, after, survival, [found])
                # In place: around a block nothing but the gate is looked at.
                output[block.at] = changed[0, :, *block.within].permute(1, 2, 0).cpu().numpy()

        found, note = diagnosed(), None
        if destroyed is not None:
            if found.has_flips:
                change(filled)
                strips.predict(output, *from_top, in_place=True)
                found = diagnosed()
            if found.sigma < UNDAMAGED_SIGMA_255:
                change(kept_still)
            for region in self._hole_regions(destroyed, height, width):
                gate = destroyed[region]
                (seen,) = self._look_again([(image[region], torch.from_numpy(output[region]), gate)])
                note, destroyed[region] = _joined(note, seen), gate
            if len(self.repair) < len(KINDS):
                change(partial(repair_only, self.repair))
        return Restored(output, *found, note, destroyed)

    def _hole_regions(self, destroyed: holes.Destroyed, height: int, width: int) -> list[holes.Region]:
        """Where to look again; nowhere if patches are to stay."""
        return holes.regions(destroyed, height, width) if "patches" in self.repair else []

    def _look_again(self, places: list[tuple[Pixels, Tensor, holes.Mask]]) -> list[str | None]:
        """Fill the large holes of results, in place, also with what is seen at half the size.

        Args:
            places: around such holes, damaged, restored, both uint8 [H, W, 3], and which pixels the gate takes for
                destroyed: in the end all of the holes'.

        Returns for each a note on memory that ran out meanwhile, as in `Restored`.
        """
        found = [
            (number, result, result.cpu().numpy().copy(), gate.copy(), gate, hole)
            for number, (damaged, result, gate) in enumerate(places)
            if (hole := holes.painted(gate, damaged)).any()
        ]
        notes: list[str | None] = [None] * len(places)
        small = self._restored([holes.halved(before, hole) for _, _, before, _, _, hole in found])
        for (number, result, before, taken, gate, hole), seen in zip(found, small, strict=True):
            assert seen.destroyed is not None
            height, width, _ = seen.pixels.shape
            taken_small = seen.destroyed[slice(0, height), slice(0, width)]
            filled = holes.blended(before, hole, taken, seen.pixels, taken_small)[hole]
            result[torch.from_numpy(hole).to(result.device)] = torch.from_numpy(filled).to(result.device)
            gate |= hole
            notes[number] = seen.note
        return notes

    def _predict(self, batch: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Float [B, 3, H, W] and survival logits [B, 1, H, W] for uint8. Raises FloatingPointError."""
        prediction = self._forward(batch, device)
        if self.self_ensemble:
            prediction = each(_mean_of_mirrored, prediction, self._forward(batch.flip(3), device))
        return _checked(batch, prediction)

    def _forward(self, batch: Tensor, device: torch.device) -> Prediction:
        x = (batch.float() / 255).contiguous(memory_format=torch.channels_last)
        with self._autocast(device):
            prediction = self.network(device)(x)
        return each(Tensor.float, prediction)

    def _from_top(self, image: Pixels, rung: Rung) -> strips.Results:
        """The same as `_predict` for one image [H, W, 3], from top to bottom."""
        parts = self._streamed(image, rung)
        if self.self_ensemble:
            mirrored = self._streamed(image[:, ::-1], rung)
            parts = (each(_mean_of_mirrored, *pair) for pair in zip(parts, mirrored, strict=True))
        below: Tensor | None = None
        for shown, inner, prediction in strips.bands(parts, len(image), rung.tile, MARGIN):
            pixels, survival = _checked(tiles.batch_of(image[shown]).to(rung.device), prediction)
            both = pixels if survival is None else torch.cat([pixels, survival], dim=1)
            if below is not None:
                seam = slice(inner.start, inner.start + below.shape[2])
                both[:, :, seam] = tiles.fade(below, both[:, :, seam], dim=2)
            below = both[:, :, inner.stop : inner.stop + SEAM].clone()
            yield both[:, :, inner]
            if rung.device == CPU and image.size >= 3 * LARGE_PIXELS and memory.idle() > IDLE_BYTES:
                memory.trim()

    def _streamed(self, image: Pixels, rung: Rung) -> Iterator[Prediction]:
        """The same as `_forward` for one image [H, W, 3], from top to bottom."""
        network = self.network(rung.device)
        assert isinstance(network, ResidualUNet)
        height, width, _ = image.shape
        share = (rung.tile / TILE) ** 2
        padded_width = width + -width % network.multiple
        rows = int(STRIP_PIXELS[rung.device.type] * share) // padded_width // network.multiple * network.multiple
        rows = max(rows, network.multiple)

        def padded() -> Iterator[Tensor]:
            for top in range(0, height, rows):
                x = tiles.batch_of(image[top : top + rows]).to(rung.device).float() / 255
                yield pad_to_multiple(x, network.multiple).contiguous(memory_format=torch.channels_last)

        parts, top = streaming.predict(network, padded()), 0
        while top < height:
            with self._autocast(rung.device):  # not around a yield, which would leave it on for others
                part = next(parts)
            part = each(lambda values: values[:, :, : height - top, :width].float(), part)  # noqa: B023
            top += part.image.shape[2]
            yield part

    def _autocast(self, device: torch.device) -> torch.autocast:
        fast = gpu_bfloat16(device) if self.precision == "auto" else self.precision == "bfloat16"
        # All threads would share its cache of weights.
        return torch.autocast(device.type, torch.bfloat16, enabled=fast, cache_enabled=False)


def _joined(*notes: str | None) -> str | None:
    return "; ".join(dict.fromkeys(filter(None, notes))) or None


def never_alone(network: nn.Module) -> None:
    """Have convolutions of one image and few values done as those of several are.

    What comes out must not depend on what else there was to do, or a resumed run would write other bytes.
    """

    def convolved(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return forward(x) if len(x) > 1 or x.numel() > NATIVE_VALUES else forward(torch.cat([x, x]))[:1]

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.forward = partial(convolved, module.forward)  # type: ignore[method-assign]


def _from_device(values: Tensor) -> Tensor:
    """The other way than `to_device`."""
    if values.device.type != "cuda":
        return values
    result = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    result.copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    return result


def _mean_of_mirrored(one: Tensor, mirrored: Tensor) -> Tensor:
    return (one + mirrored.flip(3)) / 2


def _checked(batch: Tensor, prediction: Prediction) -> tuple[Tensor, Tensor | None]:
    """Image and survival of a prediction, looked at again. Raises FloatingPointError."""
    image, survival = without_false_patches(batch, prediction)
    least, most = torch.aminmax(image)  # NaN where any value is
    if not (torch.isfinite(least) and torch.isfinite(most)):
        raise FloatingPointError("the network's output is not finite")
    if (least < -1 or most > 2) and ((image < -1) | (image > 2)).float().mean(dim=(1, 2, 3)).max() > WILD_SHARE:
        raise FloatingPointError("the network's output is far out of range")
    return image, survival


def check_repair(folder: ModelFolder, repair: Collection[Kind]) -> None:
    """Raise UsageError for a choice of damages that the network cannot keep apart."""
    gated = isinstance(folder.architecture, ResidualUNetConfig) and folder.architecture.gate
    advice = f"model {folder.name} has no gate that tells damages apart; name all of {','.join(KINDS)}"
    require(gated or len(repair) == len(KINDS), "repair", ",".join(repair), advice)


def release_memory() -> None:
    """Give back what torch's cache and glibc's heaps keep of freed memory, so that pieces of another size find room."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory.trim()
