import itertools
from collections import Counter
from pathlib import Path

import pytest
import torch

from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.errors import UserError
from fp4lab.train.batches import IGNORE, batches, pack_rows
from fp4lab.train.data import Sample, load_samples

ROOT = Path(__file__).parents[2]
PAD = 9


def sample(start: int, length: int) -> Sample:
    ids = list(range(start, start + length))
    return Sample(ids, [i + 1 for i in ids], [at > 0 for at in range(length)], f"s:{start}")


def test_packed_rows_hold_whole_samples_with_a_separator():
    a, b = sample(100, 3), sample(200, 4)
    (batch,) = batches([a, b], 2, PAD, seed=0, seq_len=8)
    assert batch.ids.shape == batch.targets.shape == (2, 8)
    assert batch.ids.dtype == batch.targets.dtype == torch.int64
    row = {100: ([100, 101, 102], [IGNORE, 102, 103]), 200: ([200, 201, 202, 203], [IGNORE, 202, 203, 204])}
    first, second = (row[k] for k in ((100, 200) if batch.ids[0, 0] == 100 else (200, 100)))
    assert batch.ids[0].tolist() == [*first[0], PAD, *second[0]]
    assert batch.targets[0].tolist() == [*first[1], IGNORE, *second[1]]
    assert batch.ids[1].tolist() == [PAD] * 8 and batch.targets[1].tolist() == [IGNORE] * 8
    lengths = [len(first[0]), len(second[0])]
    assert batch.segments is not None and batch.segments[0].tolist() == [1] * lengths[0] + [0] + [2] * lengths[1]
    assert batch.segments[1].tolist() == [0] * 8 and set(batch.sources) == {"s:100", "s:200"}


def test_parts_have_all_rows_in_which_something_counts():
    samples = [sample(100 * n, 3 + n) for n in range(1, 6)]
    (batch,) = batches(samples, 8, PAD, seed=1, seq_len=8)
    parts = batch.parts(3)
    counted = batch.ids[(batch.targets != IGNORE).any(dim=1)]
    assert 1 < len(parts) <= 3 and torch.equal(torch.cat([p.ids for p in parts])[: len(counted)], counted)
    assert all(p.segments is not None and p.segments.shape == p.ids.shape for p in parts)
    (whole,) = batch.parts(1)
    assert torch.equal(whole.ids, batch.ids) and torch.equal(whole.targets, batch.targets)


@pytest.mark.parametrize("pack", [True, False])
def test_in_order_means_in_order(pack):
    """Small samples would fit into earlier rows, and like lengths would go together."""
    samples = [sample(100 * n, length) for n, length in enumerate([7, 2, 6, 1, 1, 5, 3], start=1)]
    made = list(batches(samples, 2, PAD, seed=1, epochs=2, seq_len=8, pack=pack, order="sequential"))
    assert [s for b in made for s in b.sources] == [s.source for s in samples] * 2


def test_a_sample_may_fill_a_row_exactly_but_not_overflow_it():
    full, other = sample(100, 8), sample(200, 7)
    assert sorted(len(row) for row in pack_rows([full, other, sample(300, 1)], 8)) == [1, 1, 1]
    with pytest.raises(UserError, match="8 tokens but seq_len is 7"):
        next(batches([full], 1, PAD, seed=0, seq_len=7))


@pytest.mark.parametrize("pack", [True, False])
def test_every_counted_target_once_an_epoch(pack):
    tokenizer = Tokenizer.load(ROOT / "models" / "tiny")
    samples = load_samples(ROOT / "data" / "dialogues" / "openers.jsonl", tokenizer, 256)
    wanted = Counter(t for s in samples for t, m in zip(s.targets, s.loss_mask, strict=True) if m)
    made = list(batches(samples, 16, tokenizer.endoftext, seed=3, pack=pack))
    got = Counter(torch.cat([b.targets.flatten() for b in made]).tolist())
    del got[IGNORE]
    assert got == wanted
    used = sum(len(s) for s in samples) / sum(b.ids.numel() for b in made)
    assert used > 0.85  # little padding
    for batch in made:  # inside a sample the target is the next input
        ids, targets = batch.ids[:, 1:], batch.targets[:, :-1]
        inside = (targets != IGNORE) & (ids != tokenizer.endoftext)
        assert torch.equal(ids[inside], targets[inside])


def test_epochs_differ_and_seeds_repeat():
    samples = [sample(100 * n, 3) for n in range(1, 9)]
    run = [b.ids for b in batches(samples, 2, PAD, seed=5, epochs=2, seq_len=3)]
    again = [b.ids for b in batches(samples, 2, PAD, seed=5, epochs=2, seq_len=3)]
    assert len(run) == 8 and all(torch.equal(a, b) for a, b in zip(run, again, strict=True))
    assert not torch.equal(torch.cat(run[:4]), torch.cat(run[4:]))
    endless = list(itertools.islice(batches(samples, 2, PAD, seed=5, epochs=None, seq_len=3), 20))
    assert torch.equal(endless[7].ids, run[7])


def test_nothing_to_batch():
    with pytest.raises(UserError, match="no samples"):
        next(batches([], 1, PAD, seed=0))
    with pytest.raises(UserError, match="batch size 0"):
        next(batches([sample(1, 2)], 0, PAD, seed=0))
