"""Updates on streams beside the backward's: the bits of one stream, and inputs that outlive their work."""

import pytest
import torch

from fp4lab.model.config import Qwen3Config
from fp4lab.model.paths import fused_model
from fp4lab.model.store import build_store, random_weights
from fp4lab.nvfp4 import pack
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.beside import Beside
from fp4lab.train.fused import FusedAdamW
from fp4lab.train.graph import GraphedStep

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = {
    **{"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 3, "num_attention_heads": 8},
    **{"num_key_value_heads": 4, "head_dim": 64, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True},
    **{"max_position_embeddings": 1024},
}


def trained(streams, eager, recompute="none", length=8, steps=5, all_wait=False):
    """Losses and the stored bytes after some steps."""
    shape = Qwen3Config.from_dict(SHAPE, "test")
    names, get = random_weights(shape, 0, "cuda", torch.bfloat16)
    store = build_store(
        *(shape, names, get),
        **{"device": "cuda", "dtype": torch.bfloat16, "quantise": lambda t: pack(t, "torchao"), "keep_dense": False},
        **{"source": "test", "pack_embedding": True},
    )
    model = fused_model(store, torch.bfloat16)
    model.recompute = recompute
    optimizer = FusedAdamW(model, store.packed, store.tied, AdamWOptions(streams=streams, seed=1))
    if all_wait:
        optimizer.fast.why_not_some = lambda state: "all rows of the head are to wait for the lookup"
    step = GraphedStep(model, optimizer, eager=eager)
    ids = torch.randint(0, 4096, (1, length + 1), generator=torch.Generator().manual_seed(2), device="cpu")
    losses = [step.step(1e-3, ids[:, :-1], ids[:, 1:]).item() for _ in range(steps)]
    torch.cuda.synchronize()
    return losses, {n: p.codes.cpu() for n, p in optimizer.stored().items()}


@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_streams_change_no_bit(eager, recompute):
    losses, codes = trained(0, True)
    assert losses[-1] < losses[0]
    for streams in (1, 2, 3):
        again, others = trained(streams, eager, recompute)
        assert again == losses
        assert all(torch.equal(codes[n], others[n]) for n in codes)


@pytest.mark.parametrize("eager", [True, False])
def test_rows_of_a_tied_head_that_need_not_wait_have_the_bits_of_those_that_do(eager):
    losses, codes = trained(2, eager, length=200, all_wait=True)
    again, others = trained(2, eager, length=200)
    assert again == losses and losses[-1] < losses[0]
    assert all(torch.equal(codes[n], others[n]) for n in codes)


def test_an_input_is_not_reused_before_its_work_is_done():
    """Its memory would be the next tensor's, on the main stream, while the work beside it still waits."""
    beside, kept = Beside(torch.device("cuda"), 2), []
    for i in range(20):
        x = torch.full((1 << 20,), float(i), device="cuda")

        def work(x=x):
            torch.cuda._sleep(2_000_000)
            kept.append(x.sum())

        beside.run(work, x)
        del x, work
    beside.join()
    assert [float(t) for t in kept] == [float(i) * (1 << 20) for i in range(20)]
