"""step=fused over joint linears (what runs on a GPU), in plain torch: the same model, parameters and steps."""

import pytest
import torch
from oracle import SHAPES, hf_model, shape_of, store_of, weights_of

from fp4lab.model import layers
from fp4lab.model.linears import ConsumingLinear
from fp4lab.model.paths import fused_model
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.fused import FusedAdamW

IDS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(3))


def trained(name, joint, steps=5, frozen=frozenset(), recompute="none", **options):
    store = store_of(shape_of(name), weights_of(hf_model(name)), torch.float32, keep_dense=False)
    model = fused_model(store, torch.float32, joint=joint)
    model.recompute = recompute
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and n not in frozen)
    optimizer = FusedAdamW(model, store.packed, store.tied, AdamWOptions(**options), frozen=frozen)
    losses = []
    for _ in range(steps):
        optimizer.begin(1e-2)
        loss = optimizer.loss(model.hidden(IDS[:, :-1]), IDS[:, 1:])
        losses.append(loss.item())
        loss.backward()
        optimizer.finish()
    return losses, optimizer, model


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
@pytest.mark.parametrize("name", list(SHAPES))
def test_joint_linears_are_the_separate_ones(name, recompute):
    losses, optimizer, _ = trained(name, True, recompute=recompute)
    expected, other, _ = trained(name, False)
    assert losses == pytest.approx(expected, rel=2e-3)  # the input's gradient is one sum, not three
    assert losses[0] == pytest.approx(expected[0], rel=1e-6) and losses[-1] < losses[0]
    assert optimizer.names() == other.names() and list(optimizer.stored()) == list(other.stored())
    assert [s.index for s in optimizer.states.values()] == [s.index for s in other.states.values()]


def test_a_group_learns_as_a_whole():
    name = next(iter(SHAPES))
    first = frozenset(f"model.layers.0.{x}.weight" for x in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
    _, optimizer, model = trained(name, True, steps=1, frozen=first)
    assert not first & set(optimizer.names()) and "model.layers.0.mlp.up_proj.weight" in optimizer.names()
    joint = [m for m in model.modules() if isinstance(m, ConsumingLinear) and m.members]
    assert [m.frozen for m in joint if first.issuperset(m.members)] == [True]
    with pytest.raises(AssertionError, match="some learn and some do not"):
        trained(name, True, steps=1, frozen=frozenset(list(first)[:1]))


def test_heads_of_a_joint_product():
    y, rope = torch.randn(2, 5, (4 + 2 * 2) * 16), layers.Rope(16, 1e4, "cpu")
    weights = torch.rand(16) + 0.5, torch.rand(16) + 0.5
    cos, sin = rope.table(0, 5, y.dtype)
    q, k, v = layers.heads(y, *weights, 1e-6, cos, sin, 4, 2)
    parts = y.view(2, 5, 8, 16)
    assert torch.equal(q, layers.rotate(layers.rms_norm(parts[:, :, :4], weights[0], 1e-6).transpose(1, 2), cos, sin))
    assert torch.equal(k, layers.rotate(layers.rms_norm(parts[:, :, 4:6], weights[1], 1e-6).transpose(1, 2), cos, sin))
    assert torch.equal(v, parts[:, :, 6:].transpose(1, 2))
