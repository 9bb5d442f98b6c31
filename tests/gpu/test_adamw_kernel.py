"""The fused update against `update_rows` in plain torch, on the GPU."""

import dataclasses

import pytest
import torch

from fp4lab.nvfp4 import PackedTensor, pack, unpack
from fp4lab.nvfp4.adamw_kernel import COUNTS
from fp4lab.train.adamw import AdamWOptions, ParameterState, count_blocks, update_rows
from fp4lab.train.health import Health
from fp4lab.train.kernel_step import KernelStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = [(64, 2560), (37, 48), (5, 9728), (130, 1040)]
DIFFERENT = 1e-4  # share of codes that may be one code away: values within a few ulps of a border


def state(shape, options, levels="single", index=3):
    w = torch.randn(shape, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) * 0.02
    return ParameterState(index, "w", None, pack(w, options.rule, levels), options)


def gradient(shape, step, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(100 + step)
    size = torch.logspace(-7, -2, shape[0], device="cuda").unsqueeze(1)
    return (torch.randn(shape, device="cuda", generator=generator) * size).to(dtype)


def parts(s):
    for kind, x in (("w", s.packed), ("m", s.m.packed), ("v", s.v.packed)):
        if x is not None:
            yield kind, x


def bits(t):
    return t.reshape(-1).view(torch.uint8)


def codes(p: PackedTensor):
    return torch.stack((p.codes & 15, p.codes >> 4), dim=-1).view(p.codes.shape[0], -1).int()


def steps(s, options, n, kernel, shape, lr=1e-3, dtype=torch.bfloat16):
    fast = KernelStep(options, s.device)
    assert fast.why_not(s) is None
    for t in range(1, n + 1):
        health = Health()
        if kernel:
            fast.counts.zero_()
            fast.set(t, lr)
            fast.update(s, gradient(shape, t, dtype), 0)
            health.kernel(fast.counts, s.m.packed is not None)
        else:
            update_rows(s, gradient(shape, t, dtype), 0, t, lr, health)
            count_blocks(s, health)
    return health.event(n)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("master, rule", [("packed_stochastic", "torchao"), ("packed", "torchao"), ("packed", "nearest")])
@pytest.mark.parametrize("form", ["nvfp4_two_level", "bf16", "fp32"])
def test_one_step_is_the_reference(shape, master, rule, form):
    """From a state of three reference steps on: every stored byte, but for rare codes and scales one step away."""
    options = AdamWOptions(chunk_rows=1000, master=master, rule=rule, state=form, seed=7, weight_decay=0.1)
    ours, theirs = state(shape, options), state(shape, options)
    for s in (ours, theirs):
        steps(s, options, 3, False, shape)
    lr = 1e-3
    fast, health = KernelStep(options, ours.device), Health()
    fast.set(4, lr)
    fast.update(ours, gradient(shape, 4), 0)
    update_rows(theirs, gradient(shape, 4), 0, 4, lr, health)
    count_blocks(theirs, health)
    for (kind, a), (_, b) in zip(parts(ours), parts(theirs), strict=True):
        scales = a.block_scale.view(torch.uint8).int() - b.block_scale.view(torch.uint8).int()
        assert scales.count_nonzero() <= max(2, DIFFERENT * scales.numel()), kind
        assert scales.abs().max() <= 8
        same_scale = (scales == 0).repeat_interleave(16, dim=1)
        differ = (codes(a) != codes(b)) & same_scale
        assert differ.sum() <= max(2, DIFFERENT * differ.numel()), kind
        assert ((codes(a) & 7) - (codes(b) & 7))[differ].abs().max() <= 1 if differ.any() else True
        if a.levels == "row":
            torch.testing.assert_close(a.global_scale, b.global_scale, rtol=1e-6, atol=0)
    for a, b in ((ours.m.data, theirs.m.data), (ours.v.data, theirs.v.data)):
        if a is not None:
            torch.testing.assert_close(a, b, rtol=2e-2 if form == "bf16" else 1e-6, atol=1e-7 * float(b.abs().max()))
    got, want = Health(), health.event(4)
    got.kernel(fast.counts, ours.m.packed is not None)
    got = got.event(4)
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, float) or (isinstance(b, dict) and field.name == "zero_scale"):
            assert a == pytest.approx(b, rel=1e-2, abs=1e-4), field.name


@pytest.mark.parametrize("levels", ["single", "tensor"])
def test_rerun_is_the_same_bits(levels):
    options = AdamWOptions(seed=3)
    results = []
    for _ in range(2):
        s = state((200, 2560), options, levels)
        steps(s, options, 4, True, (200, 2560))
        results.append([t.clone() for _, p in parts(s) for t in p.tensors()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(bits(a), bits(b))


def test_rows_in_pieces_are_the_rows_at_once():
    """The head's rows come by chunks: the dither goes by the matrix row."""
    options = AdamWOptions(seed=3)
    whole, pieces = state((96, 320), options), state((96, 320), options)
    g = gradient((96, 320), 1)
    for s, cuts in ((whole, [(0, 96)]), (pieces, [(0, 32), (32, 90), (90, 96)])):
        fast = KernelStep(options, s.device)
        fast.set(1, 1e-3)
        for start, stop in cuts:
            fast.update(s, g[start:stop], start)
    for (_, a), (_, b) in zip(parts(whole), parts(pieces), strict=True):
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(bits(x), bits(y))


@pytest.mark.parametrize("form", ["nvfp4_two_level", "bf16"])
def test_named_rows_have_the_bits_of_all_at_once(form):
    """In any order and in two launches; rows that none names, or only once its turn is over, stay as they are."""
    options = AdamWOptions(seed=3, state=form)
    whole, some = state((96, 320), options), state((96, 320), options)
    g = gradient((96, 320), 1)
    kept = [t[90:].clone() for _, p in parts(some) for t in p.tensors() if t.ndim]
    fast = KernelStep(options, whole.device)
    fast.set(1, 1e-3)
    fast.update(whole, g, 0)
    expected = fast.counts.sum(0)
    fast.counts.zero_()
    order = torch.randperm(90, generator=torch.Generator().manual_seed(5)).to("cuda", torch.int32)
    unnamed = torch.full((8,), -1, dtype=torch.int32, device="cuda")
    for names in (torch.cat([order[:40], unnamed]), torch.cat([unnamed, order[40:]])):
        grad = torch.where(names.unsqueeze(1) >= 0, g[names.clamp(min=0)], torch.nan)
        fast.update_some(some, grad, names)
    for (_, a), (_, b) in zip(parts(whole), parts(some), strict=True):
        for x, y in zip(a.tensors(), b.tensors(), strict=True):
            assert torch.equal(bits(x[:90]), bits(y[:90]))
    left = [t[90:] for _, p in parts(some) for t in p.tensors() if t.ndim]
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(kept, left, strict=True))
    assert fast.counts.sum(0)[1] < expected[1]
    fast.update_some(some, g[90:], torch.arange(90, 96, dtype=torch.int32, device="cuda"))
    torch.testing.assert_close(fast.counts.sum(0)[1:], expected[1:], rtol=1e-5, atol=0)


def test_a_gradient_that_is_not_finite_makes_nan_weights_and_says_so():
    options = AdamWOptions()
    s = state((16, 320), options)
    g = gradient((16, 320), 1)
    g[3, 5] = torch.nan
    fast, health = KernelStep(options, s.device), Health()
    fast.set(1, 1e-3)
    fast.update(s, g, 0)
    health.kernel(fast.counts, True)
    bad = unpack(s.packed).isnan()
    assert bad[3, :16].all() and bad.sum() == 16
    assert health.event(1).max_update_over_lr != health.event(1).max_update_over_lr


def test_a_cap_bounds_the_update_and_every_row_is_unbiased():
    options = AdamWOptions(max_update=0.5, state="fp32")
    s = state((64, 320), options)
    before = unpack(s.packed)
    event = steps(s, options, 1, True, (64, 320), lr=1e-3)  # so that about a thousand codes move
    assert event.max_update_over_lr == 0.5
    assert 0.9 < event.update_kept < 1.1
    assert (unpack(s.packed) != before).any()


def test_counts_have_names():
    assert len(set(COUNTS)) == len(COUNTS) == 13


@pytest.mark.parametrize("rule, master", [("nearest", "packed"), ("nearest", "packed_stochastic"), ("ct", "packed_stochastic")])
def test_tensor_scales_in_both_conventions(rule, master):
    options = AdamWOptions(state="fp32", rule="nearest", master=master)
    w = torch.randn(48, 320, device="cuda") * 0.02
    p, q = pack(w, rule, "tensor"), pack(w, rule, "tensor")
    ours, theirs = (ParameterState(0, "w", None, x, options) for x in (p, q))
    kept = steps(ours, options, 2, True, (48, 320)).update_kept
    assert steps(theirs, options, 2, False, (48, 320)).update_kept == pytest.approx(kept, rel=1e-3)
    assert (unpack(p) != unpack(q)).float().mean() < 1e-3
