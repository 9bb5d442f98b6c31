"""Every format into every format: what is kept, what changes its name, what is refused, and writers that are killed."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from small import CONFIG, files_of, floats, hf_folder, read_all, same_codes, same_value

from fp4lab.checkpoint import DatFile, open_weights, save_dat, write_dat
from fp4lab.checkpoint.convert import convert, recipe_for
from fp4lab.checkpoint.export import MANIFEST, Target, export, verify
from fp4lab.checkpoint.weights import MemoryWeights, Replaced
from fp4lab.errors import UserError
from fp4lab.model.config import EMBEDDING, HEAD
from fp4lab.nvfp4 import PackedTensor, pack, unpack

SHIPPED = Path(__file__).parents[2] / "models/tiny/model.dat"
PUBLIC = ("compressed-tensors", "modelopt")
Q = "model.layers.0.self_attn.q_proj.weight"


def to(source: Path, path: Path, form: str, recipe=None, **options):
    return convert(source, Target(path, form, **options), recipe)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The small model in all four formats, quantised once, by the rule of compressed-tensors."""
    folder = tmp_path_factory.mktemp("sources")
    hf = hf_folder(folder / "hf", shards=3)
    ct = folder / "compressed-tensors"
    to(hf, ct, "compressed-tensors", recipe_for("compressed-tensors", head="nvfp4"))
    to(ct, folder / "modelopt", "modelopt")
    to(ct, folder / "dat", "dat")
    return {p.name: p for p in folder.iterdir()}


# -- what nothing was done to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["hf", *PUBLIC])
def test_a_folder_into_its_own_format_is_the_same_bytes(form, sources, tmp_path):
    """All files but the README, index and configs included, and a manifest beside them."""
    done = to(sources[form], tmp_path / "again", form)
    assert done.same_files
    expected = {n: b for n, b in files_of(sources[form]).items() if n != "README.md"}
    assert files_of(tmp_path / "again") == expected and len(expected) >= 6


def test_the_shipped_file_is_the_same_bytes(tmp_path):
    to(SHIPPED, tmp_path / "again.dat", "dat")
    assert (tmp_path / "again.dat").read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize("form", PUBLIC)
def test_the_shipped_file_and_back(form, tmp_path):
    """.dat -> public -> .dat: the file of the start, to the byte."""
    to(SHIPPED, tmp_path / "there", form)
    to(tmp_path / "there", tmp_path / "back.dat", "dat")
    assert (tmp_path / "back.dat").read_bytes() == SHIPPED.read_bytes()


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(
        st.tuples(
            st.sampled_from(["raw", "pair"]),
            st.sampled_from([0, 1, 100, 101]),
            st.sampled_from([0, 1, 100, 101, 5, 6, 7, 15]),
            st.sampled_from([None, ".scale_2", ".global_scale"]),
            st.permutations([0, 1]),
        ),
        max_size=5,
    )
)
def test_any_dat_file_is_the_same_bytes(kinds, tmp_path_factory):
    """Whatever byte or float types codes and scales are filed under, in whatever order."""
    folder = tmp_path_factory.mktemp("dat")
    entries: list[tuple[str, torch.Tensor, int | None]] = []
    for i, (kind, codes_type, scale_type, second, order) in enumerate(kinds):
        if kind == "raw":
            entries.append((f"r{i}", torch.randn(3, 2).to([torch.float16, torch.bfloat16, torch.int32][i % 3]), None))
            continue
        p = pack(torch.randn(4, 32) * 10**i)
        dtype = {5: torch.float16, 6: torch.float32, 7: torch.float64, 15: torch.bfloat16, 1: torch.int8}.get(scale_type)
        scale = p.block_scale
        if dtype is not None:
            scale = scale.view(dtype) if dtype == torch.int8 else scale.to(dtype)
        codes = p.codes.view({1: torch.int8, 101: torch.uint8}.get(codes_type, torch.uint8))
        pair = [
            (f"w{i}.qdata", codes, None if codes_type == 101 else codes_type),
            (f"w{i}.scale", scale if dtype is not None else scale.view(torch.uint8), None if dtype else scale_type),
        ]
        entries += [pair[n] for n in order]
        if second:
            entries.append((f"w{i}{second}", torch.tensor(0.5) if i % 2 else torch.rand(4, 1) + 0.1, None))
    write_dat(folder / "a.dat", entries)
    to(folder / "a.dat", folder / "b.dat", "dat")
    assert (folder / "b.dat").read_bytes() == (folder / "a.dat").read_bytes()


# -- from one to another -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", ["dat", *PUBLIC])
@pytest.mark.parametrize("second", ["dat", *PUBLIC])
def test_codes_and_block_scales_are_relabelled(first, second, sources, tmp_path):
    to(sources[first], tmp_path / "out", second, config=sources["hf"])
    before, after = read_all(sources[first]), read_all(tmp_path / "out")
    assert before.keys() == after.keys() and sum(isinstance(v, PackedTensor) for v in before.values()) == 15
    for name, value in before.items():
        if isinstance(value, PackedTensor):
            assert same_codes(value, after[name]), name
            ratio = unpack(after[name]) / unpack(value)
            assert torch.allclose(ratio.nan_to_num(1), torch.ones(()), atol=2e-7), "the reciprocal's rounding at most"
            if (first, second) != ("compressed-tensors", "modelopt") and (first, second) != ("modelopt", "compressed-tensors"):
                assert value.divide != after[name].divide or torch.equal(value.global_scale, after[name].global_scale)
        else:
            assert torch.equal(value.float(), after[name].float()) or second == "dat" != first


def test_the_keys_types_and_shapes_of_both(sources):
    """The table of public.py, in the files."""
    ct = load_file(sources["compressed-tensors"] / "model.safetensors")
    mo = load_file(sources["modelopt"] / "model.safetensors")
    module = Q.removesuffix(".weight")
    u8, f8, f32 = torch.uint8, torch.float8_e4m3fn, torch.float32
    for tensors, keys in (
        (ct, {".weight_packed": (u8, (128, 32)), ".weight_scale": (f8, (128, 4)), ".weight_global_scale": (f32, (1,))}),
        (mo, {".weight": (u8, (128, 32)), ".weight_scale": (f8, (128, 4)), ".weight_scale_2": (f32, ())}),
    ):
        found = {k.removeprefix(module): (t.dtype, tuple(t.shape)) for k, t in tensors.items() if k.startswith(module + ".w")}
        assert found == keys
        assert tensors[EMBEDDING].dtype == tensors["model.norm.weight"].dtype == torch.bfloat16
        assert len(tensors) == 15 * 3 + 10
    assert torch.equal(ct[module + ".weight_packed"], mo[module + ".weight"])
    assert 1 / ct[module + ".weight_global_scale"] == mo[module + ".weight_scale_2"]


def test_the_configs_of_both(sources):
    for form, method in (("compressed-tensors", "compressed-tensors"), ("modelopt", "modelopt")):
        config = json.loads((sources[form] / "config.json").read_text())
        quantisation = config.pop("quantization_config")
        assert config == {**CONFIG, "tie_word_embeddings": False}, "the head has weights of its own now"
        assert quantisation["quant_method"] == method and quantisation["ignore"] == []
    own = json.loads((sources["modelopt"] / "hf_quant_config.json").read_text())["quantization"]
    assert own == {"quant_algo": "W4A16_NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": []}


@pytest.mark.parametrize("form", PUBLIC)
@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_stays_as_it_is(form, tied, tmp_path):
    """Tied: not written, and tied in the config. Untied: written in floats. Either is named as unquantised."""
    hf = hf_folder(tmp_path / "hf", floats(tied=tied), tie_word_embeddings=tied)
    to(hf, tmp_path / "out", form, recipe_for(form))
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is tied and config["quantization_config"]["ignore"] == ["lm_head"]
    keys = [k for k in load_file(tmp_path / "out/model.safetensors") if k.startswith("lm_head")]
    assert keys == ([] if tied else [HEAD])


def test_a_folder_becomes_floats(sources, tmp_path):
    """--to hf: packed tensors rounded once to bfloat16, and no quantization_config."""
    to(sources["modelopt"], tmp_path / "out", "hf")
    got = read_all(tmp_path / "out")
    for name, value in read_all(sources["modelopt"]).items():
        want = unpack(value, torch.bfloat16) if isinstance(value, PackedTensor) else value.bfloat16()
        assert same_value(got[name], want)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**CONFIG, "tie_word_embeddings": False}
    assert not (tmp_path / "out/hf_quant_config.json").exists()


def test_what_makes_it_load_elsewhere_comes_along(sources, tmp_path):
    to(sources["dat"], tmp_path / "out", "modelopt", config=sources["hf"])
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (sources["hf"] / name).read_bytes()
    assert not (tmp_path / "out/README.md").exists(), "it speaks of another checkpoint"


def test_activation_scales_are_handed_on(sources, tmp_path):
    """W4A4 of who calibrated it stays W4A4: renamed, inverted, and declared; a .dat file has no place for them and says so."""
    tensors = load_file(sources["compressed-tensors"] / "model.safetensors")
    for key in [k for k in tensors if k.endswith(".weight_packed")]:
        tensors[key.replace(".weight_packed", ".input_global_scale")] = torch.tensor([4.0])
    ct = hf_folder(tmp_path / "ct", tensors)
    shutil.copyfile(sources["compressed-tensors"] / "config.json", ct / "config.json")
    done = to(ct, tmp_path / "mo", "modelopt")
    assert done.notes == []
    mo = load_file(tmp_path / "mo/model.safetensors")
    assert mo[Q.replace(".weight", ".input_scale")].item() == 0.25 and mo[Q.replace(".weight", ".input_scale")].shape == ()
    assert json.loads((tmp_path / "mo/config.json").read_text())["quantization_config"]["quant_algo"] == "NVFP4"
    to(tmp_path / "mo", tmp_path / "ct2", "compressed-tensors")
    again = load_file(tmp_path / "ct2/model.safetensors")
    assert again.keys() == tensors.keys() and again[Q.replace(".weight", ".input_global_scale")].tolist() == [4.0]
    group = json.loads((tmp_path / "ct2/config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["input_activations"]["dynamic"] == "local"
    to(ct, tmp_path / "w.dat", "dat")
    to(tmp_path / "w.dat", tmp_path / "ct3", "compressed-tensors", config=ct)
    third = load_file(tmp_path / "ct3/model.safetensors")
    assert third[Q.replace(".weight", ".input_global_scale")].tolist() == [4.0]
    done = to(ct, tmp_path / "floats", "hf")
    assert "15 scales of activations or of the KV cache are left out" in done.notes[0]


def test_scales_of_a_cache_stay_in_their_format(sources, tmp_path):
    tensors = load_file(sources["modelopt"] / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.5)
    mo = hf_folder(tmp_path / "mo", tensors)
    for name in ("config.json", "hf_quant_config.json"):
        shutil.copyfile(sources["modelopt"] / name, mo / name)
    assert to(mo, tmp_path / "same", "modelopt").notes == []
    assert files_of(tmp_path / "same")["model.safetensors"] == files_of(mo)["model.safetensors"]
    done = to(mo, tmp_path / "other", "compressed-tensors")
    assert "1 scales of activations or of the KV cache are left out (first: model.layers.0.self_attn.k_proj" in done.notes[0]


def test_what_an_engine_that_fuses_gets_wrong_is_told(tmp_path):
    """Members of q/k/v with scales of their own are relabelled as they are, with a note; equal ones have none."""
    values = {n: pack(t, "ct", "tensor") if n.endswith("_proj.weight") else t for n, t in floats().items()}
    hf = hf_folder(tmp_path / "hf")
    target = Target(tmp_path / "out", "compressed-tensors", config=hf)
    done = export(MemoryWeights(values), target)
    assert "4 fused groups have members with different second-level scales" in done.notes[0]
    assert all(same_value(values[n], v) for n, v in read_all(tmp_path / "out").items())


def test_row_scales_have_no_place_in_the_public_formats(tmp_path):
    values = {Q: pack(torch.randn(4, 32), "nearest", "row")}
    hf = hf_folder(tmp_path / "hf")
    for form in PUBLIC:
        with pytest.raises(UserError, match=r"q_proj.weight has a second-level scale a row.*--levels tensor"):
            export(MemoryWeights(values), Target(tmp_path / "out", form, config=hf))
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]
    one = pack(torch.randn(4, 32), "nearest", "row", global_scale=torch.full((4, 1), 0.5))
    export(MemoryWeights({Q: one}), Target(tmp_path / "out", "modelopt", config=hf))
    assert read_all(tmp_path / "out")[Q].global_scale.item() == 0.5, "equal rows are one scale"


def test_shards(sources, tmp_path):
    """Files of at most the size asked for, an index that names every tensor, and the same values."""
    to(sources["hf"], tmp_path / "out", "compressed-tensors", recipe_for("compressed-tensors"), shard_bytes=20_000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert {f.name for f in files} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    to(sources["hf"], tmp_path / "one", "compressed-tensors", recipe_for("compressed-tensors"))
    whole = read_all(tmp_path / "one")
    assert all(same_value(v, whole[n]) for n, v in read_all(tmp_path / "out").items())


def test_trained_values_in_the_places_of_the_old(tmp_path):
    """Same order, same element types, new bytes: norms, embedding, head and linears; what was not trained stays."""
    weights = open_weights("dat", SHIPPED)
    old = {n: weights.get(n) for n in weights.names()}
    norm, linear = "model.norm.weight", Q
    values = {
        norm: torch.full((256,), 1.25),
        linear: pack(torch.randn(512, 256)),
        HEAD: pack(torch.randn(4096, 256)),
        EMBEDDING: torch.randn(4096, 256),
    }
    done = export(Replaced(weights, values), Target(tmp_path / "new.dat", "dat"))
    weights.close()
    assert done.same_files
    with DatFile.open(SHIPPED) as a, DatFile.open(tmp_path / "new.dat") as b:
        assert [(e.key, e.elem_type, e.dims, e.offset) for e in a.entries.values()] == [
            (e.key, e.elem_type, e.dims, e.offset) for e in b.entries.values()
        ]
    for name, value in read_all(tmp_path / "new.dat").items():
        want = values.get(name, old[name])
        assert same_value(value, want.half() if isinstance(want, torch.Tensor) else want)


def test_float16_that_would_overflow(tmp_path):
    hf = hf_folder(tmp_path / "hf", {EMBEDDING: torch.full((2, 16), 1e5)})
    with pytest.raises(UserError, match=r"embed_tokens.weight has values beyond 65504"):
        to(hf, tmp_path / "a.dat", "dat", recipe_for("dat"))
    to(hf, tmp_path / "a.dat", "dat", recipe_for("dat"), dtype="bfloat16")
    assert read_all(tmp_path / "a.dat")[EMBEDDING].dtype == torch.bfloat16


def test_float16_scales(sources, tmp_path):
    """--scales float16: what the reference's first exporter wrote; our reader takes them for what they are."""
    to(sources["dat"], tmp_path / "wide.dat", "dat", scales="float16")
    with DatFile.open(tmp_path / "wide.dat") as f:
        assert {e.elem_type for e in f.entries.values() if e.key.endswith(".scale")} == {5}
    before = read_all(sources["dat"])
    assert all(same_value(v, before[n]) for n, v in read_all(tmp_path / "wide.dat").items())


# -- manifest, refusals ------------------------------------------------------------------------------------------------


def test_the_manifest(sources, tmp_path):
    to(sources["hf"], tmp_path / "out", "modelopt", recipe_for("modelopt"))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["files"].keys() == files_of(tmp_path / "out").keys()
    for name, data in files_of(tmp_path / "out").items():
        assert manifest["files"][name] == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    assert len(manifest["quantised"]) == 14 and manifest["format"] == "modelopt" and manifest["source"]["format"] == "hf"
    assert verify(tmp_path / "out" / MANIFEST) == []
    weights = tmp_path / "out/model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    (tmp_path / "out/config.json").write_text("{}")
    (tmp_path / "out/tokenizer.json").unlink()
    assert [w.split()[0] for w in verify(tmp_path / "out" / MANIFEST)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    to(sources["dat"], tmp_path / "w.dat", "dat")
    assert verify(tmp_path / "w.dat.manifest.json") == []


def test_the_input_is_never_overwritten(sources, tmp_path):
    """By its own name, a link to it, a folder around it."""
    before = {form: files_of(p) if p.is_dir() else p.read_bytes() for form, p in sources.items() if form in ("hf", "dat")}
    (tmp_path / "link").symlink_to(sources["hf"])
    (tmp_path / "hard").hardlink_to(sources["dat"])
    for source, target in (
        (sources["dat"], sources["dat"]),
        (sources["dat"], tmp_path / "hard"),
        (sources["hf"], sources["hf"]),
        (sources["hf"], tmp_path / "link"),
        (sources["hf"], sources["hf"].parent),
        (sources["dat"], sources["dat"].parent),
    ):
        form = "dat" if source.is_file() and target != source.parent else "hf"
        with pytest.raises(UserError, match="what is being read"):
            to(source, target, form, config=sources["hf"] if form == "hf" else None, overwrite=True)
    assert before == {form: files_of(p) if p.is_dir() else p.read_bytes() for form, p in sources.items() if form in before}


def test_what_exists_is_not_overwritten_unless_allowed(sources, tmp_path):
    for form in ("dat", "modelopt"):
        out = tmp_path / form
        to(sources["compressed-tensors"], out, form)
        with pytest.raises(UserError, match="exists already"):
            to(sources["compressed-tensors"], out, form)
        to(sources["compressed-tensors"], out, form, overwrite=True)


def test_a_full_disk_is_told_before_anything_is_written(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 90, 2_000_000))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"needs .* MiB, and the disk has 2 MiB left"):
        to(SHIPPED, tmp_path / "a.dat", "dat")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"form": "gguf"}, "format 'gguf': expected one of dat, hf, compressed-tensors, modelopt"),
        ({"form": "dat", "dtype": "int8"}, "dtype 'int8': expected one of auto, keep, bfloat16"),
        ({"form": "modelopt", "scales": "float16"}, "scales 'float16' are of .dat files"),
    ],
)
def test_choices_that_do_not_exist(options, says, sources, tmp_path):
    with pytest.raises(UserError, match=says):
        to(sources["dat"], tmp_path / "out", **options)


def test_nothing_is_quantised_unasked(sources, tmp_path):
    for form in ("dat", *PUBLIC):
        with pytest.raises(UserError, match="nothing in it is packed; `fp4lab convert` quantises it"):
            to(sources["hf"], tmp_path / "out", form)
    to(sources["hf"], tmp_path / "tied", "modelopt", recipe_for("modelopt"))
    with pytest.raises(UserError, match=r"its head is tied, and a .dat file has a packed one"):
        to(tmp_path / "tied", tmp_path / "out.dat", "dat")


def test_a_dat_file_without_a_config_beside_it(tmp_path):
    save_dat(tmp_path / "w.dat", {Q: pack(torch.randn(16, 32))})
    with pytest.raises(UserError, match=r"no config.json in it; give the folder .*--config DIR"):
        to(tmp_path / "w.dat", tmp_path / "out", "modelopt")
    assert [p.name for p in tmp_path.iterdir()] == ["w.dat"]


# -- real kills --------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from fp4lab.checkpoint.convert import convert, recipe_for
from fp4lab.checkpoint.export import Target
def progress(done, total, name):
    print(name, flush=True)
    time.sleep(0.02)
source, out, form = sys.argv[1:]
recipe = recipe_for(form)
convert(Path(source), Target(Path(out), form), recipe, progress)
print("done", flush=True)
"""


@pytest.mark.parametrize("form", ["dat", "compressed-tensors"])
@pytest.mark.parametrize("tensors", [1, 12, 24])
def test_a_killed_export_leaves_nothing_under_the_name(form, tensors, sources, tmp_path):
    """SIGKILL after some tensors: no file, no folder; the same export then runs to its end and clears the remains."""
    command = [sys.executable, "-c", SLOW, sources["hf"], tmp_path / "out", form]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    for _ in range(tensors):
        child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "out").exists() and len(list(tmp_path.glob(".out.*.part"))) == 1
    to(sources["hf"], tmp_path / "out", form, recipe_for(form))
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out", "out.manifest.json"] if form == "dat" else ["out"])
    assert verify(tmp_path / ("out.manifest.json" if form == "dat" else f"out/{MANIFEST}")) == []
