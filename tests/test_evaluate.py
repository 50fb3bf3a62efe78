"""The evaluation against scikit-image, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from jobs import command_line, evaluate, pack_dataset
from jobs.evaluate import Evaluate
from restore_core import checkpoint
from restore_core.inference import Restorer
from restore_core.pipelines import evaluation
from restore_core.trainer import VALIDATION
from tests.photos import encoded, write_tree

pytestmark = pytest.mark.usefixtures("one_thread")
Models = Callable[[int], Path]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    source = write_tree(tmp_path / "photos", {f"Person_{n}/{n}.jpg": encoded(n, 40, 50) for n in range(6)})
    assert pack_dataset.main(pack_dataset.PackDataset(input=(str(source),), output=str(tmp_path / "data"))) == 0
    table = pa.concat_tables(pq.read_table(path) for path in sorted((tmp_path / "data").glob("*.parquet")))
    everything = table.set_column(2, "split", pa.array(["val"] * len(table)))
    for path in (tmp_path / "data").glob("*.parquet"):
        path.unlink()
    pq.write_table(everything, tmp_path / "data/val-00000.parquet")
    return tmp_path / "data"


def test_numbers_are_scikit_images(
    data: Path, tmp_path: Path, small_model: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(self: Restorer, images: list[np.ndarray]) -> object:
        results = restore(self, images)
        seen.append((images, [image if r.undamaged() else r.pixels for image, r in zip(images, results, strict=True)]))
        return results

    restore = Restorer.__call__
    monkeypatch.setattr(Restorer, "__call__", watched)
    job = Evaluate(data=str(data), output=str(tmp_path / "out"), model=str(small_model(1)), sizes=(24, 0), images=4)
    assert evaluate.main(job) == 0
    result = json.loads((tmp_path / "out/quality.json").read_text())
    assert result["model"]["sha256"] == checkpoint.read(str(small_model(1))).sha256
    rows = result["rows"]
    assert [(row["size"], row["damage"]) for row in rows] == [(size, name) for size in (24, 0) for name in VALIDATION]
    assert {image.shape for images, _ in seen[: len(VALIDATION)] for image in images} == {(24, 24, 3)}
    assert {image.shape for images, _ in seen[len(VALIDATION) :] for image in images} == {(40, 50, 3)}
    clean = seen[0][0]  # the first damage is none
    for row, (damaged, restored) in zip(rows[: len(VALIDATION)], seen, strict=False):
        assert row["images"] == 4
        for column, images in (("_identity", damaged), ("", restored)):
            pairs = list(zip(images, clean, strict=True))
            psnr = [100.0 if np.array_equal(a, b) else peak_signal_noise_ratio(b, a) for a, b in pairs]
            ssim = [
                structural_similarity(
                    a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
                )
                for a, b in pairs
            ]
            assert row[f"psnr{column}"] == pytest.approx(np.mean(psnr))
            assert row[f"ssim{column}"] == pytest.approx(np.mean(ssim))
    assert "| noise 25 |" in (tmp_path / "out/quality.md").read_text()


def test_what_cannot_be_evaluated_is_refused(
    data: Path, tmp_path: Path, small_model: Models, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 2, one line, nothing written."""

    def call(**changed: object) -> str:
        options = {"data": data, "output": tmp_path / "out", "model": small_model(1), **changed}
        arguments = [text for name, value in options.items() for text in ("--" + name, *str(value).split())]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *arguments])
        capsys.readouterr()
        assert command_line.run(evaluate.main, Evaluate) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        assert not (tmp_path / "out").exists()
        return err

    assert f"--output {data}/quality: lies inside --data {data}; choose" in call(output=data / "quality")
    assert "--split test: no photographs of it in --data" in call(split="test")
    assert "--images 0: use 1 or more" in call(images=0)
    assert "--sizes 3: use 16 or more" in call(sizes="48 3")
    assert "--model nothing: no bundled model" in call(model="nothing")
    assert "no such file or folder" in call(data=tmp_path / "nowhere")
    broken = write_tree(tmp_path / "broken", {"a.parquet": b"PAR1 or not"})
    assert f"--data {broken}/a.parquet: not a readable Parquet file" in call(data=broken)
    (tmp_path / "undecodable").mkdir()
    pq.write_table(pa.table({"split": ["val"], "image": [b"?"]}), tmp_path / "undecodable/a.parquet")
    assert "--split val: none of its photographs" in call(data=tmp_path / "undecodable")


def test_seeds_of_the_damages_are_not_those_of_training() -> None:
    from restore_core.config import PRESETS

    assert evaluation.SEED not in {preset.seed for preset in PRESETS.values()}
