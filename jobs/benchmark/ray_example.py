"""The way Ray's documentation shows audio: files as rows, whisper as a batch function.

Written anew, and mended where it would lose text: files longer than 30 s are cut into pieces of
30 s, of which the example would keep the first. No speech detection, batches in file order.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import ray
import ray.data

from jobs.benchmark.peers import read_audio
from jobs.benchmark.worker import Answer, Setup, Transcriber

_PIECE = 30 * 16_000
_BATCH = 8


def _pieces(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A file's audio, cut; the last piece is filled up so that all have one shape."""
    audio = read_audio(row["file"])
    for part, start in enumerate(range(0, max(1, len(audio)), _PIECE)):
        piece = audio[start : start + _PIECE]
        filled = np.zeros(_PIECE, np.float32)
        filled[: len(piece)] = piece
        yield {"file": row["file"], "part": part, "audio": filled}


class _Whisper:
    """The model, loaded once an actor."""

    def __init__(self, setup: Setup, threads: int) -> None:
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        torch.set_num_threads(threads)
        self._setup = setup
        dtype = torch.float32 if setup.device == "cpu" else torch.bfloat16
        self._processor: Any = WhisperProcessor.from_pretrained(setup.weights)
        model: Any = WhisperForConditionalGeneration.from_pretrained(setup.weights, dtype=dtype)
        self._model = model.to(setup.device)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        began = np.full(len(batch["file"]), time.time())
        made = self._processor(list(batch["audio"]), sampling_rate=16_000, return_tensors="pt")
        features = made.input_features.to(self._model.device, self._model.dtype)
        told = {"language": self._setup.language} if self._setup.language else {}
        ids = self._model.generate(features, num_beams=1, task="transcribe", **told)
        texts = self._processor.batch_decode(ids, skip_special_tokens=True)
        return {
            "file": batch["file"],
            "part": batch["part"],
            "text": np.array(texts),
            "began": began,
        }


def load(setup: Setup) -> Transcriber:
    """A Ray of its own, started here; actors are loaded anew for every list of files."""
    workers = setup.threads
    # More CPUs than there are, as our own job does: actors would leave none for reading.
    ray.init(
        address="local", num_cpus=2 * workers + 1, include_dashboard=False, log_to_driver=False
    )
    ray.data.DataContext.get_current().enable_progress_bars = False

    def transcribe(files: Sequence[str]) -> Answer:
        pieces = (
            ray.data.from_items([{"file": file} for file in files])
            .flat_map(_pieces)
            .map_batches(
                _Whisper,
                fn_constructor_kwargs={"setup": setup, "threads": 1},
                batch_size=_BATCH,
                num_cpus=1,
                num_gpus=1 if setup.device == "cuda" else None,
                compute=ray.data.ActorPoolStrategy(size=workers),
            )
        )
        parts: dict[str, list[tuple[int, str]]] = defaultdict(list)
        began = math.inf
        for row in pieces.iter_rows():
            parts[row["file"]].append((row["part"], row["text"].strip()))
            began = min(began, row["began"])
        texts: list[str | None] = [" ".join(text for _, text in sorted(parts[f])) for f in files]
        return Answer(texts, seconds=time.time() - began)  # its models are loaded by then

    return transcribe
