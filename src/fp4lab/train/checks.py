"""What must hold in any training run, checked on what is there anyway; each check returns a sentence or None.

The checks know nothing of `quirk.*`: they would have caught the incidents of the reference log as they happened.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from fp4lab.events import StateHealth
from fp4lab.train.data import Sample, Samples

WORSE_THAN_UNIFORM = 2.0  # times ln(vocabulary): text that is new to a model stays below it, a broken graph does not
BEYOND_ADAM = 10.0  # times what AdamW with exact moments can do
INERT = 0.01  # share of the wanted change that a packed weight at least makes


def loss_out_of_range(loss: float, vocab_size: int) -> str | None:
    """A cross-entropy, nats, that no language model has (failure 31)."""
    uniform = math.log(vocab_size)
    if loss > WORSE_THAN_UNIFORM * uniform:
        return (
            f"the loss is {loss:.2f}, and guessing blindly gives ln({vocab_size}) = {uniform:.2f}: the head does not get what "
            "it was trained on (a missing final norm does this), or training has come apart"
        )
    return None


def no_end_token(samples: Sequence[Sample], im_end: int) -> str | None:
    """Dialogues in which no target is <|im_end|>: stopping is not taught (failure 25). Raw text has no turns."""
    dialogues = [s for s in samples if Path(s.source.rpartition(":")[0]).suffix != ".txt"]
    taught = any(t == im_end for s in dialogues for t, counts in zip(s.targets, s.loss_mask, strict=True) if counts)
    if dialogues and not taught:
        return f"<|im_end|> is a target in none of {len(dialogues)} samples: the model is not taught to end its answers"
    return None


def beyond_window(samples: Samples, seq_len: int) -> str | None:
    """Samples that are longer than what is trained on."""
    if not samples.cut and not samples.dropped:
        return None
    left = f", and {samples.dropped} are left out, no target being in them" if samples.dropped else ""
    return f"{samples.cut} of {len(samples)} samples are cut to seq_len={seq_len}{left}"


def other_template(style: str) -> str | None:
    """Prompts that are trained on in another rendering than they are asked in (reference 0.6)."""
    if style != "official":
        return (
            f"data.style={style}: the prompts of the data differ from the official chat template, which the first-token probe, "
            "task.prompts and other programs ask in"
        )
    return None


def adam_bound(beta1: float, beta2: float, step: int) -> float:
    """The largest |update| / lr of AdamW with exact moments at step 1, 2, ..., without weight decay.

    m = sum a_i g_i and v = sum b_i g_i^2, so |m| <= sqrt(sum a_i^2 / b_i) sqrt(v) (Cauchy-Schwarz), a geometric sum.
    Infinite where beta1^2 > beta2 lets it grow for ever and it has passed what a float holds.
    """
    if step == 1 or beta1 == 0:
        return math.sqrt((1 - beta2**step) / (1 - beta2))
    ratio = beta1**2 / beta2 if beta2 else math.inf
    try:
        terms = step if ratio == 1 else (ratio**step - 1) / (ratio - 1)
    except OverflowError:
        return math.inf
    if not math.isfinite(terms):
        return math.inf
    return (1 - beta1) * math.sqrt(terms * (1 - beta2**step) / (1 - beta2)) / (1 - beta1**step)


def optimizer_step(health: StateHealth, lr: float, beta1: float, beta2: float) -> dict[str, str]:
    """{topic: sentence} of what one step did wrong: updates from dead moments, weights that do not move, or move unasked."""
    said: dict[str, str] = {}
    largest, bound = health.max_update_over_lr, adam_bound(beta1, beta2, health.step)
    if largest is not None and not largest <= BEYOND_ADAM * bound:
        dead = health.zero_scale.get("v")
        share = "" if dead is None else f"; {100 * dead:.1f} % of the blocks of v have scale 0"
        said["moments"] = (
            f"step {health.step}: the largest update is {largest:.3g} lr, and exact moments give at most {bound:.3g} lr: "
            f"v has underflowed where m has not{share}"
        )
    kept = health.update_kept
    if kept is not None and kept < INERT:
        said["inertia"] = (
            f"step {health.step}: the stored weights made {100 * kept:.2g} % of the change that the step asked for: updates "
            "are smaller than half a code's distance and are rounded away"
        )
    if lr == 0 and health.code_changed:
        said["requantised"] = (
            f"step {health.step}: lr=0 and {100 * health.code_changed:.1f} % of the weights have another code or block scale: "
            "they are quantised by another rule than the one that made them"
        )
    return said
