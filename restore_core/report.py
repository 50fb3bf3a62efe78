"""What a person looks at: the loss plot, the sample sheet, and one self-contained page about a restored bucket."""

import base64
import io
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw
from torch import Tensor

from restore_core import codec
from restore_core.manifest import Row


def loss_plot(history: list[dict[str, float]]) -> bytes:
    """Training and validation loss, and validation PSNR per damage, over epochs. Returns a PNG."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, quality = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    losses.plot(epochs, [row["train_loss"] for row in history], label="train")
    losses.plot(epochs, [row["val_loss"] for row in history], label="validation (averaged weights)")
    losses.set(xlabel="epoch", ylabel="RMSE + gate", title="Loss")
    for name in [name for name in history[0] if name.startswith("psnr_") and name != "psnr_clean"]:
        quality.plot(epochs, [row[name] for row in history], label=name.removeprefix("psnr_").replace("_", " "))
    quality.set(xlabel="epoch", ylabel="PSNR, dB", title="Restored validation samples")
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for before, after in pairwise(history):
        if before["size"] != after["size"]:
            losses.axvline(after["epoch"] - 0.5, color="gray", linestyle=":")
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def sample_sheet(clean: Tensor, columns: list[tuple[str, Tensor, Tensor]]) -> bytes:
    """A picture a row; for each damage its input and what was restored; the truth at the end. Returns a PNG.

    Args:
        clean: uint8 [B, 3, S, S].
        columns: name, damaged and restored, each uint8 [B, 3, S, S].
    """
    count, _, side, _ = clean.shape
    gap, header = 4, 28
    width = sum(2 * side + 3 * gap for _ in columns) + side + gap
    sheet = Image.new("RGB", (width, header + count * (side + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    left = gap
    for name, damaged, restored in columns:
        draw.text((left, 2), name.replace("_", " "), fill="black")
        draw.text((left, 14), "input | restored", fill="gray")
        for index, images in enumerate((damaged, restored)):
            _paste(sheet, images, left + index * (side + gap), header, gap)
        left += 2 * side + 3 * gap
    draw.text((left, 2), "truth", fill="black")
    _paste(sheet, clean, left, header, gap)
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    return sink.getvalue()


def _paste(sheet: Any, images: Tensor, left: int, top: int, gap: int) -> None:
    for row, image in enumerate(images):
        pixels = image.permute(1, 2, 0).contiguous().numpy()
        sheet.paste(Image.fromarray(pixels), (left, top + row * (pixels.shape[0] + gap)))


def restore_page(
    rows: pa.Table, record: dict[str, Any], samples: list[tuple[Row, bytes, bytes]], input_uri: str, output_uri: str
) -> bytes:
    """One self-contained HTML page about a restored bucket. Keys and messages are taken as hostile text.

    Args:
        rows: the ledger's rows of everything listed.
        record: what run.json holds.
        samples: rows of restored photographs with their input and output files.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    failed = rows.filter(pc.equal(rows["status"], "failed"))
    by_error = failed.group_by("error", use_threads=False).aggregate(
        [("key", "count"), ("key", "first"), ("message", "first")]
    )
    failures = [
        {"error": row["error"], "count": row["key_count"], "key": row["key_first"], "message": row["message_first"]}
        for row in by_error.sort_by([("key_count", "descending")]).to_pylist()
    ]
    formats = Counter(name or "not decoded" for name in rows["format"].to_pylist())
    restored = rows.filter(pc.equal(rows["status"], "restored"))
    page = environment.get_template("report.html").render(
        record=record,
        record_json=json.dumps(record, indent=2),
        input=input_uri,
        output=output_uri,
        failures=failures,
        formats=formats.most_common(),
        samples=[
            {
                "key": row.key,
                "caption": f"{row.format} {row.width} x {row.height}, mean change {row.change:.1f} of 255",
                "before": _thumbnail(before),
                "after": _thumbnail(after),
            }
            for row, before, after in samples
        ],
        change_plot=_data_uri(_change_plot(restored["change"].to_pylist()), "png") if len(restored) > 1 else None,
    )
    return page.encode("utf-8", "backslashreplace")


def _change_plot(changes: list[float]) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.hist(changes, bins=40, color="#4878a8")
    axes.set(xlabel="mean absolute change of a restored photograph, of 255", ylabel="photographs")
    axes.grid(alpha=0.3)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def _thumbnail(file: bytes) -> str:
    return _data_uri(codec.thumbnail_jpeg(codec.decode(file).pixels, 320), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
