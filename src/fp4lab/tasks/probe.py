"""The first-token microscope: what each path would say first, and where two paths part."""

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from fp4lab.chat.template import render
from fp4lab.events import Emit, FirstToken, FirstTokenDiff
from fp4lab.model.paths import PATHS, bridge_model, fp2_model, noste_model, reference_model
from fp4lab.tasks.session import Session

DIVERGED = 1e-3  # relative difference of hidden states from which a layer counts as divergent


def all_paths(session: Session) -> dict[str, Any]:
    """Every path that can be computed from the session's store, by its record name.

    The session's own model is used where it is one of them; the rest are built over the same store.
    """
    s = session
    paths: dict[str, Any] = {
        PATHS["bridge"]: lambda: bridge_model(s.store, s.dtype, s.activations, s.native),
        PATHS["fp2"]: lambda: fp2_model(s.store, s.dtype, s.dtype, s.activations, quirks=s.quirks),
        PATHS["noste"]: lambda: noste_model(s.store, s.dtype, s.activations, s.native),
        PATHS["dense"]: lambda: reference_model(s.store, s.dtype),
    }
    built = {name: s.model if name == PATHS[s.backend] else make() for name, make in paths.items()}
    return {name: path for name, path in built.items() if path is not None}


@torch.no_grad()
def probe(session: Session, prompt: str, when: str, emit: Emit) -> None:
    """Emits one FirstToken for each path and one FirstTokenDiff for each pair."""
    ids = session.tokenizer.encode(render([{"role": "user", "content": prompt}]))
    seen: dict[str, tuple[list[Tensor], Tensor]] = {}
    for name, path in all_paths(session).items():
        trace: list[Tensor] = []
        hidden = path.hidden(torch.tensor([ids], device=session.device), trace=trace)[:, -1]
        logits = path.logits(hidden)[0]
        seen[name] = ([x[0, -1].float() for x in trace], logits)
        top = torch.topk(torch.nan_to_num(logits, nan=-math.inf), 10)
        emit(
            FirstToken(
                path=name,
                when=when,
                prompt=prompt,
                prompt_ids=ids,
                activations="none" if name == PATHS["dense"] else session.activations,
                hidden_nan=int(hidden.isnan().sum()),
                hidden_inf=int(hidden.isinf().sum()),
                logits_nan=int(logits.isnan().sum()),
                logits_inf=int(logits.isinf().sum()),
                top10=[
                    (i, x, session.tokenizer.decode([i]) if i < session.tokenizer.vocab_size else "")
                    for i, x in zip(top.indices.tolist(), top.values.tolist(), strict=True)
                ],
            )
        )
    for first, second in itertools.combinations(sorted(seen), 2):
        emit(difference(f"{first[0]}-{second[0]}", when, *seen[first], *seen[second]))


def difference(
    pair: str, when: str, trace_a: list[Tensor], logits_a: Tensor, trace_b: list[Tensor], logits_b: Tensor
) -> FirstTokenDiff:
    """How far two paths' first tokens are apart. `trace_*`: hidden state of the last position after each layer."""
    top_a, top_b = (torch.topk(torch.nan_to_num(x, nan=-math.inf), 10).indices.tolist() for x in (logits_a, logits_b))
    union = sorted(set(top_a) | set(top_b))
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    divergent = None
    for layer, (a, b) in enumerate(zip(trace_a, trace_b, strict=True)):
        if not float((a - b).norm()) <= DIVERGED * float(a.norm()):  # NaN diverges
            divergent = layer
            break
    return FirstTokenDiff(
        pair=pair,
        when=when,
        top1_equal=top_a[0] == top_b[0],
        overlap_at_10=len(set(top_a) & set(top_b)) / 10,
        rank_correlation=_spearman(logits_a[union], logits_b[union]),
        kl=float((log_a.exp() * (log_a - log_b)).sum()),
        max_abs_logit=float((logits_a - logits_b).abs().max()),
        first_divergent_layer=divergent,
    )


def _spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; the ids are few and their logits practically never tie."""
    if not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.nan
    rank_a, rank_b = (x.argsort().argsort().double() for x in (a, b))
    return round(float(torch.corrcoef(torch.stack((rank_a, rank_b)))[0, 1]), 9) if len(a) > 1 else 1.0
