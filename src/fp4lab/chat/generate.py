"""One answer: tokens from a policy until something ends it."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fp4lab.chat.policy import Path, Prefill, Replay
from fp4lab.chat.sampling import Sampler


@dataclass
class Answer:
    """`ids` without the stop token. `finish`: stop, length (max_tokens), time or full (no more positions)."""

    ids: list[int] = field(default_factory=list)
    finish: str = "length"
    nll: float = 0.0  # mean negative log likelihood of the ids and the stop token, nats
    bad_logits_at: int | None = None  # first token whose logits were not all finite
    first_logits: Tensor | None = None
    token_ms: list[float] = field(default_factory=list)  # the first has the prompt's encoding in it


@torch.no_grad()
def generate(
    policy: Replay,
    ids: list[int],
    *,
    max_tokens: int,
    stops: set[int],
    pick: Sampler,
    close: list[int],
    max_context: int | None = None,
    turn_s: float | None = None,
    on_token: Callable[[int], None] | None = None,
) -> Answer:
    """Encodes `ids`, the new part of the conversation, answers, and ends the turn with `close`.

    A stop token is neither returned nor encoded: `close` begins with the one of the template.
    The last token is not asked for a successor; it goes into the context together with `close`.
    """
    times = [time.perf_counter()]
    room = max_tokens + len(close)
    if max_context is not None:
        room = min(room, max_context - len(policy.context) - len(ids))
    answer, nll = Answer(), 0.0
    logits = answer.first_logits = policy.begin(ids, room)
    pending: list[int] = []
    while True:
        if answer.bad_logits_at is None and not bool(logits.isfinite().all()):
            answer.bad_logits_at = len(answer.ids)
        token = pick(logits)
        nll -= float(logits.log_softmax(-1)[token])
        times.append(time.perf_counter())
        if token in stops:
            answer.finish = "stop"
            break
        answer.ids.append(token)
        pending = [token]
        if on_token is not None:
            on_token(token)
        if len(answer.ids) == max_tokens:
            break
        if len(answer.ids) + len(close) >= room:
            answer.finish = "full"
            break
        if turn_s is not None and times[-1] - times[0] > turn_s:
            answer.finish = "time"
            break
        logits, pending = policy.accept(token), []
    answer.token_ms = [1e3 * (b - a) for a, b in itertools.pairwise(times)]
    answer.nll = nll / (len(answer.ids) + (answer.finish == "stop"))
    policy.end(pending + close)
    return answer


def greedy(path: Path, ids: list[int], max_tokens: int, stops: set[int], device: torch.device | str) -> list[int]:
    """The likeliest ids after `ids`, without the stop token."""
    policy = Prefill(path, device)
    return generate(policy, ids, max_tokens=max_tokens, stops=stops, pick=Sampler(), close=[]).ids
