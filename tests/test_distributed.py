"""Several processes that train one model: what they are trained as, and what becomes of it, on CPUs over gloo."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

import secateur
from conftest import example_pairs, tiny_transformer, write_pairs
from forked import start
from secateur.data.vectors import PROBES
from secateur.results import Training, load
from servers import wait_until

pytestmark = pytest.mark.slow

BASE = {"recipe": "finetune", "batch_size": 8, "learning_rate": 3e-3, "scale": 20.0, "precision": "float32"}
LORA = BASE | {"recipe": "l3prune", "steps": 6, "lora_rank": 4, "lora_dropout": 0.0, "max_length": 48, "eval_every": 2}
ALL = BASE | {"steps": 20, "train": "all"}
TAUGHT = BASE | {"steps": 8, "train": "blocks", "distill": "both"}
SEVERAL = Path(__file__).with_name("several.py")
FSDP = """
compute_environment: LOCAL_MACHINE
distributed_type: FSDP
use_cpu: true
mixed_precision: bf16
num_machines: 1
num_processes: 2
fsdp_config:
  fsdp_version: 2
"""


def words(**options: object) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]


def started(tmp_path: Path, *command: object, kind: str = "fsdp") -> subprocess.Popen[str]:
    """A script with its arguments, or ``-m`` and a module with its own, in two processes of accelerate (FSDP) or
    torchrun (DDP)."""
    if kind == "fsdp":
        (tmp_path / "fsdp.yaml").write_text(FSDP)
        launcher = ["accelerate.commands.launch", "--config_file", tmp_path / "fsdp.yaml", "--main_process_port", "0"]
    else:
        launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", *launcher, *command]
    pipe = subprocess.PIPE
    return subprocess.Popen([str(word) for word in line], env=environment, stdout=pipe, stderr=pipe, text=True)


def launch(tmp_path: Path, *command: object, kind: str = "fsdp") -> None:
    """As :func:`started`, until it has ended well."""
    process = started(tmp_path, *command, kind=kind)
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-5000:]


def ranks(environment: Mapping[str, str]) -> list[dict[str, str]]:
    """The environments of two processes as a launcher starts them. Nobody ends one of them when the other dies."""
    with socket.socket() as given:
        given.bind(("127.0.0.1", 0))
        port = str(given.getsockname()[1])
    alike = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    return [{**environment, **alike, "RANK": rank, "LOCAL_RANK": rank} for rank in "01"]


def losses_of(folder: Path) -> list[float]:
    return [row.loss for row in load(folder, Training).losses]


def scores_of(folder: Path) -> list[float]:
    return [row.score for row in load(folder, Training).evaluations]


def assert_same_weights(one: Path, other: Path) -> None:
    weights, same = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert weights.keys() == same.keys()
    assert all(torch.allclose(weights[key], same[key], atol=1e-4) for key in same)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 texts without labels."""
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("".join(f"{row['query']}\n{row['positive']}\n" for row in example_pairs(32)), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Options of a training that is scored by queries longer than those that it reads."""
    file = tmp_path_factory.mktemp("held-out") / "long.jsonl"
    rows = [row | {"query": f"{'a' * 60} {row['query']}"} for row in example_pairs(seed=1)]
    return LORA | {"eval_data": write_pairs(file, rows)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained embedder."""
    folder = tmp_path_factory.mktemp("teacher")
    transformer = Transformer(str(tiny_transformer(folder / "plain", "bert", depth=2)))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu").save(str(folder / "teacher"))
    return folder / "teacher"


@pytest.fixture(scope="module")
def alone(llama_folder: Path, pairs_file: Path, texts: Path, teacher: Path, lora, tmp_path_factory) -> Path:
    """Folder of models that one process trained."""
    folder = tmp_path_factory.mktemp("alone")
    secateur.heal(llama_folder, pairs_file, **lora, out=folder / "lora")
    secateur.heal(llama_folder, pairs_file, **ALL, out=folder / "all")
    secateur.heal(llama_folder, texts, **TAUGHT, teacher=teacher, out=folder / "taught")
    return folder


def heal(llama_folder: Path, data: Path, out: Path, **options: object) -> list[object]:
    return ["heal", llama_folder, "--data", data, *words(**options), "-o", out]


@pytest.fixture(scope="module")
def ddp(llama_folder: Path, pairs_file: Path, texts: Path, teacher: Path, lora, tmp_path_factory) -> Path:
    """Folder of models that two processes of DDP trained, one model after the other."""
    folder = tmp_path_factory.mktemp("ddp")
    command = heal(llama_folder, pairs_file, folder / "models" / "lora", **lora)
    command += ["then", *heal(llama_folder, pairs_file, folder / "models" / "cached", **lora, mini_batch_tokens=200)]
    taught = TAUGHT | {"teacher": teacher, "cache": folder / "cache"}
    command += ["then", *heal(llama_folder, texts, folder / "models" / "taught", **taught)]
    launch(folder, SEVERAL, folder / "environment.json", *command, kind="ddp")
    return folder


@pytest.fixture(scope="module")
def fsdp(llama_folder: Path, pairs_file: Path, texts: Path, teacher: Path, tmp_path_factory) -> Path:
    """As ``ddp``, by FSDP."""
    folder = tmp_path_factory.mktemp("fsdp")
    command = heal(llama_folder, pairs_file, folder / "models" / "all", **ALL)
    taught = TAUGHT | {"teacher": teacher, "cache": folder / "cache"}
    command += ["then", *heal(llama_folder, texts, folder / "models" / "taught", **taught)]
    launch(folder, SEVERAL, folder / "environment.json", *command)
    return folder


@pytest.mark.parametrize("name", ["lora", "cached"])
def test_two_processes_train_as_one_does(ddp: Path, alone: Path, name: str):
    """The same batches, each anchor with the candidates of both; one of them scores, and writes."""
    assert scores_of(ddp / "models" / name) == pytest.approx(scores_of(alone / "lora"), abs=1e-6)
    assert losses_of(ddp / "models" / name) == pytest.approx(losses_of(alone / "lora"), rel=1e-4)
    assert_same_weights(ddp / "models" / name, alone / "lora")
    assert sorted(item.name for item in (ddp / "models").iterdir()) == ["cached", "lora", "taught"]


def test_sharded_weights_are_trained_as_whole_ones(fsdp: Path, alone: Path):
    assert losses_of(fsdp / "models" / "all") == pytest.approx(losses_of(alone / "all"), rel=1e-4)
    assert_same_weights(fsdp / "models" / "all", alone / "all")


def test_a_killed_sharded_training_goes_on_bit_for_bit(
    fsdp: Path, llama_folder: Path, pairs_file: Path, tmp_path: Path
):
    """From checkpoints in which each process has written its part, also in the middle of an epoch: every third step
    ends one."""
    environment = json.loads((fsdp / "environment.json").read_text())
    command = heal(llama_folder, pairs_file, tmp_path / "killed", **ALL)
    checkpoints = tmp_path / "killed.partial" / "checkpoints"
    logs = [tmp_path / name for name in "01"]
    both = [start(command, log, log, environment=own) for log, own in zip(logs, ranks(environment), strict=True)]
    wait_until(lambda: any(checkpoints.glob("checkpoint-6/trainer_state.json")) or not both[0].is_alive())
    for process in reversed(both):  # as a launcher ends the others, who do not wait for the dead one
        process.kill()
        process.join()
    parts = {part.name for part in checkpoints.glob("checkpoint-6/*_0/*.distcp")}
    assert parts == {"__0_0.distcp", "__1_0.distcp"}, logs[0].read_text()
    drawing = [torch.load(file, weights_only=False)["cpu"] for file in checkpoints.glob("checkpoint-4/rng_state_*.pth")]
    assert not torch.equal(*drawing)  # each process has a dropout of its own
    shutil.rmtree(checkpoints / "checkpoint-6")
    both = [start(command, log, log, environment=own) for log, own in zip(logs, ranks(environment), strict=True)]
    for process in both:
        process.join(300)
        assert process.exitcode == 0, logs[0].read_text()
    whole = fsdp / "models" / "all"
    assert losses_of(tmp_path / "killed") == losses_of(whole)
    weights, same = (load_file(folder / "model.safetensors") for folder in (tmp_path / "killed", whole))
    assert all(torch.equal(weights[key], same[key]) for key in same)
    before = load_file(llama_folder / "model.safetensors")
    assert not torch.equal(same["embed_tokens.weight"], before["embed_tokens.weight"])


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_teachers_texts_are_shared_among_the_processes(kind: str, alone: Path, request: pytest.FixtureRequest):
    folder = request.getfixturevalue(kind)
    *probes, first, second = sorted(len(np.load(keys)) for keys in (folder / "cache").glob("*/*.keys.npy"))
    assert (first, second) == (32, 32)  # of each process, and no text twice
    assert probes in ([len(PROBES)], [len(PROBES)] * 2)  # the later process may find those of the earlier one
    assert losses_of(folder / "models" / "taught") == pytest.approx(losses_of(alone / "taught"), rel=1e-4)
    assert_same_weights(folder / "models" / "taught", alone / "taught")


def test_what_is_wrong_with_all_processes_is_said_once(tmp_path: Path):
    process = started(tmp_path, "-m", "secateur", "heal", tmp_path / "absent", kind="ddp")
    _, errors = process.communicate()
    assert process.returncode
    assert errors.count("secateur: ") == 1


def test_machines_that_do_not_share_the_folder_are_refused(
    llama_folder: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """When the training goes on, each would begin at a step of its own."""
    machines = []
    for own in ranks({}):
        (tmp_path / own["RANK"]).mkdir()
        monkeypatch.chdir(tmp_path / own["RANK"])
        log = tmp_path / f"log-{own['RANK']}"
        command = heal(llama_folder, pairs_file, Path("out"), **ALL)
        machines.append(start(command, log, log, environment=own | {"LOCAL_RANK": "0"}))
    machines[1].join(300)
    machines[0].kill()
    assert machines[1].exitcode
    assert "output out.partial: does not hold what the first process has written" in log.read_text()
