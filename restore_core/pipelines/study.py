"""A study: what is compared, what lies in its folder, and what there is to tell about it."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from restore_core import sources
from restore_core.config import AutoencoderConfig, ModelConfig, TrainConfig, to_dict
from restore_core.model import build, count_macs, count_parameters
from restore_core.pipelines.training import shards_of, to_photographs
from restore_core.storage import Storage
from restore_core.trainer import STATE_FILE, STATE_TENSORS, VALIDATION, Photographs, Trainer, central_crops

DIVERGED_FILE = "diverged.txt"
OVERVIEW = ("noise_25", "flips_10", "patches_15", "gray", "mixed", "all")
"""Damages of the overview, a face each."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, on what, and where it is kept. Every trial is told."""

    trials: dict[str, TrainConfig]
    """How each variant is trained; they differ in the network alone."""
    data: Storage
    folder: Storage
    images: int
    """Training photographs, the first ones of the split."""

    @property
    def config(self) -> TrainConfig:
        """What the trials have in common: everything but the network."""
        return next(iter(self.trials.values()))

    def trial_folder(self, name: str) -> Storage:
        return self.folder.child(f"trials/{name}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What has become of one variant."""

    history: list[dict[str, float]]
    """One row per finished epoch."""
    error: str | None
    """Why it is not finished, else None."""


def options(study: Study) -> dict[str, Any]:
    """What decides the results. Those that have a name on the command line come first."""
    config = study.config
    return {
        "data": study.data.uri,
        "shards": shards_of(study.data),
        "images": study.images,
        "epochs": config.epochs,
        "size": config.val_size,
        "batch_size": config.batch_size,
        "learning_rate": config.optimizer.learning_rate,
        "seed": config.seed,
        "variants": list(study.trials),
        "trials": {name: to_dict(config) for name, config in study.trials.items()},
    }


def photographs(study: Study, split: str, limit: int) -> Photographs:
    """The first ones of a split, decoded."""
    canvas = study.config.canvas
    return to_photographs(sources.read_split(study.data, split, canvas, limit), canvas)


# --- What lies in a trial's folder ---------------------------------------------------------------------------------


def save_state(trainer: Trainer, folder: Storage) -> None:
    """The state after an epoch; older ones are deleted once it is complete."""
    stem = f"epoch_{trainer.epoch:04d}"
    with tempfile.TemporaryDirectory() as place:
        trainer.save_state(Path(place))
        for name in (STATE_TENSORS, STATE_FILE):  # the small file last: with it the state is complete
            folder.write(stem + Path(name).suffix, (Path(place) / name).read_bytes())
    for item in list(folder.list("epoch_")):
        if not item.key.startswith(stem):
            folder.delete(item.key)


def load_state(trainer: Trainer, folder: Storage) -> None:
    """Go on from the newest complete state, if any."""
    stem = _newest(folder)
    if stem is None:
        return
    with tempfile.TemporaryDirectory() as place:
        for name in (STATE_TENSORS, STATE_FILE):
            (Path(place) / name).write_bytes(folder.read(stem + Path(name).suffix))
        trainer.load_state(Path(place))


def _newest(folder: Storage) -> str | None:
    """The files of the newest complete state, without their suffixes."""
    suffix = Path(STATE_FILE).suffix
    return max((i.key.removesuffix(suffix) for i in folder.list("epoch_") if i.key.endswith(suffix)), default=None)


def is_finished(study: Study, name: str) -> bool:
    """Whether there is nothing left to train."""
    folder = study.trial_folder(name)
    return diverged(folder) is not None or len(history(folder)) == study.config.epochs


def history(folder: Storage) -> list[dict[str, float]]:
    """One row per finished epoch."""
    stem = _newest(folder)
    return json.loads(folder.read(stem + Path(STATE_FILE).suffix))["history"] if stem else []


def diverged(folder: Storage) -> str | None:
    """Why the trial cannot be finished, if it diverged."""
    return folder.read(DIVERGED_FILE).decode() if folder.exists(DIVERGED_FILE) else None


# --- What there is to tell -----------------------------------------------------------------------------------------


def rows_of(study: Study, outcomes: dict[str, Outcome]) -> list[dict[str, Any]]:
    """One row a variant. PSNR and losses are those of the last epoch, and missing where that was not reached."""
    return [_row(name, study.trials[name], outcome) for name, outcome in outcomes.items()]


def _row(name: str, config: TrainConfig, outcome: Outcome) -> dict[str, Any]:
    epochs = outcome.history
    row: dict[str, Any] = {
        "variant": name,
        "network": describe(config.model),
        "parameters": count_parameters(build(config.model)),
        "macs": count_macs(config.model, config.val_size, config.val_size),
        "epochs": len(epochs),
        "minutes": round(sum(epoch["seconds"] for epoch in epochs) / 60, 2),
        "error": outcome.error,
    }
    if outcome.error is None:
        last = epochs[-1]
        row |= {
            "samples_per_second": round(float(np.median([epoch["samples_per_second"] for epoch in epochs])), 1),
            "train_loss": last["train_loss"],
            "val_loss": last["val_loss"],
            "psnr_db": {damage: round(last[f"psnr_{damage}"], 2) for damage in VALIDATION},
            "identity_psnr_db": {damage: round(last[f"identity_{damage}"], 2) for damage in VALIDATION},
        }
    return row


def describe(model: ModelConfig) -> str:
    """A network in a few words; of an autoencoder, what makes it unlike the origin's."""
    if not isinstance(model, AutoencoderConfig):
        return f"residual U-Net, channels {', '.join(map(str, model.channels))}"
    origin = to_dict(AutoencoderConfig())
    changes = [f"{name} {value}" for name, value in to_dict(model).items() if value != origin[name]]
    return ", ".join(changes).replace("_", " ") or "the origin's autoencoder"


def overview(study: Study, outcomes: dict[str, Outcome]) -> list[tuple[str, Tensor]]:
    """Faces with one damage of `OVERVIEW` each, as every finished variant restores them.

    Returns columns of name and uint8 [D, 3, S, S]: the damaged input, one a variant, the truth. Nothing if no variant
    is finished.
    """
    faces = photographs(study, sources.VALIDATION, study.config.val_images)
    chosen = [index * len(faces) // len(OVERVIEW) for index in range(len(OVERVIEW))]
    restored, clean, damaged = [], torch.empty(0), torch.empty(0)
    for name in [name for name, outcome in outcomes.items() if outcome.error is None]:
        config = study.trials[name]
        trainer = Trainer(config, steps_per_epoch=1)
        load_state(trainer, study.trial_folder(name))
        clean = central_crops(faces, config.val_size)[chosen]  # the same for all
        damaged = torch.cat(
            [
                trainer.validation_damage(damage, clean[row : row + 1], [faces.keys[chosen[row]]])[0]
                for row, damage in enumerate(OVERVIEW)
            ]
        )
        restored.append((name, trainer.restore(damaged)))
    return [("input", damaged), *restored, ("truth", clean)] if restored else []
