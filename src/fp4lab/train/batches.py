"""Many samples to tensors: rows of whole samples, padding and prompts masked out of the loss."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from fp4lab.errors import UserError
from fp4lab.train.data import Sample, ordered

IGNORE = -100  # what torch.nn.functional.cross_entropy leaves out
OPEN_ROWS = 64  # rows that may still take a sample while packing
BUCKET = 32  # batches whose samples are sorted by length together


class Batch(NamedTuple):
    """`ids` and `targets`, both int64 [rows, T]; `targets` is -100 where there is no loss.

    `segments` [rows, T] numbers the samples of packed rows (0: padding); `sources` names the samples, file:line.
    """

    ids: torch.Tensor
    targets: torch.Tensor
    segments: torch.Tensor | None = None
    sources: tuple[str, ...] = ()

    def parts(self, count: int) -> list[Batch]:
        """The rows in at most `count` parts of like size, without `sources`; none in which nothing counts."""
        segments = [None] * count if self.segments is None else self.segments.chunk(count)
        split = zip(self.ids.chunk(count), self.targets.chunk(count), segments, strict=False)
        return [Batch(*part) for part in split if (part[1] != IGNORE).any()]


def batches(
    samples: Sequence[Sample],
    batch_size: int,
    pad_id: int,
    seed: int,
    epochs: int | None = 1,
    seq_len: int | None = None,
    pack: bool = True,
    order: str = "random",
) -> Iterator[Batch]:
    """Batches over `epochs` passes (None: without end), a different order in each.

    `pack=True`: [batch_size, seq_len] always. A row holds as many whole samples as fit, with `pad_id`
    (<|endoftext|>) between them as in pretraining; `segments` keep them apart where the model is given them. The
    last batch of a pass is filled up with empty rows. `pack=False`: one sample a row, samples of like length together,
    [<= batch_size, longest of the batch]. Padding comes last, where causal attention does not see it.

    `order="sequential"`: samples as they are, in every pass.

    `seq_len` defaults to the longest sample. Raises UserError if there is no sample or one is too long.
    """
    longest = max((len(s) for s in samples), default=0)
    seq_len = longest if seq_len is None else seq_len
    if not samples:
        raise UserError("no samples to train on; check data.path and its split")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: expected at least 1")
    if longest > seq_len:
        raise UserError(f"a sample has {longest} tokens but seq_len is {seq_len}; load the data with that seq_len")
    for epoch in itertools.count() if epochs is None else range(epochs):
        pass_over = ordered(samples, seed, order, epoch)
        if pack:
            rows = pack_rows(pass_over, seq_len, in_order=order == "sequential")
            for start in range(0, len(rows), batch_size):
                chosen = rows[start : start + batch_size]
                yield _tensors(chosen + [[]] * (batch_size - len(chosen)), seq_len, pad_id, pack)
        else:
            if order == "random":
                groups = _by_length(pass_over, batch_size)
                random.Random(f"{seed}:{epoch}:groups").shuffle(groups)
            else:
                groups = _groups(pass_over, batch_size)
            for group in groups:
                yield _tensors([[s] for s in group], max(len(s) for s in group), pad_id, pack)


def pack_rows(samples: Sequence[Sample], seq_len: int, in_order: bool = False) -> list[list[Sample]]:
    """Greedy best fit: each sample goes into the open row that it fills most, else into a new one.

    `in_order`: only the last row is open, so that the samples stay in their order.
    """
    done: list[list[Sample]] = []
    rows: list[list[Sample]] = []
    room: list[int] = []  # left in each open row
    for sample in samples:
        fits = [(left - len(sample), at) for at, left in enumerate(room) if left >= len(sample)]
        if in_order:
            fits = [(left, at) for left, at in fits if at == len(rows) - 1]
        if fits:
            _, at = min(fits)
            rows[at].append(sample)
            room[at] -= len(sample) + 1  # one more for the separator
        else:
            rows.append([sample])
            room.append(seq_len - len(sample) - 1)
        if len(rows) > OPEN_ROWS and not in_order:
            fullest = min(range(len(room)), key=room.__getitem__)
            done.append(rows.pop(fullest))
            room.pop(fullest)
    return done + rows


def _groups(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    return [list(samples[at : at + batch_size]) for at in range(0, len(samples), batch_size)]


def _by_length(samples: Sequence[Sample], batch_size: int) -> list[list[Sample]]:
    groups = []
    for start in range(0, len(samples), batch_size * BUCKET):
        near = sorted(samples[start : start + batch_size * BUCKET], key=len)
        groups += _groups(near, batch_size)
    return groups


def _tensors(rows: list[list[Sample]], length: int, pad_id: int, pack: bool) -> Batch:
    ids = torch.full((len(rows), length), pad_id, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORE, dtype=torch.int64)
    segments = torch.zeros((len(rows), length), dtype=torch.int64)
    for at, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row, start=1):
            stop = start + len(sample)
            ids[at, start:stop] = torch.tensor(sample.ids)
            segments[at, start:stop] = number
            targets[at, start:stop] = torch.tensor(
                [t if counts else IGNORE for t, counts in zip(sample.targets, sample.loss_mask, strict=True)]
            )
            start = stop + 1
    return Batch(ids, targets, segments if pack else None, tuple(s.source for row in rows for s in row))
