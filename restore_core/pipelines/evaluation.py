"""What models are worth: PSNR and SSIM for each damage at each size, on photographs they were not trained on.

Through Ray Data: photographs -> actors that damage, restore and measure -> a row for each photograph, damage, size and
method.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import ray.data
import torch

from restore_core import baselines, codec, sources
from restore_core.checkpoint import ModelFolder
from restore_core.config import Precision
from restore_core.degradations import STANDARD, degrade_photograph, seed_of
from restore_core.errors import ItemError, UsageError
from restore_core.inference import Restorer
from restore_core.metrics import psnr, ssim
from restore_core.pipelines import cluster
from restore_core.storage import Storage
from restore_core.trainer import Photographs, central_crops

SEED = 20240  # of the damages; unlike the run seeds of training
TOP_PSNR = 100.0  # identical pictures count as this much in a mean
IDENTITY = "identity"
BATCH = 8
WORST = 10
NO_LIMIT = 2**20  # of a photograph's sides, pixels

Pixels = npt.NDArray[np.uint8]
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured."""

    models: tuple[ModelFolder, ...]
    baselines: tuple[baselines.Name, ...]
    damages: tuple[str, ...]
    """Names in `degradations.STANDARD`."""
    sizes: tuple[int, ...]
    """Sides of the central crops, pixels; 0 is the whole photograph."""
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Precision = "auto"
    """Of the models' arithmetic, see `inference.Restorer`."""
    self_ensemble: bool = False
    """Average over each image and its mirror image."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One photograph at one size with one damage."""

    key: str
    size: int
    damage: str
    clean: Pixels
    damaged: Pixels
    destroyed: npt.NDArray[np.bool_]
    """[H, W]: flipped or painted over."""


@dataclass(frozen=True)
class Worst:
    """A sample that came out much worse than others of its damage and size."""

    row: Row
    sample: Sample
    restored: Pixels

    @property
    def caption(self) -> str:
        size = f"{self.row['size']} px" if self.row["size"] else "whole"
        return f"{self.row['damage']} {size}: {self.row['psnr']:.1f} dB, {self.row['key'].rpartition('/')[2]}"

    @property
    def pictures(self) -> list[Pixels]:
        """Damaged, restored, truth."""
        return [self.sample.damaged, self.restored, self.sample.clean]


# --- In the actors -------------------------------------------------------------------------------------------------


class Evaluator:
    """photographs (`sources.DECODED_SCHEMA`) -> rows of measurements"""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(1)
        self.plan = plan
        self.restorers = {
            folder.name: Restorer(folder, plan.device, self_ensemble=plan.self_ensemble, precision=plan.precision)
            for folder in plan.models
        }
        self.baselines = {name: baselines.named(name) for name in plan.baselines}

    def __call__(self, photographs: pa.Table) -> pa.Table:
        rows: list[Row] = []
        for batch in samples(photographs, self.plan):
            for sample in batch:
                rows.append(_measured(sample, IDENTITY, sample.damaged))
                for baseline, method in self.baselines.items():
                    rows.append(_measured(sample, baseline, method(sample.damaged, sample.destroyed)))
            for model in self.restorers:
                rows += [row for row, _ in self.restored(model, batch)]
        return pa.Table.from_pylist(rows)

    def restored(self, model: str, batch: list[Sample]) -> Iterator[tuple[Row, Pixels]]:
        """As the restore job does it: what the model finds undamaged stays as it is."""
        results = self.restorers[model]([sample.damaged for sample in batch])
        for sample, result in zip(batch, results, strict=True):
            unchanged = result.undamaged()
            image = sample.damaged if unchanged else result.pixels
            diagnosis = {name: getattr(result, name) for name in ("sigma", "flips", "patches", "gray")}
            yield _measured(sample, model, image) | {"unchanged": unchanged} | diagnosis, image


def samples(photographs: pa.Table, plan: Plan) -> Iterator[list[Sample]]:
    """All photographs of a table, damaged: a list for each size and damage."""
    singles = _singles(photographs)
    for size in plan.sizes:
        # Enlarged, a smaller one would be smoother than photographs are, and easier to restore.
        clean = {single.keys[0]: _at_size(single, size) for single in singles if _shorter_side(single) >= size}
        for damage in plan.damages:
            yield [_sample(key, size, damage, image) for key, image in clean.items()]


def _singles(table: pa.Table) -> list[Photographs]:
    """Each photograph of a table by itself, in a canvas of its own size."""
    columns = zip(*(table[name].to_pylist() for name in sources.DECODED_SCHEMA.names), strict=True)
    return [
        Photographs.of([key], [pixels], [height], [width], max(height, width)) for key, pixels, height, width in columns
    ]


def _shorter_side(single: Photographs) -> int:
    return int(min(single.height[0], single.width[0]))


def _at_size(single: Photographs, size: int) -> Pixels:
    if size:
        return np.ascontiguousarray(central_crops(single, size)[0].permute(1, 2, 0).numpy())
    return np.ascontiguousarray(single.pixels[0, : single.height[0], : single.width[0]])


def _sample(key: str, size: int, damage: str, clean: Pixels) -> Sample:
    seed = seed_of(SEED, "evaluate", damage, clean.shape[0], key)
    damaged, destroyed = degrade_photograph(clean, seed, **STANDARD[damage])
    return Sample(key=key, size=size, damage=damage, clean=clean, damaged=damaged, destroyed=destroyed)


def _measured(sample: Sample, method: str, image: Pixels) -> Row:
    return {
        "key": sample.key,
        "size": sample.size,
        "damage": sample.damage,
        "method": method,
        "psnr": min(psnr(image, sample.clean), TOP_PSNR),
        "ssim": ssim(image, sample.clean) if min(image.shape[:2]) >= 11 else float("nan"),
        "destroyed": float(sample.destroyed.mean()),
        "unchanged": False,
        "sigma": None, "flips": None, "patches": None, "gray": None,
    }  # fmt: skip


# --- In the driver -------------------------------------------------------------------------------------------------


def evaluate(
    plan: Plan, data: Storage, *, split: str, images: int, workers: int | None
) -> tuple[list[Row], list[Worst]]:
    """Measure everything on the first `images` photographs of a split, or of a folder; Ray is connected.

    Returns a row for each photograph, size, damage and method, and what the first model did worst.
    """
    actors = min(cluster.processes(plan.device, workers), math.ceil(images / BATCH))
    rows: list[Row] = []
    # In order, or the first ones were those that are decoded first.
    with cluster.in_order(), cluster.releasing_actors(rows.__len__):
        dataset = _measurements(plan, data, split, images, actors)
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
            rows += table.to_pylist()
        if not rows:
            raise UsageError(
                f"--data {data.uri}: none of its photographs (--split {split}) can be decoded, or all are smaller than "
                f"--sizes {' '.join(map(str, plan.sizes))}; pack them again, or name smaller sizes"
            )
        order = {name: index for index, name in enumerate((*plan.sizes, *plan.damages))}
        rows.sort(key=lambda row: (order[row["size"]], order[row["damage"]]))  # else as the photographs came
        return rows, _worst(plan, data, split, images, rows)


def _measurements(plan: Plan, data: Storage, split: str, images: int, actors: int) -> ray.data.Dataset:
    photographs = _photographs(data, split, images).repartition(target_num_rows_per_block=BATCH)
    return photographs.map_batches(
        Evaluator,
        fn_constructor_args=(plan,),
        batch_format="pyarrow",
        batch_size=BATCH,
        compute=ray.data.ActorPoolStrategy(size=actors),
        runtime_env={"env_vars": cluster.KEEP_MEMORY},
        num_gpus=1 if plan.device == "cuda" else 0,
        # Half of the CPUs stay free for reading and decoding, or everything would wait for ever.
        num_cpus=0 if plan.device == "cuda" else 0.5,
    )


def require_photographs(data: Storage, split: str) -> None:
    """Raise UsageError, before Ray starts, when nothing there can be measured."""
    if not _has_parquet(data):
        keys = (item.key for item in data.list() if not sources.is_internal(item.key))
        if next(_decoded(data, keys), None) is None:
            raise UsageError(f"--data {data.uri}: neither Parquet files nor photographs there; check the path")
    elif not sources.count_splits(data)[split]:
        raise UsageError(f"--split {split}: no photographs of it in --data {data.uri}; pack with a share for it")
    elif not len(sources.read_split(data, split, NO_LIMIT, limit=1)):
        raise UsageError(f"--split {split}: none of its photographs in {data.uri} can be decoded; pack them again")


def _has_parquet(data: Storage) -> bool:
    return any(item.key.endswith(".parquet") and not sources.is_internal(item.key) for item in data.list())


def _photographs(data: Storage, split: str, images: int) -> ray.data.Dataset:
    """The first photographs of a dataset's split, or of a folder, as `sources.DECODED_SCHEMA`."""
    filesystem, root = data.filesystem()
    if _has_parquet(data):
        keys = sources.parquet_files(data)
        with sources.open_parquet(data, keys[0], "--data") as file:
            columns = sources.dataset_columns(file.schema_arrow)
        files = ray.data.read_parquet([f"{root}/{key}" for key in keys], filesystem=filesystem)
        decoded = files.select_columns(columns).map_batches(
            lambda table: sources.decode_rows(table, split, NO_LIMIT), batch_format="pyarrow", batch_size=BATCH
        )
        return decoded.limit(images)
    names = sorted(item.key for item in data.list() if not sources.is_internal(item.key))
    units = [pa.table({"key": names[start : start + BATCH]}) for start in range(0, len(names), BATCH)]

    def decode(table: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([*_decoded(data, table["key"].to_pylist())], schema=sources.DECODED_SCHEMA)

    return ray.data.from_arrow(units).map_batches(decode, batch_format="pyarrow", batch_size=BATCH).limit(images)


def _decoded(data: Storage, keys: Iterable[str]) -> Iterator[Row]:
    for key in keys:
        try:
            pixels = codec.decode(sources.read(data, key)).shown
        except ItemError:
            continue
        yield {"key": key, "pixels": pixels.tobytes(), "height": pixels.shape[0], "width": pixels.shape[1]}


def _worst(plan: Plan, data: Storage, split: str, images: int, rows: list[Row]) -> list[Worst]:
    """The damaged samples with which the first model fell furthest behind its mean for that damage and size."""
    first = plan.models[0].name
    cells: dict[tuple[int, str], list[Row]] = defaultdict(list)
    for row in rows:
        if row["method"] == first:
            cells[row["size"], row["damage"]].append(row)
    behind = [  # clean ones last: where one that is copied counts 100 dB, another is far behind
        ((not STANDARD[row["damage"]], row["psnr"] - float(np.mean([other["psnr"] for other in cell]))), row)
        for cell in cells.values()
        for row in cell
    ]
    chosen = [row for _, row in sorted(behind, key=lambda item: item[0])[:WORST]]
    wanted = {row["key"] for row in chosen}
    kept = _photographs(data, split, images).map_batches(
        lambda table: table.filter(pa.array([key in wanted for key in table["key"].to_pylist()], pa.bool_())),
        batch_format="pyarrow",
    )
    table = pa.Table.from_pylist(kept.take_all(), schema=sources.DECODED_SCHEMA)
    singles = {single.keys[0]: single for single in _singles(table)}
    evaluator = Evaluator(replace(plan, models=plan.models[:1], baselines=(), device="cpu"))  # the driver has no GPU
    results = []
    for row in chosen:
        clean = _at_size(singles[row["key"]], row["size"])
        sample = _sample(row["key"], row["size"], row["damage"], clean)
        ((_, restored),) = evaluator.restored(first, [sample])
        results.append(Worst(row, sample, restored))
    return results


# --- Sums ----------------------------------------------------------------------------------------------------------


def means(rows: list[Row]) -> list[Row]:
    """For each size, damage and method: mean PSNR (dB; identical pictures count as 100) and mean SSIM."""
    cells: dict[tuple[int, str, str], list[Row]] = defaultdict(list)
    for row in rows:
        cells[row["size"], row["damage"], row["method"]].append(row)
    return [
        {
            "size": size, "damage": damage, "method": method, "images": len(cell),
            "unchanged": sum(row["unchanged"] for row in cell),
            "psnr": float(np.mean([row["psnr"] for row in cell])),
            "ssim": float(np.nanmean([row["ssim"] for row in cell])),
        }
        for (size, damage, method), cell in cells.items()
    ]  # fmt: skip


def diagnosis(rows: list[Row], model: str) -> list[Row]:
    """How well a model tells what is wrong, for each size and kind of damage.

    `mean_error` is the mean absolute difference between what it says and what was done (sigma of 255; shares of the
    pixels), over all damages; not for gray, which is yes or no. `auc` is the area under the ROC curve: the probability
    that a photograph with the damage gets a higher value than one without it; None where there are none without.
    """
    result = []
    for size in dict.fromkeys(row["size"] for row in rows):
        mine = [row for row in rows if row["size"] == size and row["method"] == model and row["sigma"] is not None]
        for kind in ("sigma", "flips", "patches", "gray"):
            said = np.array([np.nan if row[kind] is None else row[kind] for row in mine], float)
            done = np.array([_done(row, kind) for row in mine], float)
            if len(mine) == 0 or np.isnan(said).any() or done.min() == done.max():
                continue
            error = None if kind == "gray" else float(np.abs(said - done).mean())
            auc = _auc(said, done > 0) if not done.all() else None
            result.append({"size": size, "kind": kind, "mean_error": error, "auc": auc})
    return result


def _done(row: Row, kind: str) -> float:
    strengths = STANDARD[row["damage"]]
    if kind == "patches":  # as much of the area as was really covered
        flips = strengths.get("flips", 0.0)
        return (row["destroyed"] - flips) / (1 - flips) if "area" in strengths else 0.0
    return float(strengths.get({"sigma": "sigma_255"}.get(kind, kind), 0.0))


def _auc(values: npt.NDArray[np.float64], positive: npt.NDArray[np.bool_]) -> float:
    from scipy.stats import mannwhitneyu  # ties count half

    return float(mannwhitneyu(values[positive], values[~positive]).statistic / (positive.sum() * (~positive).sum()))
