"""Vectors from a server that speaks the OpenAI embeddings API, over a network that fails now and then.

What may pass is asked for again: no connection, no answer in time, 429 and 5xx, an answer that breaks off. A wrong
answer is not: what is no JSON, or another number of vectors than of texts.
"""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from secateur.errors import ConfigError, ModelError

KEY, COMMON_KEY = "SECATEUR_TEACHER_KEY", "OPENAI_API_KEY"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
TRANSIENT = (408, 409, 425, 429)
"""Refusals that may pass, besides all of 500 and above."""
LONGEST_WAIT = 300.0
"""Seconds. A server that wants to be left alone for longer is told of instead."""


@dataclass(frozen=True)
class Server:
    """Where vectors are asked for, and how patiently.

    Attributes:
        url: Up to ``/v1``.
        model: What the server calls its model.
        key: Sent as the bearer; empty where there is none.
        batch: Texts in a request.
        timeout: Seconds without a sign of life.
        attempts: How often a request is sent at most.
        wait: Seconds before the second attempt, doubled before each further one, unless the server says how long.
    """

    url: str
    model: str = ""
    key: str = field(default="", repr=False)
    batch: int = 128
    timeout: float = 60.0
    attempts: int = 8
    wait: float = 0.5


def is_url(name: object) -> bool:
    """Whether a model's name is the address of a server."""
    return str(name).startswith(("http://", "https://"))


def connect(url: str, model: str | None = None, *, wait: float = Server.wait) -> Server:
    """A server, its model, and the key for it from the environment.

    The key is ``SECATEUR_TEACHER_KEY``, else ``OPENAI_API_KEY``; the latter leaves this machine encrypted only.

    Args:
        url: Up to ``/v1``.
        model: What the server calls its model; it may be left out where the server has one only.
        wait: See :class:`Server`.

    Raises:
        ConfigError: The address is none, holds a password, or the server has several models.
        ModelError: The server cannot be reached, or refuses.
    """
    parts = urlsplit(url)
    if not parts.hostname or "@" in parts.netloc:
        problem = "an address holds no password" if "@" in parts.netloc else f"{url!r} is no address"
        raise ConfigError("teacher", parts.hostname or url, problem, f"http(s)://host/v1; the key stands in {KEY}")
    private = parts.scheme == "https" or parts.hostname in LOOPBACK
    key = os.environ.get(KEY) or (os.environ.get(COMMON_KEY, "") if private else "")
    server = Server(url.rstrip("/"), model or "", key, wait=wait)
    return server if model else replace(server, model=_only_model(server))


def _only_model(server: Server) -> str:
    answer = _ask(server, "/models")
    rows = answer.get("data") if isinstance(answer, dict) else None
    rows = rows if isinstance(rows, list) else []
    names = [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]
    if len(names) != 1:
        some = ", ".join(names[:10]) or "none that it tells"
        raise ConfigError("teacher_model", None, f"the server has {len(names)} models ({some})", "name one")
    return names[0]


def embed(server: Server, texts: Sequence[str]) -> NDArray[np.float32]:
    """Vectors of texts, (texts, dimension).

    Raises:
        ModelError: The server refuses, does not answer in all its attempts, or its answer is not what was asked for.
    """
    starts = range(0, len(texts), server.batch)
    parts = [_embed(server, list(texts[start : start + server.batch])) for start in starts]
    if len({part.shape[1] for part in parts}) > 1:
        raise ModelError(server.url, "gives vectors of several sizes")
    return np.concatenate(parts)


def _embed(server: Server, texts: list[str]) -> NDArray[np.float32]:
    try:
        answer = _ask(server, "/embeddings", {"model": server.model, "input": texts, "encoding_format": "float"})
    except _TooLarge as error:
        if len(texts) == 1:
            raise ModelError(server.url, f"refuses a text of {len(texts[0])} characters ({error})") from None
        half = len(texts) // 2
        return np.concatenate([_embed(server, texts[:half]), _embed(server, texts[half:])])
    return _vectors(server, answer, len(texts))


def _vectors(server: Server, answer: Any, count: int) -> NDArray[np.float32]:
    """The vectors of an answer, in the order of the texts."""
    try:
        rows = {int(row["index"]): row["embedding"] for row in answer["data"]}
        vectors = np.array([rows[i] for i in range(count)], dtype=np.float32)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ModelError(server.url, f"does not answer with one vector for each of {count} texts ({error!r})") from None
    if len(answer["data"]) != count or vectors.ndim != 2:
        raise ModelError(server.url, f"answers with {len(answer['data'])} vectors for {count} texts")
    return vectors


class _TooLarge(Exception):
    """The server takes less in one request."""


class _Transient(Exception):
    """What may pass; ``wait`` is for how many seconds the server wants to be left alone, if it says so."""

    def __init__(self, problem: str, wait: float | None = None) -> None:
        super().__init__(problem)
        self.wait = wait


def _ask(server: Server, path: str, body: Any = None) -> Any:
    """One request, sent until it is answered."""
    failure = _Transient("was not asked")
    for attempt in range(server.attempts):
        if attempt:
            time.sleep(_pause(server, attempt, failure))
        try:
            return _send(server, path, body)
        except _Transient as error:
            failure = error
    hint = "with --cache, what it gave is kept, and the same command goes on"
    raise ModelError(server.url, f"{failure}, {server.attempts} times", hint)


def _pause(server: Server, attempt: int, failure: _Transient) -> float:
    """Seconds until a request is sent again: as the server says, else twice as many each time."""
    wait = server.wait * 2 ** (attempt - 1) if failure.wait is None else failure.wait
    if wait > LONGEST_WAIT:
        raise ModelError(server.url, f"{failure}, and wants to be asked again in {wait:.0f} seconds", "come back then")
    return wait


def _send(server: Server, path: str, body: Any) -> Any:
    headers = {"Content-Type": "application/json", "User-Agent": "secateur"}
    headers |= {"Authorization": f"Bearer {server.key}"} if server.key else {}
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, content, headers)  # noqa: S310 - connect() took http(s) only
    try:
        with _OPENER.open(request, timeout=server.timeout) as response:
            return _parse(server, response.read())
    except urllib.error.HTTPError as error:
        raise _refusal(server, error) from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise _Transient(f"gives no whole answer ({reason or type(error).__name__})") from None


def _parse(server: Server, content: bytes) -> Any:
    """The JSON of an answer. What breaks off is a ValueError; what never was an answer is refused for good."""
    start = content.lstrip()[:1]
    if start and start not in b"{[":
        said = " ".join(content[:200].decode(errors="replace").split())
        raise ModelError(server.url, f'answers with no JSON ("{said:.60}")', "the address ends with /v1")
    try:
        return json.loads(content)
    except RecursionError:
        raise ModelError(server.url, "answers with JSON that is nested too deep") from None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirects)


def _refusal(server: Server, error: urllib.error.HTTPError) -> Exception:
    told = f"answers {error.code} ({_message(error)})"
    if error.code in TRANSIENT or error.code >= 500:
        return _Transient(told, _wait(error.headers.get("Retry-After")))
    if error.code == 413:
        return _TooLarge(told)
    hints = {401: f"set {KEY}", 403: f"set {KEY}", 404: "the address ends with /v1; --teacher-model names the model"}
    return ModelError(server.url, told, hints.get(error.code, ""))


def _message(error: urllib.error.HTTPError) -> str:
    """What the server says, in OpenAI's shape or any."""
    try:
        text = error.read(4096).decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return error.reason
    try:
        return str(json.loads(text)["error"]["message"])[:300]
    except (ValueError, KeyError, TypeError, RecursionError):
        return " ".join(text.split())[:200] or error.reason


def _wait(header: str | None) -> float | None:
    """Seconds of a ``Retry-After``, which is a number or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            until = parsedate_to_datetime(header)
        except ValueError:
            return None
        seconds = (until.replace(tzinfo=until.tzinfo or timezone.utc) - datetime.now(timezone.utc)).total_seconds()
    return max(0.0, seconds) if np.isfinite(seconds) else None
