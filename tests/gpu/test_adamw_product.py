"""The update whose gradient is a product of few tokens against `update_rows` with that product, on the GPU."""

import dataclasses

import pytest
import torch
from test_adamw_kernel import DIFFERENT, bits, codes, parts, state

from fp4lab.nvfp4 import pack
from fp4lab.train.adamw import AdamWOptions, count_blocks, update_rows
from fp4lab.train.health import Health
from fp4lab.train.kernel_step import Joint, KernelStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def factors(shape, n, step):
    """dy [n, rows], whose rows are of very different size, and x [n, cols]."""
    generator = torch.Generator("cuda").manual_seed(100 + step)
    size = torch.logspace(-7, -2, shape[0], device="cuda")
    dy, x = (torch.randn(n, k, device="cuda", generator=generator) for k in shape)
    return (dy * size).bfloat16(), x.bfloat16()


def trained(shape, n, options, kernel, steps=4, levels="single"):
    s = state(shape, options, levels)
    fast = KernelStep(options, s.device)
    for t in range(1, steps + 1):
        dy, x = factors(shape, n, t)
        health = Health()
        if kernel:
            assert fast.why_not_product(s, dy.dtype, n) is None
            fast.counts.zero_()
            fast.set(t, 1e-3)
            fast.update_product(s, dy, x)
            health.kernel(fast.counts, True)
        else:
            update_rows(s, dy.float().T @ x.float(), 0, t, 1e-3, health)
            count_blocks(s, health)
    return s, health.event(steps), fast.counts[:, 1].sum().sqrt().item()


@pytest.mark.parametrize("shape, n", [((64, 2560), 8), ((48, 256), 3), ((160, 9728), 16), ((32, 512), 20), ((1024, 4096), 32)])
@pytest.mark.parametrize("levels", ["single", "tensor"])
def test_it_is_the_update_with_that_gradient(shape, n, levels):
    options = AdamWOptions(seed=3, weight_decay=0.1)
    (ours, got, norm), (theirs, want, _) = (trained(shape, n, options, kernel, levels=levels) for kernel in (True, False))
    for (kind, a), (_, b) in zip(parts(ours), parts(theirs), strict=True):
        scales = bits(a.block_scale) != bits(b.block_scale)
        assert scales.sum() <= max(2, DIFFERENT * scales.numel()), kind
        differ = (codes(a) != codes(b)) & ~scales.view(a.block_scale.shape).repeat_interleave(16, dim=1)
        assert differ.sum() <= max(2, DIFFERENT * differ.numel()), kind
        if a.levels == "row":
            torch.testing.assert_close(a.global_scale, b.global_scale, rtol=1e-6, atol=0)
    for field in dataclasses.fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, float) or field.name == "zero_scale":
            assert a == pytest.approx(b, rel=1e-2, abs=1e-4), field.name
    dy, x = factors(shape, n, 4)
    assert norm == pytest.approx((dy.double().T @ x.double()).norm().item(), rel=1e-5)


def test_counting_changes_no_bit_and_a_rerun_neither():
    results = []
    for count in (True, False, False):
        options = AdamWOptions(seed=3)
        s = state((64, 2560), options)
        fast = KernelStep(options, s.device)
        fast.count = count
        for t in range(1, 4):
            fast.set(t, 1e-3)
            fast.update_product(s, *factors((64, 2560), 8, t))
        results.append([bits(t).clone() for _, p in parts(s) for t in p.tensors()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_cap_bounds_the_update():
    options = AdamWOptions(max_update=0.25)
    _, event, _ = trained((64, 512), 8, options, True, steps=1)
    assert event.max_update_over_lr == pytest.approx(0.25, rel=1e-6)


def test_a_block_that_outgrows_its_scale_is_right_on_average():
    """One update that doubles the largest value of every block: scales and codes move together (`nvfp4.update`)."""
    options = AdamWOptions(beta1=0.0, beta2=0.0)
    ends = []
    for seed in range(64):
        s = state((16, 256), dataclasses.replace(options, seed=seed))
        before = s.read(0, 16)
        fast = KernelStep(s.options, s.device)
        fast.set(1, 0.05)
        fast.update_product(s, torch.ones(1, 16, device="cuda", dtype=torch.bfloat16), -before[:1].sign().bfloat16())
        ends.append(s.read(0, 16) - before)
    mean = torch.stack(ends).mean(0)
    sign = before[:1].sign()
    wanted = torch.where(sign == 0, 0.0, 0.05 * sign).expand_as(mean)
    assert (mean - wanted).abs().mean() < 0.15 * 0.05
    assert (mean - wanted).mean().abs() < 0.01 * 0.05


def test_a_gradient_that_is_not_finite_makes_nan_weights_and_says_so():
    options = AdamWOptions()
    s = state((32, 512), options)
    dy, x = factors((32, 512), 8, 1)
    dy[2, 5] = torch.nan
    fast, health = KernelStep(options, s.device), Health()
    fast.set(1, 1e-3)
    fast.update_product(s, dy, x)
    health.kernel(fast.counts, True)
    bad = s.read(0, 32).isnan()
    assert bad[5].all() and bad.sum() == 512
    assert health.event(1).max_update_over_lr != health.event(1).max_update_over_lr


def test_joint_rows_have_the_bits_of_their_own_update():
    options, shapes = AdamWOptions(seed=1), [(64, 512), (32, 512), (32, 512)]
    dy, x = factors((128, 512), 8, 1)
    results = []
    for joint in (False, True):
        states = [state(shape, options, index=4 + i) for i, shape in enumerate(shapes)]
        fast = KernelStep(options, states[0].device)
        fast.set(1, 1e-3)
        if joint:
            whole = pack(torch.cat([s.read(0, s.rows) for s in states]), "torchao")
            for s, rows in zip(states, ((0, 64), (64, 96), (96, 128)), strict=True):
                assert torch.equal(bits(s.packed.codes), bits(whole.rows(*rows).codes))
                s.packed = whole.rows(*rows)
            fast.update_product(Joint(states, whole), dy, x)
        else:
            for s, part in zip(states, dy.split([64, 32, 32], dim=1), strict=True):
                fast.update_product(s, part, x)
        results.append([bits(t.contiguous()).clone() for s in states for _, p in parts(s) for t in p.tensors()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_it_is_not_for():
    fast = KernelStep(AdamWOptions(), torch.device("cuda"))
    s = state((64, 512), AdamWOptions())
    assert "33 tokens" in (fast.why_not_product(s, torch.bfloat16, 33) or "")
    assert "float32" in (fast.why_not_product(s, torch.float32) or "")
    assert "tiles" in (fast.why_not_product(state((37, 512), AdamWOptions()), torch.bfloat16) or "")
    floats = AdamWOptions(state="bf16")
    assert "packed moments" in (KernelStep(floats, s.device).why_not_product(state((64, 512), floats), torch.bfloat16) or "")
