"""A model folder: `model.safetensors` (weights) and `config.json` (architecture and where the weights come from)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from restore_core.config import ModelConfig, model_config, to_dict
from restore_core.errors import ItemError, UsageError
from restore_core.model import Autoencoder, ResidualUNet, build
from restore_core.storage import open_storage

BUNDLED = Path(__file__).parent / "weights"
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


@dataclass(frozen=True)
class ModelFolder:
    """The two files of a model, read once and sent to every actor as they are."""

    name: str
    weights: bytes
    config: dict[str, Any]

    @property
    def sha256(self) -> str:
        """Identity of the model in the ledger: a hash of the weights and of the architecture."""
        digest = hashlib.sha256(self.weights)
        digest.update(json.dumps(self.config["architecture"], sort_keys=True).encode())
        return digest.hexdigest()

    @property
    def architecture(self) -> ModelConfig:
        return model_config(self.config["architecture"])


def bundled_names() -> list[str]:
    """Names that `--model` takes without a path."""
    return sorted(folder.parent.name for folder in BUNDLED.glob(f"*/{CONFIG_FILE}"))


def save(model: nn.Module, architecture: ModelConfig, card: dict[str, Any], folder: Path) -> None:
    """Write a model folder; `card` says what it was trained on, how, and with which result.

    Kernels are kept in half precision, whose rounding costs less than 0.01 dB (DECISIONS.md) and saves half of what
    every actor is sent; the few biases and statistics stay as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (tensor.half() if tensor.ndim > 1 else tensor).detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
    }
    safetensors.torch.save_file(tensors, folder / WEIGHTS_FILE)
    config = {"architecture": to_dict(architecture), **card}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def parse(name: str, weights: bytes, config: bytes, option: str = "--model") -> ModelFolder:
    """Check the bytes of a model folder. Raises UsageError naming the file and what is wrong with it."""
    try:
        values = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{option} {name}: {CONFIG_FILE} is not JSON ({error}); restore the file") from error
    if not isinstance(values, dict) or not isinstance(values.get("architecture"), dict):
        raise UsageError(f"{option} {name}: {CONFIG_FILE} has no 'architecture'; restore the file")
    folder = ModelFolder(name, weights, values)
    try:
        _ = folder.architecture
    except UsageError as error:
        raise UsageError(f"{option} {name}: {CONFIG_FILE}: {error}") from error
    load(folder, option=option)  # tensors that do not fit are found here, before a cluster starts
    return folder


def load(
    folder: ModelFolder, device: torch.device | str = "cpu", option: str = "--model"
) -> Autoencoder | ResidualUNet:
    """The network with its weights, in evaluation mode. Raises UsageError if the tensors do not fit the config."""
    with torch.device("meta"):
        model = build(folder.architecture)
    try:
        tensors = safetensors.torch.load(folder.weights)
    except safetensors.SafetensorError as error:
        raise UsageError(f"{option} {folder.name}: {WEIGHTS_FILE} is damaged ({error}); copy it again") from error
    state = model.state_dict()
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if name in wanted and tensor.is_floating_point() != state[name].is_floating_point():
            raise UsageError(
                f"{option} {folder.name}: {WEIGHTS_FILE} does not fit {CONFIG_FILE}: "
                f"tensor {name!r} is of {tensor.dtype}"
            )
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise UsageError(
                f"{option} {folder.name}: {WEIGHTS_FILE} does not fit {CONFIG_FILE}: tensor {name!r} is "
                f"{found.get(name, 'missing')} in the file, {wanted.get(name, 'not part')} of the architecture"
            )
    # Weights may be kept in half precision; they are computed with in single.
    model.load_state_dict({n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}, assign=True)
    return model.to(device).eval()


def read(name_or_uri: str, option: str = "--model") -> ModelFolder:
    """A bundled model by name, or the model folder at a path or URI. Raises UsageError naming what is missing."""
    if name_or_uri in bundled_names():
        storage = open_storage(BUNDLED / name_or_uri, option=option)
    elif "/" not in name_or_uri and not Path(name_or_uri).exists():
        raise UsageError(
            f"{option} {name_or_uri}: no bundled model and no folder of that name; "
            f"use {', '.join(bundled_names())}, a path or a URI"
        )
    else:
        storage = open_storage(name_or_uri, option=option)
    files: dict[str, bytes] = {}
    for file in (WEIGHTS_FILE, CONFIG_FILE):
        try:
            files[file] = storage.read(file)
        except ItemError as error:
            raise UsageError(
                f"{option} {name_or_uri}: cannot read {file} there ({error.message}); "
                f"a model folder holds {WEIGHTS_FILE} and {CONFIG_FILE}"
            ) from error
    return parse(name_or_uri, files[WEIGHTS_FILE], files[CONFIG_FILE], option)
