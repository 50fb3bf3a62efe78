"""The network as a function on photographs: any size, any batch, tiles, and what it says was wrong."""

import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from restore_core import checkpoint, codec, degradations, diagnosis, holes, inference, streaming, strips, tiles
from restore_core.checkpoint import ModelFolder
from restore_core.config import AutoencoderConfig, Kind, ModelConfig, ResidualUNetConfig
from restore_core.degradations import Generator, degrade, fixed_damage, seed_of
from restore_core.diagnosis import Diagnosis, destroyed_pixels, diagnose, repair_only
from restore_core.errors import UsageError
from restore_core.inference import CPU, Pixels, Restorer, Rung
from restore_core.manifest import Row
from restore_core.metrics import psnr, to_uint8
from restore_core.model import Prediction, ResidualUNet, build
from restore_core.pipelines import stages

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent

SMALL = ResidualUNetConfig(channels=(8, 16), blocks=(1, 1))
UNGATED = ResidualUNetConfig(channels=(8, 12, 16), blocks=(1, 1, 1), gate=False)


def model_folder(folder: Path, config: ModelConfig = SMALL, *, spoilt: bool = False) -> ModelFolder:
    torch.manual_seed(0)
    model = build(config)
    if spoilt:
        torch.nn.init.constant_(next(iter(model.parameters())), torch.nan)
    checkpoint.save(model, config, {}, folder)
    return checkpoint.read(str(folder))


@pytest.fixture
def restorer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Restorer:
    """Of random weights. What they make of holes at half the size (tests/test_holes.py) is left out."""
    monkeypatch.setattr(holes, "LEAST", 10**9)
    return Restorer(model_folder(tmp_path))


def photograph(height: int, width: int, seed: int = 0) -> Pixels:
    top, left = np.random.default_rng(seed).integers(0, 512 - np.array([height, width]) + 1)
    return np.ascontiguousarray(skimage.data.astronaut()[top : top + height, left : left + width])


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (5, 7), (48, 48), (33, 50)])
def test_any_size_comes_back_as_it_went_in(restorer: Restorer, size: tuple[int, int]) -> None:
    (result,) = restorer([photograph(*size)])
    assert result.pixels.shape == (*size, 3)
    assert result.pixels.dtype == np.uint8
    assert all(np.isfinite(value) for value in (result.sigma, result.flips, result.patches, result.gray))


def test_no_images_no_results(restorer: Restorer) -> None:
    assert restorer([]) == []


def test_mixed_sizes_keep_their_order_and_equal_single_runs(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal sizes some share a batch. Bit for bit on the CPU: the convolutions do not mix images."""
    monkeypatch.setitem(inference.BATCH_PIXELS, "cpu", 3 * 24 * 32)  # at most three of the larger ones together
    sizes = [(24, 32), (5, 7), (24, 32), (1, 1), (24, 32), (5, 7), (24, 32), (24, 32)]
    images = [photograph(*size, seed=index) for index, size in enumerate(sizes)]
    together = restorer(images)
    for image, result in zip(images, together, strict=True):
        (alone,) = restorer([image])
        np.testing.assert_array_equal(result.pixels, alone.pixels)
        assert (result.sigma, result.flips, result.patches) == (alone.sigma, alone.flips, alone.patches)


@pytest.mark.parametrize("size", [(16, 16), (48, 48), (96, 96), (130, 140)])
def test_what_else_is_in_the_batch_decides_nothing(size: tuple[int, int]) -> None:
    """Of the real networks, and before rounding: torch computes a small image that is alone in another way."""
    restorer = Restorer(checkpoint.read("faces-fast"))
    batch = torch.from_numpy(np.stack([photograph(*size, seed=seed) for seed in range(5)])).permute(0, 3, 1, 2)
    together, _ = restorer._predict(batch, inference.CPU)
    for image, expected in zip(batch, together, strict=True):
        alone, _ = restorer._predict(image[None], inference.CPU)
        assert torch.equal(alone[0], expected)


def test_written_over_itself_an_image_is_copied_in_two_columns_at_most() -> None:
    alive: list[int] = []
    copies: list[weakref.ref[Pixels]] = []

    class Watched(np.ndarray):  # type: ignore[type-arg]
        def copy(self, order: object = "C") -> Pixels:  # type: ignore[override]
            made = np.array(self)
            copies.append(weakref.ref(made))
            alive.append(sum(copy() is not None for copy in copies))
            return made

    def network(part: Pixels) -> Iterator[Tensor]:
        yield 1 - tiles.batch_of(part) / 255

    image = photograph(40, 300)
    expected = 255 - image
    strips.predict(image.view(Watched), network, 80, 32, in_place=True)
    np.testing.assert_array_equal(image, expected)
    assert alive == [1, 2, 2, 2, 2, 2]


def test_a_read_only_image_is_no_obstacle(restorer: Restorer) -> None:
    image = photograph(8, 8)
    image.setflags(write=False)
    np.testing.assert_array_equal(restorer([image])[0].pixels, restorer([image.copy()])[0].pixels)


@pytest.mark.parametrize("size", [(1100, 60), (40, 2000)])
def test_tiles_equal_the_whole_within_one_level(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int]
) -> None:
    # An untrained gate sees patches everywhere; which of them are none is looked at in each piece, and it sees more or
    # less of them. Of the bundled networks that makes no difference here: see at the end of this file.
    monkeypatch.setattr(inference, "without_false_patches", lambda damaged, prediction: prediction[:2])
    image = np.tile(skimage.data.astronaut(), (4, 4, 1))[: size[0], : size[1]].copy()
    (tiled,) = restorer([image])
    monkeypatch.setattr(inference, "TILE", 4096)
    (whole,) = restorer([image])
    assert np.abs(tiled.pixels.astype(int) - whole.pixels).max() <= 1
    assert tiled.sigma == pytest.approx(whole.sigma, rel=0.01)
    assert tiled.flips == pytest.approx(whole.flips, abs=0.01)


@pytest.mark.parametrize("size", [(64, 65), (97, 64), (160, 300), (130, 33), (1, 100), (100, 1)])
@pytest.mark.parametrize("config", [SMALL, UNGATED, AutoencoderConfig(depth=2, base_channels=4)])
def test_many_small_tiles_are_put_together_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], config: ResidualUNetConfig
) -> None:
    """Not to the level everywhere: of such an overlap the network's view is no small part."""
    restorer = Restorer(model_folder(tmp_path, config))
    image = photograph(*size)
    (whole,) = restorer([image])
    monkeypatch.setattr(inference, "TILE", 64)
    monkeypatch.setattr(inference, "OVERLAP", 32)
    (tiled,) = restorer([image])
    difference = np.abs(tiled.pixels.astype(int) - whole.pixels)
    assert (difference > 1).mean() < 0.002
    assert difference.mean() < 0.1


@pytest.mark.parametrize("config", [SMALL, UNGATED, ResidualUNetConfig(channels=(4, 8, 8, 8), blocks=(2, 1, 2, 1))])
@pytest.mark.parametrize("rows", [(8,), (8, 8, 8), (16, 40, 8), (1, 7, 2, 3, 3, 60, 4)])
def test_from_top_to_bottom_comes_to_the_same_as_at_once(config: ResidualUNetConfig, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = build(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    image = torch.rand(1, 3, sum(rows), 24).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        parts = list(streaming.predict(network, iter(image.split(rows, dim=2))))
        whole = network(image)
    for name, expected in whole._asdict().items():
        found = [getattr(part, name) for part in parts]
        if expected is None:
            assert found == [None] * len(parts)
        else:
            torch.testing.assert_close(torch.cat(found, dim=2), expected, rtol=0, atol=1e-5)


def test_what_is_done_is_given_out_before_the_next_rows_are_asked_for() -> None:
    """Else it would hold the whole picture: by this network a row is due 28 further down."""
    network = build(SMALL)
    asked = 0

    def rows() -> Iterator[Tensor]:
        nonlocal asked
        for _ in range(100):
            asked += 8
            yield torch.zeros(1, 3, 8, 16)

    done, late = 0, []
    with torch.inference_mode():
        for part in streaming.predict(network, rows()):
            late.append(asked - done)
            done += part.image.shape[2]
    assert done == 800 and max(late) <= 28


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("options", [{"self_ensemble": True}, {"precision": "bfloat16"}, {"repair": ("noise",)}])
def test_options_are_the_same_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], columns: int
) -> None:
    monkeypatch.setattr(inference, "COLUMN_TILES", 2 if columns == 1 else 1)
    monkeypatch.setattr(inference, "OVERLAP", 48)
    monkeypatch.setattr(inference, "without_false_patches", lambda damaged, prediction: prediction[:2])
    restorer = Restorer(model_folder(tmp_path), **options)  # type: ignore[arg-type]
    image = photograph(150, 132)  # mirrored columns begin on an even pixel, as the whole does
    (whole,) = restorer([image])
    monkeypatch.setattr(inference, "TILE", 80)
    monkeypatch.setitem(inference.STRIP_PIXELS, "cpu", 20 * 132)
    (pieces,) = restorer([image])
    assert np.abs(pieces.pixels.astype(int) - whole.pixels).max() <= (2 if "precision" in options else 1)
    assert (pieces.pixels != whole.pixels).mean() < (0.02 if "precision" in options else 1e-4)


@pytest.mark.parametrize("height", [1, 5, 63, 64, 65, 100, 200])
@pytest.mark.parametrize("counts", [(1,), (7,), (50, 3), (300,)])
def test_bands_are_all_of_it_with_some_around_them(height: int, counts: tuple[int, ...]) -> None:
    image = torch.arange(height).reshape(1, 1, height, 1).float()

    def parts() -> Iterator[Prediction]:
        top, index = 0, 0
        while top < height:
            bottom = min(height, top + counts[index % len(counts)])
            yield Prediction(image[:, :, top:bottom].clone(), None)
            top, index = bottom, index + 1

    inside = []
    for shown, inner, piece in strips.bands(parts(), height, 32, 10):
        assert torch.equal(piece.image, image[:, :, shown])
        assert shown.start == max(0, shown.start + inner.start - 10)
        assert shown.stop == min(height, shown.start + inner.stop + 10)
        inside.append(piece.image[:, :, inner].clone())
        piece.image.fill_(-1)  # what is changed in one is not changed in the next
    assert torch.equal(torch.cat(inside, dim=2), image)


SIZES = [(height, 70) for height in range(1, 180, 7)] + [(130, width) for width in range(1, 180, 7)]


@pytest.mark.parametrize("overlap", [16, 32, 48])
def test_tiles_are_put_together_without_a_gap(overlap: int) -> None:
    """What does nothing to a tile does nothing to the image."""
    for height, width in SIZES:
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        result = tiles.predict(image, lambda batch: batch.float() / 255, 64, overlap)
        np.testing.assert_array_equal(result, image)


@pytest.mark.parametrize("overlap", [16, 32, 48])
def test_columns_are_put_together_without_a_gap(overlap: int) -> None:
    """So with columns, each of which comes in parts; and the gate's word is kept where it was said."""

    def nothing(column: Pixels) -> strips.Results:
        assert len(column) == height and column.shape[1] <= 64
        for part in torch.from_numpy(column.copy()).permute(2, 0, 1)[None].split(50, dim=2):
            yield torch.cat([part.float() / 255, part[:, :1].float() - 100], dim=1)

    for height, width in SIZES:
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        result, destroyed = strips.predict(image, nothing, 64, overlap)
        np.testing.assert_array_equal(result, image)
        assert destroyed is not None
        rows, columns = slice(height // 3, height), slice(width // 3, width - width // 4)
        np.testing.assert_array_equal(destroyed[rows, columns], image[rows, columns, 0] < 100)


@pytest.mark.parametrize("overlap", [16, 48])
def test_what_is_written_over_an_image_is_made_of_what_it_was(overlap: int) -> None:
    def blurred(column: Pixels) -> strips.Results:
        """Of columns, each part also of what is above it and beside it."""
        x = torch.from_numpy(column.copy()).permute(2, 0, 1)[None].float() / 255
        for top in range(0, len(column), 50):
            seen = torch.from_numpy(column[max(0, top - 20) : top + 50].copy()).permute(2, 0, 1)[None].float() / 255
            rows = x[:, :, top : top + 50]
            yield torch.cat([(seen.mean() + rows + rows.roll(3, 3)) / 3, rows[:, :1] - 0.4], dim=1)

    for height, width in SIZES:
        image = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
        expected, gates = strips.predict(image, blurred, 64, overlap)
        result, destroyed = strips.predict(image, blurred, 64, overlap, in_place=True)
        assert result is image and destroyed is not None and gates is not None
        np.testing.assert_array_equal(result, expected)
        everywhere = slice(0, height), slice(0, width)
        np.testing.assert_array_equal(destroyed[everywhere], gates[everywhere])


def test_a_tile_fades_into_the_next_over_the_middle_of_what_they_share() -> None:
    numbers = iter(range(100))
    image = np.zeros((100, 100, 3), np.uint8)
    result = tiles.predict(image, lambda batch: torch.full(batch.shape, next(numbers) % 5 / 5), 64, 32)
    levels = result[:, :, 0].astype(int)
    assert levels[:46, :46].max() == 0  # the first tile, up to seven sixteenths of the overlap
    assert (levels[:46, 50:78] == 51).all() and (levels[82:, 82:] == 8 % 5 * 51).all()
    ramp = (np.arange(4) + 0.5) / 4
    np.testing.assert_allclose(levels[0, 46:50], 51 * ramp, atol=0.51)
    corner = np.array([[0, 51], [153, 204]])  # tiles 0, 1 and, in the row below, 3 and 4
    both = np.stack([1 - ramp, ramp])
    np.testing.assert_allclose(levels[46:50, 46:50], np.einsum("ay,bx,ab->yx", both, both, corner), atol=0.51)


def test_a_sky_is_seen_with_what_is_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a picture that is restored in pieces: else where nothing but sky is seen it would pass for a patch."""
    monkeypatch.setattr(inference, "TILE", 256)
    monkeypatch.setitem(inference.STRIP_PIXELS, "cpu", 2**14)
    restorer = Restorer(model_folder(tmp_path))
    rows, columns = np.mgrid[:700, :200]
    sky = np.stack([rows * 0.2 + 20, columns * 0.2 + 40, rows * 0.1 + columns * 0.3 + 60], axis=2)
    image = (sky + np.random.default_rng(0).normal(0, 1.5, sky.shape)).round().astype(np.uint8)
    destroyed = torch.zeros(1, 1, *image.shape[:2], dtype=torch.bool)
    destroyed[..., :220, :] = True
    painting_gate(restorer, destroyed, torch.from_numpy(image).permute(2, 0, 1)[None])
    (result,) = restorer([image])
    assert result.patches == 0.0
    np.testing.assert_array_equal(result.pixels[:200], image[:200])


def test_in_bfloat16_little_is_another() -> None:
    """With the bundled model, clean, noisy and grey: other values, by a few of 255, and the same verdicts."""
    clean = photograph(96, 96)
    noise = np.random.default_rng(0).normal(0, 25, clean.shape)
    images = [clean, (clean + noise).round().clip(0, 255).astype(np.uint8), np.repeat(clean[:, :, :1], 3, axis=2)]
    folder = checkpoint.read("faces-fast")
    exact, fast = (Restorer(folder, precision=precision)(images) for precision in ("float32", "bfloat16"))
    default = Restorer(folder)(images)
    for one, other, same in zip(exact, fast, default, strict=True):
        np.testing.assert_array_equal(one.pixels, same.pixels)
        distance = np.abs(one.pixels.astype(int) - other.pixels)
        assert 0 < distance.mean() < 0.5 and distance.max() <= 12
        assert one.undamaged() == other.undamaged()
        assert other.sigma == pytest.approx(one.sigma, abs=0.5) and other.gray == pytest.approx(one.gray, abs=0.05)


def test_weights_that_are_not_numbers_are_noticed(tmp_path: Path) -> None:
    restorer = Restorer(model_folder(tmp_path, spoilt=True))
    with pytest.raises(FloatingPointError, match="not finite"):
        restorer([photograph(8, 8)])


def test_networks_without_a_gate_leave_destroyed_pixels_open(tmp_path: Path) -> None:
    restorer = Restorer(model_folder(tmp_path, AutoencoderConfig(depth=2, base_channels=4)))
    (result,) = restorer([photograph(20, 20)])
    assert result.flips is None and result.patches is None
    assert not result.undamaged()


def test_an_output_far_out_of_range_is_noticed(tmp_path: Path) -> None:
    restorer = Restorer(model_folder(tmp_path))
    restorer([photograph(8, 8)])
    with torch.no_grad():
        next(restorer.networks[CPU].modules()).tail.weight.mul_(1e4)  # type: ignore[union-attr, operator]
    with pytest.raises(FloatingPointError, match="far out of range"):
        restorer([photograph(8, 8)])


@pytest.mark.parametrize("repair", [("noise", "flips"), ("patches", "gray")])
def test_in_tiles_a_choice_of_damages_is_the_same_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repair: tuple[Kind, ...]
) -> None:
    """Diagnosed and chosen block by block, against the whole at once."""
    monkeypatch.setattr(inference, "TILE", 64)
    monkeypatch.setattr(inference, "OVERLAP", 32)
    monkeypatch.setattr(inference, "BLOCK", {"cpu": 24})
    restorer = Restorer(model_folder(tmp_path), repair=repair)
    clean = torch.from_numpy(photograph(70, 100)).permute(2, 0, 1)[None]
    damage = fixed_damage(Generator([4]), area=0.2, gray="gray" in repair)
    damaged, destroyed = degrade(clean, damage, Generator([4]))
    image = damaged[0].permute(1, 2, 0).contiguous().numpy()
    knowing_gate(restorer, destroyed, damaged)
    (result,) = restorer([image])
    whole, survival = restorer._predict(damaged, CPU)
    assert survival is not None and torch.equal(survival[0] < 0, destroyed[0])
    after = to_uint8(whole)
    output = after[0].permute(1, 2, 0).numpy()
    (found,) = diagnose(damaged, after, survival)
    assert (result.flips, result.patches) == pytest.approx((found.flips, found.patches), rel=1e-6)
    assert (result.sigma, result.gray) == pytest.approx((found.sigma, found.gray), rel=1e-4)
    assert found.lost_colour
    expected = repair_only(repair, damaged, after, survival, [found])[0].permute(1, 2, 0)
    np.testing.assert_array_equal(result.pixels, expected)
    assert not np.array_equal(result.pixels, output) and not np.array_equal(result.pixels, image)


def knowing_gate(restorer: Restorer, destroyed: Tensor, damaged: Tensor) -> None:
    """Make the network's gate say what was destroyed, wherever in the image a piece lies, and its image colourful."""
    colour = torch.tensor([0.15, 0.0, -0.15]).reshape(1, 3, 1, 1)
    gate_that_knows(restorer, destroyed, damaged, lambda x, gone: Prediction((x + colour).clamp(0, 1), None))


def painting_gate(restorer: Restorer, destroyed: Tensor, damaged: Tensor) -> None:
    """Make the network paint all that was destroyed white, and change nothing else."""
    gate_that_knows(restorer, destroyed, damaged, lambda x, gone: Prediction(torch.where(gone, 1.0, x), None, x))


def gate_that_knows(
    restorer: Restorer, destroyed: Tensor, damaged: Tensor, says: Callable[[Tensor, Tensor], Prediction]
) -> None:
    def tell(x: Tensor, prediction: Prediction) -> Prediction:
        height, width = x.shape[-2:]
        for top in range(damaged.shape[-2] - height + 1):
            for left in range(damaged.shape[-1] - width + 1):
                here = slice(top, top + height), slice(left, left + width)
                if torch.equal((damaged[:, :, *here].float() / 255), x):
                    gone = destroyed[:, :, *here]
                    return says(x, gone)._replace(survival=torch.where(gone, -5.0, 5.0))
        raise AssertionError("no such piece")

    change_what_it_says(restorer.networks[CPU], tell)


def change_what_it_says(network: torch.nn.Module, change: Callable[[Tensor, Prediction], Prediction]) -> None:
    """Of images, float [B, 3, H, W], that it is given at once, and of the pieces in which it works through one."""
    assert isinstance(network, ResidualUNet)
    merge = network.merge
    network.merge = lambda image, x: change(image, merge(image, x))  # type: ignore[method-assign]


# --- When memory runs out ------------------------------------------------------------------------------------------

SHORTAGES = {
    "numpy": MemoryError("Unable to allocate 1.00 GiB"),
    "torch on the CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
    "torch on CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "a layer": RuntimeError("could not create a memory object"),
}


def short_of_memory(
    restorer: Restorer, pixels: int, error: Exception = SHORTAGES["numpy"], device: torch.device = CPU
) -> list[tuple[int, ...]]:
    """Let the real network fail on more than so many pixels at once. Returns the sizes that it was given, in turn."""
    seen = []

    def allocate(image: Tensor, prediction: Prediction) -> Prediction:
        size = image.shape
        seen.append((size[0], *size[2:]))
        if size[0] * size[2] * size[3] > pixels:
            raise error
        return prediction

    change_what_it_says(restorer.network(device), allocate)
    return seen


@pytest.mark.parametrize("error", SHORTAGES)
def test_out_of_memory_the_batch_is_halved(restorer: Restorer, error: str) -> None:
    images = [photograph(24, 32, seed) for seed in range(7)]
    plenty = restorer(images)
    seen = short_of_memory(restorer, 2 * 24 * 32, SHORTAGES[error])
    scarce = restorer(images)
    flipped = [result for result in plenty if result.flips and result.flips >= diagnosis.UNDAMAGED_SHARE]
    assert [size[0] for size in seen] == [7, 3] + (7 + len(flipped)) * [1]
    assert {result.note for result in plenty} == {None}
    assert {result.note for result in scarce} == {"out of memory in a batch of 7; done in a batch of 1"}
    for one, other in zip(plenty, scarce, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)


@pytest.mark.parametrize("tile", [512, 256])
def test_out_of_memory_the_pieces_become_smaller(
    restorer: Restorer, monkeypatch: pytest.MonkeyPatch, tile: int
) -> None:
    image = np.tile(skimage.data.astronaut(), (2, 2, 1))[:530, :40].copy()
    (whole,) = restorer([image])
    monkeypatch.setitem(inference.STRIP_PIXELS, "cpu", 400 * 40)
    rows = 400 * tile**2 // 1024**2  # in a strip
    seen = short_of_memory(restorer, (rows + 4) * 40)
    (tiled,) = restorer([image])
    assert seen[0] == (1, 530, 40) and (1, rows // 2 * 2, 40) in seen
    assert tiled.note == f"out of memory in tiles of 1024 pixels; done in tiles of {tile}"
    assert np.abs(tiled.pixels.astype(int) - whole.pixels).max() <= 1


def test_out_of_memory_on_the_gpu_the_cpu_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's own number in the place of a GPU."""
    monkeypatch.setattr(holes, "LEAST", 10**9)
    monkeypatch.setitem(inference.STRIP_PIXELS, "cpu", 2**16)
    gpu = torch.device("cpu:0")
    restorer, image = Restorer(model_folder(tmp_path), gpu), photograph(300, 20)
    (plenty,) = restorer([image])
    assert list(restorer.networks) == [gpu]
    seen = short_of_memory(restorer, 0, SHORTAGES["torch on CUDA"], gpu)
    (scarce,) = restorer([image])
    assert seen == [(1, 300, 20), (1, 193, 20)]  # of a strip of 204 rows, those with 11 more below them
    assert scarce.note == "out of memory on cpu:0; done on the cpu"
    np.testing.assert_array_equal(scarce.pixels, plenty.pixels)
    short_of_memory(restorer, 256 * 20)
    assert restorer([image])[0].note == "out of memory on cpu:0; done on the cpu in tiles of 256 pixels"


def test_the_ladder_ends_on_the_cpu() -> None:
    rung: Rung | None = Rung(5, 1024, torch.device("cuda"))
    ladder = []
    while rung is not None:
        ladder.append((rung.batch, rung.tile, rung.device.type))
        rung = rung.below(2000)
    gpu, cpu = "cuda", "cpu"
    assert ladder == [
        (5, 1024, gpu), (2, 1024, gpu), (1, 1024, gpu), (1, 512, gpu), (1, 256, gpu),
        (1, 1024, cpu), (1, 512, cpu), (1, 256, cpu),
    ]  # fmt: skip
    assert Rung(1, 1024, CPU).below(200) is None  # smaller tiles would change nothing


def test_out_of_memory_at_the_foot_is_an_error(restorer: Restorer) -> None:
    short_of_memory(restorer, 10)
    with pytest.raises(MemoryError, match="not enough memory to restore 40 x 30 pixels"):
        restorer([photograph(30, 40)])


def test_other_errors_are_bugs(restorer: Restorer) -> None:
    short_of_memory(restorer, 10, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        restorer([photograph(30, 40)])


def item(image: Pixels, key: str) -> stages.Item:
    row = Row(key=key, size=1, etag="e", model="m", options="o", run_id="r")
    height, width, _ = image.shape
    return stages.Item(row, b"", codec.Picture(image, "PNG", "RGB", width, height, None, False))


def test_what_memory_and_network_do_is_in_the_rows(restorer: Restorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture finds no memory, another comes out as NaN; the others are restored, and one says how."""
    sizes = {"small": (10, 10), "batch 1": (16, 16), "batch 2": (16, 16), "tiles": (290, 20), "none": (9, 510)}
    items = [item(photograph(*size), key) for key, size in sizes.items()] + [item(photograph(9, 9), "nan")]
    monkeypatch.setitem(inference.STRIP_PIXELS, "cpu", 16 * 800)  # in tiles of 256 a strip has 800 pixels, or two rows
    short_of_memory(restorer, 900)

    def spoil(image: Tensor, prediction: Prediction) -> Prediction:
        return Prediction(prediction.image * (torch.nan if image.shape[-1] == 9 else 1), prediction.survival)

    change_what_it_says(restorer.networks[CPU], spoil)
    stages.restore(items, restorer)
    rows = {item.row.key: item.row for item in items}
    assert {key: row.error for key, row in rows.items() if row.error} == {"none": "out_of_memory", "nan": "model"}
    assert rows["none"].message == "not enough memory to restore 510 x 9 pixels; use larger machines"
    assert rows["nan"].message == "the network's output is not finite; the original is kept"
    assert rows["tiles"].message == "out of memory in tiles of 1024 pixels; done in tiles of 256"
    for each in items:
        assert (each.restored is not None) == (each.row.error is None)
    assert {rows[key].message for key in ("small", "batch 1", "batch 2")} == {None}


# --- Diagnosis -----------------------------------------------------------------------------------------------------
# What a perfect network would say: it returns the clean photograph, and its gate knows the destroyed pixels.


def clean_photographs() -> Tensor:
    astronaut, coffee, cat = skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()
    crops = [astronaut[:128, 150:278], coffee[100:228, 150:278], cat[50:178, 100:228]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def perfect_diagnosis(**damage: object) -> tuple[list[list[float]], Tensor]:
    clean = clean_photographs()
    generator = Generator([seed_of(0, "diagnosis", str(index)) for index in range(len(clean))], "cpu")
    damaged, destroyed = degrade(clean, fixed_damage(generator, **damage), generator)  # type: ignore[arg-type]
    survival = torch.where(destroyed, -5.0, 5.0).reshape(len(clean), 1, 128, 128)
    return [list(values) for values in zip(*diagnose(damaged, clean, survival), strict=True)], destroyed


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (9, 5), (60, 47)])
def test_windows_are_those_of_torch(size: tuple[int, int]) -> None:
    """Sums made of sums, against pooling; at the borders too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 3, *size), generator=generator).float()
    for side in (7, 9):
        expected = F.avg_pool2d(x, side, stride=1, padding=side // 2, count_include_pad=False)
        assert torch.equal(diagnosis.sum_around(x, side) / diagnosis._area_around(x, side), expected)
    sums = diagnosis._on_grid(x.to(torch.uint8), slice(None), slice(None))
    assert torch.equal(sums / diagnosis._area_around(x, 9)[..., ::4, ::4], expected[..., ::4, ::4])
    survival = F.interpolate(torch.randn(2, 1, *size, generator=generator), scale_factor=4)[..., : size[0], : size[1]]
    dense = F.avg_pool2d((survival < 0).float(), 7, stride=1, padding=3, count_include_pad=False) > 0.8
    painted = (F.max_pool2d(dense.float(), 7, stride=1, padding=3) > 0) & (survival < 0)
    assert torch.equal(destroyed_pixels(survival)[1], painted)


def test_colour_is_how_far_three_values_are_from_their_mean() -> None:
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = (images.float() - images.float().mean(dim=1, keepdim=True)).abs().mean(dim=1, keepdim=True)
    one = torch.ones(2, 1, 20, 30)
    torch.testing.assert_close(diagnosis._colour(images.to(torch.int16), one, one), expected)


def test_an_undamaged_photograph_is_told_as_such() -> None:
    (sigma, flips, patches, gray), _ = perfect_diagnosis()
    assert max(sigma) == max(flips) == max(patches) == 0
    assert max(gray) < 0.01


@pytest.mark.parametrize("sigma_255", [10, 25, 50])
def test_noise_is_measured(sigma_255: float) -> None:
    (sigma, flips, patches, gray), _ = perfect_diagnosis(sigma_255=sigma_255)
    assert sigma == pytest.approx([sigma_255] * 3, rel=0.25)  # clipping at black and white takes some away
    assert max(flips) == max(patches) == 0
    assert max(gray) < 0.2


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_flipped_pixels_are_counted_and_are_neither_noise_nor_patches(share: float) -> None:
    (sigma, flips, patches, gray), _ = perfect_diagnosis(flips=share)
    assert flips == pytest.approx([share] * 3, rel=0.15)
    assert max(patches) < 0.002
    assert max(sigma) < 1
    assert max(gray) < 0.2


@pytest.mark.parametrize("coloured", [False, True])
def test_patches_are_measured_and_are_neither_flips_nor_noise(coloured: bool) -> None:
    (sigma, flips, patches, gray), destroyed = perfect_diagnosis(area=0.15, coloured=coloured)
    share = destroyed.reshape(3, -1).float().mean(dim=1).tolist()
    assert patches == pytest.approx(share, rel=0.1)
    assert max(flips) < 0.002
    assert max(sigma) < 1
    assert max(gray) < 0.2


def test_lost_colour_is_lost_colour_and_not_noise() -> None:
    (sigma, flips, patches, gray), _ = perfect_diagnosis(gray=True)
    assert min(gray) > 0.9
    assert max(sigma) < 1
    assert max(flips) == max(patches) == 0


def test_a_grey_photograph_that_stays_grey_has_lost_nothing() -> None:
    grey = clean_photographs()[:, :1].expand(-1, 3, -1, -1).contiguous()
    assert max(found.gray for found in diagnose(grey, grey, None)) == 0


def test_without_a_gate_noise_and_grey_are_still_told() -> None:
    clean = clean_photographs()
    for sigma, flips, patches, gray in diagnose(clean, clean, None):
        assert flips is patches is None
        assert sigma == 0 and gray < 0.01


# --- Flips first ---------------------------------------------------------------------------------------------------


def flipped_photographs() -> tuple[list[Pixels], list[Pixels]]:
    """Clean and damaged: noise alone, flips, neither."""
    clean = clean_photographs()
    generator = Generator([5, 6, 7])
    noisy, _ = degrade(clean, fixed_damage(generator, sigma_255=25), generator)
    flipped, _ = degrade(clean, fixed_damage(generator, sigma_255=5, flips=0.3), generator)
    damaged = torch.stack([noisy[0], flipped[1], clean[2]])
    return [[*images.permute(0, 2, 3, 1).contiguous().numpy()] for images in (clean, damaged)]  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "gain"), [("faces", 0.5), ("faces-fast", 1.0)])
def test_with_flips_the_network_looks_again_without_them(
    name: str, gain: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, damaged = flipped_photographs()
    restorer = Restorer(checkpoint.read(name))
    calls: list[int] = []
    forward = restorer._forward
    monkeypatch.setattr(restorer, "_forward", lambda batch, device: calls.append(len(batch)) or forward(batch, device))
    again = restorer(damaged)
    assert calls == [3, 1]
    for image, result in zip(damaged, again, strict=True):
        np.testing.assert_array_equal(result.pixels, restorer([image])[0].pixels)
    monkeypatch.setattr(diagnosis, "UNDAMAGED_SHARE", 1.1)
    once = restorer(damaged)
    for index in (0, 2):
        np.testing.assert_array_equal(again[index].pixels, once[index].pixels)
    assert psnr(again[1].pixels, clean[1]) > psnr(once[1].pixels, clean[1]) + gain
    assert (again[1].flips, again[1].patches) == (once[1].flips, once[1].patches)


def test_what_goes_wrong_in_the_second_look_is_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    _, damaged = flipped_photographs()
    restorer = Restorer(checkpoint.read("faces-fast"))
    plenty = restorer(damaged)
    forward, calls = restorer._forward, []

    def spoilt(batch: Tensor, device: torch.device, error: Exception | None = None) -> Prediction:
        calls.append(len(batch))
        if len(calls) != 2:
            return forward(batch, device)
        if error:
            raise error
        return forward(batch, device)._replace(image=torch.full_like(batch, torch.nan, dtype=torch.float32))

    monkeypatch.setattr(restorer, "_forward", spoilt)
    with pytest.raises(FloatingPointError, match="not finite"):
        restorer(damaged)
    calls.clear()
    monkeypatch.setattr(restorer, "_forward", partial(spoilt, error=MemoryError()))
    scarce = restorer(damaged)
    assert calls == [3, 1, 1, 1, 1, 1]  # from the beginning, one by one
    for one, other in zip(plenty, scarce, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert other.note == "out of memory in a batch of 3; done in a batch of 1"


def test_in_the_place_of_flips_is_what_was_restored() -> None:
    clean = clean_photographs()
    generator = Generator([5, 6, 7])
    damaged, destroyed = degrade(clean, fixed_damage(generator, flips=0.1), generator)
    survival = torch.where(destroyed, -5.0, 5.0)
    lost = torch.tensor([False, True, False])
    found = [Diagnosis(0.0, 0.1, 0.0, gray) for gray in lost.float().tolist()]
    result = diagnosis.filled(damaged, clean, survival, found)
    gone = destroyed.expand_as(clean)
    assert torch.equal(result[~gone], damaged[~gone])
    assert torch.equal(result[~lost][gone[~lost]], clean[~lost][gone[~lost]])
    assert torch.equal(result[1][gone[1]], degradations.to_gray(clean)[1][gone[1]])


# --- Nothing else --------------------------------------------------------------------------------------------------


def test_where_there_is_no_noise_surviving_pixels_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with_it = share_that_stayed()
    monkeypatch.setattr(diagnosis, "LEFT_ALONE", 0)
    without = share_that_stayed()
    for name in ("flips", "patches"):
        assert with_it[name] > 0.85 > without[name] + 0.25, (with_it, without)
    assert with_it["noise"] == without["noise"] < 0.1


def share_that_stayed() -> dict[str, float]:
    """Of pixels that survived, by damage: how many come back with the luma that they had."""
    clean = clean_photographs()[:1]
    restorer = Restorer(checkpoint.read("faces"))
    stayed = {}
    for name, damage in {
        "flips": {"flips": 0.05}, "patches": {"area": 0.05}, "noise": {"sigma_255": 15.0},
    }.items():  # fmt: skip
        damaged, destroyed = degrade(clean, fixed_damage(Generator([7]), **damage), Generator([7]))  # type: ignore[arg-type]
        (result,) = restorer([damaged[0].permute(1, 2, 0).contiguous().numpy()])
        after = torch.from_numpy(result.pixels).permute(2, 0, 1)[None]
        same = degradations.luma(after) == degradations.luma(damaged)
        stayed[name] = same[~destroyed].float().mean().item()
        assert not torch.equal(after, damaged)
    return stayed


def test_what_the_network_changes_more_is_changed_by_so_much_less() -> None:
    damaged = torch.full((3, 3, 2, 3), 100, dtype=torch.uint8)
    changes = torch.tensor([[0, 1, -3], [4, -10, 100]])
    restored = (damaged.int() + changes).to(torch.uint8)
    survival = torch.ones(3, 1, 2, 3)
    survival[:, :, 1, 2] = -1
    found = [Diagnosis(sigma, 0.1, 0.1, 0.0) for sigma in (0.5, 2.25, 2.6)]
    none, half, noise = diagnosis.kept_still(damaged, restored, survival, found).int() - 100
    assert torch.equal(noise, changes.expand(3, 2, 3))
    assert torch.equal(none, torch.tensor([[0, 0, 0], [1, -7, 100]]).expand(3, 2, 3))
    assert torch.equal(half, torch.tensor([[0, 0, -2], [2, -8, 100]]).expand(3, 2, 3))


# --- Only some damages ---------------------------------------------------------------------------------------------


def perfectly_repaired(repair: tuple[Kind, ...], **damage: object) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Clean, damaged and repaired photographs, and the flipped and the painted pixels."""
    clean = clean_photographs()
    seeds = [seed_of(1, "repair", str(index)) for index in range(len(clean))]
    damaged, destroyed = degrade(clean, fixed_damage(Generator(seeds), **damage), Generator(seeds))  # type: ignore[arg-type]
    survival = torch.where(destroyed, -5.0, 5.0)
    repaired = repair_only(repair, damaged, clean, survival, diagnose(damaged, clean, survival))
    return clean, damaged, repaired, *(mask.expand_as(clean) for mask in destroyed_pixels(survival))


@pytest.mark.parametrize("repair", [("noise",), ("flips",), ("patches",), ("noise", "patches"), ("flips", "patches")])
def test_what_is_not_to_be_repaired_stays_as_it_is(repair: tuple[Kind, ...]) -> None:
    clean, damaged, repaired, flipped, painted = perfectly_repaired(repair, sigma_255=20, flips=0.1, area=0.15)
    assert flipped.any() and painted.any()
    for kind, place in (("noise", ~flipped & ~painted), ("flips", flipped), ("patches", painted)):
        assert torch.equal(repaired[place], (clean if kind in repair else damaged)[place])


def test_lost_colour_can_be_left_alone() -> None:
    clean, damaged, repaired, _, _ = perfectly_repaired(("noise", "flips", "patches"), gray=True)
    assert torch.equal(repaired, degradations.to_gray(clean)) and torch.equal(repaired, damaged)
    clean, _, repaired, _, _ = perfectly_repaired(("noise", "flips", "patches"), sigma_255=20)
    assert torch.equal(repaired, clean)  # nothing is made gray that was not


def test_colour_comes_back_without_touching_the_grain() -> None:
    clean, damaged, repaired, _, _ = perfectly_repaired(("gray",), sigma_255=15, gray=True)
    luma, before = (degradations.to_gray(images)[:, 0].float() for images in (repaired, damaged))
    inside = ((repaired > 0) & (repaired < 255)).all(dim=1)
    assert inside.float().mean() > 0.8 and (luma - before)[inside].abs().max() <= 1.01
    colour = (repaired - degradations.to_gray(repaired).float()).permute(0, 2, 3, 1)
    truth = (clean - degradations.to_gray(clean).float()).permute(0, 2, 3, 1)
    assert (colour - truth)[inside].abs().max() <= 2.01


def test_a_choice_of_damages_decides_what_counts_as_undamaged() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    noisy = inference.Restored(image, sigma=20, flips=0.0, patches=0.0, gray=0.0)
    gray = inference.Restored(image, sigma=0, flips=0.0, patches=0.0, gray=0.9)
    assert not noisy.undamaged() and not gray.undamaged()
    assert noisy.undamaged(repair=("flips", "patches", "gray")) and not noisy.undamaged(repair=("noise",))
    assert gray.undamaged(repair=("noise", "flips", "patches")) and gray.undamaged(gray_file=True)


def test_all_four_is_what_is_done_without_a_choice(tmp_path: Path) -> None:
    folder, image = model_folder(tmp_path), photograph(30, 40)
    (all_four,) = Restorer(folder, repair=("gray", "patches", "flips", "noise"))([image])
    np.testing.assert_array_equal(all_four.pixels, Restorer(folder)([image])[0].pixels)


def test_a_network_without_a_gate_cannot_choose(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, AutoencoderConfig(depth=2, base_channels=4))
    with pytest.raises(UsageError, match=r"--repair noise: model .* has no gate that tells damages apart; name all of"):
        Restorer(folder, repair=("noise",))


def test_an_ensemble_with_the_mirror_image_does_not_know_left_from_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "UNDAMAGED_SHARE", 1.1)  # or it sees another image the second time
    folder, image = model_folder(tmp_path), photograph(24, 32)  # sides that need no padding
    mirrored = np.ascontiguousarray(image[:, ::-1])
    ensemble, single = Restorer(folder, self_ensemble=True), Restorer(folder)
    (one,), (other,) = ensemble([image]), ensemble([mirrored])
    assert np.abs(one.pixels.astype(int) - other.pixels[:, ::-1]).max() <= 1
    assert one.sigma == pytest.approx(other.sigma, rel=1e-3)
    assert not np.array_equal(one.pixels, single([image])[0].pixels)
    both = single([image])[0].pixels.astype(int) + single([mirrored])[0].pixels[:, ::-1]
    assert np.abs(one.pixels - both / 2).max() <= 1


# --- The bundled model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0, 25])
def test_the_bundled_model_in_tiles_equals_itself_untiled(monkeypatch: pytest.MonkeyPatch, sigma: float) -> None:
    """Within 1 of 255, on a damaged photograph of 350 x 400 pixels in tiles of 320."""
    restorer = Restorer(checkpoint.read("faces"))
    clean = torch.from_numpy(np.ascontiguousarray(skimage.data.astronaut()[:350, 100:500])).permute(2, 0, 1)[None]
    generator = Generator([3])
    damaged, _ = degrade(clean, fixed_damage(generator, sigma_255=sigma, flips=0.1, area=0.05), generator)
    image = damaged[0].permute(1, 2, 0).contiguous().numpy()
    (whole,) = restorer([image])
    assert whole.flips is not None and whole.flips > 0.05 and (whole.sigma < 2 or sigma)
    monkeypatch.setattr(inference, "TILE", 320)
    (tiled,) = restorer([image])
    assert np.abs(tiled.pixels.astype(int) - whole.pixels).max() <= 1


@pytest.mark.parametrize("damage", [{"sigma_255": 25, "flips": 0.1, "area": 0.05}, {"area": 0.15, "coloured": True}])
@pytest.mark.parametrize("name", ["faces", "faces-fast"])
def test_the_bundled_models_in_columns_equal_themselves_in_one(
    name: str, damage: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 1 of 255, in columns as wide as they are and with the overlap that they have."""
    photographs = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.rocket(), skimage.data.chelsea()]
    parts = [Image.fromarray(photograph).resize((520, 300)) for photograph in photographs]
    clean = np.concatenate([np.asarray(part) for part in (*parts, parts[0])], axis=1)
    generator = Generator([3])
    batch = torch.from_numpy(clean).permute(2, 0, 1)[None]
    damaged, _ = degrade(batch, fixed_damage(generator, **damage), generator)  # type: ignore[arg-type]
    image = damaged[0].permute(1, 2, 0).contiguous().numpy()
    assert inference.COLUMN_TILES * inference.TILE < image.shape[1] == 2600
    restorer = Restorer(checkpoint.read(name))
    (columns,) = restorer([image])
    monkeypatch.setattr(inference, "COLUMN_TILES", 3)
    (whole,) = restorer([image])
    assert not np.array_equal(columns.pixels, image)
    assert np.abs(columns.pixels.astype(int) - whole.pixels).max() <= 1


def test_a_sky_is_not_painted_over() -> None:
    """A photograph without a face, undamaged: the network takes its smooth sky for a patch, and would fill it."""
    image = skimage.data.rocket()
    (restored,) = Restorer(checkpoint.read("faces"))([image])
    sky = (slice(190, 330), slice(210, 255))
    assert np.abs(restored.pixels[sky].astype(int) - image[sky]).mean() < 3


def test_a_worker_does_without_torchs_compiler() -> None:
    """Its import takes a second and a half and 70 MB of each process, and a little thing brings it in."""
    program = (
        "import sys, numpy as np; from restore_core import checkpoint, inference; from restore_core.pipelines import "
        "restoration; inference.Restorer(checkpoint.read('faces-fast'))([np.zeros((8, 9, 3), np.uint8)]); "
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "False\n", done.stderr
