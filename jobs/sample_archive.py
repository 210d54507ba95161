"""A sample call-centre archive with exact references, spoken by a speech synthesiser.

Owns: the dialogues, the synthesiser (espeak-ng, driven through its C interface) and the file
formats a real archive mixes. Must not know how recordings are decoded or recognised: what it
writes is judged by the rest of the project, so it shares no code with it but the errors.
"""

from __future__ import annotations

import ctypes
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
import numpy.typing as npt
import soundfile
import torch
import torchaudio

from transcribe.errors import Fatal

Samples = npt.NDArray[np.float32]
Speaker = Literal["agent", "customer"]

SYNTH_RATE = 22050
"""Sample rate of espeak-ng's output, in Hz."""

SPEECH_DBFS = -22.0
LINE_NOISE_DBFS = -55.0
NOISE_RECORDING_DBFS = -30.0
NO_SPEECH_S = 20.0

# Voices and rates were chosen by what Whisper base reads well at 8 kHz, so that the error rate
# of the sample says something about a run and not about the synthesiser.
AGENT_VOICES = ("en-us+victor", "en-us+rob", "en-us+Hugo", "en-us+f5")
CUSTOMER_VOICES = ("en-us+Mike", "en-us+m1", "en-us+edward", "English (Great Britain)+victor")
RATES_WPM = (140, 145, 150)

# Agent and customer take turns, the agent first. Numbers are spelled as spoken.
DIALOGUES: tuple[tuple[str, ...], ...] = (
    (
        "Good morning, thank you for calling customer support. My name is {agent}. "
        "How can I help you today?",
        "Hello. My internet connection has been down since {day} evening, and I work from home.",
        "I am sorry to hear that. Is the light on the front of the router red or green?",
        "It is red. I have already turned it off and on again, but nothing has changed.",
        "Thank you. I can see a problem with the line in your street. "
        "An engineer will be there on {other_day} morning.",
        "That is good news. Thank you very much for your help.",
    ),
    (
        "Welcome to the billing department. You are speaking with {agent}. What can I do for you?",
        "I received my bill this morning, and there is a charge of {amount} dollars "
        "that I do not understand.",
        "Let me look at your account. I see that you made some calls to {country} last month.",
        "Yes, I was on holiday there. I thought those calls were included in my contract.",
        "They are not included, but because you are a good customer, I will take off half "
        "of the charge.",
        "Oh, that is very kind of you. Thank you so much.",
    ),
    (
        "Good afternoon, this is the bank. My name is {agent}. How may I help you?",
        "Hello, I lost my credit card yesterday. I think I left it in a taxi "
        "on the way to the airport.",
        "Do not worry, I will block the card right now. Did you make any payments on {day}?",
        "Yes, I paid {amount} dollars at a restaurant. After that I did not use the card.",
        "Thank you. The card is now blocked, and a new one will be sent to your home address "
        "within five days.",
        "Great. Please send me an email when it is on the way.",
    ),
    (
        "Hello, you have reached online banking. This is {agent} speaking.",
        "Hi. I sent {amount} dollars to my sister on {day}, but the money has not arrived yet.",
        "I understand. Can you tell me which account you used for the payment?",
        "I used my savings account. The money left the account on the same day.",
        "I can see the payment here. It was stopped because the name of the account "
        "was not correct.",
        "I see. Then I will check the name with her and try again tomorrow.",
    ),
    (
        "Thank you for calling the insurance company. My name is {agent}. "
        "Are you calling about a new claim?",
        "Yes. Somebody hit my car in the parking lot of the supermarket on {day}.",
        "I am very sorry. Was anybody hurt, and can you still drive the car?",
        "Nobody was hurt. The car still drives, but the back door does not close any more.",
        "Please take some pictures of the damage and send them to us by email. "
        "You will only have to pay {amount} dollars yourself.",
        "All right. I will send you the pictures this evening.",
    ),
    (
        "Good morning, home insurance, {agent} speaking. What can I do for you?",
        "I would like to know how much it costs to insure a house with a garden and a garage.",
        "Of course. How many people live in the house, and when was it built?",
        "There are four of us, and the house was built about twenty years ago.",
        "Thank you. The price would be {amount} dollars a month, "
        "and that includes damage by fire and water.",
        "That sounds good. Can you send me the offer before {day}?",
    ),
    (
        "Parcel delivery service, good afternoon. This is {agent}. How can I help?",
        "I have been waiting for my package since {day}. It should contain {item}.",
        "Let me check that for you. The driver was at your house yesterday, "
        "but nobody opened the door.",
        "That is strange. I was at home all day, and nobody rang the bell.",
        "I am sorry about that. We can bring it again on {other_day}, between ten and twelve "
        "in the morning.",
        "Yes, please do that. And ask the driver to call me before he comes.",
    ),
    (
        "Thank you for calling our online store. My name is {agent}.",
        "Hello. Last week I ordered {item}, but the color is wrong, and I want to send it back.",
        "No problem at all. You can return it within thirty days. Do you still have the box?",
        "Yes, I still have the box and the paper that came with it.",
        "Very good. We will send you a label by email. You will get your {amount} dollars back "
        "when the package arrives here.",
        "Perfect. I will take it to the post office on {day}.",
    ),
    (
        "Hotel reservations, good evening. You are speaking with {agent}.",
        "Good evening. I booked a double room for {date}, "
        "but I have to change the day of our arrival.",
        "Certainly. What is the new day, and how many nights would you like to stay?",
        "We would arrive two days later and stay for three nights. "
        "We would also like a room with a view of the sea.",
        "We have a very nice room on the fourth floor. It costs {amount} dollars more.",
        "That is fine. Please send the new booking to my email address.",
    ),
    (
        "Thank you for calling the travel agency. My name is {agent}. Where would you like to go?",
        "We want to fly to {country} in the summer, two adults and one child.",
        "Very nice. Would you like to leave during the week or on the weekend?",
        "It would be better to leave on the weekend, because we both have to work.",
        "There is a flight on {date}, early in the morning. "
        "The price is {amount} dollars for each person.",
        "I will talk about it with my wife and call you again on {day}.",
    ),
    (
        "Electricity customer service, this is {agent}. How can I help you?",
        "We are moving to a new apartment on {date}, and I would like to take my contract with me.",
        "Congratulations on the new apartment. Do you know the number on the meter there?",
        "Not yet. We will get the keys on {day}, and then I can take a picture of it.",
        "That is fast enough. Until now you paid {amount} dollars every month, "
        "and that will not change.",
        "Good. Then I will send you the picture next week.",
    ),
    (
        "Technical support, my name is {agent}. What seems to be the problem?",
        "I bought {item} from you in the winter, and since {day} it does not work any more.",
        "I am sorry to hear that. Does anything happen when you press the power button?",
        "No, nothing happens at all. I have also tried a different cable.",
        "Then we should repair it. You have a guarantee of two years, "
        "so you do not have to pay anything.",
        "That is what I was hoping for. How long will the repair take?",
        "Usually about ten days. We will send you a message when it is ready.",
    ),
)

SLOTS: dict[str, tuple[str, ...]] = {
    "agent": ("Anna", "David", "Laura", "Michael", "Peter", "Robert", "Sarah", "Thomas"),
    "day": ("Monday", "Tuesday", "Wednesday"),
    "other_day": ("Thursday", "Friday", "Saturday"),
    "amount": ("twenty", "twenty five", "thirty", "forty five", "sixty", "eighty", "ninety"),
    "country": ("Canada", "Germany", "Italy", "Mexico", "Spain"),
    "date": ("the second of April", "the tenth of May", "the twelfth of June"),
    "item": ("a new telephone", "a coffee machine", "a big television", "a kitchen clock"),
}


@dataclass(frozen=True)
class Turn:
    """One speaker's stretch of a call; times in seconds from the start of the recording."""

    speaker: Speaker
    text: str
    start_s: float
    end_s: float


class Format(NamedTuple):
    """How a recording is stored: what a real archive mixes without telling anybody."""

    suffix: str
    subtype: str  # a libsndfile subtype, or "AAC"
    rate_hz: int
    layout: Literal["stereo", "mono", "dual_mono"]


_MULAW = Format("wav", "ULAW", 8000, "stereo")
_ALAW = Format("wav", "ALAW", 8000, "stereo")

# One entry per call, in the order of their numbers.
CALL_FORMATS: tuple[Format, ...] = (
    _MULAW,
    _ALAW,
    _MULAW,
    Format("flac", "PCM_16", 16000, "mono"),
    _MULAW,
    Format("mp3", "MPEG_LAYER_III", 8000, "stereo"),
    _ALAW,
    _MULAW,
    Format("ogg", "OPUS", 16000, "stereo"),
    _MULAW,
    Format("m4a", "AAC", 44100, "stereo"),
    _ALAW,
    Format("flac", "PCM_16", 44100, "stereo"),
    _MULAW,
    Format("mp3", "MPEG_LAYER_III", 8000, "mono"),
    _MULAW,
    _ALAW,
    Format("ogg", "OPUS", 16000, "mono"),
    _MULAW,
    Format("wav", "PCM_16", 8000, "dual_mono"),
    Format("mp3", "MPEG_LAYER_III", 16000, "mono"),
    _ALAW,
    _MULAW,
    Format("m4a", "AAC", 16000, "mono"),
    Format("flac", "PCM_16", 16000, "mono"),
    Format("flac", "PCM_16", 44100, "stereo"),
)

_CALLS_PER_DAY = 8


def speak(text: str, voice: str, rate_wpm: int = 150) -> Samples:
    """Speak `text` with an espeak-ng voice; not for use from several threads at once.

    The synthesiser carries a little state from one text to the next (the flutter of the pitch),
    so the same text spoken twice differs slightly.

    Args:
        text: what to say, in English.
        voice: an espeak-ng voice name, with a variant if wanted, such as `en-us+f2`.
        rate_wpm: words per minute.

    Returns:
        Mono samples in [-1, 1) at `SYNTH_RATE`, shape (n_samples,).

    Raises:
        Fatal: the synthesiser is not installed, does not start, or has no such voice.
    """
    return _shared_synthesiser().speak(text, voice, rate_wpm)


def make_sample_archive(folder: Path, seed: int = 1) -> Path:
    """Write the sample archive: calls in many formats, and files that hold no usable speech.

    The same seed gives the same samples, whatever was spoken before in this process. Calling it
    again on the same folder replaces the same files.

    The reference holds one JSON line per recording: `uri` (absolute path), `text` (everything
    said, in time order), `channels` (text by channel number), `turns` (`channel`, `start`, `end`
    in seconds, `text`), `kind` (call, silence, noise, truncated, not_audio, empty_file) and
    `expect` (ok, empty, failed): the status its row should have. Of the truncated recording
    it holds the turns before the cut. Dual-mono counts as the single channel it is.

    Args:
        folder: root of the archive; made if absent.
        seed: of every random choice.

    Returns:
        Path of the reference, beside the folder: `<folder name>-reference.jsonl`.

    Raises:
        Fatal: the synthesiser is not usable, or a file cannot be written.
    """
    folder = folder.resolve()
    try:
        rows = _write_calls(folder, seed) + _write_odd_files(folder, seed)
        reference = folder.with_name(f"{folder.name}-reference.jsonl")
        reference.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
        )
    except (OSError, soundfile.LibsndfileError) as error:
        raise Fatal(
            f"cannot write the sample archive under {folder}: {error}; choose another folder"
        ) from error
    return reference


# From espeak-ng's speak_lib.h.
_SYNCHRONOUS = 2
_DONT_EXIT_ON_ERROR = 0x8000
_ESPEAK_RATE = 1
_POSITION_CHARACTER = 1
_CHARS_UTF8 = 1
_SYNTH_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Synthesiser:
    """One private instance of espeak-ng: its state depends on nothing but the calls made here."""

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise Fatal("the speech synthesiser is not installed: pip install '.[demo]'") from error
        try:
            self._library = _load_private_copy(Path(espeakng_loader.get_library_path()))
        except OSError as error:
            raise Fatal(f"the speech synthesiser cannot be loaded: {error}") from error
        data = str(espeakng_loader.get_data_path())
        rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT_ON_ERROR)
        if rate != SYNTH_RATE:
            raise Fatal(
                f"the speech synthesiser does not start with its data in {data} (it allows "
                "paths of about 150 characters): install the package in a shorter path"
            )
        # Breathy voices mix in noise that is otherwise seeded by the clock.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))
        self._chunks: list[npt.NDArray[np.int16]] = []
        # espeak-ng keeps only the pointer, so the callback must live as long as the library.
        self._callback = _SYNTH_CALLBACK(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def speak(self, text: str, voice: str, rate_wpm: int) -> Samples:
        """See the module's `speak`."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise Fatal(f"the speech synthesiser has no voice {voice!r}")
        self._library.espeak_SetParameter(_ESPEAK_RATE, rate_wpm, 0)
        self._chunks.clear()
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(
            encoded, len(encoded), 0, _POSITION_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        self._library.espeak_Synchronize()
        pcm = np.concatenate([np.zeros(0, np.int16), *self._chunks])
        return pcm.astype(np.float32) / np.float32(32768)

    def _collect(
        self, samples: ctypes._Pointer[ctypes.c_short], n_samples: int, _events: int | None
    ) -> int:
        if samples and n_samples > 0:
            # espeak-ng reuses its buffer after this returns.
            self._chunks.append(np.ctypeslib.as_array(samples, shape=(n_samples,)).copy())
        return 0


@functools.cache
def _shared_synthesiser() -> Synthesiser:
    return Synthesiser()


def _load_private_copy(library: Path) -> ctypes.CDLL:
    """Load a copy of a shared library, so that its global state is not shared with other users."""
    with tempfile.TemporaryDirectory(prefix="transcribe-espeak-") as folder:
        return ctypes.CDLL(str(shutil.copy(library, folder)))


def _write_calls(folder: Path, seed: int) -> list[dict[str, Any]]:
    synthesiser = Synthesiser()
    rows = []
    for index, fmt in enumerate(CALL_FORMATS):
        rng = np.random.default_rng([seed, index])
        turns, channels = spoken_call(synthesiser, rng, DIALOGUES[index % len(DIALOGUES)])
        path = _call_path(folder, index, fmt.suffix)
        write_audio(path, as_recorded(channels, fmt, rng), fmt)
        rows.append(_reference_row(path, turns, fmt, "call", "ok"))
    return rows


def spoken_call(
    synthesiser: Synthesiser, rng: np.random.Generator, dialogue: Sequence[str]
) -> tuple[list[Turn], Samples]:
    """Speak a dialogue: its turns, and samples of shape (2, n) at SYNTH_RATE (agent first)."""
    slots = {name: str(rng.choice(values)) for name, values in SLOTS.items()}
    voices = (str(rng.choice(AGENT_VOICES)), str(rng.choice(CUSTOMER_VOICES)))
    rate_wpm = int(rng.choice(RATES_WPM))
    loudness_db = SPEECH_DBFS + rng.uniform(-3, 3, size=2)
    turns: list[Turn] = []
    placed: list[tuple[int, int, Samples]] = []
    position = int(rng.uniform(0.3, 1.5) * SYNTH_RATE)
    for number, line in enumerate(dialogue):
        text, side = line.format(**slots), number % 2
        spoken = _trimmed(synthesiser.speak(text, voices[side], rate_wpm))
        placed.append((side, position, _at_level(spoken, loudness_db[side])))
        end = position + len(spoken)
        speaker: Speaker = "agent" if side == 0 else "customer"
        turns.append(Turn(speaker, text, position / SYNTH_RATE, end / SYNTH_RATE))
        position = end + int(_pause_s(rng) * SYNTH_RATE)
    channels = np.zeros((2, position), np.float32)
    for side, start, spoken in placed:
        channels[side, start : start + len(spoken)] = spoken
    return turns, channels


def _pause_s(rng: np.random.Generator) -> float:
    """Mostly the half second to a second of people in conversation, sometimes a search."""
    return float(rng.uniform(2.0, 4.0) if rng.random() < 0.15 else rng.uniform(0.5, 1.3))


def _trimmed(samples: Samples) -> Samples:
    """Without the silence the synthesiser puts around a text, so that turn times are true."""
    loud = np.flatnonzero(np.abs(samples) > 0.003)
    return samples[loud[0] : loud[-1] + 1] if len(loud) else samples[:0]


def _at_level(samples: Samples, dbfs: float) -> Samples:
    """Scaled to a root mean square of `dbfs`, peaks kept below full scale."""
    rms = float(np.sqrt(np.mean(np.square(samples)))) if len(samples) else 0.0
    if rms == 0.0:
        return samples
    gain = 10 ** (dbfs / 20) / rms
    return samples * np.float32(min(gain, 0.98 / float(np.abs(samples).max())))


def as_recorded(channels: Samples, fmt: Format, rng: np.random.Generator) -> Samples:
    """A call (2, n) at SYNTH_RATE as the recorder heard it: (channels, m) at the format's rate."""
    resampled = torchaudio.functional.resample(torch.from_numpy(channels), SYNTH_RATE, fmt.rate_hz)
    heard: Samples = resampled.numpy()
    if fmt.layout != "stereo":
        heard = heard.sum(axis=0, keepdims=True)
    if fmt.rate_hz == 8000:
        heard = _telephone_band(heard)
    noise = rng.standard_normal(heard.shape, dtype=np.float32)
    heard = heard + noise * np.float32(10 ** (LINE_NOISE_DBFS / 20))
    return np.clip(np.repeat(heard, 2, axis=0) if fmt.layout == "dual_mono" else heard, -1, 1)


def _telephone_band(channels: Samples) -> Samples:
    """What a telephone leaves of 8 kHz audio: about 200 to 3600 Hz, rising 6 dB an octave.

    The rise is a handset's (as in ITU-T P.830's sending response); without it the consonants of
    the synthesiser drown, and recognisers read another text.
    """
    n_samples = channels.shape[1]
    n_fft = 1 << n_samples.bit_length()  # lengths with large prime factors take ten times as long
    frequency = np.fft.rfftfreq(n_fft, 1 / 8000)
    edges = np.clip((frequency - 100) / 100, 0, 1) * np.clip((3800 - frequency) / 200, 0, 1)
    gain = edges * frequency / 1000
    passed = np.fft.irfft(np.fft.rfft(channels, n=n_fft, axis=1) * gain, axis=1)
    return passed[:, :n_samples].astype(np.float32)


def _write_odd_files(folder: Path, seed: int) -> list[dict[str, Any]]:
    """The recordings every real archive has and no demo shows."""
    rng = np.random.default_rng([seed, len(CALL_FORMATS)])
    first = len(CALL_FORMATS)
    mono = _MULAW._replace(layout="mono")
    n_samples = int(NO_SPEECH_S * 8000)

    silent = _call_path(folder, first, "wav")
    write_audio(silent, np.zeros((2, n_samples), np.float32), _MULAW)

    noisy = _call_path(folder, first + 1, "wav")
    write_audio(noisy, _pink_noise(rng, n_samples)[None], mono)

    truncated = _call_path(folder, first + 2, "wav")
    turns_left = _write_truncated(truncated, rng)

    text = _call_path(folder, first + 3, "wav")
    text.write_text("This is a note that somebody saved under the wrong name.\n" * 40)

    empty = _call_path(folder, first + 4, "wav")
    empty.write_bytes(b"")

    return [
        _reference_row(silent, [], _MULAW, "silence", "empty"),
        _reference_row(noisy, [], mono, "noise", "empty"),
        _reference_row(truncated, turns_left, _MULAW, "truncated", "ok"),
        _reference_row(text, [], mono, "not_audio", "failed"),
        _reference_row(empty, [], mono, "empty_file", "failed"),
    ]


def _pink_noise(rng: np.random.Generator, n_samples: int) -> Samples:
    spectrum = np.fft.rfft(rng.standard_normal(n_samples))
    # Power falls with frequency; below 50 Hz it is held, as a telephone passes none of it.
    spectrum /= np.sqrt(np.maximum(np.fft.rfftfreq(n_samples, 1 / 8000), 50.0))
    pink = np.fft.irfft(spectrum, n=n_samples).astype(np.float32)
    return _at_level(pink, NOISE_RECORDING_DBFS)


def _write_truncated(path: Path, rng: np.random.Generator) -> list[Turn]:
    """A call whose upload broke off in the middle, in the pause after a turn.

    The header still promises the whole call. Returns the turns that are left.
    """
    turns, channels = spoken_call(Synthesiser(), rng, DIALOGUES[0])
    left = turns[: len(turns) // 2]
    write_audio(path, as_recorded(channels, _MULAW, rng), _MULAW)
    cut_s = (left[-1].end_s + turns[len(left)].start_s) / 2
    n_header_bytes = path.stat().st_size - 2 * round(channels.shape[1] * 8000 / SYNTH_RATE)
    with path.open("r+b") as file:
        file.truncate(n_header_bytes + 2 * int(cut_s * 8000))
    return left


def write_audio(path: Path, channels: Samples, fmt: Format) -> None:
    """Write samples (channels, n), made by `as_recorded`, as a file of that format."""
    if fmt.subtype == "AAC":
        _write_aac(path, channels, fmt.rate_hz)
    else:
        soundfile.write(path, channels.T, fmt.rate_hz, subtype=fmt.subtype)


def _write_aac(path: Path, channels: Samples, rate_hz: int) -> None:
    layout = "mono" if len(channels) == 1 else "stereo"
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate_hz, layout=layout)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(channels), format="fltp", layout=layout
        )
        frame.sample_rate = rate_hz
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _call_path(folder: Path, index: int, suffix: str) -> Path:
    """Where a call centre's recorder would put call number `index`: a folder per day."""
    path = folder / "2026" / "03" / f"{2 + index // _CALLS_PER_DAY:02d}"
    path.mkdir(parents=True, exist_ok=True)
    return path / f"call-{index + 1:04d}.{suffix}"


def _reference_row(
    path: Path, turns: Sequence[Turn], fmt: Format, kind: str, expect: str
) -> dict[str, Any]:
    channel_of = {"agent": 0, "customer": 1 if fmt.layout == "stereo" else 0}
    n_channels = 2 if fmt.layout == "stereo" else 1
    return {
        "uri": str(path),
        "text": " ".join(turn.text for turn in turns),
        "channels": {
            str(channel): " ".join(t.text for t in turns if channel_of[t.speaker] == channel)
            for channel in range(n_channels)
        },
        "turns": [
            {
                "channel": channel_of[turn.speaker],
                "start": round(turn.start_s, 3),
                "end": round(turn.end_s, 3),
                "text": turn.text,
            }
            for turn in turns
        ],
        "kind": kind,
        "expect": expect,
    }
