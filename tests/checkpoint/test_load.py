"""Weights by name: packed pairs of a `.dat` file, Hugging Face folders, and what each refuses."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fp4lab.checkpoint import DatError, DatFile, open_weights, save_dat, write_dat
from fp4lab.errors import UserError
from fp4lab.nvfp4 import PackedTensor, pack, unpack


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def assert_same(a: PackedTensor, b: PackedTensor) -> None:
    assert isinstance(a, PackedTensor) and isinstance(b, PackedTensor)
    assert (a.shape, a.divide, a.levels) == (b.shape, b.divide, b.levels)
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(a.block_scale.view(torch.uint8), b.block_scale.view(torch.uint8))
    assert a.global_scale is b.global_scale is None or torch.equal(a.global_scale, b.global_scale)


# -- packed pairs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "levels", "extra"),
    [
        ("torchao", "single", None),
        ("nearest", "tensor", ".scale_2"),
        ("nearest", "row", ".scale_2"),
        ("ct", "tensor", ".global_scale"),
        ("ct", "row", ".global_scale"),
    ],
)
def test_packed_round_trip(rule, levels, extra, tmp_path):
    """Every kind comes back byte for byte beside raw tensors, in order; only a second level adds an entry of ours."""
    path = tmp_path / "w.dat"
    p = pack(normal(6, 48), rule, levels)
    norm = torch.ones(5, dtype=torch.float16)
    info = save_dat(path, {"m.a.weight": p, "m.norm.weight": norm})
    assert (info.path, info.format, info.bytes) == (path, "dat", path.stat().st_size)
    with DatFile.open(path) as f:
        types = {k: e.elem_type for k, e in f.entries.items()}
    added = {} if extra is None else {"m.a.weight" + extra: 6}
    assert types == {"m.a.weight.qdata": 0, "m.a.weight.scale": 101, **added, "m.norm.weight": 5}
    assert list(types) == ["m.a.weight.qdata", "m.a.weight.scale", *added, "m.norm.weight"]
    weights = open_weights("dat", path)
    assert weights.names() == ["m.a.weight", "m.norm.weight"]
    assert_same(weights.get("m.a.weight"), p)
    got = weights.get("m.norm.weight")
    assert got.dtype == torch.float16 and torch.equal(got, norm)
    again = tmp_path / "again.dat"
    save_dat(again, {n: weights.get(n) for n in weights.names()})
    weights.close()
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("shape", [(16,), (2, 3, 16), (2, 20)])
def test_save_refuses_what_the_format_lacks(shape, tmp_path):
    with pytest.raises(ValueError, match=r"w: shape .*matrices of whole blocks"):
        save_dat(tmp_path / "w.dat", {"w": pack(normal(*shape))})
    assert not list(tmp_path.iterdir())


CODES = torch.zeros(2, 16, dtype=torch.uint8)
SCALES = torch.ones(2, 2).to(torch.float8_e4m3fn)


def dat(folder: Path, **entries: torch.Tensor | tuple[torch.Tensor, int]) -> Path:
    """A file of entries named with _ for the dot: w_qdata -> w.qdata."""
    path = folder / "w.dat"
    rows = [(k.replace("_", ".", 1), *(v if isinstance(v, tuple) else (v, None))) for k, v in entries.items()]
    write_dat(path, rows)
    return path


def read(path: Path, name: str = "w"):
    weights = open_weights("dat", path)
    try:
        return weights.get(name)
    finally:
        weights.close()


@pytest.mark.parametrize("elem_type", [0, 1, 11, 100, 101])
def test_scale_bytes_are_e4m3(elem_type, tmp_path):
    """All 256 bytes, whatever byte type they are filed under, decode as E4M3 and never as integers."""
    byte = torch.arange(256, dtype=torch.uint8).view(16, 16)
    if elem_type == 11:
        byte = byte & 1
    dtype = {1: torch.int8, 11: torch.bool, 101: torch.float8_e4m3fn}.get(elem_type, torch.uint8)
    codes = torch.full((16, 128), 0x22, dtype=torch.uint8)  # 1.0 everywhere
    path = dat(tmp_path, w_qdata=codes, w_scale=(byte.view(dtype), elem_type))
    if elem_type == 11:
        with pytest.raises(DatError, match=r"entry 1 \(w.scale\), byte \d+: block scales are of element type 11"):
            read(path)
        return
    p = read(path)
    assert torch.equal(p.block_scale.view(torch.uint8), byte)
    want = byte.view(torch.float8_e4m3fn).float().repeat_interleave(16, dim=1)
    assert torch.equal(unpack(p).nan_to_num(-1), want.nan_to_num(-1))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
@pytest.mark.parametrize("elem_type", [None, 100])
def test_code_types(dtype, elem_type, tmp_path):
    """Codes filed as 0, 1 or 100 are the same codes."""
    codes = torch.arange(32, dtype=torch.uint8).view(2, 16) * 8
    p = read(dat(tmp_path, w_qdata=(codes.view(dtype), elem_type), w_scale=SCALES))
    assert p.codes.dtype == torch.uint8 and torch.equal(p.codes, codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16, torch.float64])
def test_float_scales(dtype, tmp_path):
    """Accepted where E4M3 holds them exactly, else refused by name."""
    exact = torch.tensor([[448.0, 2.0**-9], [0.0, 1.125]], dtype=dtype)
    p = read(dat(tmp_path, w_qdata=CODES, w_scale=exact))
    assert p.block_scale.float().tolist() == [[448.0, 2.0**-9], [0.0, 1.125]]
    for wrong in (1.0625, 450.0, 2.0**-10, float("nan"), 1000.0):
        path = dat(tmp_path, w_qdata=CODES, w_scale=torch.tensor([[1.0, 1.0], [1.0, wrong]], dtype=dtype))
        with pytest.raises(DatError, match=r"w.dat: entry 1 \(w.scale\), byte \d+: float block scales that no E4M3"):
            read(path)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_integer_scales_are_refused(dtype, tmp_path):
    with pytest.raises(DatError, match=r"entry 1 \(w.scale\), byte \d+: block scales are of element type"):
        read(dat(tmp_path, w_qdata=CODES, w_scale=torch.ones(2, 2, dtype=dtype)))


PAIR = {"w_qdata": CODES, "w_scale": SCALES}
ROW = torch.ones(2, 1)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"w_qdata": CODES}, r"entry 0 \(w.qdata\), byte 13: its .scale entry is missing"),
        ({"w_scale": SCALES}, r"entry 0 \(w.scale\), byte 13: its .qdata entry is missing"),
        ({"n": ROW, "w_global_scale": ROW}, r"entry 1 \(w.global_scale\), byte \d+: its .qdata entry is missing"),
        ({**PAIR, "w_scale": SCALES[:1]}, r"entry 1 \(w.scale\), byte \d+: block scales are \[1, 2\]; expected \[2, 2\]"),
        ({**PAIR, "w_scale": SCALES.view(-1)}, r"entry 1 \(w.scale\), byte \d+: block scales are \[4\]; expected \[2, 2\]"),
        ({**PAIR, "w_qdata": CODES[:, :9]}, r"entry 0 \(w.qdata\), byte \d+: packed codes are \[2, 9\]"),
        ({**PAIR, "w_qdata": CODES.view(-1)}, r"entry 0 \(w.qdata\), byte \d+: packed codes are \[32\]"),
        ({**PAIR, "w_qdata": CODES.short()}, r"entry 0 \(w.qdata\), byte \d+: packed codes are of element type 2"),
        ({**PAIR, "w_scale_2": ROW, "w_global_scale": ROW}, r"entry 3 \(w.global_scale\), byte \d+: there is a .scale_2 entry"),
        ({**PAIR, "w_scale_2": torch.ones(2)}, r"entry 2 \(w.scale_2\), byte \d+: expected float32 \[\] or \[2, 1\]"),
        ({**PAIR, "w_global_scale": ROW.half()}, r"entry 2 \(w.global_scale\), byte \d+: expected float32"),
        ({**PAIR, "w": ROW}, r"entry 2 \(w\), byte \d+: w is there both packed and raw"),
        ({"w": ROW, **PAIR}, r"entry 1 \(w.qdata\), byte \d+: w is there both packed and raw"),
    ],
)
def test_pairs_that_do_not_fit(entries, says, tmp_path):
    """Refused when the file opens; file, entry, key and byte are named."""
    path = dat(tmp_path, **entries)
    with pytest.raises(DatError, match=r"w.dat: " + says):
        open_weights("dat", path)


def test_byte_of_the_error_is_where_the_payload_starts(tmp_path):
    path = dat(tmp_path, n=torch.tensor([7, 8], dtype=torch.uint8), w_qdata=CODES)
    with pytest.raises(DatError) as e:
        open_weights("dat", path)
    at = int(str(e.value).split("byte ")[1].split(":")[0])
    assert path.read_bytes()[at:] == bytes(32)


# -- Hugging Face folders ----------------------------------------------------------------------------------------------

TENSORS = {"a": torch.ones(2, 3), "b": torch.full((4,), 2.0).bfloat16(), "c": torch.tensor([3.0]).half()}
INDEX = "model.safetensors.index.json"


def sharded(folder: Path, weight_map: object) -> Path:
    save_file({"a": TENSORS["a"]}, folder / "model-1.safetensors")
    save_file({"b": TENSORS["b"], "c": TENSORS["c"]}, folder / "model-2.safetensors")
    (folder / INDEX).write_text(json.dumps(weight_map))
    return folder


def assert_reads_all(folder: Path, files: list[str]) -> None:
    weights = open_weights("hf", folder)
    assert sorted(weights.names()) == ["a", "b", "c"]
    assert [(i.path.name, i.format, i.role) for i in weights.files] == [(f, "safetensors", "weights") for f in files]
    for name, want in TENSORS.items():
        got = weights.get(name)
        assert got.dtype == want.dtype and torch.equal(got, want)
    weights.close()


def test_hf_single_file(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    assert_reads_all(tmp_path, ["model.safetensors"])


MAP = {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"}


def test_hf_sharded(tmp_path):
    """By the index; without one, by the files."""
    sharded(tmp_path, {"weight_map": MAP})
    assert_reads_all(tmp_path, ["model-1.safetensors", "model-2.safetensors"])
    (tmp_path / INDEX).unlink()
    assert_reads_all(tmp_path, ["model-1.safetensors", "model-2.safetensors"])


def test_hf_tensor_twice_without_an_index(tmp_path):
    for n in (1, 2):
        save_file({"a": TENSORS["a"]}, tmp_path / f"model-{n}.safetensors")
    with pytest.raises(UserError, match=r"model-2.safetensors: a is already in model-1.safetensors"):
        open_weights("hf", tmp_path)


def test_hf_missing_shard(tmp_path):
    sharded(tmp_path, {"weight_map": MAP})
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json: names model-2.safetensors, which is not in the folder"):
        open_weights("hf", tmp_path)


def test_hf_index_stays_in_its_folder(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    save_file({"a": TENSORS["a"]}, tmp_path / "out.safetensors")
    sharded(inside, {"weight_map": {"a": "../out.safetensors"}})
    with pytest.raises(UserError, match="not in the folder"):
        open_weights("hf", inside)


def test_hf_tensor_absent_from_its_shard(tmp_path):
    weights = open_weights("hf", sharded(tmp_path, {"weight_map": {**MAP, "d": "model-1.safetensors"}}))
    assert torch.equal(weights.get("a"), TENSORS["a"])
    with pytest.raises(UserError, match=r"model-1.safetensors: d is announced by the index"):
        weights.get("d")


@pytest.mark.parametrize("index", [[], {}, {"weight_map": ["a"]}, {"weight_map": None}, "text"])
def test_hf_index_of_another_form(index, tmp_path):
    with pytest.raises(UserError, match=r"index.json: expected a JSON object with a 'weight_map'"):
        open_weights("hf", sharded(tmp_path, index))


def test_hf_index_that_is_no_json(tmp_path):
    sharded(tmp_path, {})
    (tmp_path / INDEX).write_bytes(b"\xff{")
    with pytest.raises(UserError, match=r"index.json: expected a JSON"):
        open_weights("hf", tmp_path)


def test_hf_pickle_is_never_loaded(tmp_path):
    """A pickle that would act when loaded stays shut, and the message says why."""
    (tmp_path / "pytorch_model.bin").write_bytes(b"cbuiltins\nexit\n(tR.")
    with pytest.raises(UserError, match=r"no \*.safetensors in it.*never loaded"):
        open_weights("hf", tmp_path)


def test_hf_empty_folder_says_nothing_of_pickle(tmp_path):
    with pytest.raises(UserError, match=r"no \*.safetensors in it") as e:
        open_weights("hf", tmp_path)
    assert "pickle" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.float64])
def test_hf_dtypes_that_are_refused(dtype, tmp_path):
    save_file({"a": torch.ones(2).to(dtype)}, tmp_path / "model.safetensors")
    weights = open_weights("hf", tmp_path)
    with pytest.raises(UserError, match=r"model.safetensors: a is \w+; expected one of F32, F16, BF16"):
        weights.get("a")


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_hf_damaged_file(damage, tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    path.write_bytes({"cut": path.read_bytes()[:-3], "garbage": b"\xff" * 50, "empty": b""}[damage])
    with pytest.raises(UserError, match=r"model.safetensors: not a readable safetensors file"):
        open_weights("hf", tmp_path)


# -- paths -------------------------------------------------------------------------------------------------------------


def test_missing_path_names_near_misses(tmp_path):
    (tmp_path / "qwen3-4b-nvfp4.dat").touch()
    (tmp_path / "unrelated.txt").touch()
    with pytest.raises(UserError, match=r"qwen3-4b-nvpf4.dat: no such file or folder. Near it: qwen3-4b-nvfp4.dat.$"):
        open_weights("dat", tmp_path / "qwen3-4b-nvpf4.dat")
    with pytest.raises(UserError, match=r"no such file or folder.$"):
        open_weights("hf", tmp_path / "no" / "such" / "parent")


def test_wrong_kind_of_path(tmp_path):
    with pytest.raises(UserError, match=r"a folder; weights=dat takes a .dat file"):
        open_weights("dat", tmp_path)
    save_dat(tmp_path / "w.dat", {"n": torch.ones(1)})
    with pytest.raises(UserError, match=r"w.dat: a file; weights=hf takes a folder"):
        open_weights("hf", tmp_path / "w.dat")


def test_sha256_is_hashlibs(tmp_path):
    """Over the whole file, also for one larger than a read's buffer."""
    path = tmp_path / "w.dat"
    info = save_dat(path, {"n": torch.arange(300_000)})
    assert info.role == "output" and info.bytes == len(path.read_bytes()) > 1 << 21
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    weights = open_weights("dat", path)
    assert [i.sha256 for i in weights.files] == [info.sha256]
    assert weights.files[0].role == "weights"
    weights.close()
