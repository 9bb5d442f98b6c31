"""Joint linears: one launch for q, k and v, and one for gate and up, with the bits and the gradients of several."""

import pytest
import torch
from test_layer_kernels import BF16, compare
from test_streams import SHAPE

from fp4lab.model import layers
from fp4lab.model.config import Qwen3Config
from fp4lab.model.linears import ConsumingLinear
from fp4lab.model.paths import fused_model
from fp4lab.model.store import build_store, concat_rows, random_weights
from fp4lab.nvfp4 import pack
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.fused import FusedAdamW
from fp4lab.train.graph import GraphedStep
from fp4lab.train.kernel_step import Joint, KernelStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("shape", [(1, 8, 4, 2, 128), (2, 13, 8, 4, 64), (1, 700, 32, 8, 128), (1, 5, 3, 1, 48)])
def test_heads(shape):
    batch, length, queries, keys, width = shape
    y = torch.randn(batch, length, (queries + 2 * keys) * width, device="cuda", dtype=BF16)
    weights = [torch.rand(width, device="cuda", dtype=BF16) + 0.5 for _ in range(2)]
    rope = layers.Rope(width, 1e6, "cuda")

    for part in range(3):

        def one(y, a, b, part=part):
            return layers.heads(y, a, b, 1e-6, *rope.table(3, length, y.dtype), queries, keys)[part]

        got = one(y, *weights)
        assert got.shape == (batch, queries if part == 0 else keys, length, width)
        if part == 2:
            assert torch.equal(got, y.view(batch, length, -1, width)[:, :, queries + keys :].transpose(1, 2))
    compare(
        lambda y, a, b: torch.cat(layers.heads(y, a, b, 1e-6, *rope.table(3, length, y.dtype), queries, keys), dim=1),
        [y, *weights],
        atol=2**-7,
        equal=0.85,  # the rotation's products are rounded one by one here, and fused by torch
        of_mean=2**-5,  # cosines in bf16 against doubles
    )
    cos, sin = rope.table(3, length, y.dtype)
    q, k, _ = layers.heads(y, *weights, 1e-6, cos, sin, queries, keys)
    parts = y.view(batch, length, -1, width).split((queries, keys, keys), dim=2)
    for got, part, weight in zip((q, k), parts, weights, strict=False):  # the separate kernels
        assert (got == layers.rotate(layers.rms_norm(part, weight, 1e-6).transpose(1, 2), cos, sin)).float().mean() > 0.999


@pytest.mark.parametrize("width", [9728, 300])
def test_joint_silu_mul(width):
    both = torch.randn(2, 5, 2 * width, device="cuda", dtype=BF16) * 2
    compare(layers.joint_silu_mul, [both])
    assert torch.equal(layers.joint_silu_mul(both), layers.silu_mul(*(x.contiguous() for x in both.chunk(2, dim=-1))))


@pytest.mark.parametrize("activations", ["none", "nvfp4"])
@pytest.mark.parametrize("again", [False, True])
def test_a_gate_that_is_written_over_has_the_bits_of_one_that_is_kept(again, activations):
    packed = pack(torch.randn(256, 320, device="cuda") * 0.05, "torchao")
    start, dy = torch.randn(2, 40, 640, device="cuda", dtype=BF16), torch.randn(2, 40, 256, device="cuda", dtype=BF16)
    results = []
    for over in (False, True):
        linear, taken = ConsumingLinear(packed, activations), []
        linear.consume = lambda *parts, taken=taken: taken.extend(t.clone() for t in parts)
        leaf = start.clone().requires_grad_()
        both = leaf * 1
        linear.again = linear.last = again
        y = linear.gated(both) if over else linear(layers.joint_silu_mul(both))
        assert y.shape == dy.shape
        (grad,) = torch.autograd.grad(y, leaf, dy)
        results.append([grad, *taken] if again else [y, grad, *taken])
    assert len(results[0]) == (3 if again else 4)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def built(joint: bool, master: str = "packed_stochastic", state: str = "nvfp4_two_level"):
    shape = Qwen3Config.from_dict(SHAPE, "test")
    names, get = random_weights(shape, 0, "cuda", BF16)
    store = build_store(
        *(shape, names, get),
        **{"device": "cuda", "dtype": BF16, "quantise": lambda t: pack(t, "torchao"), "keep_dense": False},
        **{"source": "test", "pack_embedding": True},
    )
    model = fused_model(store, BF16, joint=joint)
    return model, FusedAdamW(model, store.packed, store.tied, AdamWOptions(seed=1, master=master, state=state))


@pytest.mark.parametrize("state", ["nvfp4_two_level", "bf16"])
@pytest.mark.parametrize("master", ["packed", "packed_stochastic"])
def test_one_launch_has_the_bits_of_three(master, state):
    results = []
    for joint in (False, True):
        optimizer = built(False, master, state)[1]
        names = [f"model.layers.1.self_attn.{x}_proj.weight" for x in "qkv"]
        states = [optimizer.states[n] for n in names]
        whole = Joint(states, optimizer_rows(optimizer, names)) if joint else None
        fast = optimizer.fast
        assert isinstance(fast, KernelStep)
        for step in (1, 2, 3):
            fast.set(step, 1e-3)
            torch.manual_seed(step)
            grad = torch.randn(sum(s.rows for s in states), states[0].cols, device="cuda", dtype=BF16)
            if whole is not None:
                fast.update_joint(whole, grad)
            else:
                for s, part in zip(states, grad.split([s.rows for s in states]), strict=True):
                    fast.update(s, part, 0)
        parts = [t for s in states for kind, t in s.tensors()]
        results.append(([t.cpu().contiguous().view(torch.uint8) for t in parts], fast.counts.sum(0)))
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[1][0], strict=True))
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=0)


def optimizer_rows(optimizer, names):
    """One buffer, of which the packed weights `names` become rows."""
    whole = concat_rows([optimizer.states[n].packed for n in names])
    start = 0
    for n in names:
        s = optimizer.states[n]
        s.packed, start = whole.rows(start, start + s.rows), start + s.rows
    return whole


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_training_is_the_same_to_rounding_and_the_same_again(recompute):
    ids = torch.randint(0, 4096, (1, 41), generator=torch.Generator().manual_seed(2))
    losses = []
    for joint in (False, True, True):
        model, optimizer = built(joint)
        model.recompute = recompute
        assert ("15 of them joined to 6" in optimizer.describe()) is joint
        step = GraphedStep(model, optimizer)
        losses.append([step.step(1e-3, ids[:, :-1], ids[:, 1:]).item() for _ in range(8)])
        assert optimizer.names() == list(built(False)[1].names())
    assert losses[1] == losses[2] and losses[1][-1] < 0.8 * losses[1][0]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
