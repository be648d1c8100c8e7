"""A server that listens: where, with which keys and workers, what it logs, and how it ends."""

from __future__ import annotations

import asyncio
import gc
import ipaddress
import math
import os
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn
from fastapi import FastAPI

from secateur.errors import ConfigError, ModelError, SecateurError
from secateur.inference.app import make_app
from secateur.inference.backends import choose, is_decided, open_encoder
from secateur.inference.encoders import STORED, TORCH, ModelEncoder, Opening
from secateur.inference.monitoring import Metrics, log, log_as_json
from secateur.inference.queueing import LocalWorker
from secateur.inference.workers import EncoderDied, EncoderProcess, keep_freed_memory
from secateur.models import model_label
from secateur.options import ServeOptions, step
from secateur.runtime.core import CPU_BATCH, GPU_BATCH, LENGTH_STEP

API_KEYS = "SECATEUR_API_KEYS"
"""The environment variable that API keys are read from, separated by commas."""
BACKLOG = 2048
"""Connections that may wait to be accepted."""
KEEP_ALIVE_SECONDS = 75
"""Longer than clients keep a connection, so that it is they who close it."""


def read_keys(file: str | Path | None) -> list[bytes]:
    """API keys from the environment variable ``SECATEUR_API_KEYS`` and from a file, one a line.

    Raises:
        ConfigError: The file cannot be read, or holds no key; or a key is malformed. No key is in the message.
    """
    keys = os.environ.get(API_KEYS, "").split(",")
    if any(len(key.split()) > 1 for key in keys):
        raise ConfigError(API_KEYS, None, "has blanks or line ends within a key", "keys are separated by commas")
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError("api_key_file", str(file), f"{file} cannot be read ({type(error).__name__})") from None
        wrong = next((number for number, line in enumerate(lines, 1) if len(line.split()) > 1), None)
        if wrong or not any(map(str.strip, lines)):
            problem = f"line {wrong}: a key has no blanks in it" if wrong else "holds no key"
            raise ConfigError("api_key_file", str(file), f"{file}, {problem}", "one key a line, and nothing else")
        keys += lines
    return [os.fsencode(key.strip()) for key in keys if key.strip()]


class Server(uvicorn.Server):
    """uvicorn's server; at a signal it finishes the requests it has, at a second one it cancels them, with code 0."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and self.started:
            for task in list(self.server_state.tasks):
                self.servers[0].get_loop().call_soon_threadsafe(task.cancel)
        self.should_exit = True


def make_server(app: FastAPI, timeout: float) -> Server:
    """A uvicorn server for an app; at the end, requests have ``timeout`` seconds to finish."""
    config = uvicorn.Config(
        app,
        http="h11",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        backlog=BACKLOG,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=math.ceil(timeout),
    )
    return Server(config)


def bind(host: str, port: int, keys: Sequence[bytes] = (), auth: bool = True) -> socket.socket:
    """A socket at an address, not yet listening; ConfigError where others could reach it and there is no key."""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if auth and not keys and not loopback:
        problem = "is reachable from other machines, and there is no API key"
        hint = f"set {API_KEYS} or --api-key-file, or say --no-auth"
        raise ConfigError("host", host, f"{host} {problem}", hint)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, UnicodeError) as error:  # the latter from a name that cannot be one
        said = getattr(error, "strerror", None) or error
        raise ConfigError("host", host, f"cannot listen at {host}, port {port} ({said})") from None
    return bound


def open_worker(opening: Opening) -> LocalWorker:
    return LocalWorker(open_encoder(opening))


def _start_workers(stack: ExitStack, options: ServeOptions, opening: Opening, metrics: Metrics) -> list[EncoderProcess]:
    """Start the worker processes, together, and wait until each has opened the model; the stack ends them."""
    share = max(1, torch.get_num_threads() // max(1, options.workers))
    make = partial(open_worker, replace(opening, threads=share))
    processes = [EncoderProcess(make, metrics.restarts.inc) for _ in range(options.workers)]
    for process in processes:
        stack.enter_context(closing(process))
    for process in processes:
        try:
            process.restart()
        except EncoderDied as error:
            hint = "too little memory? Fewer --workers need less"
            raise ModelError(options.model, f"{error}, before it could take work", hint) from None
    return processes


@step(ServeOptions)
def serve(options: ServeOptions) -> None:
    """Serve a model until the process is told to end (SIGTERM, Ctrl-C); then finish the requests it has.

    Raises:
        ConfigError: The host is open to others without a key, the address is taken, a key file holds no key or is not
            wanted, there is no such device, or an option that an export has decided already.
        ModelError: The model cannot be opened, or not be served.
        SecateurError: A worker cannot open it; or an event loop runs in this thread already, as in a notebook.
    """
    with suppress(RuntimeError):
        asyncio.get_running_loop()
        hint = "start it in a terminal, or in a thread: threading.Thread(target=secateur.serve, args=[MODEL]).start()"
        raise SecateurError("a server needs its own event loop, and one runs here already, as in a notebook", hint)
    if options.api_key_file is not None and not options.auth:
        problem = "says who is served, and --no-auth that everybody is"
        raise ConfigError("api_key_file", str(options.api_key_file), problem, "leave one of them out")
    keys = read_keys(options.api_key_file) if options.auth else []
    opening, metrics = Opening.of(options), Metrics()
    keep_freed_memory()
    with ExitStack() as stack:
        listener = stack.enter_context(bind(options.host, options.port, keys, options.auth))
        thread = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="model"))
        # Workers open the model on its device; here, only its tokenizer is needed.
        elsewhere = replace(opening, device="cpu", backend=TORCH, dtype=STORED)
        here = opening if opening.on_cpu or not options.workers else elsewhere
        log_as_json()
        told = "" if is_decided(here) else "finds the fastest backend; the first time, this may take minutes"
        log.info("starting", extra={"facts": {"model": options.model, "told": told}})
        try:
            chosen = thread.submit(choose, here, options.min_cosine).result()
        except KeyboardInterrupt:  # nothing stops a conversion, and the thread's end would be waited for
            log.info("ended")
            os._exit(130)
        encoder, opening = chosen.encoder, chosen.opening if here is opening else opening
        if options.workers and isinstance(encoder, ModelEncoder):
            encoder.model.to("meta")
            encoder.batch_tokens = opening.batch_tokens or (CPU_BATCH if opening.on_cpu else GPU_BATCH)
            encoder.length_step = LENGTH_STEP  # as in the workers, which else cut the queue's batches in two
        processes = _start_workers(stack, options, opening, metrics)
        name = options.name or model_label(options.model)
        app = make_app(encoder, name, options, keys=keys, processes=processes, metrics=metrics, thread=thread)
        gc.collect()
        gc.freeze()  # a request with a million lists in it would have all that is loaded looked through again and again
        listener.listen(BACKLOG)  # before the log says so
        host, port = listener.getsockname()[:2]
        address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        facts = {"model": name, "address": address, "pid": os.getpid(), "backend": opening.backend}
        facts |= {"dtype": opening.dtype, "told": chosen.told}
        log.info("serving", extra={"facts": facts})
        make_server(app, options.timeout).run(sockets=[listener])
        log.info("ended")
