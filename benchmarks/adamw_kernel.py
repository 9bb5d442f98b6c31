"""One AdamW update of Qwen3-4B's linears, gradients given: bytes a second of the packed kernel, beside torch's fused AdamW.

python benchmarks/adamw_kernel.py [--layers 6] [--repeat 20]

Layers of their own memory, so that nothing stays in a cache; a captured graph of all their updates is replayed; median.
One JSON line for each. Bytes are those that must move: gradients read, state read and written.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch

from fp4lab.nvfp4 import pack
from fp4lab.train.adamw import AdamWOptions, ParameterState
from fp4lab.train.kernel_step import KernelStep

LAYER = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]


def replay_ms(body: Callable[[], None], repeat: int) -> float:
    """Median milliseconds of a replayed graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        body()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    times = []
    for _ in range(repeat + 3):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times[3:])


def ours(layers: int, repeat: int, **choices) -> dict:
    options = AdamWOptions(**choices)
    states = [
        ParameterState(i, "w", None, pack(torch.randn(shape, device="cuda") * 0.02), options)
        for i, shape in enumerate(LAYER * layers)
    ]
    grads = [torch.randn(s.rows, s.cols, device="cuda", dtype=torch.bfloat16) * 1e-3 for s in states]
    fast = KernelStep(options, states[0].device)
    fast.set(1, 1e-5)

    def body() -> None:
        for s, g in zip(states, grads, strict=True):
            fast.update(s, g, 0)

    kept = sum(t.numel() * t.element_size() for s in states for _, t in s.tensors())
    return {"peer": "fp4lab", **choices, **result(replay_ms(body, repeat), grads, 2 * kept)}


def torch_fused(layers: int, repeat: int) -> dict:
    parameters = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in LAYER * layers]
    for p in parameters:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True, capturable=True)
    return {
        "peer": "torch-adamw-fused-bf16",
        **result(replay_ms(adamw.step, repeat), parameters, 12 * sum(p.numel() for p in parameters)),
    }


def result(ms: float, grads: list, moved: int) -> dict:
    numbers = sum(g.numel() for g in grads)
    total = moved + 2 * numbers
    return {
        "parameters": numbers,
        "ms": round(ms, 3),
        "bytes_a_parameter": round(total / numbers, 3),
        "tb_s": round(total / ms / 1e9, 3),
        "ns_a_kparameter": round(ms * 1e9 / numbers, 3),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    for choices in (
        {"master": "packed_stochastic", "state": "nvfp4_two_level"},
        {"master": "packed", "state": "nvfp4_two_level"},
        {"master": "packed_stochastic", "state": "bf16"},
        {"master": "packed_stochastic", "state": "fp32"},
    ):
        print(json.dumps(ours(args.layers, args.repeat, **choices)), flush=True)
        torch.cuda.empty_cache()
    print(json.dumps(torch_fused(args.layers, args.repeat)), flush=True)


if __name__ == "__main__":
    main()
