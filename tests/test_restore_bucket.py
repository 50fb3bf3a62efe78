"""The restore job on a real local Ray and a real S3 server: every object is accounted for, whatever happens."""

import base64
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import skimage.data
import tifffile
from broken_codecs import break_codecs
from photos import write_tree
from PIL import Image, ImageOps
from processes import descendants, wait_for

from jobs import command_line, restore_bucket, verify_bucket
from jobs.restore_bucket import RestoreBucket
from restore_core import checkpoint, codec, manifest, sources, storage
from restore_core.config import ResidualUNetConfig
from restore_core.errors import ItemError, StorageError, UsageError
from restore_core.manifest import Ledger, Row
from restore_core.model import build
from restore_core.pipelines import cluster
from restore_core.pipelines.listing import Listed
from restore_core.storage import LocalStorage, Object, open_storage

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parent.parent
Models = Callable[[int], Path]
Run = Callable[..., int]


def photograph(height: int, width: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    source = (skimage.data.astronaut, skimage.data.coffee, skimage.data.chelsea)[seed % 3]()
    top, left = np.random.default_rng(seed).integers(0, np.array(source.shape[:2]) - (height, width) + 1)
    image = Image.fromarray(source[top : top + height, left : left + width])
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        return image
    return image.convert(mode)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def deep_colour(seed: int) -> bytes:
    file = io.BytesIO()
    values = np.asarray(photograph(24, 20, seed)).astype(np.uint16) * 257
    tifffile.imwrite(file, values, photometric="rgb", metadata=None)
    return file.getvalue()


def turned(orientation: int, format: str, seed: int, **options: Any) -> bytes:
    """One picture, stored so that a viewer which turns it by its tag shows it upright."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    image = photograph(22, 30, seed)
    image = image.transpose(undo[orientation]) if orientation in undo else image
    exif = Image.Exif()
    exif[274] = orientation
    return encoded(image, format, exif=exif, **options, **({"lossless": True} if format == "WEBP" else {}))


TURNED = {
    f"turned/{orientation}.{format.lower()}": turned(orientation, format, seed)
    for seed, format in enumerate(("PNG", "TIFF", "WEBP"))
    for orientation in range(1, 9)
}

GOOD = {
    **TURNED,
    "one pixel.png": encoded(photograph(1, 1), "PNG"),
    "a/tiny.jpg": encoded(photograph(5, 7, 1)),
    "a/face.jpg": encoded(photograph(48, 48, 2), quality=92),
    "a/b/c/wide.webp": encoded(photograph(100, 150, 3), "WEBP"),
    "large.png": encoded(photograph(260, 300, 4), "PNG"),
    "grey.jpg": encoded(photograph(48, 48, 5, "L")),
    "alpha.png": encoded(photograph(40, 52, 6, "RGBA"), "PNG"),
    "photo.tif": encoded(photograph(30, 20, 7), "TIFF"),
    "sixteen bit.png": encoded(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 163), "PNG"),
    "old.bmp": encoded(photograph(30, 20, 8), "BMP"),
    "a png in truth.jpg": encoded(photograph(9, 9, 9), "PNG"),
    "no extension": encoded(photograph(9, 9, 10)),
    "palette.png": encoded(photograph(20, 24, 11).quantize(64), "PNG"),
    "palette.bmp": encoded(photograph(20, 24, 12).quantize(256), "BMP"),
    "one picture.gif": encoded(photograph(20, 24, 13).quantize(200), "GIF"),
    "inks.jpg": encoded(photograph(24, 20, 14).convert("CMYK")),
    "inks.tif": encoded(photograph(24, 20, 15).convert("CMYK"), "TIFF"),
    "lab.tif": encoded(photograph(24, 20, 16).convert("LAB"), "TIFF"),
    "deep colour.tif": deep_colour(17),
    "photo.avif": encoded(photograph(24, 20, 18), "AVIF"),
    "photo.jp2": encoded(photograph(24, 20, 19), "JPEG2000"),
}
HOSTILE = {
    name: encoded(photograph(8, 8, seed))
    for seed, name in enumerate(
        [
            "a+b #1&c.jpg",
            "per%2Fcent%.jpg",
            "light \U0001f4a1.jpg",
            "<img onerror=r>.jpg",
            "'quo\"ted'.jpg",
            "..dots..in..it.jpg",
            "new\nline.jpg",
            "üml.JPG",
        ]
    )
}
ON_S3 = {key: data for key, data in HOSTILE.items() if "\n" not in key}  # moto's server cannot store those
LONG = b"Exif\0\0MM\0*\0\0\0\x08" + bytes(40_000)
LONG = b"\xff\xe1" + (len(LONG) + 2).to_bytes(2) + LONG
BROKEN = {
    "broken/cut off.jpg": (GOOD["a/face.jpg"][: len(GOOD["a/face.jpg"]) // 2], "truncated"),
    "broken/cut off.png": (GOOD["large.png"][:5000], "truncated"),
    "broken/empty.jpg": (b"", "not_an_image"),
    "broken/<script>alert(1)<b>.jpg": (b"no photograph, alas", "not_an_image"),
    "broken/animated.gif": (
        encoded(photograph(8, 8), "GIF", save_all=True, append_images=[photograph(8, 8, 1)]), "unsupported",
    ),
    "broken/sixteen bit.jp2": (
        encoded(Image.fromarray(np.full((8, 8), 40_000, np.uint16)), "JPEG2000"), "unsupported",
    ),
    "_restore": (GOOD["a/tiny.jpg"], "write"),  # the name of the ledger's folder
    "broken/over budget.png": (encoded(Image.new("RGB", (400, 300)), "PNG"), "too_large"),
    "broken/EXIF in two parts.jpg": (GOOD["a/face.jpg"][:2] + LONG + LONG + GOOD["a/face.jpg"][2:], "encode"),
}  # fmt: skip
TREE = {**GOOD, **HOSTILE, **{key: data for key, (data, _) in BROKEN.items()}}


@pytest.fixture(scope="module")
def run(local_ray: None, small_model: Models) -> Run:
    def restore(input: object, output: object, model: object = None, **options: Any) -> int:
        job = RestoreBucket(
            input=str(input), output=str(output), model=str(model or small_model(1)), device="cpu",
            **{"workers": "1", **options},
        )  # fmt: skip
        return restore_bucket.main(job)

    return restore


@pytest.fixture(scope="module")
def tree(run: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder with everything in it, and what became of it. Read-only."""
    root = tmp_path_factory.mktemp("tree")
    source, output = write_tree(root / "<script>in", TREE), root / "out"
    assert run(source, output, max_megapixels=0.1, batch_size=4) == 0
    return source, output


def files_of(root: Path) -> dict[str, bytes]:
    """What was written beside the ledger."""
    place = LocalStorage(root)
    return {item.key: place.read(item.key) for item in place.list() if not item.key.startswith("_restore/")}


def ledger_of(output: object) -> dict[str, Row]:
    """The ledger's rows by key, read from the files as they are."""
    place = open_storage(f"{output}/_restore/manifest/")
    filesystem, root = place.filesystem()
    tables = [pq.read_table(f"{root}/{item.key}", filesystem=filesystem) for item in place.list()]
    rows = manifest.rows_of(pa.concat_tables(tables))
    assert len({row.key for row in rows}) == len(rows), "a key has two rows"
    return {row.key: row for row in rows}


def assert_closed(output: Path, keys: set[str]) -> dict[str, Row]:
    """One row a key, no other; what is restored exists and hashes to its row; nothing else was written."""
    rows = ledger_of(output)
    assert rows.keys() == keys
    written = files_of(output)
    assert written.keys() == {row.output_key for row in rows.values() if row.status != "failed"}
    for row in rows.values():
        if row.status != "failed":
            assert row.output_key is not None
            assert hashlib.sha256(written[row.output_key]).hexdigest() == row.output_sha256
    return rows


# --- One folder with everything in it ------------------------------------------------------------------------------


def test_every_object_has_one_row_and_every_output_hashes_to_it(tree: tuple[Path, Path]) -> None:
    source, output = tree
    rows = assert_closed(output, set(TREE))
    for key, row in rows.items():
        data = TREE[key]
        assert row.size == len(data)
        assert row.etag == f"{(source / key).stat().st_mtime_ns:x}"
        assert row.attempt == 1 and row.node and row.finished_at and row.seconds is not None
        assert row.input_sha256 == hashlib.sha256(data).hexdigest()
    assert files_of(source) == TREE, "the input was touched"
    assert not list(output.parent.glob("[!<o]*")), "something was written outside"


@pytest.mark.parametrize("key", sorted({*GOOD, *HOSTILE} - {*TURNED}))
def test_a_photograph_keeps_name_format_size_and_mode(tree: tuple[Path, Path], key: str) -> None:
    _, output = tree
    before, after = (Image.open(io.BytesIO(data)) for data in (TREE[key], (output / key).read_bytes()))
    assert (after.format, after.size, after.mode) == (before.format, before.size, before.mode)
    row = ledger_of(output)[key]
    assert (row.status, row.error, row.output_key) == ("restored", None, key)
    assert (row.format, row.mode, row.width, row.height) == (before.format, before.mode, *before.size)
    assert row.change is not None and row.change > 0
    assert row.sigma is not None and row.flips is not None and row.patches is not None
    assert (row.gray is None) == (before.mode in ("L", "LA", "I;16"))  # a grey file has no colour to lose


@pytest.mark.parametrize("key", BROKEN)
def test_a_bad_file_is_a_row_with_a_reason(tree: tuple[Path, Path], key: str) -> None:
    row = ledger_of(tree[1])[key]
    assert (row.status, row.error) == ("failed", BROKEN[key][1])
    assert row.message and "\n" not in row.message
    assert row.output_key is row.output_sha256 is None


@pytest.mark.usefixtures("one_thread")
def test_the_pixels_are_those_of_the_network(tree: tuple[Path, Path], small_model: Models) -> None:
    from restore_core.inference import Restorer

    restorer = Restorer(checkpoint.read(str(small_model(1))))
    for key in ("large.png", "old.bmp", "photo.tif", "one pixel.png"):
        (expected,) = restorer([codec.decode(TREE[key]).pixels])
        np.testing.assert_array_equal(codec.decode((tree[1] / key).read_bytes()).pixels, expected.pixels)


@pytest.mark.parametrize("format", ["png", "tiff", "webp"])
def test_the_eight_orientations_of_a_picture_come_out_equal(tree: tuple[Path, Path], format: str) -> None:
    before, after = (
        [np.asarray(ImageOps.exif_transpose(Image.open(root / f"turned/{number}.{format}"))) for number in range(1, 9)]
        for root in tree
    )
    assert not np.array_equal(before[0], after[0])
    for number in range(1, 9):
        np.testing.assert_array_equal(before[number - 1], before[0])
        np.testing.assert_array_equal(after[number - 1], after[0])
        assert ledger_of(tree[1])[f"turned/{number}.{format}"].orientation == number


@pytest.mark.parametrize("format", ["JPEG", "AVIF"])
@pytest.mark.usefixtures("one_thread")
def test_those_of_formats_that_lose_a_little_come_out_almost_equal(format: str, small_model: Models) -> None:
    from restore_core.inference import Restorer

    restorer = Restorer(checkpoint.read(str(small_model(1))))
    finest = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}[format]
    results = []
    for orientation in range(1, 9):
        source = turned(orientation, format, 3, **finest)
        picture = codec.decode(source)
        assert (picture.orientation or 1) == orientation
        (restored,) = restorer([picture.shown])
        after = codec.encode(picture.stored(restored.pixels), source, picture=picture, software="x")
        results.append(np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(after)))).astype(int))
        assert np.abs(results[-1] - restored.pixels).mean() < 3
    assert max(np.abs(result - results[0]).mean() for result in results) < 3


def test_alpha_is_untouched(tree: tuple[Path, Path]) -> None:
    before, after = (codec.decode(data) for data in (TREE["alpha.png"], (tree[1] / "alpha.png").read_bytes()))
    np.testing.assert_array_equal(before.alpha, after.alpha)
    assert not np.array_equal(before.pixels, after.pixels)


def test_the_file_says_which_model_restored_it(tree: tuple[Path, Path]) -> None:
    model = ledger_of(tree[1])["a/face.jpg"].model
    for key in ("a/face.jpg", "alpha.png", "a/b/c/wide.webp", "photo.tif", "photo.avif"):
        with Image.open(tree[1] / key) as image:
            assert image.getexif()[305] == f"restore_core (model {model[:12]})", key


def test_the_record_and_the_report_close(tree: tuple[Path, Path], small_model: Models) -> None:
    output = tree[1]
    record = json.loads((output / "_restore/run.json").read_text())
    assert record["listed"] == len(TREE) == sum(record["statuses"].values())
    assert record["statuses"] == {"failed": len(BROKEN), "restored": len(GOOD) + len(HOSTILE)}
    assert record["errors"] == {
        "encode": 1, "not_an_image": 2, "too_large": 1, "truncated": 2, "unsupported": 2, "write": 1,
    }  # fmt: skip
    assert record["model"]["sha256"] == checkpoint.read(str(small_model(1))).sha256
    assert record["options"]["max_pixels"] == 100_000
    page = (output / "_restore/report.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"'](?!data:)", page), "the page needs another file"
    assert "url(" not in page
    assert "<script" not in page
    assert page.count('alt="before"') == 12
    for error in record["errors"]:
        assert f"<td>{error}</td>" in page


def test_the_page_shows_pictures_the_way_up_that_viewers_do(tree: tuple[Path, Path]) -> None:
    page = (tree[1] / "_restore/report.html").read_text()
    assert "of a list" not in page
    pictures = {
        key: [Image.open(io.BytesIO(base64.b64decode(data))).size for data in re.findall(r'base64,([^"]+)"', figure)]
        for figure in re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
        for key in re.findall(r"turned/[5-8][.]\w+", figure)
    }
    assert pictures and all(sizes == [(30, 22)] * 2 for sizes in pictures.values()), pictures


def test_keys_cannot_inject_html(tree: tuple[Path, Path]) -> None:
    """As an example of a failure, as the caption of a sample and as the name of the input."""
    page = (tree[1] / "_restore/report.html").read_text()
    for text in ("/&lt;script&gt;in", "&lt;script&gt;alert(1)", "&lt;img onerror=r&gt;.jpg"):
        assert text in page
    assert "<script" not in page and "<img onerror" not in page


def test_separate_processes_give_the_same_bytes(tree: tuple[Path, Path], tmp_path: Path, small_model: Models) -> None:
    """The plan for GPUs (decode, restore and write apart), on CPUs."""
    from restore_core.pipelines.restoration import build_dataset, object_units
    from restore_core.pipelines.stages import RestoreRun

    source = LocalStorage(tree[0])
    plan = RestoreRun(
        input=source, output=LocalStorage(tmp_path), model=checkpoint.read(str(small_model(1))), device="cpu",
        threads=1, max_pixels=100_000, strip_metadata=False,
    )  # fmt: skip
    rows = [
        Row(key=item.key, size=item.size, etag=item.etag, model=plan.model.sha256, options="o", run_id="r")
        for item in source.list()
    ]
    dataset = build_dataset(list(object_units(rows, 4, 1)), plan, actors=1, batch_size=4, separate=True)
    found = [row for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow") for row in
             manifest.rows_of(table)]  # fmt: skip
    assert files_of(tmp_path) == files_of(tree[1])
    fused = ledger_of(tree[1])
    assert len(found) == len(fused)
    for row in found:
        other = fused[row.key]
        for name in (
            "status",
            "error",
            "message",
            "input_sha256",
            "output_sha256",
            "format",
            "mode",
            "width",
            "height",
        ):
            assert getattr(row, name) == getattr(other, name), (row.key, name)
        assert (row.sigma is None) == (other.sigma is None)
        assert row.sigma is None or row.sigma == pytest.approx(other.sigma, rel=1e-4)


@pytest.mark.parametrize(
    "key",
    [
        "alpha.png",
        "grey.jpg",
        "sixteen bit.png",
        "deep colour.tif",
        "inks.tif",
        "lab.tif",
        "palette.png",
        "turned",
        "two",
    ],
)
def test_nothing_is_lost_between_processes(key: str) -> None:
    from restore_core.pipelines import stages

    turned = Image.Exif()
    turned[274] = 6
    special = {
        "turned": encoded(photograph(9, 7), exif=turned),
        "two": encoded(photograph(8, 8), "GIF", save_all=True, append_images=[photograph(8, 8, 1)]),
    }
    data = special[key] if key in special else GOOD[key]
    picture = codec.decode(data, frames="first")
    assert picture.left_out == (key == "two")
    row = Row(key=key, size=len(data), etag="e", model="m", options="o", run_id="r")
    row.format, row.mode, row.orientation = picture.format, picture.mode, picture.orientation
    row.width, row.height = picture.width, picture.height
    item = stages.Item(row, data, picture, 255 - picture.pixels)
    (after,) = stages.items_of_table(stages.items_to_table([item]))
    assert (after.row, after.source) == (row, data)
    assert after.picture is not None and after.restored is not None
    np.testing.assert_array_equal(after.restored, item.restored)
    for name, value in vars(picture).items():
        np.testing.assert_array_equal(getattr(after.picture, name), value, name)


def test_frames_and_pages_are_restored_one_by_one(
    tmp_path: Path, run: Run, small_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray.data

    from restore_core.pipelines.restoration import build_dataset, object_units
    from restore_core.pipelines.stages import RestoreRun

    pages = [photograph(20, 24, 1), photograph(9, 5, 2, "L"), photograph(30, 30, 3, "RGBA")]
    files = {
        "animated.gif": encoded(photograph(8, 8), "GIF", save_all=True, append_images=[photograph(8, 8, 1)]),
        "clear.webp": encoded(photograph(8, 8, 2, "RGBA"), "WEBP", save_all=True, append_images=[photograph(8, 8, 1)]),
        "pages.tif": encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]),
        "one.jpg": GOOD["a/tiny.jpg"],
    }
    source = write_tree(tmp_path / "in", files)
    assert run(source, tmp_path / "out", max_failed_share=1.0) == 0
    assert {key: row.error for key, row in ledger_of(tmp_path / "out").items()} == {
        "animated.gif": "unsupported", "clear.webp": "unsupported", "one.jpg": None, "pages.tif": "unsupported",
    }  # fmt: skip
    assert run(source, tmp_path / "out", frames="all") == 0
    rows = assert_closed(tmp_path / "out", set(files))
    assert {row.status for row in rows.values()} == {"restored"}
    assert (rows["pages.tif"].width, rows["pages.tif"].height, rows["pages.tif"].mode) == (24, 20, "RGB")
    assert {key: row.format for key, row in rows.items()} == {
        "animated.gif": "GIF", "clear.webp": "WEBP", "one.jpg": "JPEG", "pages.tif": "TIFF",
    }  # fmt: skip
    assert rows["clear.webp"].mode == "RGBA"
    with Image.open(tmp_path / "out/animated.gif") as image:
        assert image.n_frames == 2
    with Image.open(tmp_path / "out/pages.tif") as image:
        for index, page in enumerate(pages):
            image.seek(index)
            assert (image.size, image.mode) == (page.size, page.mode)
            assert not np.array_equal(np.asarray(image), np.asarray(page))
    plan = RestoreRun(
        input=LocalStorage(source), output=LocalStorage(tmp_path / "gpu"), model=checkpoint.read(str(small_model(1))),
        device="cpu", threads=1, max_pixels=100_000, strip_metadata=False, frames="all",
    )  # fmt: skip
    work = [
        Row(key=row.key, size=row.size, etag=row.etag, model=row.model, options="o", run_id="r")
        for row in rows.values()
    ]
    # Ray cuts tables of more than this, between any two rows of them.
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 5000)
    dataset = build_dataset(list(object_units(work, 4, 1)), plan, actors=1, batch_size=4, separate=True)
    found = [
        row
        for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow")
        for row in manifest.rows_of(table)
    ]
    assert {row.key: row.output_sha256 for row in found} == {key: row.output_sha256 for key, row in rows.items()}
    assert {row.key: (row.format, row.mode) for row in found} == {
        row.key: (row.format, row.mode) for row in rows.values()
    }
    assert run(source, tmp_path / "out", frames="first") == 0
    rows = assert_closed(tmp_path / "out", set(files))
    assert rows["pages.tif"].message == "the first of 3 frames or pages; the others are left out"
    with Image.open(tmp_path / "out/pages.tif") as image:
        assert image.n_frames == 1


@pytest.mark.parametrize(("device", "lost"), [("cuda", True), ("cuda", False), ("cpu", True)])
def test_a_process_whose_gpu_is_lost_ends(
    device: str, lost: bool, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What CUDA calls sticky errors: all later calls of the process fail too, whatever the photograph."""
    import torch

    from restore_core.pipelines.restoration import fresh_after_errors

    def fail() -> None:
        if lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def end(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(torch.cuda, "synchronize", fail)
    monkeypatch.setattr(os, "_exit", end)
    ends = device == "cuda" and lost
    with pytest.raises(SystemExit if ends else RuntimeError), fresh_after_errors(device):
        raise RuntimeError("CUDA error: as seen at some other call")
    assert ("as seen at some other call" in capfd.readouterr().err) == ends


# --- Started again -------------------------------------------------------------------------------------------------


def times_of(root: Path) -> dict[str, int]:
    return {key: (root / key).stat().st_mtime_ns for key in files_of(root)}


def test_what_is_done_stays_done_and_what_has_changed_is_redone(
    tmp_path: Path, run: Run, small_model: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {f"{index}.jpg": encoded(photograph(12, 12, index)) for index in range(4)} | {"5.jpg": b"not a photograph"}
    source, output = write_tree(tmp_path / "in", files), tmp_path / "out"

    def changed_by(**options: Any) -> tuple[set[str], set[str]]:
        """Files written, and keys with another attempt."""
        before, rows = times_of(output), ledger_of(output) if output.exists() else {}
        assert run(source, output, **options) == 0
        after = times_of(output)
        written = {key for key, at in after.items() if before.get(key) != at}
        later = assert_closed(output, {item.key for item in LocalStorage(source).list()})
        return written, {key for key, row in later.items() if key not in rows or rows[key].attempt != row.attempt}

    good = {"0.jpg", "1.jpg", "2.jpg", "3.jpg"}
    assert changed_by() == (good, {*good, "5.jpg"})
    capsys.readouterr()
    assert changed_by() == (set(), set())
    assert "5 objects: 1 failed, 4 restored (5 by earlier runs)" in capsys.readouterr().out

    (output / "0.jpg").unlink()
    (source / "1.jpg").write_bytes(encoded(photograph(14, 14, 7)))
    (source / "new.jpg").write_bytes(encoded(photograph(9, 9, 8)))
    assert changed_by() == ({"0.jpg", "1.jpg", "new.jpg"},) * 2
    assert ledger_of(output)["1.jpg"].width == 14
    assert changed_by(retry_failed="truncated,read") == (set(), set())
    assert changed_by(retry_failed="not_an_image") == (set(), {"5.jpg"})
    assert ledger_of(output)["5.jpg"].attempt == 2

    everything = {*good, "new.jpg"}
    assert changed_by(strip_metadata=True) == (everything, {*everything, "5.jpg"})
    assert changed_by(strip_metadata=True, model=small_model(2)) == (everything, {*everything, "5.jpg"})
    assert changed_by(strip_metadata=True, model=small_model(2), precision="bfloat16")[0] == everything


def test_waves_make_no_difference(
    tree: tuple[Path, Path], tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restore_core.pipelines import restoration

    monkeypatch.setattr(restoration, "WAVE_OBJECTS", 10)
    monkeypatch.setattr(restoration, "WAVE_SHARE", 20)
    wave, processes, waves = restoration._restore_wave, cluster.processes, []

    def one_after_the_other(*arguments: Any) -> None:
        waves.append(arguments)
        wave(*arguments)

    def with_a_node_that_is_lost(device: Literal["cpu", "cuda"], wanted: int | None, *, cpus_each: int) -> int:
        if waves and wanted is not None:
            raise UsageError(f"--workers {wanted}: the cluster has 1 CPU")
        return 1 if waves else processes(device, wanted, cpus_each=cpus_each)

    monkeypatch.setattr(restoration, "_restore_wave", one_after_the_other)
    monkeypatch.setattr(cluster, "processes", with_a_node_that_is_lost)
    source, output = tree[0], tmp_path / "out"
    assert run(source, output, max_megapixels=0.1, batch_size=4, workers="2") == 0
    sizes = [len(arguments[0].rows) for arguments in waves]
    assert sizes[:2] == [10, 40] and 0 < sizes[2] <= 20 and sum(sizes) == len(TREE)  # of two processes, of one
    waves.clear()
    assert_closed(output, set(TREE))
    assert files_of(output) == files_of(tree[1])
    pages = [(place / "_restore/report.html").read_text() for place in (output, tree[1])]
    captions = [re.findall(r"<figcaption>.*?</figcaption>", page, re.DOTALL) for page in pages]
    assert captions[0] == captions[1]
    record, other = (json.loads((place / "_restore/run.json").read_text()) for place in (output, tree[1]))
    for name in ("listed", "already_done", "statuses", "errors", "stopped"):
        assert record[name] == other[name]
    (output / "a/face.jpg").unlink()
    assert run(source, output, max_megapixels=0.1, batch_size=4) == 0
    assert files_of(output) == files_of(tree[1])
    assert json.loads((output / "_restore/run.json").read_text())["already_done"] == len(TREE) - 1


def test_the_work_begins_before_the_listing_ends(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tree(tmp_path / "in", {f"{index}.png": GOOD["one pixel.png"] for index in range(6)})
    output = tmp_path / "out"
    listed, written = LocalStorage.list, []

    def slow(self: LocalStorage, *arguments: Any, **options: Any) -> Iterator[Object]:
        for item in listed(self, *arguments, **options):
            if self.root == source:
                time.sleep(0.6)
                written.append(len(files_of(output)))
            yield item

    monkeypatch.setattr(LocalStorage, "list", slow)
    assert run(source, output) == 0
    assert written[0] == 0 and 0 < written[-1] < 6
    assert_closed(output, {f"{index}.png" for index in range(6)})


def test_an_output_that_was_begun_with_other_options_is_not_believed(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with other options dies when outputs are written and their rows are not; then the former come back."""
    files = {f"{index}.png": encoded(photograph(20, 24, index), "PNG") for index in range(3)} | {"bad.png": b"?"}
    source, output = write_tree(tmp_path / "in", files), tmp_path / "out"
    assert run(source, output) == 0
    former, rows = files_of(output), ledger_of(output)

    class Died(Exception):
        pass

    real = manifest.Ledger.append

    def die(self: manifest.Ledger, new: list[Row]) -> None:
        if any(row.status for row in new):
            raise Died
        real(self, new)

    with monkeypatch.context() as patched:
        patched.setattr(manifest.Ledger, "append", die)
        with pytest.raises(Died):
            run(source, output, repair="noise", model="faces")
    assert ledger_of(output) == rows
    assert files_of(output) != former, "it was not in the middle"
    (tmp_path / "keys").write_text("0.png\n")
    assert run(source, output, keys=str(tmp_path / "keys")) == 0  # which says nothing of the others
    assert run(source, output) == 0
    assert files_of(output) == former
    later = assert_closed(output, set(files))
    assert {row.attempt for row in later.values()} == {3}
    assert not list((output / "_restore/begun").glob("*"))
    assert run(source, output) == 0
    assert ledger_of(output) == later


def test_only_the_listed_keys_are_restored(tmp_path: Path, run: Run, tree: tuple[Path, Path]) -> None:
    names = ["a/face.jpg", "light \U0001f4a1.jpg", "gone.jpg", "../outside.jpg", "a/face.jpg"]
    (tmp_path / "list").write_text("\n".join(names))
    output = tmp_path / "out"
    noted = Listed(LocalStorage(tree[0]), LocalStorage(output), "interrupted", resume=True)._ledger
    noted.append([Row(key="a", size=1, etag="e", model="", options="", run_id="interrupted")])
    assert run(tree[0], output, keys=str(tmp_path / "list")) == 0
    assert len(noted.latest()) == 1
    assert "photographs of a list" in (output / "_restore/report.html").read_text()
    rows = assert_closed(output, set(names))
    assert {key: row.error for key, row in rows.items() if row.error} == {
        "gone.jpg": "vanished", "../outside.jpg": "read",
    }  # fmt: skip
    assert files_of(output) == {key: data for key, data in files_of(tree[1]).items() if key in names}
    listed = {"input": str(tree[0]), "output": str(output), "keys": str(tmp_path / "list")}
    assert verify_bucket.main(verify_bucket.VerifyBucket(**listed)) == 0
    assert run(tree[0], output, max_megapixels=0.1) == 0  # now the others
    assert len(noted.latest()) == 0
    rows = ledger_of(output)
    assert rows["a/face.jpg"].attempt == 1 and rows.keys() == {*TREE, *names}
    assert json.loads((output / "_restore/run.json").read_text())["listed"] == len(TREE)


def test_a_list_of_keys_may_be_older_than_the_objects(tmp_path: Path, run: Run, tree: tuple[Path, Path]) -> None:
    """As an S3 Inventory, which is made once a day. What was replaced since is done once, as it is now."""
    source, output = (
        write_tree(tmp_path / "in", {"a.png": GOOD["large.png"], "b.png": GOOD["one pixel.png"]}),
        tmp_path / "out",
    )
    versions = [LocalStorage(source).stat("a.png"), Object("b.png", 7, "older")]
    lines = "".join(f"{item.key},{item.size},{item.etag}\n" for item in versions)
    (tmp_path / "list.csv").write_text("key,size,etag\n" + lines)
    listed = {"input": str(source), "output": str(output), "keys": str(tmp_path / "list.csv")}
    for _ in range(2):
        assert run(source, output, keys=listed["keys"]) == 0
        assert {row.attempt for row in ledger_of(output).values()} == {1}
        assert verify_bucket.main(verify_bucket.VerifyBucket(**listed)) == 0
    (source / "b.png").write_bytes(GOOD["a/tiny.jpg"])
    assert verify_bucket.main(verify_bucket.VerifyBucket(**listed)) == 1
    assert run(source, output, keys=listed["keys"]) == 0
    assert {key: row.attempt for key, row in ledger_of(output).items()} == {"a.png": 1, "b.png": 2}
    assert verify_bucket.main(verify_bucket.VerifyBucket(**listed)) == 0


def test_only_chosen_damages_are_repaired(tmp_path: Path, run: Run) -> None:
    """With the bundled model. What has only damages that are not to be repaired is copied."""
    crop = Image.fromarray(skimage.data.astronaut()).crop((135, 5, 315, 185))
    face = np.asarray(crop.resize((96, 96), Image.Resampling.LANCZOS))
    gray = np.repeat(np.asarray(Image.fromarray(face).convert("L"))[:, :, None], 3, axis=2)
    noise = np.random.default_rng(0).normal(0, 25, face.shape)
    images = {"noisy": face + noise, "gray": gray, "gray_and_noisy": gray + noise, "good": face}
    pictures = {name: Image.fromarray(image.round().clip(0, 255).astype(np.uint8)) for name, image in images.items()}
    files = {f"{name}.png": encoded(picture, "PNG") for name, picture in pictures.items()}
    source, output = write_tree(tmp_path / "in", files), tmp_path / "out"

    def restored(**options: Any) -> dict[str, np.ndarray]:
        assert run(source, output, "faces", **options) == 0
        changed = {key for key, row in ledger_of(output).items() if row.status == "restored"}
        return {key.removesuffix(".png"): codec.decode((output / key).read_bytes()).pixels for key in changed}

    def error(image: np.ndarray) -> float:
        return float(np.abs(image.astype(float) - face).mean())

    def colour(image: np.ndarray) -> float:
        return float((image.max(axis=2).astype(int) - image.min(axis=2)).mean())

    everything = restored()
    assert everything.keys() == {"noisy", "gray", "gray_and_noisy"}
    assert error(everything["noisy"]) < error(images["noisy"]) / 3 and colour(everything["gray"]) > 10
    noise_only = restored(repair="noise")
    assert noise_only.keys() == {"noisy", "gray_and_noisy"}
    assert colour(noise_only["gray_and_noisy"]) == 0
    gray_only = restored(repair="gray, gray")
    assert gray_only.keys() == {"gray", "gray_and_noisy"}
    assert colour(gray_only["gray_and_noisy"]) > 10
    with pytest.raises(
        UsageError, match="--repair dust: no such kind of damage; name some of noise,flips,patches,gray"
    ):
        run(source, output, "faces", repair="noise,dust")


def test_a_folder_that_cannot_be_listed_hides_no_other(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = dict.fromkeys(("a.jpg", "closed/b.jpg", "z.jpg"), GOOD["a/tiny.jpg"])
    source, output = write_tree(tmp_path / "in", files), tmp_path / "out"
    scandir = os.scandir

    def refusing(path: Any = ".") -> Any:
        if str(path) == str(source / "closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    proof = verify_bucket.VerifyBucket(input=str(source), output=str(output))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        assert run(source, output) == 0
        rows = assert_closed(output, {"a.jpg", "closed/", "z.jpg"})
        assert {key for key, row in rows.items() if row.status == "failed"} == {"closed/"}
        assert rows["closed/"].error == "read"  # its workers, in which nothing is patched, could list it
        assert verify_bucket.main(proof) == 0
    assert run(source, output) == 0
    assert files_of(output).keys() == files.keys()
    assert verify_bucket.main(proof) == 0

    (source / "closed/b.jpg").rename(source / "closed/b.parquet")
    for key in ("a.jpg", "z.jpg"):
        (source / key).unlink()
    monkeypatch.setattr(os, "scandir", refusing)
    (source / "c.parquet").write_bytes(b"")
    with pytest.raises(StorageError, match=r"cannot list .*/closed/; fix its permissions or move it away"):
        run(source, output)


def test_a_ledger_that_does_not_close_is_told(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where rows of objects that are gone make up for the number."""
    old = {f"old {index}.jpg": GOOD["a/tiny.jpg"] for index in range(3)}
    source, output = write_tree(tmp_path / "in", old), tmp_path / "out"
    assert run(source, output) == 0
    for key in old:
        (source / key).unlink()
    write_tree(source, {f"{index}.jpg": GOOD["a/tiny.jpg"] for index in range(3)})
    append = Ledger.append

    def losing(self: Ledger, rows: list[Row]) -> None:
        append(self, [row for row in rows if row.key != "1.jpg"])

    monkeypatch.setattr(Ledger, "append", losing)
    assert run(source, output) == 1
    told = "stopped: the ledger does not close: of 3 objects 3 have a row, and of the 3 rows of this run 2 are written"
    assert told in capsys.readouterr().out
    assert json.loads((output / "_restore/run.json").read_text())["stopped"].startswith("the ledger does not close")
    monkeypatch.undo()
    assert run(source, output) == 0
    assert verify_bucket.main(verify_bucket.VerifyBucket(input=str(source), output=str(output))) == 0


def test_too_many_failures_are_exit_code_1(tree: tuple[Path, Path], tmp_path: Path, run: Run) -> None:
    source, output = tree
    shutil.copytree(output, tmp_path / "out")
    for key in GOOD:  # damaged since: not redone by this job, and no reason to fail
        (tmp_path / "out" / key).write_bytes(b"")
    assert run(source, tmp_path / "out", max_megapixels=0.1, max_failed_share=0.1) == 1
    record = json.loads((tmp_path / "out/_restore/run.json").read_text())
    assert record["already_done"] == len(TREE) and record["statuses"]["failed"] == len(BROKEN)


def test_a_hopeless_run_is_stopped_with_a_verdict(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from restore_core.pipelines import account

    assert account.VERDICT_ROWS == 1000 and RestoreBucket(input="a", output="b").max_failed_share == 0.5
    monkeypatch.setattr(account, "VERDICT_ROWS", 8)
    files = {f"{index:02}.jpg": b"?" if index < 30 else GOOD["a/tiny.jpg"] for index in range(40)}
    source, output = write_tree(tmp_path / "in", files), tmp_path / "out"
    assert run(source, output, batch_size=2, max_failed_share=0.6) == 1
    record = json.loads((output / "_restore/run.json").read_text())
    rows = ledger_of(output)
    assert 8 <= len(rows) < 40
    assert record["statuses"] == {"failed": len(rows)}
    verdict = f"{len(rows)} of the first {len(rows)} objects failed, more than --max-failed-share 0.6; {40 - len(rows)}"
    assert record["stopped"].startswith(verdict)
    assert f"stopped: {verdict}" in capsys.readouterr().out
    assert "stopped: " in (output / "_restore/report.html").read_text()

    assert run(source, output, batch_size=2, max_failed_share=1) == 0  # not again what has failed already
    assert {row.attempt for row in assert_closed(output, set(files)).values()} == {1}
    assert json.loads((output / "_restore/run.json").read_text())["stopped"] is None


def test_what_would_change_too_much_is_not_written(tmp_path: Path, run: Run) -> None:
    keys = ("a/face.jpg", "large.png", "alpha.png")
    source, output = write_tree(tmp_path / "in", {key: GOOD[key] for key in keys}), tmp_path / "out"
    assert run(source, output) == 0
    changes = {key: row.change for key, row in ledger_of(output).items() if row.change is not None}
    limit = sorted(changes.values())[0]
    assert 0 < limit < max(changes.values())
    shutil.rmtree(output)
    assert run(source, output, max_change=limit, max_failed_share=1) == 0
    rows = assert_closed(output, set(keys))
    kept = {key for key, change in changes.items() if change > limit}
    assert {key for key, row in rows.items() if row.status == "failed"} == kept
    for key in kept:
        assert rows[key].error == "model" and "over --max-change; the original is kept" in str(rows[key].message)
    assert {key: row.change for key, row in rows.items()} == changes
    assert run(source, output) == 0  # another option, so all of it is done again
    assert {row.status for row in assert_closed(output, set(keys)).values()} == {"restored"}
    # What the run before has written is not left there, except of a version of the photograph that there is no more.
    replaced = sorted(kept)[0]
    time.sleep(0.01)
    (source / replaced).write_bytes(GOOD[replaced])
    former = (output / replaced).read_bytes()
    assert run(source, output, max_change=limit, max_failed_share=1) == 0
    assert {key for key, row in ledger_of(output).items() if row.status == "failed"} == kept
    assert files_of(output).keys() == set(keys) - kept | {replaced}
    assert (output / replaced).read_bytes() == former


def test_undamaged_photographs_are_copied_byte_for_byte(tmp_path: Path, run: Run) -> None:
    """By a network that changes nothing: the tail is zero but for a gate that says all pixels survived."""
    import torch

    config = ResidualUNetConfig(channels=(4,), blocks=(1,))
    model = build(config)
    torch.nn.init.zeros_(model.tail.weight)
    torch.nn.init.zeros_(model.tail.bias)
    model.tail.bias.data[6] = 20.0
    checkpoint.save(model, config, {}, tmp_path / "identity")
    files = {key: GOOD[key] for key in ("a/face.jpg", "a/b/c/wide.webp", "grey.jpg", "alpha.png")}
    source = write_tree(tmp_path / "in", files)
    assert run(source, tmp_path / "out", tmp_path / "identity") == 0
    rows = assert_closed(tmp_path / "out", set(files))
    assert {key: row.status for key, row in rows.items()} == dict.fromkeys(files, "unchanged")
    assert {row.change for row in rows.values()} == {0.0}
    assert files_of(tmp_path / "out") == files

    camera = Image.Exif()
    camera[271], camera[274] = "Camera", 6
    with_exif = encoded(photograph(48, 48, 2), quality=92, exif=camera)
    (source / "a/face.jpg").write_bytes(with_exif)
    assert run(source, tmp_path / "out", tmp_path / "identity", strip_metadata=True) == 0
    assert {row.status for row in assert_closed(tmp_path / "out", set(files)).values()} == {"unchanged"}
    stripped = (tmp_path / "out/a/face.jpg").read_bytes()
    assert dict(Image.open(io.BytesIO(stripped)).getexif()) == {274: 6}
    np.testing.assert_array_equal(codec.decode(stripped).pixels, codec.decode(with_exif).pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e9])
def test_a_network_that_has_gone_bad_writes_nothing(tmp_path: Path, run: Run, value: float) -> None:
    import torch

    config = ResidualUNetConfig(channels=(4,), blocks=(1,))
    model = build(config)
    torch.nn.init.constant_(model.tail.bias, value)
    checkpoint.save(model, config, {}, tmp_path / "spoilt")
    source = write_tree(tmp_path / "in", {"a.jpg": GOOD["a/face.jpg"], "b.jpg": GOOD["a/tiny.jpg"]})
    assert run(source, tmp_path / "out", tmp_path / "spoilt") == 1
    rows = assert_closed(tmp_path / "out", {"a.jpg", "b.jpg"})
    assert {(row.status, row.error) for row in rows.values()} == {("failed", "model")}


# --- Places --------------------------------------------------------------------------------------------------------


def test_a_bucket_becomes_another_prefix(s3: str, moto_client: "S3Client", run: Run) -> None:
    files = {**ON_S3, "deep/er/photo.png": GOOD["large.png"], "broken.jpg": b"", "folder/": b""}
    for key, data in files.items():
        moto_client.put_object(Bucket="photos", Key=f"raw/{key}", Body=data)
    moto_client.put_object(Bucket="photos", Key="rawhide.jpg", Body=GOOD["a/face.jpg"])  # not under raw/
    assert run("s3://photos/raw", "s3://photos/restored/2026") == 0
    rows = ledger_of("s3://photos/restored/2026")
    assert rows.keys() == files.keys() - {"folder/"}
    for key, row in rows.items():
        assert row.etag == moto_client.head_object(Bucket="photos", Key=f"raw/{key}")["ETag"].strip('"')
        if key == "broken.jpg":
            assert (row.status, row.error) == ("failed", "not_an_image")
            continue
        body = moto_client.get_object(Bucket="photos", Key=f"restored/2026/{key}")["Body"].read()
        assert hashlib.sha256(body).hexdigest() == row.output_sha256
    listed = {item.key for item in open_storage("s3://photos/restored/2026/").list()}
    own = {key for key in listed if key.startswith("_restore/")}
    assert listed - own == rows.keys() - {"broken.jpg"}
    assert {"_restore/run.json", "_restore/report.html"} < own


def test_a_folder_becomes_a_bucket_and_the_model_may_lie_there(
    s3: str, moto_client: "S3Client", run: Run, tmp_path: Path, small_model: Models
) -> None:
    for file in small_model(1).iterdir():
        moto_client.put_object(Bucket="photos", Key=f"models/mine/{file.name}", Body=file.read_bytes())
    source = write_tree(tmp_path / "in", ON_S3)
    assert run(source, "s3://photos", "s3://photos/models/mine") == 0
    rows = ledger_of("s3://photos")
    assert rows.keys() == ON_S3.keys()
    for key, row in rows.items():
        body = moto_client.get_object(Bucket="photos", Key=key)["Body"].read()
        assert hashlib.sha256(body).hexdigest() == row.output_sha256


def test_a_single_file_is_restored_alone(tmp_path: Path, run: Run) -> None:
    source = write_tree(tmp_path / "in", {"me.jpg": GOOD["a/face.jpg"], "not me.jpg": GOOD["a/tiny.jpg"]})
    assert run(source / "me.jpg", tmp_path / "out", workers="auto") == 0
    assert_closed(tmp_path / "out", {"me.jpg"})


# --- Parquet -------------------------------------------------------------------------------------------------------


def dataset_table(count: int) -> pa.Table:
    rows = [
        sources.dataset_row(f"Person_{index % 3}/{index}.jpg", "train", encoded(photograph(10 + index, 12, index)))
        for index in range(count)
    ]
    return pa.Table.from_pylist(rows, schema=sources.DATASET_SCHEMA)


def test_our_own_dataset_comes_back_with_other_images(tmp_path: Path, run: Run) -> None:
    table = dataset_table(7)
    bad = pa.array([*table["image"].to_pylist()[:5], b"not a photograph", b"\xff\xd8\xff"], pa.binary())
    table = table.set_column(3, sources.DATASET_SCHEMA.field("image"), bad)
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/train-00000.parquet", row_group_size=4)
    assert run(tmp_path / "in", tmp_path / "out") == 0
    rows = ledger_of(tmp_path / "out")
    assert rows.keys() == set(table["key"].to_pylist())
    parts = sorted((tmp_path / "out").glob("*.parquet"))
    assert [part.name for part in parts] == ["train-00000-00000.parquet", "train-00000-00001.parquet"]
    restored = pa.concat_tables(pq.read_table(part) for part in parts)
    assert restored.schema.equals(table.schema)
    assert restored.drop_columns("image").equals(table.drop_columns("image"))
    assert restored["image"].to_pylist()[5:] == table["image"].to_pylist()[5:], "failed rows keep their bytes"
    for key, before, after in zip(
        table["key"].to_pylist()[:5], table["image"].to_pylist(), restored["image"].to_pylist(), strict=False
    ):
        assert rows[key].output_sha256 == hashlib.sha256(after).hexdigest()
        assert rows[key].input_sha256 == hashlib.sha256(before).hexdigest()
        assert Image.open(io.BytesIO(after)).size == Image.open(io.BytesIO(before)).size
    assert [rows[key].error for key in table["key"].to_pylist()[5:]] == ["not_an_image", "truncated"]
    times = {part: part.stat().st_mtime_ns for part in parts}
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert {part: part.stat().st_mtime_ns for part in parts} == times
    parts[1].unlink()
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert parts[1].exists() and parts[0].stat().st_mtime_ns == times[parts[0]]
    assert pa.concat_tables(pq.read_table(part) for part in parts).equals(restored)
    assert ledger_of(tmp_path / "out").keys() == rows.keys()

    pq.write_table(table, tmp_path / "in/train-00000.parquet", row_group_size=7)
    (tmp_path / "in/_pack").mkdir()
    (tmp_path / "in/_pack/broken.csv").write_text("key,error,message")
    assert run(tmp_path / "in", tmp_path / "out") == 0
    assert [part.name for part in (tmp_path / "out").glob("*.parquet")] == ["train-00000.parquet"], "rows are doubled"
    assert pq.read_table(tmp_path / "out/train-00000.parquet")["key"].to_pylist() == table["key"].to_pylist()
    assert ledger_of(tmp_path / "out").keys() == rows.keys()


def test_renamed_files_of_a_dataset_do_not_cost_each_other(tmp_path: Path, run: Run) -> None:
    table = dataset_table(4)
    source, output = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(table.slice(0, 2), source / "part-0.parquet")
    assert run(source, output) == 0
    (source / "part-0.parquet").rename(source / "part-1.parquet")  # the same version of it
    pq.write_table(table.slice(2), source / "part-0.parquet")
    assert run(source, output) == 0
    assert {key: row.output_key for key, row in ledger_of(output).items()} == {
        key: f"part-{1 - index // 2}.parquet" for index, key in enumerate(table["key"].to_pylist())
    }
    assert verify_bucket.main(verify_bucket.VerifyBucket(input=str(source), output=str(output))) == 0
    (source / "part-0.parquet").rename(source / "b.parquet")
    assert run(source, output) == 0
    assert sorted(path.name for path in output.glob("*.parquet")) == ["b.parquet", "part-1.parquet"]
    assert verify_bucket.main(verify_bucket.VerifyBucket(input=str(source), output=str(output))) == 0


def proof(source: Path, output: Path) -> int:
    return verify_bucket.main(verify_bucket.VerifyBucket(input=str(source), output=str(output)))


def test_rows_that_have_left_a_dataset_are_not_believed_when_they_come_back(tmp_path: Path, run: Run) -> None:
    table, source, output = dataset_table(4), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    latest, former = source / "latest.parquet", tmp_path / "former.parquet"
    pq.write_table(table.slice(0, 2), latest)
    assert run(source, output) == 0
    written = (output / "latest.parquet").read_bytes()
    latest.rename(former)
    pq.write_table(table.slice(2), latest)
    assert run(source, output) == 0
    assert sorted(ledger_of(output)) == sorted(table["key"].to_pylist()[2:]) and proof(source, output) == 0
    former.rename(latest)  # the same version
    assert run(source, output) == 0
    assert pq.read_table(output / "latest.parquet").equals(pq.read_table(pa.BufferReader(written)))
    assert proof(source, output) == 0 and not list((output / "_restore/begun").glob("*"))


def test_a_killed_run_does_not_make_them_believed_either(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it has written over a shard, and before a row says so: of keys that have left, and of those that moved."""
    table, source, output = dataset_table(6), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(table.slice(0, 4), source / "a.parquet")
    assert run(source, output) == 0
    written = pq.read_table(output / "a.parquet")
    (source / "a.parquet").rename(tmp_path / "former.parquet")
    pq.write_table(table.slice(4), source / "a.parquet")
    pq.write_table(table.slice(0, 2), source / "b.parquet")

    class Killed(BaseException):
        pass

    append = Ledger.append

    def killed(self: Ledger, rows: list[Row]) -> None:
        if self._folder != "begun":
            raise Killed
        append(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(Killed):
            run(source, output)
    assert not pq.read_table(output / "a.parquet").equals(written)
    (source / "b.parquet").unlink()
    (tmp_path / "former.parquet").rename(source / "a.parquet")
    assert run(source, output) == 0
    assert pq.read_table(output / "a.parquet").equals(written)


def test_a_dataset_that_is_exported_anew_leaves_no_second_copy(tmp_path: Path, run: Run) -> None:
    """With a row less, and in two row groups."""
    table, source, output = dataset_table(5), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(table, source / "a.parquet")
    assert run(source, output) == 0
    pq.write_table(table.slice(0, 4), source / "a.parquet", row_group_size=2)
    assert run(source, output) == 0
    assert sorted(path.name for path in output.glob("*.parquet")) == ["a-00000.parquet", "a-00001.parquet"]
    assert ledger_of(output).keys() == set(table["key"].to_pylist()[:4]) and proof(source, output) == 0
    # What was made of rows that have left the input, or of a file, stays where nothing of it is there twice.
    pq.write_table(table.slice(0, 1), source / "a.parquet")
    assert run(source, output) == 0
    assert sorted(path.name for path in output.glob("*.parquet")) == ["a-00001.parquet", "a.parquet"]
    assert len(ledger_of(output)) == 3 and proof(source, output) == 0
    (source / "a.parquet").unlink()
    pq.write_table(table.slice(4), source / "day 2.parquet")
    assert run(source, output) == 0
    names = ["a-00001.parquet", "a.parquet", "day 2.parquet"]
    assert sorted(path.name for path in output.glob("*.parquet")) == names
    assert len(ledger_of(output)) == 4 and proof(source, output) == 0


def test_a_shard_stays_while_there_is_no_other_of_its_rows(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restore_core.pipelines import restoration

    table, source, output = dataset_table(3), tmp_path / "in", tmp_path / "out"
    source.mkdir()
    pq.write_table(table, source / "a.parquet")
    assert run(source, output) == 0
    (source / "a.parquet").rename(source / "b.parquet")

    def lost(wave: Any, plan: Any, actors: int, options: Any, account: Any) -> None:
        account.done.clear()
        for row in wave.rows.values():
            row.fail("read", "no connection")
        account.add(list(wave.rows.values()))
        account.flush()

    def shards() -> list[str]:
        return sorted(path.name for path in output.glob("*.parquet"))

    with monkeypatch.context() as patch:
        patch.setattr(restoration, "_restore_wave", lost)
        assert run(source, output, max_failed_share=1) == 0
    assert shards() == ["a.parquet"] and proof(source, output) == 1
    assert run(source, output, retry_failed="read") == 0
    assert shards() == ["b.parquet"] and proof(source, output) == 0

    # Nor does an older output under the new name count for one: of b.parquet's.
    pq.write_table(dataset_table(4), source / "c.parquet")
    pq.write_table(dataset_table(9).slice(8), output / "c.parquet")
    (source / "b.parquet").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(restoration, "_restore_wave", lost)
        assert run(source, output, max_failed_share=1) == 0
    assert shards() == ["b.parquet", "c.parquet"]
    (tmp_path / "list").write_text("c.parquet")
    assert run(source, output, retry_failed="read", keys=str(tmp_path / "list")) == 0
    assert shards() == ["b.parquet", "c.parquet"], "not while only some of the input is looked at"
    assert run(source, output) == 0
    assert shards() == ["c.parquet"] and proof(source, output) == 0


def test_the_hugging_face_layout_passes_through(tmp_path: Path, run: Run) -> None:
    cells = [
        {"bytes": GOOD["a/face.jpg"], "path": "face.jpg"},
        None,
        {"bytes": None, "path": "elsewhere.jpg"},
        {"bytes": GOOD["alpha.png"], "path": None},
        {"bytes": b"", "path": "empty.jpg"},
    ]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"label": pa.array([3, 1, 2, 0, 4], pa.int64()), "picture": pa.array(cells, kind)})
    table = table.replace_schema_metadata({"huggingface": "{}"})
    (tmp_path / "in/data").mkdir(parents=True)
    pq.write_table(table, tmp_path / "in/data/train-0.parquet")
    assert run(tmp_path / "in", tmp_path / "out", batch_size=2, max_failed_share=1) == 0
    rows = ledger_of(tmp_path / "out")
    assert sorted(rows) == [f"data/train-0.parquet#{index}" for index in range(5)]
    errors = [None, "not_an_image", "not_an_image", None, "not_an_image"]
    assert [rows[key].error for key in sorted(rows)] == errors
    restored = pq.read_table(tmp_path / "out/data/train-0.parquet")
    assert restored.schema.equals(table.schema, check_metadata=True)
    assert restored["label"].equals(table["label"])
    after = restored["picture"].to_pylist()
    assert after[1:3] == cells[1:3] and after[4] == cells[4]
    assert [after[0]["path"], after[3]["path"]] == ["face.jpg", None]
    np.testing.assert_array_equal(codec.decode(after[3]["bytes"]).alpha, codec.decode(GOOD["alpha.png"]).alpha)
    assert rows["data/train-0.parquet#0"].output_sha256 == hashlib.sha256(after[0]["bytes"]).hexdigest()


def test_a_row_group_that_memory_does_not_hold_goes_through_in_parts(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output has the rows of one row group in the same order, whatever was held of them at once."""
    table = dataset_table(20).append_column("caption", pa.array([f"é {index}" for index in range(20)]))
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in/train.parquet", row_group_size=20)
    outputs = []
    for name, size in (("few", 3), ("many", 32)):
        assert run(tmp_path / "in", tmp_path / name, batch_size=size) == 0
        outputs.append(pq.read_table(tmp_path / name / "train.parquet"))
    assert outputs[0].equals(outputs[1])
    assert outputs[0].drop_columns("image").equals(table.drop_columns("image"))
    assert {row.status for row in ledger_of(tmp_path / "few").values()} == {"restored"}


def test_parquet_that_changes_while_it_is_read_fails_whole(tmp_path: Path, small_model: Models) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from restore_core.pipelines import stages

    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    plan = stages.RestoreRun(
        input=LocalStorage(tmp_path / "in"), output=LocalStorage(tmp_path / "out"),
        model=checkpoint.read(str(small_model(1))), device="cpu", threads=1, max_pixels=10**6, strip_metadata=False,
    )  # fmt: skip

    def listed() -> Object:
        return plan.input.stat("a.parquet")

    def outcome(group: int, file: Object | None = None) -> set[tuple[str | None, str | None, str | None]]:
        file = file or listed()
        rows = [
            Row(key=f"{index}", size=file.size, etag=file.etag, model="m", options="o", run_id="r")
            for index in range(4)
        ]
        with ThreadPoolExecutor(2) as pool, codec.Processes(1, 10**6) as codecs:
            tools = stages.Tools(plan, pool, codecs)
            done = stages.restore_row_group(rows, "a.parquet", group, "a.parquet", tools, plan.restorer(), batch=3)
        assert not files_of(tmp_path / "out") and not list(plan.output.unfinished())
        return {(row.status, row.error, row.output_key) for row in done}

    assert outcome(0, Object("a.parquet", 1, "e")) == {("failed", "vanished", None)}
    pq.write_table(dataset_table(4), tmp_path / "in/a.parquet")
    older = listed()
    pq.write_table(dataset_table(4), tmp_path / "in/a.parquet")  # as many rows, but who knows which
    assert outcome(0, older) == {("failed", "read", None)}
    iter_batches = pq.ParquetFile.iter_batches

    def replaced_meanwhile(self: pq.ParquetFile, *arguments: Any, **options: Any) -> Any:
        yield from iter_batches(self, *arguments, **options)
        pq.write_table(dataset_table(4), tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "in/a.parquet")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pq.ParquetFile, "iter_batches", replaced_meanwhile)
        assert outcome(0) == {("failed", "read", None)}
    for count in (3, 5, 9):
        pq.write_table(dataset_table(count), tmp_path / "in/a.parquet")
        assert outcome(0) == {("failed", "read", None)}
    assert outcome(1) == {("failed", "read", None)}

    def without_credentials(self: LocalStorage) -> None:
        raise StorageError(f"cannot use {self.uri}: Unable to locate credentials")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LocalStorage, "filesystem", without_credentials)
        assert outcome(0) == {("failed", "read", None)}
    (tmp_path / "in/a.parquet").write_bytes((tmp_path / "in/a.parquet").read_bytes()[100:])
    assert outcome(0) == {("failed", "read", None)}


# --- Deaths --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty photographs that take a few seconds together."""
    files = {f"{index:02d}.jpg": encoded(photograph(200, 260, index)) for index in range(60)}
    return write_tree(tmp_path_factory.mktemp("many") / "in", files)


@pytest.fixture(scope="module")
def uninterrupted(many: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The outputs of a run in which nothing happened."""
    output = tmp_path_factory.mktemp("uninterrupted")
    assert run(many, output, batch_size=4, workers="2") == 0
    return files_of(output)


def test_a_worker_that_is_killed_costs_nothing(
    tmp_path: Path, run: Run, many: Path, uninterrupted: dict[str, bytes]
) -> None:
    killed: list[int] = []

    def kill() -> None:
        wait_for(lambda: len(list(tmp_path.glob("*.jpg"))) >= 6)
        killed.extend(descendants(os.getpid(), "RestoreUnit")[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    assert run(many, tmp_path, batch_size=4, workers="2") == 0
    thread.join()
    assert killed
    rows = assert_closed(tmp_path, set(uninterrupted))
    assert {row.status for row in rows.values()} == {"restored"}
    assert files_of(tmp_path) == uninterrupted


def test_an_object_that_kills_its_worker_costs_only_itself(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    from restore_core.pipelines import restoration

    class Poisoned:
        def __init__(self, *arguments: Any) -> None:
            from restore_core.pipelines.restoration import RestoreUnit  # in the worker, where nothing is patched

            self.restore = RestoreUnit(*arguments)

        def __call__(self, packed: pa.Table) -> pa.Table:
            from restore_core.pipelines.stages import unpack

            if "0poison.jpg" in unpack(packed)["key"].to_pylist():
                os._exit(1)
            return self.restore(packed)

    monkeypatch.setattr(restoration, "RestoreUnit", Poisoned)
    files = {f"{index}.jpg": GOOD["a/tiny.jpg"] for index in range(8)} | {"0poison.jpg": GOOD["a/face.jpg"]}
    source = write_tree(tmp_path / "in", files)
    assert run(source, tmp_path / "out", batch_size=3) == 0
    rows = assert_closed(tmp_path / "out", set(files))
    failed = [row for row in rows.values() if row.status == "failed"]
    assert [(row.key, row.error) for row in failed] == [("0poison.jpg", "decode")]
    assert failed[0].message == restoration.LOST_ROW


def test_broken_codecs_cost_only_their_objects(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from restore_core.pipelines import restoration

    site = str(break_codecs(tmp_path / "site"))

    class Broken:
        """In the worker, where nothing is patched."""

        def __init__(self, *arguments: Any) -> None:
            from restore_core.codec import processes
            from restore_core.pipelines.restoration import RestoreUnit

            sys.path.insert(0, site)
            processes.SECONDS = 5
            self.restore = RestoreUnit(*arguments)

        def __call__(self, unit: pa.Table) -> pa.Table:
            rows = self.restore(unit)
            pid = str(os.getpid())  # the same for all: nothing has to start again
            return rows.set_column(rows.schema.get_field_index("node"), "node", pa.array([pid] * len(rows)))

    monkeypatch.setattr(restoration, "RestoreUnit", Broken)
    expected = {"hang": "decode", "crash": "decode", "killed": "out_of_memory", "eat": "out_of_memory"}
    files = {f"{index}.jpg": GOOD["a/tiny.jpg"] for index in range(5)}
    files |= {f"{name}.jpg": name.encode() for name in expected}
    source = write_tree(tmp_path / "in", files)
    assert run(source, tmp_path / "out", batch_size=3, workers="1", max_megapixels=0.1) == 0
    rows = assert_closed(tmp_path / "out", set(files))
    failed = {row.key.removesuffix(".jpg"): row.error for row in rows.values() if row.status == "failed"}
    assert failed == expected
    assert len({row.node for row in rows.values()}) == 1


def start(*arguments: object, **environment: str) -> "subprocess.Popen[str]":
    """The command as a user gives it, with a Ray of its own."""
    return subprocess.Popen(
        [sys.executable, ROOT / "jobs/restore_bucket.py", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


@contextmanager
def halfway(source: Path, output: Path, model: Path, written: int) -> Iterator["subprocess.Popen[str]"]:
    """The job at work, with at least so many files written; gone at the end."""
    process = start("--input", source, "--output", output, "--model", model, "--batch-size", 4)
    try:
        wait_for(lambda: process.poll() is not None or len(list(output.glob("*.jpg"))) >= written)
        yield process
    finally:
        process.kill()
        process.communicate()


def test_of_two_drivers_on_one_output_exactly_one_works(
    tmp_path: Path, run: Run, many: Path, uninterrupted: dict[str, bytes], small_model: Models,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    lease = tmp_path / "_restore/lease.json"
    with halfway(many, tmp_path, small_model(1), written=4) as process:
        with pytest.raises(UsageError, match=f"another restore is at work there .*process {process.pid}, since"):
            run(many, tmp_path, batch_size=4)
        process.send_signal(signal.SIGSTOP)  # it lives, but cannot renew: the lease expires, and another takes it over
        owner = json.loads(lease.read_text())
        lease.write_text(json.dumps({**owner, "renewed": owner["renewed"] - 100}))
        with monkeypatch.context() as patch:  # it is watched for so long, to see whether it is renewed
            patch.setattr("restore_core.lease.EXPIRE_SECONDS", 6)
            patch.setattr("restore_core.lease.RENEW_SECONDS", 1)
            assert run(many, tmp_path, batch_size=4, workers="2") == 0
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=120)
        # It learns so when it next renews; if it is done before that, it has written the same bytes and rows.
        assert process.returncode in (0, 2), err
    assert run(many, tmp_path, batch_size=4) == 0
    assert not lease.exists()
    rows = assert_closed(tmp_path, set(uninterrupted))
    assert {row.status for row in rows.values()} == {"restored"}
    assert files_of(tmp_path) == uninterrupted


@pytest.mark.faults
def test_of_drivers_that_begin_at_once_on_a_bucket_exactly_one_works(
    s3: str, moto_client: "S3Client", many: Path, uninterrupted: dict[str, bytes], small_model: Models
) -> None:
    for key in uninterrupted:
        moto_client.put_object(Bucket="photos", Key=f"in/{key}", Body=(many / key).read_bytes())
    options = "--input", "s3://photos/in", "--output", "s3://photos/out", "--model", small_model(1), "--batch-size", 1
    drivers = [start(*options, "--workers", 1) for _ in range(3)]
    ended = [(*driver.communicate(timeout=300), driver.returncode) for driver in drivers]
    assert sorted(code for *_, code in ended) == [0, 2, 2], ended
    for _, err, code in ended:
        assert (code == 2) == ("error: --output s3://photos/out: another restore is at work there" in err), err
        assert "Traceback" not in err
    found = moto_client.list_objects_v2(Bucket="photos", Prefix="out/")["Contents"]
    keys = {item["Key"].removeprefix("out/") for item in found}
    written = {key for key in keys if not key.startswith("_restore/")}
    bodies = {key: moto_client.get_object(Bucket="photos", Key=f"out/{key}")["Body"].read() for key in written}
    assert bodies == uninterrupted and "_restore/lease.json" not in keys


def test_a_driver_that_is_asked_to_stop_closes_its_account(
    tmp_path: Path, run: Run, many: Path, uninterrupted: dict[str, bytes], small_model: Models
) -> None:
    """By SIGTERM; Ctrl-C takes the same way, but is ignored by whatever a shell has started in the background."""
    # so many that units must have come back to the driver: before the first there would be no row
    with halfway(many, tmp_path, small_model(1), written=24) as process:
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == command_line.INTERRUPTED, err
    assert "stopped: interrupted; the same command goes on from here\n" in out
    assert "Traceback" not in err
    assert not (tmp_path / "_restore/lease.json").exists()
    record = json.loads((tmp_path / "_restore/run.json").read_text())
    rows = ledger_of(tmp_path)
    assert record["stopped"] and record["statuses"] == {"restored": len(rows)} and 4 <= len(rows) < 60
    assert "stopped: interrupted" in (tmp_path / "_restore/report.html").read_text()
    # at most what each worker had in hand is without a row
    assert len(files_of(tmp_path)) - len(rows) <= 4 * (os.cpu_count() or 1) * 2
    assert run(many, tmp_path, batch_size=4, workers="2") == 0
    assert assert_closed(tmp_path, set(uninterrupted)).keys() >= rows.keys()
    assert files_of(tmp_path) == uninterrupted


def test_the_command_itself(tmp_path: Path, small_model: Models) -> None:
    source = write_tree(tmp_path / "in", {"a/me.jpg": GOOD["a/face.jpg"], "bad.jpg": b"?"})
    process = start("--input", source, "--output", tmp_path / "out", "--model", small_model(1), "--workers", 1)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "2 objects: 1 failed, 1 restored (0 by earlier runs)\nfailures: 1 not_an_image\n" in out
    assert f"report: {tmp_path}/out/_restore/report.html\n" in out
    assert_closed(tmp_path / "out", {"a/me.jpg", "bad.jpg"})
    assert "Traceback" not in err


# --- What cannot work ----------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, small_model: Models
) -> Iterator[Callable[..., str]]:
    """Call the CLI in this process on a good input with some options changed; it must refuse. Returns its one line."""
    write_tree(tmp_path / "in", {"a.jpg": GOOD["a/tiny.jpg"]})

    def call(**changed: object) -> str:
        options = {"input": tmp_path / "in", "output": tmp_path / "out", "model": small_model(1), **changed}
        arguments = [text for name, value in options.items() for text in ("--" + name.replace("_", "-"), str(value))]
        monkeypatch.setattr(sys, "argv", ["restore_bucket.py", *arguments])
        try:
            code = command_line.run(restore_bucket.main, RestoreBucket)
        except SystemExit as stop:
            code = stop.code  # type: ignore[assignment]
        out, err = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in out + err
        assert not (tmp_path / "out").exists()
        return err

    yield call
    storage.s3.s3_client.cache_clear()


def refused(text: str, *parts: object) -> None:
    """One line, with the option, its value and what to do."""
    assert text.startswith("error: ") and text.count("\n") == 1 and text.endswith("\n"), text
    for part in parts:
        assert str(part) in text


def test_missing_and_empty_inputs_are_refused(command: Callable[..., str], tmp_path: Path) -> None:
    refused(command(input=tmp_path / "nowhere"), f"--input {tmp_path}/nowhere", "no such file or folder; check")
    (tmp_path / "empty").mkdir()
    refused(command(input=tmp_path / "empty"), f"--input {tmp_path}/empty", "no files there; check")
    refused(command(input="ftp://host/photos"), "--input ftp://host/photos", "use a local path or s3://")


def test_outputs_over_inputs_are_refused(command: Callable[..., str], tmp_path: Path) -> None:
    for output in (tmp_path / "in", tmp_path / "in/restored", tmp_path, tmp_path / "x/../in"):
        refused(command(output=output), f"--output {output}", "choose another place")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    refused(command(output=tmp_path / "link/out"), "--output", "choose another place")
    refused(command(output=tmp_path / "in/a.jpg"), "--output", "choose another place")
    assert files_of(tmp_path / "in") == {"a.jpg": GOOD["a/tiny.jpg"]}


def test_buckets_that_cannot_be_used_are_refused(
    command: Callable[..., str], s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    refused(command(input="s3://no-such-bucket/raw"), "--input s3://no-such-bucket/raw", "no such bucket; check")
    refused(command(output="s3://no-such-bucket/raw"), "--output s3://no-such-bucket/raw", "check the bucket's name")
    refused(command(input="s3://photos/nothing"), "--input s3://photos/nothing", "no objects there; check")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage.s3.s3_client.cache_clear()
    refused(command(input="s3://photos/raw"), "--input s3://photos/raw", "set AWS_ACCESS_KEY_ID")


def test_models_that_cannot_be_used_are_refused(
    command: Callable[..., str], tmp_path: Path, small_model: Models
) -> None:
    refused(command(model="no-such-model"), "--model no-such-model", "no bundled model", "use ")
    half = write_tree(tmp_path / "half", {"config.json": (small_model(1) / "config.json").read_bytes()})
    refused(command(model=half), f"--model {half}", "cannot read model.safetensors")
    wrong = {path.name: path.read_bytes() for path in small_model(1).iterdir()}
    config = json.loads(wrong["config.json"])
    config["architecture"]["channels"] = [8, 24]
    folder = write_tree(tmp_path / "wrong", {**wrong, "config.json": json.dumps(config).encode()})
    refused(command(model=folder), f"--model {folder}", "does not fit config.json: tensor 'bottleneck.0.first.bias'")
    cut = write_tree(tmp_path / "cut", {**wrong, "model.safetensors": wrong["model.safetensors"][:100]})
    refused(command(model=cut), f"--model {cut}", "model.safetensors is damaged", "copy it again")


def test_options_that_make_no_sense_are_refused(command: Callable[..., str]) -> None:
    assert "--batch-size 0: use 1 or more" in command(batch_size=0)
    assert "--workers many: use auto or a number" in command(workers="many")
    assert "--workers 0: use auto or a number" in command(workers=0)
    assert "--max-failed-share 2.0: use a share" in command(max_failed_share=2)
    assert "--max-change 256.0: use a number" in command(max_change=256)
    assert "--max-megapixels 0.0: use a number from 0" in command(max_megapixels=0)
    assert "--max-megapixels inf: use a number from 0" in command(max_megapixels="inf")
    refused(command(no_such_option=1), "--no-such-option")
    refused(command(device="tpu"), "--device", "tpu")
    refused(command(batch_size="abc"), "--batch-size", "abc")
    refused(command(retry_failed="borken"), "--retry-failed borken", "not_an_image")
    refused(command(retry_failed=""), "--retry-failed '': no such class")


def test_a_refused_option_is_one_line(command: Callable[..., str]) -> None:
    refused(command(batch_size=0), "--batch-size 0: use 1 or more")


def test_workers_and_devices_that_are_not_there_are_refused(command: Callable[..., str], local_ray: None) -> None:
    refused(command(workers=99), "--workers 99: the cluster has 3 CPUs; use --workers 3")
    refused(command(device="cuda"), "--device cuda: needs 1 GPU for each worker, the cluster has 0 GPUs")


def test_parquet_that_cannot_be_used_is_refused(command: Callable[..., str], tmp_path: Path) -> None:
    for folder in ("twice", "columns", "broken"):
        (tmp_path / folder).mkdir()
    table = dataset_table(2)
    pq.write_table(pa.concat_tables([table, table]), tmp_path / "twice/a.parquet")
    refused(
        command(input=tmp_path / "twice"), f"--input {tmp_path}/twice/a.parquet", "key 'Person_0/0.jpg' occurs twice"
    )
    pq.write_table(table.select(["key", "width"]), tmp_path / "columns/a.parquet")
    refused(command(input=tmp_path / "columns"), f"--input {tmp_path}/columns/a.parquet", "columns are key, width")
    for folder in ("empty", "colliding", "null"):
        (tmp_path / folder).mkdir()
    nulls = table.set_column(0, "key", pa.array([None, *table["key"].to_pylist()[1:]], pa.string()))
    pq.write_table(nulls, tmp_path / "null/a.parquet")
    refused(command(input=tmp_path / "null"), f"--input {tmp_path}/null/a.parquet", "its column key has empty cells")
    pq.write_table(table.slice(0, 0), tmp_path / "empty/a.parquet")
    refused(command(input=tmp_path / "empty"), f"--input {tmp_path}/empty", "no rows in its Parquet files")
    pq.write_table(dataset_table(2), tmp_path / "colliding/a.parquet", row_group_size=1)
    pq.write_table(dataset_table(4).slice(2), tmp_path / "colliding/a-00001.parquet")
    refused(command(input=tmp_path / "colliding"), "its output a-00001.parquet is also that of a-00001.parquet")
    for folder in ("nested", "two"):
        (tmp_path / folder).mkdir()
    structs = pa.array([{"name": "a"}, {"name": "b"}])
    pq.write_table(table.set_column(0, "key", structs), tmp_path / "nested/a.parquet")
    refused(command(input=tmp_path / "nested"), f"--input {tmp_path}/nested/a.parquet", "its column key is struct<name")
    for name in ("key", "image"):
        pq.write_table(table.append_column(name, table[name]), tmp_path / "two/a.parquet")
        refused(command(input=tmp_path / "two"), f"--input {tmp_path}/two/a.parquet", f"columns are called '{name}'")
    (tmp_path / "broken/a.parquet").write_bytes(b"PAR1 or not")
    refused(command(input=tmp_path / "broken"), f"--input {tmp_path}/broken/a.parquet", "not a readable Parquet file")


def test_names_cannot_steer_the_terminal_nor_forge_lines(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a\x1b]0;mine\x07\nerror: b.parquet").write_bytes(b"not Parquet")
    process = start("--input", tmp_path / "in", "--output", tmp_path / "out")
    said = process.communicate()[1]
    assert process.returncode == 2
    assert "not a readable Parquet file" in said and "\x1b" not in said and "\nerror: b" not in said


def test_a_refusal_as_a_process(tmp_path: Path) -> None:
    process = start("--input", tmp_path / "nowhere", "--output", tmp_path / "out")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == f"error: --input {tmp_path}/nowhere: no such file or folder; check the path\n"
    assert not (tmp_path / "out").exists()


def test_the_job_can_be_called_from_python() -> None:
    with pytest.raises(UsageError, match="--batch-size 0"):
        RestoreBucket(input="a", output="b", batch_size=0)


def test_what_a_worker_cannot_begin_with_is_told_in_the_last_line(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As bfloat16 on a GPU that has none, which only the worker can know. Above it is what Ray has to say."""
    from restore_core.pipelines import restoration

    class Refusing(restoration.RestoreRun):  # of this function, so that Ray carries it to its workers
        def restorer(self) -> Any:
            raise UsageError("--precision bfloat16: not here")

    monkeypatch.setattr(restoration, "RestoreRun", Refusing)
    source, output = write_tree(tmp_path / "in", {"a.jpg": GOOD["a/tiny.jpg"]}), tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["restore_bucket.py", "--input", str(source), "--output", str(output)])
    assert command_line.run(lambda _: run(source, output), RestoreBucket) == command_line.UNUSABLE
    assert capsys.readouterr().err.splitlines()[-1] == "error: --precision bfloat16: not here"
    assert not (output / "_restore/lease.json").exists()


# --- What would do harm --------------------------------------------------------------------------------------------


def test_files_of_others_in_the_output_are_not_written_over(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tree(tmp_path / "in", {"a.png": encoded(photograph(20, 24, 1), "PNG")})
    output = write_tree(tmp_path / "out", {"a.png": b"an original", "Z.txt": b"notes", "z.txt": b"notes"})
    with pytest.raises(UsageError, match=r"^--output .*: has a file 'a.png' that no restore has made, and "):
        run(source, output)
    assert files_of(output) == {"a.png": b"an original", "Z.txt": b"notes", "z.txt": b"notes"}
    monkeypatch.setattr(restore_bucket, "FEW_FILES", 1)
    (output / "Y.txt").write_bytes(b"notes")
    with pytest.raises(UsageError, match=r"^--output .*: has a file 'a.png' that no restore has made, and "):
        run(source, output)
    (output / "a.png").unlink()
    assert run(source, output) == 0  # beside others
    assert run(source, output) == 0
    assert files_of(output).keys() == {"a.png", "Y.txt", "Z.txt", "z.txt"}


def test_names_that_the_input_does_not_list_are_in_no_way(
    tmp_path: Path, s3: str, moto_client: "S3Client", monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tree(tmp_path / "in", {"a.png": b"?", "z.parquet": b"?"})
    for key in ("a//b.png", "new/", "x" * 300, "../a.png", "z-00001.jpg"):
        moto_client.put_object(Bucket="photos", Key=key, Body=b"!")
    places = storage.open_storage(source), storage.open_storage("s3://photos")
    assert restore_bucket.in_the_way(*places) is None
    moto_client.put_object(Bucket="photos", Key="z-00001.parquet", Body=b"!")
    for few in (1000, 1):
        monkeypatch.setattr(restore_bucket, "FEW_FILES", few)
        assert restore_bucket.in_the_way(*places) == "z-00001.parquet"
    no_network = ItemError("read", "cannot read a: no network", others_too=True)
    monkeypatch.setattr(LocalStorage, "exists", lambda *_: (_ for _ in ()).throw(no_network))
    with pytest.raises(StorageError, match="no network"):
        restore_bucket.in_the_way(*places)


def test_nor_are_those_in_the_place_of_a_shard(tmp_path: Path, run: Run) -> None:
    (tmp_path / "in").mkdir()
    table = pa.table({"image": [encoded(photograph(20, 24, seed)) for seed in range(4)]})
    pq.write_table(table, tmp_path / "in/a.parquet", row_group_size=2)
    output = write_tree(tmp_path / "out", {"a-00001.parquet": b"an original"})
    with pytest.raises(UsageError, match=r"^--output .*: has a file 'a-00001.parquet' that no restore has made, and "):
        run(tmp_path / "in", output)
    assert files_of(output) == {"a-00001.parquet": b"an original"}


def test_a_list_of_keys_needs_a_folder(tmp_path: Path, run: Run) -> None:
    """With one file as input what a key is written over would not be looked at."""
    source = write_tree(tmp_path / "in", {"a.png": encoded(photograph(20, 24, 1), "PNG"), "sub/a.png": b"?"})
    (tmp_path / "keys").write_text("a.png\nsub/a.png\n")
    with pytest.raises(UsageError, match="is one file; with --keys name the folder or prefix"):
        run(source / "a.png", source / "sub", keys=str(tmp_path / "keys"))


def test_a_file_larger_than_any_picture_is_not_read(tmp_path: Path, run: Run) -> None:
    """A film of many gigabytes, say."""
    source, output = write_tree(tmp_path / "in", {"a.png": encoded(photograph(20, 24, 1), "PNG")}), tmp_path / "out"
    with (source / "film.mp4").open("wb") as film:
        film.truncate(2**40)
    assert run(source, output, max_megapixels=1) == 0
    row = ledger_of(output)["film.mp4"]
    assert (row.status, row.error, row.size) == ("failed", "too_large", 2**40)
    assert (
        row.message is not None and "1099511627776 bytes are more than a picture of 1000000 pixels has" in row.message
    )
