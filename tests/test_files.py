from __future__ import annotations

import errno
import os
import resource
import sqlite3
import stat
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tqdm.auto
import transformers
from safetensors.numpy import save_file

import secateur
from conftest import disk_of
from secateur.errors import ConfigError, OutputError, system_error
from secateur.files import lock, new_folder, output_errors, write_text
from secateur.progress import quiet

_HOLDS = """
import sys, time
from pathlib import Path
from secateur.files import lock
with lock(Path(sys.argv[1])):
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
        with pytest.raises(OutputError, match="another run"), lock(partial):
            pass
        other.kill()
        other.wait()
    with new_folder(out) as folder:
        assert list(folder.iterdir()) == []
    assert out.is_dir()


def test_an_unfinished_training_is_kept(llama_folder: Path, tmp_path: Path):
    checkpoint = tmp_path / "out.partial" / "checkpoints" / "checkpoint-9"
    checkpoint.mkdir(parents=True)
    (tmp_path / "out.partial" / "done.json").touch()
    with pytest.raises(OutputError, match=r"out.partial: holds an unfinished training: name another folder"):
        secateur.prune(llama_folder, 1, out=tmp_path / "out")
    assert checkpoint.is_dir()


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_place_without_a_name_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match="name a new folder"), new_folder(name):
        pass


def test_a_disk_to_which_nothing_can_be_renamed_is_refused_before_any_work(tmp_path: Path):
    with disk_of(100, tmp_path / "volume") as disk:
        with pytest.raises(OutputError, match="cannot be replaced by a finished folder: name a new folder in it"):
            new_folder(disk).__enter__()
        with new_folder(disk / "model") as folder:
            (folder / "file").touch()
        assert (disk / "model" / "file").exists()


def test_a_symbolic_link_is_refused_before_any_work(tmp_path: Path):
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OutputError, match="is a symbolic link: name the folder"), new_folder(tmp_path / "link"):
        raise AssertionError


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read_what_is_written(mask: int, tmp_path: Path):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "deep" / "file", "text")
        with new_folder(tmp_path / "out") as folder:
            write_text(folder / "file", "text")
    finally:
        os.umask(before)
    for path in (tmp_path / "deep", tmp_path / "out"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o777 & ~mask
        assert stat.S_IMODE((path / "file").stat().st_mode) == 0o666 & ~mask


def fill_sqlite(folder: Path) -> None:
    with closing(sqlite3.connect(folder / "a.sqlite")) as table:
        table.execute("CREATE TABLE rows (text TEXT)")
        table.execute("INSERT INTO rows VALUES (?)", ("x" * 300_000,))
        table.commit()


FILL = {
    "python": lambda folder: write_text(folder / "a.txt", "x" * 300_000),
    "sqlite": fill_sqlite,
    "numpy": lambda folder: np.zeros(300_000, np.uint8).tofile(folder / "a.bin"),
    "safetensors": lambda folder: save_file({"a": np.zeros(300_000, np.uint8)}, folder / "a.safetensors"),
}


@pytest.mark.parametrize("library", FILL)
def test_a_full_disk_is_one_whichever_library_meets_it(library: str, tmp_path: Path):
    with (
        disk_of(100, tmp_path / "small") as disk,
        pytest.raises(OutputError, match="the disk is full: free some space"),
        output_errors(disk / "out"),
    ):
        FILL[library](disk)


def test_errors_that_are_not_the_disks_are_passed_on(tmp_path: Path):
    for error in (ConnectionResetError(errno.ECONNRESET, "gone"), TimeoutError("late"), ConfigError("a", 1, "wrong")):
        with pytest.raises(type(error)) as caught, output_errors(tmp_path / "out"):
            raise error
        assert caught.value is error
    try:
        raise ValueError("unrelated") from FileNotFoundError(errno.ENOENT, "no such file")
    except ValueError as error:
        assert system_error(error) is None


def test_too_many_open_files_are_told(tmp_path: Path):
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, limits[0]), limits[1]))
    opened = []
    try:
        with (
            pytest.raises(OutputError, match=r"too many files are open: raise the limit"),
            output_errors(tmp_path / "out"),
        ):
            while True:
                opened.append((tmp_path / "file").open("w"))
    finally:
        for file in opened:
            file.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


PRINTS = "from secateur import cli\n@cli.app.command('many')\ndef many():\n    print('a' * 5000)\ncli.main()"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_output_that_cannot_be_printed_is_no_traceback():
    command = [sys.executable, "-c", PRINTS, "many"]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "secateur: No space left on device\n")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_what_is_quiet_in_two_threads_is_as_before_when_both_are_done():
    shown, verbosity = tqdm.auto.tqdm.__init__, transformers.logging.get_verbosity()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=first)
    thread.start()
    inside.wait()
    with quiet():
        leave.set()
        thread.join()
        assert tqdm.auto.tqdm(range(2)).disable
        assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert tqdm.auto.tqdm.__init__ == shown
    assert transformers.logging.get_verbosity() == verbosity
