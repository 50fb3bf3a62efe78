"""Model folders: what is written is what is read, and a broken one is refused in one line that names the file."""

import io
import json
import pickletools
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from restore_core import checkpoint
from restore_core.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ModelFolder
from restore_core.config import AutoencoderConfig, ModelConfig, ResidualUNetConfig, to_dict
from restore_core.errors import UsageError
from restore_core.model import build
from restore_core.storage import open_storage

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES: list[ModelConfig] = [
    AutoencoderConfig(depth=2, base_channels=4),
    AutoencoderConfig(depth=1, base_channels=4, kernel_size=5, skips=False, resample="pool"),
    ResidualUNetConfig(channels=(4, 6), blocks=(1, 1)),
    ResidualUNetConfig(channels=(4,), blocks=(1,), gate=False),
]
SMALL = ARCHITECTURES[2]
CARD = {"trained_on": "s3://photos/clean", "commit": "0123abc", "result": {"psnr_mixed": 25.5}}


def trained(architecture: ModelConfig, seed: int = 0) -> nn.Module:
    """A network that is nobody's initial state, its batch norm statistics included."""
    torch.manual_seed(seed)
    model = build(architecture)
    model(torch.rand(4, 3, 16, 16))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    checkpoint.save(trained(SMALL), SMALL, CARD, tmp_path / "faces")
    return tmp_path / "faces"


def refusal(place: Path | str) -> str:
    with pytest.raises(UsageError) as caught:
        checkpoint.read(str(place))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def change_architecture(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG_FILE).read_text())
    config["architecture"] |= values
    (folder / CONFIG_FILE).write_text(json.dumps(config))


# --- Round trip ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=str)
@torch.no_grad()
def test_what_is_saved_is_what_is_loaded(architecture: ModelConfig, tmp_path: Path) -> None:
    model = trained(architecture)
    checkpoint.save(model, architecture, CARD, tmp_path)
    found = checkpoint.read(str(tmp_path))
    assert found.architecture == architecture
    assert found.config == {"architecture": to_dict(architecture), **CARD}
    loaded = checkpoint.load(found)
    assert not loaded.training
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        rounded = expected[name].half().float() if tensor.ndim > 1 else expected[name]
        assert torch.equal(tensor, rounded)
    image = torch.rand(1, 3, 13, 10)
    assert torch.allclose(loaded(image).image, model(image).image, atol=2e-3)


def test_a_network_in_channels_last_is_saved_like_any_other(folder: Path, tmp_path: Path) -> None:
    model = trained(SMALL).to(memory_format=torch.channels_last)
    checkpoint.save(model, SMALL, CARD, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS_FILE).read_bytes() == (folder / WEIGHTS_FILE).read_bytes()


def test_read_from_s3(folder: Path, s3: str) -> None:
    place = open_storage("s3://photos/models/faces/")
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        place.write(file, (folder / file).read_bytes())
    assert checkpoint.read("s3://photos/models/faces").sha256 == checkpoint.read(str(folder)).sha256
    assert refusal("s3://photos/models/other").startswith(
        "--model s3://photos/models/other: cannot read model.safetensors there (cannot read s3://photos/models/other/"
    )


def test_loading_leaves_the_random_numbers_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    checkpoint.load(checkpoint.read(str(folder)))
    assert torch.equal(torch.get_rng_state(), state)


def test_every_load_is_a_network_of_its_own(folder: Path) -> None:
    found = checkpoint.read(str(folder))
    changed = checkpoint.load(found)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.zero_()
    assert any(parameter.any() for parameter in checkpoint.load(found).parameters())


def test_no_pickle_in_the_folder(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
    for path in folder.iterdir():
        data = path.read_bytes()
        assert not data.startswith((b"PK", b"\x80"))  # torch's zip, and any pickle of protocol 2 or later
        with pytest.raises(ValueError):
            list(pickletools.genops(io.BytesIO(data)))


# --- Identity --------------------------------------------------------------------------------------------------------


def test_hash_changes_with_weights_and_architecture_and_with_nothing_else(folder: Path, tmp_path: Path) -> None:
    sha256 = checkpoint.read(str(folder)).sha256
    assert len(sha256) == 64 and int(sha256, 16) >= 0

    checkpoint.save(trained(SMALL), SMALL, {"commit": "another"}, tmp_path / "renamed")
    assert checkpoint.read(str(tmp_path / "renamed")).sha256 == sha256

    model = trained(SMALL)
    with torch.no_grad():
        next(model.parameters())[0, 0, 0, 0] += 1e-6
    checkpoint.save(model, SMALL, CARD, tmp_path / "nudged")
    assert checkpoint.read(str(tmp_path / "nudged")).sha256 != sha256

    # the same tensors in a network that uses them otherwise
    autoencoder = AutoencoderConfig(depth=2, base_channels=4, dropout=0)
    model = trained(autoencoder)
    checkpoint.save(model, autoencoder, CARD, tmp_path / "dropout-0")
    change_to = AutoencoderConfig(depth=2, base_channels=4, dropout=0.5)
    checkpoint.save(model, change_to, CARD, tmp_path / "dropout-5")
    one, other = (checkpoint.read(str(tmp_path / name)) for name in ("dropout-0", "dropout-5"))
    assert one.weights == other.weights and one.sha256 != other.sha256


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", [WEIGHTS_FILE, CONFIG_FILE])
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    assert refusal(folder) == (
        f"--model {folder}: cannot read {file} there (cannot read {folder / file}: No such file or directory); "
        "a model folder holds model.safetensors and config.json"
    )


def test_a_missing_folder_and_an_unknown_name(tmp_path: Path) -> None:
    assert f"--model {tmp_path}/nothing: cannot read model.safetensors there" in refusal(tmp_path / "nothing")
    message = refusal("facse")
    assert message.startswith("--model facse: no bundled model and no folder of that name; use ")
    assert all(name in message for name in checkpoint.bundled_names())
    assert message.endswith("a path or a URI")


@pytest.mark.parametrize("damage", ["truncated", "empty", "noise", "header"])
def test_damaged_weights_are_named(folder: Path, damage: str) -> None:
    data = (folder / WEIGHTS_FILE).read_bytes()
    broken = {"truncated": data[:-1], "empty": b"", "noise": bytes(1000), "header": b"\xff" * 8 + data[8:]}[damage]
    (folder / WEIGHTS_FILE).write_bytes(broken)
    message = refusal(folder)
    assert message.startswith(f"--model {folder}: model.safetensors is damaged (")
    assert message.endswith("); copy it again")


def test_a_pickle_in_the_place_of_the_weights_is_refused_unread(folder: Path) -> None:
    torch.save({"head.weight": torch.zeros(1)}, folder / WEIGHTS_FILE)
    assert refusal(folder).startswith(f"--model {folder}: model.safetensors is damaged (")


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)

    def message_with(**changed: torch.Tensor) -> str:
        safetensors.torch.save_file(tensors | changed, folder / WEIGHTS_FILE)
        return refusal(folder)

    start = f"--model {folder}: model.safetensors does not fit config.json: tensor "
    assert message_with(**{"head.weight": torch.zeros(4, 3, 5, 5)}) == (
        start + "'head.weight' is (4, 3, 5, 5) in the file, (4, 3, 3, 3) of the architecture"
    )
    assert message_with(extra=torch.zeros(2)) == start + "'extra' is (2,) in the file, not part of the architecture"
    del tensors["tail.bias"]
    assert message_with() == start + "'tail.bias' is missing in the file, (7,) of the architecture"


def test_a_config_that_is_not_json(folder: Path) -> None:
    (folder / CONFIG_FILE).write_text("{'kind': 'autoencoder'}")
    assert refusal(folder) == (
        f"--model {folder}: config.json is not JSON (Expecting property name enclosed in double quotes: "
        "line 1 column 2 (char 1)); restore the file"
    )
    (folder / CONFIG_FILE).write_bytes(b"\xff\xfe")
    assert refusal(folder).startswith(f"--model {folder}: config.json is not JSON (")


@pytest.mark.parametrize("text", ["[]", "{}", "null", '{"architecture": "residual_unet"}'])
def test_a_config_without_architecture(folder: Path, text: str) -> None:
    (folder / CONFIG_FILE).write_text(text)
    assert refusal(folder) == f"--model {folder}: config.json has no 'architecture'; restore the file"


UNKNOWN = [
    ({"kind": "gan"}, "architecture kind 'gan': use one of autoencoder, residual_unet"),
    ({"depth": 3}, "architecture field 'depth' is not known to residual_unet; it has blocks, channels, gate, kind"),
    ({"channels": [2**40, 1]}, "--model.channels (1099511627776, 1): use 1 to 65536 channels per scale"),
    ({"blocks": [0, 1]}, "--model.blocks (0, 1): use 1 to 64 blocks per scale"),
]


@pytest.mark.parametrize(("values", "reason"), UNKNOWN, ids=str)
def test_an_unknown_architecture_is_refused_with_the_reason(folder: Path, values: dict[str, Any], reason: str) -> None:
    change_architecture(folder, **values)
    assert reason in refusal(folder)


@pytest.mark.parametrize(("values", "reason"), UNKNOWN, ids=str)
def test_an_unknown_architecture_names_the_file(folder: Path, values: dict[str, Any], reason: str) -> None:
    change_architecture(folder, **values)
    message = refusal(folder)
    assert message.startswith(f"--model {folder}: ") and CONFIG_FILE in message


@pytest.mark.parametrize("values", [{"kind": ["x"]}, {"channels": [2.5]}, {"blocks": [1.0, 1.0]}], ids=str)
def test_architecture_values_of_the_wrong_type_are_refused(folder: Path, values: dict[str, Any]) -> None:
    change_architecture(folder, **values)
    with pytest.raises(UsageError):
        checkpoint.read(str(folder))


def test_weights_in_half_precision_are_computed_with_in_single(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    safetensors.torch.save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / WEIGHTS_FILE)
    for name, tensor in checkpoint.load(checkpoint.read(str(folder))).state_dict().items():
        assert torch.equal(tensor, tensors[name].half().float())


def test_weights_of_another_kind_are_refused(folder: Path) -> None:
    tensors = safetensors.torch.load_file(folder / WEIGHTS_FILE)
    tensors["head.bias"] = tensors["head.bias"].to(torch.int32)
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    assert "model.safetensors does not fit config.json: tensor 'head.bias' is of torch.int32" in refusal(folder)


# --- Bundled ---------------------------------------------------------------------------------------------------------


def test_bundled_models_are_complete_and_small() -> None:
    """At most 25 MB each; every name can be read without a path, and nothing else is there."""
    names = checkpoint.bundled_names()
    assert names == sorted(names)
    folders = [path for path in checkpoint.BUNDLED.glob("*") if path.is_dir()]
    assert sorted(path.name for path in folders) == names
    for name in names:
        found = checkpoint.read(name)
        assert isinstance(found, ModelFolder) and found.name == name
        assert len(found.weights) <= 25e6
        assert sorted(path.name for path in (checkpoint.BUNDLED / name).iterdir()) == [CONFIG_FILE, WEIGHTS_FILE]
