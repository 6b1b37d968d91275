"""Batches: whether the record batches of an Arrow file are as they lie there, told by its headers alone.

Arrow allocates whatever a compressed buffer says that it will become, so a file of a few bytes could ask for terabytes.
A shard is never compressed. The headers are FlatBuffers, whose tables are those of Arrow's File.fbs and Message.fbs.
"""

import struct
from typing import Any

END = b"ARROW1"

DICTIONARIES, RECORD_BATCHES = 2, 3
"""Fields of the footer."""

BLOCK = "<qi4xq"
"""Where a message is: offset, size of its header with the 8 bytes before it, size of its body."""

VERSION, KIND, HEADER = 0, 1, 2
"""Fields of a message."""

V5, RECORD_BATCH = 4, 3
"""The version since which a record batch itself says whether it is compressed, and the kind of such a message."""

COMPRESSION = 3
"""The field of a record batch that is there only where it is compressed."""


def check_uncompressed(source: Any, size: int) -> None:
    """Returns where no record batch of an Arrow file, of so many bytes, is compressed.

    Raises:
        ValueError: one is; or the headers are not those of such a file.
    """
    (length,) = _unpack("<i", _read_message(source, size, size - len(END) - 4, 4), 0)
    footer = _read_message(source, size, size - len(END) - 4 - length, length)
    root = _followed(footer, 0)
    if _vector(footer, root, DICTIONARIES)[1]:
        raise ValueError("it holds dictionaries, which no column has")
    start, count = _vector(footer, root, RECORD_BATCHES)
    for i in range(count):
        offset, length, _ = _unpack(BLOCK, footer, start + i * struct.calcsize(BLOCK))
        _check_message(_read_message(source, size, offset, length))


def _check_message(data: bytes) -> None:
    """Of the header of one message, with the 8 bytes before it."""
    if data[:4] != b"\xff\xff\xff\xff":
        raise ValueError("a message does not begin as one")
    data = data[8:]
    root = _followed(data, 0)
    version, kind, header = (_field(data, root, number) for number in (VERSION, KIND, HEADER))
    if not (version and kind and header):
        raise ValueError("a message is not a record batch")
    if (*_unpack("<h", data, version), *_unpack("<B", data, kind)) != (V5, RECORD_BATCH):
        raise ValueError("a message is not a record batch of Arrow's format 1.0")
    if _field(data, _followed(data, header), COMPRESSION):
        raise ValueError("a body is compressed, and could ask for any amount of memory")


def _read_message(source: Any, size: int, start: int, length: int) -> bytes:
    if not 0 <= start <= start + length <= size:
        raise ValueError("a header lies outside the file")
    source.seek(start)
    return source.read(length)


def _unpack(kind: str, data: bytes, place: int) -> tuple[int, ...]:
    if not 0 <= place <= len(data) - struct.calcsize(kind):
        raise ValueError("a header is cut off")
    return struct.unpack_from(kind, data, place)


def _followed(data: bytes, place: int) -> int:
    """Where the table or vector lies that the offset at ``place`` leads to."""
    return place + _unpack("<I", data, place)[0]


def _field(data: bytes, table: int, number: int) -> int:
    """Where a field of a table lies; 0 where the table lacks it."""
    names = table - _unpack("<i", data, table)[0]
    if 4 + 2 * number >= _unpack("<H", data, names)[0]:
        return 0
    offset = _unpack("<H", data, names + 4 + 2 * number)[0]
    return table + offset if offset else 0


def _vector(data: bytes, table: int, number: int) -> tuple[int, int]:
    """Where the items of a vector begin, and how many there are."""
    place = _field(data, table, number)
    if not place:
        return 0, 0
    start = _followed(data, place)
    return start + 4, _unpack("<I", data, start)[0]
