"""`python -m jobs.gpu_benchmark`: the engines on a GPU, beside transformers and CTranslate2.

True architectures with random weights, so that nothing has to be fetched: speed does not hang on
what is said, as long as every contender writes the same number of tokens for each window. That
number is fixed and stands in the output. Texts mean nothing here; that they are right is for the
tests and for `transcribe bench` with real weights.

Contenders take turns (A B C, A B C), each warmed up before. What breaks down is left out, and why
is told. `--tiny --device cpu` tries the whole path in seconds.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import soundfile
import torch
import typer

from transcribe.decode import SAMPLE_RATE, decode
from transcribe.engines.base import EngineInput, EngineWork
from transcribe.engines.ctc import CTC
from transcribe.engines.log_mel import LogMel
from transcribe.engines.whisper import FULL_SAMPLES
from transcribe.engines.whisper_decoding import SlotDecoder, Vocabulary
from transcribe.engines.whisper_torch import Ahead, Encoder, Heard, output_of, slots_for
from transcribe.environment import environment
from transcribe.models import Model
from transcribe.speech import FrameJudge
from transcribe.voice_activity import SpeechDetector

Samples = npt.NDArray[np.int16]
Hear = Callable[[Sequence[Samples]], int]  # windows -> tokens written; 0 where none are chosen

WINDOW_S = 30.0
_BATCH = 64  # of the other contenders, which take fixed batches
_CTC_BATCH = 16
_PROMPT = (50258, 50259, 50360)  # start, English, transcribe

# As published with the checkpoints (config.json).
WHISPER = {
    "large-v3-turbo": {
        "layers": 32,
        "decoder_layers": 4,
        "d_model": 1280,
        "heads": 20,
        "mels": 128,
    },
    "large-v3": {"layers": 32, "decoder_layers": 32, "d_model": 1280, "heads": 20, "mels": 128},
}
_TINY_WHISPER = {"layers": 2, "decoder_layers": 2, "d_model": 64, "heads": 2, "mels": 128}
GOALS = {"large-v3-turbo": 2500, "large-v3": 1500, "wav2vec2-base": 12000}  # RTFx on one H100
# Of large-v3: 50,257 words and pieces, specials, 100 languages, 1,501 timestamps.
_VOCABULARY_SIZE = 51866
_VOCABULARY = Vocabulary(
    start=50258,
    end=50257,
    first_timestamp=50365,
    no_speech=50363,
    suppressed=tuple(range(50258, 50365)),
    languages=tuple(range(50259, 50359)),
)
_TINY_WAV2VEC2 = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "conv_dim": (32,) * 7,
}


@dataclass(frozen=True, slots=True)
class Options:
    """What is measured.

    Attributes:
        windows: of 30 s in each round.
        tokens: written for each window of a Whisper.
        rounds: of each contender.
    """

    device: str
    tiny: bool
    windows: int
    tokens: int
    rounds: int


@dataclass(slots=True)
class Contender:
    """Somebody who hears windows, and how long it took."""

    name: str
    hear: Hear | None
    not_run: str | None = None
    seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    device: Device = field(default_factory=lambda: Device())


@dataclass(slots=True)
class Device:
    """What nvidia-smi said of the GPU while somebody was at work; empty without one."""

    busy_percent: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)

    @contextmanager
    def watched(self, is_cuda: bool) -> Iterator[None]:
        """Look five times a second."""
        if not is_cuda:
            yield
            return
        query = "--query-gpu=utilization.gpu,memory.used"
        command = ["nvidia-smi", "-i", "0", query, "--format=csv,noheader,nounits", "-lms", "200"]
        try:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        except OSError:
            yield
            return
        reader = threading.Thread(target=self._read, args=(child,), daemon=True)
        reader.start()
        try:
            yield
        finally:
            child.terminate()
            child.wait()
            reader.join(timeout=5)

    def _read(self, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            parts = line.split(",")
            if len(parts) == 2 and all(part.strip().isdigit() for part in parts):
                self.busy_percent.append(float(parts[0]))
                self.memory_mib.append(float(parts[1]))


# ---- contenders ---------------------------------------------------------------------------


def whisper_model(shape: dict[str, int], device: str) -> Any:
    """A Whisper of true shape with random weights; bfloat16 on a GPU."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    torch.manual_seed(0)
    width = shape["d_model"]
    config = WhisperConfig(
        vocab_size=_VOCABULARY_SIZE,
        num_mel_bins=shape["mels"],
        d_model=width,
        encoder_layers=shape["layers"],
        decoder_layers=shape["decoder_layers"],
        encoder_attention_heads=shape["heads"],
        decoder_attention_heads=shape["heads"],
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with torch.device(device):
        model: Any = WhisperForConditionalGeneration(config)
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


def our_whisper(model: Any, options: Options) -> Hear:
    """The engine's encoder and slots, windows through both as in a job."""
    is_cuda = options.device == "cuda"
    encoder = Encoder(model, options.device, EngineWork())
    decoder = SlotDecoder(
        model,
        _VOCABULARY,
        slots_for(model),
        steps_per_look=4 if is_cuda else 1,
        looks_behind=int(is_cuda),
        max_new_tokens=options.tokens,
        ignore_end=True,
    )

    def hear(windows: Sequence[Samples]) -> int:
        heard = [Heard(samples, FULL_SAMPLES) for samples in windows]
        feed = Ahead(heard, encoder)
        written = decoder.write(feed, lambda i: output_of(heard[i]), [_PROMPT] * len(heard))
        encoder.count()
        return sum(len(one.ids) for one in written)

    return hear


def transformers_whisper(model: Any, options: Options) -> Hear:
    """transformers' own search over batches, greedy, the same weights."""
    from transformers import GenerationConfig, GenerationMixin

    features = LogMel(model.config.num_mel_bins, options.device)
    told = GenerationConfig(
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        do_sample=False,
        eos_token_id=_VOCABULARY.end,
        pad_token_id=_VOCABULARY.end,
        decoder_start_token_id=_VOCABULARY.start,
    )  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def hear(windows: Sequence[Samples]) -> int:
        n_tokens = 0
        for begin in range(0, len(windows), _BATCH):
            batch = windows[begin : begin + _BATCH]
            prompt = torch.tensor([_PROMPT] * len(batch), device=options.device)
            made: Any = GenerationMixin.generate(
                model,
                features(batch, FULL_SAMPLES).to(model.dtype),
                decoder_input_ids=prompt,
                generation_config=told,
            )
            n_tokens += made[:, len(_PROMPT) :].cpu().numel()
        return n_tokens

    return hear


def ctranslate2_whisper(model: Any, options: Options, folder: Path) -> Hear:
    """CTranslate2 at float16 (float32 on a CPU), the same weights converted."""
    import ctranslate2

    is_cuda = options.device == "cuda"
    _write_ctranslate2(model, folder)
    loaded = ctranslate2.models.Whisper(
        str(folder), device=options.device, compute_type="float16" if is_cuda else "float32"
    )
    features = LogMel(model.config.num_mel_bins, options.device)

    def hear(windows: Sequence[Samples]) -> int:
        n_tokens = 0
        for begin in range(0, len(windows), _BATCH):
            batch = windows[begin : begin + _BATCH]
            mel = np.ascontiguousarray(features(batch, FULL_SAMPLES).cpu().numpy())
            found = loaded.generate(
                ctranslate2.StorageView.from_array(mel),
                [list(_PROMPT)] * len(batch),
                beam_size=1,
                max_length=2 * options.tokens,  # it writes half of it at most
                suppress_tokens=[_VOCABULARY.end],
            )
            n_tokens += sum(len(one.sequences_ids[0]) for one in found)
        return n_tokens

    return hear


def _write_ctranslate2(model: Any, folder: Path) -> None:
    from ctranslate2.converters.transformers import WhisperLoader

    spec = WhisperLoader().get_model_spec(copy.deepcopy(model).float().cpu())
    spec.register_vocabulary(_words())
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = []
    spec.config.alignment_heads = [(0, 0)]
    spec.config.lang_ids = list(_VOCABULARY.languages)
    spec.validate()
    spec.optimize(quantization="float16")
    folder.mkdir(parents=True)
    spec.save(str(folder))


def _words() -> list[str]:
    """Words that mean nothing, and the special tokens where large-v3 has them."""
    pieces = [f"w{i}" for i in range(_VOCABULARY.end)]
    languages = [f"<|l{i}|>" for i in range(len(_VOCABULARY.languages))]
    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    times = [f"<|{i * 0.02:.2f}|>" for i in range(_VOCABULARY_SIZE - _VOCABULARY.first_timestamp)]
    special = ["<|endoftext|>", "<|startoftranscript|>", *languages, *(f"<|{t}|>" for t in tasks)]
    return [*pieces, *special, *times]


def write_wav2vec2(folder: Path, tiny: bool) -> Model:
    """A checkpoint of wav2vec2-base-960h's architecture with random weights."""
    from transformers import (
        Wav2Vec2Config,
        Wav2Vec2CTCTokenizer,
        Wav2Vec2FeatureExtractor,
        Wav2Vec2ForCTC,
    )

    torch.manual_seed(0)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ"]
    folder.mkdir(parents=True)
    vocabulary = folder / "vocab.json"
    vocabulary.write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    parts: list[Any] = [Wav2Vec2CTCTokenizer, Wav2Vec2FeatureExtractor]
    parts[0](str(vocabulary)).save_pretrained(folder)
    parts[1](return_attention_mask=False).save_pretrained(folder)
    shape: dict[str, Any] = _TINY_WAV2VEC2 if tiny else {}  # the defaults are the base's
    config = Wav2Vec2Config(vocab_size=len(letters), pad_token_id=0, **shape)
    Wav2Vec2ForCTC(config).save_pretrained(folder)
    return Model("wav2vec2-base", folder, "0" * 16, "ctc-transformers")


def our_ctc(engine: CTC) -> Hear:
    """The engine as a job uses it."""

    def hear(windows: Sequence[Samples]) -> int:
        engine.recognise([EngineInput(samples, i) for i, samples in enumerate(windows)])
        return 0

    return hear


def transformers_ctc(model: Model, options: Options) -> Hear:
    """transformers as its documentation has it: extractor, forward, argmax; the same precision."""
    from transformers import AutoFeatureExtractor, AutoModelForCTC

    loader: Any = AutoFeatureExtractor
    extractor = loader.from_pretrained(str(model.path), local_files_only=True)
    dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
    loaded: Any = AutoModelForCTC.from_pretrained(
        str(model.path), use_safetensors=True, local_files_only=True, dtype=dtype
    )
    loaded = loaded.to(options.device).eval()

    @torch.inference_mode()
    def hear(windows: Sequence[Samples]) -> int:
        for begin in range(0, len(windows), _CTC_BATCH):
            batch = [w.astype(np.float32) / 32768 for w in windows[begin : begin + _CTC_BATCH]]
            made = extractor(batch, sampling_rate=SAMPLE_RATE, return_tensors="pt")
            values = made["input_values"].to(options.device, dtype)
            loaded(values).logits.argmax(dim=-1).cpu()
        return 0

    return hear


# ---- measuring ----------------------------------------------------------------------------


def measure(contenders: Sequence[Contender], windows: Sequence[Samples], options: Options) -> None:
    """Warm up, then each once a round."""
    is_cuda = options.device == "cuda"
    for number in range(options.rounds + 1):
        for contender in contenders:
            if contender.hear is None:
                continue
            try:
                with contender.device.watched(is_cuda and number > 0):
                    started = time.perf_counter()
                    tokens = contender.hear(windows)
                    if is_cuda:
                        torch.cuda.synchronize()
                    spent = time.perf_counter() - started
            except Exception as error:  # whatever a contender's library raises
                contender.hear, contender.not_run = None, _reason(error)
                continue
            if number > 0:
                contender.seconds.append(spent)
                contender.tokens = tokens


def from_flac(hear: Hear, windows: Sequence[Samples], options: Options, folder: Path) -> float:
    """RTFx from files: read, decoded and searched for speech by processes beside the engine.

    One warm-up, then the median of the rounds. What the search for speech finds is left aside:
    every window of noise is heard.
    """
    files = []
    for i, samples in enumerate(windows):
        files.append(folder / f"{i:04}.flac")
        soundfile.write(files[-1], samples, SAMPLE_RATE)
    n_processes = max(1, torch.multiprocessing.cpu_count() - 1) if not options.tiny else 1
    at_once = max(1, len(windows) // 4)
    seconds = []
    spawn = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, mp_context=spawn) as pool:
        for _ in range(options.rounds + 1):
            started, ready = time.perf_counter(), []
            for samples in pool.map(_decoded, files, chunksize=4):
                ready.append(samples)
                if len(ready) == at_once:
                    hear(ready)
                    ready = []
            if ready:
                hear(ready)
            seconds.append(time.perf_counter() - started)
    return len(windows) * WINDOW_S / statistics.median(seconds[1:])


def _decoded(file: Path) -> Samples:
    """In a process of its own: what a decode task does with a file."""
    torch.set_num_threads(1)
    samples: Samples = decode(file.read_bytes(), file.name).samples[0]
    judge = FrameJudge(_detector())
    judge.push(samples)
    judge.finish()
    return samples


@functools.cache
def _detector() -> SpeechDetector:
    """One a process, as in a decode task."""
    return SpeechDetector()


def _row(contender: Contender, n_windows: int) -> dict[str, Any]:
    if not contender.seconds:
        return {"name": contender.name, "not_run": contender.not_run}
    rtfx = sorted(n_windows * WINDOW_S / spent for spent in contender.seconds)
    busy, memory = contender.device.busy_percent, contender.device.memory_mib
    return {
        "name": contender.name,
        "rtfx": statistics.median(rtfx),
        "rtfx_min": rtfx[0],
        "rtfx_max": rtfx[-1],
        "tokens_per_window": contender.tokens / n_windows,
        "device_busy_share": statistics.mean(busy) / 100 if busy else None,
        "device_memory_bytes": max(memory) * 2**20 if memory else None,
    }


def _contender(name: str, make: Callable[[], Hear]) -> Contender:
    try:
        return Contender(name, make())
    except Exception as error:  # whatever a library raises when it loads
        return Contender(name, None, _reason(error))


def _reason(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def measure_model(name: str, options: Options, folder: Path) -> dict[str, Any]:
    """All contenders on one architecture."""
    rng = np.random.default_rng(1)
    windows = [
        rng.integers(-9_000, 9_000, FULL_SAMPLES, dtype=np.int16) for _ in range(options.windows)
    ]
    if name in WHISPER:
        model = whisper_model(_TINY_WHISPER if options.tiny else WHISPER[name], options.device)
        contenders = [
            _contender("ours", lambda: our_whisper(model, options)),
            _contender("transformers generate", lambda: transformers_whisper(model, options)),
            _contender("CTranslate2", lambda: ctranslate2_whisper(model, options, folder / "ct2")),
        ]
    else:
        checkpoint = write_wav2vec2(folder / "wav2vec2", options.tiny)
        contenders = [
            _contender("ours", lambda: our_ctc(CTC(checkpoint, device=options.device))),
            _contender("transformers", lambda: transformers_ctc(checkpoint, options)),
        ]
    measure(contenders, windows, options)
    rows = [_row(contender, len(windows)) for contender in contenders]
    found: dict[str, Any] = {"model": name, "goal_rtfx_h100": GOALS[name], "contenders": rows}
    ours = contenders[0]
    if ours.hear is not None:
        (folder / "flac").mkdir()
        try:
            found["rtfx_from_flac"] = from_flac(ours.hear, windows, options, folder / "flac")
            found["share_from_flac"] = found["rtfx_from_flac"] / rows[0]["rtfx"]
        except Exception as error:  # the figures before it stay
            found["from_flac_not_run"] = _reason(error)
    return found


def lines(report: dict[str, Any]) -> list[str]:
    """The result in plain text."""
    told = [
        f"{report['windows']} windows of 30 s, random weights, {report['tokens']} tokens a window,"
        f" {report['rounds']} rounds, {report['environment'].get('gpu') or report['device']}"
    ]
    for found in report["models"]:
        told.append(f"{found['model']}{' (tiny)' if report['tiny'] else ''}:")
        for row in found["contenders"]:
            if "rtfx" not in row:
                told.append(f"  {row['name']}: not run, {row['not_run']}")
                continue
            spread = f"{row['rtfx_min']:.0f} to {row['rtfx_max']:.0f}"
            busy = row["device_busy_share"]
            also = f", device busy {busy:.0%}" if busy is not None else ""
            if row["tokens_per_window"]:
                also = f", {row['tokens_per_window']:.0f} tokens a window{also}"
            told.append(f"  {row['name']}: RTFx {row['rtfx']:.0f} ({spread}){also}")
        if "rtfx_from_flac" in found:
            share = f"{found['share_from_flac']:.0%} of the engine alone"
            told.append(f"  ours, from FLAC files: RTFx {found['rtfx_from_flac']:.0f}, {share}")
    return told


def gpu_benchmark(
    out: Annotated[Path, typer.Option(help="Where report.json and report.txt go.")] = Path(
        "gpu-bench"
    ),
    device: Annotated[str, typer.Option(help="`cuda` or `cpu`.")] = "cuda",
    model: Annotated[
        list[str] | None, typer.Option(help="Only this architecture; may be given again.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 30 s in a round.")] = 1024,
    tokens: Annotated[int, typer.Option(min=1, max=224, help="Tokens of each window.")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each contender.")] = 3,
    tiny: Annotated[bool, typer.Option(help="Tiny models: tries the path only.")] = False,
) -> None:
    """Measure the engines on a GPU beside transformers and CTranslate2."""
    names = model or list(GOALS)
    for name in names:
        if name not in GOALS:
            raise typer.BadParameter(f"--model {name}: choose from {', '.join(GOALS)}.")
    if device not in ("cpu", "cuda"):
        raise typer.BadParameter(f"--device must be cpu or cuda, not {device!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("--device cuda: PyTorch finds no GPU; --tiny --device cpu tries.")
    options = Options(device, tiny, windows, tokens, rounds)
    report: dict[str, Any] = {
        "device": device,
        "tiny": tiny,
        "weights": "random",
        "windows": windows,
        "tokens": tokens,
        "rounds": rounds,
        "models": [],
        "environment": environment(),
    }
    out.mkdir(parents=True, exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory(prefix="gpu-benchmark-") as folder:
            report["models"].append(measure_model(name, options, Path(folder)))
        if device == "cuda":
            torch.cuda.empty_cache()
        # After each model, so that what was measured stays.
        (out / "report.json").write_text(json.dumps(report, indent=2))
        (out / "report.txt").write_text("\n".join(lines(report)) + "\n")
    print("\n".join(lines(report)))


def main() -> None:
    """Entry point."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(gpu_benchmark)
    app()


if __name__ == "__main__":
    main()
