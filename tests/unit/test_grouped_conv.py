"""Grouped convolutions as matrix products: PyTorch's own results."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

from transcribe.engines.grouped_conv import GroupedConv, is_slow


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    frames=st.integers(1, 70),
    kernel=st.integers(16, 40),
    groups=st.sampled_from([2, 4]),
    padding=st.integers(20, 24),
    bias=st.booleans(),
)
def test_the_sums_are_those_of_the_convolution(n, frames, kernel, groups, padding, bias):
    torch.manual_seed(frames)
    conv = torch.nn.Conv1d(8, 12, kernel, padding=padding, groups=groups, bias=bias).double()
    assert is_slow(conv)
    x = torch.randn(n, 8, frames, dtype=torch.float64)
    torch.testing.assert_close(GroupedConv(conv)(x), conv(x))


def test_wav2vec2_has_one_such_and_its_normalised_weight_is_taken() -> None:
    torch.manual_seed(2)
    config = Wav2Vec2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        conv_dim=(32,) * 7,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config).eval()
    sound = torch.randn(2, 16_000)
    with torch.inference_mode():
        expected = model(sound).logits
        slow = [module for module in model.modules() if is_slow(module)]
        assert len(slow) == 1
        slow[0].forward = GroupedConv(slow[0])
        torch.testing.assert_close(model(sound).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "conv",
    [
        torch.nn.Conv1d(8, 8, 31, groups=8),  # one channel each, as in Conformer
        torch.nn.Conv1d(8, 8, 31),
        torch.nn.Conv1d(8, 8, 31, groups=2, stride=2),
        torch.nn.Conv1d(8, 8, 31, groups=2, dilation=2),
        torch.nn.Conv1d(8, 8, 31, groups=2, padding="same"),
        torch.nn.Conv1d(8, 8, 5, groups=2),
        torch.nn.Linear(8, 8),
    ],
)
def test_others_stay_as_they_are(conv) -> None:
    assert not is_slow(conv)
