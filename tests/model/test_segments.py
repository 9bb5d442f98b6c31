"""Segments: samples that share a row are computed as if each had its own; padding is never seen."""

import pytest
import torch

from fp4lab.model.layers import within
from fp4lab.tasks.session import open_session


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(3, 4000, (3, 12), generator=torch.Generator().manual_seed(2))


def test_who_sees_whom():
    seen = within(torch.tensor([[1, 1, 2, 0]]))[0, 0].int().tolist()
    assert seen == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("recompute", ["none", "block", "selective"])
def test_a_packed_row_is_its_samples(compose, tokens, recompute):
    model = open_session(compose("dtype=float32", f"recompute={recompute}", "step=dense"), lambda e: None).model
    row = tokens.reshape(1, -1)
    segments = torch.arange(3).repeat_interleave(12).reshape(1, -1)
    packed, alone = model.hidden(row, segments=segments), model.hidden(tokens)
    assert torch.allclose(packed.reshape(alone.shape), alone, atol=1e-4)
    assert not torch.allclose(model.hidden(row).reshape(alone.shape)[1:], alone[1:], atol=1e-1)  # without, they leak
    grads = []
    for hidden in (packed, alone):
        model.zero_grad()
        hidden.square().sum().backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


def test_padding_at_the_end_changes_nothing(compose, tokens):
    model = open_session(compose("dtype=float32"), lambda e: None).model
    padded = torch.cat((tokens, torch.zeros(3, 5, dtype=torch.int64)), dim=1)
    with torch.no_grad():
        assert torch.allclose(model.hidden(padded)[:, :12], model.hidden(tokens), atol=1e-5)
