"""Parquet outputs over many runs, while the input's files are renamed, cut anew and rolled back, and runs fail or are
stopped or killed: no photograph loses its only output, and in the end every output is what its row group is now.

The real driver without Ray: instead of restoring, a shard is a note of the keys and the version that it was made of.
"""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from restore_core import checkpoint, manifest
from restore_core.errors import UsageError
from restore_core.manifest import Ledger
from restore_core.pipelines import restoration
from restore_core.storage import LocalStorage, open_storage

Export = dict[str, tuple[tuple[str, ...], ...]]
"""Files, their row groups, and the keys in them."""
ALL = frozenset(["read"])


class Killed(BaseException):
    pass


class Archive:
    """An input and its output."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.input, self.output = folder / "in", folder / "out"
        self.input.mkdir()
        self.output.mkdir()
        self.outcome: Callable[[str], str] = lambda _: "written"
        plan = SimpleNamespace(device="cpu", max_pixels=1)
        monkeypatch.setattr(restoration, "_plan", lambda *_, **__: (plan, 1))
        monkeypatch.setattr(restoration, "_samples", lambda *_: [])
        monkeypatch.setattr(restoration, "_restore_wave", self._wave)
        monkeypatch.setattr(restoration, "WAVE_OBJECTS", 1)  # a row group
        monkeypatch.setattr(restoration, "WAVE_SHARE", 0)

    def export(self, files: Export) -> None:
        """The same contents are the same version of a file, whenever and under whatever name."""
        for path in self.input.iterdir():
            path.unlink()
        for name, groups in files.items():
            path = self.input / name
            schema = pa.schema([("key", pa.string()), ("image", pa.binary())])
            with pq.ParquetWriter(path, schema) as writer:
                for keys in groups:
                    writer.write_table(pa.table({"key": list(keys), "image": [b"?"] * len(keys)}, schema=schema))
            version = random.Random(str(groups)).randrange(10**18)
            os.utime(path, ns=(version, version))

    def _wave(self, wave: Any, run: Any, actors: int, options: Any, account: Any) -> None:
        account.done.clear()
        (group,) = wave.groups
        outcome, rows = self.outcome(group.output_key), [wave.rows[key] for key in group.keys.to_pylist()]
        if outcome == "stopped":
            raise KeyboardInterrupt
        if outcome == "failed":
            for row in rows:
                row.fail("read", "no connection")
        else:
            made = {"keys": group.keys.to_pylist(), "etag": group.file.etag}
            LocalStorage(self.output).write(group.output_key, json.dumps(made).encode())
            if outcome == "killed":
                raise Killed
            for row in rows:
                row.status, row.output_key = "restored", group.output_key
        account.add(rows)
        account.flush()

    def restore(self, retry: frozenset[str] = ALL, keys: str | None = None) -> None:
        options = restoration.RestoreOptions(model="faces-fast", device="cpu", max_pixels=1, retry=retry, keys=keys)
        place = open_storage(str(self.input)), open_storage(str(self.output))
        restoration.restore(*place, checkpoint.read("faces-fast"), options, ["test"])

    def shards(self) -> dict[str, Any]:
        return {path.name: json.loads(path.read_text()) for path in self.output.glob("*.parquet")}

    def rows(self) -> dict[str, str | None]:
        rows = manifest.rows_of(Ledger(LocalStorage(self.output), "reader").latest())
        return {row.key: row.output_key for row in rows}

    def assert_right(self, files: Export) -> None:
        """Every row group's output is made of what it is now; other outputs are of photographs that have left."""
        now, shards, rows = {}, self.shards(), self.rows()
        for name, groups in files.items():
            etag = f"{(self.input / name).stat().st_mtime_ns:x}"
            for index, keys in enumerate(groups):
                suffix = f"-{index:05}" if len(groups) > 1 else ""
                target = name.removesuffix(".parquet") + suffix + ".parquet"
                now[target] = {"keys": list(keys), "etag": etag}
                assert {key: rows.get(key) for key in keys} == dict.fromkeys(keys, target)
        assert {name: made for name, made in shards.items() if name in now} == now
        listed = {key for made in now.values() for key in made["keys"]}
        others = {output: key for key, output in rows.items() if key not in listed and output is not None}
        assert others.keys() <= shards.keys() - now.keys(), "a row names what has been deleted or written over"
        for output, key in others.items():
            assert key in shards[str(output)]["keys"]

    def extra(self) -> set[str]:
        return self.shards().keys() - {output for output in self.rows().values() if output is not None}


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Archive:
    return Archive(tmp_path, monkeypatch)


def changed(files: Export, draw: random.Random) -> Export:
    """As an exporter may leave them the next day."""
    files = {name: tuple(groups) for name, groups in files.items()}
    kind = draw.choice(["rename", "swap", "cut", "join", "drop", "move", "add"])
    names = sorted(files)
    name, other = draw.choice(names), draw.choice(names)
    keys = [key for groups in files.values() for keys in groups for key in keys]
    if kind == "rename":
        files[draw.choice([f"{letter}.parquet" for letter in "ABCXYZ"])] = files.pop(name)
    elif kind == "swap":
        files[name], files[other] = files[other], files[name]
    elif kind == "cut":
        together = [key for group in files[name] for key in group]
        at = draw.randrange(len(together) + 1)
        files[name] = tuple(tuple(part) for part in (together[:at], together[at:]) if part)
    elif kind == "join" and name != other:
        files[name] += files.pop(other)
    elif kind in ("drop", "move") and len(keys) > 1:
        key = draw.choice(keys)
        files = {
            file: tuple(part for group in groups if (part := tuple(each for each in group if each != key)))
            for file, groups in files.items()
        }
        files = {file: groups for file, groups in files.items() if groups}
        if kind == "move":
            target = draw.choice([*files, "N.parquet"])
            files[target] = (*files.get(target, ()), (key,))
    elif kind == "add":
        new = next((key for key in "abcdefghij" if key not in keys), None)
        files[name] += ((new,),) if new else ()
    return files


@pytest.mark.parametrize("kills", [False, True])
@pytest.mark.parametrize(
    "seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.faults) for seed in range(10, 100))]
)
def test_whatever_happens_to_the_files_and_the_runs(
    archive: Archive, monkeypatch: pytest.MonkeyPatch, seed: int, kills: bool
) -> None:
    draw = random.Random(seed)
    files: Export = {"A.parquet": (("a", "b"), ("c",)), "X.parquet": (("d", "e"),)}
    history = [files]
    delete = LocalStorage.delete
    left = 0

    def deadly(self: LocalStorage, key: str) -> None:
        nonlocal left
        if not key.endswith("lease.json"):  # a dead process's would be taken over
            left -= 1
            if left == 0:
                raise Killed
        delete(self, key)

    monkeypatch.setattr(LocalStorage, "delete", deadly)
    for _ in range(8):
        outcomes = ["written"] * 4 + ["failed", "stopped"] + ["killed"] * kills
        archive.outcome = lambda _, outcomes=outcomes: draw.choice(outcomes)
        left = draw.randrange(12) if kills else 0
        archive.export(files)
        before, keys = archive.shards(), None
        if draw.random() < 0.2:
            some = archive.input.parent / "list"
            some.write_text("\n".join(draw.sample(sorted(files), draw.randint(1, len(files)))))
            keys = str(some)
        try:
            archive.restore(retry=draw.choice([ALL, frozenset()]), keys=keys)
        except Killed:
            pass
        except UsageError as error:
            assert "is also that of" in str(error)
        listed = {key for groups in files.values() for group in groups for key in group}
        after = archive.shards()
        kept = {key for made in after.values() for key in made["keys"]}
        for name in before.keys() - after.keys():
            assert listed.intersection(before[name]["keys"]) <= kept, "the only output of a photograph is deleted"
        history.append(files)
        files = draw.choice(history) if draw.random() < 0.2 else changed(files, draw)
    files = history[-1]
    left, archive.outcome = 0, lambda _: "written"
    archive.export(files)
    for _ in range(2):
        archive.restore()
        archive.assert_right(files)
    if not kills:  # which leave outputs that no row has ever named
        assert not archive.extra()
    assert not list((archive.output / "_restore/begun").glob("*"))
