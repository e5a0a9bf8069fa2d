"""TensorBoard's event files, written with the standard library.

A file is a sequence of TFRecords (length, its masked CRC-32C, data, its masked CRC-32C); the data of each is an
``Event`` protocol buffer. Both formats are fixed: record_writer.h, event.proto and summary.proto of TensorFlow. Only
what TensorBoard needs for scalars and text is encoded.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types
_STRING = 7  # tensorflow.DataType.DT_STRING
_SESSION_START = 1  # tensorflow.SessionLog.START


def _crc_table() -> Iterator[int]:
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)  # Castagnoli's polynomial, reflected
        yield value


_CRC_TABLE = tuple(_crc_table())


def crc32c(data: bytes) -> int:
    """CRC-32C (RFC 3720)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """``data`` as a TFRecord."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def version() -> bytes:
    """First event of every file."""
    return _event(0.0, 0, _bytes(3, b"brain.Event:2"))


def session_start(at: float, step: int) -> bytes:
    """Tells TensorBoard that a run starts again: it forgets what earlier files have from ``step`` on."""
    return _event(at, step, _bytes(7, _varint(1, _SESSION_START)))


def scalars(at: float, step: int, values: Mapping[str, float]) -> bytes:
    """An event with one scalar per name."""
    summary = b"".join(
        _bytes(1, _bytes(1, name.encode()) + _key(2, _FIXED32) + struct.pack("<f", value))
        for name, value in values.items()
    )
    return _event(at, step, _bytes(5, summary))


def text(at: float, step: int, name: str, content: str) -> bytes:
    """An event with a text (Markdown)."""
    # TensorProto: dtype, tensor_shape of a scalar, string_val; SummaryMetadata: plugin_data.plugin_name.
    tensor = _varint(1, _STRING) + _bytes(2, b"") + _bytes(8, content.encode())
    metadata = _bytes(1, _bytes(1, b"text"))
    value = _bytes(1, f"{name}/text_summary".encode()) + _bytes(8, tensor) + _bytes(9, metadata)
    return _event(at, step, _bytes(5, _bytes(1, value)))


def _event(at: float, step: int, what: bytes) -> bytes:
    return record(_key(1, _FIXED64) + struct.pack("<d", at) + _varint(2, step) + what)


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF)


def _key(number: int, wire_type: int) -> bytes:
    return bytes([number << 3 | wire_type])  # all numbers here are below 16


def _varint(number: int, value: int) -> bytes:
    return _key(number, _VARINT) + _digits(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _key(number, _BYTES) + _digits(len(value)) + value


def _digits(value: int) -> bytes:
    digits = bytearray()
    while value > 0x7F:
        digits.append(value & 0x7F | 0x80)
        value >>= 7
    digits.append(value)
    return bytes(digits)
