"""Requests to a server over HTTP: some at a time, each tried again when that can help."""

import asyncio
import json
import os
import random
import re
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import islice
from threading import Thread
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit
from weakref import WeakSet

from stillroom.errors import ConfigError, DataError, MissingError, StillroomError, require
from stillroom.recipe import parse_json

RETRIED = (429, 500, 502, 503, 504)

FIRST_WAIT_S, LONGEST_WAIT_S, LONGEST_ASKED_WAIT_S = 0.5, 60.0, 600.0
"""Waits double from the first to the longest; a server's Retry-After is honoured up to the last."""

MOST_BYTES = 2**30
"""A longer answer is refused before it fills the memory."""

T = TypeVar("T")
R = TypeVar("R")


@dataclass
class Usage:
    """A running count of requests and tokens."""

    requests: int = 0
    """Requests sent, with those that were sent again."""
    retries: int = 0
    """Requests sent again."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class Endpoint:
    """A server's address, and the way in which requests are sent to it."""

    url: str
    """Its address; a final /v1 may be there or not."""
    concurrency: int = 8
    """Requests under way at a time."""
    retries: int = 6
    """The number of times that a request is tried again, with longer and longer waits, after 429, 500, 502, 503, 504, a
    lost connection, a time-out or half an answer. A wait that the server asks for is kept to."""
    timeout_s: float = 120.0
    """Seconds after which a request counts as failed."""
    key_variable: str | None = None
    """The name of the environment variable with the key. The key itself is in no error and no log."""
    usage: Usage = field(default_factory=Usage)
    wait: Callable[[float], Awaitable[object]] = asyncio.sleep
    """Waits so many seconds between two tries."""

    def __post_init__(self) -> None:
        require("httpx", "server", "asking a server")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            given = f"{parts.scheme or '(no scheme)'}://{parts.hostname or '(no host)'}"
            raise ConfigError(
                "the server's address cannot be used",
                {"given": given, "wanted": "http[s]://HOST[:PORT][/v1]"},
                why="It must name a host, and hold no password and no query, which would end up in logs.",
                fix="Write it as http://127.0.0.1:8000/v1, and give a key by an environment variable (key_variable).",
            )
        self.root = urlunsplit((parts.scheme, parts.netloc, re.sub(r"(/v1)?/*$", "", parts.path), "", ""))

    def key(self) -> str | None:
        """Returns the server's key, where it has one. Raises MissingError where the environment variable is not set,
        ConfigError where what it holds cannot be a key."""
        if self.key_variable is None:
            return None
        key = os.environ.get(self.key_variable, "").strip()
        if not key:
            raise MissingError(
                "the server's key is not there",
                {"environment variable": self.key_variable, "value": "not set, or empty"},
                why="The server is asked with the key in that variable.",
                fix=f"Run `export {self.key_variable}=…` first, or leave key_variable out if the server needs no key.",
            )
        if not re.fullmatch(r"[!-~]+", key):
            raise ConfigError(
                "the server's key has characters that no key can have",
                {"environment variable": self.key_variable, "wanted": "printable ASCII without spaces"},
                why="It is sent in a header, which cannot hold them.",
                fix=f"Check what {self.key_variable} holds.",
            )
        return key


class RequestFailure(Exception):
    """One try that failed."""

    def __init__(self, reason: str, status: int | None = None, *, again: bool, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.status, self.again, self.wait_s = reason, status, again, wait_s


class Connection:
    """Open connections to a server; everything runs in one event loop."""

    def __init__(self, endpoint: Endpoint) -> None:
        import httpx

        self.endpoint, self._key = endpoint, endpoint.key()
        headers = {"Content-Type": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        limits = httpx.Limits(max_connections=endpoint.concurrency + 1)
        encrypted = endpoint.root.startswith("https")  # to load the certificates takes 40 ms
        self._client = httpx.AsyncClient(headers=headers, timeout=None, limits=limits, verify=encrypted)
        self._places = asyncio.Semaphore(endpoint.concurrency)

    async def close(self, begun: Collection[Coroutine[Any, Any, Any]]) -> None:
        """Gives up what of ``begun`` is under way. Tasks that httpx made itself are left to it, which ends them."""
        tasks = [task for task in asyncio.all_tasks() if task.get_coro() in begun]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()

    async def ask(self, path: str, body: dict[str, Any] | None, subject: str, retries: int | None = None) -> Any:
        """Returns the server's answer, as JSON: to a GET where there is no ``body``, and else to a POST.

        Args:
            subject: what the request is about, for errors: "document 3".
            retries: the number of times that it is tried again; None is the endpoint's.

        Raises StillroomError where it refused, or the last try failed too.
        """
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        retries = self.endpoint.retries if retries is None else retries
        async with self._places:
            for attempt in range(retries + 1):
                self.endpoint.usage.requests += 1
                self.endpoint.usage.retries += attempt > 0
                try:
                    return await self._try(path, content)
                except RequestFailure as failure:
                    if not failure.again or attempt == retries:
                        raise self._error(failure, path, subject, attempt + 1) from None
                    wait_s = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S) * random.uniform(0.5, 1)
                    await self.endpoint.wait(max(wait_s, failure.wait_s))
        raise AssertionError

    async def _try(self, path: str, content: bytes | None) -> Any:
        import httpx

        method, data = "GET" if content is None else "POST", bytearray()
        try:
            async with (
                asyncio.timeout(self.endpoint.timeout_s),
                self._client.stream(method, self.endpoint.root + path, content=content) as response,
            ):
                async for chunk in response.aiter_bytes():
                    data += chunk
                    if len(data) > MOST_BYTES:
                        what = f"an answer of more than {MOST_BYTES} bytes"
                        raise RequestFailure(what, response.status_code, again=False)
        except TimeoutError:
            raise RequestFailure(f"no answer within {self.endpoint.timeout_s:g} s", again=True) from None
        except httpx.RequestError as error:
            said = self._without_key(str(error))
            raise RequestFailure(f"{type(error).__name__}{f': {said}' if said else ''}", again=True) from None
        status, found = response.status_code, None
        with suppress(ValueError, RecursionError):
            found = parse_json(data)
            if status == 200:
                return found
        if status == 200:
            raise RequestFailure(f"an answer that is not whole JSON ({len(data)} bytes)", status, again=True)
        text: Any = data[:10_000].decode("utf-8", "replace") if found is None else found
        text = text.get("error", text) if isinstance(text, dict) else text
        text = " ".join(str(text.get("message", text) if isinstance(text, dict) else text).split())
        text = text if len(text) <= 300 else text[:299] + "…"
        said = f"{status} {response.reason_phrase}: {self._without_key(text)}"
        wait_s = _asked_wait_s(response.headers.get("Retry-After", ""))
        raise RequestFailure(said, status, again=status in RETRIED, wait_s=wait_s)

    def _without_key(self, text: str) -> str:
        return text if self._key is None else text.replace(self._key, "***")

    def _error(self, failure: RequestFailure, path: str, subject: str, tries: int) -> StillroomError:
        values: dict[str, object] = {"asked": self.endpoint.root + path, "answer": failure.reason}
        if failure.status == 200:
            return DataError(
                f"the server's answer about {subject} cannot be read",
                {**values, "tries": tries},
                why="Half an answer is none, and nothing may be made up in its place.",
                fix="Check what else stands between here and the server, and its log; then go on with --resume.",
            )
        if failure.again:
            return MissingError(
                f"the server gave no answer about {subject}",
                {**values, "tries": tries},
                why="It was tried again with longer and longer waits, and failed each time.",
                fix="Check that it runs, its log and its limits; lower concurrency or raise timeout_s; then --resume.",
            )
        if failure.status in (401, 403):
            return ConfigError(
                "the server does not accept the key",
                {**values, "key": f"from ${self.endpoint.key_variable}" if self._key else "none was sent"},
                why="It answers only those that it knows.",
                fix="Set key_variable to the name of the environment variable that holds the right key.",
            )
        return (MissingError if failure.status == 404 else DataError)(
            f"the server refuses what it was asked about {subject}",
            values,
            why="To ask again would change nothing.",
            fix="See what it says: the address, the model's name, the text or the log-probabilities may not suit it.",
        )


def _asked_wait_s(value: str) -> float:
    """Returns Retry-After, which is seconds or a date, in seconds from now; 0 where there is none that can be read."""
    try:
        if re.fullmatch(r"\s*\d+(\.\d+)?\s*", value):
            wait_s = float(value)
        else:
            date = parsedate_to_datetime(value)
            wait_s = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
    return min(max(wait_s, 0.0), LONGEST_ASKED_WAIT_S)


@contextmanager
def connected(endpoint: Endpoint) -> Iterator[tuple[Connection, Callable[[Coroutine[Any, Any, Any]], "Future[Any]"]]]:
    """Yields a connection, and a function that runs a coroutine on it, in an event loop of a thread of its own.

    So requests go on while the caller works on earlier answers, and Ctrl-C reaches the caller at once. At the end what
    is still under way is given up.
    """
    connection = Connection(endpoint)
    loop = asyncio.new_event_loop()
    thread = Thread(target=loop.run_forever, name="stillroom-http", daemon=True)
    thread.start()
    begun = WeakSet[Coroutine[Any, Any, Any]]()

    def submit(work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        begun.add(work)
        return asyncio.run_coroutine_threadsafe(work, loop)

    try:
        yield connection, submit
    finally:
        if not sys.is_finalizing():  # then the thread is gone already
            asyncio.run_coroutine_threadsafe(connection.close(begun), loop).result()
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()


def in_order(
    endpoint: Endpoint,
    items: Iterable[T],
    work: Callable[[Connection, T], Coroutine[Any, Any, R]],
    first: Callable[[Connection, T], Coroutine[Any, Any, None]],
) -> Iterator[R]:
    """Yields ``work`` of each item, in their order; up to four times the concurrency are taken from ``items``
    in advance.

    Args:
        first: is called before all else, with the first item.
    """
    iterator = iter(items)
    for item in islice(iterator, 1):
        with connected(endpoint) as (connection, submit):
            submit(first(connection, item)).result()
            waiting: deque[Future[R]] = deque([submit(work(connection, item))])
            for later in iterator:
                waiting.append(submit(work(connection, later)))
                if len(waiting) >= 4 * endpoint.concurrency:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
