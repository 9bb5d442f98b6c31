"""State that lies on the host is decoded and encoded on the GPU: the same bytes as state that lies there."""

import pytest
import torch
from torch import nn

from fp4lab.nvfp4 import pack, unpack
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.state import FORMATS

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def after_three_steps(**options) -> dict[str, torch.Tensor]:
    """The stored bytes by kind, the float image, and the counters of the last step."""
    torch.manual_seed(1)
    weight = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16)
    ps = {"w": nn.Parameter(weight.clone())}
    adamw = ChunkedAdamW(ps, {"w": pack(weight)}, AdamWOptions(**options))
    for _ in range(3):
        ps["w"].grad = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16)
        health = adamw.step(1e-2)
    held = dict(adamw.tensors())
    assert {t.device.type for t in held.values()} == {"cpu" if options.get("offload_w") else "cuda"}
    stored = adamw.stored()["w"]
    assert torch.equal(ps["w"].detach(), unpack(stored.to("cuda"), torch.bfloat16))
    counts = torch.tensor([health.code_changed, health.update_lost, *health.zero_scale.values()], dtype=torch.float64)
    return {k: t.cpu().contiguous().view(torch.uint8) for k, t in held.items()} | {"counts": counts}


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("master", ["packed", "packed_stochastic", "packed_residual"])
@pytest.mark.parametrize("state", FORMATS)
def test_offloaded_state_is_the_same_bytes_whatever_the_chunks(state, master, kernels):
    choice = {"state": state, "master": master, "kernels": kernels}
    here = after_three_steps(chunk_rows=64, **choice)
    there = after_three_steps(chunk_rows=16, offload_mv=True, offload_w=True, offload_grad=True, **choice)
    for kind, t in here.items():
        assert torch.equal(t, there[kind]), kind


def test_a_chunk_is_one_kernel_where_there_is_one():
    options = AdamWOptions(kernels=True)
    weight = torch.randn(40, 96, device="cuda", dtype=torch.bfloat16)
    ps = {"w": nn.Parameter(weight), "norm": nn.Parameter(torch.ones(96, device="cuda"))}
    said = ChunkedAdamW(ps, {"w": pack(weight)}, options).describe()
    assert said == "one Triton kernel updates each chunk of 1 matrices; 1 by plain torch, it is kept in fp32"
