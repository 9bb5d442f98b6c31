"""Writing a checkpoint in any format: streamed, whole or not at all, beside a manifest with checksums.

One tensor is in memory at a time. Where the source has the same format and the same tensors, its files' headers, order and
element types are kept, so that an export of an untouched model is the same bytes.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from fp4lab.checkpoint import folder
from fp4lab.checkpoint.atomic import refuse_existing, whole_file, whole_folder
from fp4lab.checkpoint.formats import FORMATS, Format, Part, fitted, format_of, model_order, same_layout, shared_group
from fp4lab.checkpoint.layout import FileWriter, Layout
from fp4lab.checkpoint.public import SCHEMES, is_scale_of_cache, read_json
from fp4lab.checkpoint.quantise import TensorError
from fp4lab.checkpoint.weights import FileInfo, Weights
from fp4lab.errors import UserError
from fp4lab.nvfp4 import PackedTensor

MANIFEST = "fp4lab_manifest.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_OWN_DTYPE = {"hf": torch.bfloat16, "dat": torch.float16}  # of floats, where the source has another format
SLACK = 1 << 20  # bytes of the disk that must stay free
Progress = Callable[[int, int, str], None]  # bytes done, bytes in all, name of the tensor


@dataclass
class Target:
    """Where to, and in what form.

    format     dat, hf, compressed-tensors, modelopt
    dtype      of floats: bfloat16, float16, float32, "keep", or "auto": kept, but for hf bfloat16 and for dat float16 where
               the source has another format
    scales     of the block scales of a new .dat file: e4m3 or float16 (which only some readers take)
    config     folder with config.json and the tokenizer; None: the source's own
    """

    path: Path
    format: str
    dtype: str = "auto"
    scales: str = "e4m3"
    config: Path | None = None
    overwrite: bool = False
    shard_bytes: int = 5_000_000_000

    def __post_init__(self) -> None:
        for key, value, allowed in (
            ("format", self.format, FORMATS),
            ("dtype", self.dtype, ("auto", "keep", *DTYPES)),
            ("scales", self.scales, ("e4m3", "float16")),
        ):
            if value not in allowed:
                raise UserError(f"{key} {value!r}: expected one of {', '.join(allowed)}")
        if self.scales != "e4m3" and self.format != "dat":
            raise UserError(f"scales {self.scales!r} are of .dat files; {self.format} has E4M3 scales")


@dataclass
class Exported:
    """What was written. `errors`: of the tensors that were quantised on the way."""

    path: Path
    format: str
    files: list[FileInfo]
    same_files: bool  # headers, order and element types are the source's
    notes: list[str] = field(default_factory=list)
    errors: list[TensorError] = field(default_factory=list)


@dataclass
class Plan:
    """What will be written where. `parts`: the keys of every tensor; `side`: the folder of config.json and the tokenizer."""

    form: Format
    parts: dict[str, dict[str, Part]]
    layouts: list[Layout]
    same_files: bool
    side: Path | None


def plan(weights: Weights, target: Target) -> Plan:
    """Reads headers alone, writes nothing.

    Raises UserError when the target is the source, exists, does not fit the disk, or cannot hold a tensor.
    """
    inputs = [info.path for info in weights.files] + ([target.config / folder.CONFIG] if target.config else [])
    refuse_own_input(target.path, inputs)
    refuse_existing(target.path, target.overwrite)
    form = format_of(target.format, _dtype(weights, target), DTYPES.get(target.scales, torch.float8_e4m3fn))
    order = sorted(weights.names(), key=model_order)
    by_name = {name: form.parts(name, weights.info(name)) for name in order}
    if weights.format != target.format:
        by_name.update((name, {}) for name in order if is_scale_of_cache(name))  # two conventions, and none of ours
    parts = {key: part for found in by_name.values() for key, part in found.items()}
    layouts = weights.layouts() if weights.format == target.format else []
    same = bool(layouts) and target.scales == "e4m3" and same_layout(layouts, parts)
    if not same:
        layouts = form.plan(parts, target.shard_bytes)
    check_space(target.path, sum(layout.size for layout in layouts))
    side = None if target.format == "dat" else folder.source_folder(weights, target.config)
    return Plan(form, by_name, layouts, same, side)


def export(
    weights: Weights, target: Target, errors: list[TensorError] | None = None, progress: Progress | None = None
) -> Exported:
    """Writes `weights`. `errors` is filled while they are read (see Quantised). Raises UserError as `plan` does."""
    planned = plan(weights, target)
    done = Exported(target.path, target.format, [], planned.same_files, errors=[] if errors is None else errors)
    dropped = [name for name, found in planned.parts.items() if not found]
    if dropped:
        done.notes.append(f"{len(dropped)} scales of activations or of the KV cache are left out (first: {dropped[0]})")
    if planned.side is None:
        _clear_manifest(target.path)
        with whole_file(target.path, target.overwrite) as part:
            _fill([part], planned, weights, progress)
        done.files = [FileInfo("output", target.path.resolve(), "dat")]
        _write_manifest(_beside(target.path), done, weights)
        return done
    with whole_folder(target.path, target.overwrite) as part:
        torn = _fill([part / layout.name for layout in planned.layouts], planned, weights, progress)
        done.notes += torn if target.format in SCHEMES else []
        folder.write_side_files(part, planned.side, weights, target.format, planned.layouts, planned.same_files)
        written = sorted(p for p in part.iterdir())
        done.files = [_info(p) for p in written]
        _write_manifest(part / MANIFEST, done, weights)
    done.files = [_moved(info, target.path) for info in done.files]
    return done


def _fill(paths: list[Path], planned: Plan, weights: Weights, progress: Progress | None) -> list[str]:
    """Opens every file, then reads, encodes and writes tensor by tensor. Returns what an engine that fuses would get wrong."""
    writers = [FileWriter(path, layout) for path, layout in zip(paths, planned.layouts, strict=True)]
    where = {key: writer for writer in writers for key in writer.layout.slots}
    total = sum(slot.nbytes for layout in planned.layouts for slot in layout.slots.values())
    done, second = 0, _SecondLevels()
    try:
        for name, parts in planned.parts.items():
            if not parts:
                continue
            tensor = weights.get(name)
            second.see(name, tensor)
            for key, value in planned.form.encode(name, tensor).items():
                slot = where[key].layout.slots[key]
                where[key].put(key, fitted(value, slot), cast=True)
                done += slot.nbytes
            if progress is not None:
                progress(done, total, name)
    except BaseException:
        for writer in writers:
            writer.abandon()
        raise
    for writer in writers:
        writer.close()
    return second.notes()


class _SecondLevels:
    """The second-level scales of fused groups, by group."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, ...], set[float]] = {}

    def see(self, name: str, value: Any) -> None:
        group = shared_group(name)
        if len(group) > 1 and isinstance(value, PackedTensor):
            scales = set() if value.global_scale is None else set(value.global_scale.flatten().tolist())
            self._seen.setdefault(group, set()).update(scales or {1.0})

    def notes(self) -> list[str]:
        torn = [group for group, scales in self._seen.items() if len(scales) > 1]
        if not torn:
            return []
        return [
            f"{len(torn)} fused groups have members with different second-level scales (first: {', '.join(torn[0])}): an "
            "engine that fuses them and keeps one scale, as vLLM does, computes other weights"
        ]


def _dtype(weights: Weights, target: Target) -> torch.dtype | None:
    if target.dtype == "auto":
        return None if weights.format == target.format else _OWN_DTYPE.get(target.format)
    return DTYPES.get(target.dtype)


def refuse_own_input(path: Path, inputs: list[Path]) -> None:
    """Raises UserError when writing `path` would touch what is being read."""
    for source in inputs:
        for taken in (source.resolve(), source.parent.resolve()):
            same = path.resolve() == taken or (path.exists() and taken.exists() and path.samefile(taken))
            if same or (path.is_dir() and path.resolve() in taken.parents):
                raise UserError(f"{path} is, or holds, what is being read ({source}); give another name")


def check_space(path: Path, needed: int) -> None:
    """Raises UserError when the disk of `path` has less than `needed` bytes left."""
    parent = path.absolute().parent
    if not parent.is_dir():
        raise UserError(f"{path}: its folder {parent} does not exist; create it first")
    free = shutil.disk_usage(parent).free
    if needed + SLACK > free:
        raise UserError(
            f"{path} needs {needed / 2**20:,.0f} MiB, and the disk has {free / 2**20:,.0f} MiB left; make room or give a "
            "path on another disk"
        )


def manifest_of(path: Path) -> Path:
    """Of what `export` wrote as `path`: in the folder, or beside the .dat file. Raises UserError when there is none."""
    manifest = path / MANIFEST if path.is_dir() else _beside(path)
    if not manifest.is_file():
        raise UserError(f"{path}: no manifest ({manifest.name}), which `fp4lab export`, `convert` and task.output write")
    return manifest


def verify(manifest: Path) -> list[str]:
    """What differs from a manifest: files missing, of another size, of another checksum. Raises UserError."""
    files = read_json(manifest).get("files")
    if not isinstance(files, dict) or not all(isinstance(e, dict) and {"bytes", "sha256"} <= e.keys() for e in files.values()):
        raise UserError(f'{manifest}: expected "files", an object of bytes and sha256 by name')
    wrong = []
    for name, entry in files.items():
        path = manifest.parent / name
        if not path.is_file():
            wrong.append(f"{name} is missing")
        elif path.stat().st_size != entry["bytes"]:
            wrong.append(f"{name} has {path.stat().st_size} bytes; the manifest says {entry['bytes']}")
        elif FileInfo("", path, "").sha256 != entry["sha256"]:
            wrong.append(f"{name} has another SHA-256 than the manifest says")
    return wrong


def _clear_manifest(path: Path) -> None:
    """An old manifest would not be the new file's, if the two writes are cut apart."""
    if path.is_file():
        _beside(path).unlink(missing_ok=True)


def _beside(path: Path) -> Path:
    return path.with_name(path.name + ".manifest.json")


def _write_manifest(path: Path, done: Exported, weights: Weights) -> None:
    text = {
        "written_by": "fp4lab",
        "format": done.format,
        "source": {"format": weights.format, "files": [info.path.name for info in weights.files]},
        "files": {info.path.name: {"bytes": info.bytes, "sha256": info.sha256} for info in done.files},
        "quantised": [asdict(e) for e in done.errors],
        "notes": done.notes,
    }
    with whole_file(path) as part:
        part.write_text(json.dumps(text, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _info(path: Path) -> FileInfo:
    info = FileInfo("output", path, path.suffix.lstrip("."))
    _ = info.sha256  # known before the folder moves
    return info


def _moved(info: FileInfo, path: Path) -> FileInfo:
    """The same file where it is now, with the checksum that is known."""
    moved = FileInfo(info.role, path.resolve() / info.path.name, info.format)
    moved.__dict__["sha256"] = info.sha256
    return moved
