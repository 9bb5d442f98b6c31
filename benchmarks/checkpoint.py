"""Reading and converting a checkpoint of Qwen3-4B's shapes: seconds and peak host memory, beside safetensors' own reader.

python benchmarks/checkpoint.py [--layers 36] [--repeat 3] [--folder /tmp]

Writes a bf16 file of random weights, converts it to NVFP4 (compressed-tensors and .dat), and reads each of the three: ours,
tensor by tensor, all kept; ours, one at a time; and safetensors.torch.load_file of the same bytes, every page of it touched.
Each measurement is a process of its own, with the files in the page cache; median of the repeats. One JSON line for each.
`peak_mib` is the process's high-water mark above what it had before, Python and torch imported. 36 layers need 13 GB of disk.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fp4lab.checkpoint import open_weights
from fp4lab.checkpoint.convert import convert, recipe_for
from fp4lab.checkpoint.export import Target
from fp4lab.checkpoint.layout import FileWriter
from fp4lab.checkpoint.safetensors_file import plan


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """Qwen3-4B's tensors, with so many layers."""
    from fp4lab.interactive import compose

    c = compose(["model=qwen3_4b", "weights=random"], Path("conf"))["model"]["config"]
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    one = {
        "self_attn.q_proj": (q, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, q),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    found = {"model.embed_tokens.weight": (c["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    return found | {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in one.items()}


def write_source(folder: Path, layers: int) -> None:
    from fp4lab.interactive import compose

    folder.mkdir(parents=True)
    config = {**compose(["model=qwen3_4b", "weights=random"], Path("conf"))["model"]["config"], "num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    layout = plan("model.safetensors", {name: (torch.bfloat16, shape) for name, shape in shapes(layers).items()})
    with FileWriter(folder / "model.safetensors", layout) as writer:
        for name, shape in shapes(layers).items():
            size = math.prod(shape)
            writer.put(name, noise.repeat(-(-size // len(noise)))[:size].view(shape))


def read_ours(path: Path, keep: bool) -> None:
    weights = open_weights("dat" if path.suffix == ".dat" else "hf", path)
    kept = []
    for name in weights.names():
        tensor = weights.get(name)
        if keep:
            kept.append(tensor)
    weights.close()


def read_peer(path: Path) -> None:
    from safetensors.torch import load_file

    tensors = load_file(path / "model.safetensors")
    for t in tensors.values():
        t.reshape(-1).view(torch.uint8)[:: resource.getpagesize()].sum()


def quantise(path: Path, out: Path) -> None:
    form = "dat" if out.suffix == ".dat" else "compressed-tensors"
    convert(path, Target(out, form), recipe_for(form))


def measured(what: str, path: Path, target: str) -> dict[str, Any]:
    """In a process of its own."""
    work: dict[str, Callable[[], Any]] = {
        "fp4lab": lambda: read_ours(path, True),
        "fp4lab-one-at-a-time": lambda: read_ours(path, False),
        "safetensors-load_file": lambda: read_peer(path),
        "fp4lab-convert": lambda: quantise(path, Path(target)),
    }
    if what == "safetensors-load_file":
        import safetensors.torch  # noqa: F401 - not part of the time
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew: it was the parent's
    before, started = _status("VmRSS"), time.perf_counter()
    work[what]()
    return {"s": time.perf_counter() - started, "peak_mib": _status("VmHWM") - before}


def _status(key: str) -> float:
    """MiB, of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


def run(what: str, path: Path, repeat: int, target: str = "") -> None:
    found = []
    for _ in range(repeat):
        command = [sys.executable, __file__, "--one", what, str(path), target]
        found.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
    file = Path(target) if target else path
    size = sum(f.stat().st_size for f in ([file] if file.is_file() else file.glob("*.safetensors")))
    line = {"peer": what, "file": file.name, "gib": round(size / 2**30, 3), "repeats": repeat}
    line |= {key: round(statistics.median(f[key] for f in found), 3) for key in ("s", "peak_mib")}
    print(json.dumps({**line, "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        what, path, target = args.one
        print(json.dumps(measured(what, Path(path), target)))
        return
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        bf16, public, dat = Path(folder) / "bf16", Path(folder) / "nvfp4", Path(folder) / "model.dat"
        write_source(bf16, args.layers)
        run("fp4lab-convert", bf16, 1, str(public))
        run("fp4lab-convert", bf16, 1, str(dat))
        for path in (bf16, public, dat):
            for what in ("fp4lab", "fp4lab-one-at-a-time", "safetensors-load_file"):
                if path != dat or what != "safetensors-load_file":
                    run(what, path, args.repeat)


if __name__ == "__main__":
    main()
