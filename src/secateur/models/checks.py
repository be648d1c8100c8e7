"""What every model must pass before it is used: its files are whole, its weights, tokenizer and lengths fit each other.

Libraries open nearly anything. Weights that a file lacks are random, layers beyond the configuration's count are left
out, a tokenizer without its vocabulary gives every word the same id: each gives vectors that look like vectors.
"""

from __future__ import annotations

import errno
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub import errors as hub
from huggingface_hub.utils import http_backoff  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from torch import nn
from transformers import CONFIG_NAME, PreTrainedModel
from transformers.utils import cached_file

from secateur.errors import ModelError, SecateurError
from secateur.files import read_json
from secateur.models.compat import is_ignored
from secateur.models.forward import state_width
from secateur.models.save import PROBES, TEN_SCRIPTS
from secateur.provenance import is_export
from secateur.runtime.core import is_out_of_memory

ANOTHER_MODEL = "one of the two is of another model"
CONVERT = "convert it: load it with transformers elsewhere and save_pretrained() it again"


# ---- the folder


def check_folder(folder: Path) -> None:
    """Say what is missing from a model folder, where libraries would not say it plainly."""
    modules = read_modules(folder)
    if not modules and not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(folder, "is an adapter without its base", "secateur prune merges the two")
        raise ModelError(folder, "has no config.json", "a model folder holds config.json, weights and a tokenizer")
    parts = {folder / module["path"] for module in modules} - {folder}  # others may hold anything, such as checkpoints
    for pickle in (part / "pytorch_model.bin" for part in parts):
        if pickle.is_file() and not any(pickle.parent.glob("*.safetensors")):
            hint = "open it with sentence-transformers and save it again"
            raise ModelError(pickle, "holds weights that only PyTorch can read", hint)
    if not any(folder.rglob("*.safetensors")):
        if is_export(folder):
            raise ModelError(folder, "is an export, without weights to cut or train", "name the model that it is of")
        found = next(folder.glob("*.bin"), None)
        raise ModelError(folder, f"has no safetensors{f', only {found.name}' if found else ''}", CONVERT)
    for file in (file for part in (folder, *parts) for file in part.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(folder, f"{file.name} is damaged or half written ({error})") from error


def read_modules(folder: Path) -> list[dict[str, str]]:
    """What a folder's modules.json lists, each with ``type`` and ``path``; nothing, where there is no such file."""
    file = folder / "modules.json"
    if not file.is_file():
        return []
    modules = read_json(file)
    for module in modules if isinstance(modules, list) and modules else [None]:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("type", "path")):
            raise ModelError(file, "is not a list of modules, each with a type and a path")
        if not (folder / module["path"]).resolve().is_relative_to(folder.resolve()):
            raise ModelError(file, f"names {module['path']!r}, which leads out of the model's folder")
    return list(modules)


@contextmanager
def as_model_error(name: str | Path, path: Path | None = None) -> Iterator[None]:
    """Turn whatever libraries raise on a model that they cannot fetch or open into one line about it.

    ``name`` is what the user called it; ``path``: where it was opened, if not there.
    """

    def named(message: str) -> str:
        return message if path is None else message.replace(str(path), str(name))

    try:
        yield
    except SecateurError as error:
        error.args = tuple(named(str(part)) for part in error.args)
        raise
    except Exception as error:  # a library that stumbles over a file raises what it likes, ZeroDivisionError included
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise
        problem, hint = _in_words(error)
        raise ModelError(name, named(problem), hint) from error


@contextmanager
def cache_where_unreachable(source: str | Path) -> Iterator[None]:
    """Within: of a Hub id, what the cache holds is all there is, where the Hub cannot be reached.

    The libraries would find that out anew for each file that a model may have, half a minute each.
    """
    if isinstance(source, Path) or constants.HF_HUB_OFFLINE or _is_reachable():
        yield
        return
    with _unreachable:
        constants.HF_HUB_OFFLINE = True
        try:
            yield
        finally:
            constants.HF_HUB_OFFLINE = False


_unreachable = threading.RLock()


def _is_reachable() -> bool:
    try:
        http_backoff("HEAD", constants.ENDPOINT, max_retries=1, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except hub.HTTPError:  # type: ignore[attr-defined]
        return False
    return True


def _in_words(error: Exception) -> tuple[str, str]:
    """What a library's error means, and the way out."""
    message = " ".join(str(error).split())
    said = f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__
    login = "log in (hf auth login, or HF_TOKEN)"
    is_wrapped = isinstance(error.__cause__, hub.LocalEntryNotFoundError)  # by transformers
    match error.__cause__ if is_wrapped else error:
        case hub.GatedRepoError():
            return "its owner gives access on request only", f"ask on the model's page, then {login}"
        case hub.RepositoryNotFoundError() | hub.HFValidationError():
            return "no such folder, and no such model on the Hub", f"check the name; if private, {login}"
        case hub.LocalEntryNotFoundError() | hub.OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
            return "is not in the local cache, and HF_HUB_OFFLINE is set", "check the name, or fetch the model"
        case hub.LocalEntryNotFoundError():
            return "no such folder, and the Hub cannot be reached", "check the name, and the network"
        case hub.RemoteEntryNotFoundError():
            return f"has no safetensors ({said})", CONVERT
        case SafetensorError():
            return f"its weights are damaged or half written ({said})", "copy or fetch them again"
        case OSError() if "use_safetensors" in message:
            return "has no safetensors", CONVERT
        case OSError() if "image processor" in message:
            return f"reads images, and its text part is no model of its own ({said})", "take a model of texts"
        case OSError() | hub.HTTPError():  # type: ignore[attr-defined]
            return f"cannot be opened ({said})", ""
        case _ if is_out_of_memory(error):
            return f"does not fit into memory ({said})", "another --device, or fewer bits with --dtype, where there are"
        case _:
            return f"is not a text model that can be opened ({said})", ""


# ---- weights, tokenizer, vectors


def check_opened(name: str | Path, model: SentenceTransformer) -> None:
    """Refuse a model whose parts do not fit each other; cut its length to the positions that it has."""
    transformer = model[0]
    for key, prompt in model.prompts.items():
        if not isinstance(prompt, (str, type(None))):
            raise ModelError(name, f"its prompt {key!r} is {prompt!r}, not a text", "see its prompts in the JSON file")
    model.prompts = {key: prompt or "" for key, prompt in model.prompts.items()}
    _check_tokenizer(name, transformer)
    limit, length = _positions(transformer.auto_model), transformer.max_seq_length
    if limit is not None and (length is None or length > limit):
        transformer.max_seq_length = limit
    _check_vectors(name, model)


def check_weights(
    name: str | Path, model: PreTrainedModel, key_mapping: dict[str, str] | None = None
) -> tuple[str, ...]:
    """Refuse weights that are not those which the configuration describes; return the modules that have no place in the
    model: a head, a decoder, an image tower.

    A tensor that is not used inside the model's own modules is refused, unless it is a single number: a constant that
    older versions saved.
    """
    config = model.config
    if getattr(config, "quantization_config", None):
        return ()
    # What was just opened is on this disk, wherever it came from.
    where = {"revision": getattr(config, "_commit_hash", None), "local_files_only": True, "use_safetensors": True}
    unused = check_names(name, model, config.name_or_path, key_mapping=key_mapping, **where)
    misplaced = [key for key in unused if is_within(key, model)]
    for file in weight_files(model) if misplaced else ():
        with safe_open(file, framework="pt") as stored:
            constants = tuple(key for key in stored.keys() if not stored.get_slice(key).get_shape())  # noqa: SIM118
        misplaced = [key for key in misplaced if not any(constant.endswith(key) for constant in constants)]
    if misplaced:
        raise ModelError(name, f"has weights that its config.json has no place for: {misplaced[0]}", ANOTHER_MODEL)
    start = rf"^((model|transformer|{re.escape(model.base_model_prefix)})\.)*"
    left_out = {re.sub(start, "", key).partition(".")[0] for key in unused}
    return tuple(sorted(left_out - {child for child, _ in model.named_children()}))


def weight_files(model: PreTrainedModel) -> list[Path]:
    """The files of the checkpoint that a model was opened from; none where it was not."""
    revision = getattr(model.config, "_commit_hash", None)
    try:
        config = cached_file(model.name_or_path, CONFIG_NAME, revision=revision, local_files_only=True)
    except OSError:
        return []
    return sorted(Path(str(config)).parent.glob("*.safetensors"))


def check_names(name: str | Path, model: PreTrainedModel, source: str | None, **options: Any) -> list[str]:
    """Refuse weights by their names and shapes, none of them read; return the names that a model has no use for.

    ``source`` is a folder or Hub id; None where ``options``, of ``from_pretrained``, hold a ``state_dict``. A pooler's
    tensor may be missing.
    """
    options |= {"device_map": "meta", "output_loading_info": True, "ignore_mismatched_sizes": True}
    _, found = type(model).from_pretrained(source, config=model.config, **options)
    for key, stored, wanted in sorted(found["mismatched_keys"]):
        problem = f"{key} has the shape {tuple(stored)}, but by config.json it is {tuple(wanted)}"
        raise ModelError(name, problem, ANOTHER_MODEL)
    missing = sorted(key for key in found["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(name, f"has no weights for {missing[0]}", "copy or save the folder again")
    return sorted(found["unexpected_keys"])


def is_within(name: str, model: PreTrainedModel) -> bool:
    """Whether a tensor that the model has no use for lies inside one of its modules, and is neither left out by
    transformers on purpose nor a buffer that older versions saved (``rotary_emb.inv_freq``).
    """
    prefix = f"{model.base_model_prefix}."
    name = name.removeprefix(prefix)
    parts = {child for child, _ in model.named_children()}
    buffers = {tuple(buffer.split(".")[-2:]) for buffer, _ in model.named_buffers()}
    is_buffer = tuple(name.split(".")[-2:]) in buffers
    return name.partition(".")[0] in parts and not is_buffer and not is_ignored(model, prefix + name)


def check_finite(name: str | Path, model: SentenceTransformer) -> None:
    """Refuse weights that are not finite."""
    for path, parameter in model.named_parameters():
        # A sum reads each number once and makes no copy; it may also overflow, so that it only raises the suspicion.
        suspect = parameter.is_floating_point() and not bool(torch.isfinite(parameter.detach().sum()))
        if suspect and (wrong := int((~torch.isfinite(parameter.detach())).sum())):
            own = path.removeprefix("0.").removeprefix("model.")
            hint = "copy it again; if its training diverged, take an earlier checkpoint"
            raise ModelError(name, f"{wrong} of its weights are not finite, first in {own}", hint)


def _check_tokenizer(name: str | Path, transformer: Transformer) -> None:
    """Refuse a length that leaves nothing of a text, a tokenizer for which all texts are one, ids without a row."""
    tokenizer, length = transformer.tokenizer, transformer.max_seq_length
    if length is not None and (isinstance(length, bool) or not isinstance(length, (int, float)) or length < 1):
        raise ModelError(name, f"cuts texts after {length!r} tokens (max_seq_length)", "a whole number, at least 1")
    special = tokenizer("")["input_ids"]
    if length is not None and length <= len(special):  # asked for less, a tokenizer cuts nothing at all
        problem = f"cuts texts after {length} tokens, of which {len(special)} are special: nothing is left of a text"
        raise ModelError(name, problem, f"a length of {len(special) + 1} or more")
    ids = {i for text in TEN_SCRIPTS for i in tokenizer(text, add_special_tokens=False)["input_ids"]}
    if len(ids) < 2:  # without its vocabulary, all words are unknown
        problem = "its tokenizer gives different texts the same ids"
        raise ModelError(name, problem, "its vocabulary is missing: copy tokenizer.json (or vocab.txt, …) as well")
    count = getattr(transformer.auto_model.get_input_embeddings(), "num_embeddings", None)
    largest = max(ids.union(special))
    if count is not None and largest >= count:
        problem = f"its tokenizer gives the id {largest}, but it has vectors for {count} tokens"
        raise ModelError(name, problem, "the tokenizer is of another model, or the weights were not resized to it")


def _positions(model: PreTrainedModel) -> int | None:
    """Tokens before positions leave their table, where its first rows, up to that of padding, are none: RoBERTa's."""
    for path, table in model.named_modules():
        if isinstance(table, nn.Embedding) and "position" in path and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    return None


def _check_vectors(name: str | Path, model: SentenceTransformer) -> None:
    """Refuse a model whose vectors are not finite, all the same, or not as wide as its modules say."""
    vectors = model.encode(list(PROBES), prompt="", convert_to_tensor=True, show_progress_bar=False).float().cpu()
    if not bool(torch.isfinite(vectors).all()):
        cause = "is its config.json of other weights?"
        if next(model.parameters()).dtype == torch.float16:
            cause = "float16 is too small for it: take bfloat16 or float32"
        raise ModelError(name, "gives vectors that are not finite", cause)
    widths = [(vectors.shape[1], model.get_embedding_dimension())]
    widths += [(state_width(model[0]), part.embedding_dimension) for part in model if isinstance(part, Pooling)]
    for found, told in widths:
        if told not in (None, found):
            problem = f"gives {found} numbers, but its modules say {told}"
            raise ModelError(name, problem, "correct embedding_dimension in the pooling's config.json")
    if bool((vectors == vectors[0]).all()):
        hint = f"it cuts them after {model[0].max_seq_length} tokens, and pools as its folder says"
        raise ModelError(name, "gives different texts the same vector", hint)
