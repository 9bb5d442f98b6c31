"""From configuration to a loaded model: device, dtype, shapes, tokenizer, weights and the path that computes."""

import functools
import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp4lab.chat.tokenizer import Tokenizer
from fp4lab.checkpoint import FileInfo, Weights, check_path, open_weights
from fp4lab.errors import UserError
from fp4lab.events import Emit, File, Note
from fp4lab.model.bridge import Bridge
from fp4lab.model.config import EMBEDDING, HEAD, Qwen3Config
from fp4lab.model.paths import (
    Quirks,
    bridge_model,
    dense_model,
    fp2_model,
    fused_model,
    noste_model,
    reference_model,
    ste_linears,
)
from fp4lab.model.qwen3 import Qwen3
from fp4lab.model.store import WeightStore, build_store, random_weights
from fp4lab.nvfp4 import PackedTensor, count_changed, dispatch, keep_zero_signs, native_available, pack, repack_like
from fp4lab.tasks.incidents import quirk_notes
from fp4lab.tasks.limits import preflight
from fp4lab.train import checks
from fp4lab.train.data import Samples

SHIPPED = Path("models/tiny")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Session:
    """Everything a task computes with. `model` is the path that `backend` names."""

    config: dict[str, Any]
    shape: Qwen3Config
    tokenizer: Tokenizer
    store: WeightStore
    model: Qwen3 | Bridge
    device: torch.device
    dtype: torch.dtype
    _weights: Weights | None = None
    frozen: frozenset[str] = frozenset()  # tensors that do not learn (step.train_last_layers)

    @property
    def backend(self) -> str:
        return self.config["backend"]["name"]

    @property
    def activations(self) -> str:
        return self.config["backend"]["activations"]

    @property
    def native(self) -> bool:
        return self.config["backend"]["native_fp4"]

    @property
    def quirks(self) -> Quirks:
        q = self.config["quirk"]
        return Quirks(q["scale_bytes_undecoded"], q["rope_theta_1e6"], q["no_offset_mask"], q["e4m3_top_nan"])

    def dispose(self) -> None:
        """Closes the checkpoint: what was mapped to load the model is let go."""
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    def compact(self) -> None:
        """Collects garbage and returns cached device memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    @torch.no_grad()
    def publish(self, stored: dict[str, PackedTensor] | None = None, count: bool = False) -> float | None:
        """Writes the trained weights into the store, so that every path computes with them.

        `stored` holds what the optimizer keeps packed; other linears are packed here from their float masters.
        With `count` it returns the share of these that have another code or block scale now; None if there are none.
        """
        if not isinstance(self.model, Qwen3):
            return None
        rule = self.config["weights"]["rule"]
        stored = stored or {}
        if self.backend == "fp2":
            self.store.dense = None  # the unquantised weights of the checkpoint are not this model's any more
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        if self.store.tied and EMBEDDING in parameters:
            parameters[HEAD] = parameters[EMBEDDING]  # where a tied head has no parameter of its own
        changed, elements = torch.zeros((), dtype=torch.int64, device=self.device), 0
        for name, parameter in parameters.items():
            if name in self.frozen:
                continue
            value = stored.get(name)
            if name in self.store.raw:
                self.store.update(name, parameter)
            elif value is not None:
                self.store.update(name, value)
            if name in self.store.packed and value is None:
                old = self.store.packed[name]
                new = repack_like(parameter, old, rule=rule)
                keep_zero_signs(new, old)
                if count:
                    changed, elements = changed + count_changed(old, new), elements + parameter.numel()
                self.store.update(name, new)
        for _, linear in ste_linears(self.model):
            linear.clear_eval_cache()
        return int(changed) / elements if elements else None


def open_session(config: dict[str, Any], emit: Emit, trains: bool = True) -> Session:
    """Loads the model that `config` describes, reporting every file used. Raises UserError.

    Without `trains` only what `backend` needs to generate is kept: no masters, and no weights of other paths.
    """
    device = _device(config["device"])
    dtype = _dtype(config["dtype"], device)
    kind = config["weights"]["kind"]
    shape, folder = _shape(config, emit)
    tokenizer = _tokenizer(folder, shape, config["model"]["name"], emit)
    preflight(shape, config, device, dtype, emit)
    weights: Weights | None = None
    if kind == "random":
        names, get = random_weights(shape, config["seed"], device, dtype)
        source = "weights=random"
    else:
        path = config["weights"]["path"] or str(SHIPPED / "model.dat")
        weights = open_weights("dat" if kind == "shipped" else kind, Path(path))
        names, get, source = set(weights.names()), weights.get, path
    quantise = functools.partial(pack, rule=config["weights"]["rule"], levels=config["weights"]["levels"])
    with torch.no_grad():
        store = build_store(
            shape,
            names,
            get,
            device=device,
            dtype=dtype,
            quantise=quantise,
            keep_dense=kind in ("random", "hf") and (trains or config["backend"]["name"] == "dense"),
            source=source,
            pack_embedding=config["weights"]["embedding"] == "nvfp4",
        )
    for info in weights.files if weights else []:
        _report(emit, info)
    session = Session(config, shape, tokenizer, store, None, device, dtype, weights)  # type: ignore[arg-type]
    session.model = _model(session, emit, trains)
    if trains and isinstance(session.model, Qwen3):
        _freeze(session, session.model)
    if not trains and config["backend"]["name"] == "dense":
        store.packed.clear()
        store.fused.clear()
    return session


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda: torch sees no CUDA device here; use device=cpu, or check the driver (nvidia-smi)")
    return torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return _DTYPES[name]


def _shape(config: dict[str, Any], emit: Emit) -> tuple[Qwen3Config, Path | None]:
    """The model's shape and the folder it came from: the weights' own folder, model.path, or model.config."""
    model, weights = config["model"], config["weights"]
    folder = model["path"]
    if weights["kind"] in ("hf", "dat"):
        check_path(weights["kind"], weights["path"])
    if weights["kind"] == "hf" and (model["name"] != "tiny" or not folder or Path(folder) == SHIPPED):
        folder = weights["path"]
    if folder is None:
        if not model["config"]:
            raise UserError("model: neither model.path (a folder with config.json) nor model.config is given")
        return Qwen3Config.from_dict(dict(model["config"]), f"conf/model/{model['name']}.yaml"), None
    path = Path(folder) / "config.json"
    shape = Qwen3Config.from_json(path)
    _report(emit, FileInfo("config", path, "json"))
    return shape, Path(folder)


def _tokenizer(folder: Path | None, shape: Qwen3Config, name: str, emit: Emit) -> Tokenizer:
    path = (folder or SHIPPED) / "tokenizer.json"
    if folder is None:
        emit(
            Note(
                topic="tokenizer",
                text=f"model={name} brings no tokenizer.json: text is encoded with {path}, whose ids are valid "
                "but not this model's. Set model.path or weights.path to the model's folder for its own.",
            )
        )
    tokenizer = Tokenizer.load(path)
    if tokenizer.vocab_size > shape.vocab_size:
        raise UserError(f"{path}: {tokenizer.vocab_size} ids, but the model's vocab_size is {shape.vocab_size}")
    _report(emit, FileInfo("tokenizer", path, "json"))
    return tokenizer


def _model(s: Session, emit: Emit, trains: bool) -> Qwen3 | Bridge:
    if s.native and not native_available(s.device):
        raise UserError(
            f"backend.native_fp4=true: {s.device.type} has no FP4 matrix units (sm_100 and later do); leave it false, "
            "and W4A4 is emulated"
        )
    if s.device.type == "cuda":
        emit(Note(topic="kernels", text=dispatch.describe(s.store.packed.values(), s.device, s.dtype)))
    for note in quirk_notes(s.config, s.shape, s.store):
        emit(note)
    if s.activations == "nvfp4" and not s.native:
        emit(
            Note(
                topic="activations",
                text="W4A4 is emulated: activations are rounded to NVFP4 and multiplied in the compute dtype.",
            )
        )
    if s.backend == "bridge":
        return bridge_model(s.store, s.dtype, s.activations, s.native)
    if s.backend == "noste":
        return noste_model(s.store, s.dtype, s.activations, s.native)
    eval_cache = s.config["backend"]["eval_cache"]
    if s.backend == "dense" and s.store.dense is None:
        emit(Note(topic="backend", text="backend=dense: the checkpoint is packed; its dequantised weights are used."))
    if not trains:
        if s.backend == "dense":
            return reference_model(s.store, s.dtype) or dense_model(s.store, s.dtype)
        return fp2_model(s.store, s.dtype, None, s.activations, eval_cache, s.quirks)
    master = s.config["step"]["master"]
    if s.backend == "fp2" and s.config["step"]["name"] == "fused":
        if master in ("packed", "packed_stochastic"):  # others start from the unquantised weights
            s.store.dense = None
        return _recomputing(fused_model(s.store, s.dtype, s.activations), s.config)
    if s.config["step"]["name"] == "dense":
        master = "fp32"
    master_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "bf16_stochastic": torch.bfloat16}.get(master, s.dtype)
    if s.backend == "dense":
        return _recomputing(dense_model(s.store, s.dtype, master_dtype), s.config)
    trained = s.config["task"]["name"] in ("step", "tune") and s.config["step"]["name"] == "chunked"
    alone = trained and master in ("packed", "packed_stochastic")
    return _recomputing(fp2_model(s.store, s.dtype, master_dtype, s.activations, eval_cache, s.quirks, alone), s.config)


def _freeze(s: Session, model: Qwen3) -> None:
    last, layers = s.config["step"]["train_last_layers"], s.shape.num_hidden_layers
    if last is not None and last > layers:
        raise UserError(f"step.train_last_layers={last}: the model has {layers} layers; expected at most that, or null for all")
    s.frozen = frozenset(n for n in (*s.store.raw, *s.store.packed) if not s.shape.learns(n, last))
    for name, p in model.named_parameters(remove_duplicate=False):
        if name in s.frozen:
            p.requires_grad_(False)


def _recomputing(model: Qwen3, config: dict[str, Any]) -> Qwen3:
    model.recompute = config["recompute"]
    return model


def _report(emit: Emit, info: FileInfo) -> None:
    emit(File(role=info.role, path=str(info.path), format=info.format, bytes=info.bytes, sha256=info.sha256))


def report_samples(session: Session, samples: Samples, emit: Emit) -> None:
    """Notes on what these samples do not teach. Raises UserError when seq_len leaves nothing of them."""
    seq_len = session.config["seq_len"]
    if samples.dropped and not samples:
        raise UserError(f"data.path={session.config['data']['path']}: no target fits into seq_len={seq_len}; give a larger one")
    whole = session.config["task"]["name"] == "tune"  # a single step is often of a window on purpose
    for topic, text in (
        ("window", checks.beyond_window(samples, seq_len) if whole or samples.dropped else None),
        ("targets", checks.no_end_token(samples, session.tokenizer.im_end)),
        ("template", checks.other_template(session.config["data"]["style"])),
    ):
        if text:
            emit(Note(topic=topic, text=text))


def data_files(path: str) -> list[Path]:
    """The file, or the files of the folder by name."""
    return [Path(path)] if Path(path).is_file() else sorted(p for p in Path(path).iterdir() if p.is_file())


def report_data(path: str, emit: Emit) -> None:
    """A File event for every file of the training text."""
    for file in data_files(path):
        _report(emit, FileInfo("data", file, file.suffix.lstrip(".")))
