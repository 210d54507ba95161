"""CTC models by transformers: wav2vec2, HuBERT, WavLM, wav2vec2-BERT, Parakeet-CTC and others.

Owns one checkpoint of `AutoModelForCTC`: its input, its batches, and the way from frames to
words (Graves et al. 2006). Knows nothing of recordings or files. bfloat16 or float16 on a GPU;
on a CPU float32, its transformer's matrix products in eight bits where the CPU is made for them.

Greedy decoding takes the likeliest token of each frame, drops repeats and blanks; only token
ids and their probabilities leave the device. A CTC model writes what it hears: nothing, where
nobody speaks, so `no_speech_prob` is always 0.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from transcribe.decode import SAMPLE_RATE
from transcribe.engines.base import (
    EngineInput,
    EngineWork,
    Hypothesis,
    HypothesisSegment,
    HypothesisWord,
)
from transcribe.engines.fitting import Fitting
from transcribe.engines.grouped_conv import GroupedConv, is_slow
from transcribe.engines.int8 import Int8Linear, float_for_products, is_supported
from transcribe.engines.lanes import Lane, Mark, Replay, host_buffer, on_host, precision, to_device
from transcribe.engines.whisper_tokens import compression_ratio
from transcribe.engines.word_edges import sharpened
from transcribe.errors import Fatal
from transcribe.models import Model

# A window is padded to its own length class, whoever shares its batch: where a model has no
# attention mask (wav2vec2-base), padding changes the text, and so must not depend on others.
_LENGTH_CLASS = SAMPLE_RATE // 2
# On a CPU batches of one are the fastest: the activations stay in the cache.
_BATCH_SAMPLES = {"cpu": 1, "cuda": 16 * 30 * SAMPLE_RATE}
_MOST_GRAPHS = 96  # each keeps its input on the device, and its network's activations are shared
# A pause between words that ends a segment.
_PHRASE_PAUSE_S = 0.6
_MAX_BEYOND_PEAK_S = 0.15
_PRIVATE_USE = 0xE000  # Unicode characters that mean nothing
_SUBWORD_START = "▁"  # SentencePiece's mark of a word's first token

_Samples = npt.NDArray[np.int16]


class _Token(NamedTuple):
    """A recognised token: frames `first` to `end` (excluded) and its mean log-probability."""

    id: int
    first: int
    end: int
    logprob: float


@dataclass(slots=True)
class _Begun:
    """A batch that the device is busy with; the tensors are on the host, filled when `ready`.

    Attributes:
        n_valid: frames that stand for each window's own sound.
        ids, best: likeliest token of each frame and its log-probability, `[n_windows, n_frames]`.
        log_probs: of all tokens, if somebody needs them, `[n_windows, n_frames, n_tokens]`.
    """

    windows: Sequence[_Samples]
    n_valid: list[int]
    ids: Tensor
    best: Tensor
    log_probs: Tensor | None
    ready: Mark | None


class _Waveforms:
    """A network that takes waveforms, on fixed buffers of one shape: one CUDA graph."""

    def __init__(
        self, model: Any, extractor: Any, has_mask: bool, shape: tuple[int, int], lane: Lane
    ) -> None:
        n_rows, length = shape
        self._model = model
        self._has_mask = has_mask
        self._normalises = bool(getattr(extractor, "do_normalize", False))
        self._device = str(model.device)
        self._dtype = next(model.parameters()).dtype
        self._samples = torch.zeros(n_rows, length, dtype=torch.int16, device=self._device)
        self._lengths = torch.zeros(n_rows, dtype=torch.int64, device=self._device)
        self._axis = torch.arange(length, device=self._device)
        self._logits: Tensor | None = None
        self._replay = Replay(self._hear, lane)

    def __call__(self, windows: Sequence[_Samples]) -> Tensor:
        """Logits `[n_rows, n_frames, n_tokens]`; rows without a window hear silence."""
        told = host_buffer(tuple(self._samples.shape), torch.int16, self._device)
        lengths = host_buffer((len(told),), torch.int64, self._device).zero_()
        told[len(windows) :] = 0
        for row, samples in zip(told.numpy(), windows, strict=False):
            row[: len(samples)], row[len(samples) :] = samples, 0
        lengths[: len(windows)] = torch.tensor([len(samples) for samples in windows])
        self._samples.copy_(told, non_blocking=True)
        self._lengths.copy_(lengths, non_blocking=True)
        self._replay()
        assert self._logits is not None
        return self._logits

    def _hear(self) -> None:
        """Each window normalised by itself and padded with zeros, then the network."""
        own = self._axis < self._lengths[:, None]
        values = self._samples.float() * (1 / 32768)
        if self._normalises:  # as Wav2Vec2FeatureExtractor does
            n = self._lengths.clamp(min=1)[:, None]
            values = (values - values.sum(dim=1, keepdim=True) / n) * own
            values = values / (values.square().sum(dim=1, keepdim=True) / n + 1e-7).sqrt()
        masked = {"attention_mask": own.long()} if self._has_mask else {}
        self._logits = self._model(values.to(self._dtype), **masked).logits


def _row_bucket(n_windows: int, lane: Lane) -> int:
    """Rows that a batch is given: few different numbers where each costs a graph.

    At most a quarter of them are empty.
    """
    if not lane.is_cuda:
        return n_windows
    step = 1 << max(0, (n_windows - 1).bit_length() - 3)
    return -(-n_windows // step) * step


class CTC:
    """A CTC checkpoint loaded into transformers (see `Engine`)."""

    name = "ctc-transformers"

    def __init__(
        self,
        model: Model,
        *,
        device: str = "cpu",
        words: bool = False,
        language_model: str | None = None,
        language: str | None = None,
    ) -> None:
        """Load the weights.

        Args:
            model: directory with config, tokenizer, feature extractor and safetensors.
            device: `cpu` or `cuda`.
            words: whether words get their own times.
            language_model: path of a KenLM n-gram; None decodes greedily.
            language: code that hypotheses carry; a CTC model cannot tell one.

        Raises:
            Fatal: not a usable CTC checkpoint, or the language model cannot be used.
        """
        self.device = device
        self.fitting = Fitting(_BATCH_SAMPLES[device])
        self.work = EngineWork()
        self._words = words
        self._language = language
        self._model = _load_model(model, device)
        self._extractor, self._tokenizer = _load_processor(model)
        self._takes_waveform = self._model.main_input_name == "input_values"
        self._has_mask = bool(getattr(self._extractor, "return_attention_mask", False))
        self._dtype: torch.dtype = next(self._model.parameters()).dtype
        self._lane = Lane(device)
        self._batches_ahead = 1 if self._lane.is_cuda else 0
        self._networks: dict[tuple[int, int], _Waveforms] = {}
        self._frame_s = self._seconds_per_frame()
        self._vocabulary = _Vocabulary.of(self._tokenizer, self._model.config, model)
        self._decoder = None
        if language_model is not None:
            self._decoder = _language_model_decoder(language_model, self._vocabulary)

    def recognise(self, windows: Sequence[EngineInput]) -> list[Hypothesis]:
        """One hypothesis per window, in order (see `Engine`)."""
        lengths = [_padded_length(len(window.samples)) for window in windows]
        heard: dict[int, Hypothesis] = {}
        begun: deque[tuple[list[int], _Begun]] = deque()

        def finish() -> None:
            batch, frames = begun[0]  # stays there if it cannot be read now
            heard.update(zip(batch, self._read(frames), strict=True))
            begun.popleft()

        def hear(batch: list[int]) -> list[int]:
            """Read the batch before this one while the device is busy with this one."""
            frames = self._begin([windows[i].samples for i in batch], lengths[batch[0]])
            begun.append((batch, frames))
            if len(begun) > self._batches_ahead:
                finish()
            return batch

        for _ in self.fitting.over(lengths, hear):
            pass
        while begun:
            finish()
        return [heard[i] for i in range(len(windows))]

    # ---- sound -> frames ----------------------------------------------------------------

    @torch.inference_mode()
    def _begin(self, windows: Sequence[_Samples], length: int) -> _Begun:
        """Have the device hear a batch and bring back what is needed of it; does not wait."""
        started, features_before = time.perf_counter(), self.work.features_s
        with self._lane.entered():
            if self._takes_waveform:
                logits = self._of_waveforms(windows, length)
                valid = self._n_frames(torch.tensor([len(samples) for samples in windows]))
            else:
                logits, mask = self._of_features(windows)
                valid = self._n_frames(mask.sum(dim=-1))
            scores = logits[: len(windows)].float()
            best, ids = scores.max(dim=-1)
            scale = scores.logsumexp(dim=-1)
            frames = _Begun(windows, valid, on_host(ids), on_host(best), None, None)
            frames.ids.copy_(ids, non_blocking=True)
            frames.best.copy_(best - scale, non_blocking=True)
            if self._words or self._decoder is not None:
                frames.log_probs = on_host(scores)
                frames.log_probs.copy_(scores - scale[..., None], non_blocking=True)
            frames.ready = self._lane.mark()
        self.work.heard_samples += sum(map(len, windows))
        self.work.padded_samples += len(logits) * length
        features = self.work.features_s - features_before
        self.work.encoder_s += time.perf_counter() - started - features
        return frames

    def _of_waveforms(self, windows: Sequence[_Samples], length: int) -> Tensor:
        """Logits `[at least n_windows, n_frames, n_tokens]`, good until the next call."""
        shape = (_row_bucket(len(windows), self._lane), length)
        network = self._networks.get(shape)
        if network is None:
            network = _Waveforms(self._model, self._extractor, self._has_mask, shape, self._lane)
            if self._lane.is_cuda and len(self._networks) < _MOST_GRAPHS:
                self._networks[shape] = network
        return network(windows)

    def _of_features(self, windows: Sequence[_Samples]) -> tuple[Tensor, Tensor]:
        """Logits, and on the host the mask of the features that were heard."""
        started = time.perf_counter()
        values, mask = self._features(windows)
        self.work.features_s += time.perf_counter() - started
        values = to_device(values, self.device).to(self._dtype)
        return self._model(values, attention_mask=to_device(mask, self.device)).logits, mask

    def _features(self, windows: Sequence[_Samples]) -> tuple[Tensor, Tensor]:
        """Spectral features and their mask, as the checkpoint's own extractor makes them."""
        floats = [np.multiply(samples, 1 / 32768, dtype=np.float32) for samples in windows]
        least = [np.pad(s, (0, max(0, SAMPLE_RATE // 10 - len(s)))) for s in floats]
        made = self._extractor(
            least,
            sampling_rate=SAMPLE_RATE,
            padding=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return made["input_features"], made["attention_mask"].long()

    def _n_frames(self, lengths: Tensor) -> list[int]:
        """Frames of the output that stand for so many samples, or features, of the input."""
        count = getattr(self._model, "_get_feat_extract_output_lengths", None)
        count = count or self._model._get_subsampling_output_length
        valid: list[int] = count(lengths).tolist()
        return valid

    def _seconds_per_frame(self) -> float:
        """Measured on ten seconds: strides differ between families and their feature rates."""
        n_samples = 10 * SAMPLE_RATE
        if self._takes_waveform:
            lengths = torch.tensor([n_samples])
        else:
            lengths = self._features([np.zeros(n_samples, dtype=np.int16)])[1].sum(dim=-1)
        return 10.0 / self._n_frames(lengths)[0]

    # ---- frames -> tokens ---------------------------------------------------------------

    def _read(self, frames: _Begun) -> list[Hypothesis]:
        """What the device has heard, once it has."""
        waited = time.perf_counter()
        assert frames.ready is not None
        frames.ready.wait()
        started = time.perf_counter()
        self.work.encoder_s += started - waited
        hypotheses = []
        for i, samples in enumerate(frames.windows):
            n = max(0, min(frames.n_valid[i], frames.ids.shape[1]))
            if self._decoder is not None:
                assert frames.log_probs is not None
                tokens = self._with_language_model(frames.log_probs[i, :n])
            else:
                tokens = self._collapse(frames.ids[i, :n].numpy(), frames.best[i, :n].numpy())
                if self._words:
                    assert frames.log_probs is not None
                    spoken = [token.id for token in tokens]
                    tokens = _force_aligned(frames.log_probs[i, :n], spoken, self._vocabulary.blank)
            hypotheses.append(self._hypothesis(tokens, samples))
        self.work.decoder_s += time.perf_counter() - started
        return hypotheses

    def _collapse(
        self, ids: npt.NDArray[np.int64], logprobs: npt.NDArray[np.float32]
    ) -> list[_Token]:
        """Greedy path -> tokens: runs of one id are one token, blanks are none."""
        if not len(ids):
            return []
        edges = np.flatnonzero(np.diff(ids)) + 1
        firsts = np.concatenate([[0], edges])
        ends = np.concatenate([edges, [len(ids)]])
        means = np.add.reduceat(logprobs, firsts, dtype=np.float64) / (ends - firsts)
        said = ids[firsts] != self._vocabulary.blank
        runs = (part[said].tolist() for part in (ids[firsts], firsts, ends, means))
        return [_Token(*run) for run in zip(*runs, strict=True)]

    def _with_language_model(self, log_probs: Tensor) -> list[_Token]:
        """Beam search with the n-gram, then the tokens of its text aligned to the frames."""
        assert self._decoder is not None
        if not len(log_probs):
            return []
        text = self._decoder.decode(log_probs.cpu().numpy())
        ids = self._vocabulary.encode(text, self._tokenizer)
        return _force_aligned(log_probs, ids, self._vocabulary.blank)

    # ---- tokens -> words -> segments ----------------------------------------------------

    def _hypothesis(self, tokens: list[_Token], samples: npt.NDArray[np.int16]) -> Hypothesis:
        duration_s = len(samples) / SAMPLE_RATE
        words = _timed_words(self._vocabulary.words(tokens), self._frame_s, duration_s)
        segments = tuple(self._segment(phrase) for phrase in _phrases(sharpened(words, samples)))
        spoken = [t for t in tokens if t.id != self._vocabulary.delimiter]
        text = " ".join(segment.text for segment in segments)
        return Hypothesis(
            segments=segments,
            language=self._language,
            avg_logprob=sum(t.logprob for t in spoken) / len(spoken) if spoken else 0.0,
            compression_ratio=compression_ratio(text),
        )

    def _segment(self, words: Sequence[HypothesisWord]) -> HypothesisSegment:
        text = " ".join(word.word for word in words)
        timed = tuple(words) if self._words else None
        return HypothesisSegment(words[0].start_s, words[-1].end_s, text, timed)


def _timed_words(
    words: Sequence[tuple[str, list[_Token]]], frame_s: float, duration_s: float
) -> list[HypothesisWord]:
    """Words with their times and the mean probability of their tokens.

    A CTC token peaks inside its sound, not at its edges, so neighbours share the time between
    their peaks, up to `_MAX_BEYOND_PEAK_S` each.
    """
    first = [tokens[0].first * frame_s for _, tokens in words]
    last = [tokens[-1].end * frame_s for _, tokens in words]
    timed = []
    for i, (text, tokens) in enumerate(words):
        before = first[i] / 2 if i == 0 else (last[i - 1] + first[i]) / 2
        after = (last[i] + (first[i + 1] if i + 1 < len(words) else duration_s)) / 2
        start = max(before, first[i] - _MAX_BEYOND_PEAK_S)
        end = min(after, last[i] + _MAX_BEYOND_PEAK_S, duration_s)
        probability = sum(math.exp(t.logprob) for t in tokens) / len(tokens)
        start = min(start, duration_s)
        timed.append(HypothesisWord(text, start, max(start, end), min(1.0, probability)))
    return timed


def _phrases(words: Sequence[HypothesisWord]) -> list[list[HypothesisWord]]:
    """Words cut where a pause lies between them."""
    phrases: list[list[HypothesisWord]] = []
    for word in words:
        if phrases and word.start_s - phrases[-1][-1].end_s < _PHRASE_PAUSE_S:
            phrases[-1].append(word)
        else:
            phrases.append([word])
    return phrases


def _force_aligned(log_probs: Tensor, ids: Sequence[int], blank: int) -> list[_Token]:
    """Where tokens lie on the likeliest CTC path that writes them.

    Args:
        log_probs: `[n_frames, n_tokens]`.
        ids: tokens without blanks.
        blank: CTC's blank.

    Returns:
        One token per id; none if the frames are too few to write them.
    """
    from torchaudio.functional import forced_align, merge_tokens

    repeats = sum(a == b for a, b in itertools.pairwise(ids))
    if not ids or len(log_probs) < len(ids) + repeats:
        return []
    targets = torch.tensor([ids], dtype=torch.int32, device=log_probs.device)
    path, scores = forced_align(log_probs[None].contiguous(), targets, blank=blank)
    spans = merge_tokens(path[0], scores[0], blank=blank)
    return [_Token(int(s.token), int(s.start), int(s.end), float(s.score)) for s in spans]


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """Tokens of a checkpoint as text.

    `delimiter` stands between words in character vocabularies; subword vocabularies have none
    and mark a word's first token instead.
    """

    tokens: list[str]
    blank: int
    delimiter: int | None
    silent: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any, config: Any, model: Model) -> _Vocabulary:
        """Read it from the tokenizer.

        Raises:
            Fatal: the tokenizer and the model do not fit together.
        """
        by_text: dict[str, int] = tokenizer.get_vocab()
        size = max(config.vocab_size, max(by_text.values(), default=0) + 1)
        tokens = [""] * size
        for text, index in by_text.items():
            tokens[index] = text
        blank = config.pad_token_id if config.pad_token_id is not None else tokenizer.pad_token_id
        if blank is None or not 0 <= blank < size:
            raise Fatal(f"--model {model.name}: neither config nor tokenizer tells CTC's blank.")
        delimiter = by_text.get(getattr(tokenizer, "word_delimiter_token", None) or "")
        silent = frozenset({*tokenizer.all_special_ids, blank} - {delimiter})
        return cls(tokens, int(blank), delimiter, silent)

    def words(self, tokens: Sequence[_Token]) -> list[tuple[str, list[_Token]]]:
        """Tokens grouped into words, with the words' texts."""
        words: list[tuple[str, list[_Token]]] = []
        is_new = True
        for token in tokens:
            text = self.tokens[token.id]
            if token.id == self.delimiter:
                is_new = True
                continue
            if token.id in self.silent:
                continue
            is_new = is_new or text.startswith(_SUBWORD_START)
            text = text.removeprefix(_SUBWORD_START)
            if is_new:
                words.append((text, [token]))
            else:
                before, members = words[-1]
                members.append(token)
                words[-1] = (before + text, members)
            is_new = False
        return [(text, members) for text, members in words if text]

    def encode(self, text: str, tokenizer: Any) -> list[int]:
        """Tokens that write a text."""
        ids: list[int] = tokenizer(text).input_ids
        return [i for i in ids if i not in self.silent]


def _padded_length(n_samples: int) -> int:
    return max(1, -(-n_samples // _LENGTH_CLASS)) * _LENGTH_CLASS


def _load_model(model: Model, device: str) -> Any:
    from transformers import AutoModelForCTC

    try:
        loaded: Any = AutoModelForCTC.from_pretrained(
            str(model.path),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            dtype=precision(device),
        )
    except Exception as error:  # transformers and safetensors raise whatever they like
        raise Fatal(
            f"--model {model.name}: no CTC model could be loaded ({_reason(error)})."
        ) from None
    if device == "cpu" and is_supported():
        _quantise(loaded)
        if float_for_products() == torch.bfloat16:
            _shorten(loaded)
    _mask_without_waiting(loaded.base_model)
    loaded = loaded.to(device).eval()
    if device != "cpu":
        for module in filter(is_slow, loaded.modules()):
            module.forward = GroupedConv(module)
    return loaded


def _mask_without_waiting(network: Any) -> None:
    """Let a network tell its frames of sound on the device alone, as a CUDA graph demands.

    transformers writes single ones from the host and adds them up.
    """
    if not hasattr(network, "_get_feature_vector_attention_mask"):
        return

    def heard(n_frames: int, attention_mask: Tensor, **how: Any) -> Tensor:
        n_samples = attention_mask.sum(dim=-1)
        lengths: Tensor = network._get_feat_extract_output_lengths(n_samples, **how)
        lengths = lengths.clamp(min=1)  # attention to nothing at all is no number
        return torch.arange(n_frames, device=attention_mask.device) < lengths[:, None]

    network._get_feature_vector_attention_mask = heard


def _quantise(model: Any) -> None:
    """Let the linear layers compute in eight bits, but for the last, which is small and decides.

    They keep their weights, because some families (WavLM) read them past the layer.
    """
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear) and layer is not getattr(model, "lm_head", None):
            bias = None if layer.bias is None else layer.bias.detach()
            layer.forward = _by_rows(Int8Linear(layer.weight.detach(), bias))  # type: ignore[assignment,method-assign]


def _shorten(model: Any) -> None:
    """Let the convolutions over channels compute in bfloat16; sums and norms stay float32.

    Those over time, before the transformer, were a third of the time of a window.
    """
    for conv in model.modules():
        if isinstance(conv, torch.nn.Conv1d) and conv.groups == 1 and conv.in_channels > 1:
            conv.forward = _in_bfloat16(conv)  # type: ignore[assignment,method-assign]


def _in_bfloat16(conv: torch.nn.Conv1d) -> Callable[[Tensor], Tensor]:
    weight = conv.weight.detach().bfloat16()
    bias = None if conv.bias is None else conv.bias.detach().bfloat16()

    def forward(x: Tensor) -> Tensor:
        made: Tensor = conv._conv_forward(x.bfloat16(), weight, bias)
        return made.float()

    return forward


def _by_rows(linear: Int8Linear) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        return linear(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)

    return forward


def _load_processor(model: Model) -> tuple[Any, Any]:
    """Feature extractor and tokenizer of a checkpoint."""
    from transformers import AutoFeatureExtractor, AutoTokenizer

    loaded = []
    for part, loader in (("feature extractor", AutoFeatureExtractor), ("tokenizer", AutoTokenizer)):
        try:
            loaded.append(
                loader.from_pretrained(
                    str(model.path), local_files_only=True, trust_remote_code=False
                )
            )
        except Exception as error:
            raise Fatal(
                f"--model {model.name}: its {part} could not be loaded ({_reason(error)});"
                " copy preprocessor_config.json and the tokenizer's files beside the weights."
            ) from None
    extractor, tokenizer = loaded
    if extractor.sampling_rate != SAMPLE_RATE:
        raise Fatal(
            f"--model {model.name} hears {extractor.sampling_rate} Hz; only 16000 Hz is made here."
        )
    return extractor, tokenizer


def _language_model_decoder(path: str, vocabulary: _Vocabulary) -> Any:
    """A beam search with the n-gram at `path`."""
    try:
        import kenlm  # noqa: F401 - pyctcdecode only warns without it
        from pyctcdecode import build_ctcdecoder
    except ImportError:
        raise Fatal(
            "--lm needs two more packages: pip install --no-deps pyctcdecode pygtrie kenlm"
        ) from None
    if not Path(path).is_file():
        raise Fatal(f"--lm {path}: no such file; give a KenLM n-gram (.arpa or .bin).")
    # pyctcdecode takes labels of several letters for a mistake: special tokens get private ones.
    labels = [
        chr(_PRIVATE_USE + i) if i in vocabulary.silent else token
        for i, token in enumerate(vocabulary.tokens)
    ]
    labels[vocabulary.blank] = ""
    if vocabulary.delimiter is not None:
        labels[vocabulary.delimiter] = " "
    try:
        return build_ctcdecoder(labels, kenlm_model_path=path)
    except (OSError, RuntimeError, ValueError) as error:
        raise Fatal(
            f"--lm {path}: cannot be used as a language model ({_reason(error)})."
        ) from None


def _reason(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__
