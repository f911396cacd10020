"""gguf's own reader, but for the arrays of its keys: it makes an object of each token and merge, ten seconds of a core
for a vocabulary of 150,000. Here an array of numbers is one object, and a text is a slice of the file.
"""

from __future__ import annotations

import struct
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType
    from numpy.typing import NDArray

    # its length, its pieces, which of them are values, and its types
    Field = tuple[int, list[NDArray[np.generic]], list[int], list[GGUFValueType]]


def open_gguf(path: Path) -> GGUFReader:
    """A file that ``gguf_scan.scan`` has passed; its tensors and the contents of its fields are those of gguf's."""
    return _reader()(path)


@cache
def _reader() -> type[GGUFReader]:
    """The class, once somebody reads a GGUF."""
    import numpy
    from gguf import GGUFReader, GGUFValueType

    class QuickReader(GGUFReader):  # type: ignore[misc]  # gguf has no types
        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Field:
            if raw_type != GGUFValueType.ARRAY or self.endianess.name != "LITTLE":
                whole: Field = super()._get_field_parts(orig_offs, raw_type)
                return whole
            raw: NDArray[np.uint8] = numpy.asarray(self.data)
            start = orig_offs + 12
            inner, length = struct.unpack("<IQ", raw[orig_offs:start].tobytes())
            kind = GGUFValueType(inner)
            head = [raw[orig_offs : orig_offs + 4].view("<u4"), raw[orig_offs + 4 : start].view("<u8")]
            types = [GGUFValueType.ARRAY, *([kind] if length else [])]
            if kind == GGUFValueType.STRING:
                texts, end = _texts(raw, start, length)
                return end - orig_offs, [*head, *texts], list(range(2, 2 + length)), types
            end = start + length * numpy.dtype(self.gguf_scalar_to_np[kind]).itemsize
            values = raw[start:end].view(self.gguf_scalar_to_np[kind])
            return end - orig_offs, [*head, values], [2] if length else [], types

    return QuickReader


def _texts(raw: NDArray[np.uint8], place: int, count: int) -> tuple[list[NDArray[np.uint8]], int]:
    """The bytes of so many texts, each behind its length, and where they end."""
    buffer, texts = raw.data, []
    for _ in range(count):
        start = place + 8
        place = start + struct.unpack_from("<Q", buffer, place)[0]
        texts.append(raw[start:place])
    return texts, place
