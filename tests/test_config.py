"""Bad values name their option, the value and what to do; schedules mean what they say."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from restore_core.config import (
    KINDS,
    PRESETS,
    AutoencoderConfig,
    DamageConfig,
    ModelConfig,
    OptimizerConfig,
    Phase,
    ResidualUNetConfig,
    TrainConfig,
    model_config,
    parse_repair,
    parse_schedule,
    require,
    to_dict,
)
from restore_core.errors import UsageError

ROOT = Path(__file__).parent.parent
NAN = float("nan")


def message_of(call: object, *arguments: object, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        call(*arguments, **options)  # type: ignore[operator]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_require_has_one_form() -> None:
    require(True, "batch_size", 8, "use 1 or more")
    assert message_of(require, False, "batch_size", 0, "use 1 or more") == "--batch-size 0: use 1 or more"


BAD = [
    (AutoencoderConfig, "depth", 0, "--model.depth 0: use 1 to 10"),
    (
        AutoencoderConfig,
        "base_channels",
        -1,
        "--model.base-channels -1: use 1 or more, and not over 65536 at the last block",
    ),
    (AutoencoderConfig, "kernel_size", 4, "--model.kernel-size 4: use 3 or 5"),
    (AutoencoderConfig, "resample", "bilinear", "--model.resample bilinear: use strided or pool"),
    (AutoencoderConfig, "dropout", 1.0, "--model.dropout 1.0: use a share from 0 to below 1"),
    (AutoencoderConfig, "dropout", NAN, "--model.dropout nan: use a share from 0 to below 1"),
    (ResidualUNetConfig, "channels", (), "--model.channels (): name 1 to 10 scales"),
    (ResidualUNetConfig, "channels", (8, 0), "--model.channels (8, 0): use 1 to 65536 channels per scale"),
    (ResidualUNetConfig, "blocks", (1, 1), "--model.blocks (1, 1): name as many as scales"),
    (ResidualUNetConfig, "blocks", (2, 2, 0, 2, 2), "--model.blocks (2, 2, 0, 2, 2): use 1 to 64 blocks per scale"),
    (DamageConfig, "noise_share", -0.1, "--damage.noise-share -0.1: use a number from 0 to 1"),
    (DamageConfig, "noise_sigma_max", 256, "--damage.noise-sigma-max 256: use a number from 0 to 255"),
    (DamageConfig, "flips_share", 1.5, "--damage.flips-share 1.5: use a number from 0 to 1"),
    (DamageConfig, "flips_max", NAN, "--damage.flips-max nan: use a number from 0 to 1"),
    (DamageConfig, "patches_share", 2, "--damage.patches-share 2: use a number from 0 to 1"),
    (DamageConfig, "patches_area_max", -1, "--damage.patches-area-max -1: use a number from 0 to 1"),
    (DamageConfig, "gray_share", 30, "--damage.gray-share 30: use a number from 0 to 1"),
    (OptimizerConfig, "learning_rate", 0, "--learning-rate 0: use a number above 0"),
    (OptimizerConfig, "learning_rate", float("inf"), "--learning-rate inf: use a number above 0"),
    (OptimizerConfig, "weight_decay", -1e-4, "--optimizer.weight-decay -0.0001: use 0 or more"),
    (OptimizerConfig, "warmup_steps", -1, "--optimizer.warmup-steps -1: use 0 or more"),
    (OptimizerConfig, "clip_norm", 0, "--optimizer.clip-norm 0: use a number above 0"),
    (OptimizerConfig, "ema_decay", 1, "--optimizer.ema-decay 1: use a number from 0 to below 1"),
    (OptimizerConfig, "gate_weight", NAN, "--optimizer.gate-weight nan: use 0 or more"),
    (TrainConfig, "batch_size", 0, "--batch-size 0: use 1 or more"),
    (TrainConfig, "canvas", 0, "--canvas 0: use 1 or more"),
    (TrainConfig, "val_size", -3, "--val-size -3: use 1 or more"),
    (TrainConfig, "val_images", 0, "--val-images 0: use 1 or more"),
    (TrainConfig, "canvas", 47, "--canvas 47: use 64 or more, the side of the largest samples"),
    (TrainConfig, "seed", 2**63, f"--seed {2**63}: use a number of 64 bits"),
    (TrainConfig, "crop_min", 0, "--crop-min 0: use a share above 0, up to 1"),
    (TrainConfig, "crop_min", 1.01, "--crop-min 1.01: use a share above 0, up to 1"),
    (TrainConfig, "whole_share", 0.3, "--whole-share 0.3: use a share from 0 to 1 - central_share"),
    (TrainConfig, "central_share", 1.01, "--central-share 1.01: use a share from 0 to 1"),
]


@pytest.mark.parametrize(("kind", "field", "value", "message"), BAD, ids=[f"{bad[1]}={bad[2]}" for bad in BAD])
def test_a_bad_value_names_the_option_the_value_and_the_advice(
    kind: type, field: str, value: object, message: str
) -> None:
    assert message_of(kind, **{field: value}) == message


def test_values_at_the_ends_of_their_ranges_are_good() -> None:
    DamageConfig(noise_share=0, noise_sigma_max=255, flips_share=1, flips_max=1, patches_area_max=1, gray_share=0)
    OptimizerConfig(weight_decay=0, warmup_steps=0, ema_decay=0, gate_weight=0)
    AutoencoderConfig(depth=1, base_channels=1, kernel_size=5, dropout=0)
    ResidualUNetConfig(channels=(1,), blocks=(1,))
    TrainConfig(batch_size=1, canvas=48, crop_min=1, val_size=1, val_images=1, seed=-(2**63))


def test_configs_cannot_be_changed() -> None:
    for config in (TrainConfig(), DamageConfig(), OptimizerConfig(), AutoencoderConfig(), ResidualUNetConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, dataclasses.fields(config)[0].name, 1)


# --- Networks --------------------------------------------------------------------------------------------------------


def test_a_network_extends_one_with_fewer_blocks_and_nothing_else() -> None:
    small = ResidualUNetConfig(channels=(8, 16), blocks=(1, 2))
    assert small.extends(small) and ResidualUNetConfig(channels=(8, 16), blocks=(3, 2)).extends(small)
    for other in (
        ResidualUNetConfig(channels=(8, 16), blocks=(3, 1)),
        ResidualUNetConfig(channels=(8, 24), blocks=(3, 3)),
        ResidualUNetConfig(channels=(8, 16, 32), blocks=(1, 2, 1)),
        ResidualUNetConfig(channels=(8, 16), blocks=(3, 3), gate=False),
    ):
        assert not other.extends(small)
    assert not small.extends(AutoencoderConfig())
    assert isinstance(PRESETS["faces"].model, ResidualUNetConfig)


def test_kinds_of_damage_are_read_in_any_order() -> None:
    assert parse_repair("gray, noise noise") == ("noise", "gray")
    assert parse_repair(",".join(KINDS)) == KINDS
    assert message_of(parse_repair, "dust") == (
        "--repair dust: no such kind of damage; name some of noise,flips,patches,gray"
    )
    assert "--repair ''" in message_of(parse_repair, " ")


# --- Schedules -------------------------------------------------------------------------------------------------------


def test_schedules_are_parsed() -> None:
    assert parse_schedule("48:40,96+48:10") == (Phase(sizes=(48,), epochs=40), Phase(sizes=(96, 48), epochs=10))
    assert parse_schedule(" 48 : 40 , 96 + 48 : 10 ") == parse_schedule("48:40,96+48:10")
    assert parse_schedule("1:1") == (Phase(sizes=(1,), epochs=1),)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.tuples(st.lists(st.integers(1, 10**6), min_size=1), st.integers(1, 10**6)), min_size=1))
def test_any_written_schedule_is_read_back(phases: list[tuple[list[int], int]]) -> None:
    text = ",".join(f"{'+'.join(map(str, sizes))}:{epochs}" for sizes, epochs in phases)
    assert [(list(phase.sizes), phase.epochs) for phase in parse_schedule(text)] == phases


@pytest.mark.parametrize(
    "text",
    [
        "",
        "48",
        "48:",
        ":5",
        "0:5",
        "48:0",
        "48:-1",
        "48:1.5",
        "48:5,",
        "a:b",
        "48:5;96:1",
        "1:2:3",
        "²:3",
        "48+:3",
        "+:1",
    ],
)
def test_bad_schedules_say_how_to_write_one(text: str) -> None:
    expected = f"--schedule {text}: write SIZE:EPOCHS,SIZE+SIZE:EPOCHS,..., such as 48:40,48+96:10"
    assert message_of(parse_schedule, text) == expected


def test_sizes_of_each_epoch() -> None:
    config = TrainConfig(phases=parse_schedule("48:2,48+128:1,96:1"))
    assert config.epochs == 4
    assert [config.sizes(epoch) for epoch in range(4)] == [(48,), (48,), (48, 128), (96,)]
    with pytest.raises(IndexError, match="epoch is past the last of 4"):
        config.sizes(4)


# --- As JSON and back ------------------------------------------------------------------------------------------------

MODELS: list[ModelConfig] = [
    AutoencoderConfig(),
    AutoencoderConfig(depth=2, base_channels=8, kernel_size=5, skips=False, resample="pool", dropout=0),
    ResidualUNetConfig(),
    ResidualUNetConfig(channels=(4,), blocks=(3,), gate=False),
]


@pytest.mark.parametrize("config", MODELS, ids=str)
def test_networks_survive_json(config: ModelConfig) -> None:
    assert model_config(json.loads(json.dumps(to_dict(config)))) == config


def test_the_whole_training_config_is_plain_json() -> None:
    for preset in PRESETS.values():
        values = to_dict(preset)
        assert json.loads(json.dumps(values)) == values
        assert model_config(values["model"]) == preset.model


def test_unknown_networks_are_refused_by_name() -> None:
    assert message_of(model_config, {"kind": "gan"}) == "architecture kind 'gan': use one of autoencoder, residual_unet"
    assert message_of(model_config, {}) == "architecture kind None: use one of autoencoder, residual_unet"
    assert message_of(model_config, {"kind": "residual_unet", "depth": 3}) == (
        "architecture field 'depth' is not known to residual_unet; it has blocks, channels, gate, kind"
    )
    assert message_of(model_config, {"kind": "autoencoder", "depth": 0}) == "--model.depth 0: use 1 to 10"
    assert message_of(model_config, {"kind": "residual_unet", "channels": ["x"]}) == (
        "architecture field 'channels' is ('x',); use a value like (24, 48, 96, 160, 192)"
    )


# --- Light -----------------------------------------------------------------------------------------------------------


def test_config_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import restore_core.config; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "['restore_core']"
