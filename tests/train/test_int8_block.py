"""8-bit block-wise dynamic moments: the code map against other people's, rounding, and rows that stand alone."""

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fp4lab.train.int8_block import WIDTH, Int8Blocks, dynamic_map
from fp4lab.train.state import Moment


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_that_of_the_paper(signed):
    """Seven decades, each divided as finely as its bits allow; 0 and 1 besides."""
    values = dynamic_map(signed)
    assert len(values) == len(values.unique()) == 256 and bool((values.diff() > 0).all())
    assert values[-1] == 1 and (values == 0).sum() == 1
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        inside = values[(values > low) & (values < high)]
        assert len(inside) == 2 ** (decade + (not signed))
        torch.testing.assert_close(inside.diff(), torch.full((len(inside) - 1,), 0.9 * high / len(inside)), rtol=1e-4, atol=0)
    if signed:
        torch.testing.assert_close(values[:127], -values[128:255].flip(0))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("module", ["torchao.optim.quant_utils", "bitsandbytes.functional"])
def test_the_map_is_that_of_other_implementations(module, signed):
    if importlib.util.find_spec(module.split(".")[0]) is None:
        pytest.skip(f"{module.split('.')[0]} is not installed")
    theirs = torch.as_tensor(importlib.import_module(module).create_dynamic_map(signed))
    torch.testing.assert_close(dynamic_map(signed), theirs.float().cpu(), rtol=1e-6, atol=0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    cols=st.sampled_from([1, 16, 255, 256, 257, 600]),
    signed=st.booleans(),
    power=st.integers(-30, 20),
    seed=st.integers(0, 99),
)
def test_every_element_gets_the_nearest_value(rows, cols, signed, power, seed):
    x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)) ** 3 * 2.0**power
    x = x if signed else x.abs()
    blocks = Int8Blocks(rows, cols, signed, "cpu")
    assert not blocks.read(0, rows).any()
    blocks.write(0, rows, x)
    got = blocks.read(0, rows)
    for start in range(0, cols, WIDTH):
        part, mine = x[:, start : start + WIDTH], got[:, start : start + WIDTH]
        top = part.abs().amax(dim=1, keepdim=True)
        distance = (part.unsqueeze(-1) - dynamic_map(signed) * top.unsqueeze(-1)).abs().amin(dim=-1)
        assert bool(((part - mine).abs() <= distance + 1e-6 * top).all())
    assert blocks.absmax.shape == (rows, -(-cols // WIDTH))
    blocks.write(0, rows, got.abs())  # with -1 it would not: that is no value of the map
    got = blocks.read(0, rows)
    blocks.write(0, rows, got)
    torch.testing.assert_close(blocks.read(0, rows), got, rtol=1e-6, atol=0)


def test_rows_are_apart_and_zeros_stay():
    x = torch.randn(7, 300)
    x[3] = 0
    whole, one = Int8Blocks(7, 300, True, "cpu"), Int8Blocks(7, 300, True, "cpu")
    whole.write(0, 7, x)
    for row in range(7):
        one.write(row, row + 1, x[row : row + 1])
    assert torch.equal(whole.codes, one.codes) and torch.equal(whole.absmax, one.absmax)
    assert not whole.read(3, 4).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("signed", [True, False])
def test_what_is_no_number_never_becomes_one(bad, signed):
    x = torch.rand(2, 512)
    x[0, 5] = abs(bad) if not signed else bad
    blocks = Int8Blocks(2, 512, signed, "cpu")
    blocks.write(0, 2, x)
    got = blocks.read(0, 2)
    assert not got[0, :WIDTH].isfinite().any() or not got[0, 5].isfinite()
    assert not got[0, 5].isfinite() and got[0, WIDTH:].isfinite().all() and got[1].isfinite().all()


def test_v_spans_seven_decades_where_linear_int8_spans_two():
    """Reference 0.3: v underflows against its row's largest; the dynamic codes keep 1e-6 of the block's."""
    v = torch.tensor([[1.0, 1e-3, 1e-5, 1e-6] * 4])
    for format, kept in (("int8", 1), ("int8_block", 4)):
        moment = Moment(1, 16, format, True, "cpu", 0.999)
        moment.write(0, 1, v, torch.ones(1, 1))
        assert int((moment.read(0, 1)[0, :4] > 0).sum()) == kept
