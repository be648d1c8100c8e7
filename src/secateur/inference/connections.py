"""Connections to clients, and when one is given up."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_ERROR = {"message": "the headers came too slowly", "type": "invalid_request_error", "param": None, "code": "timeout"}
_BODY = json.dumps({"error": _ERROR}).encode()
TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: application/json\r\nConnection: close\r\n"
    b"Content-Length: %d\r\n\r\n%s" % (len(_BODY), _BODY)
)


class Connection(asyncio.Protocol):
    """uvicorn's connection, closed when its client is too slow for ``patience`` seconds.

    That is a client that has not sent all headers of its first request so long after it connected, or of another so
    long after their first byte; or one that reads nothing of what it is sent: it would hold its answer in memory, and
    the end of the server up. What the operating system has taken counts as read.

    uvicorn reads and writes HTTP; this stands between it and the socket, and uses of it nothing but what asyncio calls.
    A request finds this object in its scope's state, as ``connection``, and says when it begins and ends.
    """

    patience = 30.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.gone = False
        self._http = H11Protocol(config, server_state, {**app_state, "connection": self}, _loop)
        self._loop = asyncio.get_running_loop()
        self._heard = False
        self._requests = 0
        self._unread = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Ask to be told as soon as anything waits, and again when nothing does."""
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(0)
        self._transport = transport
        self._reading = self._loop.call_later(self.patience, self._give_up)
        self._http.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        """A part of a request; the first starts the time in which its headers must come."""
        self._heard = True
        if not self._requests and self._reading is None:
            self._reading = self._loop.call_later(self.patience, self._give_up)
        self._http.data_received(data)

    def eof_received(self) -> None:
        """The client sends no more."""
        self._http.eof_received()

    def begin(self) -> None:
        """All headers of a request are here."""
        self._requests += 1
        _cancel(self._reading)
        self._reading = None

    def end(self) -> None:
        """A request has been answered."""
        self._requests -= 1

    def pause_writing(self) -> None:
        """Something waits; until it has left, nothing is added."""
        self._http.pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """All that waited has left."""
        _cancel(self._writing)
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was left."""
        self.gone = True
        _cancel(self._reading)
        _cancel(self._writing)
        self._http.connection_lost(exc)

    def _give_up(self) -> None:
        if self._heard:
            self._transport.write(TOO_SLOW)
        self._transport.close()

    def _watch(self) -> None:
        _cancel(self._writing)
        self._unread = self._transport.get_write_buffer_size()
        self._writing = self._loop.call_later(self.patience, self._look)

    def _look(self) -> None:
        if self._transport.get_write_buffer_size() < self._unread:
            self._watch()
        else:
            self._transport.abort()


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
