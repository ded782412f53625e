"""Exact reparameterizations as pure functions, against float64 references."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from rk_export.passes.prepare.fold import fold_norm
from rk_export.passes.prepare.heads import rotate_values
from rk_export.passes.prepare.orthogonal import LARGEST_FACTOR, Orthogonal, haar, orthogonal
from rk_export.passes.prepare.rotate import rotate_reader, rotate_writer, rotated_tied_head
from rk_export.passes.prepare.scale import LARGEST_RATIO, neuron_scales, scale_neurons

SIZES = [1, 2, 7, 48, 64, 96, 576, 4096]


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def linear(rows: int, columns: int, generator: torch.Generator, *, bias: bool = True) -> nn.Linear:
    module = nn.Linear(columns, rows, bias=bias, dtype=torch.float64).requires_grad_(False)
    for parameter in module.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


def random(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("size", SIZES)
def test_rotations_are_orthogonal(size: int, generator: torch.Generator) -> None:
    rotation = orthogonal(size, generator)
    rows = torch.eye(size, dtype=torch.float64)[: min(size, 32)]
    turned = rotation.right(rows)
    assert torch.allclose(turned @ turned.T, torch.eye(len(rows), dtype=torch.float64), atol=1e-12)
    assert torch.allclose(rotation.left(rotation.right(rows).T).T, rotation.right(rotation.right(rows)))
    assert all(len(factor) <= LARGEST_FACTOR or len(factor) % 2 for factor in rotation.factors)


def test_a_rotation_is_its_kronecker_product(generator: torch.Generator) -> None:
    signs = torch.tensor([1.0, -1.0] * 12, dtype=torch.float64)
    factors = (haar(2, generator), haar(4, generator), haar(3, generator))
    expected = signs[:, None] * torch.kron(torch.kron(factors[0], factors[1]), factors[2])
    rotation = Orthogonal(signs, factors)
    assert torch.allclose(rotation.matrix(), expected)
    matrix = random(24, 5, generator=generator)
    assert torch.allclose(rotation.left(matrix), expected.T @ matrix)
    assert rotation.right(matrix.T.float()).dtype is torch.float32


def test_the_power_of_two_part_spreads_one_outlier_over_all_coordinates(generator: torch.Generator) -> None:
    outlier = torch.zeros(1, 512, dtype=torch.float64)
    outlier[0, 100] = 8.0
    assert torch.allclose(
        orthogonal(512, generator).right(outlier).abs(), torch.full((1, 512), 8 / 512**0.5).double()
    )


def test_rotations_follow_their_seed() -> None:
    first, again, other = (orthogonal(64, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.matrix(), again.matrix())
    assert not torch.allclose(first.matrix(), other.matrix())


@pytest.mark.parametrize("unit_offset", [False, True])
def test_an_rms_norm_is_folded(generator: torch.Generator, unit_offset: bool) -> None:
    norm = nn.RMSNorm(12, dtype=torch.float64).requires_grad_(False)
    gain = random(12, generator=generator)
    norm.weight.copy_(gain - float(unit_offset))
    readers = [linear(5, 12, generator), linear(7, 12, generator, bias=False)]
    x = random(9, 12, generator=generator)
    unit = nn.functional.rms_norm(x, (12,))
    expected = [reader(unit * gain) for reader in readers]
    fold_norm(norm, readers, unit_offset=unit_offset)
    assert torch.equal(norm.weight + float(unit_offset), torch.ones(12, dtype=torch.float64))
    for reader, value in zip(readers, expected, strict=True):
        assert torch.allclose(reader(unit), value)


def test_a_layer_norm_is_folded_with_its_shift(generator: torch.Generator) -> None:
    norm = nn.LayerNorm(12, dtype=torch.float64).requires_grad_(False)
    norm.weight.copy_(random(12, generator=generator))
    norm.bias.copy_(random(12, generator=generator))
    reader, x = linear(5, 12, generator), random(9, 12, generator=generator)
    expected = reader(norm(x))
    fold_norm(norm, [reader])
    assert torch.allclose(reader(norm(x)), expected)
    assert not norm.bias.any()
    assert bool((norm.weight == 1).all())
    norm.bias.fill_(0.1)
    with pytest.raises(TypeError, match="no bias"):
        fold_norm(norm, [linear(5, 12, generator, bias=False)])


def test_readers_and_writers_meet_in_the_rotated_stream(generator: torch.Generator) -> None:
    reader, writer = linear(5, 48, generator), linear(48, 5, generator)
    x = random(9, 48, generator=generator)
    rotation = orthogonal(48, generator)
    q, expected, written = rotation.matrix(), reader(x), writer(x[:, :5])
    rotate_reader(reader, rotation)
    rotate_writer(writer, rotation)
    assert torch.allclose(reader(x @ q), expected)
    assert torch.allclose(writer(x[:, :5]), written @ q)


@pytest.mark.parametrize("unit_offset", [False, True])
def test_a_tied_head_shares_the_rotated_table(generator: torch.Generator, unit_offset: bool) -> None:
    norm, table = nn.RMSNorm(48, dtype=torch.float64), nn.Embedding(20, 48, dtype=torch.float64)
    gain = random(48, generator=generator)
    norm.requires_grad_(False).weight.copy_(gain - float(unit_offset))
    table.requires_grad_(False)
    x, rotation = random(9, 48, generator=generator), orthogonal(48, generator)
    expected = (nn.functional.rms_norm(x, (48,)) * gain) @ table.weight.T
    rotate_reader(table, rotation)
    head = rotated_tied_head(norm, table, rotation, unit_offset=unit_offset)
    assert head.head.weight is table.weight
    assert torch.equal(norm.weight + float(unit_offset), torch.ones(48, dtype=torch.float64))
    assert torch.allclose(head(nn.functional.rms_norm(x @ rotation.matrix(), (48,))), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_values_are_turned_back_by_the_output_projection(generator: torch.Generator, bias: bool) -> None:
    heads, kv_heads, width, tokens = 6, 2, 12, 5
    value = linear(kv_heads * width, 20, generator, bias=bias)
    output = linear(20, heads * width, generator)
    x = random(tokens, 20, generator=generator)
    mixing = random(heads, tokens, tokens, generator=generator)

    def attended() -> Tensor:
        values = value(x).view(tokens, kv_heads, width).repeat_interleave(heads // kv_heads, dim=1)
        y: Tensor = output(torch.einsum("hst,thw->shw", mixing, values).flatten(1))
        return y

    expected, before = attended(), value.weight.clone()
    rotate_values(value, output, [orthogonal(width, generator) for _ in range(kv_heads)])
    assert torch.allclose(attended(), expected)
    assert not torch.allclose(value.weight, before)


def test_scales_even_out_peaks() -> None:
    peaks = torch.tensor([1.0, 4.0, 16.0])
    assert torch.allclose(neuron_scales(peaks, 0.5), torch.tensor([0.5, 1.0, 2.0]).double())
    assert torch.allclose(peaks.double() / neuron_scales(peaks, 1.0), torch.full((3,), 4.0).double())
    assert torch.equal(neuron_scales(peaks, 0.0), torch.ones(3).double())


def test_silent_neurons_keep_their_scale_and_extremes_are_bounded() -> None:
    assert torch.equal(neuron_scales(torch.zeros(3), 0.5), torch.ones(3).double())
    scales = neuron_scales(torch.tensor([0.0, 2.0, 2.0]), 0.5)
    assert torch.allclose(scales, torch.ones(3).double())
    extreme = neuron_scales(torch.tensor([1e-20, 1e20]), 1.0)
    assert torch.allclose(extreme, torch.tensor([1 / LARGEST_RATIO, LARGEST_RATIO]).double())


def test_scaled_neurons_cancel_behind_a_gate_and_behind_relu(generator: torch.Generator) -> None:
    up, down = linear(8, 6, generator), linear(6, 8, generator)
    x, gate = random(9, 6, generator=generator), random(9, 8, generator=generator)
    scales = neuron_scales(random(8, generator=generator).abs(), 0.5)
    gated, relu, gelu = (
        down(up(x) * gate),
        down(up(x).relu()),
        down(nn.functional.gelu(up(x))),
    )
    scale_neurons(up, down, scales)
    assert torch.allclose(down(up(x) * gate), gated)
    assert torch.allclose(down(up(x).relu()), relu)
    assert not torch.allclose(down(nn.functional.gelu(up(x))), gelu)
