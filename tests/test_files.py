from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from conftest import disk_of
from secateur.errors import OutputError
from secateur.files import held, new_folder, writing

_HOLDS = """
import sys, time
from pathlib import Path
from secateur.files import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("error", [ConnectionError("refused"), OSError("no route"), FileNotFoundError(2, "no", "/a/b")])
def test_errors_that_are_not_of_the_output_stay_what_they_are(error: OSError, tmp_path: Path):
    with pytest.raises(type(error)) as caught, new_folder(tmp_path / "out"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("error", [OSError(28, "full"), OSError(5, "broken"), "out.partial/x", "."])
def test_errors_of_the_output_are_told_as_such(error: OSError | str, tmp_path: Path):
    if isinstance(error, str):
        error = FileNotFoundError(2, "no", str(tmp_path / error))
    with pytest.raises(OutputError, match="out: "), new_folder(tmp_path / "out"):
        raise error


def test_two_runs_do_not_write_one_folder(tmp_path: Path):
    out = tmp_path / "out"
    with new_folder(out) as folder:
        (folder / "first").touch()
        with pytest.raises(OutputError, match="another run is working in it"), new_folder(out):
            pass
    assert [item.name for item in out.iterdir()] == ["first"]
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_run_held_is_free(tmp_path: Path):
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    (partial / "left").mkdir(parents=True)
    (partial / "left" / "behind").touch()
    with subprocess.Popen([sys.executable, "-c", _HOLDS, partial], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another run"), held(partial):
            pass
        other.kill()
        other.wait()
    with new_folder(out) as folder:
        assert list(folder.iterdir()) == []
    assert out.is_dir()


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_place_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="name a new folder"), new_folder(name):
        pass


def test_a_disk_that_is_full_for_sqlite_is_full(tmp_path: Path):
    with disk_of(64, tmp_path / "disk") as small:
        with (
            pytest.raises(OutputError, match="the disk is full: free some space") as caught,
            writing(small / "index"),
            closing(sqlite3.connect(small / "index")) as index,
        ):
            index.execute("CREATE TABLE seen (key BLOB)")
            index.executemany("INSERT INTO seen VALUES (?)", [(bytes(1000),)] * 200)
            index.commit()
        assert caught.value.concerns_all
    with pytest.raises(sqlite3.OperationalError, match="no such table"), writing(tmp_path / "index"):
        sqlite3.connect(":memory:").execute("SELECT * FROM nowhere")
