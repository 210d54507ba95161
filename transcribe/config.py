"""The settings of a run: frozen, validated once at the edge, passed everywhere.

Owns which settings exist, what they may be, and which of them change the result
(`fingerprint`). Knows nothing of storage, audio or Ray.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from transcribe.errors import Fatal
from transcribe.headerless import Headerless, parse_headerless
from transcribe.languages import LANGUAGES

ChannelMode = Literal["auto", "split", "mix"]
Device = Literal["auto", "cpu", "cuda"]
Task = Literal["transcribe", "translate"]
EngineName = Literal[
    "whisper-int8", "whisper-ctranslate2", "whisper-transformers", "ctc-transformers"
]

EMBEDDED_MODEL = "whisper-base"


@dataclass(frozen=True, slots=True)
class RunConfig:
    """Everything the user decides about one run.

    Attributes:
        archive: directory, prefix, glob, single file or manifest of recordings.
        out: where transcripts and reports go.
        model: embedded model name, hub id, directory or `gs://` prefix of weights.
        engine: what runs the model; None lets its own config decide.
        language_model: KenLM n-gram for CTC decoding; None decodes greedily.
        task: Whisper can also translate into English.
        words: whether every word gets its own times and probability.
        language: ISO code of all speech, or None to detect it per recording.
        channels: `split` keeps every channel apart, `mix` averages them, `auto` splits
            unless the channels carry the same signal.
        speakers: role names of the channels, in channel order.
        headerless: what files without a header hold, as `encoding:rate:channels`; None goes by
            their extension, where that tells.
        device: where recognition runs.
        workers: engine actors; None takes what the machine or cluster has.
        shard_minutes: audio minutes in a shard; None lets the planner choose.
        max_failed: largest share of failed recordings (0 to 1) of a successful run.
        wait_for_workers_s: seconds to wait for a cluster to offer a first worker.
        max_workers: engines at most, however many there is room for; None sets no bound.
        price_per_hour: US dollars per hour of a machine; None asks the price catalogue.
        machine_type: catalogue's name of machines that do not say what they are.
        max_spend: US dollars after which the run stops; None for no limit.
        max_hours: hours after which it stops; None for no limit.
    """

    archive: str
    out: str
    model: str = EMBEDDED_MODEL
    engine: EngineName | None = None
    language_model: str | None = None
    task: Task = "transcribe"
    words: bool = False
    language: str | None = None
    channels: ChannelMode = "auto"
    speakers: tuple[str, ...] = ()
    headerless: str | None = None
    device: Device = "auto"
    workers: int | None = None
    shard_minutes: float | None = None
    max_failed: float = 0.05
    wait_for_workers_s: float = 600.0
    max_workers: int | None = None
    price_per_hour: float | None = None
    machine_type: str | None = None
    max_spend: float | None = None
    max_hours: float | None = None

    def __post_init__(self) -> None:
        """Reject what cannot work, naming the flag.

        Raises:
            Fatal: a value is out of range.
        """
        for name, value in (("ARCHIVE", self.archive), ("OUT", self.out)):
            if not value.strip():  # an unset shell variable must not mean the current folder
                raise Fatal(f"{name} is empty; give a directory or a prefix such as gs://bucket/x.")
        if self.language is not None and self.language not in LANGUAGES:
            raise Fatal(
                f"--language {self.language!r} is not a Whisper language code;"
                " use a code such as en, de or es, or leave it out to detect it."
            )
        if self.channels not in get_args(ChannelMode):
            raise Fatal(f"--channels must be auto, split or mix, not {self.channels!r}.")
        if self.engine is not None and self.engine not in get_args(EngineName):
            raise Fatal(f"--engine must be one of {', '.join(get_args(EngineName))}.")
        if self.task not in get_args(Task):
            raise Fatal(f"--task must be transcribe or translate, not {self.task!r}.")
        if self.device not in get_args(Device):
            raise Fatal(f"--device must be auto, cpu or cuda, not {self.device!r}.")
        if self.workers is not None and self.workers < 1:
            raise Fatal(f"--workers must be at least 1, not {self.workers}.")
        if self.shard_minutes is not None and not 0 < self.shard_minutes <= 24 * 60:
            raise Fatal(
                f"--shard-minutes must be above 0 and at most 1440, not {self.shard_minutes}."
            )
        if not 0 <= self.max_failed <= 1:
            raise Fatal(f"--max-failed is a share from 0 to 1, not {self.max_failed}.")
        if not self.wait_for_workers_s >= 0:
            raise Fatal(f"--wait-for-workers must be 0 or more, not {self.wait_for_workers_s}.")
        if self.max_workers is not None and self.max_workers < 1:
            raise Fatal(f"--max-workers must be at least 1, not {self.max_workers}.")
        for name in ("price_per_hour", "max_spend", "max_hours"):
            amount = getattr(self, name)
            if amount is not None and not 0 < amount < float("inf"):
                raise Fatal(f"--{name.replace('_', '-')} must be above 0, not {amount}.")
        if self.headerless is not None:
            parse_headerless(self.headerless)
        if any(not name.strip() for name in self.speakers):
            raise Fatal("--speakers has an empty name; write it like --speakers agent,customer.")

    @property
    def headerless_format(self) -> Headerless | None:
        """`headerless`, read."""
        return parse_headerless(self.headerless) if self.headerless is not None else None

    def as_dict(self) -> dict[str, Any]:
        """All settings as plain JSON values."""
        return {**asdict(self), "speakers": list(self.speakers)}


def cpu_engines(cpus: float) -> int:
    """Engines on a cluster's CPUs by default: 7 on 8, for decoding takes an eighth or so."""
    return max(1, int(cpus * 7 / 8))


def result_settings(config: RunConfig, model_revision: str, engine: str) -> dict[str, Any]:
    """The settings that change what is written into a transcript.

    Speed settings (device, workers, shard size) are left out on purpose: a run may be
    finished on other hardware than it was begun on. So is the model's name: its revision is a
    hash of its content, and the same weights may lie elsewhere tomorrow.
    """
    return {
        "format": 2,
        "model_revision": model_revision,
        "engine": engine,
        "task": config.task,
        "words": config.words,
        "language": config.language,
        "channels": config.channels,
        "speakers": list(config.speakers),
        "headerless": config.headerless,
    }


def fingerprint(settings: dict[str, Any]) -> str:
    """16 hex digits that are equal exactly when `settings` are (SHA-256 of sorted JSON)."""
    canonical = json.dumps(settings, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
