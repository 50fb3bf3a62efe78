"""What a training leaves to look at: the loss plot and the sample sheet."""

from itertools import pairwise

from PIL import Image, ImageDraw
from torch import Tensor

from restore_core.report.drawing import paste, plot_png, sheet_png


def loss_plot(history: list[dict[str, float]]) -> bytes:
    """Training and validation loss, and validation PSNR per damage, over epochs. Returns a PNG."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, quality = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    marker = "o" if len(history) == 1 else ""  # of one point there is no line
    losses.plot(epochs, [row["train_loss"] for row in history], marker=marker, label="train")
    losses.plot(epochs, [row["val_loss"] for row in history], marker=marker, label="validation (averaged weights)")
    losses.set(xlabel="epoch", ylabel="RMSE + gate", title="Loss")
    for name in [name for name in history[0] if name.startswith("psnr_") and name != "psnr_clean"]:
        quality.plot(
            epochs, [row[name] for row in history], marker=marker, label=name.removeprefix("psnr_").replace("_", " ")
        )
    quality.set(xlabel="epoch", ylabel="PSNR, dB", title="Restored validation samples")
    for axes in (losses, quality):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for before, after in pairwise(history):
        if before["size"] != after["size"]:
            losses.axvline(after["epoch"] - 0.5, color="gray", linestyle=":")
    return plot_png(figure)


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
            paste(sheet, images, left + index * (side + gap), header, gap)
        left += 2 * side + 3 * gap
    draw.text((left, 2), "truth", fill="black")
    paste(sheet, clean, left, header, gap)
    return sheet_png(sheet)
