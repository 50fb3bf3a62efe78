"""`make demo`, with a network of random weights in place of the bundled one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from jobs import demo
from restore_core.errors import UsageError


@pytest.mark.ray
def test_the_demo_restores_compares_and_says_where_to_look(
    local_ray: None, tmp_path: Path, small_model: Callable[[int], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "demo"
    assert demo.main(demo.Demo(output=output, model=str(small_model(1)))) == 0
    out = capsys.readouterr().out
    assert "60 objects: 60 restored (0 by earlier runs)" in out
    assert f"report: {output}/restored/_restore/report.html" in out and "images/s" in out
    table = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if line.split()[:1] and len(line.split()) == 3
    }
    assert table.keys() == set(demo.DAMAGES) and table["undamaged"][0] == "100.00"
    assert 19 < float(table["noise"][0]) < 22  # 20.2 dB but for what clipping takes away
    with Image.open(output / "before_after.png") as sheet:
        assert sheet.width > sheet.height > 2 * 128


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(UsageError, match=r"^--output .*mine: exists and is not a demo's"):
        demo.main(demo.Demo(output=tmp_path / "mine"))
