"""Training learns, repeats itself bit for bit, resumes as if never stopped, and splits over processes."""

import dataclasses
import math
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
import torch.multiprocessing
from PIL import Image
from processes import wait_for
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.train import Train
from restore_core.config import (
    AutoencoderConfig,
    DamageConfig,
    OptimizerConfig,
    ResidualUNetConfig,
    TrainConfig,
    parse_schedule,
)
from restore_core.degradations import Generator, seed_of
from restore_core.errors import DivergedError, UsageError
from restore_core.model import gpu_bfloat16
from restore_core.trainer import (
    VALIDATION,
    Photographs,
    Trainer,
    central_crops,
    fast_bfloat16,
    random_crops,
    resize_crops,
)
from tests import photos

pytestmark = pytest.mark.usefixtures("one_thread")

TINY = TrainConfig(
    model=ResidualUNetConfig(channels=(4, 6), blocks=(1, 1)),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2, ema_decay=0.9),
    phases=parse_schedule("16:2,16+24:2"),
    batch_size=4,
    canvas=48,
    val_size=16,
    val_images=4,
    precision="float32",  # in which one process and two agree closely
)
# with everything that a resume could forget: dropout's random numbers, batch norm's statistics
TINY_AUTOENCODER = dataclasses.replace(TINY, model=AutoencoderConfig(depth=2, base_channels=4, dropout=0.3))
STEPS_PER_EPOCH = 3


def photographs(count: int, height: int = 40, width: int = 48, canvas: int = 48) -> Photographs:
    """Smooth pictures, another one for each key."""
    pictures = [photos.pixels(index, height, width) for index in range(count)]
    keys = [f"person/{index}.jpg" for index in range(count)]
    return Photographs.of(keys, [picture.tobytes() for picture in pictures], [height] * count, [width] * count, canvas)


def batches(data: Photographs, size: int) -> Iterator[Photographs]:
    return (data[start : start + size] for start in range(0, len(data), size))


def run(trainer: Trainer, epochs: int) -> Trainer:
    data = photographs(STEPS_PER_EPOCH * TINY.batch_size)
    for _ in range(epochs):
        trainer.history.append(trainer.train_epoch(batches(data, TINY.batch_size)))
    return trainer


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Network, moving average and AdamW's moments."""
    tensors = {f"model.{name}": tensor for name, tensor in trainer.model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in trainer.average.state_dict().items()}
    for index, moments in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def figures(row: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "samples_per_second"}


# --- It learns -------------------------------------------------------------------------------------------------------


def test_half_a_minute_of_training_beats_the_damaged_photographs() -> None:
    """On one CPU core 20 s; held-out: mixed 14.0 -> 21.9 dB, noise_50 15.4 -> 21.9, flips_30 12.9 -> 21.7."""
    import skimage.data  # not above, since the two processes below import this file too

    size = 64

    def cuts(first: float, last: float) -> Photographs:
        found = []
        for name in ("astronaut", "chelsea", "coffee", "rocket"):
            image = getattr(skimage.data, name)()
            part = image[:, int(first * image.shape[1]) : int(last * image.shape[1])]
            for top in range(0, part.shape[0] - size + 1, size):
                for left in range(0, part.shape[1] - size + 1, size):
                    found.append((f"{name}-{top}-{left}", part[top : top + size, left : left + size].tobytes()))
        keys, pixels = map(list, zip(*found, strict=True))
        return Photographs.of(keys, pixels, [size] * len(keys), [size] * len(keys), size)

    train, held_out = cuts(0, 0.75), cuts(0.75, 1)
    config = TrainConfig(
        model=ResidualUNetConfig(channels=(12, 24, 48), blocks=(1, 1, 1)),
        optimizer=OptimizerConfig(learning_rate=4e-3, warmup_steps=20, ema_decay=0.95),
        phases=parse_schedule("32:18"),
        batch_size=8,
        canvas=size,
        val_size=32,
    )
    trainer = Trainer(config, steps_per_epoch=len(train) // config.batch_size)
    start = trainer.evaluate(held_out)
    for epoch in range(config.epochs):
        order = np.random.default_rng(epoch).permutation(len(train))
        shuffled = Photographs(
            [train.keys[i] for i in order], train.pixels[order], train.height[order], train.width[order]
        )
        trainer.train_epoch(batches(shuffled, config.batch_size))
    end = trainer.evaluate(held_out)

    assert end["val_loss"] < 0.6 * start["val_loss"]
    for name, margin_db in {"mixed": 5, "noise_50": 4, "flips_30": 5, "all": 3, "noise_25": 2, "flips_10": 4}.items():
        assert end[f"psnr_{name}"] > end[f"identity_{name}"] + margin_db, name
        assert end[f"psnr_{name}"] > start[f"psnr_{name}"] + margin_db, name
    assert end["psnr_clean"] > 25


# --- The same, again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [TINY, TINY_AUTOENCODER], ids=lambda config: config.model.kind)
def test_same_seed_same_weights_bit_for_bit(config: TrainConfig) -> None:
    first = run(Trainer(config, STEPS_PER_EPOCH), epochs=2)
    torch.manual_seed(123)  # what happened before in the process must not matter
    torch.rand(17)
    again = run(Trainer(config, STEPS_PER_EPOCH), epochs=2)
    assert_same(state(first), state(again))
    assert [figures(row) for row in first.history] == [figures(row) for row in again.history]
    other = run(Trainer(dataclasses.replace(config, seed=1), STEPS_PER_EPOCH), epochs=2)
    assert not torch.equal(next(other.model.parameters()), next(first.model.parameters()))


@pytest.mark.parametrize("config", [TINY, TINY_AUTOENCODER], ids=lambda config: config.model.kind)
def test_resumed_equals_uninterrupted_bit_for_bit(config: TrainConfig, tmp_path: Path) -> None:
    whole = run(Trainer(config, STEPS_PER_EPOCH), epochs=4)

    run(Trainer(config, STEPS_PER_EPOCH), epochs=2).save_state(tmp_path)
    torch.manual_seed(99)  # another process
    resumed = Trainer(config, STEPS_PER_EPOCH)
    resumed.load_state(tmp_path)
    assert resumed.epoch == 2 and resumed.steps == 2 * STEPS_PER_EPOCH and len(resumed.history) == 2
    run(resumed, epochs=2)

    assert_same(state(whole), state(resumed))
    assert (resumed.epoch, resumed.steps) == (whole.epoch, whole.steps) == (4, 4 * STEPS_PER_EPOCH)
    assert [figures(row) for row in resumed.history] == [figures(row) for row in whole.history]
    assert resumed.evaluate(photographs(4)) == whole.evaluate(photographs(4))


def test_state_is_safetensors_and_json(tmp_path: Path) -> None:
    run(Trainer(TINY, STEPS_PER_EPOCH), epochs=1).save_state(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


# --- Two processes ---------------------------------------------------------------------------------------------------

TWO_PROCESSES_STEPS = 6


def half_of_each_batch(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    trainer = Trainer(TINY, TWO_PROCESSES_STEPS, distribute=DistributedDataParallel)
    share = TINY.batch_size // 2
    data = photographs(TWO_PROCESSES_STEPS * TINY.batch_size)
    mine = [batch[rank * share : (rank + 1) * share] for batch in batches(data, TINY.batch_size)]
    row = trainer.train_epoch(mine)
    trained, sizes = state(trainer), [trainer.sample_size(step) for step in range(20)]
    if rank == 0:
        next(trainer.model.parameters()).detach().fill_(math.nan)
    try:
        trainer.train_epoch(mine)
    except DivergedError as error:
        diverged = str(error)
    torch.save({"state": trained, "row": row, "sizes": sizes, "diverged": diverged}, Path(folder) / f"{rank}.pt")
    # Neither leaves while the other may still listen; and at once, since gloo's threads may abort a process at its end.
    wait_for((Path(folder) / f"{1 - rank}.pt").exists)
    os._exit(0)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Data-parallel over gloo, half of each batch each. Only the order of summation differs: 1e-5 after six steps.

    When one of them meets a loss that is not a number, both stop at the same step.
    """
    torch.multiprocessing.spawn(half_of_each_batch, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_same(first["state"], second["state"])
    assert first["sizes"] == second["sizes"]
    assert first["diverged"] == second["diverged"]
    assert first["diverged"].startswith("the training loss is nan in epoch 2 at or before step 1; ")

    alone = Trainer(TINY, TWO_PROCESSES_STEPS)
    start = state(alone)
    row = alone.train_epoch(batches(photographs(TWO_PROCESSES_STEPS * TINY.batch_size), TINY.batch_size))
    assert figures(first["row"]) == figures(second["row"]) == pytest.approx(figures(row), abs=1e-5)
    for name, tensor in state(alone).items():
        if name.startswith(("model.", "average.")):
            torch.testing.assert_close(first["state"][name], tensor, rtol=0, atol=1e-5)
            assert (tensor - start[name]).abs().max() > 1e-3  # the tolerance is small against what was learnt


def test_order_in_a_batch_does_not_matter() -> None:
    """A photograph's crop and damage come from its key, so two orders differ only by the order of summation."""
    data = photographs(4)
    backwards = Photographs(data.keys[::-1], data.pixels[::-1].copy(), data.height[::-1], data.width[::-1])
    one, other = (Trainer(TINY, 1).step(batch, 16).item() for batch in (data, backwards))
    assert one == pytest.approx(other, abs=1e-6)
    renamed = Photographs(["x" + key for key in data.keys], data.pixels, data.height, data.width)
    assert Trainer(TINY, 1).step(renamed, 16).item() != pytest.approx(one, abs=1e-4)


def test_noise_is_each_photographs_own_and_another_in_each_epoch() -> None:
    """Read from what the network sees of plain grey photographs."""
    config = dataclasses.replace(
        TINY, damage=DamageConfig(noise_share=1, noise_sigma_max=25, flips_share=0, patches_share=0, gray_share=0)
    )
    trainer = Trainer(config, 1)
    seen: list[Tensor] = []
    trainer.model.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    plain = Photographs.of(["a", "b", "c"], [bytes([128]) * (40 * 40 * 3)] * 3, [40] * 3, [40] * 3, 48)
    for epoch, batch in ((0, plain), (1, plain), (1, plain[1:])):
        trainer.epoch = epoch
        trainer.step(batch, 24)
    noise = torch.cat(seen).flatten(1)
    assert (noise - 128 / 255).std(dim=1).min() > 1 / 255
    assert torch.equal(noise[4:6], noise[6:8])  # the same key in the same epoch, whatever the batch
    correlation = torch.corrcoef(noise[:6]) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(noise.shape[1])


# --- Divergence ------------------------------------------------------------------------------------------------------


def test_a_weight_that_is_not_a_number_ends_training_at_the_first_step() -> None:
    trainer = run(Trainer(TINY, STEPS_PER_EPOCH), epochs=1)
    with torch.no_grad():
        next(trainer.model.parameters())[0, 0, 0, 0] = math.nan
    with pytest.raises(DivergedError) as caught:
        run(trainer, epochs=1)
    assert str(caught.value) == (
        "the training loss is nan in epoch 2 at or before step 1; lower --learning-rate (now 0.01) and use a new --name"
    )
    assert trainer.epoch == 1


def test_a_senseless_learning_rate_ends_training_with_advice() -> None:
    optimizer = OptimizerConfig(learning_rate=1e9, warmup_steps=0, clip_norm=1e9)
    trainer = Trainer(dataclasses.replace(TINY, optimizer=optimizer), STEPS_PER_EPOCH)
    with pytest.raises(DivergedError, match=r"^the training loss is (nan|inf) in epoch [1-4] at or before step [1-3];"):
        run(trainer, epochs=4)


# --- Schedule, average, sizes ----------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_reaches_zero_after_the_last_step() -> None:
    for steps, warmup in ((2, [0.5, 1.0]), (8, [0.125, 0.5])):  # after a tenth of all 20 at the latest
        optimizer = OptimizerConfig(learning_rate=1e-2, warmup_steps=steps)
        trainer = Trainer(dataclasses.replace(TINY, optimizer=optimizer), steps_per_epoch=5)
        rates = []
        for step in range(20):
            trainer.epoch = step // 5
            trainer.step(photographs(2), 16, step % 5 / 5)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        cosine = [0.5 * (1 + math.cos(math.pi * step / 20)) for step in range(20)]
        whole = [*warmup, *[1.0] * 18]
        assert rates == pytest.approx([1e-2 * w * c for w, c in zip(whole, cosine, strict=True)])
    before = state(trainer)
    trainer.epoch = 4
    trainer.step(photographs(2), 16)
    assert trainer.optimizer.param_groups[0]["lr"] == 0
    assert_same(*({k: v for k, v in s.items() if k.startswith("model.")} for s in (before, state(trainer))))


def test_the_learning_rate_goes_by_epochs_where_workers_are_lost() -> None:
    """Steps are smaller then, and more of them; the rate must not be zero long before the end."""
    config = dataclasses.replace(TINY, optimizer=OptimizerConfig(warmup_steps=0), phases=parse_schedule("16:4"))
    rates = []
    for size in (4, 2):
        trainer = Trainer(config, steps_per_epoch=8 // size)
        rates.append([trainer.train_epoch(batches(photographs(8), size))["learning_rate"] for _ in range(4)])
    last_steps = [
        [0.5 * (1 + math.cos(math.pi * (epoch + share) / 4)) for epoch in range(4)] for share in (1 / 2, 3 / 4)
    ]
    assert rates == [pytest.approx([1e-3 * rate for rate in row]) for row in last_steps]


@pytest.mark.parametrize(("capability", "able"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_old_gpus_have_no_bfloat16(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], *, able: bool) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert fast_bfloat16(torch.device("cuda")) is able
    assert gpu_bfloat16(torch.device("cuda")) is able
    assert not gpu_bfloat16(torch.device("cpu"))


def test_float32_is_float32_on_gpus_too() -> None:
    torch.backends.cudnn.allow_tf32 = True
    Trainer(TINY, 1)
    assert not torch.backends.cudnn.allow_tf32


def test_samples_larger_than_the_canvas_are_refused() -> None:
    with pytest.raises(UsageError, match="--canvas 256: use 512 or more, the side of the largest samples"):
        TrainConfig(phases=parse_schedule("48:1,512:1"))
    assert Train(data="d", storage="s", schedule="48:1,512:1").config().canvas == 512
    assert Train(data="d", storage="s", schedule="48:1").config().canvas == 256
    with pytest.raises(UsageError, match=r"--seed \d+: use a number of 64 bits"):
        Train(data="d", storage="s", seed=2**70).config()


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9])
def test_moving_average_follows_its_definition(decay: float) -> None:
    """a <- d a + (1 - d) w after every step, where d = min(decay, (1 + t) / (10 + t)), so that it forgets its start."""
    config = dataclasses.replace(TINY_AUTOENCODER, optimizer=OptimizerConfig(ema_decay=decay, learning_rate=1e-2))
    trainer = Trainer(config, 10)
    expected = {name: value.clone() for name, value in trainer.average.named_parameters()}
    for step in range(1, 7):
        trainer.step(photographs(4), 16)
        share = min(decay, (1 + step) / (10 + step))
        for name, weight in trainer.model.named_parameters():
            expected[name] = share * expected[name] + (1 - share) * weight.detach()
    for name, value in trainer.average.named_parameters():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-7)
        assert not value.requires_grad
    for (name, mine), theirs in zip(trainer.average.named_buffers(), trainer.model.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert not trainer.average.training
    if decay == 0:
        weights = dict(trainer.model.named_parameters())
        assert all(torch.equal(value, weights[name]) for name, value in trainer.average.named_parameters())


@pytest.mark.parametrize("clip_norm", [1e-3, 1e6])
def test_gradients_are_clipped_to_the_norm(clip_norm: float) -> None:
    trainer = Trainer(dataclasses.replace(TINY, optimizer=OptimizerConfig(clip_norm=clip_norm)), 1)
    trainer.step(photographs(4), 16)
    norm = torch.cat([parameter.grad.flatten() for parameter in trainer.model.parameters()]).norm().item()
    if clip_norm == 1e-3:
        assert norm == pytest.approx(1e-3, rel=1e-3)
    else:
        assert 1e-2 < norm < 1e6


def test_weight_decay_is_decoupled() -> None:
    """One step with it differs from one without by -rate * decay * weight (Loshchilov 2019)."""
    plain, decayed = (
        Trainer(dataclasses.replace(TINY, optimizer=OptimizerConfig(weight_decay=decay, warmup_steps=0)), 1)
        for decay in (0.0, 0.5)
    )
    start = [parameter.detach().clone() for parameter in plain.model.parameters()]
    for trainer in (plain, decayed):
        trainer.step(photographs(4), 16)
    for before, one, other in zip(start, plain.model.parameters(), decayed.model.parameters(), strict=True):
        torch.testing.assert_close(other - one, -1e-3 * 0.5 * before, rtol=1e-2, atol=1e-6)


def test_sample_sizes_depend_on_seed_epoch_and_step_alone() -> None:
    config = dataclasses.replace(TINY, phases=parse_schedule("16:1,16+24:1,32+24+16:2"))
    one, other = Trainer(config, 3), Trainer(dataclasses.replace(config, model=AutoencoderConfig(depth=1)), 99)
    other.step(photographs(2), 16)  # neither data, network nor random state may matter: workers must agree
    drawn = []
    for epoch in range(4):
        one.epoch = other.epoch = epoch
        drawn.append([one.sample_size(step) for step in range(600)])
        assert drawn[epoch] == [other.sample_size(step) for step in range(600)]
    assert set(drawn[0]) == {16} and set(drawn[1]) == {16, 24} and set(drawn[2]) == {16, 24, 32}
    assert drawn[2] != drawn[3]
    shares = [drawn[2].count(size) / 600 for size in (32, 24, 16)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.06)


def test_large_samples_are_fewer_in_a_step() -> None:
    phases = parse_schedule("16:1,32:1,64:1")
    trainer = Trainer(dataclasses.replace(TINY, step_pixels=4 * 16**2, phases=phases, canvas=64), 2)
    data = photographs(6)
    sizes = [len(trainer.fitting(data, size)) for size in (8, 16, 17, 32, 64)]
    assert sizes == [6, 4, 3, 1, 1]
    assert [trainer.train_epoch(batches(data, 6))["samples"] for _ in range(3)] == [4, 1, 1]


def test_an_epoch_reports_what_it_did() -> None:
    trainer = Trainer(dataclasses.replace(TINY, phases=parse_schedule("16:1,24:1")), 3)
    twin = Trainer(trainer.config, 3)
    data = photographs(10)  # the last batch is a half one
    row = trainer.train_epoch(batches(data, 4))
    losses = [twin.step(batch, 16, step / 3).item() for step, batch in enumerate(batches(data, 4))]
    assert figures(row) == {
        "epoch": 1, "size": 16, "steps": 3, "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "samples": 10, "train_loss": pytest.approx(np.mean(losses), abs=1e-6),
    }  # fmt: skip
    assert row["samples_per_second"] > 0
    assert trainer.train_epoch(batches(data, 4))["size"] == 24


# --- Evaluation ------------------------------------------------------------------------------------------------------


def identity_trainer() -> Trainer:
    """With a moving average that returns what it is given."""
    trainer = Trainer(dataclasses.replace(TINY, model=ResidualUNetConfig(channels=(4,), blocks=(1,), gate=False)), 1)
    nn.init.zeros_(trainer.average.tail.weight)
    nn.init.zeros_(trainer.average.tail.bias)
    return trainer


def test_a_network_that_changes_nothing_scores_as_the_damaged_photographs() -> None:
    from skimage.metrics import peak_signal_noise_ratio

    data = photographs(10)
    trainer = identity_trainer()
    found = trainer.evaluate(data)
    assert set(found) == {"val_loss"} | {f"{kind}_{name}" for kind in ("psnr", "identity") for name in VALIDATION}
    for name in VALIDATION:
        assert found[f"psnr_{name}"] == pytest.approx(found[f"identity_{name}"], abs=1e-9)
    assert found["psnr_clean"] == 100

    clean = central_crops(data, 16)
    for name in ("noise_25", "mixed"):
        damaged, _ = trainer.validation_damage(name, clean, data.keys)
        reference = [
            peak_signal_noise_ratio(truth.numpy(), image.numpy(), data_range=255)
            for truth, image in zip(clean, damaged, strict=True)
        ]
        assert found[f"psnr_{name}"] == pytest.approx(np.mean(reference), abs=1e-9)


def test_evaluation_repeats_itself_and_changes_nothing() -> None:
    trainer = run(Trainer(TINY_AUTOENCODER, STEPS_PER_EPOCH), epochs=1)
    data = photographs(6)
    before = state(trainer)
    first = trainer.evaluate(data)
    assert trainer.evaluate(data) == first
    assert_same(state(trainer), before)
    # in another batch size only the rounding of sums can differ
    other = Trainer(dataclasses.replace(TINY_AUTOENCODER, batch_size=6), STEPS_PER_EPOCH)
    other.average.load_state_dict(trainer.average.state_dict())
    assert other.evaluate(data) == pytest.approx(first, abs=0.01)


def test_evaluation_and_restoring_use_the_moving_average() -> None:
    trainer = run(Trainer(TINY, STEPS_PER_EPOCH), epochs=1)
    images = central_crops(photographs(6), 16)
    expected, found = trainer.restore(images), trainer.evaluate(photographs(6))
    assert expected.dtype == torch.uint8 and expected.shape == images.shape
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.zero_()
    assert torch.equal(trainer.restore(images), expected)
    assert trainer.evaluate(photographs(6)) == found


def test_fixed_damages_are_what_their_names_say() -> None:
    data = photographs(40)
    clean = central_crops(data, 40)
    trainer = Trainer(TINY, 1)
    masks = {name: trainer.validation_damage(name, clean, data.keys)[1].float().mean().item() for name in VALIDATION}
    expected = {
        "clean": 0, "noise_25": 0, "noise_50": 0, "gray": 0, "flips_10": 0.1, "flips_30": 0.3,
        "patches_15": 0.15, "coloured_patches_15": 0.15, "mixed": 0.19, "all": 0.19,
    }  # fmt: skip
    assert masks == pytest.approx(expected, abs=0.015)
    black, where = trainer.validation_damage("patches_15", clean, data.keys)
    assert not black[where.expand_as(black)].any()
    coloured, where = trainer.validation_damage("coloured_patches_15", clean, data.keys)
    assert coloured[where.expand_as(coloured)].float().mean() > 50
    gray, _ = trainer.validation_damage("gray", clean, data.keys)
    expected_gray = [Image.fromarray(image.permute(1, 2, 0).numpy()).convert("L") for image in clean]
    for image, luma in zip(gray, expected_gray, strict=True):
        assert np.array_equal(image[1].numpy(), np.asarray(luma))


def test_loss_is_the_mean_root_of_squares_plus_the_weighted_cross_entropy_of_the_gate() -> None:
    trainer = Trainer(TINY, 1)
    clean = torch.full((2, 3, 2, 2), 51, dtype=torch.uint8)
    restored = torch.full((2, 3, 2, 2), 0.5)
    restored[1, :, 0, 0] = 0.2 + 0.8  # a quarter of the second image wrong by 0.8, the rest by 0.3
    destroyed = torch.tensor([[[[True, False], [False, False]]]]).expand(2, 1, 2, 2)
    survival = torch.full((2, 1, 2, 2), 2.0)
    survived = 1 / (1 + math.exp(-2.0))
    cross_entropy = -(3 * math.log(survived) + math.log(1 - survived)) / 4
    roots = (0.3 + math.sqrt((0.8**2 + 3 * 0.3**2) / 4)) / 2
    prediction = trainer.model(torch.zeros(2, 3, 2, 2))._replace(image=restored, survival=survival)
    assert trainer.loss(prediction, clean, destroyed).item() == pytest.approx(roots + 0.1 * cross_entropy, abs=4e-4)
    ungated = prediction._replace(survival=None)
    assert trainer.loss(ungated, clean, destroyed).item() == pytest.approx(roots, abs=4e-4)


# --- Samples ---------------------------------------------------------------------------------------------------------

BOXES: list[tuple[str, dict[str, Any]]] = [
    ("shrunk", {"size": 16, "side": 40, "top": 3, "left": 5}),
    ("shrunk a lot", {"size": 3, "side": 47, "top": 0, "left": 2}),
    ("enlarged", {"size": 50, "side": 17, "top": 11, "left": 9}),
    ("enlarged a lot", {"size": 33, "side": 6, "top": 20, "left": 0}),
    ("same size", {"size": 24, "side": 24, "top": 8, "left": 1}),
    ("whole, at both ends", {"size": 31, "side": 52, "top": 0, "left": 12}),
    ("to a single pixel", {"size": 1, "side": 30, "top": 4, "left": 6}),
    ("from a single pixel", {"size": 5, "side": 1, "top": 51, "left": 63}),
]
HEIGHT, WIDTH, CANVAS = 52, 64, 80


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize(("_name", "box"), BOXES, ids=[name for name, _ in BOXES])
def test_resized_crops_equal_pillows(_name: str, box: dict[str, Any], mirrored: bool) -> None:
    """Lanczos within 1 of 255, although the rest of the canvas is white noise that must not leak in."""
    data = photographs(3, HEIGHT, WIDTH, CANVAS)
    pixels = np.random.default_rng(0).integers(0, 256, data.pixels.shape, np.uint8)
    pixels[:, :HEIGHT, :WIDTH] = data.pixels[:, :HEIGHT, :WIDTH]
    pixels[2, :HEIGHT, :WIDTH] = np.random.default_rng(1).integers(0, 256, (HEIGHT, WIDTH, 3))  # the hardest content
    data = Photographs(data.keys, pixels, data.height, data.width)
    size, side, top, left = box["size"], box["side"], box["top"], box["left"]
    crops = resize_crops(
        data, size, *(torch.full((3,), float(value)) for value in (top, left, side)), torch.full((3,), mirrored)
    )
    assert crops.shape == (3, 3, size, size) and crops.dtype == torch.uint8
    for crop, photograph in zip(crops.permute(0, 2, 3, 1).numpy(), pixels, strict=True):
        expected = Image.fromarray(photograph).crop((left, top, left + side, top + side))
        expected = np.asarray(expected.resize((size, size), Image.Resampling.LANCZOS))
        expected = expected[:, ::-1] if mirrored else expected
        assert np.abs(crop.astype(int) - expected.astype(int)).max() <= 1


def test_boxes_between_pixels_equal_pillows() -> None:
    """Away from the box's border, where the two treat parts of pixels differently."""
    data = photographs(1, 48, 48)
    for size, side, top, left in ((16, 33.7, 4.3, 9.9), (40, 30.2, 2.5, 16.75)):
        crop = resize_crops(data, size, *map(partial(torch.full, (1,)), (top, left, side)), torch.tensor([False]))
        expected = Image.fromarray(data.pixels[0]).resize(
            (size, size), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side)
        )
        border = math.ceil(3 * max(1, size / side)) + 1
        inner = np.s_[border:-border, border:-border]
        difference = crop[0].permute(1, 2, 0).numpy().astype(int)[inner] - np.asarray(expected).astype(int)[inner]
        assert difference.size > 0 and np.abs(difference).max() <= 1


def test_boxes_of_one_batch_do_not_touch_each_other() -> None:
    data = photographs(3)
    top, left, side = torch.tensor([0.0, 4, 9]), torch.tensor([8.0, 2, 0]), torch.tensor([40.0, 20, 31])
    mirrored = torch.tensor([False, True, False])
    whole = resize_crops(data, 16, top, left, side, mirrored)
    for row in range(3):
        rows = slice(row, row + 1)
        single = resize_crops(data[rows], 16, top[rows], left[rows], side[rows], mirrored[rows])
        assert (single.int() - whole[rows].int()).abs().max() <= 1


def test_read_only_pixels_are_taken_as_they_are() -> None:
    """Ray hands out views of its shared memory, and torch warns of read-only arrays."""
    data = photographs(2)
    data.pixels.setflags(write=False)
    assert central_crops(data, 16).shape == (2, 3, 16, 16)


def ramps(count: int, height: int, width: int) -> Photographs:
    """Photographs whose red is the column, green the row, and whose blue is 255 only outside."""
    ramp = np.zeros((width, width, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(width), np.arange(width)[:, None]
    ramp[height:, :, 2] = 255
    return Photographs(
        [str(index) for index in range(count)],
        np.broadcast_to(ramp, (count, width, width, 3)),
        np.full(count, height, np.int32),
        np.full(count, width, np.int32),
    )


def test_random_crops_are_uniform_mirrored_half_of_the_time_and_stay_inside() -> None:
    count, height, width, crop_min = 400, 100, 140, 0.4
    data = ramps(count, height, width)
    generator = Generator([seed_of(0, key) for key in data.keys])
    crops = torch.cat([random_crops(data, 25, TrainConfig(crop_min=crop_min, central_share=0), generator)]).double()
    assert crops[:, 2].max() == 0
    # between the centres of two inner pixels 20 apart lie 20/25 of the side
    across = (crops[:, 0, 12, 22] - crops[:, 0, 12, 2]) * 25 / 20
    down = (crops[:, 1, 22, 12] - crops[:, 1, 2, 12]) * 25 / 20
    assert torch.all((across.abs() - down).abs() < 2.6)
    mirrored = across < 0
    assert abs(mirrored.double().mean().item() - 0.5) < 4.5 * 0.5 / math.sqrt(count)
    shares = down / height
    assert shares.min() > crop_min - 0.03 and shares.max() < 1.03
    assert abs(shares.mean().item() - (1 + crop_min) / 2) < 4.5 * (1 - crop_min) / math.sqrt(12 * count) + 0.005
    centre = crops[:, 1, 12, 12] + 0.5  # the middle row of the crop, in the photograph
    place = (centre - down / 2) / (height - down).clamp(min=1)
    inner = shares < 0.8
    assert abs(place[inner].mean().item() - 0.5) < 0.06 and place[inner].min() < 0.1 and place[inner].max() > 0.9


def test_central_training_crops_vary_around_the_middle() -> None:
    count, height, width = 400, 100, 140
    data = ramps(count, height, width)
    config = TrainConfig(crop_min=0.4, central_share=1)
    crops = random_crops(data, 25, config, Generator([seed_of(0, key) for key in data.keys])).double()
    assert crops[:, 2].max() == 0
    down = (crops[:, 1, 22, 12] - crops[:, 1, 2, 12]) * 25 / 20
    assert (down - 64).abs().max() < 6.4 + 2.6  # a tenth of the central 64 rows, and rounding
    assert down.min() < 60 and down.max() > 68
    for channel, middle in ((0, width / 2), (1, height / 2)):
        centre = crops[:, channel, 12, 12] + 0.5
        assert (centre - middle).abs().max() < 7 + 2.6
        assert abs(centre.mean().item() - middle) < 1 and centre.std() > 2


def test_a_share_of_the_samples_is_the_whole_photograph() -> None:
    count, height, width = 1000, 100, 140
    config = TrainConfig(crop_min=0.2, central_share=0.5, whole_share=0.3)
    crops = random_crops(ramps(count, height, width), 25, config, Generator(list(range(count)))).double()
    down = (crops[:, 1, 22, 12] - crops[:, 1, 2, 12]) * 25 / 20
    whole = (down - height).abs() < 1.3
    expected = 0.3 + 0.2 * 1.3 / 80  # and of those cut anywhere the few that are as large
    assert abs(whole.double().mean().item() - expected) < 4.5 * math.sqrt(0.3 * 0.7 / count)
    left = crops[whole, 0, 12, 12]
    assert left.min() < 55 and left.max() > 85  # anywhere along the longer side


@pytest.mark.parametrize("height_width", [(1, 1), (1, 7), (5, 2), (3, 3)], ids=str)
def test_random_crops_of_tiny_photographs(height_width: tuple[int, int]) -> None:
    """However small the photograph: a plain one gives plain samples of its colour."""
    height, width = height_width
    count = 500
    colour = bytes([200, 100, 50]) * (height * width)
    data = Photographs.of([str(i) for i in range(count)], [colour] * count, [height] * count, [width] * count, 8)
    crops = random_crops(data, 6, TrainConfig(central_share=0.5, whole_share=0.2), Generator(list(range(count))))
    assert torch.equal(crops, torch.tensor([200, 100, 50], dtype=torch.uint8).reshape(1, 3, 1, 1).expand_as(crops))


@pytest.mark.parametrize("height_width", [(250, 250), (250, 187), (90, 250), (64, 100)], ids=str)
def test_central_crops_are_the_central_share(height_width: tuple[int, int]) -> None:
    height, width = height_width
    data = photographs(2, height, width, 250)
    side = max(round(0.64 * min(height, width)), 64)  # 160 of LFW's 250 pixels; never enlarged
    top, left = (height - side) // 2, (width - side) // 2
    for crop, photograph in zip(central_crops(data, 64), data.pixels, strict=True):
        image = Image.fromarray(photograph).crop((left, top, left + side, top + side))
        expected = np.asarray(image.resize((64, 64), Image.Resampling.LANCZOS)).astype(int)
        assert np.abs(crop.permute(1, 2, 0).numpy().astype(int) - expected).max() <= 1


def test_a_network_that_grows_begins_as_good_as_the_smaller_one() -> None:
    small = dataclasses.replace(TINY, model=ResidualUNetConfig(channels=(8, 16), blocks=(1, 1)))
    large = dataclasses.replace(TINY, model=ResidualUNetConfig(channels=(8, 16), blocks=(2, 3)))
    finished = Trainer(small, 1)
    grown = Trainer(dataclasses.replace(large, seed=5), 1)
    grown.start_from(finished.average.state_dict())
    data = photographs(4)
    damaged, _ = finished.validation_damage("mixed", central_crops(data, 24), data.keys)
    assert torch.equal(grown.restore(damaged), finished.restore(damaged))
    before = grown.average.state_dict()["bottleneck.2.second.weight"].clone()
    grown.step(data, 16)
    after = grown.model.state_dict()["bottleneck.2.second.weight"]
    assert before.abs().max() == 0 < after.abs().max()  # and what is new learns


def test_training_damages_are_those_of_the_config() -> None:
    """Without damages a network that changes nothing has no loss."""
    config = dataclasses.replace(
        TINY,
        model=ResidualUNetConfig(channels=(4,), blocks=(1,), gate=False),
        damage=DamageConfig(noise_share=0, flips_share=0, patches_share=0, gray_share=0),
    )
    trainer = Trainer(config, 1)
    nn.init.zeros_(trainer.model.tail.weight)
    nn.init.zeros_(trainer.model.tail.bias)
    assert trainer.step(photographs(4), 16).item() == 0
