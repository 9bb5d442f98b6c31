"""step=fused against step=chunked and torch's AdamW: the same losses and weights, without a kept gradient."""

import pytest
import torch
from oracle import SHAPES, hf_model, shape_of, store_of, weights_of

from fp4lab.model import linears
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.model.paths import fp2_model, fused_model, reference_model
from fp4lab.nvfp4 import count_changed, keep_zero_signs, repack_like, unpack
from fp4lab.train import fused, head
from fp4lab.train.adamw import AdamWOptions
from fp4lab.train.batches import IGNORE
from fp4lab.train.chunked import ChunkedAdamW
from fp4lab.train.fused import FusedAdamW
from fp4lab.train.loss import cross_entropy

IDS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(3))
TARGETS = IDS.roll(-1, 1).masked_fill(torch.rand(2, 13, generator=torch.Generator().manual_seed(4)) < 0.3, IGNORE)


def store(name, dtype=torch.float32):
    return store_of(shape_of(name), weights_of(hf_model(name)), dtype, keep_dense=False)


def by_chunks(name, steps, lr=1e-2, dtype=torch.float32, **options):
    """Float masters are packed again after each step, as Session.publish does it."""
    s = store(name, dtype)
    model = fp2_model(s, dtype, dtype)
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = ChunkedAdamW(parameters, s.packed, AdamWOptions(**options))
    losses, health = [], None
    for _ in range(steps):
        loss = cross_entropy(model, model.hidden(IDS), TARGETS)
        losses.append(loss.item())
        loss.backward()
        health = optimizer.step(lr)
        if not optimizer.stored():
            health.code_changed = publish(s, parameters)
        refresh(s, parameters[EMBEDDING])
    return losses, s, dict(model.named_parameters()), health


def fused_steps(name, steps, lr=1e-2, dtype=torch.float32, recompute="none", **options):
    s = store(name, dtype)
    model = fused_model(s, dtype)
    model.recompute = recompute
    optimizer = FusedAdamW(model, s.packed, s.tied, AdamWOptions(**options))
    losses, norms, health = [], [], None
    for _ in range(steps):
        optimizer.begin(lr)
        loss = optimizer.loss(model.hidden(IDS), TARGETS)
        losses.append(loss.item())
        loss.backward()
        assert not any(p.grad is not None for n, p in model.named_parameters() if n == EMBEDDING)
        health, norm = optimizer.finish()
        norms.append(float(norm))
        refresh(s, model.model.embed_tokens.weight)
    return losses, s, dict(model.named_parameters()), health, norms


def publish(s, parameters):
    changed = 0
    for name in s.packed.keys() & parameters.keys():
        old, new = s.packed[name], repack_like(parameters[name], s.packed[name])
        keep_zero_signs(new, old)
        changed += int(count_changed(old, new))
        s.update(name, new)
    return changed / sum(p.codes.numel() * 2 for n, p in s.packed.items() if n in parameters)


def refresh(s, embedding):
    """A tied head is the embedding packed again, as Session.publish does it."""
    if s.tied:
        s.update(HEAD, repack_like(embedding, s.packed[HEAD]))


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("master", ["packed", "packed_stochastic"])
@pytest.mark.parametrize("state", ["nvfp4_two_level", "fp32", "int8"])
def test_fused_is_chunked(name, master, state, monkeypatch):
    """The same losses, the same stored codes but where another order of sums tips one over."""
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 40)
    options = {"master": master, "state": state, "weight_decay": 0.1, "chunk_rows": 16, "max_update": 1.0}
    theirs, chunked, p_chunked, h_chunked = by_chunks(name, 8, 3e-3, **options)
    ours, s, p_fused, h_fused, _ = fused_steps(name, 8, 3e-3, **options)
    assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-3)
    assert ours[-1] < 0.9 * ours[0]
    torch.testing.assert_close(p_fused[EMBEDDING].detach(), p_chunked[EMBEDDING].detach(), atol=2e-2, rtol=0)
    assert h_fused.zero_scale.keys() == h_chunked.zero_scale.keys()
    assert h_fused.code_changed == pytest.approx(h_chunked.code_changed, abs=0.03)
    for key in s.packed:
        same = (s.packed[key].codes == chunked.packed[key].codes).float().mean()
        assert same > 0.9, key


@pytest.mark.parametrize("name", SHAPES)
def test_one_step_is_bit_equal_where_the_order_of_sums_is(name, monkeypatch):
    """One chunk of the vocabulary, one step: every packed linear has the bytes that step=chunked gives it."""
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 96)
    _, chunked, _, _ = by_chunks(name, 1, master="packed", state="fp32")
    _, s, _, health, _ = fused_steps(name, 1, master="packed", state="fp32")
    equal = [torch.equal(s.packed[k].codes, chunked.packed[k].codes) for k in s.packed]
    assert sum(equal) >= len(equal) - 1 and health.code_changed > 0


@pytest.mark.parametrize("chunk", [7, 32, 96, 500])
@pytest.mark.parametrize("name", SHAPES)
def test_the_chunked_loss_is_torchs_and_so_is_the_norm(name, chunk, monkeypatch):
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", chunk)
    s = store(name)
    dense = fp2_model(s, torch.float32, torch.float32)
    loss = cross_entropy(dense, dense.hidden(IDS), TARGETS)
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in dense.parameters()]).norm()
    losses, _, _, _, norms = fused_steps(name, 1, master="packed")
    assert losses[0] == pytest.approx(loss.item(), rel=1e-6)
    assert norms[0] == pytest.approx(float(norm), rel=1e-5)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("way, share", [("block", 0.34), ("selective", 0.85)])
def test_recomputing_changes_nothing_but_what_is_kept(name, way, share):
    """The same bytes after 3 steps, and fewer of them saved for the backward."""
    options = {"master": "packed", "state": "fp32"}
    plain, a, _, _, _ = fused_steps(name, 3, **options)
    again, b, _, _, _ = fused_steps(name, 3, recompute=way, **options)
    assert plain == again
    assert all(torch.equal(a.packed[k].codes, b.packed[k].codes) for k in a.packed)
    kept = {}
    for recompute in ("none", way):
        s = store(name)
        model = fused_model(s, torch.float32)
        model.recompute = recompute
        count = [0]

        def pack(t, count=count):
            count[0] += t.nbytes
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.hidden(IDS)
        kept[recompute] = count[0]
    assert kept[way] < kept["none"] * share


@pytest.mark.parametrize("way, again", [("none", 0), ("block", 6), ("selective", 2)])
def test_what_is_computed_again_leaves_out_the_last_product(way, again, monkeypatch):
    """Of a block its down projection: only its input is wanted."""
    s = store("untied, 4 groups")
    model = fused_model(s, torch.float32)
    model.recompute = way
    optimizer, products = FusedAdamW(model, s.packed, s.tied, AdamWOptions(master="packed")), []
    real = linears.matmul
    monkeypatch.setattr(linears, "matmul", lambda x, p, decoded=None: products.append(p) or real(x, p, decoded))
    optimizer.begin(1e-3)
    optimizer.loss(model.hidden(IDS), TARGETS).backward()
    layers = len(model.model.layers)
    assert len(products) == layers * (7 + again)
    assert all(m.decoded is None and not m.again for m in model.modules() if isinstance(m, linears.ConsumingLinear))


@pytest.mark.parametrize("room, count", [(0, 6), (3040, 5), (6080, 4), (1 << 30, 3)])
def test_logits_that_are_kept_are_those_that_would_be_computed_again(room, count, monkeypatch):
    """Of three chunks of the vocabulary, 3,040 bytes of 19 positions each."""
    monkeypatch.setattr(head, "VOCABULARY_CHUNK", 40)
    expected, s, _, _, _ = fused_steps("untied, 4 groups", 2)
    products, real = [], head.matmul
    monkeypatch.setattr(fused, "room", lambda *args: room)
    monkeypatch.setattr(head, "matmul", lambda x, *rest: products.append(len(x)) or real(x, *rest))
    losses, other, _, _, _ = fused_steps("untied, 4 groups", 2)
    assert products == [19] * (2 * count)
    assert losses == expected and all(torch.equal(s.packed[k].codes, other.packed[k].codes) for k in s.packed)


def test_no_logits_are_kept_where_no_backward_follows(monkeypatch):
    s = store("untied, 4 groups")
    model = fused_model(s, torch.float32)
    optimizer, heads = FusedAdamW(model, s.packed, s.tied, AdamWOptions()), []
    monkeypatch.setattr(fused, "Head", lambda *args: heads.append(head.Head(*args)) or heads[-1])
    with torch.no_grad():
        optimizer.loss(model.hidden(IDS), TARGETS)
    assert heads[0].room == 0
    optimizer.loss(model.hidden(IDS), TARGETS)
    assert heads[1].room < fused.room(model.config, 19, 4, "none")


def test_no_gradient_of_a_linear_outlives_its_update(monkeypatch):
    """Each gradient that arrives is the only one alive."""
    import gc
    import weakref

    s = store("untied, 4 groups")
    model = fused_model(s, torch.float32)
    optimizer = FusedAdamW(model, s.packed, s.tied, AdamWOptions(master="packed"))
    alive: list = []
    consume = optimizer.consume

    def watch(name, grad, first=0):
        gc.collect()
        assert not [name_ for name_, ref in alive if ref() is not None]
        alive.append((name, weakref.ref(grad)))
        consume(name, grad, first)

    for key, module in model.named_modules():
        if hasattr(module, "packed") and key != "lm_head":
            module.consume = lambda dy, x, key=key: watch(f"{key}.weight", dy.T @ x)
    optimizer.begin(1e-3)
    optimizer.loss(model.hidden(IDS), TARGETS).backward()
    assert len(alive) == 14


def test_fused_with_exact_state_follows_torchs_adamw():
    """Norms and embedding have fp32 masters and moments: theirs is AdamW's first step."""
    name = "tied, 4 groups, other theta"
    s = store(name)
    dense = fp2_model(s, torch.float32, torch.float32)
    adamw = torch.optim.AdamW(dense.parameters(), lr=1e-2, weight_decay=0.1)
    cross_entropy(dense, dense.hidden(IDS), TARGETS).backward()
    adamw.step()
    _, _, parameters, _, _ = fused_steps(name, 1, master="packed", weight_decay=0.1)
    theirs = dict(dense.named_parameters())
    for key, p in parameters.items():
        torch.testing.assert_close(p.detach(), theirs[key].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_a_packed_embedding_is_trained_and_a_tied_head_is_its_bytes(name):
    """One gradient of head and lookup together, against autograd's through the dequantised table."""
    shape, weights = shape_of(name), weights_of(hf_model(name))
    s = store_of(shape, weights, keep_dense=False, pack_embedding=True)
    assert EMBEDDING not in s.raw and (s.packed[HEAD] is s.packed[EMBEDDING]) == s.tied
    dense = {n: unpack(p) for n, p in s.packed.items() if not (s.tied and n == HEAD)} | dict(s.raw)
    oracle = reference_model(store_of(shape, dense), torch.float32)
    table = torch.nn.Parameter(dense[EMBEDDING].clone())
    oracle.model.embed_tokens.weight = table
    if s.tied:
        oracle.lm_head.weight = table
    expected = cross_entropy(oracle, oracle.hidden(IDS), TARGETS)
    expected.backward()
    model = fused_model(s, torch.float32)
    optimizer = FusedAdamW(model, s.packed, s.tied, AdamWOptions(master="packed", state="fp32", chunk_rows=16))
    got = torch.zeros_like(table)
    consume = optimizer.consume

    def watch(key, grad, first=0):
        if key == EMBEDDING:
            got[first : first + len(grad)] = grad
        consume(key, grad, first)

    optimizer.consume = watch
    optimizer.begin(1e-2)
    before = s.packed[EMBEDDING].codes.clone()
    loss = optimizer.loss(model.hidden(IDS), TARGETS)
    loss.backward()
    health, _ = optimizer.finish()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(got, table.grad, atol=1e-5, rtol=1e-4)
    assert not torch.equal(s.packed[EMBEDDING].codes, before) and health.code_changed > 0
    assert EMBEDDING in optimizer.stored() and (HEAD in optimizer.stored()) != s.tied


def test_a_model_that_keeps_gradients_is_refused():
    s = store("untied, 4 groups")
    with pytest.raises(ValueError, match="keeps gradients"):
        FusedAdamW(fp2_model(s, torch.float32, torch.float32), s.packed, s.tied, AdamWOptions())
    assert unpack(s.packed[HEAD]).shape == (96, 64)
