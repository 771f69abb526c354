"""One question over HTTP and its answer, with a bound on the time and on the size of everything.

The other side may be anybody: it may be slow on purpose, send without end, compress a lot of
nothing, or say to ask somebody else.  No redirect is followed, for it could carry the token away.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import ipaddress
import socket
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, Optional
from urllib.parse import urlsplit

from ..layout.location import without_user
from ..reader import HookError, Unreachable
from .access import CA_FILE, CERT_FILE, KEY_FILE
from .certificates import HANG_UPS, advice

if TYPE_CHECKING:
    import ssl

    from .access import Access

CONNECT_TIMEOUT = 3.0  # seconds
_IDLE_AFTER = 30.0  # seconds after which a connection is no longer trusted to be open
_PIECE = 256 * 1024


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]  # by name in lower case
    body: bytes


class _Clock:
    """How long what is under way may still take."""

    def __init__(self) -> None:
        self.deadline = 0.0

    def left(self) -> float:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        return left


class _TimedReader(io.RawIOBase):
    """Each read waits for what is left, so that who sends byte by byte gains nothing."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock
        self._raw = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> Optional[int]:
        self._sock.settimeout(self._clock.left())
        return self._raw.readinto(buffer)

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """As much of a socket as `http.client` uses."""

    def __init__(self, sock: socket.socket, clock: _Clock) -> None:
        self._sock, self._clock = sock, clock

    def sendall(self, data: Any) -> None:
        self._sock.settimeout(self._clock.left())
        self._sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._sock, self._clock), 64 * 1024)

    def shut_down(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int, context: Optional[ssl.SSLContext]) -> None:
        super().__init__(host, port)
        self.clock = _Clock()
        self.used_at = time.monotonic()
        self._context = context

    def connect(self) -> None:
        timeout = min(self.clock.left(), CONNECT_TIMEOUT)
        sock = socket.create_connection((self.host, self.port), timeout)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
        except BaseException:
            sock.close()
            raise
        self.sock: Any = _TimedSocket(sock, self.clock)


class Stop:
    """Ends what waits for the next line of a stream, from another thread."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[_TimedSocket] = set()

    def is_set(self) -> bool:
        return self._event.is_set()

    def wait(self, seconds: float) -> None:
        self._event.wait(seconds)

    def set(self) -> None:
        with self._lock:
            self._event.set()
            for sock in self._sockets:
                sock.shut_down()

    @contextlib.contextmanager
    def ends(self, sock: _TimedSocket) -> Iterator[None]:
        with self._lock:
            self._sockets.add(sock)
            if self._event.is_set():
                sock.shut_down()
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)


class Peer:
    """Who is asked: one host and port.  Safe in several threads; keeps connections open."""

    def __init__(self, url: str, access: Access) -> None:
        """``url``: ``http://`` or ``https://``, host, port, and nothing else.  Raises HookError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            shown = without_user(url)
            why = f" ({error})" if shown == url else ""  # which may tell a part of a password
            raise HookError(f"{shown!r} is no address{why}; give https://HOST:PORT") from None
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username is not None
            or parts.path not in ("", "/")
            or parts.query
            or parts.fragment
            or any(ord(letter) < 33 or ord(letter) > 126 for letter in url)
        ):
            raise HookError(
                f"{without_user(url)!r} is no address of an agent; give https://HOST:PORT and "
                f"nothing else (a token comes from the environment)"
            )
        self.host = parts.hostname
        self.is_encrypted = parts.scheme == "https"
        self.port = port if port is not None else 443 if self.is_encrypted else 80
        host = f"[{self.host}]" if ":" in self.host else self.host
        self.url = f"{parts.scheme}://{host}:{self.port}"
        self._access = access
        self._context = _context(access) if self.is_encrypted else None
        self._idle: list[_Connection] = []
        self._lock = threading.Lock()

    @property
    def is_loopback(self) -> bool:
        """Whether no name server has a say in where that is."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() == "localhost"

    def ask(
        self,
        path: str,
        timeout: float,
        limit: int,
        headers: Optional[Mapping[str, str]] = None,
        body: Optional[bytes] = None,
    ) -> Answer:
        """The answer to GET ``path``, or to POST where there is a ``body``, of ``limit`` bytes.

        Whatever its status is.  Raises Unreachable.
        """
        deadline = time.monotonic() + timeout
        with self._reaching(timeout):
            while True:
                connection, is_new = self._connection(deadline)
                try:
                    response = _send(connection, path, headers or {}, body)
                    try:
                        answer = _read(response, limit)
                    except BaseException:
                        response.close()
                        raise
                except HANG_UPS:
                    connection.close()
                    if is_new:
                        raise
                    # The other side had closed what was kept open, and what a reader asks, etcd's
                    # questions by POST too, changes nothing.
                    continue
                except BaseException:
                    connection.close()
                    raise
                self._give_back(connection, response)
                return answer

    @contextlib.contextmanager
    def stream(
        self,
        path: str,
        timeout: float,
        silence: float,
        headers: Mapping[str, str],
        until: Optional[float],
        stop: Stop,
    ) -> Iterator[tuple[int, Iterator[bytes]]]:
        """Status and lines of an answer that goes on; ``silence``: the longest pause in it.

        ``timeout``: until it begins; ``until``: a time of `time.monotonic` at which it ends, and
        ``stop`` ends it from another thread.
        Raises Unreachable, also while the lines are read.
        """
        connection = _Connection(self.host, self.port, self._context)
        connection.clock.deadline = time.monotonic() + timeout
        try:
            with self._reaching(timeout):
                connection.connect()
            # Now, for `http.client` forgets the socket of an answer that ends with it.
            with stop.ends(connection.sock):
                with self._reaching(timeout):
                    given = {**headers, "Accept-Encoding": "identity"}
                    response = _send(connection, path, given, None)
                # A connection forgets an answer that ends with it, so that is closed by itself.
                with contextlib.closing(response):
                    lines = self._lines(response, connection.clock, silence, until, stop)
                    yield response.status, lines
        finally:
            connection.close()

    def _lines(
        self,
        response: http.client.HTTPResponse,
        clock: _Clock,
        silence: float,
        until: Optional[float],
        stop: Stop,
    ) -> Iterator[bytes]:
        with self._reaching(silence):
            while True:
                longest = time.monotonic() + silence
                clock.deadline = longest if until is None else min(longest, until)
                try:
                    line = response.readline(MAX_LINE + 1)
                except OSError:
                    if not stop.is_set():
                        raise
                    return  # the other side was still writing when this one was shut down
                if not line:
                    return
                if len(line) > MAX_LINE:
                    raise http.client.HTTPException(f"a line is longer than {MAX_LINE} bytes")
                yield line

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half made, or at the interpreter's end
            for connection in self._idle:
                connection.close()

    def _connection(self, deadline: float) -> tuple[_Connection, bool]:
        with self._lock:
            while self._idle:
                found = self._idle.pop()
                if time.monotonic() - found.used_at < _IDLE_AFTER:
                    found.clock.deadline = deadline
                    return found, False
                found.close()
        made = _Connection(self.host, self.port, self._context)
        made.clock.deadline = deadline
        return made, True

    def _give_back(self, connection: _Connection, response: http.client.HTTPResponse) -> None:
        if response.will_close or not response.isclosed():
            response.close()
            connection.close()
            return
        connection.used_at = time.monotonic()
        with self._lock:
            self._idle.append(connection)

    @contextlib.contextmanager
    def _reaching(self, timeout: float) -> Iterator[None]:
        """Every way in which the other side can fail, as Unreachable."""
        try:
            yield
        except TimeoutError as error:
            why = f"no answer within {timeout:g} s"
            raise self.unreachable(why) from error
        except (OSError, http.client.HTTPException, zlib.error, ValueError) as error:
            why = getattr(error, "strerror", None) or str(error) or type(error).__name__
            what = None
            if self.is_encrypted:
                what = advice(error, CA_FILE, f"{CERT_FILE} and {KEY_FILE}")
            raise self.unreachable(why, what) from error

    def unreachable(self, why: str, what_to_do: Optional[str] = None) -> Unreachable:
        what_to_do = what_to_do or "check that it runs and that the address is right"
        return Unreachable(
            f"{self.url} does not answer as it should ({why[:200]}), so nothing is known of what "
            f"it has; {what_to_do}"
        )


MAX_LINE = 4 * 1024**2  # of a stream


def _send(
    connection: _Connection, path: str, headers: Mapping[str, str], body: Optional[bytes]
) -> http.client.HTTPResponse:
    given = {"Accept-Encoding": "gzip", "Accept": "application/json", **headers}
    connection.request("GET" if body is None else "POST", path, body, given)
    return connection.getresponse()


def _read(response: http.client.HTTPResponse, limit: int) -> Answer:
    headers = {name.lower(): value for name, value in response.getheaders()}
    unpack = None
    coding = headers.get("content-encoding", "identity")
    if coding == "gzip":
        unpack = zlib.decompressobj(wbits=31)
    elif coding != "identity":
        raise http.client.HTTPException(f"content encoding {coding[:20]!r}")
    pieces, size = [], 0
    while piece := response.read(_PIECE):
        data = unpack.decompress(piece, limit - size + 1) if unpack else piece
        size += len(data)
        if size > limit:
            raise http.client.HTTPException(f"more than {limit} bytes")
        pieces.append(data)
    if unpack is not None and not unpack.eof and size:
        raise http.client.HTTPException("the answer is cut short")
    return Answer(response.status, headers, b"".join(pieces))


@functools.lru_cache(maxsize=8)
def _context(access: Access) -> ssl.SSLContext:
    """One for all agents: to read the system's certificates takes 20 ms.  Raises HookError."""
    import ssl

    try:
        context = ssl.create_default_context(cafile=access.ca_file)
        if access.cert_file:
            context.load_cert_chain(access.cert_file, access.key_file)
    except (OSError, ssl.SSLError) as error:
        raise HookError(
            f"the certificates in {access.ca_file or access.cert_file} cannot be read ({error}); "
            f"give a PEM file"
        ) from error
    return context
