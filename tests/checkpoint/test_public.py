"""The two public layouts as `weights=hf` reads them, and what it refuses, by name."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small import CONFIG, floats, hf_folder, read_all, same_value

from fp4lab.checkpoint import open_weights
from fp4lab.checkpoint.convert import recipe_for
from fp4lab.checkpoint.entries import entries
from fp4lab.checkpoint.export import Target, export
from fp4lab.checkpoint.public import ALGORITHMS, PublicWeights, declaration, detect
from fp4lab.checkpoint.public import COMPRESSED_TENSORS as CT
from fp4lab.checkpoint.public import MODELOPT as MO
from fp4lab.checkpoint.weights import MemoryWeights
from fp4lab.errors import UserError
from fp4lab.model.config import Qwen3Config
from fp4lab.model.store import build_store
from fp4lab.nvfp4 import PackedTensor, pack

SCHEMES = [CT, MO]
X = "model.layers.0.mlp.up_proj"


def folder_of(path: Path, scheme, values=None, **config) -> Path:
    """`values` (default: one packed tensor and a norm) in a folder of the scheme."""
    if values is None:
        values = {X + ".weight": pack(torch.randn(8, 32), "nearest", "tensor"), "model.norm.weight": torch.ones(4).bfloat16()}
    hf = hf_folder(path.parent / f"{path.name}_config", {"x": torch.ones(1)})
    export(MemoryWeights(values), Target(path, scheme.name, config=hf))
    return path


def rewrite(path: Path, change) -> None:
    """`change` edits the tensors of the folder."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def reconfigure(path: Path, value) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = value
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_found_by_its_config(scheme, tmp_path):
    weights = open_weights("hf", folder_of(tmp_path / "w", scheme))
    assert isinstance(weights, PublicWeights) and weights.format == scheme.name
    assert sorted(weights.names()) == [X + ".weight", "model.norm.weight"]
    p = weights.get(X + ".weight")
    assert isinstance(p, PackedTensor) and p.divide is scheme.divide and p.levels == "tensor" and p.shape == (8, 32)
    assert weights.info(X + ".weight").shape == (8, 32) and weights.info(X + ".weight").dtype is None
    weights.close()


def test_modelopt_is_found_by_its_own_file_alone(tmp_path):
    """Older exports have nothing in config.json."""
    path = folder_of(tmp_path / "w", MO)
    reconfigure(path, None)
    assert detect(path) is MO
    reconfigure(path, {"quant_method": "modelopt"})
    assert detect(path) is MO
    (path / "config.json").unlink()
    assert detect(path) is MO
    for algorithm in ALGORITHMS:
        (path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": algorithm}}))
        assert detect(path) is MO


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_both_shapes_of_the_second_level(scheme, shape, tmp_path):
    """[] and [1] are read, and a rewrite keeps which it was."""
    path = folder_of(tmp_path / "w", scheme)
    key = X + scheme.second
    rewrite(path, lambda t: t.update({key: t[key].reshape(shape)}))
    assert read_all(path)[X + ".weight"].global_scale.shape == ()
    from fp4lab.checkpoint.convert import convert

    convert(path, Target(tmp_path / "again", scheme.name))
    assert (tmp_path / "again/model.safetensors").read_bytes() == (path / "model.safetensors").read_bytes()


def test_all_ones_are_no_second_level(tmp_path):
    """What a single-level file is exported as comes back single-level; one that is not 1 keeps all."""
    values = {f"model.layers.{i}.mlp.up_proj.weight": pack(torch.randn(8, 32)) for i in range(2)}
    for scheme in SCHEMES:
        path = folder_of(tmp_path / scheme.name, scheme, values)
        assert all(same_value(v, values[n]) for n, v in read_all(path).items())
        rewrite(path, lambda t, s=scheme: t[X + s.second].fill_(0.5))
        assert {v.levels for v in read_all(path).values()} == {"tensor"}


U8, F8 = torch.uint8, torch.float8_e4m3fn


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
@pytest.mark.parametrize(
    ("what", "says"),
    [
        (lambda t, s: t.pop(X + s.scale), r"{scale} is missing; .*{codes} is packed and needs it"),
        (lambda t, s: t.pop(X + s.second), r"{second} is missing"),
        (lambda t, s: t.pop(X + s.codes), r"belongs to no packed weight; expected .*{codes} of U8"),
        (lambda t, s: t.update({X + s.codes: torch.zeros(8, 12, dtype=U8)}), r"{codes} is torch.uint8 \[8, 12\]; expected"),
        (lambda t, s: t.update({X + s.codes: torch.zeros(128, dtype=U8)}), r"{codes} is torch.uint8 \[128\]"),
        (lambda t, s: t.update({X + s.scale: torch.ones(8, 3).to(F8)}), r"{scale} is .* \[8, 3\]; expected .* \[8, 2\]"),
        (lambda t, s: t.update({X + s.scale: torch.ones(8, 2)}), r"{scale} is torch.float32 .*; expected float8_e4m3fn"),
        (lambda t, s: t.update({X + s.second: torch.ones(8)}), r"{second} is torch.float32 \[8\]; expected float32 \[\] or"),
        (lambda t, s: t.update({X + s.second: torch.ones(1).half()}), r"{second} is torch.float16"),
        (lambda t, s: t.update({X + s.second: torch.zeros(1)}), r"{second} is 0.0; expected a positive number"),
        (lambda t, s: t.update({X + s.second: torch.tensor([torch.nan])}), r"{second} is nan; expected a positive number"),
        (lambda t, s: t.update({X + s.second: torch.tensor([-1.0])}), r"{second} is -1.0; expected a positive number"),
    ],
)
def test_parts_that_do_not_fit(scheme, what, says, tmp_path):
    """Refused with folder and tensor; `fp4lab inspect` names the same."""
    path = folder_of(tmp_path / "w", scheme)
    rewrite(path, lambda t: what(t, scheme))
    parts = {k: getattr(scheme, k).replace(".", r"\.") for k in ("codes", "scale", "second")}
    with pytest.raises(UserError, match=says.format(**parts)) as e:
        read_all(path)
    assert str(path) in str(e.value)
    if "positive" not in says and "missing" not in says:
        assert any(found.refused for found in entries(path))


def test_packed_and_raw(tmp_path):
    path = folder_of(tmp_path / "w", CT)
    rewrite(path, lambda t: t.update({X + ".weight": torch.ones(8, 32)}))
    with pytest.raises(UserError, match=r"up_proj.weight is there both packed .* and raw"):
        read_all(path)


CT_BLOCK = declaration(CT, [], False)[0]


def changed(**weights) -> dict:
    block = json.loads(json.dumps(CT_BLOCK))
    block["config_groups"]["group_0"]["weights"].update(weights)
    return block


@pytest.mark.parametrize(
    ("block", "says"),
    [
        ({"quant_method": "gptq"}, "quant_method is 'gptq'; expected compressed-tensors .*, modelopt .*, or no"),
        ({}, None),
        ("nvfp4", "expected an object"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "quant_algo is 'FP8'; expected one of NVFP4, W4A16_NVFP4"),
        ({"quant_method": "modelopt"}, "quant_algo is None"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "has format 'pack-quantized'; expected nvfp4"),
        (changed(group_size=32), "group_0 of quantization_config is .*expected nvfp4-pack-quantized, .*'group_size': 16"),
        (changed(num_bits=8), "group_0"),
        (changed(type="int"), "group_0"),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": 1}}, "g of quantization_config"),
        (CT_BLOCK, None),
    ],
)
def test_declarations(block, says, tmp_path):
    path = hf_folder(tmp_path / "w")
    reconfigure(path, block)
    if says is None:
        detect(path)
        return
    with pytest.raises(UserError, match=says) as e:
        open_weights("hf", path)
    assert str(path) in str(e.value)


@settings(max_examples=200, deadline=None)
@given(
    block=st.recursive(
        st.none() | st.booleans() | st.integers() | st.sampled_from(["modelopt", "compressed-tensors", "NVFP4", "x"]),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(["quant_method", "quant_algo", "format", "config_groups", "group_0", "weights"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_any_declaration_is_read_or_refused(block):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps({"quantization_config": block}))
        try:
            detect(Path(folder))
        except UserError as e:
            assert folder in str(e)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_fused_group_keeps_its_one_scale_in_the_store(scheme, tmp_path):
    """From the first quantisation to the buffers that the paths compute with."""
    from fp4lab.checkpoint.convert import convert

    hf = hf_folder(tmp_path / "hf", floats(tied=False), tie_word_embeddings=False)
    convert(hf, Target(tmp_path / "w", scheme.name), recipe_for(scheme.name, head="nvfp4"))
    weights = open_weights("hf", tmp_path / "w")
    store = build_store(
        Qwen3Config.from_dict({**CONFIG, "tie_word_embeddings": False}),
        set(weights.names()),
        weights.get,
        device="cpu",
        dtype=torch.float32,
        quantise=pack,
        keep_dense=False,
        source="w",
    )
    for i in range(2):
        for group in ("qkv", "gate_up"):
            assert store.fused[f"model.layers.{i}.{group}"].levels == "tensor"
    for name, p in store.packed.items():
        assert same_value(p, weights.get(name)), name
    weights.close()


def test_scales_that_differ_become_row_scales(tmp_path):
    values = {n: pack(t, "ct", "tensor") if n.endswith("_proj.weight") else t for n, t in floats(tied=False).items()}
    store = build_store(
        Qwen3Config.from_dict({**CONFIG, "tie_word_embeddings": False}),
        set(values),
        values.__getitem__,
        device="cpu",
        dtype=torch.float32,
        quantise=pack,
        keep_dense=False,
        source="w",
    )
    qkv = store.fused["model.layers.0.qkv"]
    assert qkv.levels == "row" and qkv.global_scale.unique().numel() == 3
