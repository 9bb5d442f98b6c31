"""Stochastic updates of packed tensors: exact where nothing changes, unbiased where something does."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fp4lab.nvfp4 import pack, pack_stochastic, unpack, update_stochastic
from fp4lab.nvfp4.update import _scale_byte


def updated(x, old, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows, padded = old.codes.shape[0], old.codes.shape[1] * 2
    noise = torch.rand(rows, padded, generator=generator)
    return update_stochastic(x, old, noise, torch.rand(rows, padded // 16, generator=generator))


@pytest.mark.parametrize("levels", ["single", "tensor", "row"])
@pytest.mark.parametrize("cols", [64, 40])
def test_no_change_is_no_change(levels, cols):
    """Byte for byte, scales included, but for blocks that half the scale holds exactly."""
    old = pack(torch.randn(32, cols, generator=torch.Generator().manual_seed(0)), "nearest", levels)
    new = updated(unpack(old), old)
    assert torch.equal(unpack(new), unpack(old))
    same = new.block_scale.view(torch.uint8) == old.block_scale.view(torch.uint8)
    assert same.float().mean() > 0.9


@pytest.mark.parametrize("levels", ["single", "row"])
@pytest.mark.parametrize("size", [0.01, 0.3])
def test_unbiased(levels, size):
    """Mean of n draws: the summed error along the wanted change is under 3 %, and no block's sum is off by 6 errors."""
    generator = torch.Generator().manual_seed(1)
    old = pack(torch.randn(64, 64, generator=generator), "nearest", levels)
    before = unpack(old)
    wanted = before + torch.randn(64, 64, generator=generator) * size
    n = 1500
    draws = torch.stack([unpack(updated(wanted, old, seed)) for seed in range(n)]).double()
    mean, error = draws.mean(0), draws.std(0) / n**0.5
    change = (wanted - before).double()
    assert float(((mean - before) * change).sum() / (change * change).sum()) == pytest.approx(1, abs=0.03)
    seen = error > 0.02 * size  # rare moves may not have been drawn at all
    z = ((mean - wanted) / error)[seen]
    assert z.square().mean().sqrt() < 1.15 and z.abs().max() < 6


def test_small_changes_touch_few_codes():
    """A change of a thousandth of the scale moves about a thousandth of the codes, not every block that grew."""
    generator = torch.Generator().manual_seed(2)
    old = pack(torch.randn(64, 256, generator=generator), "nearest", "row")
    before = unpack(old)
    new = unpack(updated(before * 1.0005, old))
    assert 0 < (new != before).float().mean() < 0.01


def test_a_block_that_outgrows_its_scale_and_its_row_is_held():
    """Up to 64 times larger: block scales and then the row's second level follow; nothing is lost to clipping."""
    old = pack(torch.randn(8, 64, generator=torch.Generator().manual_seed(3)), "nearest", "row")
    value = unpack(old)
    for factor in (1.5, 1.9, 1.9, 1.9, 1.9, 1.9):
        value = value * factor
        old = updated(value, old)
    relative = (unpack(old) - value).norm() / value.norm()
    assert relative < 0.25


def test_a_block_that_shrinks_gets_a_finer_scale():
    old = pack(torch.full((1, 16), 6.0))
    small = torch.full((1, 16), 3.0)
    new = updated(small, old)
    assert torch.equal(unpack(new), small) and float(new.block_scale.float()) == 0.5


def stored(x, bound, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = x.shape[0], -(-x.shape[1] // 16)
    return pack_stochastic(x, bound, torch.rand(shape, generator=generator), torch.rand(shape, generator=generator))


@pytest.mark.parametrize("cols", [48, 40])
def test_a_stored_mean_is_right_on_average(cols):
    """Values of a block share their noise, so each is looked at alone. The smallest row's scales would be below 2^-9."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(16, cols, generator=generator) * torch.logspace(-5, 2, 16).unsqueeze(1)
    bound = x.abs().amax(dim=1, keepdim=True) / 400
    bound[0] *= 1e5
    n = 3000
    draws = torch.stack([unpack(stored(x, bound, seed)) for seed in range(n)]).double()
    mean, error = draws.mean(0), draws.std(0) / n**0.5
    seen = error > 1e-4 * x.abs().amax(dim=1, keepdim=True)
    z = ((mean - x) / error)[seen]
    assert z.square().mean().sqrt() < 1.15 and z.abs().max() < 6
    assert seen[0].any()


def test_a_mean_that_moves_by_little_moves():
    """What rounding to nearest does not do: a decay of a thousandth a step halves it in 693 steps, whatever the grid."""
    x = torch.rand(256, 64, generator=torch.Generator().manual_seed(5)) + 0.5
    bound = torch.full((256, 1), 1.5 / 2688)
    held, nearest = stored(x, bound, 0), pack(x, "nearest", "row", global_scale=bound)
    for step in range(693):
        held = stored(unpack(held) * 0.999, bound, 1 + step)
        nearest = pack(unpack(nearest) * 0.999, "nearest", "row", global_scale=bound)
    assert float(unpack(held).mean()) == pytest.approx(0.5 * float(x.mean()), rel=0.1)
    assert unpack(nearest).mean() > 0.9 * x.mean()


def test_nothing_is_stored_of_nothing():
    zero = torch.zeros(2, 32)
    p = stored(zero, torch.zeros(2, 1), 0)
    assert not unpack(p).any() and (p.block_scale.float() == 2**-9).all()


@given(st.floats(0, 448, width=32), st.integers(0, (1 << 20) - 1))
def test_a_scale_is_one_of_its_two_neighbours(x, fraction):
    byte = _scale_byte(torch.tensor([x]), torch.tensor([fraction], dtype=torch.int32))
    neighbours = (byte.int() + torch.tensor([-1, 1])).clamp(1, 126).to(torch.uint8)
    low, high = neighbours.view(torch.float8_e4m3fn).float().tolist()
    got = byte.view(torch.float8_e4m3fn).float().item()
    assert low <= max(x, 2**-9) * (1 + 1e-6) and high >= x * (1 - 1e-6)
    if fraction == (1 << 20) - 1:
        assert got >= x * (1 - 2e-6)
    if fraction == 0:
        assert got <= max(x, 2**-9) * (1 + 1e-6)
