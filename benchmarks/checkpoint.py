"""What it costs to cut a checkpoint, and to open what was cut: memory, bytes and time, in one run.

    python benchmarks/checkpoint.py                      # Llama-3-8B's configuration: 16 GB, and 10 GB for the results
    python benchmarks/checkpoint.py --hidden-size 1024   # a quick run: 1.4 GB

A sharded checkpoint of random numbers is written, and cut to its first layers by ``secateur prune`` in fresh processes:
from the folder, in turns with ``cp`` of as many bytes (page cache emptied of both sources, results brought to the disk
by both), and from a stand-in of the Hub on this machine that counts what it sends. Of the memory, *allocated* is the
process's own; the rest of the resident memory are pages of files, which the system takes back where it needs them.
Last, the whole checkpoint and the cut one are opened by transformers, and encode a text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from hub import StandIn, serve

SHARD_BYTES = 5_000_000_000  # as transformers' save_pretrained
VOCABULARY, HEAD = 128_256, 128

COMMAND = """
import json, re, resource, sys, threading, time

def status(field, file="status"):
    return int(re.search(rf"{field}:\\s+(\\d+)", open(f"/proc/self/{file}").read())[1])

import torch, transformers, secateur
secateur.prune
start, imported, read, allocated, done = time.perf_counter(), status("RssAnon"), status("rchar", "io"), [0], []

def watch():
    while not done:
        allocated[0] = max(allocated[0], status("RssAnon"))
        time.sleep(0.02)

watcher = threading.Thread(target=watch)
watcher.start()
folder = secateur.prune(sys.argv[1], int(sys.argv[2]), pooling="mean", out=sys.argv[3])
done.append(True)
watcher.join()
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak": status("VmHWM") * 1024,
    "allocated": allocated[0] * 1024,
    "imported": imported * 1024,
    "checked": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
}))
"""

OPEN = """
import json, re, sys, time
import torch, transformers
from transformers import LlamaModel

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

before, start = peak(), time.perf_counter()
model = LlamaModel.from_pretrained(sys.argv[1])
opened = time.perf_counter() - start
with torch.no_grad():
    model(torch.arange(8)[None], use_cache=False)
print(json.dumps({"opened": opened, "seconds": time.perf_counter() - start, "peak": peak() - before}))
"""


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-") as name:
        folder = Path(name)
        total = write_checkpoint(folder / "model", args.hidden_size, args.layers)
        print(f"checkpoint   {total / 1e9:.2f} GB, {args.layers} layers, first {args.keep} kept")
        from_folder(folder, args)
        from_hub(folder, args)
        opening(folder)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where to work; by default the system's temporary folder")
    parser.add_argument("--hidden-size", type=int, default=4096, help="a multiple of 512; 4096 is Llama-3-8B")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--keep", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each side")
    return parser.parse_args()


def write_checkpoint(folder: Path, hidden: int, layers: int) -> int:
    """Write Llama's configuration and shards of random bytes; returns the bytes of all tensors."""
    folder.mkdir()
    heads, groups, inner = hidden // HEAD, max(1, hidden // HEAD // 4), hidden * 7 // 2
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 8192,
        "rope_theta": 500_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 128_000,
        "eos_token_id": 128_001,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1, "one": 2}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>").save_pretrained(folder)
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (groups * HEAD, hidden),
        "self_attn.v_proj": (groups * HEAD, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    tensors = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    tensors |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()}
    tensors |= {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}
    return write_shards(folder, {name: (shape, 2 * product(shape)) for name, shape in tensors.items()})


def product(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


def write_shards(folder: Path, tensors: dict[str, tuple[tuple[int, ...], int]]) -> int:
    groups: list[dict[str, tuple[tuple[int, ...], int]]] = [{}]
    for name, (shape, size) in tensors.items():
        if sum(size for _, size in groups[-1].values()) + size > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = (shape, size)
    # bfloat16 is the upper half of float32; the numbers must be such that a model of them gives numbers.
    normal = np.random.default_rng(0).standard_normal(1 << 25, dtype=np.float32) * np.float32(0.02)
    noise = (normal.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    weight_map = {}
    for number, group in enumerate(groups, start=1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        with (folder / file).open("wb") as stream:
            write_shard(stream, group, noise)
    total = sum(size for _, size in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def write_shard(stream, group: dict[str, tuple[tuple[int, ...], int]], noise: bytes) -> None:
    header, position = {}, 0
    for name, (shape, size) in group.items():
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [position, position + size]}
        position += size
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    stream.write(len(content).to_bytes(8, "little") + content)
    for _, size in group.values():
        for start in range(0, size, len(noise)):
            stream.write(noise[: size - start])
    stream.flush()
    os.fsync(stream.fileno())


def from_folder(folder: Path, args: argparse.Namespace) -> None:
    runs, copies = [], []
    pruned = folder / "pruned"
    for _ in range(args.rounds):
        shutil.rmtree(pruned, ignore_errors=True)
        forget(folder / "model")
        runs.append(child(folder / "model", args.keep, pruned, {}))
        copies.append(copy(pruned, folder / "copy"))
    kept = sum(file.stat().st_size for file in files(pruned, ".safetensors"))
    seconds, copied = (statistics.median(times) for times in ([run["seconds"] for run in runs], copies))
    print(f"kept         {kept / 1e9:.2f} GB")
    print(f"time         {seconds:.1f} s with the check, after the imports; cp and sync of as much {copied:.2f} s")
    print(f"memory       {shown(max(runs, key=lambda run: run['allocated']))}")


def from_hub(folder: Path, args: argparse.Namespace) -> None:
    pruned, kept = folder / "pruned", sum(file.stat().st_size for file in files(folder / "pruned", ".safetensors"))
    with serve(folder / "model") as server:
        run = child("me/tiny", args.keep, folder / "pruned-hub", hub_environment(server, folder / "home"))
        weights = files(pruned, ".safetensors")
        same = all(equal(folder / "pruned-hub" / file.name, file) for file in weights)
        print(f"from the Hub {server.sent / kept:.4f} bytes sent for each kept; {run['seconds']:.1f} s")
        print(f"             {shown(run)}; the same weights as from the folder: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


def shown(run: dict[str, float]) -> str:
    allocated = (
        f"allocated at most {run['allocated'] / 1e6:.0f} MB, {run['imported'] / 1e6:.0f} MB of it by the imports"
    )
    return f"{allocated}; peak RSS {run['peak'] / 1e6:.0f} MB; the process that checks {run['checked'] / 1e6:.0f} MB"


def opening(folder: Path) -> None:
    size: dict[str, int] = {}
    for name in ("model", "pruned"):
        size[name] = sum(file.stat().st_size for file in files(folder / name, ".safetensors"))
        forget(folder / name)
        command = [sys.executable, "-c", OPEN, str(folder / name)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        run = json.loads(done.stdout.splitlines()[-1])
        print(f"open {name:7s} {size[name] / 1e9:.2f} GB: {run['opened']:.2f} s, with a first text ", end="")
        print(f"{run['seconds']:.2f} s; {run['peak'] / 1e9:.2f} GB more resident")


def hub_environment(server: StandIn, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}


def files(folder: Path, suffix: str) -> Iterator[Path]:
    return (file for file in folder.iterdir() if file.suffix == suffix)


def equal(left: Path, right: Path) -> bool:
    return subprocess.run(["cmp", "--quiet", left, right]).returncode == 0


def child(source: Path | str, keep: int, out: Path, environment: dict[str, str]) -> dict[str, float]:
    """Prune in a fresh process that measures itself."""
    command = [sys.executable, "-c", COMMAND, str(source), str(keep), str(out)]
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def copy(source: Path, target: Path) -> float:
    """Seconds that ``cp`` of the shards takes, and ``sync`` of what it wrote."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shards = sorted(source.glob("*.safetensors"))
    forget(source)
    start = time.perf_counter()
    subprocess.run(["cp", *shards, target], check=True)
    subprocess.run(["sync", *(target / shard.name for shard in shards)], check=True)
    return time.perf_counter() - start


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


if __name__ == "__main__":
    main()
