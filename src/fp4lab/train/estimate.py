"""How much memory a step will take, from shapes and formats alone: nothing is allocated.

A row is a kind of tensor, its arithmetic as text, and the phases in which it exists. The estimate is the largest phase. It
counts tensors and is meant to stay below what is measured: allocator rounding and fragmentation come on top
(doc/memory.md has both side by side).

phase     what exists then besides the weights
load      nothing
forward   moments, what autograd keeps: activations, dequantised weights, the logits
backward  moments, gradients, and the embedding's gradient once or twice more while it is summed
step      moments, gradients, the optimizer's scratch
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fp4lab.model.config import BLOCK, EMBEDDING, HEAD, Qwen3Config
from fp4lab.nvfp4 import product_kernel
from fp4lab.train.head import VOCABULARY_CHUNK, room
from fp4lab.train.int8_block import WIDTH

MIB = 1 << 20
PHASES = ("load", "forward", "backward", "step")
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_SCRATCH = 20  # fp32 copies of a chunk's rows that live at once, measured on the CPU
_NVFP4 = 0.5 + 1 / BLOCK
_STATE = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int8_block": 1.0, "nvfp4": _NVFP4, "nvfp4_two_level": _NVFP4}
_MASTER = {"fp32": 4, "bf16": 2, "bf16_stochastic": 2}  # the others are packed


@dataclass(frozen=True)
class Row:
    """`host`: it lies in host memory although the model is on a device."""

    what: str
    formula: str
    mib: float
    phases: tuple[str, ...] = PHASES
    host: bool = False


@dataclass(frozen=True)
class Estimate:
    rows: tuple[Row, ...]

    def at(self, phase: str, host: bool | None = None) -> float:
        """MiB in one phase; on the device alone (False), on the host alone (True), or both."""
        return sum(r.mib for r in self.rows if phase in r.phases and host in (None, r.host))

    def peak(self, host: bool | None = None) -> tuple[str, float]:
        """The phase that needs most, and MiB."""
        return max(((phase, self.at(phase, host)) for phase in PHASES), key=lambda x: x[1])

    def table(self, phase: str, host: bool | None = None) -> str:
        """The rows of a phase, largest first, as text."""
        rows = sorted((r for r in self.rows if phase in r.phases and host in (None, r.host)), key=lambda r: -r.mib)
        lines = [f"  {r.mib:>10.1f} MiB  {r.what:<28} {r.formula}" for r in rows if r.mib >= 0.05]
        return "\n".join([*lines, f"  {self.at(phase, host):>10.1f} MiB  in all, in phase {phase}"])


def estimate(shape: Qwen3Config, config: dict[str, Any], dtype: str, device: str, baseline_mib: float) -> Estimate:
    """Memory of task=step, task=tune or task=chat.

    dtype         the compute dtype, "float32", "bfloat16" or "float16"
    device        "cpu" or "cuda"
    baseline_mib  what the process holds before the model: Python and torch, or the CUDA context
    """
    return Estimate(tuple(_rows(shape, config, dtype, device, baseline_mib)))


def cheaper(shape: Qwen3Config, config: dict[str, Any], dtype: str, device: str, host: bool | None) -> list[tuple[str, float]]:
    """(option, MiB it would save at the peak), most first; only what saves."""
    before = estimate(shape, config, dtype, device, 0.0).peak(host)[1]
    found = []
    for text, changes in _LEVERS:
        changed = {k: dict(v) if isinstance(v, dict) else v for k, v in config.items()}
        for key, value in changes.items():
            group, _, name = key.rpartition(".")
            (changed[group] if group else changed)[name] = value
        if device == "cpu" and any("offload" in key for key in changes):
            continue
        other = changes.get("dtype", dtype)
        saved = before - estimate(shape, changed, str(other), device, 0.0).peak(host)[1]
        if saved > 0.01 * before:
            found.append((text, saved))
    return sorted(found, key=lambda x: -x[1])


_LEVERS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("step=chunked", {"step.name": "chunked"}),
    ("step.state=nvfp4_two_level", {"step.state": "nvfp4_two_level"}),
    ("step.master=packed_stochastic", {"step.master": "packed_stochastic"}),
    ("dtype=bfloat16", {"dtype": "bfloat16"}),
    ("step.offload_mv=true", {"step.offload_mv": True}),
    ("step.offload_grad=true", {"step.offload_grad": True}),
    ("seq_len=8", {"seq_len": 8}),
    ("backend=bridge (evaluates only)", {"backend.name": "bridge"}),
)


def _rows(shape: Qwen3Config, config: dict[str, Any], dtype: str, device: str, baseline_mib: float) -> Iterator[Row]:
    step, backend, kind = config["step"], config["backend"]["name"], config["weights"]["kind"]
    size = _BYTES[dtype]
    linears, raw = dict(shape.linears()), shape.raw()
    head = shape.linear_shape("lm_head")
    tied = shape.tie_word_embeddings and kind in ("random", "hf")  # a .dat brings a head of its own, packed
    packed = {**linears, HEAD: head}
    if config["weights"]["embedding"] == "nvfp4":
        packed |= {} if tied else {EMBEDDING: (shape.vocab_size, shape.hidden_size)}  # a tied one is the head
        raw = {k: v for k, v in raw.items() if k != EMBEDDING}
    n_packed = sum(r * c for r, c in packed.values())
    n_raw = sum(_count(s) for s in raw.values())
    n_embedding = shape.vocab_size * shape.hidden_size
    held = {**linears, **shape.raw(), **({} if tied else {HEAD: head})}
    trained = {k: s for k, s in held.items() if shape.learns(k, step["train_last_layers"])}
    n, n_trained = (sum(map(_count, shapes.values())) for shapes in (held, trained))

    yield Row("process before the model", "CUDA context" if device == "cuda" else "Python and torch", baseline_mib)
    yield _row("packed codes", f"{n_packed:,} weights / 2", n_packed / 2)
    yield _row("block scales", f"{n_packed:,} weights / {BLOCK}", n_packed / BLOCK)
    yield _row("embedding and norms", f"{n_raw:,} x {size} bytes", n_raw * size)
    if config["task"]["name"] == "chat":
        yield from _generation(shape, config, size, packed)
        return
    unquantised = kind in ("random", "hf") and config["weights"]["embedding"] == "raw"
    if unquantised:
        n_dense = n_packed - (_count(head) if tied else 0)
        phases = PHASES if backend != "fp2" else ("load",)
        yield _row("unquantised weights", f"{n_dense:,} x {size} bytes, for path R", n_dense * size, phases)
    if backend not in ("fp2", "dense"):
        largest = max(_count(s) for s in packed.values())
        yield _row("one dequantised linear", f"{largest:,} x {size} bytes", largest * size, ("forward",))
        yield from _activations(shape, config, size, trained=False)
        return
    if step["name"] == "fused":
        yield from _fused(shape, config, size, trained, device)
        return
    chunked = step["name"] != "dense"
    master = step["master"] if chunked else "fp32"
    master_size = _MASTER.get(master, size)
    alone = chunked and backend == "fp2" and master in ("packed", "packed_stochastic")  # linears have no floats
    n_float = n - sum(_count(s) for k, s in held.items() if k in packed) if alone else n
    yield _row("trained parameters", f"{n_float:,} x {master_size} bytes", n_float * master_size)
    if master == "packed_residual" and backend == "fp2":
        n_low = sum(_count(s) for k, s in trained.items() if k in packed)
        yield _row("residuals", f"{n_low:,} x 1 byte", n_low)
    if chunked and step["join"]:
        n_low = sum(_count(s) for k, s in trained.items() if k in packed)
        each = _NVFP4 + _MASTER.get(master, 0)
        yield _row("joined weights", f"{n_low:,} x {each:g} bytes", n_low * each)
    yield from _moments(step, trained, chunked, master_size, device)
    if backend == "fp2" or master_size != size:
        n_kept = sum(_count(s) for k, s in packed.items() if _kept(k, config["recompute"]))
        text = f"{n_kept:,} in the compute dtype, x {size} bytes"
        yield _row("weights kept for backward", text, n_kept * size, ("forward",))
    yield from _activations(shape, config, size, trained=True)
    yield _row("gradients", f"{n_trained:,} x {master_size} bytes", n_trained * master_size, ("backward",))
    offload = chunked and step["offload_grad"] and device == "cuda"
    yield _row("gradients in the step", f"{n_trained:,} x {master_size} bytes", n_trained * master_size, ("step",), offload)
    times = 2 if tied else 1
    text = f"{times} x {n_embedding:,} x {master_size} bytes" + (", head and lookup being added" if tied else "")
    if EMBEDDING in trained:
        yield _row("embedding's gradient again", text, times * n_embedding * master_size, ("backward",))
    if chunked:
        widest = max(s[-1] for s in trained.values())
        scratch = _SCRATCH * step["chunk_rows"] * widest * 4
        yield _row("scratch of a chunk", f"{_SCRATCH} x {step['chunk_rows']} x {widest} x 4 bytes", scratch, ("step",))
    elif device == "cuda":
        yield _row("foreach temporaries", f"{n_trained:,} x {master_size} bytes", n_trained * master_size, ("step",))


def _fused(
    shape: Qwen3Config, config: dict[str, Any], size: int, trained: dict[str, tuple[int, ...]], device: str
) -> Iterator[Row]:
    """step=fused: moments, activations, and of one linear at a time its weight, its gradient and the update's scratch."""
    step, backward = config["step"], ("backward",)
    packed_embedding = config["weights"]["embedding"] == "nvfp4"
    yield from _moments(step, trained, True, size, device, packed_embedding)
    n_low = sum(_count(s) for k, s in trained.items() if not _high_precision(k, s, packed_embedding))
    if step["master"] in _MASTER:
        each = _MASTER[step["master"]]
        yield _row(f"masters ({step['master']})", f"{n_low:,} x {each} bytes", n_low * each)
    elif step["master"] == "packed_residual":
        yield _row("residuals", f"{n_low:,} x 1 byte", n_low)
    yield from _activations(shape, config, size, trained=True)
    largest = max(r * c for r, c in shape.linears().values())
    pieces = VOCABULARY_CHUNK * shape.hidden_size
    if not (device == "cuda" and _decodes_on_the_way(step, config)):
        text = f"2 x {max(largest, pieces):,} x {size} bytes"
        yield _row("one weight and its gradient", text, 2 * max(largest, pieces) * size, backward)
    widest = max(s[-1] for s in trained.values())
    scratch = _SCRATCH * step["chunk_rows"] * widest * 4
    yield _row("scratch of a chunk", f"{_SCRATCH} x {step['chunk_rows']} x {widest} x 4 bytes", scratch, backward)


def _decodes_on_the_way(step: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether kernels make neither a dequantised weight nor a gradient: those of few tokens, in the default formats."""
    formats = step["master"], step["state"]
    return step["kernels"] and formats == ("packed_stochastic", "nvfp4_two_level") and _tokens(config) <= product_kernel.TOKENS


_PROMPT = 32  # tokens a turn of a user is taken to have


def _generation(shape: Qwen3Config, config: dict[str, Any], size: int, packed: dict[str, tuple[int, int]]) -> Iterator[Row]:
    """What generates: the weights as the backend multiplies them, the cache, and the logits of one position."""
    task, backend = config["task"], config["backend"]
    n_packed, largest = sum(r * c for r, c in packed.values()), max(r * c for r, c in packed.values())
    if backend["name"] == "dense":
        yield _row("unquantised weights", f"{n_packed:,} x {size} bytes", n_packed * size)
    elif backend["name"] == "fp2" and backend["eval_cache"]:
        yield _row("dequantised weights, kept", f"{n_packed:,} x {size} bytes", n_packed * size, ("forward",))
    else:
        yield _row("one dequantised linear", f"{largest:,} x {size} bytes", largest * size, ("forward",))
    tokens = task["turns"] * (_PROMPT + task["max_tokens"])
    if config["kvc"]["name"] != "replay":
        each = 2 * shape.kv_size * size
        text = f"{shape.num_hidden_layers} layers x {tokens} tokens x {each:,} bytes"
        yield _row("KV cache", text, shape.num_hidden_layers * tokens * each, ("forward",))
    yield _row("logits", f"{shape.vocab_size:,} x {size + 4} bytes", shape.vocab_size * (size + 4), ("forward",))


def _moments(
    step: dict[str, Any],
    trained: dict[str, tuple[int, ...]],
    chunked: bool,
    master_size: int,
    device: str,
    packed_embedding: bool = False,
) -> Iterator[Row]:
    n = sum(_count(s) for s in trained.values())
    if not chunked:
        yield _row("moments m and v", f"2 x {n:,} x {master_size} bytes", 2.0 * n * master_size, ("step",))
        return
    high = {k: s for k, s in trained.items() if _high_precision(k, s, packed_embedding)}
    low = {k: s for k, s in trained.items() if k not in high}
    n_high, n_low = sum(map(_count, high.values())), sum(map(_count, low.values()))
    each, scales = _STATE[step["state"]], sum(s[0] * _scales_a_row(step["state"], s[1]) for s in low.values())
    host = bool(step["offload_mv"]) and device == "cuda"
    after = ("forward", "backward", "step")
    text = f"2 x {n_low:,} x {each:g} bytes" + (f" + 2 x {scales:,} scales x 4" if scales else "")
    total = 2 * (n_low * each + scales * 4)
    yield _row(f"moments ({step['state']})", text, total, after, host)
    yield _row("moments of embedding, norms", f"2 x {n_high:,} x 4 bytes", 2.0 * n_high * 4, after, host)
    if master_size != 4 or (step["join"] and step["name"] == "chunked"):  # joined ones are copies
        yield _row("masters of embedding, norms", f"{n_high:,} x 4 bytes", n_high * 4, after)


def _activations(shape: Qwen3Config, config: dict[str, Any], size: int, trained: bool) -> Iterator[Row]:
    """What one forward keeps. A token of a layer: the norms' inputs and outputs in fp32 and `size`, q, k, v before and
    after their norm and rotation, the attention's output, gate, up and their product.
    """
    tokens = _tokens(config)
    h, q, kv, i = shape.hidden_size, shape.q_size, shape.kv_size, shape.intermediate_size
    each = (6 * h + 4 * q + 6 * kv + 4 * i) * size
    layers = (config["step"]["train_last_layers"] or shape.num_hidden_layers) if trained else 1
    phases, recompute = ("forward",), config["recompute"] if trained else "none"
    if recompute == "block":
        yield _row("inputs of blocks", f"{layers} layers x {tokens} tokens x {h * size:,} bytes", layers * tokens * h * size)
        layers = 1
    elif recompute == "selective":  # of an MLP its input, and one MLP at a time
        wide = (2 * h + 4 * i) * size
        each -= wide
        yield _row("activations of one MLP", f"{tokens} tokens x {wide:,} bytes", tokens * wide, phases)
    yield _row("activations", f"{layers} layers x {tokens} tokens x {each:,} bytes", layers * tokens * each, phases)
    fused = config["step"]["name"] == "fused"
    width = min(shape.vocab_size, VOCABULARY_CHUNK) if fused else shape.vocab_size
    text = f"{tokens} tokens x {width:,} x {size + 4} bytes"
    yield _row("logits", text, tokens * width * (size + 4), phases)
    if trained and fused:
        most, total = room(shape, tokens, size, recompute), tokens * shape.vocab_size * size
        yield _row("logits kept for the backward", f"{min(most, total):,} of {total:,} bytes", min(most, total), phases)


def _tokens(config: dict[str, Any]) -> int:
    """Of one forward."""
    rows = -(-config["task"]["batch_size"] // config["task"]["accumulate"]) if config["task"]["name"] == "tune" else 1
    return config["seq_len"] * rows


def _kept(linear: str, recompute: str) -> bool:
    """Whether the backward finds its dequantised weight: of what is computed again, one block's (or MLP's) at a time."""
    again = recompute == "block" or (recompute == "selective" and ".mlp." in linear)
    return not again or not linear.startswith("model.layers.") or linear.startswith("model.layers.0.")


def _high_precision(name: str, shape: tuple[int, ...], packed_embedding: bool) -> bool:
    """As in adamw."""
    return len(shape) == 1 or ("embed_tokens" in name and not packed_embedding)


def _scales_a_row(state: str, cols: int) -> int:
    """fp32 numbers beside the elements of one row."""
    return {"int8": 1, "nvfp4_two_level": 1, "int8_block": -(-cols // WIDTH)}.get(state, 0)


def _row(what: str, formula: str, count: float, phases: tuple[str, ...] = PHASES, host: bool = False) -> Row:
    return Row(what, formula, count / MIB, phases, host)


def _count(shape: tuple[int, ...]) -> int:
    return shape[0] if len(shape) == 1 else shape[0] * shape[1]
