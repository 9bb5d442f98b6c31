"""One AdamW update of Qwen3-4B's linears: bytes a second of the packed kernels, beside torch's fused AdamW.

python benchmarks/adamw_kernel.py [--layers 6] [--repeat 20] [--tokens 8,32] [--apart]

Layers of their own memory, so that nothing stays in a cache; a captured graph of all their updates is replayed; median.
One JSON line for each. Bytes are those that must move: gradients read, state read and written. Lines with `tokens` begin
with the two factors of the gradient, dy [tokens, out] and x [tokens, in]: the gradient's own bytes are not counted there, since
they need not move (`gradient` says whether they do). q/k/v and gate/up are one matrix each, as in a step, but with --apart.
"""

import argparse
import json
import statistics
from collections.abc import Callable

import torch

from fp4lab.nvfp4 import pack
from fp4lab.train.adamw import AdamWOptions, ParameterState
from fp4lab.train.kernel_step import KernelStep

JOINT = [(6144, 2560), (2560, 4096), (19456, 2560), (2560, 9728)]
APART = [(4096, 2560), (1024, 2560), (1024, 2560), (2560, 4096), (9728, 2560), (9728, 2560), (2560, 9728)]
Shapes = list[tuple[int, int]]


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


def factors(shape: tuple[int, int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    dy, x = (torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16) for n in shape)
    return dy * 1e-3, x


def ours(shapes: Shapes, repeat: int, master: str, state: str, tokens: int = 0, gradient: str = "given") -> dict:
    options = AdamWOptions(master=master, state=state)
    states = [
        ParameterState(i, "w", None, pack(torch.randn(shape, device="cuda") * 0.02), options) for i, shape in enumerate(shapes)
    ]
    fast = KernelStep(options, states[0].device)
    fast.count = False
    fast.set(1, 1e-5)
    parts = [factors((s.rows, s.cols), tokens) for s in states] if tokens else []
    grads = [torch.randn(s.rows, s.cols, device="cuda", dtype=torch.bfloat16) * 1e-3 for s in states if not tokens]

    def body() -> None:
        for s, g in zip(states, grads, strict=False):
            fast.update(s, g, 0)
        for s, (dy, x) in zip(states, parts, strict=False):
            if gradient == "made on the way":
                fast.update_product(s, dy, x)
            else:
                fast.update(s, dy.T @ x, 0)

    kept = sum(t.numel() * t.element_size() for s in states for _, t in s.tensors())
    numbers = sum(s.rows * s.cols for s in states)
    moved = 2 * kept + (0 if tokens else 2 * numbers)
    about = {"tokens": tokens, "gradient": gradient} if tokens else {}
    return {"peer": "fp4lab", **about, "master": master, "state": state, **result(replay_ms(body, repeat), numbers, moved)}


def torch_fused(shapes: Shapes, repeat: int, tokens: int = 0) -> dict:
    parameters = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=torch.bfloat16)) for s in shapes]
    parts = [factors((p.shape[0], p.shape[1]), tokens) for p in parameters] if tokens else []
    for p in parameters:
        p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW(parameters, lr=1e-5, fused=True, capturable=True)

    def body() -> None:
        for p, (dy, x) in zip(parameters, parts, strict=False):
            torch.mm(dy.T, x, out=p.grad)
        adamw.step()

    numbers = sum(p.numel() for p in parameters)
    about = {"tokens": tokens, "gradient": "kept"} if tokens else {}
    moved = (12 if tokens else 14) * numbers
    return {"peer": "torch-adamw-fused-bf16", **about, **result(replay_ms(body, repeat), numbers, moved)}


def result(ms: float, numbers: int, total: int) -> dict:
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
    parser.add_argument("--tokens", type=lambda x: [int(n) for n in x.split(",")], default=[8, 32])
    parser.add_argument("--apart", action="store_true")
    args = parser.parse_args()
    shapes = (APART if args.apart else JOINT) * args.layers

    def show(line: dict) -> None:
        print(json.dumps({**line, "joint": not args.apart}), flush=True)
        torch.cuda.empty_cache()

    default = "packed_stochastic", "nvfp4_two_level"
    for kind in (default, ("packed", "nvfp4_two_level"), ("packed_stochastic", "bf16"), ("packed_stochastic", "fp32")):
        show(ours(shapes, args.repeat, *kind))
    show(torch_fused(shapes, args.repeat))
    for tokens in args.tokens:
        for gradient in ("made on the way", "made before"):
            show(ours(shapes, args.repeat, *default, tokens, gradient))
        show(torch_fused(shapes, args.repeat, tokens))


if __name__ == "__main__":
    main()
