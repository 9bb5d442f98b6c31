"""What an optimizer step did to its stored state: blocks that died, codes that moved, updates that were lost."""

import math
from collections import defaultdict

import torch
from torch import Tensor

from fp4lab.events import StateHealth
from fp4lab.nvfp4 import PackedTensor
from fp4lab.nvfp4.adamw_kernel import COUNTS

E4M3_TOP = 0x7E  # byte of 448
PIECE = 1 << 18  # block scales counted at a time: bounds the scratch


class Health:
    """Sums over the chunks of one step; `event` turns them into shares.

    Shares of weights are over those that follow `master`; norms and embedding, kept as fp32, are left out.
    """

    def __init__(self, count: bool = True) -> None:
        """Without `count` only the largest update is kept: what became of weights and blocks costs more than the update."""
        self.count = count
        self._blocks: dict[str, int] = defaultdict(int)
        self._zero: dict[str, Tensor | int] = defaultdict(int)
        self._saturated: dict[str, Tensor | int] = defaultdict(int)
        self._can_saturate: dict[str, int] = defaultdict(int)
        self._weights = 0
        self._changed: Tensor | int = 0
        self._wanted: Tensor | int = 0
        self._lost: Tensor | int = 0
        self._made: Tensor | float = 0.0
        self._asked: Tensor | float = 0.0
        self._largest: Tensor | None = None

    def blocks(self, kind: str, p: PackedTensor) -> None:
        """Counts dead and saturated blocks of state `kind` (w, m or v).

        With a scale per row the largest block of each row has 448 by construction and nothing clips: not counted.
        """
        if not self.count:
            return
        byte = p.block_scale.view(torch.uint8).flatten()
        self._blocks[kind] += byte.numel()
        for piece in byte.split(PIECE):
            size = piece & 0x7F
            self._zero[kind] = self._zero[kind] + size.numel() - size.count_nonzero()
            if p.levels != "row":
                self._saturated[kind] = self._saturated[kind] + (size == E4M3_TOP).count_nonzero()
        if p.levels != "row":
            self._can_saturate[kind] += byte.numel()

    def update(self, update: Tensor) -> None:
        """One chunk's update / lr, before decay and after `max_update`. NaN stays NaN."""
        largest = update.abs().amax()
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def weights(
        self, before: Tensor, wanted: Tensor, after: Tensor, rescaled: Tensor | None, changed: Tensor | None = None
    ) -> None:
        """One chunk: the stored weights before and after, and what they should have become, all fp32.

        `rescaled`: bool, the element's block has another scale. Under the same scale another code is another value, but
        for +0 and -0, which count as one: a zero takes the sign of every update that it loses.
        `changed`: how many codes changed, where they are only the image of a finer value.
        """
        if not self.count:
            return
        self._weights += before.numel()
        if changed is None:
            changed = (after != before if rescaled is None else (after != before) | rescaled).count_nonzero()
        self._changed = self._changed + changed
        step = wanted - before
        self._made = self._made + ((after - before) * step).sum(dtype=torch.float64)
        self._asked = self._asked + step.square().sum(dtype=torch.float64)
        asked = step != 0
        self._wanted = self._wanted + asked.count_nonzero()
        self._lost = self._lost + (asked & (after == before)).count_nonzero()

    def kernel(self, counts: Tensor, packed_moments: bool) -> None:
        """Adds what `nvfp4.adamw_kernel` counted, fp32 [spread, len(COUNTS)]; weights and blocks only if it was asked to."""
        c = dict(zip(COUNTS, counts.sum(0).tolist(), strict=True))
        largest = counts[:, 0].amax() if math.isfinite(c["squares"]) else torch.tensor(math.nan)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest.to(self._largest))
        self._weights += int(c["weights"])
        self._changed, self._wanted, self._lost = (
            self._changed + c["changed"],
            self._wanted + c["wanted"],
            self._lost + c["lost"],
        )
        self._made, self._asked = self._made + c["made"], self._asked + c["asked"]
        if not c["blocks"]:
            return
        for kind in ("w", "m", "v") if packed_moments else ("w",):
            self._blocks[kind] += int(c["blocks"])
            self._zero[kind] = self._zero[kind] + int(c[f"zero_{kind}"])
        self._can_saturate["w"] += int(c["blocks"])
        self._saturated["w"] = self._saturated["w"] + int(c["full_w"])

    def event(self, step: int) -> StateHealth:
        """Shares over the whole step. The only place that waits for the device."""
        wanted, asked = int(self._wanted), float(self._asked)
        return StateHealth(
            step=step,
            zero_scale={k: int(self._zero[k]) / n for k, n in self._blocks.items()},
            saturated={k: int(self._saturated[k]) / n for k, n in self._can_saturate.items()},
            code_changed=int(self._changed) / self._weights if self._weights else None,
            update_lost=int(self._lost) / wanted if wanted else None,
            update_kept=float(self._made) / asked if asked else None,
            max_update_over_lr=None if self._largest is None else float(self._largest),
        )
