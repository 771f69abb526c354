"""Answers over HTTP: entity tags, compression, ranges of bytes.

A file's content is sent as it is read, piece by piece; nothing large is in memory as a whole.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Optional

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

JSON = "application/json"

_PIECE = 256 * 1024
_WORTH_COMPRESSING = 1024
_LEVEL = 5

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})\Z")


def failure(status: int, error: str, **headers: str) -> Response:
    return JSONResponse({"error": error}, status, headers)


def answer(request: Request, body: bytes, etag: str, media_type: str = JSON) -> Response:
    """A body that is in memory."""
    if is_known(request, etag):
        return _not_modified(etag)
    compressed = len(body) >= _WORTH_COMPRESSING and takes_gzip(request)
    if compressed:
        body = gzip.compress(body, _LEVEL, mtime=0)
    return Response(body, media_type=media_type, headers=_headers(etag, compressed))


def file_answer(
    request: Request, descriptor: int, size: int, etag: str, media_type: str = JSON
) -> Response:
    """The first ``size`` bytes of an open file, or the part asked for; closes it at the end."""
    if is_known(request, etag):
        os.close(descriptor)
        return _not_modified(etag)
    asked = _asked_range(request, size, etag)
    if asked is not None and not asked.is_possible:
        os.close(descriptor)
        return failure(
            416,
            f"this has {size} bytes",
            **{"content-range": f"bytes */{size}", "etag": f'"{etag}"'},
        )
    if asked is not None:
        headers = {
            **_headers(etag, compressed=False),
            "content-range": f"bytes {asked.first}-{asked.end - 1}/{size}",
            "content-length": str(asked.end - asked.first),
        }
        return _FileResponse(descriptor, asked.first, asked.end, 206, headers, media_type)
    compressed = takes_gzip(request)
    headers = {**_headers(etag, compressed), "accept-ranges": "bytes"}
    if not compressed:
        headers["content-length"] = str(size)
    return _FileResponse(descriptor, 0, size, 200, headers, media_type, compressed)


def is_known(request: Request, etag: str) -> bool:
    """Whether the client has this already (If-None-Match)."""
    given = request.headers.get("if-none-match")
    if given is None:
        return False
    known = {one.strip().removeprefix("W/").strip('"') for one in given.split(",")}
    return "*" in known or etag in known


def takes_gzip(request: Request) -> bool:
    """
    >>> from starlette.datastructures import Headers
    >>> from types import SimpleNamespace as Request
    >>> [takes_gzip(Request(headers=Headers({"accept-encoding": text})))
    ...  for text in ("gzip, br", "br", "gzip;q=0", "*")]
    [True, False, False, False]
    """
    for one in request.headers.get("accept-encoding", "").lower().split(","):
        name, _, quality = one.partition(";")
        if name.strip() == "gzip":
            return quality.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000")
    return False


def _headers(etag: str, compressed: bool) -> dict[str, str]:
    # Compressed it is not byte for byte the same, so its tag is a weak one.
    headers = {"etag": f'W/"{etag}"' if compressed else f'"{etag}"', "vary": "Accept-Encoding"}
    if compressed:
        headers["content-encoding"] = "gzip"
    return headers


def _not_modified(etag: str) -> Response:
    return Response(status_code=304, headers={"etag": f'"{etag}"', "vary": "Accept-Encoding"})


class _Range(NamedTuple):
    first: int
    end: int  # one past the last byte

    @property
    def is_possible(self) -> bool:
        return self.first < self.end


def _asked_range(request: Request, size: int, etag: str) -> Optional[_Range]:
    """The one part asked for; None for all, which is also the answer to several parts."""
    found = _RANGE.match(request.headers.get("range", ""))
    if found is None or not (found[1] or found[2]) or request.method == "HEAD":
        return None
    condition = request.headers.get("if-range")
    if condition is not None and condition.strip() != f'"{etag}"':
        return None
    if not found[1]:  # the last so many
        return _Range(max(size - int(found[2]), 0), size if int(found[2]) else 0)
    first = int(found[1])
    if found[2] and int(found[2]) < first:
        return None  # no valid range, so there is none
    return _Range(first, min(int(found[2]) + 1, size) if found[2] else size)


class _FileResponse(StreamingResponse):
    """Closes its descriptor whatever happens to the client."""

    def __init__(
        self,
        descriptor: int,
        first: int,
        end: int,
        status: int,
        headers: dict[str, str],
        media_type: str,
        compressed: bool = False,
    ) -> None:
        self._descriptor = descriptor
        pieces = _pieces(descriptor, first, end)
        content = _compressed(pieces) if compressed else pieces
        super().__init__(content, status, headers, media_type)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            if scope["method"] == "HEAD":
                await Response(status_code=self.status_code, headers=dict(self.headers))(
                    scope, receive, send
                )
            else:
                await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


async def _pieces(descriptor: int, at: int, end: int) -> AsyncIterator[bytes]:
    while at < end:
        piece = await anyio.to_thread.run_sync(os.pread, descriptor, min(_PIECE, end - at), at)
        if not piece:
            # Cut short by somebody: too few bytes for the length that was told, so that the
            # connection is closed and nobody takes them for all.
            raise OSError("a layout became shorter while it was sent")
        at += len(piece)
        yield piece


async def _compressed(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    packer = zlib.compressobj(_LEVEL, zlib.DEFLATED, 16 + zlib.MAX_WBITS)
    async for piece in pieces:
        packed = await anyio.to_thread.run_sync(packer.compress, piece)
        if packed:
            yield packed
    yield packer.flush()
