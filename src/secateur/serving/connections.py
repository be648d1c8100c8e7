"""Connections to clients, and when one is given up."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState


class Connection(H11Protocol):
    """uvicorn's connection, closed when its client reads nothing of what it is sent for ``patience`` seconds.

    Such a client would hold its answer in memory, and the end of the server up. What the operating system has taken
    counts as read. A request finds in its scope's state, as ``gone``, whether its client has left.
    """

    patience = 30.0

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._gone = False
        self._unread = 0
        self._timer: asyncio.TimerHandle | None = None
        super().__init__(config, server_state, {**app_state, "gone": lambda: self._gone}, _loop)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ask to be told as soon as anything waits, and again when nothing does."""
        transport.set_write_buffer_limits(0)
        super().connection_made(transport)

    def pause_writing(self) -> None:
        """Something waits; until it has left, nothing is added."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """All that waited has left."""
        self._unwatch()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client left, or was left."""
        self._gone = True
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        self._unwatch()
        self._unread = self.transport.get_write_buffer_size()
        self._timer = self.loop.call_later(self.patience, self._look)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        if self.transport.get_write_buffer_size() < self._unread:
            self._watch()
        else:
            self.transport.abort()
