"""The recordings of a benchmark, each with what is said in it.

From the user's own archive and reference file, or spoken by the synthesiser in one of four
shapes. The same seed and length give the same archive.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from jobs.sample_archive import (
    CALL_FORMATS,
    DIALOGUES,
    SYNTH_RATE,
    Format,
    Samples,
    Synthesiser,
    Turn,
    as_recorded,
    spoken_call,
    write_audio,
)
from transcribe import storage
from transcribe.archive import estimate_durations, list_archive
from transcribe.errors import Fatal
from transcribe.references import match, read_references

Shape = Literal["calls", "clips", "long", "codecs"]

_TELEPHONE = Format("wav", "ULAW", 8000, "mono")
_CLEAN = Format("flac", "PCM_16", 16000, "mono")
_LONGEST_CALL_S = 600.0
_LONG_FORM_S = 660.0


@dataclass(frozen=True, slots=True)
class Clip:
    """One recording.

    Attributes:
        path: a local file.
        duration_s: seconds, as its header tells.
        reference: what is said; None if it is not known.
        language: of the reference; None if unknown.
    """

    path: str
    duration_s: float
    reference: str | None
    language: str | None


def given_archive(archive: str, reference: str | None, minutes: float | None) -> list[Clip]:
    """The recordings of `archive`, no more than `minutes` of them.

    Args:
        archive: as for `transcribe run`, on this machine.
        reference: file of references as for `transcribe score`; only recordings that it names
            are taken. None takes all, and no error rate is reckoned.
        minutes: most audio minutes; recordings spread evenly over the archive are taken. None
            takes everything.

    Raises:
        Fatal: there is no archive, it is not local, or no reference names a recording of it.
    """
    found = [r for r in estimate_durations(list_archive(storage.absolute(archive))) if r.size_bytes]
    if any(storage.is_remote(r.uri) for r in found):
        raise Fatal(f"{archive}: peers read local files only; copy a sample of it to a disk.")
    clips = {r.uri: Clip(r.uri, r.duration_s, None, None) for r in found}
    if reference is not None:
        clips = _with_references(clips, reference)
    chosen = list(clips.values())
    total_s = sum(clip.duration_s for clip in chosen)
    if minutes is not None and total_s > 60 * minutes:
        chosen = subset(chosen, 60 * minutes)
    if not chosen:
        raise Fatal(f"{archive} has no recordings to measure.")
    return chosen


def _with_references(clips: dict[str, Clip], file: str) -> dict[str, Clip]:
    references = {r.uri: r for r in read_references(file) if r.text is not None}
    matched = match(references, clips)
    if not matched:
        raise Fatal(f"no reference in {file} names a recording of the archive.")
    return {
        uri: Clip(uri, clips[uri].duration_s, references[name].text, references[name].language)
        for name, uri in sorted(matched.items())
    }


def subset(clips: Sequence[Clip], seconds: float) -> list[Clip]:
    """About `seconds` of audio, spread evenly over clips sorted by length; one clip at least."""
    total_s = sum(clip.duration_s for clip in clips)
    if total_s <= seconds:
        return list(clips)
    ordered = sorted(clips, key=lambda clip: (clip.duration_s, clip.path))
    chosen: list[Clip] = []
    wanted = 0.0
    for clip in ordered:
        wanted += clip.duration_s * seconds / total_s
        if sum(c.duration_s for c in chosen) + clip.duration_s / 2 <= wanted:
            chosen.append(clip)
    return chosen or ordered[:1]


def middling(clips: Sequence[Clip], n: int) -> list[Clip]:
    """`n` clips about the median length: alike, so that no process waits for another."""
    ordered = sorted(clips, key=lambda clip: (clip.duration_s, clip.path))
    first = max(0, (len(ordered) - n) // 2)
    return ordered[first : first + n]


def shares(clips: Sequence[Clip], n: int) -> list[list[Clip]]:
    """Clips shared out to `n` processes, the longest first to whom has least."""
    parts: list[list[Clip]] = [[] for _ in range(n)]
    for clip in sorted(clips, key=lambda clip: -clip.duration_s):
        min(parts, key=lambda part: sum(c.duration_s for c in part)).append(clip)
    return parts


# ---- spoken by the synthesiser ----------------------------------------------------------


def spoken_archive(folder: Path, shape: Shape, minutes: float, seed: int = 1) -> list[Clip]:
    """Speak an archive of about `minutes`, unless it lies there from an earlier time.

    Args:
        folder: where to; beside the recordings lies `reference.jsonl`.
        shape: `calls` 5 to 600 s with many pauses, half of them over the telephone; `clips` 1 to
            10 s; `long` more than 10 minutes each; `codecs` two-channel and one-channel calls in
            the formats of the sample archive.
        minutes: audio to speak.
        seed: of every random choice.

    Raises:
        Fatal: the synthesiser is not installed, or the files cannot be written.
    """
    made = f"{shape}, {minutes:g} minutes, seed {seed}"
    index = folder / "reference.jsonl"
    if index.is_file():
        first, *rows = index.read_text(encoding="utf-8").splitlines()
        if json.loads(first) == {"made": made}:
            return [Clip(**json.loads(row)) for row in rows]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("rec-*"):  # of another shape
            left.unlink()
        clips = list(_speak(folder, shape, 60 * minutes, seed))
        lines = [{"made": made}, *(_as_row(clip) for clip in clips)]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        index.write_text(text, encoding="utf-8")
    except OSError as error:
        raise Fatal(
            f"cannot write an archive to {folder} ({error}); choose another --out."
        ) from None
    return clips


def _as_row(clip: Clip) -> dict[str, object]:
    return {name: getattr(clip, name) for name in clip.__slots__}


def _speak(folder: Path, shape: Shape, seconds: float, seed: int) -> Iterator[Clip]:
    synthesiser = Synthesiser()
    spoken_s, index = 0.0, 0
    while spoken_s < seconds:
        rng = np.random.default_rng([seed, index])
        turns, channels = _recording(synthesiser, rng, shape, index, seconds)
        fmt = CALL_FORMATS[index % len(CALL_FORMATS)]
        if shape != "codecs":
            fmt = _TELEPHONE if index % 2 else _CLEAN
        path = folder / f"rec-{index:04d}.{fmt.suffix}"
        write_audio(path, as_recorded(channels, fmt, rng), fmt)
        duration_s = channels.shape[1] / SYNTH_RATE
        yield Clip(str(path.resolve()), duration_s, " ".join(t.text for t in turns), "en")
        spoken_s += duration_s
        index += 1


def _recording(
    synthesiser: Synthesiser, rng: np.random.Generator, shape: Shape, index: int, seconds: float
) -> tuple[list[Turn], Samples]:
    """Turns and samples (2, n) of one recording."""
    if shape == "clips":
        dialogue = DIALOGUES[index % len(DIALOGUES)]
        line = int(rng.integers(len(dialogue)))
        return spoken_call(synthesiser, rng, dialogue[line : line + 1])
    if shape == "long":
        return _several(synthesiser, rng, _LONG_FORM_S)
    if shape == "codecs":
        return spoken_call(synthesiser, rng, DIALOGUES[index % len(DIALOGUES)])
    # Real calls are mostly short, some very long: log-uniform, but none most of the archive.
    longest = max(30.0, min(_LONGEST_CALL_S, seconds / 4))
    return _several(synthesiser, rng, float(np.exp(rng.uniform(np.log(5.0), np.log(longest)))))


def _several(
    synthesiser: Synthesiser, rng: np.random.Generator, seconds: float
) -> tuple[list[Turn], Samples]:
    """Turn after turn until there are `seconds`, with a pause of many seconds now and then."""
    turns: list[Turn] = []
    parts: list[Samples] = []
    spoken_s = 0.0
    for line in _lines(rng):
        more, samples = spoken_call(synthesiser, rng, (line,))
        turns += more
        parts.append(samples)
        spoken_s += samples.shape[1] / SYNTH_RATE
        if rng.random() < 0.15:
            on_hold = np.zeros((2, int(rng.uniform(3.0, 12.0) * SYNTH_RATE)), np.float32)
            parts.append(on_hold)
            spoken_s += on_hold.shape[1] / SYNTH_RATE
        if spoken_s >= seconds:
            break
    return turns, np.concatenate(parts, axis=1)


def _lines(rng: np.random.Generator) -> Iterable[str]:
    while True:
        yield from DIALOGUES[int(rng.integers(len(DIALOGUES)))]
