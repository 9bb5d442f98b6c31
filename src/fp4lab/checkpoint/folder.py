"""What a Hugging Face folder holds besides tensors: config.json, the index, tokenizer, chat template."""

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

from fp4lab.checkpoint.hf import INDEX
from fp4lab.checkpoint.layout import Layout
from fp4lab.checkpoint.public import MODELOPT_CONFIG, SCHEMES, WEIGHT, declaration, read_json
from fp4lab.checkpoint.weights import Weights
from fp4lab.errors import UserError
from fp4lab.model.config import EMBEDDING, HEAD

CONFIG = "config.json"
# What makes a folder load elsewhere, and says how it may be used. No README: it would speak of another checkpoint.
COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken"),
    *("chat_template*", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*"),
)


def source_folder(weights: Weights, given: Path | None) -> Path:
    """The folder with config.json and the tokenizer. Raises UserError when there is none."""
    if given is not None:
        folder = given
    elif weights.files:
        folder = weights.files[0].path.parent
    else:
        raise UserError(
            "these weights are of no folder: give one with config.json and tokenizer (--config DIR; in a run, model.path=DIR)"
        )
    if not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: no config.json in it; give the folder of config and tokenizer (--config DIR; in a run, model.path=DIR)"
        )
    return folder


def write_side_files(
    out: Path, source: Path, weights: Weights, format_name: str, layouts: list[Layout], same_files: bool
) -> None:
    """Fills `out` with all but the tensors. What needs no change is copied byte for byte."""
    for path in sorted(source.iterdir()):
        if path.is_file() and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in COPIED):
            shutil.copyfile(path, out / path.name)
    unchanged = same_files and weights.files[0].path.parent.resolve() == source.resolve()
    _write_index(out, source, layouts, unchanged)
    old, text = read_json(source / CONFIG), (source / CONFIG).read_bytes()
    if unchanged:
        (out / CONFIG).write_bytes(text)
        if (source / MODELOPT_CONFIG).is_file():
            shutil.copyfile(source / MODELOPT_CONFIG, out / MODELOPT_CONFIG)
        return
    new = {k: v for k, v in old.items() if k != "quantization_config"}
    names = set(weights.names())
    if HEAD in names or old.get("tie_word_embeddings"):
        new["tie_word_embeddings"] = HEAD not in names
    if format_name in SCHEMES:
        scheme = SCHEMES[format_name]
        inline, own = declaration(scheme, unquantised(weights), has_activations(weights))
        new["quantization_config"] = inline
        if own is not None:
            _dump(out / MODELOPT_CONFIG, own)
    if new == old:
        (out / CONFIG).write_bytes(text)
    else:
        _dump(out / CONFIG, new)


def unquantised(weights: Weights) -> list[str]:
    """Modules that are linears and stay floats: the head, tied or not, and what a recipe left out."""
    found = []
    for name in weights.names():
        info = weights.info(name)
        linear = name == HEAD or name.endswith("_proj" + WEIGHT)
        if linear and name != EMBEDDING and info.dtype is not None and len(info.shape) == 2:
            found.append(name.removesuffix(WEIGHT))
    return found if HEAD in weights.names() else [*found, HEAD.removesuffix(WEIGHT)]


def has_activations(weights: Weights) -> bool:
    """Whether every packed linear has a calibrated scale of its activations."""
    names = weights.names()
    packed = [n for n in names if n != EMBEDDING and weights.info(n).dtype is None]
    known = set(names)
    return bool(packed) and all(any(n.removesuffix(WEIGHT) + s.activation in known for s in SCHEMES.values()) for n in packed)


def _write_index(out: Path, source: Path, layouts: list[Layout], unchanged: bool) -> None:
    if unchanged:
        if (source / INDEX).is_file():
            shutil.copyfile(source / INDEX, out / INDEX)
        return
    if len(layouts) > 1:
        where = {key: layout.name for layout in layouts for key in layout.slots}
        total = sum(slot.nbytes for layout in layouts for slot in layout.slots.values())
        _dump(out / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))})


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
