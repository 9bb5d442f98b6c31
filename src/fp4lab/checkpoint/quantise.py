"""A checkpoint whose linears are quantised as they are read, one tensor at a time.

What is packed already stays as it is. The members of a fused group (q, k, v; gate, up) are read twice, once for the largest
magnitude of all, so that they share one second-level scale: engines that fuse them keep one.
"""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fp4lab.checkpoint.formats import shared_group
from fp4lab.checkpoint.layout import Layout
from fp4lab.checkpoint.public import WEIGHT, is_float
from fp4lab.checkpoint.weights import TensorInfo, Weights
from fp4lab.errors import UserError
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import BLOCK, LEVELS, RULES, PackedTensor, largest, pack, scale_of_amax, unpack
from fp4lab.nvfp4.codec import CACHED

HEADS = ("keep", "nvfp4", "float")


@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how.

    rule, levels  of the codec; "stochastic" is no rule for a file that is to be made twice the same
    targets       patterns of module names (`*` any text): what is quantised; None: nothing
    ignore        patterns of those that are not, the head among them
    head          lm_head: "keep" as it is, "nvfp4" (from the embedding where it is tied), "float"
    """

    rule: str = "nearest"
    levels: str = "tensor"
    targets: tuple[str, ...] | None = ("*_proj",)
    ignore: tuple[str, ...] = ()
    head: str = "keep"

    def __post_init__(self) -> None:
        if self.rule == "stochastic":
            raise UserError("rule 'stochastic' is for training; a file is rounded to nearest: use nearest or four_over_six")
        rules = [rule for rule in RULES if rule != "stochastic"]
        for key, value, allowed in (("rule", self.rule, rules), ("levels", self.levels, LEVELS), ("head", self.head, HEADS)):
            if value not in allowed:
                raise UserError(f"{key} {value!r}: expected one of {', '.join(allowed)}")
        if self.rule == "ct" and self.levels == "single":
            raise UserError("rule 'ct' always has a second-level scale: use levels tensor or row")
        if self.rule == "native" and self.levels != "single":
            raise UserError("rule 'native' has no second-level scale: use levels single")


@dataclass(frozen=True)
class TensorError:
    """What quantising cost one tensor. `relative_error` is |q - w| / |w| over the tensor, in the Euclidean norm."""

    name: str
    shape: tuple[int, ...]
    relative_error: float
    max_abs_error: float


class Quantised:
    """`weights` with what `recipe` names packed, and the head in the form that it asks for."""

    def __init__(self, weights: Weights, recipe: Recipe, divide: bool, report: Callable[[TensorError], None] | None = None):
        """`divide`: in compressed-tensors' convention, so that its files need no reciprocal."""
        self.weights, self.recipe, self.divide, self.report = weights, recipe, divide, report
        self.format, self.files = weights.format, weights.files
        self._names = weights.names()
        self._check_ignore()
        if recipe.head == "nvfp4" and HEAD not in self._names and EMBEDDING in self._names and not self._ignored(HEAD):
            self._names.append(HEAD)
        self._chosen = {n for n in self._names if self._is_chosen(n)}
        self._amax: tuple[tuple[str, ...], Tensor] | None = None  # of the group read last

    @property
    def chosen(self) -> set[str]:
        """The tensors that are quantised here."""
        return set(self._chosen)

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        info = self.weights.info(self._source(name))
        if name in self._chosen:
            levels = self.recipe.levels
            return TensorInfo(info.shape, None, levels, levels != "single" and (self.divide or self.recipe.rule == "ct"))
        if name == HEAD and self.recipe.head == "float" and info.dtype is None:
            return TensorInfo(info.shape, torch.bfloat16)
        return info

    def get(self, name: str) -> Tensor | PackedTensor:
        value = self.weights.get(self._source(name))
        if name in self._chosen:
            assert isinstance(value, Tensor)
            return self._pack(name, value)
        if name == HEAD and self.recipe.head == "float" and isinstance(value, PackedTensor):
            return unpack(value, torch.bfloat16)
        return value

    def layouts(self) -> list[Layout]:
        return self.weights.layouts()

    def close(self) -> None:
        self.weights.close()

    def _source(self, name: str) -> str:
        return EMBEDDING if name == HEAD and HEAD not in self.weights.names() else name

    def _is_chosen(self, name: str) -> bool:
        info = self.weights.info(self._source(name))
        if not name.endswith(WEIGHT) or not is_float(info) or len(info.shape) != 2:
            return False
        module = name.removesuffix(WEIGHT)
        if name == HEAD:
            wanted = self.recipe.head == "nvfp4"
        else:
            wanted = any(fnmatch.fnmatchcase(module, t) for t in self.recipe.targets or ())
        wanted = wanted and not self._ignored(name)
        if wanted and info.shape[1] % BLOCK:
            raise UserError(f"{name} {list(info.shape)}: rows are not whole blocks of {BLOCK}; add --ignore '{module}'")
        return wanted

    def _ignored(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name.removesuffix(WEIGHT), pattern) for pattern in self.recipe.ignore)

    def _check_ignore(self) -> None:
        """Raises UserError for a pattern of no module: what it should have kept would be quantised."""
        modules = [n.removesuffix(WEIGHT) for n in (*self._names, HEAD) if n.endswith(WEIGHT)]
        for pattern in self.recipe.ignore:
            if not fnmatch.filter(modules, pattern):
                raise UserError(
                    f"ignore {pattern!r}: no module is called so; expected a name or a pattern of names such as "
                    f"{max(modules, key=lambda m: m.count('.'))} (`*` is any text: '*.layers.0.*')"
                )

    def _pack(self, name: str, value: Tensor) -> PackedTensor:
        r, shared = self.recipe, None
        divide = None if r.levels == "single" else self.divide or r.rule == "ct"
        if r.levels == "tensor":
            shared = scale_of_amax(self._largest(name, value), r.rule, bool(divide))
        packed = pack(value, r.rule, r.levels, global_scale=shared, divide=divide)
        if self.report is not None:
            self.report(_error(name, value, packed))
        return packed

    def _largest(self, name: str, value: Tensor) -> Tensor:
        """max |w| over the group of `name`, fp32 []."""
        group = tuple(n for n in shared_group(name) if n in self._chosen)
        if len(group) == 1:
            return largest(value)
        if self._amax is None or self._amax[0] != group:
            found = largest(value)
            for other in group:
                if other != name:
                    member = self.weights.get(other)
                    assert isinstance(member, Tensor)
                    found = torch.maximum(found, largest(member))
            self._amax = group, found
        return self._amax[1]


def _error(name: str, value: Tensor, packed: PackedTensor) -> TensorError:
    off = size = worst = 0.0
    step = max(1, CACHED // value.shape[1])
    for start in range(0, value.shape[0], step):
        exact = value[start : start + step].float().reshape(-1)
        lost = unpack(packed.rows(start, min(start + step, value.shape[0]))).view(-1).sub_(exact)
        worst = max(worst, float(largest(lost)))
        off += float(lost.dot(lost))
        size += float(exact.dot(exact))
    return TensorError(name, tuple(value.shape), (off / size) ** 0.5 if size else 0.0, worst)
