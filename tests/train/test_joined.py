"""One state for many parameters: the bytes of ChunkedAdamW, and what cannot be joined."""

import pytest
import torch
from torch import nn

from fp4lab.choices import check
from fp4lab.errors import UserError
from fp4lab.nvfp4 import count_changed, keep_zero_signs, pack, repack_like
from fp4lab.train.adamw import MASTERS, AdamWOptions
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.joined import JoinedAdamW
from fp4lab.train.state import FORMATS

SHAPES = {"a": (12, 32), "embed_tokens": (20, 32), "b": (7, 48), "norm1": (32,), "c": (5, 32), "norm2": (32,), "norm3": (8,)}
STEPS = 4


def trained(kind, state, master, seed=0):
    """(codes by name, float norms and embedding, health of each step) after STEPS steps."""
    generator = torch.Generator().manual_seed(7)
    values = {n: torch.randn(s, generator=generator) * 0.1 for n, s in SHAPES.items()}
    packed = {n: pack(x, levels="row") for n, x in values.items() if x.ndim == 2 and n != "embed_tokens"}
    dtype = torch.bfloat16 if master.startswith("bf16") else torch.float32
    ps = {n: nn.Parameter(x.to(dtype)) for n, x in values.items()}
    adamw = kind(ps, packed, AdamWOptions(state=state, master=master, weight_decay=0.1, chunk_rows=5, seed=seed))
    health = []
    for step in range(STEPS):
        noise = torch.Generator().manual_seed(100 + step)
        for p in ps.values():
            p.grad = torch.randn(p.shape, generator=noise).to(dtype)
        health.append(adamw.step(1e-2))
        stored = adamw.stored()
        changed = 0
        for name, image in packed.items():  # as Session.publish
            new = stored[name] if name in stored else repack_like(ps[name], image, rule="torchao")
            keep_zero_signs(new, image) if name not in stored else None
            changed += int(count_changed(image, new))
            for part, other in zip(image.tensors(), new.tensors(), strict=True):
                part.copy_(other)
        if not adamw.stored():
            health[-1].code_changed = changed / sum(p.codes.numel() * 2 for p in packed.values())
    assert all(p.grad is None for p in ps.values())
    return packed, {n: p.detach() for n, p in ps.items() if n not in packed}, health, adamw


@pytest.mark.parametrize("state", [f for f in FORMATS if f != "nvfp4_two_level"])  # which is stochastic
@pytest.mark.parametrize("master", ["packed", "bf16", "fp32"])
def test_joined_is_chunked_bit_for_bit(state, master):
    ours, theirs = (trained(kind, state, master) for kind in (JoinedAdamW, ChunkedAdamW))
    for name in ours[0]:
        for x, y in zip(ours[0][name].tensors(), theirs[0][name].tensors(), strict=True):
            assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), name
    for name in ours[1]:
        assert torch.equal(ours[1][name], theirs[1][name]), name
    for x, y in zip(ours[2], theirs[2], strict=True):
        assert x.code_changed == pytest.approx(y.code_changed) and x.max_update_over_lr == y.max_update_over_lr
        assert x.update_kept == pytest.approx(y.update_kept) and x.zero_scale == pytest.approx(y.zero_scale)
    assert len(ours[3].groups) == 5 and ours[3].names() == theirs[3].names()


STOCHASTIC = [(m, "fp32") for m in MASTERS if "stochastic" in m or "residual" in m]


@pytest.mark.parametrize("master, state", [*STOCHASTIC, ("packed_stochastic", "nvfp4_two_level")])
def test_dither_is_another_and_as_good(master, state):
    ours, theirs = (trained(kind, state, master)[2][-1] for kind in (JoinedAdamW, ChunkedAdamW))
    assert ours.update_kept == pytest.approx(theirs.update_kept, abs=0.2)
    again, other = trained(JoinedAdamW, state, master), trained(JoinedAdamW, state, master, seed=1)
    assert torch.equal(again[3].groups[0].state.read(0, 9), trained(JoinedAdamW, state, master)[3].groups[0].state.read(0, 9))
    assert not torch.equal(again[3].groups[0].state.read(0, 9), other[3].groups[0].state.read(0, 9))


def test_what_cannot_be_joined_is_refused(compose):
    p = nn.Parameter(torch.randn(4, 32))
    with pytest.raises(ValueError, match="no packed image"):
        JoinedAdamW({"w": p}, {}, AdamWOptions())
    with pytest.raises(ValueError, match="one second-level scale"):
        JoinedAdamW({"w": p}, {"w": pack(p, "nearest", "tensor")}, AdamWOptions())
    for choice in ("weights.levels=tensor", "backend=dense", "step.offload_mv=true", "quirk.pack_everything=true"):
        with pytest.raises(UserError, match=r"step\.join"):
            check(compose("step.join=true", choice))
    check(compose("step.join=true"))
