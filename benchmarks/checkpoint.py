"""What it costs to cut a checkpoint without opening it, and to open what was cut: memory, bytes and time, in one run.

    python benchmarks/checkpoint.py                      # Llama-3-8B's configuration: 16 GB, and 10 GB for the results
    python benchmarks/checkpoint.py --hidden-size 1024   # a quick run: 1.4 GB

A sharded checkpoint of random numbers is written, and cut to its first blocks in fresh processes: from the folder, in
turns with ``cp`` of as many bytes (page cache emptied of both sources, results brought to the disk by both), and from a
stand-in of the Hub on this machine that counts what it sends. Then the whole command runs, from the folder and from the
stand-in: it opens what it wrote and compares vectors with the source's. Last, the whole checkpoint and the cut one are
opened by transformers, and encode a text.
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

CHILD = """
import json, re, sys, time
import torch, transformers

def status(file, field):
    return int(re.search(rf"{field}:\\s+(\\d+)", open(f"/proc/self/{file}").read())[1])

from secateur.checkpoints.checkpoint import prune_checkpoint
imported, read = status("status", "VmHWM") * 1024, status("io", "rchar")
source, keep, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
start = time.perf_counter()
result = prune_checkpoint(source, range(keep), out)
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak": status("status", "VmHWM") * 1024,
    "imported": imported,
    "read": status("io", "rchar") - read,
    "kept": result.bytes_kept,
}))
"""

COMMAND = """
import json, re, resource, sys, time
start = time.perf_counter()
import secateur
folder = secateur.prune(sys.argv[1], int(sys.argv[2]), pooling="mean", out=sys.argv[3])
status = open("/proc/self/status").read()
print(json.dumps({
    "seconds": time.perf_counter() - start,
    "peak": int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]) * 1024,
    "anonymous": int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) * 1024,
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
        print(f"checkpoint   {total / 1e9:.2f} GB, {args.layers} blocks, first {args.keep} kept")
        from_folder(folder, args)
        from_hub(folder, args)
        whole_command(folder, args)
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
    kept = folder / "kept"
    for _ in range(args.rounds):
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        forget(folder / "model")
        runs.append(child(folder / "model", args.keep, kept, {}))
        copies.append(copy(kept, folder / "copy"))
    worst = max(run["peak"] for run in runs)
    bytes_kept = runs[0]["kept"]
    seconds, copied = (statistics.median(times) for times in ([run["seconds"] for run in runs], copies))
    ratio = statistics.median(run["seconds"] / once for run, once in zip(runs, copies, strict=True))
    print(f"kept         {bytes_kept / 1e9:.2f} GB")
    print(f"peak RSS     {worst / 1e6:.0f} MB (of it {runs[0]['imported'] / 1e6:.0f} MB after the imports)")
    print(f"bytes read   {max(run['read'] for run in runs) / bytes_kept:.4f} of those kept (/proc/self/io rchar)")
    print(f"time         {seconds:.2f} s, cp and sync {copied:.2f} s; ratio {ratio:.2f} (medians of {args.rounds})")
    pairs = [f"{run['seconds']:.2f}/{once:.2f}" for run, once in zip(runs, copies, strict=True)]
    print(f"             each: {', '.join(pairs)}")


def whole_command(folder: Path, args: argparse.Namespace) -> None:
    forget(folder / "model")
    run = child(folder / "model", args.keep, folder / "pruned", {}, COMMAND)
    print(f"command      {run['seconds']:.1f} s with imports and the check; {shown(run)}")
    with serve(folder / "model") as server:
        run = child("me/tiny", args.keep, folder / "pruned-hub", hub_environment(server, folder / "home-2"), COMMAND)
        kept = sum(file.stat().st_size for file in files(folder / "pruned", ".safetensors"))
        print(f"  from a Hub {run['seconds']:.1f} s; {server.sent / kept:.4f} bytes sent for each kept; {shown(run)}")


def shown(run: dict[str, float]) -> str:
    peaks = f"peak RSS {run['peak'] / 1e6:.0f} MB, of it allocated {run['anonymous'] / 1e6:.0f} MB at the end"
    return f"{peaks}; the process that checks {run['checked'] / 1e6:.0f} MB"


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


def from_hub(folder: Path, args: argparse.Namespace) -> None:
    out = folder / "downloaded"
    out.mkdir()
    with serve(folder / "model") as server:
        run = child("me/tiny", args.keep, out, hub_environment(server, folder / "home"))
        same = all((out / file.name).read_bytes() == file.read_bytes() for file in files(folder / "kept", ".json"))
        same &= all(equal(out / file.name, file) for file in files(folder / "kept", ".safetensors"))
        print(f"from the Hub {server.sent / run['kept']:.4f} bytes sent for each kept; ", end="")
        print(f"peak RSS {run['peak'] / 1e6:.0f} MB;")
        print(f"             {run['seconds']:.2f} s; the same files as from the folder: {'yes' if same else 'NO'}")
    if not same:
        raise SystemExit(1)


def files(folder: Path, suffix: str) -> Iterator[Path]:
    return (file for file in folder.iterdir() if file.suffix == suffix)


def equal(left: Path, right: Path) -> bool:
    return subprocess.run(["cmp", "--quiet", left, right]).returncode == 0


def child(
    source: Path | str, keep: int, out: Path, environment: dict[str, str], script: str = CHILD
) -> dict[str, float]:
    """Prune in a fresh process that measures itself."""
    command = [sys.executable, "-c", script, str(source), str(keep), str(out)]
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
