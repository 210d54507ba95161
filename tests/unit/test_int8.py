"""Products in eight bits: close to the exact ones, and each row by itself."""

import pytest
import torch

from transcribe.engines.int8 import Int8Linear, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="this CPU has no VNNI")


@pytest.fixture
def layer():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(96, 64, generator=generator) * torch.logspace(-2, 1, 96)[:, None]
    bias = torch.randn(96, generator=generator)
    return weight, bias, Int8Linear(weight, bias)


@pytest.fixture
def rows():
    """Rows as unlike in size as a transformer's are."""
    generator = torch.Generator().manual_seed(5)
    return torch.randn(40, 64, generator=generator) * torch.logspace(-3, 3, 40)[:, None]


def test_every_row_and_column_keeps_two_digits(layer, rows) -> None:
    weight, bias, linear = layer
    exact = rows @ weight.T
    error = (linear(rows) - bias - exact).abs()
    size = rows.norm(dim=1)[:, None] * weight.norm(dim=1)
    assert (error / size).max() < 0.005


def test_a_row_does_not_depend_on_the_others(layer, rows) -> None:
    *_, linear = layer
    together = linear(rows)
    assert torch.equal(together, torch.cat([linear(row[None]) for row in rows]))
    assert torch.equal(together[5:22], linear(rows[5:22]))


def test_a_row_of_zeros_gives_the_bias(layer) -> None:
    _, bias, linear = layer
    assert torch.equal(linear(torch.zeros(2, 64)), bias.expand(2, -1))
