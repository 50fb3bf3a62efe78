"""What a comparison of networks leaves to look at: a table, their curves, and faces side by side."""

from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw
from torch import Tensor

from restore_core import provenance
from restore_core.report.drawing import paste, plot_png, sheet_png

OVERVIEW_SIDE = 144  # pixels, about: of a face in the overview


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
        f"PSNR in dB. {result['images']} photographs at {result['size']} px; commit "
        f"{provenance.short(result['commit'])}, {result['date']}, {result['hardware']}."
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
    return plot_png(figure)


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
        paste(sheet, images.repeat_interleave(scale, 2).repeat_interleave(scale, 3), left, header, gap)
    return sheet_png(sheet)
