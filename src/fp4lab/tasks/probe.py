"""The first-token microscope: what each path would say first, and whether two paths are as near as they should be."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fp4lab.chat.template import render
from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.events import Emit, FirstToken, FirstTokenDiff
from fp4lab.model.paths import PATHS, bridge_model, fp2_model, noste_model, reference_model
from fp4lab.tasks.microscope import apart, trace
from fp4lab.tasks.session import Session
from fp4lab.tasks.tolerance import expected

Seen = tuple[list[Tensor], Tensor, Tensor]  # of microscope.trace


def all_paths(session: Session) -> dict[str, Any]:
    """Every path that can be computed from the session's store, by its record name.

    The session's own model is used where it is one of them; the rest are built over the same store.
    """
    s = session
    paths: dict[str, Any] = {
        PATHS["bridge"]: lambda: bridge_model(s.store, s.dtype, s.activations, s.native),
        PATHS["fp2"]: lambda: fp2_model(s.store, s.dtype, None, s.activations, quirks=s.quirks),
        PATHS["noste"]: lambda: noste_model(s.store, s.dtype, s.activations, s.native),
        PATHS["dense"]: lambda: reference_model(s.store, s.dtype),
    }
    built = {name: s.model if name == PATHS[s.backend] else make() for name, make in paths.items()}
    return {name: path for name, path in built.items() if path is not None}


def prompt_ids(session: Session, prompt: str) -> list[int]:
    """One user turn up to where the answer starts."""
    return session.tokenizer.encode(render([{"role": "user", "content": prompt}], session.config["data"]["style"]))


def probe(session: Session, prompt: str, when: str, emit: Emit) -> dict[str, Seen]:
    """Emits one FirstToken for each path and one FirstTokenDiff for each pair; returns what was seen, by path."""
    ids = prompt_ids(session, prompt)
    seen: dict[str, Seen] = {}
    for name, path in all_paths(session).items():
        seen[name] = layers, hidden, logits = trace(path, ids)
        token = first_token(session.tokenizer, name, when, prompt, ids, logits)
        token.activations = "none" if name == PATHS["dense"] else session.activations
        token.hidden_nan, token.hidden_inf = int(hidden.isnan().sum()), int(hidden.isinf().sum())
        token.layer_rms = [float(x.square().mean().sqrt()) for x in layers]
        emit(token)
    for first, second in itertools.combinations(sorted(seen), 2):
        diff = difference(f"{first[0]}-{second[0]}", session.dtype, session.activations, seen[first], seen[second])
        diff.when, diff.prompt = when, prompt
        emit(diff)
    return seen


def first_token(tokenizer: Tokenizer, path: str, when: str, prompt: str, ids: list[int], logits: Tensor) -> FirstToken:
    """The ten likeliest tokens of logits [V]."""
    top = torch.topk(logits.nan_to_num(nan=-math.inf), min(10, len(logits)))
    known = tokenizer.vocab_size
    return FirstToken(
        path=path,
        when=when,
        prompt=prompt,
        prompt_ids=ids,
        logits_nan=int(logits.isnan().sum()),
        logits_inf=int(logits.isinf().sum()),
        top10=[
            (i, x, tokenizer.decode([i]) if i < known else "")
            for i, x in zip(top.indices.tolist(), top.values.tolist(), strict=True)
        ],
    )


def difference(pair: str, dtype: torch.dtype, activations: str, a: Seen, b: Seen) -> FirstTokenDiff:
    """How far two paths' first tokens are apart, and whether that is more than what sets them apart explains."""
    (layers_a, _, logits_a), (layers_b, _, logits_b) = a, b
    top_a, top_b = (torch.topk(x.nan_to_num(nan=-math.inf), 10).indices.tolist() for x in (logits_a, logits_b))
    union = sorted(set(top_a) | set(top_b))
    log_a, log_b = logits_a.double().log_softmax(-1), logits_b.double().log_softmax(-1)  # in fp32 its own rounding shows
    allowed = expected(pair, dtype, len(layers_a), activations, (logits_a, logits_b))
    kl = max(float((log_a.exp() * (log_a - log_b)).sum()), 0.0)  # rounding can make a zero negative
    largest = float((logits_a - logits_b).abs().max())
    divergent = (i for i, (x, y) in enumerate(zip(layers_a, layers_b, strict=True)) if not apart(x, y) <= allowed.relative)
    return FirstTokenDiff(
        pair=pair,
        top1_equal=top_a[0] == top_b[0],
        overlap_at_10=len(set(top_a) & set(top_b)) / 10,
        rank_correlation=_spearman(logits_a[union], logits_b[union]),
        kl=kl,
        max_abs_logit=largest,
        expected_kl=allowed.kl,
        expected_max_abs_logit=allowed.max_abs_logit,
        expected_relative=allowed.relative,
        why=allowed.why,
        fault=not (kl <= allowed.kl and largest <= allowed.max_abs_logit),  # not-a-number is a fault
        first_divergent_layer=next(divergent, None),
    )


def _spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; the ids are few and their logits practically never tie."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan
    rank_a, rank_b = (x.argsort().argsort().double() for x in (a, b))
    return round(float(torch.corrcoef(torch.stack((rank_a, rank_b)))[0, 1]), 9) if len(a) > 1 else 1.0
