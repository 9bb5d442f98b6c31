"""The weights of a model, once: packed linears, raw embedding and norms, and the unquantised linears where they exist.

Every path is built over one store, so paths compared with each other differ in computation, never in weights.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fp4lab.errors import UserError
from fp4lab.model.config import ATTENTION_IN, EMBEDDING, HEAD, MLP_IN, Qwen3Config
from fp4lab.nvfp4 import PackedTensor

Get = Callable[[str], "Tensor | PackedTensor"]


class WeightStore:
    """`packed[name]` are row views of `fused[...]`, one buffer for q/k/v and one for gate/up of each layer, so the
    fused and the plain products read the same bytes.

    `dense` holds the unquantised linears (path R) or is None. `tied` says that the checkpoint has no head of its own.
    """

    def __init__(self, config: Qwen3Config, device: torch.device | str):
        self.config, self.device = config, torch.device(device)
        self.raw: dict[str, Tensor] = {}
        self.fused: dict[str, PackedTensor] = {}
        self.packed: dict[str, PackedTensor] = {}
        self.dense: dict[str, Tensor] | None = None
        self.tied = False

    def members(self) -> dict[str, tuple[str, ...]]:
        """Of every buffer of several linears, their names, in the order of its rows."""
        groups = (("qkv", ATTENTION_IN), ("gate_up", MLP_IN))
        layers = [f"model.layers.{i}." for i in range(self.config.num_hidden_layers)]
        return {f"{at}{fused}": tuple(f"{at}{s}.weight" for s in parts) for at in layers for fused, parts in groups}

    @property
    def embedding(self) -> "Tensor | PackedTensor":
        """The table [V, H], raw or packed."""
        return self.packed[EMBEDDING] if EMBEDDING in self.packed else self.raw[EMBEDDING]

    def update(self, name: str, value: "PackedTensor | Tensor") -> None:
        """Replaces the bytes of one tensor in place, for every path at once."""
        if isinstance(value, PackedTensor):
            if value.codes.data_ptr() != self.packed[name].codes.data_ptr():  # else the owner wrote into our buffer
                copy_packed(self.packed[name], value)
        else:
            self.raw[name].copy_(value.detach().reshape(self.raw[name].shape))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(kind, tensor) of all that the store holds, for the byte report."""
        for p in {id(p): p for p in self.fused.values()}.values():  # a tied head may be the embedding
            yield "packed_codes", p.codes
            yield "packed_scale", p.block_scale
            if p.global_scale is not None:
                yield "packed_global_scale", p.global_scale
        for t in self.raw.values():
            yield "raw_param", t
        for t in (self.dense or {}).values():
            yield "dense_param", t


def build_store(
    config: Qwen3Config,
    names: set[str],
    get: Get,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantise: Callable[[Tensor], PackedTensor],
    keep_dense: bool,
    source: str,
    pack_embedding: bool = False,
) -> WeightStore:
    """Reads every tensor of the model by name, one layer at a time.

    Linears that come unquantised are packed with `quantise`; `keep_dense` also keeps them in `dtype`. `pack_embedding`
    packs the embedding too: one tensor with a tied head; there is no unquantised path then.
    Raises UserError naming `source` and the tensor when one is missing or has another shape than config.json says.
    """
    store = WeightStore(config, device)
    store.tied = HEAD not in names
    if store.tied and not config.tie_word_embeddings:
        raise UserError(f"{source}: {HEAD} is missing, and config.json does not tie it to the embedding.")
    keep_dense = keep_dense and not pack_embedding
    dense: dict[str, Tensor] = {}

    def fetch(name: str, shape: tuple[int, ...]) -> Tensor | PackedTensor:
        if name not in names:
            raise UserError(f"{source}: tensor {name} is missing; config.json asks for {list(shape)}.")
        value = get(name)
        if tuple(value.shape) != shape:
            raise UserError(f"{source}: {name} has shape {list(value.shape)}; config.json asks for {list(shape)}.")
        return value.to(device)

    def linears(members: dict[str, tuple[int, ...]]) -> PackedTensor:
        """One packed tensor of all rows; quantised together, so that a per-tensor scale is one for the group."""
        values = {name: fetch(name, shape) for name, shape in members.items()}
        packed = [v for v in values.values() if isinstance(v, PackedTensor)]
        if len(packed) == len(values):
            return concat_rows(packed)
        if packed:
            raise UserError(f"{source}: of {', '.join(members)} some are packed and some are not")
        floats = {n: v for n, v in values.items() if not isinstance(v, PackedTensor)}
        if keep_dense:
            dense.update((n, v.to(dtype)) for n, v in floats.items())
        return quantise(torch.cat(list(floats.values())) if len(floats) > 1 else next(iter(floats.values())))

    for name, shape in config.raw().items():
        value = fetch(name, shape)
        if name == EMBEDDING and pack_embedding:
            store.fused["embed_tokens"] = store.packed[name] = value if isinstance(value, PackedTensor) else quantise(value)
        elif isinstance(value, PackedTensor):
            hint = "; add weights.embedding=nvfp4 to use it so" if name == EMBEDDING else "; norms are expected unquantised"
            raise UserError(f"{source}: {name} is NVFP4-packed{hint}.")
        else:
            store.raw[name] = value.to(dtype)
    for i in range(config.num_hidden_layers):
        prefix = f"model.layers.{i}."
        for fused, suffixes in (
            ("qkv", ATTENTION_IN),
            ("o", ("self_attn.o_proj",)),
            ("gate_up", MLP_IN),
            ("down", ("mlp.down_proj",)),
        ):
            members: dict[str, tuple[int, ...]] = {f"{prefix}{s}.weight": config.linear_shape(s) for s in suffixes}
            whole = store.fused[prefix + fused] = linears(members)
            start = 0
            for name, shape in members.items():
                rows = shape[0]
                store.packed[name] = whole.rows(start, start + rows)
                start += rows
    if store.tied:
        store.packed[HEAD] = store.packed[EMBEDDING] if pack_embedding else quantise(store.raw[EMBEDDING])
        if keep_dense:
            dense[HEAD] = store.raw[EMBEDDING]
    else:
        store.packed[HEAD] = linears({HEAD: config.linear_shape("lm_head")})
    store.fused["lm_head"] = store.packed[HEAD]
    if keep_dense and len(dense) == len(store.packed):
        store.dense = dense
    return store


def random_weights(config: Qwen3Config, seed: int, device: torch.device | str, dtype: torch.dtype) -> tuple[set[str], Get]:
    """Names and getter of an untrained model: linears and embedding N(0, 0.02), norms 1. Same seed, same tensors.

    Each tensor is made when asked for, on `device`, so that no second copy of the model exists.
    """
    shapes: dict[str, tuple[int, ...]] = {**config.linears(), **config.raw()}
    if not config.tie_word_embeddings:
        shapes[HEAD] = config.linear_shape("lm_head")
    order = {name: i for i, name in enumerate(shapes)}

    def get(name: str) -> Tensor:
        if len(shapes[name]) == 1:
            return torch.ones(shapes[name], dtype=dtype, device=device)
        generator = torch.Generator(device=device).manual_seed(seed * 1_000_003 + order[name])
        return torch.empty(shapes[name], dtype=dtype, device=device).normal_(0.0, 0.02, generator=generator)

    return set(shapes), get


def concat_rows(parts: list[PackedTensor]) -> PackedTensor:
    """One packed tensor of all rows. Per-tensor second-level scales that are equal stay one; else they become per-row ones."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0]
    if any((p.global_scale is None) != (first.global_scale is None) or p.divide != first.divide for p in parts):
        raise UserError("tensors of one fused group (q/k/v or gate/up) have different kinds of second-level scale")
    scale = None
    if first.global_scale is not None and all(
        p.levels == "tensor" and torch.equal(p.global_scale, first.global_scale)  # type: ignore[arg-type]
        for p in parts
    ):
        scale = first.global_scale
    elif first.global_scale is not None:
        rows = [p.global_scale.reshape(-1, 1).expand(p.codes.shape[0], 1) for p in parts if p.global_scale is not None]
        scale = torch.cat(rows).contiguous()
    return PackedTensor(
        codes=torch.cat([p.codes for p in parts]),
        block_scale=torch.cat([p.block_scale.view(torch.uint8) for p in parts]).view(torch.float8_e4m3fn),
        global_scale=scale,
        divide=first.divide,
        shape=(sum(p.shape[0] for p in parts), first.shape[1]),
    )


def copy_packed(target: PackedTensor, source: PackedTensor) -> None:
    """Copies codes and scales of `source` into the buffers of `target`. Their kinds of scale must agree."""
    target.codes.copy_(source.codes)
    target.block_scale.view(torch.uint8).copy_(source.block_scale.view(torch.uint8))
    if (target.global_scale is None) != (source.global_scale is None) or target.divide != source.divide:
        raise ValueError("cannot copy between packed tensors of different scale levels")
    if target.global_scale is not None and source.global_scale is not None:
        target.global_scale.copy_(source.global_scale)
