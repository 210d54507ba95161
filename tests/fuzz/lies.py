"""Files that are well formed but for what they claim: sizes, rates, channels, nesting."""

from __future__ import annotations

import math
import random
import struct
from collections.abc import Callable

import numpy as np

_SIZES = (0, 1, 2, 7, 0x7FFFFFFF, 0x80000000, 0xFFFFFFF0, 0xFFFFFFFF)
_RATES = (
    0,
    1,
    999,
    1000,
    7999,
    8000,
    11_025,
    44_101,
    768_000,
    768_001,
    2**31 - 1,
    2**31,
    2**32 - 1,
)
_COUNTS = (0, 1, 2, 3, 32, 33, 255, 256, 1024, 65_535)
_TAGS = (0, 1, 2, 3, 6, 7, 0x10, 0x11, 0x20, 0x31, 0x45, 0x50, 0x55, 0x64, 0x160, 0x161, 0x1FC,
         0x2000, 0x674F, 0xA106, 0xF1AC, 0xFFFE, 0xFFFF)  # fmt: skip


def wav(rng: random.Random) -> bytes:
    """A WAV of noise, every field of which may lie; half of them do."""

    def lie(true: int, lies: tuple[int, ...]) -> int:
        return rng.choice(lies) if rng.random() < 0.3 else true

    order = rng.choice("<<<>")
    tag, n_channels = lie(1, _TAGS), lie(rng.choice((1, 2)), _COUNTS)
    rate, bits = lie(8000, _RATES), lie(16, (0, 1, 3, 4, 8, 12, 24, 32, 64, 65_535))
    block = lie(n_channels * bits // 8 & 0xFFFF, (0, 1, 3, 4, 33, 65, 256, 65_535))
    extra = rng.randbytes(rng.choice((0, 2, 4, 22, 34, 500)))
    fmt = struct.pack(
        order + "HHIIHHH", tag, n_channels, rate, rate * block & 0xFFFFFFFF, block, bits, len(extra)
    )
    sound = rng.randbytes(rng.choice((0, 1, 3, 100, 20_000)))
    riff = {"<": b"RIFF", ">": b"RIFX"}[order]
    chunks = [_chunk(b"fmt ", fmt + extra, order, lie(len(fmt + extra), _SIZES))]
    chunks += [_metadata(rng, order) for _ in range(rng.choice((0, 0, 1, 3)))]
    chunks.append(_chunk(b"data", sound, order, lie(len(sound), _SIZES)))
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    body = b"WAVE" + b"".join(chunks)
    return riff + struct.pack(order + "I", lie(len(body), _SIZES)) + body


def _chunk(name: bytes, body: bytes, order: str = "<", size: int | None = None) -> bytes:
    return name + struct.pack(order + "I", len(body) if size is None else size) + body


def _metadata(rng: random.Random, order: str) -> bytes:
    kind = rng.randrange(8)
    if kind == 0:  # lists in lists
        body = b"INFO"
        for _ in range(rng.choice((1, 50, 2000))):
            body = b"INFO" + _chunk(b"LIST", body, order)
        return _chunk(b"LIST", body, order)
    if kind == 1:  # thousands of empty chunks
        return _chunk(rng.choice((b"junk", b"data", b"LIST", b"fact")), b"", order) * 3000
    if kind == 2:
        return _chunk(b"id3 ", id3(rng), order)
    if kind == 3:
        return _chunk(b"cue ", struct.pack(order + "I", rng.choice(_SIZES)) + bytes(48), order)
    if kind == 4:
        return _chunk(b"smpl", bytes(28) + struct.pack(order + "II", *[rng.choice(_SIZES)] * 2))
    if kind == 5:
        return _chunk(b"bext", rng.randbytes(rng.choice((0, 602, 70_000))), order)
    if kind == 6:
        return _chunk(b"fact", struct.pack(order + "I", rng.choice(_SIZES)), order)
    return _chunk(rng.randbytes(4), rng.randbytes(50), order, rng.choice(_SIZES))


def float_wav(rng: random.Random) -> bytes:
    """NaN, infinity, denormals and numbers far beyond full scale."""
    kind, width = rng.choice(((np.float32, 4), (np.float64, 8)))
    values = np.array(
        rng.choices((0.0, 0.5, math.nan, math.inf, -math.inf, 1e38, -1e38, 1e-42), k=4000), kind
    )
    rate = rng.choice((8000, 16_000, 44_100))
    fmt = struct.pack("<HHIIHH", 3, 1, rate, rate * width, width, 8 * width)
    body = b"WAVE" + _chunk(b"fmt ", fmt) + _chunk(b"data", values.tobytes())
    return _chunk(b"RIFF", body)


def rf64(rng: random.Random) -> bytes:
    """Sizes of 64 bits."""
    sizes = [
        rng.choice((0, 1, 40_000, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1)) for _ in range(3)
    ]
    ds64 = _chunk(b"ds64", struct.pack("<QQQI", *sizes, rng.choice(_SIZES)))
    fmt = _chunk(b"fmt ", struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16))
    sound = _chunk(b"data", rng.randbytes(40_000), size=0xFFFFFFFF)
    return b"RF64\xff\xff\xff\xffWAVE" + ds64 + fmt + sound


def aiff(rng: random.Random) -> bytes:
    """A sample rate of 80 bits: infinite, not a number, negative, denormal."""
    rate = rng.choice(
        (
            bytes(10),
            b"\x7f\xff" + b"\xff" * 8,
            b"\x7f\xff\x80" + bytes(7),
            b"\xc0\x0c\xfa" + bytes(7),
            b"\x40\x0c\xfa" + bytes(7),
            b"\x00\x01" + b"\xff" * 8,
            b"\x40\x3e" + b"\xff" * 8,
        )
    )
    n_frames, bits = rng.choice((*_SIZES, 8000)), rng.choice((0, 1, 8, 16, 16, 24, 32, 33, 65_535))
    common = struct.pack(">HIH", rng.choice(_COUNTS), n_frames, bits) + rate
    sound = struct.pack(">II", rng.choice((0, 0, *_SIZES)), 0) + rng.randbytes(16_000)
    body = b"AIFF" + _chunk(b"COMM", common, ">")
    body += _chunk(b"SSND", sound, ">", rng.choice((len(sound), *_SIZES)))
    return _chunk(b"FORM", body, ">", rng.choice((len(body), *_SIZES)))


def au(rng: random.Random) -> bytes:
    """Offsets and encodings of all kinds."""
    offset, size = rng.choice((24, 24, *_SIZES)), rng.choice((8000, *_SIZES))
    encoding = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 23, 24, 25, 26, 27, 255, 2**32 - 1))
    fields = offset, size, encoding, rng.choice(_RATES), rng.choice(_COUNTS)
    return b".snd" + struct.pack(">5I", *fields) + rng.randbytes(8000)


def sph(rng: random.Random) -> bytes:
    """A SPHERE header whose numbers are words, negative or endless."""

    def number() -> str:
        return rng.choice(("1", "8000", "2", "16000", "-1", "0", "9" * 40, "nan", "", "2147483648"))

    names = ("sample_rate", "channel_count", "sample_n_bytes", "sample_count", "sample_sig_bits")
    lines = [f"{name} -i {number()}" for name in names]
    coding = rng.choice(("pcm", "ulaw", "alaw", "pcm,embedded-shorten-v2.00", "x" * 5000))
    lines += [f"sample_coding -s{len(coding)} {coding}", "sample_byte_format -s2 01"]
    rng.shuffle(lines)
    size = rng.choice(("   1024", "  99999", "      0", "     -1", "abcdefg"))
    head = f"NIST_1A\n{size}\n" + "\n".join(lines) + "\nend_head\n"
    return head.encode().ljust(1024, b" ") + rng.randbytes(8000)


def id3(rng: random.Random) -> bytes:
    """A tag of many megabytes, or one that says so; pictures and frames that lie of their size."""
    frames = b""
    for _ in range(rng.choice((0, 1, 5, 2000))):
        name = rng.choice(
            (b"APIC", b"TIT2", b"CHAP", b"COMM", b"GEOB", b"PRIV", b"TXXX", b"\0\0\0\0")
        )
        body = rng.randbytes(rng.choice((0, 1, 10, 100)))
        size = rng.choice((len(body), len(body), *_SIZES))
        frames += name + struct.pack(">IH", size, rng.choice((0, 0x0080, 0x000F))) + body
    frames += bytes(rng.choice((0, 0, 1_000_000)))
    size = rng.choice((len(frames), len(frames), 0, 2**28 - 1))
    synchsafe = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    return b"ID3" + bytes((rng.choice((2, 3, 4, 255)), 0, rng.choice((0, 0x80, 0x40)))) + (
        synchsafe + frames
    )  # fmt: skip


def mp3(rng: random.Random) -> bytes:
    """Tags, one inside another, before frames of nothing, some of free bit rate."""
    head = rng.choice(
        (b"\xff\xfb\x90\x00", b"\xff\xfb\x00\x00", b"\xff\xf3\x40\xc0", b"\xff\xe3\x18\xc4")
    )
    xing = rng.choice((b"Xing", b"Info", b"VBRI")) + struct.pack(
        ">III", 0xF, rng.choice(_SIZES), rng.choice(_SIZES)
    )
    frames = (head + rng.choice((bytes(32), bytes(17))) + xing).ljust(417, b"\0")
    frames += (head + rng.randbytes(413)) * rng.choice((0, 1, 40))
    return id3(rng) * rng.choice((0, 1, 1, 3)) + frames + rng.choice((b"", b"TAG" + bytes(125)))


def flac(rng: random.Random) -> bytes:
    """A header that claims any length, and metadata blocks of any size, before a few frames."""
    total, rate = (
        rng.choice((0, 1, 16_000, 2**36 - 1)),
        rng.choice((0, 1, 16_000, 655_350, 2**20 - 1)),
    )
    packed = rate << 44 | rng.choice((0, 1, 7)) << 41 | rng.choice((3, 7, 15, 31)) << 36 | total
    info = struct.pack(">HH", *[rng.choice((0, 15, 16, 4096, 65_535))] * 2) + bytes(6)
    info += struct.pack(">Q", packed) + bytes(16)
    blocks = [(0, info)]
    for _ in range(rng.choice((0, 1, 4, 1000))):
        kind = rng.choice((1, 2, 3, 4, 5, 6, 126, 127))
        body = rng.randbytes(rng.choice((0, 4, 40, 400)))
        if kind == 4:  # comments beyond count
            body = struct.pack("<II", rng.choice(_SIZES), rng.choice(_SIZES)) + body
        if kind == 6:  # a picture
            body = struct.pack(">II", 3, rng.choice(_SIZES)) + body
        blocks.append((kind, body))
    data = b"fLaC"
    for i, (kind, body) in enumerate(blocks):
        size = rng.choice((*[len(body)] * 12, 0, 2**24 - 1)) if i else len(body)
        last = 0x80 if i == len(blocks) - 1 else 0
        data += bytes((kind | last,)) + struct.pack(">I", size)[1:] + body
    return data + rng.choice((b"", b"\xff\xf8\x69\x08\x00" + rng.randbytes(3000)))


def _atom(name: bytes, body: bytes, size: int | None = None) -> bytes:
    return struct.pack(">I", 8 + len(body) if size is None else size) + name + body


def m4a(rng: random.Random) -> bytes:
    """Atoms of absurd sizes, counts and depth."""

    def size_of(body: bytes) -> int:
        return rng.choice((*[8 + len(body)] * 8, *_SIZES))

    def count() -> int:
        return rng.choice((0, 1, 1, 1, *_SIZES))

    def atom(name: bytes, body: bytes) -> bytes:
        return _atom(name, body, size_of(body))

    entry = atom(b"mp4a", bytes(6) + b"\0\1" + bytes(8) + struct.pack(">HHIHH", 2, 16, 0, 8000, 0))
    tables = atom(b"stsd", struct.pack(">II", 0, 1) + entry)
    tables += atom(b"stts", struct.pack(">IIII", 0, count(), count(), count()))
    tables += atom(b"stsc", struct.pack(">IIIII", 0, count(), count(), count(), 1))
    tables += atom(b"stsz", struct.pack(">IIII", 0, count(), count(), count()))
    tables += atom(b"stco", struct.pack(">III", 0, count(), count()))
    header = struct.pack(">IIIIII", 0, 0, 0, rng.choice(_RATES), rng.choice(_SIZES), 0)
    handler = atom(b"hdlr", bytes(8) + b"soun" + bytes(13))
    media = atom(b"mdhd", header) + handler + atom(b"minf", atom(b"stbl", tables))
    moov = atom(b"mvhd", header + bytes(76)) + atom(b"trak", atom(b"mdia", media))
    for _ in range(rng.choice((0, 0, 0, 1, 20, 3000))):
        moov = _atom(rng.choice((b"moov", b"udta", b"meta", b"trak")), moov)
    front = _atom(b"ftyp", b"M4A \0\0\0\0isomM4A ")
    return front + _atom(b"moov", moov) + atom(b"mdat", rng.randbytes(3000))


def mkv(rng: random.Random) -> bytes:
    """Elements in elements, of sizes that run past the end or are unknown."""

    def size(n: int) -> bytes:
        lies = (b"\x01" + b"\xff" * 7, b"\x01" + b"\xff" * 6 + b"\xfe", b"\x80", b"\xff", b"\x00")
        return rng.choice((*[(1 << 56 | n).to_bytes(8, "big")] * 8, *lies))

    def element(name: str, body: bytes) -> bytes:
        return bytes.fromhex(name) + size(len(body)) + body

    audio = element(
        "b5", struct.pack(">d", rng.choice((8000.0, 0.0, -1.0, 1e300, math.nan, math.inf)))
    )
    audio += element("9f", bytes((rng.choice((0, 1, 2, 33, 255)),)))
    codec = rng.choice((b"A_OPUS", b"A_PCM/INT/LIT", b"A_VORBIS", b"A_AAC", b"A_FLAC", b"A_MS/ACM"))
    track = element("d7", b"\1") + element("83", b"\2") + element("86", codec)
    track += element("63a2", rng.randbytes(rng.choice((0, 19, 500)))) + element("e1", audio)
    body = element("1654ae6b", element("ae", track))
    for _ in range(rng.choice((0, 0, 1, 500))):
        body += element("1254c367", element("7373", body[:40]))
    block = element("a3", b"\x81\0\0\x80" + rng.randbytes(300))
    body += element("1f43b675", element("e7", b"\0") + block * rng.choice((0, 1, 30)))
    head = element("1a45dfa3", element("4282", b"webm"))
    return head + element("18538067", body)


def amr(rng: random.Random) -> bytes:
    """Frames of every type, the reserved ones too."""
    head = rng.choice((b"#!AMR\n", b"#!AMR-WB\n", b"#!AMR_MC1.0\n\0\0\0\2"))
    return head + b"".join(bytes((rng.randrange(256),)) + rng.randbytes(31) for _ in range(100))


def caf(rng: random.Random) -> bytes:
    """A description and a packet table that lie."""
    rate = rng.choice((8000.0, 0.0, -8000.0, 1e300, math.nan, math.inf, 16_000.5))
    kind = rng.choice((b"lpcm", b"alac", b"ulaw", b"aac ", b"ima4", b"opus"))
    numbers = [rng.choice((0, 1, 2, 16, 4096, *_SIZES)) for _ in range(5)]
    described = struct.pack(">d4s6I", rate, kind, rng.choice((0, 1, 2)), *numbers)
    table = struct.pack(">qqII", *[rng.choice((-1, 0, 100, 2**63 - 1)) for _ in range(2)], 0, 0)
    parts = (
        (b"desc", described),
        (b"pakt", table + rng.randbytes(50)),
        (b"data", rng.randbytes(9000)),
    )
    data = b"caff\0\1\0\0"
    for name, body in parts:
        size = rng.choice((*[len(body)] * 6, -1, 0, 2**63 - 1, -(2**63)))
        data += name + struct.pack(">q", size) + body
    return data


LIES: dict[str, Callable[[random.Random], bytes]] = {
    "wav": wav,
    "wav-fields": wav,
    "wav-float": float_wav,
    "wav-rf64": rf64,
    "aiff": aiff,
    "au": au,
    "sph": sph,
    "mp3": mp3,
    "flac": flac,
    "m4a": m4a,
    "mkv": mkv,
    "amr": amr,
    "caf": caf,
}
