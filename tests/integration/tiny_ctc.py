"""A wav2vec2 small enough to be trained while the tests run: it reads synthesised digits.

No CTC weights come with any package, and random ones read nothing; this is a real checkpoint
with everything a published one has.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torchaudio
from transformers import (
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
)

from jobs.sample_archive import SYNTH_RATE, speak

DIGITS = "zero one two three four five six seven eight nine".split()
VOICES = ("en-us+m1", "en-us+f2")
TRAINING_RATES = (130, 150, 170)
HELD_OUT_RATE = 160
STEPS = 450
N_FILTERS, FILTER_SAMPLES = 48, 400
BATCH = 8

LETTERS = sorted(set("".join(DIGITS)))
VOCABULARY = {t: i for i, t in enumerate(["<pad>", "<s>", "</s>", "<unk>", "|", *LETTERS])}


def spoken_digit(digit: str, voice: str, rate: int) -> np.ndarray:
    """One digit as float32 at 16 kHz, without the synthesiser's silence around it."""
    sound = torchaudio.functional.resample(
        torch.from_numpy(speak(digit, voice, rate)), SYNTH_RATE, 16_000
    ).numpy()
    loud = np.flatnonzero(np.abs(sound) > 0.01)
    return sound[loud[0] : loud[-1] + 1]


def sentence(
    digits: list[str], sounds: dict[str, np.ndarray], rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[float, float]]]:
    """Digits with pauses of 120 to 300 ms, as float32 at 16 kHz, and when each was said."""
    parts = [np.zeros(int(rng.uniform(0.1, 0.25) * 16_000))]
    times = []
    for digit in digits:
        begin = sum(map(len, parts)) / 16_000
        times.append((begin, begin + len(sounds[digit]) / 16_000))
        parts += [sounds[digit], np.zeros(int(rng.uniform(0.12, 0.3) * 16_000))]
    clean = np.concatenate(parts)
    noise = rng.normal(0, rng.uniform(0.0005, 0.003), len(clean))
    return (clean * rng.uniform(0.5, 1.0) + noise).astype(np.float32), times


def digit_sounds(rate: int) -> list[dict[str, np.ndarray]]:
    """For each voice, every digit said at `rate` words a minute."""
    return [{d: spoken_digit(d, voice, rate) for d in DIGITS} for voice in VOICES]


def train(folder: Path, seed: int = 1) -> Path:
    """Train on random strings of digits and write the checkpoint into `folder`."""
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # its layers are too small to share
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(VOCABULARY))
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True)
    model = Wav2Vec2ForCTC(_config())
    _listen_to_pitches(model)
    _fit(model, extractor, tokenizer, rng)
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _config() -> Wav2Vec2Config:
    return Wav2Vec2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=192,
        conv_dim=(2 * N_FILTERS, 96, 96),
        conv_stride=(80, 2, 2),
        conv_kernel=(FILTER_SAMPLES, 4, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        feat_extract_norm="layer",
        conv_bias=True,
        do_stable_layer_norm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        activation_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
        pad_token_id=0,
    )


def _listen_to_pitches(model: Wav2Vec2ForCTC) -> None:
    """Start the first layer as a bank of filters, as an ear has one; it learns on from there.

    From random filters, learning what to listen to takes longer than learning to read.
    """
    mels = np.linspace(np.log(1 + 80 / 700), np.log(1 + 7_000 / 700), N_FILTERS)
    pitches = 700 * (np.exp(mels) - 1)
    t = (np.arange(FILTER_SAMPLES) - FILTER_SAMPLES / 2) / 16_000
    phases = np.outer(pitches, 2 * np.pi * t)
    bank = np.concatenate([np.cos(phases), np.sin(phases)]) * np.hanning(FILTER_SAMPLES)
    first = model.wav2vec2.feature_extractor.conv_layers[0].conv
    with torch.no_grad():
        first.weight.copy_(torch.tensor(bank[:, None] * 0.05, dtype=torch.float32))


def _fit(
    model: Wav2Vec2ForCTC,
    extractor: Wav2Vec2FeatureExtractor,
    tokenizer: Wav2Vec2CTCTokenizer,
    rng: np.random.Generator,
) -> None:
    sounds = [voice for rate in TRAINING_RATES for voice in digit_sounds(rate)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, STEPS)
    model.train()
    for step in range(STEPS):
        longest = 2 if step < STEPS // 3 else 5  # short strings teach it letters sooner
        texts, waves = [], []
        for _ in range(BATCH):
            digits = list(rng.choice(DIGITS, rng.integers(1, longest + 1)))
            texts.append(" ".join(digits))
            waves.append(sentence(digits, sounds[rng.integers(len(sounds))], rng)[0])
        inputs = extractor(waves, sampling_rate=16_000, padding=True, return_tensors="pt")
        labels = tokenizer(texts, padding=True, return_tensors="pt")
        targets = labels.input_ids.masked_fill(labels.attention_mask == 0, -100)
        loss = model(**inputs, labels=targets).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
