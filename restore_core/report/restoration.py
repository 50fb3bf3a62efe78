"""One self-contained page about a restored bucket."""

import base64
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from restore_core import codec
from restore_core.manifest import Row


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
        loader=jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates"),
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
