"""From logits to a token."""

import torch
from torch import Tensor

from fp4lab.errors import Collapsed


def nucleus(probabilities: Tensor, top_p: float, can_empty: bool = False) -> Tensor:
    """The smallest set of likeliest tokens that has at least `top_p`, renormalised; [V] -> [V].

    Nucleus sampling, arXiv 1904.09751 section 3.1: the token that crosses `top_p` is in the set, so it is never empty.
    `can_empty` leaves that token out, as the reference did (section 4.2): then a sure enough model leaves nothing.

    Raises Collapsed if nothing is left.
    """
    ordered, order = probabilities.sort(descending=True)
    reached = ordered.cumsum(0)
    kept = ordered * (reached <= top_p if can_empty else reached - ordered < top_p)
    total = kept.sum()
    if not float(total) > 0:
        raise Collapsed(f"top_p={top_p:g} left no token: the likeliest has probability {float(ordered[0]):.4f}")
    return torch.zeros_like(probabilities).scatter_(0, order, kept / total)


class Sampler:
    """Picks a token: the likeliest at temperature 0, else one drawn from the nucleus.

    Draws are made on the CPU in fp32, so that one seed gives the same tokens on every device. `start_turn` seeds them
    anew: what a turn draws does not depend on how many tokens the ones before it had.
    """

    def __init__(self, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0, can_empty: bool = False):
        self.temperature, self.top_p, self.seed, self.can_empty = temperature, top_p, seed, can_empty
        self._generator = torch.Generator()

    def start_turn(self, n: int) -> None:
        self._generator.manual_seed(self.seed * 1_000_003 + n)

    def __call__(self, logits: Tensor) -> int:
        """logits [V] -> id. Values that are not finite count as impossible."""
        logits = logits.nan_to_num(nan=-torch.inf, posinf=-torch.inf)
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.cpu().float()
        if not bool(logits.isfinite().any()):
            return int(logits.argmax())  # nothing to draw from
        probabilities = (logits / self.temperature).softmax(0)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p, self.can_empty)
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
