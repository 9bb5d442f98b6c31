"""A vocabulary chunk's cross-entropy against torch's own, on the GPU."""

import pytest
import torch

from fp4lab.train.head import TiedRows
from fp4lab.train.head_kernel import add_chunk, add_rows_, softmax_grad_, take

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("n, vocab, chunk", [(1, 1000, 1000), (8, 20000, 8192), (70, 5000, 768), (3, 30000, 30000)])
def test_chunks_make_the_loss_and_its_gradient(n, vocab, chunk):
    logits = 5 * torch.randn(n, vocab, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, vocab, (n,), device="cuda")
    targets[0], targets[-1] = 0, vocab - 1
    exact = logits.double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    scale = torch.rand(n, 1, device="cuda")
    loss.backward(scale[:, 0].double())
    lse, right = torch.full((n,), -torch.inf, device="cuda"), torch.zeros(n, device="cuda")
    pieces = [(start, min(start + chunk, vocab)) for start in range(0, vocab, chunk)]
    assert take(logits)
    for start, stop in pieces:
        add_chunk(logits[:, start:stop].contiguous(), targets, start, lse, right)
    torch.testing.assert_close((lse - right).double(), loss, rtol=1e-6, atol=1e-5)
    grads = [softmax_grad_(logits[:, a:b].contiguous(), targets, a, lse, scale) for a, b in pieces]
    torch.testing.assert_close(torch.cat(grads, 1).double(), exact.grad, rtol=2**-8, atol=1e-7)


def test_what_is_no_number_stays_none():
    logits = torch.zeros(2, 64, device="cuda", dtype=torch.bfloat16)
    logits[1, 7] = torch.nan
    lse, right = torch.full((2,), -torch.inf, device="cuda"), torch.zeros(2, device="cuda")
    add_chunk(logits, torch.zeros(2, device="cuda", dtype=torch.int64), 0, lse, right)
    assert lse[0].isfinite() and lse[1].isnan()


def test_rows_of_an_id_are_added_up_whatever_their_order():
    ids = torch.randint(20, 90, (300,), device="cuda")
    rows = torch.randn(300, 96, device="cuda", dtype=torch.bfloat16)
    before = torch.randn(50, 96, device="cuda", dtype=torch.bfloat16)
    ordered, order = ids.sort(stable=True)
    results = []
    for _ in range(2):
        grad = before.clone()
        add_rows_(grad, 30, ordered, order, rows)  # of the ids 30..79
        results.append(grad)
    here = (ids >= 30) & (ids < 80)
    want = before.double().index_add(0, ids[here] - 30, rows[here].double())
    torch.testing.assert_close(results[0].double(), want, rtol=2**-8, atol=1e-6)
    assert torch.equal(*results)


def test_rows_that_were_looked_up_wait_for_both_of_their_gradients():
    ids = torch.randint(20, 90, (60,), device="cuda")
    head = torch.randn(100, 96, device="cuda", dtype=torch.bfloat16)
    rows = torch.randn(60, 96, device="cuda", dtype=torch.bfloat16)
    waiting = TiedRows(ids, 100, head)
    for start, stop in ((40, 80), (0, 40), (80, 100)):
        waiting.take(head[start:stop].contiguous(), start)
    waiting.add(rows)
    distinct = ids.unique()
    assert waiting.names.tolist() == distinct.tolist() + [-1] * (60 - len(distinct))
    at_once = head.clone()
    ordered, order = ids.sort(stable=True)
    add_rows_(at_once, 0, ordered, order, rows)
    assert torch.equal(waiting.grad[: len(distinct)], at_once[distinct])
