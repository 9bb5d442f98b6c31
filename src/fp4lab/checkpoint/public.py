"""The two public NVFP4 layouts of a Hugging Face folder: what they call things, how their config.json declares them.

                   compressed-tensors `nvfp4-pack-quantized`    ModelOpt `NVFP4`, `W4A16_NVFP4`
codes              X.weight_packed        U8 [out, in / 2]      X.weight         U8 [out, in / 2]
block scales       X.weight_scale         F8_E4M3 [out, in/16]  X.weight_scale   F8_E4M3 [out, in/16]
second level       X.weight_global_scale  F32 [1]  value / it   X.weight_scale_2 F32 []  value * it
activations, W4A4  X.input_global_scale   F32 [1]  2688 / amax  X.input_scale    F32 []  amax / 2688

Codes and block scales are the same bytes; the second level of one is the reciprocal of the other's. Read either shape, [] or
[1]. `amax` of an activation is calibrated by who made the file; fp4lab computes none, and hands on those it finds.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp4lab.checkpoint.hf import HfDirectory
from fp4lab.checkpoint.layout import Layout
from fp4lab.checkpoint.weights import FileInfo, TensorInfo
from fp4lab.errors import UserError
from fp4lab.nvfp4 import BLOCK, PackedTensor

MODELOPT_CONFIG = "hf_quant_config.json"
CT_FORMAT = "nvfp4-pack-quantized"
ALGORITHMS = ("NVFP4", "W4A16_NVFP4")
WEIGHT = ".weight"


@dataclass(frozen=True)
class Scheme:
    """One of the two: the suffixes of its keys, the shape of its scalars, and whether its second level divides."""

    name: str
    codes: str
    scale: str
    second: str
    activation: str
    scalar: tuple[int, ...]
    divide: bool


COMPRESSED_TENSORS = Scheme(
    "compressed-tensors", ".weight_packed", ".weight_scale", ".weight_global_scale", ".input_global_scale", (1,), True
)
MODELOPT = Scheme("modelopt", WEIGHT, ".weight_scale", ".weight_scale_2", ".input_scale", (), False)
SCHEMES = {s.name: s for s in (COMPRESSED_TENSORS, MODELOPT)}


def detect(folder: Path) -> Scheme | None:
    """What the folder's config.json (or ModelOpt's own file) declares; None for a plain one.

    Raises UserError for a quantisation that is neither of the two.
    """
    path = folder / "config.json"
    declared = read_json(path).get("quantization_config") if path.is_file() else None
    own = folder / MODELOPT_CONFIG
    if not declared and not own.is_file():
        return None
    declared = declared or {"quant_method": "modelopt"}
    if not isinstance(declared, dict):
        raise UserError(f"{path}: quantization_config is {declared!r}; expected an object")
    method = declared.get("quant_method")
    if method == "compressed-tensors":
        _check_compressed_tensors(path, declared)
        return COMPRESSED_TENSORS
    if isinstance(method, str) and method.startswith("modelopt"):
        algorithm, where = declared.get("quant_algo"), path
        if algorithm is None and own.is_file():
            quantization, where = read_json(own).get("quantization"), own
            algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
        if algorithm not in ALGORITHMS:
            raise UserError(f"{where}: quant_algo is {algorithm!r}; expected one of {', '.join(ALGORITHMS)}")
        return MODELOPT
    raise UserError(
        f"{path}: quant_method is {method!r}; expected compressed-tensors ({CT_FORMAT}), modelopt ({', '.join(ALGORITHMS)}), "
        "or no quantization_config"
    )


def _check_compressed_tensors(path: Path, declared: dict[str, Any]) -> None:
    groups = declared.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        form = (group.get("format") if isinstance(group, dict) else None) or declared.get("format")
        weights = group.get("weights") if isinstance(group, dict) else None
        wanted = {"num_bits": 4, "type": "float", "group_size": BLOCK}
        if form != CT_FORMAT or not isinstance(weights, dict) or any(weights.get(k) != v for k, v in wanted.items()):
            raise UserError(f"{path}: {name} of quantization_config is {form!r}, {weights}; expected {CT_FORMAT}, {wanted}")
    if not groups and declared.get("format") != CT_FORMAT:
        raise UserError(f"{path}: quantization_config has format {declared.get('format')!r}; expected {CT_FORMAT}")


def declaration(scheme: Scheme, ignore: list[str], activations: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """(quantization_config of config.json, contents of hf_quant_config.json or None).

    `ignore`: modules that are left unquantised. `activations`: every packed linear has a calibrated activation scale (W4A4).
    """
    if scheme is COMPRESSED_TENSORS:
        weights = {
            "num_bits": 4,
            "type": "float",
            "symmetric": True,
            "group_size": BLOCK,
            "strategy": "tensor_group",
            "dynamic": False,
            "scale_dtype": "torch.float8_e4m3fn",
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": {**weights, "dynamic": "local", "observer": "static_minmax"} if activations else None,
            "output_activations": None,
            "format": CT_FORMAT,
        }
        return {
            "config_groups": {"group_0": group},
            "quant_method": "compressed-tensors",
            "kv_cache_scheme": None,
            "format": CT_FORMAT,
            "quantization_status": "compressed",
            "global_compression_ratio": None,
            "ignore": ignore,
        }, None
    each = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    algorithm = "NVFP4" if activations else "W4A16_NVFP4"
    producer = {"name": "modelopt", "version": "fp4lab"}  # engines know the format by this name
    inline = {
        "config_groups": {
            "group_0": {**({"input_activations": each} if activations else {}), "weights": each, "targets": ["Linear"]}
        },
        "ignore": ignore,
        "quant_algo": algorithm,
        "group_size": BLOCK,
        "producer": producer,
        "quant_method": "modelopt",
    }
    return inline, {
        "producer": producer,
        "quantization": {
            "quant_algo": algorithm,
            "kv_cache_quant_algo": None,
            "group_size": BLOCK,
            "exclude_modules": ignore,
        },
    }


class PublicWeights:
    """A folder in one of the two schemes. Scales of activations and of the KV cache are tensors of their own names."""

    def __init__(self, path: Path, scheme: Scheme):
        """Raises UserError for parts that do not fit together, naming folder, tensor, and what was expected."""
        self.folder, self.scheme, self.format = HfDirectory.open(path), scheme, scheme.name
        self.files = [FileInfo("weights", p.resolve(), "safetensors") for p in self.folder.paths]
        self._packed: dict[str, str] = {}  # "X.weight" -> "X"
        self._names: list[str] = []
        self._pair()
        # a file whose every second level is 1 holds single-level tensors, such as those of a .dat file
        self._single = bool(self._packed) and all(self._second(m) == 1 for m in self._packed.values())

    def names(self) -> list[str]:
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        if name not in self._packed:
            slot = self.folder.slot(name)
            return TensorInfo(slot.shape, slot.dtype)
        rows, half = self.folder.slot(self._packed[name] + self.scheme.codes).shape
        if self._single:
            return TensorInfo((rows, half * 2), None)
        return TensorInfo((rows, half * 2), None, "tensor", self.scheme.divide)

    def get(self, name: str) -> Tensor | PackedTensor:
        if name not in self._packed:
            return self.folder.tensor(name)
        module, s = self._packed[name], self.scheme
        codes = self.folder.tensor(module + s.codes, ("U8",))
        scale = self.folder.tensor(module + s.scale, ("F8_E4M3",))
        second = None if self._single else self._second(module)
        return PackedTensor(codes, scale, second, (codes.shape[0], codes.shape[1] * 2), s.divide and not self._single)

    def keys(self, name: str) -> list[str]:
        """The tensors of the files that `name` is made of."""
        s = self.scheme
        return [self._packed[name] + part for part in (s.codes, s.scale, s.second)] if name in self._packed else [name]

    def layouts(self) -> list[Layout]:
        return self.folder.layouts()

    def close(self) -> None:
        self.folder.close()

    def _pair(self) -> None:
        s, known = self.scheme, set(self.folder.names())
        owned = {s.scale, s.second}
        for key in self.folder.names():
            if key.endswith(s.codes) and (s.codes != WEIGHT or self.folder.slot(key).dtype == torch.uint8):
                module = key.removesuffix(s.codes)
                if s.codes != WEIGHT and module + WEIGHT in known:
                    raise self._fail(module + WEIGHT, f"is there both packed ({key}) and raw; expected one of them")
                self._check(module, known)
                self._packed[module + WEIGHT] = module
                self._names.append(module + WEIGHT)
            elif not any(key.endswith(part) for part in owned):
                self._names.append(key)
        for key in known:
            for part in owned:
                if key.endswith(part) and key.removesuffix(part) + WEIGHT not in self._packed:
                    raise self._fail(key, f"belongs to no packed weight; expected {key.removesuffix(part)}{s.codes} of U8")

    def _second(self, module: str) -> Tensor:
        second = self.folder.tensor(module + self.scheme.second, ("F32",)).reshape(())
        if not bool(torch.isfinite(second)) or float(second) <= 0:
            raise self._fail(module + self.scheme.second, f"is {float(second)}; expected a positive number")
        return second

    def _check(self, module: str, known: set[str]) -> None:
        s = self.scheme
        for part in (s.scale, s.second):
            if module + part not in known:
                raise self._fail(module + part, f"is missing; {module}{s.codes} is packed and needs it")
        codes, scale, second = (self.folder.slot(module + part) for part in (s.codes, s.scale, s.second))
        if codes.dtype != torch.uint8 or len(codes.shape) != 2 or codes.shape[1] * 2 % BLOCK:
            raise self._fail(
                codes.key, f"is {codes.dtype} {list(codes.shape)}; expected uint8 [out, in / 2], in % {BLOCK} == 0"
            )
        wanted = (codes.shape[0], codes.shape[1] * 2 // BLOCK)
        if scale.dtype != torch.float8_e4m3fn or scale.shape != wanted:
            raise self._fail(scale.key, f"is {scale.dtype} {list(scale.shape)}; expected float8_e4m3fn {list(wanted)}")
        if second.dtype != torch.float32 or second.shape not in ((), (1,)):
            raise self._fail(second.key, f"is {second.dtype} {list(second.shape)}; expected float32 [] or [1]")

    def _fail(self, key: str, what: str) -> UserError:
        return UserError(f"{self.folder.folder}: {key} {what}")


def is_scalar_of_activation(name: str) -> bool:
    """Whether `name` is the activation scale of either scheme."""
    return any(name.endswith(s.activation) for s in SCHEMES.values())


def is_scale_of_cache(name: str) -> bool:
    """Whether `name` is a scale of an FP8 KV cache: `self_attn.k_scale`, or ModelOpt's `k_proj.k_scale`."""
    return name.endswith((".k_scale", ".v_scale"))


def is_float(info: TensorInfo) -> bool:
    """Whether it is a float of a kind that weights come in."""
    return info.dtype in (torch.float32, torch.float16, torch.bfloat16)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError for what is no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: cannot read it as JSON ({e})") from e
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object")
    return value
