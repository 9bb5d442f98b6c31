"""How fast NVFP4 weights of Qwen3-4B's shapes are decoded on a GPU, beside a copy of the same bytes. Prints JSON.

python benchmarks/unpack.py [--dtype bfloat16] [--repeat 50]

us      median time of one call, from events on the device's stream around calls launched back to back
graph   the same replayed from a CUDA graph: without the launching by Python
tb_s    bytes of codes, scales and values over the graph's time; copy: torch's copy_ of as many bytes read and written
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable

import torch

from fp4lab.nvfp4 import codec, kernels, pack

SHAPES = {"qkv": (6144, 2560), "o": (2560, 4096), "gate_up": (19456, 2560), "down": (2560, 9728), "lm_head": (151936, 2560)}


def median_us(call: Callable[[], object], repeat: int, batch: int = 10) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeat):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(batch):
            call()
        end.record()
        torch.cuda.synchronize()
        times.append(1e3 * start.elapsed_time(end) / batch)
    return statistics.median(times)


def graphed(call: Callable[[], object]) -> Callable[[], None]:
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--repeat", type=int, default=50)
    args = parser.parse_args()
    dtype, rows = getattr(torch, args.dtype), {}
    for name, shape in SHAPES.items():
        p = pack(torch.randn(shape, device="cuda") * 0.02)
        moved = p.nbytes + shape[0] * shape[1] * dtype.itemsize
        source = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
        target = torch.empty_like(source)
        kernel, slow = functools.partial(kernels.unpack, p, dtype), functools.partial(codec.unpack, p, dtype)
        graph = median_us(graphed(kernel), args.repeat)
        copy = median_us(graphed(functools.partial(target.copy_, source)), args.repeat)
        rows[name] = {
            "shape": shape,
            "us": round(median_us(kernel, args.repeat), 1),
            "graph_us": round(graph, 1),
            "tb_s": round(moved / graph / 1e6, 2),
            "copy_tb_s": round(moved / copy / 1e6, 2),
            "codec_us": round(median_us(slow, 10, 2), 1),
        }
    print(
        json.dumps(
            {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "dtype": args.dtype, "rows": rows}, indent=1
        )
    )


if __name__ == "__main__":
    main()
