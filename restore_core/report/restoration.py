"""One self-contained page about a restored bucket."""

import base64
import json
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from restore_core.manifest import Overview, Row
from restore_core.report.drawing import plot_png


def restore_page(
    overview: Overview, record: dict[str, Any], samples: list[tuple[Row, bytes, bytes]], input_uri: str, output_uri: str
) -> bytes:
    """One self-contained HTML page about a restored bucket. Keys and messages are taken as hostile text.

    Args:
        overview: of everything listed.
        record: what run.json holds.
        samples: rows of restored photographs, and JPEGs of what they were and are.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    failures = [
        {"error": error, "count": count, "key": key, "message": message}
        for error, count in overview.errors.most_common()
        for key, message in [overview.first_failures[error]]
    ]
    page = environment.get_template("report.html").render(
        record=record,
        record_json=json.dumps(record, indent=2),
        input=input_uri,
        output=output_uri,
        failures=failures,
        formats=overview.formats.most_common(),
        samples=[
            {
                "key": row.key,
                "caption": f"{row.format} {row.width} x {row.height}, mean change {row.change:.1f} of 255",
                "before": _data_uri(before, "jpeg"),
                "after": _data_uri(after, "jpeg"),
            }
            for row, before, after in samples
        ],
        change_plot=_data_uri(_change_plot(overview.changes), "png") if len(overview.changes) > 1 else None,
    )
    return page.encode("utf-8", "backslashreplace")


def _change_plot(changes: "array[float]") -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.4), layout="constrained")
    axes = figure.subplots()
    counts, edges = np.histogram(np.frombuffer(changes, np.float32), bins=40)  # matplotlib's takes 264 bytes a value
    axes.stairs(counts, edges, fill=True, color="#4878a8")
    axes.set(xlabel="mean absolute change of a restored photograph, of 255", ylabel="photographs")
    axes.grid(alpha=0.3)
    return plot_png(figure)


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
