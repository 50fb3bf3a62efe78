"""What an evaluation leaves to look at: tables, PSNR over sizes, and pictures side by side."""

from typing import Any

from PIL import Image, ImageDraw

from restore_core import provenance
from restore_core.report.drawing import plot_png, sheet_png


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
    counts = {size: next(row["images"] for row in result["rows"] if row["size"] == size) for size in sizes}
    about = f"{max(counts.values())} photographs"
    if len(set(counts.values())) > 1:
        about = "Photographs: " + ", ".join(f"{count} at {size_name(size)}" for size, count in counts.items())
    about += f"; commit {provenance.short(result['commit'])}, {result['date']}, {result['hardware']}."
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
            shown = [] if error is None else [f"{error if kind == 'sigma' else 100 * error:.2f}"]
            cells.append(" ".join(shown if auc is None else [*shown, f"({auc:.3f})"]))
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
    return plot_png(figure)


def triptychs(pictures: list[tuple[str, list[Any]]]) -> bytes:
    """Pictures in rows with a caption above each: damaged, restored, truth. Returns a PNG.

    Args:
        pictures: caption, and uint8 images [H, W, 3] of one size; small ones are shown enlarged, large ones shrunk.
    """
    side, gap, caption = 250, 6, 16
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
    return sheet_png(sheet)
