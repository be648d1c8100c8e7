"""Opens whatever the user names as a ``SentenceTransformer``, and writes it as a plain folder.

Four doors: a sentence-transformers folder or Hub id (kept as it is), a transformers folder or Hub id (gets a pooling
and a Normalize module), a GGUF file (converted to float32 on the way), and ``smollm2``, the demo's model. What comes
out is a folder that stock libraries load: :func:`save_model` reopens it in a fresh process before it is called done.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Normalize, Transformer
from sentence_transformers.util import is_sentence_transformer_model

from secateur.checkpoints.verify import PROBES as PROBES
from secateur.checkpoints.verify import Expected, difference, probe, probe_tokens
from secateur.errors import ConfigError, ModelError, SecateurError, UnsupportedArchitecture
from secateur.files import read_json
from secateur.models.blocks import text_config
from secateur.models.checks import check_opened
from secateur.models.gguf import convert_gguf
from secateur.models.names import DEMO_MODEL as DEMO_MODEL
from secateur.models.names import demo_model as demo_model
from secateur.models.names import model_label as model_label
from secateur.models.names import resolve as resolve
from secateur.models.pooling import make_pooling, pooling_name, state_width
from secateur.models.readers import write_for_all_readers
from secateur.options import PoolingName
from secateur.progress import quiet
from secateur.results import Origin

MAX_LENGTH = 512
"""Tokens of a text, for a bare language model, where nobody says."""
_DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = "such as cpu, cuda, cuda:0 or mps"


def open_model(
    name: str | Path,
    *,
    pooling: PoolingName | None = None,
    max_length: int = MAX_LENGTH,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    path: Path | None = None,
) -> SentenceTransformer:
    """Open a model as a ``SentenceTransformer``.

    Args:
        name: A Hub id, a transformers or sentence-transformers folder, a ``.gguf`` file, or ``smollm2``.
        pooling: How a bare language model pools its tokens. Default: ``weighted_mean`` for one that attends only
            backwards, ``mean`` for one that attends both ways. ``l3prune`` is the paper's own, for profiles: no saved
            folder can have it. A trained embedder keeps its own.
        max_length: Tokens after which a text is cut, for a bare language model; never more than the model allows.
        dtype: ``auto`` (as stored), ``float32``, ``bfloat16`` or ``float16``.
        device: Torch device; default: the GPU where there is one.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run the model code that a repository brings along.
        path: Where the model is, if not at ``name``: errors call it by ``name``.

    Raises:
        ConfigError: There is no such device or number format, or no token is left of a text; or a trained embedder,
            which keeps its own, is given a ``max_length``.
        ModelError: The model is missing, half written, not a text model, or holds no safetensors.
    """
    check_device(device)
    if dtype not in _DTYPES:
        raise ConfigError("dtype", dtype, f"no such number format as {dtype!r}", f"one of {', '.join(_DTYPES)}")
    if max_length < 1:
        raise ConfigError("max_length", max_length, f"{max_length} tokens are no text", "at least 1")
    options: dict[str, Any] = {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    # Weights of another shape are refused by check_opened, which names them; transformers does not.
    model_kwargs = {"dtype": _DTYPES[dtype], "use_safetensors": True, "ignore_mismatched_sizes": True}
    with tempfile.TemporaryDirectory(prefix="secateur-") as converted, as_model_error(name, path), quiet():
        source = resolve(name if path is None else path)
        if isinstance(source, Path) and source.suffix == ".gguf":
            convert_gguf(source, Path(converted))
            source = Path(converted)
        elif isinstance(source, Path):
            _check_folder(source)
        if is_sentence_transformer_model(str(source), revision=revision):
            check_embedder(name, pooling, max_length)
            model = SentenceTransformer(str(source), model_kwargs=model_kwargs, **options)
        else:
            model = _wrap(source, model_kwargs, pooling, max_length, options)
        check_opened(name, model)
        return model


def check_embedder(name: str | Path, pooling: PoolingName | None, max_length: int) -> None:
    """Refuse what only a bare language model is told.

    Raises:
        ModelError: A pooling.
        ConfigError: A length other than the default.
    """
    if pooling is not None:
        raise ModelError(name, f"is a trained embedder and pools its own way, not by {pooling}")
    if max_length != MAX_LENGTH:
        problem = f"{name} is a trained embedder and cuts texts at its own length, not at {max_length}"
        raise ConfigError("max_length", max_length, problem, "leave it out")


def check_device(device: str | None) -> None:
    """Refuse a device that torch cannot use on this machine; None is torch's own choice.

    Raises:
        ConfigError: It does not exist, or not here.
    """
    if device is None:
        return
    try:
        torch.device(device)
    except RuntimeError:
        raise ConfigError("device", device, f"{device!r} is no device of torch", DEVICES) from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):  # whichever the device raises
        problem = f"this machine has no {device} that torch can use"
        raise ConfigError("device", device, problem, "cpu, or leave --device out") from None


def _wrap(
    source: str | Path,
    model_kwargs: dict[str, Any],
    pooling: PoolingName | None,
    max_length: int,
    options: dict[str, Any],
) -> SentenceTransformer:
    """A bare transformer as a ``SentenceTransformer``: text in, pooled and normalised vector out."""
    shared = {key: options[key] for key in ("revision", "trust_remote_code")}
    # The modality is pinned to text: left to itself, sentence-transformers puts every text into the chat template of
    # a model that has one. The template stays in the folder for those who chat.
    transformer = Transformer(
        str(source),
        model_kwargs=model_kwargs | shared,
        processor_kwargs=dict(shared),
        config_kwargs=dict(shared),
        modality_config={"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        module_output_name="token_embeddings",
    )
    own_length = transformer.max_seq_length
    transformer.max_seq_length = max_length if own_length is None else min(max_length, own_length)
    if transformer.tokenizer.pad_token is None:
        transformer.tokenizer.pad_token = transformer.tokenizer.eos_token
    # Decoders often come with left padding, for generation. An encoder reads from the first token: with absolute
    # positions, right padding alone leaves a text's vector as it is, and no architecture needs the left
    # (docs/architectures.md). A trained embedder keeps its own side, which its pooling may rely on.
    transformer.tokenizer.padding_side = "right"
    transformer.auto_model.config.use_cache = False
    if pooling is None:
        pooling = "weighted_mean" if is_causal(transformer) else "mean"
    head = make_pooling(pooling, state_width(transformer))
    modules = [transformer, head, Normalize()]
    return SentenceTransformer(modules=modules, device=options["device"], similarity_fn_name="cosine").eval()


@torch.no_grad()
def is_causal(transformer: Transformer) -> bool:
    """Whether a token's state is blind to what follows it: measured on two texts that differ in their last token."""
    model = transformer.auto_model
    ids = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 9]], device=model.device)
    states = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
    return bool(torch.allclose(states[0, 0], states[1, 0], atol=1e-5))


def make_bidirectional(model: SentenceTransformer, name: str | Path) -> None:
    """Let every token of a decoder see those after it, in place; the saved configuration says so too.

    Raises:
        ModelError: It does already.
        UnsupportedArchitecture: Its code does not ask its configuration.
    """
    transformer = model[0].auto_model.eval()
    if not is_causal(model[0]):
        raise ModelError(name, "attends both ways already", "leave bidirectional out")
    for config in (transformer.config, text_config(transformer)):
        config.is_causal = False
    if is_causal(model[0]):
        raise UnsupportedArchitecture(name, "cannot attend both ways: is_causal changes none of its vectors")


def _check_folder(folder: Path) -> None:
    """Say what is missing from a model folder before any library stumbles over it."""
    if not folder.is_dir():
        raise ModelError(folder, "is not a model folder or a .gguf file")
    if not (folder / "config.json").is_file() and not (folder / "modules.json").is_file():
        raise ModelError(folder, "has no config.json", "a model folder holds config.json, weights and a tokenizer")
    if (folder / "config.json").is_file():
        config = read_json(folder / "config.json")
        if not isinstance(config, dict) or not config:
            raise ModelError(folder, "has an empty config.json")
    weights = sorted(folder.rglob("*.safetensors"))
    if not weights:
        pickles = sorted(folder.glob("*.bin"))
        hint = "convert it: load it with transformers elsewhere and save_pretrained() it again" if pickles else ""
        raise ModelError(folder, f"has no safetensors{f', only {pickles[0].name}' if pickles else ''}", hint)
    for file in weights:
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(folder, f"{file.name} is damaged or half written ({_in_one_line(error)})") from error


@contextmanager
def as_model_error(name: str | Path, path: Path | None = None) -> Iterator[None]:
    """Turn whatever libraries raise on a model that they cannot open into one line about that model.

    Args:
        name: What the user called it.
        path: Where it was opened, if not there.
    """

    def named(message: str) -> str:
        return message if path is None else message.replace(str(path), str(name))

    try:
        yield
    except SecateurError as error:
        error.args = tuple(named(str(part)) for part in error.args)
        raise
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ModelError(name, f"cannot be opened ({named(_in_one_line(error))})") from error
    except Exception as error:  # a library that stumbles over a file raises what it likes, ZeroDivisionError included
        raise ModelError(name, f"is not a text model that can be opened ({named(_in_one_line(error))})") from error


def _in_one_line(error: BaseException) -> str:
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message[:200]}" if message else type(error).__name__


def save_model(model: SentenceTransformer, folder: Path, origin: Origin, *, expected: Expected | None = None) -> Origin:
    """Write a model as a plain folder, reopen it in a fresh process with stock libraries, and compare vectors.

    Args:
        model: The model in memory.
        folder: An existing empty folder.
        origin: Where the model comes from; its ``check`` is filled in and it is written as ``secateur.json``.
        expected: What the folder should give; by default, what the model in memory gives.

    Returns:
        The origin as written.

    Raises:
        VerificationFailed: The reopened folder gives other vectors.
    """
    write_files(model, folder)
    if expected is None:
        with quiet():
            expected = Expected(probe(model), tokens=probe_tokens(model))
    return check_written(folder, replace(origin, pooling=pooling_name(model)), expected, str(model.device))


def write_files(model: SentenceTransformer, folder: Path, *, weights: bool = True) -> None:
    """Write a model's folder; without ``weights``, all but those of the transformer, which are there already."""
    transformer = model[0].model
    # Gemma 3 makes its layer_types from this when it is opened; those of a cut model no longer follow it.
    vars(text_config(transformer)).pop("_sliding_window_pattern", None)
    if not weights:
        transformer.save_pretrained = lambda *_, **__: None
    try:
        with quiet():
            model.save(str(folder), create_model_card=False)
    finally:
        vars(transformer).pop("save_pretrained", None)
    write_for_all_readers(folder, model)
    for file in folder.rglob("*.safetensors"):
        # safetensors lets nobody but the owner read what it writes; here the umask decides, as for modules.json.
        shutil.copymode(folder / "modules.json", file)


def check_written(folder: Path, origin: Origin, expected: Expected, device: str = "cpu") -> Origin:
    """Compare a written folder with what it should give, and write ``secateur.json``: the last step of saving.

    Raises:
        VerificationFailed: It gives other vectors.
    """
    found = difference(folder, expected, device)
    written = replace(origin, check=found, checked_against=expected.source)
    written.save(folder)
    return written
