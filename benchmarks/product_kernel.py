"""Products of few tokens with Qwen3-4B's linears that decode on the way, beside decoding first, and beside bf16 weights.

python benchmarks/product_kernel.py [--layers 8] [--tokens 1,8,16,32] [--repeat 20]

Layers of their own memory, so that nothing stays in a cache; a captured graph of all their products is replayed; median.
One JSON line for each; `ms_4b` is that of 36 layers. `tb_s` counts what must be read of the weights.
"""

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from adamw_kernel import APART, replay_ms
from torch import Tensor

from fp4lab.nvfp4 import PackedTensor, pack, unpack
from fp4lab.nvfp4.product_kernel import product, product_back

Product = Callable[[Tensor, PackedTensor], Tensor]
PEERS: dict[tuple[str, str], Product] = {
    ("fp4lab", "forward"): product,
    ("decode-then-cublas", "forward"): lambda x, p: F.linear(x, unpack(p, x.dtype)),
    ("fp4lab", "backward"): product_back,
    ("decode-then-cublas", "backward"): lambda dy, p: dy @ unpack(p, dy.dtype),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=lambda x: [int(n) for n in x.split(",")], default=[1, 8, 16, 32])
    parser.add_argument("--repeat", type=int, default=20)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/product_kernel.py measures a GPU's kernels; there is none here")
    packed = [pack(torch.randn(shape, device="cuda") * 0.02) for shape in APART * args.layers]
    dense = [unpack(p, torch.bfloat16) for p in packed]
    nbytes = {"packed": sum(sum(t.nbytes for t in p.tensors()) for p in packed), "bf16": sum(w.nbytes for w in dense)}
    for n in args.tokens:
        rows = {size: torch.randn(n, size, device="cuda", dtype=torch.bfloat16) for shape in APART for size in shape}
        for way in ("forward", "backward"):
            side = 1 if way == "forward" else 0
            for peer, product_of in ((name, f) for (name, direction), f in PEERS.items() if direction == way):
                body = _all(product_of, [(rows[p.shape[side]], p) for p in packed])
                report(peer, way, n, replay_ms(body, args.repeat), args.layers, nbytes["packed"])
            pairs = [(rows[w.shape[side]], w.T if way == "forward" else w) for w in dense]
            report("cublas-bf16", way, n, replay_ms(_all(torch.matmul, pairs), args.repeat), args.layers, nbytes["bf16"])


def _all(product_of: Callable, pairs: list) -> Callable[[], None]:
    def body() -> None:
        for x, w in pairs:
            product_of(x, w)

    return body


def report(peer: str, way: str, tokens: int, ms: float, layers: int, nbytes: int) -> None:
    line = {"peer": peer, "way": way, "tokens": tokens, "ms": round(ms, 3), "ms_4b": round(ms * 36 / layers, 2)}
    line |= {"tb_s": round(nbytes / ms / 1e9, 2), "device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
