"""The real LFW photographs, where they are: packed by the real command, every one of them, untouched."""

import hashlib
import io
import os
import tarfile
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs import pack_dataset, restore_bucket, train
from restore_core import checkpoint, codec, manifest
from restore_core.degradations import Generator, degrade, fixed_damage, seed_of
from restore_core.metrics import psnr
from restore_core.sources import DATASET_SCHEMA, count_splits, group_of, photographs, read_list, read_split, split_of
from restore_core.storage import LocalStorage, open_storage
from restore_core.trainer import VALIDATION

ROOT = Path(__file__).parent.parent
LFW = Path(os.environ.get("LFW_DIR", ROOT.parent / "shared" / "data" / "lfw"))
ORIGINAL = LFW / "lfw-original-150px.devtrain.tar"
FUNNELED = LFW / "lfw-funneled.devtrain-0.tar"
PEOPLE = LFW / "peopleDevTrain.txt"

pytestmark = [
    pytest.mark.lfw,
    pytest.mark.skipif(not LFW.is_dir(), reason=f"no LFW photographs in {LFW} (LFW_DIR)"),
]


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lfw")
    job = pack_dataset.PackDataset(input=(str(ORIGINAL),), output=str(output), val_share=0.15, test_share=0.15)
    assert pack_dataset.main(job) == 0
    return output


@pytest.fixture(scope="module")
def rows(packed: Path) -> list[dict[str, object]]:
    tables = [pq.read_table(path) for path in sorted(packed.glob("*.parquet"))]
    assert all(table.schema.equals(DATASET_SCHEMA) for table in tables)
    return pa.concat_tables(tables).to_pylist()  # type: ignore[no-any-return]


def test_every_photograph_is_packed_untouched(packed: Path, rows: list[dict[str, object]]) -> None:
    assert (packed / "_pack" / "broken.csv").read_text().splitlines() == ["key,error,message"]
    found = {row["key"]: row for row in rows}
    with tarfile.open(ORIGINAL) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    assert len(rows) == len(files) == 1010 and found.keys() == files.keys()
    for key, data in files.items():
        assert found[key]["image"] == data
        assert found[key]["sha256"] == hashlib.sha256(data).hexdigest()
        assert (found[key]["width"], found[key]["height"]) == Image.open(io.BytesIO(data)).size == (150, 150)


def test_nobody_is_in_two_splits(rows: list[dict[str, object]]) -> None:
    people = {split: {row["group"] for row in rows if row["split"] == split} for split in ("train", "val", "test")}
    assert all(people.values())
    assert sum(map(len, people.values())) == len(set.union(*people.values()))
    assert set.union(*people.values()) <= read_list(PEOPLE, "--train-list")  # folders bear the people's names
    share = len(people["val"]) / sum(map(len, people.values()))
    assert 0.08 < share < 0.22
    for row in rows:
        assert row["split"] == split_of(str(row["group"]), 0.15, 0.15)


def test_packed_photographs_decode(packed: Path, rows: list[dict[str, object]]) -> None:
    place = open_storage(packed)
    assert count_splits(place).total() == 1010
    decoded = read_split(place, "val", canvas=150, limit=20).to_pylist()
    images = {row["key"]: row["image"] for row in rows}
    assert len(decoded) == 20
    for row in decoded:
        assert row["pixels"] == codec.decode(images[row["key"]]).pixels.tobytes()  # type: ignore[arg-type]


def test_the_official_list_keeps_its_people_in_train(tmp_path: Path) -> None:
    """The archives here are of the development-train people only, so nothing is left for another split."""
    with tarfile.open(ORIGINAL) as tar, tarfile.open(tmp_path / "some.tar", "w") as some:
        for member in islice((member for member in tar if member.isfile()), 60):
            some.addfile(member, tar.extractfile(member))
    job = pack_dataset.PackDataset(
        input=(str(tmp_path / "some.tar"),), output=str(tmp_path / "out"), val_share=0.5, train_list=PEOPLE
    )
    assert pack_dataset.main(job) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.parquet")] == ["train-00000.parquet"]
    assert count_splits(open_storage(tmp_path / "out"))["train"] == 60


def test_the_funneled_archives_have_the_layout_expected() -> None:
    people = read_list(PEOPLE, "--train-list")
    assert len(people) == 4038  # as its first line says
    for found in islice(photographs(open_storage(FUNNELED)), 100):
        assert found.key == f"lfw_funneled/{group_of(found.key)}/{group_of(found.key)}_{found.key[-8:-4]}.jpg"
        assert group_of(found.key) in people
        assert isinstance(found.data, bytes) and codec.decode(found.data).pixels.shape == (250, 250, 3)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_packed_photographs_train_a_model_that_restores(packed: Path, tmp_path: Path) -> None:
    """The whole way, with the smallest preset."""
    job = train.Train(data=str(packed), storage=str(tmp_path / "runs"), preset="smoke", schedule="32:2", workers="1")
    assert train.main(job) == 0
    model = checkpoint.read(str(tmp_path / "runs/restorer/model"))
    validation = model.config["validation"]
    assert validation["psnr_db"]["mixed"] > validation["identity_psnr_db"]["mixed"] + 0.5
    source = tmp_path / "in"
    for found in islice(photographs(open_storage(ORIGINAL)), 6):
        assert isinstance(found.data, bytes)
        (source / found.key).parent.mkdir(parents=True, exist_ok=True)
        (source / found.key).write_bytes(found.data)
    restoring = restore_bucket.RestoreBucket(input=str(source), output=str(tmp_path / "out"), model=model.name)
    assert restore_bucket.main(restoring) == 0
    ledger = manifest.rows_of(manifest.Ledger(LocalStorage(tmp_path / "out"), "reader").latest())
    assert len(ledger) == 6 and all(row.status in ("restored", "unchanged") for row in ledger)


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_the_bundled_model_restores_people_it_has_not_seen(tmp_path: Path) -> None:
    """Every damage of the validation, at 64 pixels, through the restore job."""
    source, output = tmp_path / "in", tmp_path / "out"
    clean = {}
    for found in photographs(open_storage(FUNNELED)):
        person = group_of(found.key)
        if split_of(person, 0.1, 0) != "val" or person in clean or not isinstance(found.data, bytes):
            continue
        face = Image.open(io.BytesIO(found.data)).crop((45, 45, 205, 205)).resize((64, 64), Image.Resampling.LANCZOS)
        clean[person] = np.asarray(face)
        if len(clean) == 8:
            break
    for damage, strengths in VALIDATION.items():
        (source / damage).mkdir(parents=True)
        for person, pixels in clean.items():
            generator = Generator([seed_of(1, damage, person)])
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
            damaged, _ = degrade(image, fixed_damage(generator, **strengths), generator)  # type: ignore[arg-type]
            Image.fromarray(damaged[0].permute(1, 2, 0).numpy()).save(source / damage / f"{person}.png")
    assert restore_bucket.main(restore_bucket.RestoreBucket(input=str(source), output=str(output))) == 0
    gains = {}
    for damage in VALIDATION:
        before, after = (
            np.mean([min(psnr(np.asarray(Image.open(place / damage / f"{person}.png")), pixels), 60.0)
                     for person, pixels in clean.items()])
            for place in (source, output)
        )  # fmt: skip
        gains[damage] = after - before
    assert gains.pop("clean") > -10  # 50 dB or more
    assert min(gains.values()) > 2.5, gains
