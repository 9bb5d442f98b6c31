"""A checkpoint of one format into another, from path to path: `fp4lab export`, `import` and `convert`."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fp4lab.checkpoint.export import Exported, Progress, Target, export
from fp4lab.checkpoint.load import check_path, open_weights
from fp4lab.checkpoint.public import SCHEMES
from fp4lab.checkpoint.quantise import Quantised, Recipe, TensorError
from fp4lab.checkpoint.weights import Weights
from fp4lab.errors import UserError
from fp4lab.model.config import HEAD

# What each format's own tools do: the reference's recipe with torchao, compressed-tensors' preset, ModelOpt's.
RECIPES = {
    "dat": Recipe("torchao", "single", head="nvfp4"),
    "compressed-tensors": Recipe("ct", "tensor"),
    "modelopt": Recipe("nearest", "tensor"),
}


def recipe_for(
    format_name: str,
    rule: str | None = None,
    levels: str | None = None,
    ignore: tuple[str, ...] = (),
    head: str | None = None,
) -> Recipe:
    """The format's own recipe with the choices given. Raises UserError for one that does not exist or fit."""
    if format_name not in RECIPES:
        raise UserError(f"format {format_name!r} holds floats: nothing is quantised; expected one of {', '.join(RECIPES)}")
    own = RECIPES[format_name]
    if levels == "row" and format_name in SCHEMES:
        raise UserError(f"levels 'row': {format_name} has one second-level scale a tensor; use levels tensor or single")
    if levels is None:
        levels = {"native": "single", "ct": own.levels if own.levels != "single" else "tensor"}.get(rule or "", own.levels)
    if rule is None and levels != own.levels:
        rule = "nearest"
    return replace(own, rule=rule or own.rule, levels=levels, ignore=ignore, head=head or own.head)


def convert(
    source: Path,
    target: Target,
    recipe: Recipe | None = None,
    progress: Progress | None = None,
    asked: Sequence[str] = (),
) -> Exported:
    """Reads `source` (a .dat file or a Hugging Face folder) and writes `target`.

    Without a recipe nothing is quantised: what is packed is relabelled, floats stay floats. `asked`: options that only
    quantising heeds, refused where there is nothing to quantise. Raises UserError.
    """
    kind = "dat" if source.is_file() else "hf"
    weights: Weights = open_weights(kind, check_path(kind, source, key=""))
    errors: list[TensorError] = []
    try:
        if recipe is None:
            _refuse_floats(weights, target.format)
        else:
            weights = quantised = Quantised(weights, recipe, target.format == "compressed-tensors", errors.append)
            if asked and not quantised.chosen:
                raise UserError(
                    f"{' and '.join(asked)}: nothing of {source} would be quantised; what is packed never is again. Leave it "
                    "out, or make floats first (--to hf) and convert those"
                )
        return export(weights, target, errors, progress)
    finally:
        weights.close()


def return_freed_memory() -> None:
    """Makes glibc give blocks of 1 MiB and more back to the system when they are freed, for the rest of the process.

    Left alone it raises that bound to 32 MiB after the first large block, and the heap keeps what passed through it: some
    200 MiB, measured, beyond the tensor at hand.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def _refuse_floats(weights: Weights, format_name: str) -> None:
    """A format of packed weights for a checkpoint that has none is a wish to quantise, which is not done unasked."""
    if (
        format_name != "hf"
        and weights.format != format_name
        and all(weights.info(n).dtype is not None for n in weights.names())
    ):
        raise UserError(
            f"{weights.files[0].path.parent}: nothing in it is packed; `fp4lab convert` quantises it for {format_name}"
        )
    if format_name == "dat" != weights.format and HEAD not in weights.names():
        raise UserError(
            f"{weights.files[0].path.parent}: its head is tied, and a .dat file has a packed one; `fp4lab convert` makes it"
        )
