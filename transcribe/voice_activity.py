"""How likely each 32 ms of a channel are speech: Silero VAD, in PyTorch.

Owns the network (https://github.com/snakers4/silero-vad, its 16 kHz "sequence" form). The weights
are those of the package's ONNX file; ONNX Runtime's own convolutions take three times as long
(docs/performance.md). What is made of the probabilities is in `speech.py`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from transcribe.resampling import Floats

_MIRRORED = 64  # samples behind a frame, so that its last window is whole
_HOP = 128  # of the network's spectrum, whose windows have two
_STRIDES = (1, 2, 2, 1)  # of the convolutions over the spectrum: four columns become one
_FILE = "silero_vad_16k_sequence.onnx"

State = tuple[Tensor, Tensor]  # hidden and cell state, `[1, 1, 128]`


class SpeechDetector:
    """The network (a `Detector`), which keeps nothing between calls."""

    block_frames = 512  # a call's: what it works on stays in the cache

    def __init__(self) -> None:
        weights = _weights()
        self._basis = weights["stft.forward_basis_buffer"]
        self._convs = [
            (weights[f"encoder.{i}.weight"], weights[f"encoder.{i}.bias"], stride)
            for i, stride in enumerate(_STRIDES)
        ]
        self._lstm = _lstm(weights)
        self._output = weights["output.weight"][:, :, 0], weights["output.bias"]

    @torch.inference_mode()
    def judge(self, frames: Floats, state: State | None) -> tuple[Floats, State]:
        """See `Detector`."""
        x = functional.pad(torch.from_numpy(frames)[:, None], (0, _MIRRORED), mode="reflect")
        spectrum = functional.conv1d(x, self._basis, stride=_HOP)
        real, imaginary = spectrum.chunk(2, dim=1)
        x = real.square().addcmul_(imaginary, imaginary).sqrt_()
        for weight, bias, stride in self._convs:
            x = functional.conv1d(x, weight, bias, padding=1, stride=stride).relu_()
        hidden, state = self._lstm(x.transpose(1, 2), state)
        judged = functional.linear(hidden[:, 0].relu(), *self._output).sigmoid()
        return judged[:, 0].numpy(), state


def _weights() -> dict[str, Tensor]:
    """The network's tensors by their names in the ONNX file."""
    import onnx
    from onnx import numpy_helper

    # Found, not imported: the package loads what only its own functions need.
    package = importlib.util.find_spec("silero_vad")
    assert package is not None and package.origin is not None
    model = onnx.load(Path(package.origin).parent / "data" / _FILE)
    return {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
    }


def _lstm(weights: dict[str, Tensor]) -> torch.nn.LSTM:
    """ONNX has an LSTM's gates in the order i, o, f, c, PyTorch in i, f, c, o; both say so."""
    of_input, of_hidden, bias = (weights[f"onnx::LSTM_{n}"][0] for n in (209, 210, 211))

    def reordered(gates: Tensor) -> Tensor:
        i, o, f, c = gates.chunk(4)
        return torch.cat((i, f, c, o))

    bias_of_input, bias_of_hidden = bias.chunk(2)
    lstm = torch.nn.LSTM(of_input.shape[1], of_hidden.shape[1])
    lstm.load_state_dict(
        {
            "weight_ih_l0": reordered(of_input),
            "weight_hh_l0": reordered(of_hidden),
            "bias_ih_l0": reordered(bias_of_input),
            "bias_hh_l0": reordered(bias_of_hidden),
        }
    )
    return lstm.requires_grad_(False)
