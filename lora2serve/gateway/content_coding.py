"""Answers that a server has compressed although nobody asked it to: what they say must be read, and names put back."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator
from dataclasses import replace

from lora2serve.gateway.request_record import CUT_OFF
from lora2serve.gateway.upstreams import UpstreamAnswer, UpstreamError, header

ENCODING = b"content-encoding"
CODINGS = (b"gzip", b"x-gzip", b"deflate")
EITHER = 32 + zlib.MAX_WBITS  # gzip's header, or zlib's


def decoded(answer: UpstreamAnswer, server: str) -> UpstreamAnswer:
    """The answer without its compression, chunk by chunk; as it is in another coding than gzip and deflate."""
    if header(answer.headers, ENCODING).strip().lower() not in CODINGS:
        return answer
    headers = [item for item in answer.headers if item[0].lower() != ENCODING]
    return replace(answer, headers=headers, chunks=_decompressed(answer.chunks, server))


async def _decompressed(chunks: AsyncIterator[bytes], server: str) -> AsyncIterator[bytes]:
    decompressor = zlib.decompressobj(EITHER)
    try:
        async for chunk in chunks:
            if data := decompressor.decompress(chunk):
                yield data
        rest = decompressor.flush()
    except zlib.error as error:
        raise UpstreamError(CUT_OFF, f"{server}: its answer cannot be decompressed ({error})") from None
    if not decompressor.eof:
        raise UpstreamError(CUT_OFF, f"{server}: its compressed answer ended early")
    if rest:
        yield rest
