"""What a person looks at: the loss plot, the sample sheet, and one self-contained page about a restored bucket."""

import base64
import io
import json
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw
from torch import Tensor

from restore_core import codec
from restore_core.manifest import Row

OVERVIEW_SIDE = 144  # pixels, about: of a face in the overview


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


def study_table(result: dict[str, Any]) -> str:
    """PSNR in dB of the last epoch on validation samples, the best of each damage in bold; the damaged input first."""
    rows = result["rows"]
    finished = [row for row in rows if not row["error"]]
    damages = list(finished[0]["psnr_db"]) if finished else []
    best = {damage: max(row["psnr_db"][damage] for row in finished) for damage in damages}
    titles = [
        "variant",
        "network",
        "parameters, M",
        "MACs, M",
        "minutes",
        *(name.replace("_", " ") for name in damages),
    ]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    if finished:
        identity = [f"{value:.1f}" for value in finished[0]["identity_psnr_db"].values()]
        lines.append("| " + " | ".join(["identity", "the damaged input", "", "", "", *identity]) + " |")
    for row in rows:
        size = [f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e6:.0f}", f"{row['minutes']:.1f}"]
        if row["error"]:
            reason = row["error"].replace("|", "\\|")
            cells = [f"{row['network']}; failed after {row['epochs']} epochs: {reason}", *size, *("–" for _ in damages)]
        else:
            quality = [f"**{db:.1f}**" if db == best[name] else f"{db:.1f}" for name, db in row["psnr_db"].items()]
            cells = [row["network"], *size, *quality]
        lines.append(f"| {row['variant']} | " + " | ".join(cells) + " |")
    about = (
        f"PSNR in dB. {result['images']} photographs at {result['size']} px; commit {result['commit'][:12]}, "
        f"{result['date']}, {result['hardware']}."
    )
    return "\n".join([*lines, "", about, "", f"    {result['command']}", ""])


def study_plot(histories: dict[str, list[dict[str, float]]]) -> bytes:
    """Losses of all variants of a study, and their validation PSNR under mixed damage, over epochs. Returns a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(13, 5), layout="constrained")
    losses, quality = figure.subplots(1, 2)
    for index, (name, history) in enumerate(histories.items()):
        epochs, color, mark = [row["epoch"] for row in history], f"C{index % 10}", "." if len(history) == 1 else ""
        losses.plot(epochs, [row["train_loss"] for row in history], color=color, linestyle="--", marker=mark)
        losses.plot(epochs, [row["val_loss"] for row in history], color=color, marker=mark)
        quality.plot(epochs, [row["psnr_mixed"] for row in history], color=color, marker=mark, label=name)
    losses.set(xlabel="epoch", ylabel="RMSE (a gated network: + its gate's part)", title="Loss")
    losses.legend(
        handles=[
            Line2D([], [], color="gray", linestyle="--", label="train"),
            Line2D([], [], color="gray", label="validation (averaged weights)"),
        ]
    )
    quality.set(xlabel="epoch", ylabel="PSNR, dB", title="Restored validation samples, mixed damage")
    figure.legend(loc="outside right upper")
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def overview(damages: Sequence[str], columns: list[tuple[str, Tensor]]) -> bytes:
    """A face with its damage a row; the input, what each network makes of it, and the truth. Returns a PNG.

    Args:
        damages: names of the rows.
        columns: name and images, each uint8 [D, 3, S, S].
    """
    side = columns[0][1].shape[-1]
    scale = max(1, round(OVERVIEW_SIDE / side))  # pixels stay square and sharp
    gap, header, margin = 6, 24, 84
    cell = side * scale + gap
    sheet = Image.new("RGB", (margin + len(columns) * cell, header + len(damages) * cell), "white")
    draw = ImageDraw.Draw(sheet)
    for row, damage in enumerate(damages):
        draw.text((gap, header + row * cell + cell // 2), damage.replace("_", " "), "black", anchor="lm", font_size=14)
    for column, (name, images) in enumerate(columns):
        left = margin + column * cell
        draw.text((left + cell // 2, header // 2), name, "black", anchor="mm", font_size=14)
        _paste(sheet, images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), left, header, gap)
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    return sink.getvalue()


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


# --- Quality -------------------------------------------------------------------------------------------------------


def size_name(size: int) -> str:
    return "whole photograph" if size == 0 else f"{size} px"


def quality_tables(result: dict[str, Any]) -> str:
    """The evaluation as Markdown: the first model (PSNR in dB, SSIM in brackets: damaged -> restored), how it tells
    damages, and where there are other methods, all of them side by side."""
    rows = {(row["damage"], row["size"], row["method"]): row for row in result["rows"]}
    damages, sizes, methods = (list(dict.fromkeys(names)) for names in zip(*rows, strict=True))
    model = result["models"][0]["name"]
    lines = ["| damage | " + " | ".join(map(size_name, sizes)) + " |", "|---" * (len(sizes) + 1) + "|"]
    for damage in damages:
        pairs = [(rows[damage, size, "identity"], rows[damage, size, model]) for size in sizes]
        cells = [
            f"{before['psnr']:.1f} → **{after['psnr']:.1f}** ({before['ssim']:.2f} → {after['ssim']:.2f})"
            for before, after in pairs
        ]
        lines.append(f"| {damage.replace('_', ' ')} | " + " | ".join(cells) + " |")
    count = result["rows"][0]["images"]
    about = f"{count} photographs; commit {result['commit'][:12]}, {result['date']}, {result['hardware']}."
    lines += ["", about, "", f"    {result['command']}", ""]
    if result["diagnosis"]:
        lines += ["## What the model says was wrong", "", *_diagnosis_table(result["diagnosis"], sizes), ""]
    if len(methods) > 2:
        lines += ["## Beside other methods", "", "PSNR in dB.", ""]
        for size in sizes:
            lines += [f"{size_name(size)}:".capitalize(), "", "| damage | " + " | ".join(methods) + " |"]
            lines.append("|---" * (len(methods) + 1) + "|")
            for damage in damages:
                values = [rows[damage, size, method]["psnr"] for method in methods]
                cells = [f"**{value:.1f}**" if value == max(values) else f"{value:.1f}" for value in values]
                lines.append(f"| {damage.replace('_', ' ')} | " + " | ".join(cells) + " |")
            lines.append("")
    return "\n".join(lines)


def _diagnosis_table(rows: list[dict[str, Any]], sizes: list[int]) -> list[str]:
    """Mean absolute error of what is said, and in brackets how well it tells apart with from without (ROC AUC)."""
    names = {"sigma": "sigma, of 255", "flips": "flips, % of the pixels", "patches": "patches, % of the area"}
    lines = [
        "Mean absolute error over all damages (area under the ROC curve: with this damage against without).", "",
        "| | " + " | ".join(map(size_name, sizes)) + " |", "|---" * (len(sizes) + 1) + "|",
    ]  # fmt: skip
    for kind in dict.fromkeys(row["kind"] for row in rows):
        found = {row["size"]: row for row in rows if row["kind"] == kind}
        cells = []
        for size in sizes:
            error, auc = (found[size]["mean_error"], found[size]["auc"]) if size in found else (None, None)
            shown = "" if error is None else f"{error if kind == 'sigma' else 100 * error:.2f} "
            cells.append("" if auc is None else f"{shown}({auc:.3f})")
        lines.append(f"| {names.get(kind, kind)} | " + " | ".join(cells) + " |")
    return lines


def quality_curves(rows: list[dict[str, Any]]) -> bytes:
    """PSNR over sizes, a plot for each damage, a line for each method. Returns a PNG."""
    from matplotlib.figure import Figure

    damages, sizes, methods = (list(dict.fromkeys(row[name] for row in rows)) for name in ("damage", "size", "method"))
    values = {(row["damage"], row["size"], row["method"]): row["psnr"] for row in rows}
    columns = min(4, len(damages))
    lines = -(-len(damages) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * lines + 0.5), layout="constrained")
    for axes, damage in zip(figure.subplots(lines, columns, squeeze=False).flat, damages, strict=False):
        for method in methods:
            style = {"color": "gray", "linestyle": ":"} if method == "identity" else {"marker": "."}
            axes.plot(range(len(sizes)), [values[damage, size, method] for size in sizes], label=method, **style)
        axes.set(title=damage.replace("_", " "), xticks=range(len(sizes)))
        axes.set_xticklabels(["whole" if size == 0 else str(size) for size in sizes], fontsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("side of the photograph, pixels", fontsize=9)
    figure.supylabel("PSNR, dB", fontsize=9)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, fontsize=8)
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=100)
    return sink.getvalue()


def triptychs(pictures: list[tuple[str, list[Any]]], side: int = 250) -> bytes:
    """Pictures in rows with a caption above each: damaged, restored, truth. Returns a PNG.

    Args:
        pictures: caption, and uint8 images [H, W, 3] of one size; small ones are shown enlarged, large ones shrunk.
        side: of each picture shown, pixels.
    """
    gap, caption = 6, 16
    widest = max(len(images) for _, images in pictures)
    per_row = 2
    width = per_row * (widest * (side + gap) + 2 * gap)
    height = -(-len(pictures) // per_row) * (side + caption + gap)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (text, images) in enumerate(pictures):
        left, top = index % per_row * (width // per_row) + gap, index // per_row * (side + caption + gap)
        draw.text((left, top + 2), text.encode("ascii", "replace").decode()[:120], fill="black")
        for place, pixels in enumerate(images):
            image = Image.fromarray(pixels)
            scale = side / max(image.size)
            size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
            how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
            sheet.paste(image.resize(size, how), (left + place * (side + gap), top + caption))
    sink = io.BytesIO()
    sheet.save(sink, format="PNG")
    return sink.getvalue()
