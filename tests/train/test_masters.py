"""Masters between 4 and 32 bits: bf16 with stochastic rounding, and NVFP4 codes with an 8-bit residual."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import SHAPES
from test_fused import by_chunks, fused_steps
from torch import nn

from fp4lab.nvfp4 import BLOCK, pack, unpack
from fp4lab.train import head, residual
from fp4lab.train.adamw import MASTERS, AdamWOptions
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.noise import round_bfloat16

FINER = ("packed_residual", "bf16_stochastic")
DRAWS = 4000


def uniforms(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=100, deadline=None)
@given(
    x=st.floats(
        width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False, min_value=-(2.0**120), max_value=2.0**120
    )
)
def test_bfloat16_goes_to_a_neighbour_and_is_right_on_average(x):
    value = torch.tensor(x, dtype=torch.float32)
    got = round_bfloat16(value.expand(DRAWS).contiguous(), uniforms(DRAWS)).double()
    low, high = got.min(), got.max()
    assert low <= value.double() <= high
    step = (
        torch.nextafter(value.bfloat16().abs(), torch.tensor(torch.inf, dtype=torch.bfloat16)).double() - value.bfloat16().abs()
    )
    assert high - low <= step
    assert abs(got.mean() - value.double()) <= 0.04 * (high - low)


def test_bfloat16_keeps_what_it_has_and_what_is_no_number():
    kept = torch.tensor([0.0, -0.0, 1.0, -2.5, 3e38, float("inf"), -float("inf")]).bfloat16().float()
    got = round_bfloat16(kept, torch.full_like(kept, 1 - 2**-24))
    assert torch.equal(got.float(), kept) and torch.equal(got.signbit(), kept.signbit())
    for bits in (0x7FC00000, 0x7F800001, -1, -0x7FFFFF):  # quiet, signalling, all ones, negative
        value = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert value.isnan().all() and round_bfloat16(value, torch.tensor([0.999])).isnan().all()


RULES = [("torchao", "single"), ("native", "single"), ("nearest", "row"), ("torchao", "tensor"), ("ct", "row")]


@pytest.mark.parametrize("rule, levels", RULES)
@settings(max_examples=30, deadline=None)
@given(cols=st.sampled_from([16, 40, 64]), power=st.integers(-14, 3), seed=st.integers(0, 99))
def test_the_residual_holds_what_the_codes_lack(rule, levels, cols, power, seed):
    """To half a step, in every rule and size of block, tiny ones beside large ones included; and a step is small."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, cols, generator=generator) * 2.0**power
    x[:, :BLOCK] *= 2.0 ** torch.randint(-12, 3, (5, 1), generator=generator)
    image = pack(x, rule, levels)
    unit = residual.units(image)
    got = residual.decode(image, residual.encode(x, image))
    assert bool(((got - x).abs() <= 0.501 * unit + 1e-6 * x.abs()).all())
    largest = unpack(image).abs().view(5, -1)[:, : cols - cols % BLOCK].view(5, -1, BLOCK).amax(-1)
    whole = unit[:, : cols - cols % BLOCK].view(5, -1, BLOCK).amax(-1)
    normal = image.block_scale.float()[:, : whole.shape[1]] >= 2.0**-6
    assert bool((whole <= largest / 4 / 127 * 1.001)[normal & (largest > 0)].all() or rule == "torchao")


def test_the_residual_is_right_on_average():
    x = torch.randn(4, 32) * 0.05
    image = pack(x)
    noise = uniforms(DRAWS, 4, 32)
    total = sum(residual.decode(image, residual.encode(x, image, noise[i])).double() for i in range(DRAWS))
    assert float(((total / DRAWS - x) / residual.units(image)).abs().max()) < 0.04


@pytest.mark.parametrize("master", FINER)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_makes_nan_and_never_a_number(master, bad):
    ps = {"w": nn.Parameter(torch.randn(4, 64) * 0.05)}
    if master == "bf16_stochastic":
        ps["w"].data = ps["w"].data.bfloat16()
    adamw = ChunkedAdamW(ps, {"w": pack(ps["w"])}, AdamWOptions(master=master, state="fp32"))
    ps["w"].grad = torch.randn(4, 64).to(ps["w"].dtype)
    ps["w"].grad[2, 20] = bad
    adamw.step(1e-3)
    stored = adamw.states[0].read(0, 4)
    assert stored[2, 20].isnan() and stored[[0, 1, 3]].isfinite().all() and stored[2, 32:].isfinite().all()
    assert ps["w"][2, 20].isnan()


@pytest.mark.parametrize("master", FINER)
def test_small_updates_survive_on_average(master):
    """1e-5 a step beside weights of 0.05: a tenth of bf16's step, a hundredth of a code's."""
    moved = {}
    for name in ("fp32", "bf16", master):
        weights = torch.full((64, 64), 0.05).bfloat16()
        weights[:, ::BLOCK] = 0.25  # the block's largest stays, so that the scale does
        ps = {"w": nn.Parameter(weights.clone() if name.startswith("bf16") else weights.float())}
        adamw = ChunkedAdamW(ps, {"w": pack(ps["w"])}, AdamWOptions(state="fp32", master=name))
        start = adamw.states[0].read(0, 64)
        for _ in range(10):
            ps["w"].grad = torch.ones_like(ps["w"])
            health = adamw.step(1e-5)
        moved[name] = float((adamw.states[0].read(0, 64) - start).mean())
    assert moved["fp32"] == pytest.approx(-1e-4, rel=0.02) and moved["bf16"] == 0
    assert moved[master] == pytest.approx(-1e-4, rel=0.15)
    assert 0.5 < health.update_kept < 2


@pytest.mark.parametrize("master", FINER)
def test_the_seed_decides(master):
    results = []
    for seed in (1, 1, 2):
        ps = {"w": nn.Parameter(torch.linspace(-0.1, 0.1, 32 * 64).view(32, 64))}
        if master == "bf16_stochastic":
            ps["w"].data = ps["w"].data.bfloat16()
        adamw = ChunkedAdamW(ps, {"w": pack(ps["w"])}, AdamWOptions(master=master, seed=seed))
        for step in range(3):
            ps["w"].grad = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).to(ps["w"].dtype)
            adamw.step(1e-4)
        results.append(adamw.states[0].read(0, 32))
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])


def test_a_residual_starts_from_the_unquantised_weight_where_there_is_one():
    weight = torch.randn(8, 3, 16) * 0.05
    for start, error in ((weight, 1e-3), (unpack(pack(weight)), None)):
        adamw = ChunkedAdamW({"w": nn.Parameter(start)}, {"w": pack(weight)}, AdamWOptions(master="packed_residual"))
        held = adamw.states[0].read(0, 8).view_as(weight)
        if error is None:
            assert torch.equal(held, start) and not adamw.states[0].residual.any()
        else:
            assert float((held - weight).abs().max()) < error < float((unpack(pack(weight)) - weight).abs().max())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("master", [m for m in MASTERS if m not in ("packed", "packed_stochastic")])
def test_fused_is_chunked_with_finer_masters(name, master, monkeypatch):
    """One step: the same codes but for those that another order of sums tips over. Eight: the same losses."""
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 96)
    options = {"master": master, "state": "nvfp4_two_level", "weight_decay": 0.1, "chunk_rows": 16}
    dtype = torch.bfloat16 if master.startswith("bf16") else torch.float32
    theirs, chunked, _, h_chunked = by_chunks(name, 1, 3e-3, dtype, **options)
    ours, s, _, h_fused, _ = fused_steps(name, 1, 3e-3, dtype, **options)
    same = [float((s.packed[k].codes == chunked.packed[k].codes).float().mean()) for k in s.packed]
    if dtype == torch.float32:
        assert ours == pytest.approx(theirs, rel=1e-6) and sum(x == 1 for x in same) >= len(same) - 1
    assert min(same) > 0.97 and h_fused.code_changed == pytest.approx(h_chunked.code_changed, abs=0.02)
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 40)
    theirs, *_ = by_chunks(name, 8, 3e-3, dtype, **options)
    ours, *_ = fused_steps(name, 8, 3e-3, dtype, **options)
    assert ours == pytest.approx(theirs, rel=8e-2 if dtype == torch.bfloat16 else 4e-3, abs=1e-3)
    assert ours[-1] < 0.9 * ours[0]


def test_fused_with_all_in_fp32_is_torchs_adamw_through_the_codes():
    """Linears as well as norms and embedding, over five steps."""
    from oracle import hf_model, shape_of, store_of, weights_of
    from test_fused import IDS, TARGETS, refresh

    from fp4lab.model.config import EMBEDDING
    from fp4lab.model.paths import fp2_model
    from fp4lab.nvfp4 import repack_like
    from fp4lab.train.loss import cross_entropy

    name = "untied, 4 groups"
    s = store_of(shape_of(name), weights_of(hf_model(name)), keep_dense=False)
    model = fp2_model(s, torch.float32, torch.float32)
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    parameters, losses = dict(model.named_parameters()), []
    for _ in range(5):
        loss = cross_entropy(model, model.hidden(IDS), TARGETS)
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        for key, p in s.packed.items():
            s.update(key, repack_like(parameters[key], p))
        refresh(s, parameters[EMBEDDING])
    ours, *_ = fused_steps(name, 5, 3e-3, master="fp32", state="fp32", weight_decay=0.1)
    assert ours == pytest.approx(losses, rel=1e-4)
