"""Ogg pages (RFC 3533), as far as breaking the rest needs it."""

from __future__ import annotations

import struct


def mend_pages(data: bytearray, serial: int | None = None) -> None:
    """Give all pages their right checksum, and a serial number: libogg drops the others."""
    at = data.find(b"OggS")
    while at >= 0 and at + 27 <= len(data):
        n_segments = data[at + 26]
        size = 27 + n_segments + sum(data[at + 27 : at + 27 + n_segments])
        if serial is not None:
            struct.pack_into("<I", data, at + 14, serial)
        page = data[at : at + size]
        page[22:26] = bytes(4)
        struct.pack_into("<I", data, at + 22, _ogg_checksum(page))
        at = data.find(b"OggS", at + 4)


def _ogg_checksum(page: bytes) -> int:
    """CRC-32 of RFC 3533: polynomial 0x04c11db7, not reflected, from 0."""
    crc = 0
    for byte in page:
        crc = crc << 8 & 0xFFFFFFFF ^ _CRC_TABLE[crc >> 24 ^ byte]
    return crc


def _crc_entry(value: int) -> int:
    value <<= 24
    for _ in range(8):
        value = (value << 1 ^ 0x04C11DB7 if value >> 31 else value << 1) & 0xFFFFFFFF
    return value


_CRC_TABLE = tuple(_crc_entry(i) for i in range(256))
