#!/usr/bin/env python
"""Measure a model on held-out photographs: PSNR and SSIM per damage and size, beside the damaged input itself.

Writes OUTPUT/quality.json (with command, commit, versions, hardware, date) and OUTPUT/quality.md, the same as a table.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jobs import command_line
from restore_core.config import require


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    data: str
    """Dataset Parquet from jobs/pack_dataset.py: a local folder or s3://bucket/prefix."""
    output: str
    """Where quality.json and quality.md go: a local folder or s3://bucket/prefix."""
    model: str = "faces"
    """A bundled model's name, or the path or URI of a model folder."""
    split: Literal["val", "test"] = "val"
    """Which people: those of val or of test."""
    sizes: tuple[int, ...] = (48, 64, 128)
    """Sides of the face crops, pixels; 0 is the whole photograph."""
    images: int = 200
    """Photographs, at most the whole split."""

    def __post_init__(self) -> None:
        require(self.images >= 1, "images", self.images, "use 1 or more")
        require(bool(self.sizes), "sizes", "", "name at least one")
        for size in self.sizes:
            require(size == 0 or size >= 16, "sizes", size, "use 16 or more (SSIM needs a window), or 0")


def main(job: Evaluate) -> int:
    from restore_core import checkpoint, provenance, sources
    from restore_core.errors import UsageError
    from restore_core.storage import open_storage, overlaps, require_readable, require_writable

    data = open_storage(job.data, option="--data")
    require_readable(data, "--data")
    output = open_storage(job.output, option="--output")
    if overlaps(data, output):
        raise UsageError(f"--output {job.output}: lies inside --data {data.uri}; choose another place")
    require_writable(output, "--output")
    model = checkpoint.read(job.model)
    if not sources.count_split(data, "--data", job.split):
        raise UsageError(f"--split {job.split}: no photographs of it in --data {data.uri}; pack with a share for it")
    from restore_core.pipelines.evaluation import evaluate

    rows = evaluate(model, data, split=job.split, sizes=job.sizes, images=job.images)
    result = {
        **provenance.record(),
        "model": {"name": job.model, "sha256": model.sha256},
        "rows": rows,
    }
    table = as_markdown(result)
    output.write("quality.json", json.dumps(result, indent=2).encode())
    output.write("quality.md", table.encode())
    print(table)
    return command_line.DONE


def as_markdown(result: dict[str, Any]) -> str:
    """PSNR in dB, and SSIM in brackets: the damaged input -> restored."""
    rows = result["rows"]
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    names = ["whole photograph" if size == 0 else f"{size} px" for size in sizes]
    lines = ["| damage | " + " | ".join(names) + " |", "|---" * (len(sizes) + 1) + "|"]
    for damage in dict.fromkeys(row["damage"] for row in rows):
        cells = [
            f"{row['psnr_identity']:.1f} → **{row['psnr']:.1f}** ({row['ssim_identity']:.2f} → {row['ssim']:.2f})"
            for row in rows
            if row["damage"] == damage
        ]
        lines.append(f"| {damage.replace('_', ' ')} | " + " | ".join(cells) + " |")
    about = f"{rows[0]['images']} photographs; commit {result['commit'][:12]}, {result['date']}, {result['hardware']}."
    return "\n".join([*lines, "", about, "", f"    {result['command']}", ""])


if __name__ == "__main__":
    sys.exit(command_line.run(main, Evaluate))
