"""The networks keep any size, count what they cost, and are wired as described."""

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from restore_core.config import AutoencoderConfig, ModelConfig, ResidualUNetConfig
from restore_core.model import (
    Autoencoder,
    EncoderBlock,
    ResidualBlock,
    ResidualUNet,
    build,
    count_macs,
    count_parameters,
    pad_to_multiple,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = [(1, 1), (1, 5), (7, 3), (48, 48), (50, 61)]
AUTOENCODERS = [
    AutoencoderConfig(depth=depth, base_channels=2, kernel_size=kernel_size, skips=skips, resample=resample)
    for depth, kernel_size, skips, resample in product((1, 2, 4), (3, 5), (True, False), ("strided", "pool"))
]
RESIDUAL_UNETS = [
    ResidualUNetConfig(channels=channels, blocks=blocks[: len(channels)], gate=gate)
    for channels, blocks, gate in product(((3,), (4, 2), (2, 3, 4, 5)), ((1, 1, 1, 1), (1, 2, 1, 3)), (True, False))
]


def name(config: object) -> str:
    return "-".join(f"{value}".replace(" ", "") for value in vars(config).values())


def image(height: int = 32, width: int = 32, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def ready(config: ModelConfig) -> Autoencoder | ResidualUNet:
    torch.manual_seed(0)
    return build(config).eval()


# --- Shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", AUTOENCODERS + RESIDUAL_UNETS, ids=name)
@torch.no_grad()
def test_any_size_comes_out_as_it_went_in(config: ModelConfig) -> None:
    model = ready(config)
    for height, width in SIZES:
        restored, survival, _ = model(image(height, width, batch=2))
        assert restored.shape == (2, 3, height, width)
        assert torch.isfinite(restored).all()
        if isinstance(config, ResidualUNetConfig) and config.gate:
            assert survival.shape == (2, 1, height, width)
        else:
            assert survival is None


@pytest.mark.parametrize("config", [AUTOENCODERS[6], RESIDUAL_UNETS[-1], RESIDUAL_UNETS[-2]], ids=name)
@torch.no_grad()
def test_images_of_a_batch_do_not_touch_each_other(config: ModelConfig) -> None:
    model = ready(config)
    batch = image(20, 20, batch=3)
    torch.testing.assert_close(model(batch).image[1:2], model(batch[1:2]).image, rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_repeats_the_lower_and_right_border() -> None:
    small = image(5, 6)
    padded = pad_to_multiple(small, 8)
    assert padded.shape == (1, 3, 8, 8)
    rows, columns = torch.arange(8).clamp(max=4), torch.arange(8).clamp(max=5)
    assert torch.equal(padded, small[:, :, rows][:, :, :, columns])
    assert pad_to_multiple(padded, 8) is padded


@pytest.mark.parametrize("config", [AutoencoderConfig(depth=3, base_channels=4), RESIDUAL_UNETS[-1]], ids=name)
@torch.no_grad()
def test_the_result_lies_where_the_image_lay_in_the_padding(config: ModelConfig) -> None:
    model = ready(config)
    for height, width in ((5, 9), (16, 11)):
        x = image(height, width)
        whole = model(pad_to_multiple(x, model.multiple)).image
        torch.testing.assert_close(model(x).image, whole[..., :height, :width], rtol=0, atol=1e-6)


def test_same_seed_same_weights() -> None:
    for config in (AUTOENCODERS[0], RESIDUAL_UNETS[0]):
        for one, other in zip(ready(config).parameters(), ready(config).parameters(), strict=True):
            assert torch.equal(one, other)


# --- Cost ------------------------------------------------------------------------------------------------------------

CONVOLUTION_3 = 9  # multiply-adds per pixel, per pair of channels


def test_macs_and_parameters_of_a_strided_autoencoder_by_hand() -> None:
    config = AutoencoderConfig(depth=2, base_channels=4, kernel_size=3)
    full, half, quarter = 16 * 24, 8 * 12, 4 * 6  # pixels at each scale
    expected = CONVOLUTION_3 * (
        full * 3 * 4 + half * 4 * 4  # encoder 1
        + half * 4 * 8 + quarter * 8 * 8  # encoder 2
        + quarter * 8 * 4 + half * (4 + 4) * 4 + half * 4 * 4  # decoder 1: up (per input pixel), 2 convolutions
        + half * 4 * 4 + full * (4 + 3) * 4 + full * 4 * 4  # decoder 2, joined with the 3 input channels
        + full * 4 * 3  # output
    )  # fmt: skip
    assert count_macs(config, 16, 24) == expected
    assert count_macs(config, 13, 21) == expected  # padded up to multiples of 4
    weights = CONVOLUTION_3 * (3 * 4 + 4 * 4 + 4 * 8 + 8 * 8 + 8 * 4 + 8 * 4 + 4 * 4 + 4 * 4 + 7 * 4 + 4 * 4 + 4 * 3)
    biases = 4 + 4 + 8 + 8 + 4 * 6 + 3
    batch_norms = 2 * 4 + 2 * 8
    assert count_parameters(build(config)) == weights + biases + batch_norms


def test_macs_and_parameters_of_a_pooling_autoencoder_without_skips_by_hand() -> None:
    config = AutoencoderConfig(depth=1, base_channels=4, kernel_size=5, skips=False, resample="pool")
    full = 16 * 24
    weights = 25 * (3 * 4 + 4 * 4 + 4 * 4 + 4 * 4 + 4 * 4 + 4 * 3)  # every one of them at full resolution
    assert count_macs(config, 16, 24) == full * weights
    assert count_parameters(build(config)) == weights + 4 * 5 + 3 + 2 * 4


def test_macs_and_parameters_of_a_residual_unet_by_hand() -> None:
    config = ResidualUNetConfig(channels=(4, 6), blocks=(1, 1), gate=True)
    full, half = 16 * 24, 8 * 12
    block4, block6 = 2 * 9 * 4 * 4, 2 * 9 * 6 * 6
    head, tail, down, up = 9 * 3 * 4, 9 * 4 * 7, 4 * 4 * 6, 4 * 6 * 4
    assert count_macs(config, 16, 24) == (
        full * head + full * block4 + half * down + half * block6 + half * up + full * block4 + full * tail
    )
    biases = 4 + 2 * 4 + 6 + 2 * 6 + 4 + 2 * 4 + 7
    assert count_parameters(build(config)) == head + 2 * block4 + block6 + down + up + tail + biases


def test_counting_computes_nothing_and_leaves_the_random_numbers_alone() -> None:
    """This network would need hundreds of gigabytes for its weights and days for its multiplications."""
    config = AutoencoderConfig(depth=8, base_channels=2**9)
    state = torch.get_rng_state()
    assert count_macs(config, 2**15, 2**15) > 10**16
    assert torch.equal(torch.get_rng_state(), state)


# --- The autoencoder's wiring ----------------------------------------------------------------------------------------


def test_encoder_block_is_in_the_order_described() -> None:
    """Convolution, stride-2 convolution, dropout, batch norm; a ReLU after each convolution."""
    block = EncoderBlock(3, 8, AutoencoderConfig(dropout=0.25))
    layers = [layer for layer in block if not isinstance(layer, nn.Identity)]
    assert [type(layer) for layer in layers] == [
        nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.Dropout, nn.BatchNorm2d,
    ]  # fmt: skip
    assert layers[0].stride == (1, 1) and layers[2].stride == (2, 2) and layers[4].p == 0.25
    pooled = [type(layer) for layer in EncoderBlock(3, 8, AutoencoderConfig(resample="pool"))]
    assert pooled == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d, nn.Dropout, nn.BatchNorm2d]
    assert block(image(10, 14, batch=2)).shape == (2, 8, 5, 7)


@pytest.mark.parametrize("resample", ["strided", "pool"])
def test_skips_carry_the_input_past_the_bottleneck(resample: str) -> None:
    """With the way through the decoder's upsampling cut, only concatenation can bring the input to the output."""
    for skips in (True, False):
        model = ready(AutoencoderConfig(depth=3, base_channels=4, skips=skips, resample=resample))
        ups = [module for block in model.decoder for module in block.up.modules()]
        for module in ups:
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                nn.init.zeros_(module.weight)
        x = image(16, 16).requires_grad_()
        gradient = torch.autograd.grad(model(x).image.sum(), x)[0]
        assert bool(gradient.any()) == skips


@torch.no_grad()
def test_each_decoder_stage_is_joined_with_the_matching_encoder_output() -> None:
    """The last one with the input image; each behind the decoder's own channels."""
    model = ready(AutoencoderConfig(depth=3, base_channels=4))
    encoded: list[Tensor] = []
    joined: list[Tensor] = []
    for block in model.encoder:
        block.register_forward_hook(lambda _module, _inputs, output: encoded.append(output))
    for block in model.decoder:
        block.convolutions.register_forward_pre_hook(lambda _module, inputs: joined.append(inputs[0]))
    x = image(16, 24)
    model(x)
    for features, channels, skip in zip(joined, (8, 4, 4), (encoded[1], encoded[0], x), strict=True):
        assert torch.equal(features[:, channels:], skip)


# --- The residual U-Net's wiring -------------------------------------------------------------------------------------


@torch.no_grad()
def test_gate_chooses_between_the_input_and_invention() -> None:
    """output = g (input + residual) + (1 - g) (content + 1/2), g = sigmoid(survival)."""
    model = ready(ResidualUNetConfig(channels=(4, 6), blocks=(1, 1)))
    x = image(12, 9)
    model.tail.weight.zero_()
    for logit, expected in ((40.0, x + 0.125), (-40.0, torch.full_like(x, 0.75))):
        model.tail.bias.copy_(torch.tensor([0.125] * 3 + [0.25] * 3 + [logit]))
        restored, survival, _ = model(x)
        torch.testing.assert_close(restored, expected)
        torch.testing.assert_close(survival, torch.full((1, 1, 12, 9), logit))
    model.tail.bias[6] = 0
    torch.testing.assert_close(model(x).image, (x + 0.125 + 0.75) / 2)


@torch.no_grad()
def test_without_gate_it_predicts_a_residual() -> None:
    model = ready(ResidualUNetConfig(channels=(4, 6), blocks=(1, 1), gate=False))
    x = image(12, 9)
    nn.init.zeros_(model.tail.weight)
    nn.init.zeros_(model.tail.bias)
    assert torch.equal(model(x).image, x)


@torch.no_grad()
def test_residual_branches_start_small() -> None:
    """A block adds 2 % of its input's deviation; with torch's own initial weights it would be 19 %."""
    model = ready(ResidualUNetConfig(channels=(16, 16), blocks=(2, 2)))
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 6
    features = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    for block in blocks:
        branch = block(features) - features
        varying = branch - branch.mean(dim=(2, 3), keepdim=True)  # without the bias
        assert 0.005 < varying.std() / features.std() < 0.05


def test_skips_of_the_residual_unet_carry_the_input() -> None:
    model = ready(ResidualUNetConfig(channels=(4, 6, 8), blocks=(1, 1, 1), gate=False))
    for up in model.up:
        nn.init.zeros_(up.weight)
    x = image(8, 8).requires_grad_()
    gradient = torch.autograd.grad((model(x).image - x).sum(), x)[0]
    assert gradient.any()


@pytest.mark.parametrize("config", [AUTOENCODERS[0], AUTOENCODERS[-1], RESIDUAL_UNETS[-1]], ids=name)
def test_every_parameter_gets_a_gradient(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = build(config).train()
    restored, survival, _ = model(image(64, 64, batch=2))
    loss = restored.square().mean()
    if survival is not None:
        loss = loss + survival.square().mean()
    loss.backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
