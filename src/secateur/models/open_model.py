"""Opens whatever the user names as a ``SentenceTransformer``: a trained embedder as it is, a bare language model with
a pooling and a Normalize module, a GGUF file converted to float32.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.util import is_sentence_transformer_model
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from secateur.errors import ConfigError, DataError, ModelError, UnsupportedArchitecture
from secateur.files import read_json, write_text
from secateur.models import resolve
from secateur.models.blocks import skeleton, text_config, text_tower
from secateur.models.checks import (
    as_model_error,
    cache_where_unreachable,
    check_finite,
    check_folder,
    check_opened,
    check_weights,
    read_modules,
)
from secateur.models.compat import forget_origin
from secateur.models.forward import make_pooling, state_width
from secateur.options import Dtype, PoolingName
from secateur.progress import quiet

MAX_LENGTH = 512
"""Tokens of a text, for a bare language model, where nobody says."""
TEXT_ALONE = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of a multimodal model that its text tower alone does not have."""


def open_model(
    name: str | Path,
    *,
    pooling: PoolingName | None = None,
    max_length: int = MAX_LENGTH,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformer:
    """Open a model as a ``SentenceTransformer``.

    Args:
        name: A Hub id, a transformers or sentence-transformers folder, a ``.gguf`` file, or ``smollm2``. Of a model
            that reads images, too, the text tower alone is opened.
        pooling: How a bare language model pools its tokens, ``mean`` by default. ``l3prune`` is for profiles: no
            folder can have it.
        max_length: Tokens after which a text is cut, for a bare language model; never more than the model allows.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Torch device; default: the GPU where there is one.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the model code that a repository brings along.

    Raises:
        ConfigError: There is no such device or number format, or no token is left of a text; or a trained embedder,
            which keeps its own, is given a ``max_length``.
        ModelError: The model is missing, half written, not a text model, or holds no safetensors.
    """
    check_device(device)
    if dtype not in get_args(Dtype):
        raise ConfigError("dtype", dtype, f"no such number format as {dtype!r}", f"one of {', '.join(get_args(Dtype))}")
    if max_length < 1:
        raise ConfigError("max_length", max_length, f"{max_length} tokens are no text", "at least 1")
    with as_model_error(name), quiet(), as_source(name) as source:
        where: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
        model = load_model(name, source, pooling, max_length, dtype=dtype, device=device, **where)
        check_finite(name, model)
        complete(name, model, pooling, max_length)
        return model


def open_skeleton(name: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, list[str]]:
    """A model's transformer without its weights, which are neither read nor fetched, its tokenizer and its prompts."""
    source = resolve(name)
    with as_model_error(name), quiet(), cache_where_unreachable(source):
        about: Any = {}
        if str(source).endswith(".gguf"):
            where = _of_gguf(Path(source))
        else:
            if isinstance(source, Path):
                check_folder(source)
            about = small_file(source, "config_sentence_transformers.json") or {}
            modules = small_file(source, "modules.json")
            where = {"pretrained_model_name_or_path": str(source), "subfolder": modules[0]["path"] if modules else ""}
        with _parsed_once() if "gguf_file" in where else nullcontext():
            config = AutoConfig.from_pretrained(**where)
            tokenizer = AutoTokenizer.from_pretrained(**where)
        transformer, text = skeleton(config), text_config(config)
        if text_tower(transformer):  # as prune cuts it out of a multimodal model
            text.dtype = text.dtype or config.dtype
            transformer = skeleton(text)
        return transformer, tokenizer, [prompt or "" for prompt in (about.get("prompts") or {}).values()]


FILES = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.safetensors")


def fetch(name: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Fetch a model from the Hub, as far as its cache does not have it; the folder there, named after the commit.

    Without ``weights``, those of the transformer are left out.
    """
    with as_model_error(name), quiet(), cache_where_unreachable(name):
        ignored = ["*/*", "consolidated*"]  # other formats, and weights that are there a second time
        ignored += [] if weights else ["model*.safetensors"]
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=list(FILES), ignore_patterns=ignored))
        wanted = []
        for number, place in enumerate(module["path"] for module in read_modules(folder)):
            kinds = FILES if weights or number else FILES[:-1]
            wanted += [f"{place}/{kind}" for kind in kinds if place]
        if wanted:
            snapshot_download(name, revision=folder.name, allow_patterns=wanted)
    return folder


def small_file(source: str | Path, file: str, revision: str | None = None) -> Any:
    """The content of a JSON file of a model, here or on the Hub; None where it has none."""
    found = cached_file(str(source), file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else read_json(Path(found))


@contextmanager
def as_source(name: str | Path) -> Iterator[str | Path]:
    """What libraries can open: a Hub id, or a folder that was looked at; a GGUF file is converted for a time."""
    source = resolve(name)
    with tempfile.TemporaryDirectory(prefix="secateur-") as converted, cache_where_unreachable(source):
        if str(source).endswith(".gguf"):
            source = convert_gguf(Path(source), Path(converted))
        elif isinstance(source, Path):
            check_folder(source)
        yield source


def load_model(
    name: str | Path,
    source: str | Path,
    pooling: PoolingName | None,
    max_length: int,
    *,
    dtype: str = "auto",
    device: str | None = None,
    **where: Any,
) -> SentenceTransformer:
    """Load a model, of a multimodal one the text tower alone, of a bare language model its transformer alone, and check
    its weights by their names and shapes; no weight is read yet.

    ``where`` are ``revision`` and ``trust_remote_code``. The model's ``left_out`` names what it does not have of the
    checkpoint (:func:`.check_weights`).
    """
    with text_alone(source, **where) as (shown, key_mapping):
        # Weights of another shape are refused by check_weights, which names them; transformers does not.
        weights: dict[str, Any] = {"dtype": dtype, "use_safetensors": True, "ignore_mismatched_sizes": True}
        weights |= {"key_mapping": key_mapping} if key_mapping else {}
        is_embedder = is_sentence_transformer_model(str(shown), revision=where.get("revision"))
        _check_dense(name, shown, where.get("revision"), is_embedder)
        if is_embedder:
            _check_options(name, pooling, max_length)
            model = SentenceTransformer(str(shown), model_kwargs=weights, device=device, **where)
            place = shown / read_modules(shown)[0]["path"] if isinstance(shown, Path) else None  # in old models, within
        else:
            modules, place = [_bare(shown, weights, where)], None
            model = SentenceTransformer(modules=modules, device=device, similarity_fn_name="cosine")
        if not isinstance(model[0], Transformer):
            raise UnsupportedArchitecture(name, f"begins with a {type(model[0]).__name__}, not with a transformer")
        if model[0].tokenizer is None:
            raise ModelError(name, "has no tokenizer", "copy its tokenizer's files into the folder")
        transformer = model[0].auto_model
        if place is not None:
            transformer.name_or_path = transformer.config.name_or_path = str(place)
        vars(model)["left_out"] = check_weights(name, transformer, key_mapping)
    if key_mapping:
        readable = model[0].modality_config
        model[0].modality_config = {kind: how for kind, how in readable.items() if kind in ("text", "message")}
        forget_origin(transformer)
        transformer.name_or_path = transformer.config.name_or_path = str(source)
    return model.eval()


def _check_dense(name: str | Path, source: str | Path, revision: str | None, is_embedder: bool) -> None:
    """Refuse what gives no dense vectors, of which the transformer alone would be taken.

    A CrossEncoder of before sentence-transformers 6 is a transformers folder; what tells is a note in ``config.json``,
    or its only class.
    """
    kind, about = "SentenceTransformer", dict[str, Any]()
    if is_embedder:
        kind = (small_file(source, "config_sentence_transformers.json", revision) or {}).get("model_type", kind)
    else:
        with suppress(DataError):  # whoever opens it tells why
            about = small_file(source, "config.json", revision) or {}
    classifies = any(part.endswith("ForSequenceClassification") for part in about.get("architectures") or ())
    if "sentence_transformers" in about or (classifies and len(about.get("id2label") or "01") == 1):
        kind = "CrossEncoder"
    if kind != "SentenceTransformer":
        hint = "take an embedder, or the language model that it was made of"
        raise UnsupportedArchitecture(name, f"is a {kind}, which gives a text no dense vector", hint)


def _check_options(name: str | Path, pooling: PoolingName | None, max_length: int) -> None:
    """Refuse options that a trained embedder does not take."""
    if pooling is not None:
        raise ModelError(name, f"is a trained embedder and pools its own way, not by {pooling}")
    if max_length != MAX_LENGTH:
        problem = f"{name} is a trained embedder and cuts texts at its own length, not at {max_length}"
        raise ConfigError("max_length", max_length, problem, "leave it out")


def _bare(source: str | Path, weights: dict[str, Any], where: dict[str, Any]) -> Transformer:
    """A bare language model. Its modality is pinned to text, for sentence-transformers puts every text into a model's
    chat template.
    """
    transformer = Transformer(
        str(source),
        model_kwargs=weights | where,
        processor_kwargs=dict(where),
        config_kwargs=dict(where),
        modality_config=TEXT_ALONE,
        module_output_name="token_embeddings",
    )
    if transformer.tokenizer is not None and transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    transformer.auto_model.config.use_cache = False
    return transformer


@contextmanager
def text_alone(
    source: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> Iterator[tuple[str | Path, dict[str, str] | None]]:
    """A folder that shows a multimodal model as its text tower alone, and what to make of the names in its weights;
    the source itself, where it is a text model, quantized, or has code of its own.
    """
    config: Any = None
    text: Any = None
    if not trust_remote_code:
        with suppress(OSError, ValueError):  # whoever opens it tells why
            config = AutoConfig.from_pretrained(source, revision=revision)
            text = text_config(config)
    is_plain = text is config or hasattr(config, "quantization_config")
    tower = "" if is_plain else text_tower(skeleton(config))
    if not tower:
        yield source, None
        return
    whole = source if isinstance(source, Path) else fetch(source, revision)
    with tempfile.TemporaryDirectory(prefix="secateur-") as scratch:
        folder = Path(scratch)
        text.dtype = text.dtype or config.dtype
        text.save_pretrained(folder)
        # The class of the tokenizer is that of the whole model, by whose type transformers may overrule the file.
        settings = small_file(whole, TOKENIZER_CONFIG_FILE) or {}
        settings["tokenizer_class"] = type(AutoTokenizer.from_pretrained(whole)).__name__
        settings.pop("processor_class", None)  # which wants the files of images, too
        write_text(folder / TOKENIZER_CONFIG_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
        for file in whole.rglob("*"):
            place = folder / file.relative_to(whole)
            if file.is_file() and file.name not in PROCESSORS and not place.exists():
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.resolve())
        yield folder, {rf"^(?:.*\.)?{re.escape(tower)}\.(?:model\.)?": ""}


def complete(name: str | Path, model: SentenceTransformer, pooling: PoolingName | None, max_length: int) -> None:
    """Give a bare language model its length, pooling and Normalize module; check what any model encodes."""
    if len(model) == 1:
        transformer = model[0]
        own_length = transformer.max_seq_length
        transformer.max_seq_length = max_length if own_length is None else min(max_length, own_length)
        # Decoders often come with left padding, for generation. With absolute positions, right padding alone leaves a
        # text's vector as it is, and no architecture needs the left (docs/reference/architectures.md).
        transformer.tokenizer.padding_side = "right"
        model.append(make_pooling(pooling or "mean", state_width(transformer)))
        model.append(Normalize())
    check_opened(name, model)


def check_device(device: str | None) -> None:
    """Refuse a device that does not exist, or not on this machine; None is torch's own choice."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        problem = f"{device!r} is no device of torch on this machine"
        raise ConfigError("device", device, problem, "such as cpu, cuda, cuda:0 or mps; or leave it out") from None


@torch.no_grad()
def is_causal(transformer: Transformer) -> bool:
    """Whether a token's state is blind to what follows it: measured on two texts that differ in their last token."""
    model = transformer.auto_model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device)
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    return bool(torch.allclose(states[0, 0], states[1, 0], atol=1e-5))


def make_bidirectional(model: SentenceTransformer, name: str | Path) -> None:
    """Let every token of a decoder see those after it, in place; the saved configuration says so too."""
    transformer = model[0].auto_model.eval()
    if not is_causal(model[0]):
        raise ModelError(name, "attends both ways already", "leave bidirectional out")
    for config in (transformer.config, text_config(transformer)):
        config.is_causal = False
    if is_causal(model[0]):
        raise UnsupportedArchitecture(name, "cannot attend both ways: is_causal changes none of its vectors")


def convert_gguf(file: Path, folder: Path) -> Path:
    """Write a GGUF file as a transformers folder: float32 safetensors and the tokenizer.

    transformers refuses to save a model that it read from GGUF: its weights are moved into a fresh model.
    """
    where = _of_gguf(file)
    with _parsed_once():
        read, found = transformers.AutoModel.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**where)
    if found["missing_keys"]:
        raise ModelError(file, f"has no weights for {min(found['missing_keys'])}", "fetch or convert it again")
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        fresh = type(read)(config)
    fresh.load_state_dict(read.state_dict(), assign=True)
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _of_gguf(file: Path) -> dict[str, Any]:
    """A GGUF file, as transformers' functions take it."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(file, "is a GGUF file", "pip install 'secateur[gguf]'")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}


@contextmanager
def _parsed_once() -> Iterator[None]:
    """Within: a file is parsed once, not anew for configuration, weights and tokenizer, which takes half a minute each.

    The reader is the process's: of two threads, the later would keep the other's, so each has its turn.
    """
    gguf: Any = importlib.import_module("gguf")

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Of a plain array: a reader takes a slice for every token, and those of a memory map cost thrice as much."""

        data = property(lambda self: self._array, lambda self, mapped: setattr(self, "_array", mapped.view(np.ndarray)))

    with _parsing:
        plain = {name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")}
        gguf.GGUFReader, gguf.get_tensor_name_map = map(functools.cache, (Reader, gguf.get_tensor_name_map))
        try:
            yield
        finally:
            for name, function in plain.items():
                setattr(gguf, name, function)


_parsing = threading.Lock()
