"""The command `python -m tests.bounds`: memory of whole runs over archives made to hurt it."""

from __future__ import annotations

import argparse
import json
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import soundfile

from jobs.sample_archive import SYNTH_RATE, speak
from tests.flac_bomb import silent_flac

RATE_HZ = 8_000
LINES = (
    ("Good morning, thank you for calling. How can I help you today?", "en-us+victor"),
    ("My internet connection has been down since Monday evening.", "en-us+Mike"),
)


def bomb(folder: Path, hours: float) -> None:
    """A FLAC file of 0.66 MB that unfolds to hours of silence."""
    (folder / "bomb.flac").write_bytes(silent_flac(hours))


def long(folder: Path, hours: float) -> None:
    """One recording: two channels of mu-law at 8 kHz, speech in both, pauses of 2 s."""
    spoken = [_at_8_khz(speak(text, voice)) for text, voice in LINES]
    turns = np.zeros((sum(map(len, spoken)) + 4 * RATE_HZ, 2), np.float32)
    turns[: len(spoken[0]), 0] = spoken[0]
    turns[len(spoken[0]) + 2 * RATE_HZ : -2 * RATE_HZ, 1] = spoken[1]
    turns = np.tile(turns, (20, 1))
    n_samples, written = int(hours * 3600) * RATE_HZ, 0
    with soundfile.SoundFile(folder / "long.wav", "w", RATE_HZ, 2, "ULAW", format="WAV") as file:
        while written < n_samples:
            file.write(turns[: n_samples - written])
            written += len(turns)


def _at_8_khz(samples: np.ndarray) -> np.ndarray:
    seconds = len(samples) / SYNTH_RATE
    at = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return np.interp(at, np.arange(len(samples)) / SYNTH_RATE, samples).astype(np.float32)


def tiny(folder: Path, count: float) -> None:
    """Recordings of 50 ms, no two with the same bytes, all with the same size."""
    head = struct.pack(
        "<4sI4s4sIHHIIHH4sI",
        *(b"RIFF", 36 + 400, b"WAVE", b"fmt ", 16, 7, 1, RATE_HZ, RATE_HZ, 1, 8, b"data", 400),
    )
    for number in range(int(count)):
        if number % 1_000 == 0:
            inner = folder / f"{number // 1_000:04d}"
            inner.mkdir()
        sound = number.to_bytes(4, "little") + b"\xff" * 396
        (inner / f"{number:07d}.wav").write_bytes(head + sound)


ARCHIVES = {"bomb": (bomb, 100), "long": (long, 12), "tiny": (tiny, 200_000)}


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory peaks of whole runs.")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(ARCHIVES)}; all if left out")
    parser.add_argument("--size", type=float, help="hours, or files, instead of the usual")
    parser.add_argument("--workers", type=int, default=1)
    flags = parser.parse_args()
    for name in flags.names or ARCHIVES:
        make, usual = ARCHIVES[name]
        with tempfile.TemporaryDirectory() as work:
            archive, out = Path(work, "archive"), Path(work, "out")
            archive.mkdir()
            make(archive, flags.size or usual)
            show(name, run(archive, out, flags.workers))


def run(archive: Path, out: Path, workers: int) -> dict[str, object]:
    """The report of a whole run with an engine without a model."""
    command = [sys.executable, "-m", "jobs.transcribe", str(archive), str(out)]
    subprocess.run([*command, "--model", "fake", "--workers", str(workers)], check=True)
    (report,) = out.glob("runs/*/report.json")
    return json.loads(report.read_bytes())


def show(name: str, report: dict[str, object]) -> None:
    counts = ", ".join(f"{report[kind]} {kind}" for kind in ("ok", "empty", "failed"))
    hours = report["audio_seconds"] / 3600
    print(f"{name:8}{counts}; {hours:.2f} hours; {report['total_seconds']:.0f} s in all")
    for process, peak in report["peak_bytes"].items():
        print(f"        {process:16}{peak / 1e6:8.0f} MB")


if __name__ == "__main__":
    main()
