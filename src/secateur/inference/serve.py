"""A server that listens: where, with which keys and encoders, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import math
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from sentence_transformers.util import get_device_name

from secateur.errors import ConfigError, ModelError
from secateur.inference.app import make_app
from secateur.inference.arithmetic import use_arithmetic, weights_dtype
from secateur.inference.connections import Connection
from secateur.inference.encoders import (
    SILENT_SECONDS,
    Encoder,
    EncoderDied,
    EncoderProcess,
    ModelEncoder,
    Vectors,
    batch_budget,
)
from secateur.inference.exported import ExportEncoder, check_opening, is_export
from secateur.inference.gate import (
    API_KEYS,
    Keys,
    Limits,
    Metrics,
    log,
    log_as_json,
    read_keys,
)
from secateur.inference.memory import keep_freed_memory
from secateur.models import model_label
from secateur.models.open_model import check_device, open_model
from secateur.options import SavedPooling

BACKLOG = 2048
"""Connections that may wait to be accepted."""

KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection, so that it is they who close it."""

LEAST_SILENCE = 2.0
"""No worker is taken to hang sooner, however short the time that a request may take."""

LAST_SECONDS = 0.5
"""What clients have to read why they are not answered, when the server ends at once."""


class Server(uvicorn.Server):
    """uvicorn's server, which ends well when it is told to end."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Finish what was taken; a second signal ends at once. uvicorn would raise the signal again at the end."""
        if self.should_exit and self.started:
            self.servers[0].get_loop().call_soon_threadsafe(self._give_up)
        self.should_exit = True

    def _give_up(self) -> None:
        """Have the :class:`.Gate` tell who waits that it is in vain, and leave those who do not read it."""
        for task in self.server_state.tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(LAST_SECONDS, self._leave)

    def _leave(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def make_server(app: FastAPI, timeout: float = Limits.timeout) -> Server:
    """A uvicorn server for an app; what it took it finishes, for at most ``timeout`` seconds."""
    return Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=math.ceil(timeout),
        )
    )


def bind(host: str, port: int, keys: Keys, auth: bool = True) -> socket.socket:
    """A socket at an address, not yet listening.

    Raises:
        ConfigError: Others could reach it and there is no key, or the address is taken or not of this machine.
    """
    if auth and not keys and not _is_loopback(host):
        problem = "is reachable from other machines, and there is no API key"
        hint = f"set {API_KEYS} or --api-key-file, or say --no-auth"
        raise ConfigError("host", host, f"{host} {problem}", hint)
    with _as_config_error(host, port):
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    return bound


def listen(bound: socket.socket) -> str:
    """Listen at what :func:`bind` gave, and say where that is, as a URL.

    Raises:
        ConfigError: Another server has begun to, after this one was bound.
    """
    host, port = bound.getsockname()[:2]
    with _as_config_error(host, port):
        bound.listen(BACKLOG)
    return f"http://{_place(host, port)}"


@contextmanager
def _as_config_error(host: str, port: int) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError) as error:  # the latter from a name that cannot be one
        said = getattr(error, "strerror", None) or error
        raise ConfigError("host", host, f"cannot listen at {_place(host, port)} ({said})") from None


def _place(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def serve(
    model: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    api_key_file: str | Path | None = None,
    auth: bool = True,
    workers: int = 0,
    batch_tokens: int | None = None,
    queue_tokens: int = Limits.queue_tokens,
    max_items: int = Limits.max_items,
    max_tokens: int = Limits.max_tokens,
    max_bytes: int = Limits.max_bytes,
    timeout: float = Limits.timeout,
    truncate: bool = False,
    pooling: SavedPooling | None = None,
    max_length: int = 512,
    dtype: str = "auto",
    device: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Serve a model until the process is told to end (SIGTERM, Ctrl-C); then finish what was taken.

    Args:
        model: A folder that ``secateur export`` wrote; or as :func:`.open_model` takes it, to which
            ``pooling`` and all that follow it go.
        host: Address to listen at; others than loopback need a key.
        port: Port to listen at; 0 takes a free one, which the log tells.
        name: What clients call the model; default: the last part of its path or Hub id.
        api_key_file: API keys, one a line, besides those in the environment variable ``SECATEUR_API_KEYS``.
        auth: False serves everybody who reaches ``host``.
        workers: Encoder processes, each with the model in its memory, replaced when they die or hang; 0: a thread.
        batch_tokens: Tokens in one pass of the model, padding included; default: 1,024 on a CPU, 8,192 on a GPU.
        queue_tokens: Tokens that may wait or be encoded; more are answered with 429.
        max_items: Texts in a request.
        max_tokens: Tokens in a request.
        max_bytes: Bytes of a request's body.
        timeout: Seconds that a request may take.
        truncate: Cut texts that are too long for the model; else they are refused.
        pooling: How a bare language model pools its tokens.
        max_length: Tokens in a text, for a bare language model.
        dtype: As for :func:`.encode`; what ``auto`` finds when the server starts, all workers use.
        device: Torch device; an export has none.
        trust_remote_code: Run the model code that a repository brings along.

    Raises:
        ConfigError: ``host`` is open to others without a key, the address is taken, a key file holds no key or is not
            wanted, there is no such device, or an option that an export has decided already.
        ModelError: The model cannot be opened, or not be served.
        SecateurError: An encoder process cannot open it.
    """
    if api_key_file is not None and not auth:
        problem = "says who is served, and --no-auth that everybody is"
        raise ConfigError("api_key_file", str(api_key_file), problem, "leave one of them out")
    keys = read_keys(api_key_file) if auth else Keys()
    exported = is_export(model)
    if not exported:
        check_device(device)
    processor = "cpu" if exported else device or get_device_name()
    limits = Limits(
        batch_tokens or batch_budget(processor), queue_tokens, max_items, max_tokens, max_bytes, timeout, truncate
    )
    opening: dict[str, Any] = {"pooling": pooling, "max_length": max_length, "dtype": dtype}
    opening |= {"device": device, "trust_remote_code": trust_remote_code}
    metrics = Metrics()
    keep_freed_memory()
    with ExitStack() as held:
        listener = held.enter_context(bind(host, port, keys, auth))
        thread = held.enter_context(ThreadPoolExecutor(1, thread_name_prefix="model"))
        here = opening | ({"device": "cpu"} if workers and not exported else {})
        encoder = thread.submit(open_encoder, model, here).result()
        found = encoder.dtype
        if workers and isinstance(encoder, ModelEncoder):
            encoder.model.to("meta")  # only its tokenizer is needed here
            found = found if torch.device(processor).type == "cpu" else dtype
            opening["dtype"] = found
        share = max(1, torch.get_num_threads() // max(1, workers))
        make = partial(open_encoder, _absolute(model), opening, share)
        silence = min(SILENT_SECONDS, max(LEAST_SILENCE, timeout / 4))
        new = partial(EncoderProcess[Vectors], make, metrics.restarts.inc, silence)
        processes = [held.enter_context(closing(new())) for _ in range(workers)]
        _wait_for(processes, model)
        name = name or model_label(model)
        app = make_app(encoder, name, limits=limits, keys=keys, processes=processes, metrics=metrics, thread=thread)
        gc.collect()
        gc.freeze()  # a request with a million lists in it would have all that is loaded looked through again and again
        log_as_json()
        address = listen(listener)  # before it says so
        facts = {"model": name, "address": address, "pid": os.getpid(), "dtype": found}
        log.info("serving", extra={"facts": facts})
        make_server(app, timeout).run(sockets=[listener])
        log.info("ended")


def _absolute(model: str | Path) -> str | Path:
    """A path that stays one, whatever becomes of it: a name that is no path any more is taken for one of the Hub."""
    path = Path(model).expanduser()
    return path.absolute() if path.exists() else model


def _wait_for(processes: Sequence[EncoderProcess[Any]], model: str | Path) -> None:
    for process in processes:
        try:
            process.revive()
        except EncoderDied as error:
            hint = "too little memory? Fewer --workers need less"
            raise ModelError(model, f"{error}, before it could take work", hint) from None


def open_encoder(model: str | Path, opening: Mapping[str, Any], threads: int | None = None) -> Encoder:
    """A model or an export as the server's encoder.

    Args:
        model: As for :func:`serve`.
        opening: What stands in :data:`.OPENING`.
        threads: Its share of the processor.

    Raises:
        ConfigError: An option that an export has decided already.
    """
    if is_export(model):
        check_opening(opening)
        return ExportEncoder(model, threads)
    if threads:
        torch.set_num_threads(threads)
    opened = open_model(model, **{**opening, "dtype": weights_dtype(opening["dtype"])})
    dtype = use_arithmetic(opened, opening["dtype"])
    return ModelEncoder(opened, model_label(model), dtype)
