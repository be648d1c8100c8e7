"""Several processes that train one model: what they are trained as, and what becomes of it, on CPUs over gloo."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import secateur
from conftest import MakeEncoder, example_pairs
from secateur.data.vectors import PROBES
from secateur.results import Training, load

pytestmark = pytest.mark.slow

SETTINGS = {"recipe": "finetune", "steps": 6, "batch_size": 8, "learning_rate": 3e-3, "scale": 20.0}
SETTINGS |= {"train": "blocks", "precision": "float32"}
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
"""


def words(**options: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def started(tmp_path: Path, *command: object, kind: str = "fsdp") -> subprocess.Popen[str]:
    """A command of secateur, run by two processes of accelerate (FSDP) or torchrun (DDP)."""
    if kind == "fsdp":
        (tmp_path / "fsdp.yaml").write_text(FSDP)
        launcher = ["accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml", "--main_process_port", "0"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", *launcher, "-m", "secateur", *command]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in line], env=environment, stdout=pipe, stderr=pipe, text=True)


def launched(tmp_path: Path, *command: object, kind: str = "fsdp") -> subprocess.CompletedProcess[str]:
    """As :func:`started`, with what came of it."""
    process = started(tmp_path, *command, kind=kind)
    output, errors = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def losses_of(folder: Path) -> list[float]:
    return [row.loss for row in load(folder, Training).losses]


def assert_same_weights(one: Path, other: Path) -> None:
    weights, same = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == same.keys()
    assert all(torch.allclose(weights[key], same[key], atol=1e-4) for key in same)


def test_sharded_weights_are_trained_as_whole_ones(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    one = secateur.heal(llama_folder, pairs_file, **SETTINGS, out=tmp_path / "one")
    command = ["heal", llama_folder, "--data", pairs_file, *words(**SETTINGS), "-o", tmp_path / "two"]
    done = launched(tmp_path, *command)
    assert done.returncode == 0, done.stderr[-5000:]
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=1e-4)
    assert_same_weights(tmp_path / "two", one)


def kill_one(launcher: subprocess.Popen[str], root: Path, pattern: str) -> None:
    """Kill one of the processes that a launcher started, once ``pattern`` matches below ``root``; wait for its end."""
    while not any(root.glob(pattern)):
        assert launcher.poll() is None, f"ended before {pattern}: {launcher.communicate()[1][-3000:]}"
        time.sleep(0.01)
    psutil.Process(launcher.pid).children()[-1].kill()
    launcher.communicate(timeout=60)  # the launcher ends the others, who do not wait for the dead one


def test_a_killed_sharded_training_goes_on_bit_for_bit(llama_folder: Path, pairs_file: Path, tmp_path: Path):
    """From checkpoints in which each process has written its part."""
    settings = SETTINGS | {"train": "all", "steps": 20}
    command = ["heal", llama_folder, "--data", pairs_file, *words(**settings), "-o"]
    done = launched(tmp_path, *command, tmp_path / "whole")
    assert done.returncode == 0, done.stderr[-3000:]
    checkpoints = tmp_path / "killed.partial" / "checkpoints"
    kill_one(started(tmp_path, *command, tmp_path / "killed"), checkpoints, "checkpoint-6/trainer_state.json")
    parts = {part.name for part in checkpoints.glob("checkpoint-6/*_0/*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}
    done = launched(tmp_path, *command, tmp_path / "killed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses_of(tmp_path / "killed") == losses_of(tmp_path / "whole")
    weights, same = (load_file(tmp_path / name / "model.safetensors") for name in ("killed", "whole"))
    assert all(torch.equal(weights[key], same[key]) for key in same)
    before = load_file(llama_folder / "model.safetensors")
    assert not torch.equal(same["embed_tokens.weight"], before["embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_teachers_texts_are_shared_among_the_processes(
    kind: str, llama_folder: Path, make_encoder: MakeEncoder, tmp_path: Path
):
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"{row['query']}\n{row['positive']}\n" for row in example_pairs(32)), encoding="utf-8")
    make_encoder("bert", depth=2).save(str(tmp_path / "teacher"))
    settings = SETTINGS | {"steps": 8, "teacher": tmp_path / "teacher"}
    one = secateur.heal(llama_folder, texts, **settings, out=tmp_path / "one")
    command = ["heal", llama_folder, "--data", texts, *words(**settings), "--cache", tmp_path / "cache"]
    done = launched(tmp_path, *command, "-o", tmp_path / "two", kind=kind)
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = sorted(len(np.load(keys)) for keys in (tmp_path / "cache").glob("*/*.keys.npy"))
    assert sizes == [len(PROBES), len(PROBES), 32, 32]  # of each process, and no text twice
    assert losses_of(tmp_path / "two") == pytest.approx(losses_of(one), rel=1e-4)
    assert_same_weights(tmp_path / "two", one)
