"""Repeats, within Prefect's server, a request that met a busy sqlite database.

A request that reads and then writes fails at once where another one has written in between (SQLITE_BUSY_SNAPSHOT).
Prefect answers it with 503, and its client waits two seconds and more before it asks again (seen in 3.8.8). A task
asks for its slot of ``tag:gpu`` just when the states of the task before are stored: four runs of five waited.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

# Of the specification of ASGI.
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_BUSY = 503
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.8)  # seconds before each further attempt


class RetryWhenBusy:
    """ASGI middleware: an answer 503 is kept back, and the request is repeated, a few times within two seconds.

    A client would repeat it too, only later: what was not stored is stored once.

    Args:
        app: the application behind it.
    """

    def __init__(self, app: App):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        body = await _read(receive)
        for pause in _PAUSES:
            if await self._answers(scope, body, receive, send):
                return None
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))  # not in step with the request it met
        return await self.app(scope, _replay(body, receive), send)

    async def _answers(self, scope: Scope, body: list[Scope], receive: Receive, send: Send) -> bool:
        """Send the application's answer, unless it is 503. Returns whether it was sent."""
        is_busy = False

        async def send_unless_busy(message: Scope) -> None:
            nonlocal is_busy
            is_busy = is_busy or (message["type"] == "http.response.start" and message["status"] == _BUSY)
            if not is_busy:
                await send(message)

        try:
            await self.app(dict(scope), _replay(body, receive), send_unless_busy)
        except Exception:  # the error that was answered, once more, for the server's log
            if not is_busy:
                raise
        return not is_busy


async def _read(receive: Receive) -> list[Scope]:
    """All messages of a request's body."""
    messages = [await receive()]
    while messages[-1].get("more_body"):
        messages.append(await receive())
    return messages


def _replay(messages: list[Scope], receive: Receive) -> Receive:
    """Give the messages, then what comes after them: that the client has gone."""
    waiting = iter(messages)

    async def replayed() -> Any:
        message = next(waiting, None)
        return await receive() if message is None else message

    return replayed
