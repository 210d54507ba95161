"""Whisper's input: samples -> log-mel spectrogram.

Owns the numbers of the spectrogram. Shared by every Whisper runtime; knows no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torchaudio

from transcribe.decode import SAMPLE_RATE

HOP_SAMPLES = 160


class LogMel:
    """Log-mel spectrogram, scaled as Whisper was trained (Radford et al. 2022, section 2.2)."""

    def __init__(self, n_mels: int, device: str = "cpu") -> None:
        self._device = device
        self._pinned = torch.device(device).type == "cuda"
        self._mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=SAMPLE_RATE,
            n_fft=400,
            hop_length=HOP_SAMPLES,
            n_mels=n_mels,
            norm="slaney",
            mel_scale="slaney",
        ).to(device)

    def __call__(self, windows: Sequence[npt.NDArray[np.int16]], length: int) -> torch.Tensor:
        """Features of windows padded with silence to `length` samples.

        Returns:
            float32 `[n_windows, n_mels, length / 160]`, on this object's device.
        """
        # Two bytes a sample to the device, copied without stalling the host.
        padded = torch.zeros((len(windows), length), dtype=torch.int16, pin_memory=self._pinned)
        for row, samples in zip(padded.numpy(), windows, strict=True):
            row[: len(samples)] = samples
        with torch.inference_mode():
            sound = padded.to(self._device, non_blocking=True).float().mul_(1 / 32768)
            power = self._mel(sound)[..., :-1]
            log = power.clamp_(min=1e-10).log10_()
            loudest = log.amax(dim=(1, 2), keepdim=True)
            return ((torch.maximum(log, loudest - 8.0) + 4.0) / 4.0).contiguous()
