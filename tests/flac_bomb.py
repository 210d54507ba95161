"""FLAC files of silence, frame by frame: 14 bytes for up to 65,535 samples (RFC 9639)."""

from __future__ import annotations


def _table(width: int, polynomial: int) -> list[int]:
    table = []
    for byte in range(256):
        crc = byte << (width - 8)
        for _ in range(8):
            crc = (crc << 1) ^ (polynomial if crc >> (width - 1) else 0)
            crc &= (1 << width) - 1
        table.append(crc)
    return table


_CRC8, _CRC16 = _table(8, 0x07), _table(16, 0x8005)


def silent_flac(
    hours: float, sample_rate: int = 16_000, claimed_samples: int | None = None
) -> bytes:
    """A FLAC file of one channel of digital silence; its header claims what it is told to."""
    block = 65_535
    n_frames = round(hours * 3600 * sample_rate / block)
    claimed = n_frames * block if claimed_samples is None else claimed_samples
    shape = sample_rate << 44 | 0 << 41 | 15 << 36 | claimed
    info = block.to_bytes(2) * 2 + bytes(6) + shape.to_bytes(8) + bytes(16)
    frames = [b"fLaC", b"\x80", len(info).to_bytes(3), info]
    for number in range(n_frames):
        head = b"\xff\xf8\x70\x08" + chr(number).encode("utf-8", "surrogatepass")
        head += (block - 1).to_bytes(2)
        crc = 0
        for byte in head:
            crc = _CRC8[crc ^ byte]
        frame = head + bytes([crc, 0, 0, 0])  # one constant subframe, whose sample is 0
        crc = 0
        for byte in frame:
            crc = (crc << 8 & 0xFFFF) ^ _CRC16[crc >> 8 ^ byte]
        frames += [frame, crc.to_bytes(2)]
    return b"".join(frames)
