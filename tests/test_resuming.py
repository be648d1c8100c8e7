"""What a killed heal goes on with, and what two of them do in one place."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import secateur
from conftest import example_pairs, tiny_transformer, write_pairs
from secateur.data.sources import read_pairs
from secateur.errors import ConfigError, OutputError
from secateur.files import lock
from secateur.healing.recipes import TrainingConfig
from secateur.healing.trainer import last_checkpoint, train
from secateur.healing.training_data import training_sets
from secateur.results import Training, load
from task_folders import example_rows, write_task

SETTINGS: dict[str, Any] = {"steps": 4, "batch_size": 8, "precision": "float32", "train": "blocks"}


@pytest.fixture(autouse=True)
def no_check_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each written model, which takes seconds; test_heal.py has it."""
    monkeypatch.setattr("secateur.models.save.difference", lambda *_: 0.0)


def killed(*given: Any, at: int = 2, **options: Any) -> None:
    """A heal that is interrupted after a step."""

    def kill(what: str, done: int, total: int) -> None:
        if done == at * SETTINGS["batch_size"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        secateur.heal(*given, **(SETTINGS | options), progress=kill)


def test_it_goes_on_with_the_same_model_prompts_and_validation_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny_transformer(tmp_path / "model", "llama", depth=2)
    data = write_pairs(tmp_path / "words.jsonl", example_pairs(16), "find the word")
    measured = write_pairs(tmp_path / "held.jsonl", example_pairs(9, seed=1))
    task = write_task(tmp_path / "task", "sts", example_rows("sts"), name="task")
    same = {"eval_data": measured, "out": tmp_path / "out"}
    killed(model, data, **same)

    def refused(told: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=rf"out: .*out.partial holds an unfinished training .*\({told}\)"):
            secateur.heal(model, data, **(SETTINGS | same | options))

    refused("other prompts; other eval_data", instruction="say it")
    refused("other eval_data", eval_data=data)
    refused("other eval_data", eval_data=None)
    refused("other eval_tasks", eval_tasks=[task])
    refused("eval_sample was None, is 5; other eval_data", eval_sample=5)
    write_pairs(data, example_pairs(16), "find another")
    refused("other prompts")
    write_pairs(data, example_pairs(16), "find the word")
    shutil.move(model, tmp_path / "kept")
    tiny_transformer(model, "llama", depth=2, seed=1)
    refused("other model")
    monkeypatch.chdir(tmp_path)  # the same model and data, by other names of theirs
    for kind in ("json", "jsonl"):
        shutil.move(f"words.{kind}", f"letters.{kind}")
    out = secateur.heal("kept", "./letters.jsonl", **SETTINGS, eval_data="held.jsonl", out="out")
    table = load(out, Training)
    straight = secateur.heal("kept", "letters.jsonl", **SETTINGS, eval_data="held.jsonl", out="straight")
    assert (table.losses, table.prompts) == (load(straight, Training).losses, load(straight, Training).prompts)
    assert (table.steps, table.settings["instruction"], table.settings["eval_sample"]) == (4, None, None)
    (source,) = table.settings["eval_data"]
    assert (source["name"], source["sha256"]) == ("held.jsonl", read_pairs(measured).source.sha256)
    assert list(table.settings["eval_tasks"]) == []


def test_one_run_at_a_time_resumes_and_not_what_an_earlier_version_began(
    llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    killed(llama_folder, pairs_file, out=tmp_path / "out")
    partial = tmp_path / "out.partial"
    with lock(partial), pytest.raises(OutputError, match="another run is working in it"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "out")
    made = (partial / "done.json").rename(tmp_path / "done.json")
    with pytest.raises(ConfigError, match=r"an unfinished training .*\(begun by an earlier version\): remove it"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "out")
    made.rename(partial / "done.json")

    def at_work(what: str, done: int, total: int) -> None:
        with pytest.raises(OutputError, match="another run is working in it"), lock(partial):
            pass

    secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "out", progress=at_work)
    assert not partial.exists()


DAMAGES = {
    "optimizer.pt": lambda file: file.write_bytes(file.read_bytes()[:-100]),
    "scheduler.pt": lambda file: file.unlink(),
    "rng_state.pth": lambda file: file.write_bytes(
        file.read_bytes().replace(file.read_bytes()[-3000:-2990], b"?" * 10)
    ),
    "trainer_state.json": lambda file: file.write_text("{}"),
    "trained.safetensors": lambda file: file.write_bytes(file.read_bytes()[:-1]),
}


def test_in_place_of_a_damaged_checkpoint_the_one_before_it_goes_on(
    llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    killed(llama_folder, pairs_file, out=tmp_path / "out", at=3)
    checkpoints = tmp_path / "out.partial" / "checkpoints"
    newest = max(checkpoints.iterdir())
    shutil.copytree(newest, tmp_path / "kept")
    for name, damage in DAMAGES.items():
        assert last_checkpoint(checkpoints) == newest
        damage(newest / name)
        assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
        assert not newest.exists()
        shutil.copytree(tmp_path / "kept", newest)
    (newest / "rng_state.pth").rename(newest / "rng_state_0.pth")  # the first of two processes or more
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
    shutil.copytree(tmp_path / "kept", newest)
    state = json.loads((newest / "trainer_state.json").read_text())
    assert state["log_history"][-1].pop("processes") == 1
    state["log_history"][-1]["processes"] = 3
    (newest / "trainer_state.json").write_text(json.dumps(state))
    for number in range(3):
        shutil.copy(tmp_path / "kept" / "rng_state.pth", newest / f"rng_state_{number}.pth")
    (newest / "rng_state.pth").unlink()
    assert last_checkpoint(checkpoints) == newest
    (newest / "rng_state_2.pth").unlink()  # the last of three was killed before it wrote its own
    assert last_checkpoint(checkpoints) == checkpoints / "checkpoint-1"
    shutil.copytree(tmp_path / "kept", newest)
    DAMAGES["optimizer.pt"](newest / "optimizer.pt")
    steps: list[int] = []

    def offline(what: str, done: int, total: int) -> None:
        steps.append(done)
        if done == 3 * SETTINGS["batch_size"]:
            raise ConnectionError("the tracker does not answer")

    with pytest.raises(ConnectionError, match="the tracker does not answer"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "out", progress=offline)
    assert (newest.name, steps[0]) == ("checkpoint-2", SETTINGS["batch_size"])


def test_a_checkpoint_of_sharded_weights_is_refused_and_stays(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    killed(llama_folder, pairs_file, out=tmp_path / "out")
    (checkpoint,) = (tmp_path / "out.partial" / "checkpoints").iterdir()
    (checkpoint / "trained.safetensors").unlink()
    (checkpoint / "pytorch_model_fsdp_0").mkdir()  # what accelerate calls it
    with pytest.raises(OutputError, match="has sharded weights: resume it as it was begun"):
        secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "out")
    assert checkpoint.is_dir()


def test_seconds_are_those_of_all_starts(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """A training that has nothing left to do still knows what it took."""
    config = TrainingConfig(**SETTINGS)
    sets, _ = training_sets([read_pairs(pairs_file)], config)
    found = []
    for _ in range(2):
        model = secateur.open_model(llama_folder, device="cpu")
        found.append(train(model, sets, config, tmp_path).seconds)
    assert 0.5 * found[0] < found[1] < found[0] + 5
