"""A proxy in front of a server, of S3 or of Prefect, that fails on purpose, and counts what passes.

It serves one request a connection, passes on the Host header (signatures cover it), and asks its plan before each
request whether to pass it on or to fail, and how.
"""

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from urllib.parse import parse_qs, unquote, urlsplit


class Fault(Enum):
    """A way to fail without an answer of the server."""

    RESET_BEFORE = "the connection is reset before the body is taken"
    RESET_IN_REQUEST = "the connection is reset in the middle of the request's body"
    LOST_ANSWER = "the request is carried out and the connection reset before the answer"
    RESET_IN_ANSWER = "the connection is reset in the middle of the answer"
    TRUNCATED_ANSWER = "the answer ends early, the connection is closed in good order"


@dataclass(frozen=True)
class Refusal:
    """An error answer of S3, given without asking the server."""

    status: int
    code: str


INTERNAL_ERROR = Refusal(500, "InternalError")
SLOW_DOWN = Refusal(503, "SlowDown")
TRANSIENT = (*Fault, INTERNAL_ERROR, SLOW_DOWN)


@dataclass(frozen=True)
class Request:
    """One request as the proxy sees it."""

    method: str
    path: str
    """`/bucket/key`, unquoted."""
    query: dict[str, list[str]]
    headers: dict[str, str]

    @property
    def kind(self) -> str:
        """The operation: LIST, PART for a part of an upload, else the method."""
        if "list-type" in self.query:
            return "LIST"
        return "PART" if "partNumber" in self.query else self.method


@dataclass
class Exchange:
    """One request and what became of it."""

    kind: str
    path: str
    sent: int
    """Bytes of the request's body."""
    received: int = 0
    """Bytes of the answer's body that the client was given."""
    status: int | None = None
    """None when the client got no answer."""


Plan = Callable[[Request], Fault | Refusal | None]


def no_faults(request: Request) -> None:
    """The plan that passes everything on."""


def at_random(share: float, seed: int, faults: Sequence[Fault | Refusal] = TRANSIENT) -> Plan:
    """Fail `share` of the requests, each in one of these ways."""
    rng = random.Random(seed)
    return lambda request: rng.choice(faults) if rng.random() < share else None


def first(count: int, fault: Fault | Refusal, kind: str, path_end: str = "") -> Plan:
    """Fail the first `count` requests of a kind whose path ends so."""
    left = [count]

    def plan(request: Request) -> Fault | Refusal | None:
        if request.kind != kind or not request.path.endswith(path_end) or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return plan


def always(fault: Fault | Refusal, *kinds: str) -> Plan:
    """Fail all requests of these kinds, or all requests."""
    return lambda request: fault if not kinds or request.kind in kinds else None


class FaultProxy:
    """Listens on a free loopback port; `plan`, `latency` and `conditional` may be set at any time."""

    def __init__(self, upstream_port: int) -> None:
        self.plan: Plan = no_faults
        self.latency = 0.0
        """Seconds that every request waits."""
        self.conditional = False
        """Whether to refuse `If-None-Match: *` for an object put through this proxy before, as AWS does."""
        self.exchanges: list[Exchange] = []
        self.most_at_once = 0
        self._upstream_port = upstream_port
        self._at_once = 0
        self._stored: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def url(self) -> str:
        """The endpoint."""
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def forget(self) -> None:
        """Start counting anew."""
        self.exchanges, self.most_at_once = [], 0

    def of(self, kind: str = "", path_part: str = "") -> list[Exchange]:
        """What was exchanged of a kind and with paths that contain a part."""
        return [one for one in self.exchanges if kind in ("", one.kind) and path_part in one.path]

    def start(self) -> None:
        """Serve in a thread of its own."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving and wait for it."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, sock=self._socket, limit=2**26))
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self._exchange(reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._at_once -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        request = _parse(head)
        fault, size = self.plan(request), int(request.headers.get("content-length", 0))
        exchange = Exchange(request.kind, request.path, size)
        self.exchanges.append(exchange)
        await asyncio.sleep(self.latency)
        if fault is Fault.RESET_BEFORE:
            return _reset(writer)
        if request.headers.get("expect", "").lower() == "100-continue":
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if fault is Fault.RESET_IN_REQUEST:
            await reader.readexactly(size // 2)
            return _reset(writer)
        body = await reader.readexactly(size)
        if isinstance(fault, Refusal):
            answer = _refuse(fault, request)
        elif self.conditional and request.headers.get("if-none-match") == "*" and request.path in self._stored:
            answer = _refuse(Refusal(412, "PreconditionFailed"), request, "<Condition>If-None-Match</Condition>")
        else:
            answer = await self._forward(head, body)
        status = int(answer.split(b" ", 2)[1])
        if request.method == "PUT" and status == 200:
            self._stored.add(request.path)
        if fault is Fault.LOST_ANSWER:
            return _reset(writer)
        await _answer(writer, answer, fault, exchange)
        exchange.status = status

    async def _forward(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._upstream_port, limit=2**26)
        try:
            writer.write(_one_request_head(head) + body)
            await writer.drain()
            return await reader.read()
        finally:
            writer.close()


@contextmanager
def in_front_of(upstream_port: int) -> Iterator[FaultProxy]:
    """A running proxy in front of a server on loopback."""
    proxy = FaultProxy(upstream_port)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()


async def _answer(
    writer: asyncio.StreamWriter, answer: bytes, fault: Fault | Refusal | None, exchange: Exchange
) -> None:
    head_size = answer.index(b"\r\n\r\n") + 4
    body_size = len(answer) - head_size
    if fault in (Fault.RESET_IN_ANSWER, Fault.TRUNCATED_ANSWER):
        # An answer without a body is cut in its head.
        answer = answer[: head_size + body_size // 2] if body_size else answer[: head_size // 2]
    writer.write(answer)
    await writer.drain()
    exchange.received = max(0, len(answer) - head_size)
    if fault is Fault.RESET_IN_ANSWER:
        _reset(writer)


def _reset(writer: asyncio.StreamWriter) -> None:
    # With a linger time of 0 the kernel resets the connection and drops what was not sent.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


def _parse(head: bytes) -> Request:
    first_line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    method, target, _ = first_line.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    url = urlsplit(target)
    return Request(method, unquote(url.path), parse_qs(url.query, keep_blank_values=True), headers)


def _one_request_head(head: bytes) -> bytes:
    first_line, *lines = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    kept = [line for line in lines if line.split(b":")[0].lower() not in (b"connection", b"expect")]
    return b"\r\n".join([first_line, *kept, b"Connection: close", b"", b""])


def _refuse(refusal: Refusal, request: Request, more: str = "") -> bytes:
    text = f"<?xml version='1.0'?><Error><Code>{refusal.code}</Code><Message>on purpose</Message>{more}</Error>"
    body = b"" if request.method == "HEAD" else text.encode()
    head = f"HTTP/1.1 {refusal.status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body
