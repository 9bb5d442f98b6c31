"""What changed between two packed tensors, and the sign of zeros."""

import dataclasses

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.nvfp4 import count_changed, keep_zero_signs, pack, repack_like, unpack
from fp4lab.nvfp4.changes import ROWS


def random_packed(seed, rows=5, cols=48):
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randn(rows, cols, generator=generator) * 0.05)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_count_against_values(seed_a, seed_b):
    a, b = random_packed(seed_a), random_packed(seed_b)
    b = dataclasses.replace(b, block_scale=a.block_scale)  # one scale: another code is another value
    assert int(count_changed(a, b)) == int((unpack(a) != unpack(b)).sum())
    assert int(count_changed(a, a)) == 0


def test_another_scale_counts_its_whole_block():
    a = random_packed(1)
    scale = a.block_scale.view(torch.uint8).clone()
    scale[2, 1] += 1
    assert int(count_changed(a, dataclasses.replace(a, block_scale=scale.view(torch.float8_e4m3fn)))) == 16


def test_more_rows_than_a_piece():
    a, b = random_packed(1, ROWS + 3, 16), random_packed(1, ROWS + 3, 16)
    b.codes[-1, 0] ^= 0x11
    assert int(count_changed(a, b)) == int((unpack(a) != unpack(b)).sum()) > 0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_float_detour_that_loses_the_sign_of_zeros_is_undone(seed):
    old = random_packed(seed)
    lost = unpack(old) + 0.0  # -0 + 0 is +0
    new = repack_like(lost, old)
    keep_zero_signs(new, old)
    assert torch.equal(new.codes, old.codes)
    other = random_packed(seed + 1)
    before = unpack(other)
    keep_zero_signs(other, old)
    assert torch.equal(unpack(other), before), "no value changes"
