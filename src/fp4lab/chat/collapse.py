"""Signs that a model has come apart, told from one answer (reference sections 2.5 and 4.3)."""

from collections.abc import Sequence

MARKS = "!!!!"  # id 0 again and again: what NaN logits look like as text
GRAM = 4
_LEAST_GRAMS = 8  # a shorter answer may well repeat itself


def repetition(ids: Sequence[int], n: int = GRAM) -> float:
    """Share of the answer's n-grams that occurred before in it; 0 for an answer too short to say."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if len(grams) >= _LEAST_GRAMS else 0.0


def signs(text: str, ids: Sequence[int], bad_logits_at: int | None, limit: float | None) -> list[str]:
    """What is wrong with an answer, in words; empty if nothing is.

    bad_logits_at  first token whose logits were not all finite
    limit          share of repeated 4-grams from which an answer counts as collapsed; None: any is allowed
    """
    found = []
    if bad_logits_at is not None:
        found.append(f"logits of token {bad_logits_at} are not finite")
    if MARKS in text:
        found.append(f"the answer has {MARKS}")
    share = repetition(ids)
    if limit is not None and share >= limit:
        found.append(f"{share:.0%} of its {GRAM}-grams are repeated")
    return found
