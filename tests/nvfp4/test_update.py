"""Stochastic updates of packed tensors: exact where nothing changes, unbiased where something does."""

import pytest
import torch

from fp4lab.nvfp4 import pack, unpack, update_stochastic


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
