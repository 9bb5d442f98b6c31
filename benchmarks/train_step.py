"""One full-parameter AdamW step: memory and time of ours beside other people's. One JSON line for each peer and length.

python benchmarks/train_step.py [--seq 8,2048] [--recompute none] [--peers fp4lab,fp4lab-chunked,torch-adamw,...]
                                [--model qwen3_4b] [--steps 5]

Random weights, random tokens, batch 1, every target counted, bfloat16 on a GPU (float32 on a CPU, where memory is not
measured). Peers train transformers' Qwen3 of the same shapes with a tied head. Each measurement is a
process of its own. `first_ms` is the first step, with compilation and the making of state; `ms` the median of the rest.
"""

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

GIB = 1 << 30
OURS = {
    "fp4lab": ["step=fused", "weights.embedding=nvfp4", "step.health_every=0"],
    "fp4lab-deterministic": ["step=fused", "weights.embedding=nvfp4", "step.health_every=0", "deterministic=true"],
    "fp4lab-counting": ["step=fused", "weights.embedding=nvfp4"],
    "fp4lab-eager": ["step=fused", "weights.embedding=nvfp4", "step.health_every=0", "step.graph=false"],
    "fp4lab-one-stream": ["step=fused", "weights.embedding=nvfp4", "step.health_every=0", "step.streams=0"],
    "fp4lab-torch-ops": ["step=fused", "weights.embedding=nvfp4", "step.kernels=false", "step.chunk_rows=2048"],
    "fp4lab-raw-embedding": ["step=fused"],
    "fp4lab-chunked": ["step=chunked", "step.chunk_rows=64"],
    "fp4lab-chunked-kernels": ["step=chunked", "step.chunk_rows=64", "step.kernels=true"],
}
PEERS = {  # name: (package, optimizer)
    "torch-adamw": ("torch", "torch.optim.AdamW"),
    "bnb-adamw8bit": ("bitsandbytes", "bitsandbytes.optim.AdamW8bit"),
    "bnb-paged-adamw8bit": ("bitsandbytes", "bitsandbytes.optim.PagedAdamW8bit"),
    "torchao-adamw8bit": ("torchao", "torchao.optim.AdamW8bit"),
    "torchao-adamw4bit": ("torchao", "torchao.optim.AdamW4bit"),
}
Step = Callable[[], float]


def ours(overrides: list[str], model: str, seq: int, recompute: str) -> Step:
    from fp4lab.choices import check
    from fp4lab.interactive import compose
    from fp4lab.tasks.session import open_session
    from fp4lab.tasks.step import make_optimizer
    from fp4lab.tasks.worker import be_deterministic
    from fp4lab.train.fused import FusedAdamW
    from fp4lab.train.graph import GraphedStep
    from fp4lab.train.loss import cross_entropy

    common = [f"model={model}", "weights=random", f"seq_len={seq}", f"recompute={recompute}", "guard.force=true"]
    config = compose([*common, "deterministic=false", *overrides], Path("conf"))  # as the peers
    check(config)
    be_deterministic(config["deterministic"])
    session = open_session(config, lambda event: None)
    session.store.dense = None  # path R has no part in a step
    net: Any = session.model
    optimizer = make_optimizer(session, lambda event: None)
    ids, targets = tokens(session.shape.vocab_size, seq, session.device)
    graphed = None
    if isinstance(optimizer, FusedAdamW):
        optimizer.count = bool(config["step"]["health_every"])
        graphed = GraphedStep(net, optimizer, eager=not config["step"]["graph"])
        print(f"{optimizer.describe()}; {graphed.describe()}", file=sys.stderr)

    def step() -> float:
        if isinstance(optimizer, FusedAdamW):
            assert graphed is not None
            loss = graphed.step(config["lr"], ids, targets)
        else:
            loss = cross_entropy(net, net.hidden(ids), targets)
            loss.backward()
            optimizer.step(config["lr"])
        return loss.item()

    return step


def theirs(path: str, model: str, seq: int, recompute: str) -> Step:
    import transformers

    from fp4lab.interactive import compose
    from fp4lab.model.config import Qwen3Config

    config = compose([f"model={model}", "weights=random"], Path("conf"))["model"]
    source = config["config"] or json.loads((Path(config["path"]) / "config.json").read_text())
    values: dict[str, Any] = {**Qwen3Config.from_dict(dict(source), model).to_dict(), "attn_implementation": "sdpa"}
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with device:
        net: Any = transformers.Qwen3ForCausalLM._from_config(transformers.Qwen3Config(**values), dtype=dtype)
    net.train()
    net.config.use_cache = False
    if recompute != "none":  # theirs is by blocks alone
        net.gradient_checkpointing_enable({"use_reentrant": False})
    module, _, name = path.rpartition(".")
    more = {"fused": True} if path.startswith("torch.optim") else {}
    optimizer = getattr(importlib.import_module(module), name)(net.parameters(), lr=1e-4, weight_decay=0.0, **more)
    ids, targets = tokens(values["vocab_size"], seq, device)

    def step() -> float:
        logits = net(ids).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), targets[0])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def tokens(vocab_size: int, seq: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocab_size, (1, seq + 1), generator=torch.Generator().manual_seed(0)).to(device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path
        return "source"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    torch.manual_seed(0)
    cuda = torch.cuda.is_available()
    name, seq = args.one, args.seq[0]
    package, path = PEERS.get(name, ("fp4lab", ""))
    step = ours(OURS[name], args.model, seq, args.recompute) if name in OURS else theirs(path, args.model, seq, args.recompute)
    times, losses = [], []
    if cuda:
        torch.cuda.empty_cache()
    warm = 2 if name in OURS else 1  # ours captures its graph in the second step
    for n in range(args.steps + warm):
        if cuda and n == 1:
            torch.cuda.reset_peak_memory_stats()  # of a step that has all its state; the capture is among them
        started = time.perf_counter()
        losses.append(step())
        if cuda:
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - started))
    return {
        "peer": name,
        "version": version(package),
        "model": args.model,
        "seq": seq,
        "recompute": args.recompute,
        "ms": round(statistics.median(times[warm:]), 2),
        "first_ms": round(times[0], 1),
        "capture_ms": round(times[1], 1) if warm == 2 else None,
        "peak_alloc_gib": round(torch.cuda.max_memory_allocated() / GIB, 3) if cuda else None,
        "peak_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 3) if cuda else None,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=lambda x: [int(n) for n in x.split(",")], default=[8, 2048])
    parser.add_argument("--recompute", choices=("none", "block", "selective"), default="none")
    parser.add_argument("--peers", type=lambda x: x.split(","), default=[*OURS, *PEERS])
    parser.add_argument("--model", default="qwen3_4b")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args)))
        return
    for seq in args.seq:
        for name in args.peers:
            package = PEERS.get(name, ("fp4lab", ""))[0]
            if importlib.util.find_spec(package) is None:
                print(f"{name}: {package} is not installed; left out", file=sys.stderr)
                continue
            options = ["--seq", str(seq), "--recompute", args.recompute, "--model", args.model, "--steps", str(args.steps)]
            command = [sys.executable, __file__, "--one", name, *options]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            line = done.stdout.strip().splitlines()[-1:] or [json.dumps({"peer": name, "seq": seq, "failed": done.returncode})]
            print(line[0], flush=True)


if __name__ == "__main__":
    main()
