"""Packed AdamW of rows, chunk by chunk (reference section 5.4): the state of a parameter, and what a step does to it.

For rows start..stop of each parameter: w, m, v are decoded to fp32; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
update = (m / bias1) / (sqrt(v / bias2) + eps); w = w - lr (update + decay w); all three are stored again. Scratch is a few
fp32 copies of `chunk_rows` rows, whatever the model. Rows are independent of each other, and the dither of stochastic
rounding depends on the element's place alone, so the result does not depend on `chunk_rows`, bit for bit.

The weight between steps (`master`):
  fp32, bf16         the float parameter itself, in the dtype that its owner gave it
  bf16_stochastic    bf16, stochastic: an update below half a step of bf16 (1/512 of the weight) survives on average
  packed             NVFP4, nearest: the reference's. Updates smaller than half a code's distance vanish.
  packed_stochastic  NVFP4, stochastic: small updates survive on average; no float master exists.
  packed_residual    NVFP4, nearest, and an int8 of what that leaves, stochastic (`residual`): 12.5 bits.
A packed weight starts each step from its stored codes; a float parameter, where there is one, is only their image. A weight
whose second-level scale is per tensor keeps that scale: one chunk cannot know the tensor's maximum. Where no float parameter
exists (step=fused) a float master is held here, and its rows are packed again, by the rule, in the update that writes them.

1-D parameters (norms) and the embedding have fp32 moments and an fp32 master whatever the options say, of their own where
the parameter is narrower (in bf16 a norm near 1 loses every step below 2e-3); `pack_everything` packs them as the reference
does (its failure 41). A gradient that is not finite makes NaN weights, whatever the master: never a finite wrong one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.nvfp4 import BLOCK, PackedTensor, count_changed, keep_zero_signs, pack, repack_like, unpack, update_stochastic
from fp4lab.nvfp4.packed import matrix_shape
from fp4lab.train import residual
from fp4lab.train.health import Health
from fp4lab.train.noise import dither, key, moment_noise, round_bfloat16
from fp4lab.train.state import Moment, named_parts, write_rows

E4M3_NAN = 0x7F
PACKED_MASTERS = ("packed", "packed_stochastic", "packed_residual")
MASTERS = (*PACKED_MASTERS, "bf16", "bf16_stochastic", "fp32")


@dataclass(frozen=True)
class AdamWOptions:
    """See `conf/step/chunked.yaml` and config.StepConfig for what each means."""

    chunk_rows: int = 32
    state: str = "nvfp4_two_level"
    master: str = "packed_stochastic"
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_update: float | None = None
    offload_mv: bool = False
    offload_w: bool = False
    offload_grad: bool = False
    pack_everything: bool = False
    rule: str = "torchao"  # of packed weights, nearest
    seed: int = 0
    kernels: bool = True  # on a GPU: Triton where it has a kernel; else plain torch
    streams: int = 2  # step=fused on a GPU: beside the backward's, for weight gradients and updates
    keep_high_precision: tuple[str, ...] = ("embed_tokens",)  # parts of names; 1-D parameters always


class ParameterState:
    """One parameter's weight and moments as matrices [rows, cols]."""

    def __init__(
        self,
        index: int,
        name: str,
        image: Tensor | None,
        packed: PackedTensor | None,
        options: AdamWOptions,
        start: Tensor | None = None,
    ):
        """`image` is the float parameter; None where the packed weight is all there is. Then `start` may be the weight before
        it was packed, of which a float master or a residual keeps more than the codes do."""
        self.index, self.name, self.image, self.options = index, name, image, options
        shape, device = (packed.shape, packed.device) if image is None and packed else (image.shape, image.device)  # type: ignore[union-attr]
        self.rows, self.cols = matrix_shape(tuple(shape))
        self.device = device
        kept = image is not None and (len(shape) == 1 or any(part in name for part in options.keep_high_precision))
        self.high_precision = kept and not options.pack_everything
        self.packed: PackedTensor | None = None
        self.residual: Tensor | None = None  # int8 [rows, cols], beside `packed`
        self.master: Tensor | None = None
        self.codes: PackedTensor | None = None  # NVFP4 image of `master`, packed again with every write
        if self.high_precision:
            assert image is not None
            if image.dtype != torch.float32:
                self.master = image.detach().reshape(self.rows, self.cols).float()
        elif options.master in PACKED_MASTERS and (packed is not None or options.pack_everything):
            first = packed if packed is not None else pack(image, "nearest")  # type: ignore[arg-type]
            self.packed = first.to("cpu") if options.offload_w else first
            if options.master == "packed_residual":
                self.residual = self._first_residual(first, image if start is None else start).to(self.packed.device)
        elif image is None:
            assert packed is not None
            dtype = torch.float32 if options.master == "fp32" else torch.bfloat16
            self.codes = packed
            self.master = (unpack(packed) if start is None else start).detach().reshape(self.rows, self.cols).to(dtype)
        state = "fp32" if self.high_precision else options.state
        self.mv_device = torch.device("cpu") if options.offload_mv else device
        self.m = Moment(self.rows, self.cols, state, False, self.mv_device, options.beta1)
        self.v = Moment(self.rows, self.cols, state, True, self.mv_device, options.beta2)

    def read(self, start: int, stop: int) -> Tensor:
        """Rows of the stored weight, fp32, on the parameter's device."""
        if self.packed is not None:
            part = self.packed.rows(start, stop).to(self.device)
            return unpack(part) if self.residual is None else residual.decode(part, self.residual[start:stop].to(self.device))
        return self.float_rows(start, stop).to(torch.float32, copy=True)  # a copy: `write` overwrites these rows

    def matrix(self) -> Tensor:
        assert self.image is not None
        return self.image.detach().view(self.rows, self.cols)

    def float_rows(self, start: int, stop: int) -> Tensor:
        """Rows of the float master, in place."""
        return (self.matrix() if self.master is None else self.master)[start:stop]

    def write(self, start: int, stop: int, value: Tensor, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Stores fp32 rows. Returns what is now stored (fp32); of packed ones whose block scale changed (bool, like it); and
        where the stored value says nothing about the codes, how many of these changed (int64 [])."""
        if self.packed is None:
            return self._write_float(start, stop, value, step)
        old = self.packed.rows(start, stop).to(self.device)
        new_packed = self._pack(value, old, start, stop, step)
        rescaled = changed = None
        if self.residual is not None:
            _mark_unsound(new_packed, value)
            noise = self._noise(step, start, stop, value.device)
            self.residual[start:stop] = residual.encode(value, new_packed, noise)
            changed = count_changed(old, new_packed)
        else:
            different = old.block_scale.view(torch.uint8) != new_packed.block_scale.view(torch.uint8)
            rescaled = different.repeat_interleave(BLOCK, dim=1)[:, : self.cols]
        write_rows(self.packed, start, stop, new_packed)
        stored = image = unpack(new_packed)
        if self.residual is not None:
            stored = self.read(start, stop)
        if self.image is not None:
            self.matrix()[start:stop] = image.to(self.image.dtype)
        return stored, rescaled, changed

    def _write_float(self, start: int, stop: int, value: Tensor, step: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        rows, changed = self.float_rows(start, stop), None
        if self.options.master == "bf16_stochastic" and rows.dtype == torch.bfloat16:
            rows.copy_(round_bfloat16(value, self._noise(step, start, stop, value.device)))
        else:
            rows.copy_(value)
        if self.codes is not None:
            old = self.codes.rows(start, stop)
            new = repack_like(rows, old, self.options.rule)
            keep_zero_signs(new, old)
            changed = count_changed(old, new)
            write_rows(self.codes, start, stop, new)
        elif self.master is not None:
            self.matrix()[start:stop] = rows.to(self.matrix().dtype)
        return rows.to(torch.float32, copy=True), None, changed

    def _noise(self, step: int, start: int, stop: int, device: torch.device) -> Tensor:
        """Uniform in [0, 1), one an element."""
        padded = -(-self.cols // BLOCK) * BLOCK
        return dither(key(self.options.seed, step, self.index), start, stop, padded, device)[0][:, : self.cols]

    def moment_noise(self, step: int, start: int, stop: int, device: torch.device) -> tuple[Tensor, ...]:
        """For m, its scales, v, and its scales, where moments are rounded by it."""
        if self.m.format != "nvfp4_two_level":
            return ()
        padded = -(-self.cols // BLOCK) * BLOCK
        return moment_noise(key(self.options.seed, step, self.index), start, stop, padded, device)

    def _first_residual(self, codes: PackedTensor, start: Tensor | None) -> Tensor:
        """What the codes lack of an unquantised weight; nothing of one that is their own value in a float's rounding."""
        if start is None or torch.equal(start, unpack(codes, start.dtype)):
            return torch.zeros(self.rows, self.cols, dtype=torch.int8, device=codes.device)
        flat = PackedTensor(codes.codes, codes.block_scale, codes.global_scale, (self.rows, self.cols), codes.divide)
        return residual.encode(start.detach().reshape(self.rows, self.cols).float(), flat)

    def _pack(self, value: Tensor, old: PackedTensor, start: int, stop: int, step: int) -> PackedTensor:
        kept = old.global_scale if old.levels == "tensor" else None
        if self.options.master != "packed_stochastic":
            return pack(value, _nearest_rule(self.options.rule, old), old.levels, global_scale=kept)
        field = key(self.options.seed, step, self.index)
        noise, blocks = dither(field, start, stop, old.codes.shape[1] * 2, value.device)
        return update_stochastic(value, old, noise, blocks)

    @property
    def stored(self) -> PackedTensor | None:
        """The NVFP4 weight, as it would be exported, where this state keeps it."""
        return self.packed if self.packed is not None else self.codes

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(kind, tensor) for the byte report, e.g. ("state_w_codes", ...)."""
        if self.packed is not None:
            yield from ((f"state_w_{part}", t) for part, t in named_parts(self.packed))
        if self.residual is not None:
            yield "state_w_residual", self.residual
        if self.master is not None:
            yield "state_w_data", self.master
        for kind, moment in (("m", self.m), ("v", self.v)):
            yield from ((f"state_{kind}_{part}", t) for part, t in moment.tensors())


def update_rows(s: ParameterState, grad: Tensor, first: int, step: int, lr: float, health: Health) -> None:
    """One AdamW update of the rows from `first` on, by chunks; grad [rows, cols], which may lie on another device."""
    o = s.options
    bias1, bias2 = 1 - o.beta1**step, 1 - o.beta2**step
    for start in range(first, first + grad.shape[0], o.chunk_rows):
        stop = min(start + o.chunk_rows, first + grad.shape[0])
        g = grad[start - first : stop - first].to(s.device).float()
        w = s.read(start, stop)
        m = s.m.read(start, stop, s.device).lerp_(g, 1 - o.beta1)
        v = s.v.read(start, stop, s.device).mul_(o.beta2).addcmul_(g, g, value=1 - o.beta2)
        update = (m / bias1) / ((v / bias2).sqrt_().add_(o.eps))
        if o.max_update is not None:
            update.clamp_(-o.max_update, o.max_update)
        new = w * (1 - lr * o.weight_decay) - lr * update
        after, rescaled, changed = s.write(start, stop, new, step)
        largest = g.abs().amax(dim=1, keepdim=True)
        noise = s.moment_noise(step, start, stop, g.device)
        s.m.write(start, stop, m, largest, noise[:2])
        s.v.write(start, stop, v, largest, noise[2:])
        health.update(update)
        if not s.high_precision:  # floats that always move would hide packed weights that never do
            health.weights(w, new, after, rescaled, changed)


def count_blocks(s: ParameterState, health: Health) -> None:
    """Dead and saturated blocks of one parameter's state."""
    for kind, p in (("w", s.packed), ("m", s.m.packed), ("v", s.v.packed)):
        if p is not None:
            health.blocks(kind, p)


def _mark_unsound(p: PackedTensor, value: Tensor) -> None:
    """Block scales become NaN where a value is no finite number: codes and residuals have none, and saturate."""
    finite = torch.nn.functional.pad(value.isfinite(), (0, -value.shape[1] % BLOCK), value=True)
    bad = ~finite.view(value.shape[0], -1, BLOCK).all(dim=-1)
    p.block_scale.view(torch.uint8).masked_fill_(bad, E4M3_NAN)


def _nearest_rule(rule: str, p: PackedTensor) -> str:
    """The rule to round to nearest with: the one asked for, where p's kind of scales has it."""
    if p.divide:
        return "ct"
    if rule in ("ct", "stochastic") or (rule == "native" and p.levels != "single"):
        return "nearest"
    return rule
