"""What other software will make of a model folder, by its documented rules: who loads it, who does not, and why.

The rules are a small table with the date on which they were read. A rule that nobody has checked is not in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from secateur.errors import DataError
from secateur.files import read_json

CHECKED = "2026-11"
"""When the rules below were read: in the sources of text-embeddings-inference (2026-07), vLLM (main), llama.cpp (main),
infinity 0.0.78, and by running sentence-transformers 6.2, transformers 5.23, fastembed 0.9.1, transformers.js 4.3.2."""

Verdict = Literal["yes", "differs", "no"]

STOCK = "sentence_transformers."
TEI_EVERYWHERE = frozenset(
    {"bert", "camembert", "roberta", "xlm-roberta", "deberta-v2", "distilbert", "gemma3_text", "gte", "new", "mpnet"}
    | {"modernbert", "nomic_bert", "qwen3"}
)
TEI_CUDA = frozenset({"llama", "mistral", "qwen2"})
SERVERS_POOL = frozenset({"mean", "cls", "lasttoken"})


@dataclass(frozen=True)
class Note:
    """What one reader does with a folder.

    ``loads`` is ``yes``: the same vectors; ``differs``: it loads, with other vectors; ``no``: it does not load.
    """

    reader: str
    loads: Verdict
    why: str


@dataclass(frozen=True)
class Facts:
    """What a folder says of itself, as far as readers look at it."""

    config: dict[str, Any]
    modules: tuple[str, ...]
    pooling: str | None
    booleans: bool
    new_pooling: bool
    includes_prompt: bool
    prompts: bool
    keeps_end: bool
    safetensors: bool
    onnx: tuple[str, ...]
    openvino: bool
    gguf: bool

    @property
    def model_type(self) -> str:
        return str(self.config.get("model_type", ""))

    @property
    def rope_scaling(self) -> str:
        """How positions are stretched; older configurations call it ``type``."""
        found = self.config.get("rope_parameters") or self.config.get("rope_scaling")
        settings = found if isinstance(found, dict) else {}
        return str(settings.get("rope_type") or settings.get("type") or "default")

    @property
    def both_ways(self) -> bool:
        """A decoder that attends in both directions, by a switch in its configuration."""
        return self.config.get("is_causal") is False


def compatibility(folder: str | Path) -> tuple[Note, ...]:
    """Who can read a model folder or an export, and who cannot.

    Args:
        folder: A sentence-transformers or transformers folder, or what ``export`` wrote.

    Returns:
        One note for each reader, from the folder's files alone.

    Raises:
        DataError: One of its JSON files is broken.
    """
    facts = read_facts(Path(folder))
    return tuple(Note(reader, *rule(facts)) for reader, rule in _RULES.items())


def read_facts(folder: Path) -> Facts:
    """Read what readers look at.

    Raises:
        DataError: A file is missing or broken.
    """
    config = _read_object(folder / "config.json")
    listed = _read_modules(folder / "modules.json") if (folder / "modules.json").is_file() else []
    modules = [(str(item["type"]).rpartition(".")[2], str(item.get("path", ""))) for item in listed]
    # A module of the repository's own is no module that other readers know.
    foreign = [str(item["type"]) for item in listed if not str(item["type"]).startswith(STOCK)]
    place = next((path for kind, path in modules if kind == "Pooling"), None)
    pooling = _read_object(folder / place / "config.json") if place is not None else {}
    saved = folder / "config_sentence_transformers.json"
    prompts = _read_object(saved).get("prompts") if saved.is_file() else None
    tokenizer = folder / "tokenizer_config.json"
    return Facts(
        config=config,
        modules=tuple(foreign or [kind for kind, _ in modules]),
        pooling=_pooling_mode(pooling),
        booleans={"pooling_mode_cls_token", "pooling_mode_mean_tokens"} <= pooling.keys(),
        new_pooling="embedding_dimension" in pooling,
        includes_prompt=bool(pooling.get("include_prompt", True)),
        prompts=isinstance(prompts, dict) and any(prompts.values()),
        keeps_end=tokenizer.is_file() and _read_object(tokenizer).get("truncation_side") == "left",
        safetensors=any(folder.glob("*.safetensors")),
        onnx=tuple(sorted(file.name for file in folder.glob("onnx/*.onnx"))),
        openvino=any(folder.glob("openvino/*.xml")),
        gguf=any(folder.glob("*.gguf")),
    )


def _read_object(file: Path) -> dict[str, Any]:
    content = read_json(file)
    if not isinstance(content, dict):
        raise DataError(file, "holds no JSON object", 'it is one {"key": value, ...}')
    return content


def _read_modules(file: Path) -> list[dict[str, Any]]:
    listed = read_json(file)
    if not isinstance(listed, list) or not all(isinstance(item, dict) and "type" in item for item in listed):
        raise DataError(file, "lists no modules", 'it is a list of {"type": ..., "path": ...}')
    return listed


def _pooling_mode(settings: dict[str, Any]) -> str | None:
    """The mode in either spelling; several are joined by ``+``."""
    mode = settings.get("pooling_mode")
    if mode:
        return mode if isinstance(mode, str) else "+".join(mode)
    names = {
        "cls_token": "cls",
        "mean_tokens": "mean",
        "max_tokens": "max",
        "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
        "weightedmean_tokens": "weightedmean",
        "lasttoken": "lasttoken",
    }
    return "+".join(name for key, name in names.items() if settings.get(f"pooling_mode_{key}")) or None


Finding = tuple[Verdict, str]


def _sentence_transformers(facts: Facts) -> Finding:
    if not facts.safetensors:
        if facts.onnx or facts.openvino:
            backend = "onnx" if facts.onnx else "openvino"
            return "no", (
                f"backend={backend!r} needs optimum, which does not work with transformers 5; use secateur.runtime"
            )
        return "no", "there are no weights in safetensors"
    if any("." in name for name in facts.modules):
        return "no", f"{facts.modules[0]} is code of the repository: it asks for trust_remote_code"
    if not facts.modules:
        return "differs", "without modules.json it pools by the plain mean, and does not normalise"
    return "yes", "all modules are its own"


def _transformers(facts: Facts) -> Finding:
    if not facts.safetensors:
        return "no", "there are no weights in safetensors"
    if facts.modules:
        return "differs", "AutoModel gives the states of tokens: pooling and normalisation are the reader's"
    return "yes", "it is a plain model: AutoModel gives the states of tokens"


def _vllm(facts: Facts) -> Finding:
    if not facts.safetensors:
        return "no", "it does not read ONNX or OpenVINO"
    if not facts.modules:
        return "differs", "without modules.json it pools as the architecture's default, the last token in a decoder"
    if facts.pooling not in SERVERS_POOL:
        return "differs", f"it does not know {facts.pooling} pooling, warns, and takes the last token"
    return _on_both_ways(facts) if facts.both_ways else _pools_prompts(facts)


def _tei(facts: Facts) -> Finding:
    if not facts.safetensors:
        if "model.onnx" in facts.onnx and facts.pooling in SERVERS_POOL and facts.booleans:
            return _pools_prompts(facts, "with its ONNX Runtime build alone; ")
        return "no", "it reads safetensors, or onnx/model.onnx (that name, float32) with its ONNX Runtime build"
    if facts.modules and not facts.booleans:
        return "no", "1_Pooling/config.json lacks pooling_mode_cls_token and pooling_mode_mean_tokens: a parse error"
    if facts.model_type not in TEI_EVERYWHERE | TEI_CUDA:
        return "no", f"it has no code for {facts.model_type or 'this'} models"
    if facts.model_type == "llama" and facts.rope_scaling != "default":
        return "no", f"its Llama has no rope scaling ({facts.rope_scaling})"
    if facts.pooling is not None and facts.pooling not in SERVERS_POOL:
        return "no", f"it pools by cls, mean or the last token, not by {facts.pooling}"
    place = "on CUDA alone; " if facts.model_type in TEI_CUDA else ""
    if not facts.modules:
        return "differs", f"{place}it must be told --pooling"
    return _on_both_ways(facts) if facts.both_ways else _pools_prompts(facts, place)


def _infinity(facts: Facts) -> Finding:
    if not facts.safetensors:
        return "no", "its torch engine reads weights; its optimum engine pools by itself, without prompts' lengths"
    if facts.new_pooling:
        return "no", "it pins sentence-transformers below 4, which refuses 1_Pooling/config.json as 6 writes it"
    if "rope_parameters" in facts.config and "rope_theta" not in facts.config:
        return "no", "it pins transformers 4, which does not read rope_parameters, and would take the default base"
    return "yes", "by its torch engine, an old sentence-transformers"


def _ollama(facts: Facts) -> Finding:
    if facts.gguf:
        return "yes", "it reads GGUF; pooling is what the file says"
    if not facts.safetensors:
        return "no", "it reads GGUF, which is made from safetensors"
    if facts.modules and facts.pooling not in SERVERS_POOL:
        return "no", f"llama.cpp's conversion to GGUF knows mean, cls and lasttoken, not {facts.pooling}"
    if facts.both_ways:
        return "differs", f"its {facts.model_type} attends backwards only"
    if not facts.modules:
        return "differs", "after conversion to GGUF (llama.cpp), and it must be told how to pool"
    return _pools_prompts(facts, "after conversion to GGUF (llama.cpp); ")


def _transformers_js(facts: Facts) -> Finding:
    if not facts.onnx:
        return "no", "it reads onnx/ alone: export --to onnx"
    names = ", ".join(facts.onnx)
    if any(name.endswith("_bf16.onnx") for name in facts.onnx):
        return "no", f"it has no bfloat16 ({names})"
    if facts.prompts and not facts.includes_prompt:
        return "differs", f"sentence_embedding of {names}; for texts with a prompt, feed prompt_length as well"
    if facts.keeps_end:
        return "differs", f"sentence_embedding of {names}; of long texts it keeps the start, the model the end"
    return "yes", f"sentence_embedding of {names}; where it cuts a text, the token that ends it is cut off, too"


def _fastembed(facts: Facts) -> Finding:
    if not facts.onnx:
        return "no", "it reads onnx/ alone: export --to onnx"
    how = "as a custom model without pooling, output_name='sentence_embedding'"
    if facts.prompts and not facts.includes_prompt:
        return "differs", f"{how}; texts with a prompt get other vectors: it feeds no prompt_length"
    return "yes", how


def _pools_prompts(facts: Facts, place: str = "") -> Finding:
    """What holds of all readers that pool by themselves, in a way that the folder asks for."""
    if facts.prompts and not facts.includes_prompt:
        return "differs", f"{place}texts with a prompt get other vectors: it pools the prompt's tokens too"
    return "yes", f"{place}it pools by {facts.pooling}, as the folder says"


def _on_both_ways(facts: Facts) -> Finding:
    return "differs", (
        f"the switch that lets {facts.model_type} attend both ways (is_causal) is not among its documented rules:"
        " compare vectors first"
    )


_RULES: dict[str, Callable[[Facts], Finding]] = {
    "sentence-transformers": _sentence_transformers,
    "transformers": _transformers,
    "vLLM": _vllm,
    "text-embeddings-inference": _tei,
    "infinity": _infinity,
    "Ollama": _ollama,
    "transformers.js": _transformers_js,
    "fastembed": _fastembed,
}
