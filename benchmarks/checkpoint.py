"""Loading and converting a checkpoint of Qwen3's shapes: seconds and host memory, beside the safetensors library. JSON lines.

python benchmarks/checkpoint.py [--model qwen3_4b] [--layers 7] [--convert-layers 1] [--what load,convert] [--folder DIR]
                                [--repeat 3] [--cold]

Makes files with random content, a tensor at a time: bf16, compressed-tensors and .dat to load, bf16 to convert. Every try is a
process of its own, which imports first and is measured from then on; the median of the tries is printed. Files are in the page
cache, or with --cold dropped from it before each try. Loading all of 4B (--layers 0) takes 15 GB of disk and 9 of memory; of
a conversion (--convert-layers) two layers show the same peak as all. The default is small.

s           of the work, without imports
peak_mib    resident memory at its highest, beyond what the process had before (VmHWM; the kernel counts mapped files too)
held_mib    when all is done and kept: anonymous memory alone, which the kernel cannot drop

load     fp4lab             every tensor read and kept
         fp4lab-store       ready to compute: q/k/v and gate/up joined, a tied head packed where the file has none
         fp4lab-streamed    every tensor read and let go, as a conversion does
         safetensors        load_file, which maps the file and has read nothing yet
         safetensors-used   load_file, then one byte of every page: what the first forward pays
         safetensors-pread  load_file(backend="pread")
         read               the bytes of the file into one buffer, nothing parsed
convert  fp4lab             bf16 to FILE, quantised
         compressed-tensors load_file, its own compressor tensor by tensor, save_file
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from fp4lab.checkpoint import open_weights
from fp4lab.checkpoint.convert import convert, recipe_for, return_freed_memory
from fp4lab.checkpoint.export import Target, export
from fp4lab.checkpoint.weights import MemoryWeights, TensorInfo, Weights
from fp4lab.model.config import HEAD, Qwen3Config
from fp4lab.model.store import WeightStore, build_store, random_weights
from fp4lab.nvfp4 import BLOCK, PackedTensor, pack

ROOT = Path(__file__).resolve().parents[1]
FILES = {"hf": "hf/model.safetensors", "compressed-tensors": "compressed-tensors/model.safetensors", "dat": "model.dat"}
LOADS = {
    "hf": ("fp4lab", "fp4lab-streamed", "safetensors", "safetensors-used", "safetensors-pread", "read"),
    "compressed-tensors": (
        *("fp4lab", "fp4lab-store", "fp4lab-streamed"),
        *("safetensors", "safetensors-used", "safetensors-pread", "read"),
    ),
    "dat": ("fp4lab", "fp4lab-store", "fp4lab-streamed", "read"),
}
CONVERSIONS = (("fp4lab", "dat"), ("fp4lab", "compressed-tensors"), ("compressed-tensors", "compressed-tensors"))
PAGE = 4096


def weights_of(folder: Path, form: str) -> Weights:
    path = folder / FILES[form]
    return open_weights("dat", path) if form == "dat" else open_weights("hf", path.parent)


def load(peer: str, folder: Path, form: str) -> Callable[[], object]:
    """What is timed: it returns what the caller must keep."""
    path = folder / FILES[form]

    def ours(keep: bool) -> dict[str, Any]:
        weights = weights_of(folder, form)
        kept = {}
        for name in weights.names():
            value = weights.get(name)
            if keep:
                kept[name] = value
        weights.close()
        return kept

    def store() -> WeightStore:
        weights = weights_of(folder, form)
        built = build_store(
            Qwen3Config.from_json(folder / "config/config.json"),
            set(weights.names()),
            weights.get,
            device="cpu",
            dtype=torch.bfloat16,
            quantise=pack,
            keep_dense=False,
            source=str(path),
        )
        weights.close()
        return built

    def library(backend: str, used: bool = False) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        tensors = load_file(path, backend=backend)
        if used:
            for t in tensors.values():
                t.reshape(-1).view(torch.uint8)[::PAGE].sum()
        return tensors

    def read() -> torch.Tensor:
        buffer = torch.empty(path.stat().st_size, dtype=torch.uint8)
        view, at = memoryview(buffer.numpy()), 0  # type: ignore[arg-type]
        with path.open("rb", buffering=0) as f:
            while got := f.readinto(view[at : at + (1 << 30)]):
                at += got
        return buffer

    return {
        "fp4lab": lambda: ours(True),
        "fp4lab-streamed": lambda: ours(False),
        "fp4lab-store": store,
        "safetensors": lambda: library("mmap"),
        "safetensors-used": lambda: library("mmap", used=True),
        "safetensors-pread": lambda: library("pread"),
        "read": read,
    }[peer]


def conversion(peer: str, folder: Path, form: str) -> Callable[[], object]:
    def ours() -> None:
        return_freed_memory()  # as the command does
        path = folder / FILES[form]
        convert(folder / "hf", Target(path if form == "dat" else path.parent, form, overwrite=True), recipe_for(form))

    def theirs() -> None:
        from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import NVFP4A16
        from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
        from safetensors.torch import load_file, save_file

        scheme = QuantizationScheme(**NVFP4A16, targets=["Linear"])
        tensors, out = load_file(folder / FILES["hf"]), {}
        for name in list(tensors):
            w = tensors.pop(name)
            if not name.endswith("_proj.weight"):
                out[name] = w
                continue
            second = generate_gparam(w.amin(), w.amax()).reshape(1)
            blocks = w.unflatten(-1, (-1, 16))
            scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights, global_scale=second)
            state = {"weight": w, "weight_scale": scale, "weight_global_scale": second}
            packed = NVFP4PackedCompressor.compress(state, scheme)
            out |= {f"{name.removesuffix('weight')}{k}": v.contiguous() for k, v in packed.items()}
        save_file(out, folder / "theirs.safetensors", metadata={"format": "pt"})

    return ours if peer == "fp4lab" else theirs


def status(key: str) -> float:
    """A line of /proc/self/status, MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) / 1024


def child(what: str, peer: str, folder: Path, form: str) -> None:
    """One try, in this process."""
    import compressed_tensors  # noqa: F401
    import safetensors.torch  # noqa: F401

    work = (load if what == "load" else conversion)(peer, folder, form)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts here
    before, anonymous = status("VmRSS"), status("RssAnon")
    start = time.monotonic()
    kept = work()
    seconds = time.monotonic() - start
    print(json.dumps({"s": seconds, "peak_mib": status("VmHWM") - before, "held_mib": status("RssAnon") - anonymous}))
    del kept


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measure(args: argparse.Namespace, folder: Path, what: str, peer: str, form: str) -> None:
    """Prints the line of one way."""
    path, tries = folder / FILES[form], []
    for _ in range(args.repeat):
        if args.cold:
            forget(folder)
        command = [sys.executable, __file__, "--child", what, peer, form, "--folder", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{what} {peer} {form} failed:\n{done.stderr}")
        tries.append(json.loads(done.stdout))
    median = {k: statistics.median(t[k] for t in tries) for k in tries[0]}
    line = {"what": what, "file": form, "peer": peer, "model": args.model, "layers": args.layers}
    line |= {"cache": "cold" if args.cold else "warm", "tries": args.repeat, "file_mib": round(path.stat().st_size / 2**20)}
    line |= {"s": round(median["s"], 3), "s_all": [round(t["s"], 3) for t in tries]}
    line |= {k: round(median[k]) for k in ("peak_mib", "held_mib")}
    print(json.dumps({**line, **versions()}), flush=True)


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {p: version(p) for p in ("torch", "safetensors", "compressed-tensors")}


class Made(MemoryWeights):
    """Random weights of a model, each made when asked for; packed as `form` has them, or bf16."""

    def __init__(self, shape: Qwen3Config, form: str):
        names, self._floats = random_weights(shape, 0, "cpu", torch.bfloat16)
        self._shapes: dict[str, tuple[int, ...]] = {**shape.linears(), **shape.raw(), HEAD: shape.linear_shape("lm_head")}
        self._packed = set(shape.linears()) if form != "hf" else set()
        self._levels = "single" if form == "dat" else "tensor"
        if form == "dat":
            self._packed.add(HEAD)
        super().__init__(dict.fromkeys(sorted(names | self._packed)))  # type: ignore[arg-type]

    def info(self, name: str) -> TensorInfo:
        packed = name in self._packed
        return TensorInfo(self._shapes[name], None if packed else torch.bfloat16, self._levels, self._levels == "tensor")

    def get(self, name: str) -> torch.Tensor | PackedTensor:
        if name not in self._packed:
            return self._floats(name)
        rows, cols = self._shapes[name]
        codes = torch.randint(0, 256, (rows, cols // 2), dtype=torch.uint8)
        scales = torch.randint(0x08, 0x40, (rows, cols // BLOCK), dtype=torch.uint8).view(torch.float8_e4m3fn)
        if self._levels == "single":
            return PackedTensor(codes, scales, None, (rows, cols))
        return PackedTensor(codes, scales, torch.tensor(1000.0), (rows, cols), divide=True)


def run(args: argparse.Namespace, what: str, layers: int, folder: Path) -> None:
    """Makes the files of one kind of work in `folder`, and measures it."""
    config = yaml.safe_load((ROOT / f"conf/model/{args.model}.yaml").read_text())["config"]
    args.layers = min(layers or config["num_hidden_layers"], config["num_hidden_layers"])
    given = folder / "config"
    given.mkdir()
    (given / "config.json").write_text(json.dumps({"model_type": "qwen3", **config, "num_hidden_layers": args.layers}))
    shape = Qwen3Config.from_json(given / "config.json")
    for form in LOADS if what == "load" else ["hf"]:
        path = folder / FILES[form]
        target = Target(path if form == "dat" else path.parent, form, config=given, shard_bytes=1 << 40)
        export(Made(shape, form), target)
    loads = [(peer, form) for form, peers in LOADS.items() for peer in peers]
    for peer, form in loads if what == "load" else CONVERSIONS:
        measure(args, folder, what, peer, form)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("qwen3_0_6b", "qwen3_4b"), default="qwen3_0_6b")
    parser.add_argument("--layers", type=int, default=7, help="of the files to load; 0: all that the model has")
    parser.add_argument("--convert-layers", type=int, default=1)
    parser.add_argument("--what", type=lambda x: x.split(","), default=["load", "convert"])
    parser.add_argument("--folder", type=Path, help="where the files are made, and removed again")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, peer, form = args.child
        child(what, peer, args.folder, form)
        return
    for kind, layers in (("load", args.layers), ("convert", args.convert_layers)):
        if kind in args.what:
            with tempfile.TemporaryDirectory(dir=args.folder, prefix="checkpoint-bench-") as name:
                run(args, kind, layers, Path(name))


if __name__ == "__main__":
    main()
