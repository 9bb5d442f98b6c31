"""The safetensors container against the library: the same bytes written, the same tensors read, damage named."""

import json
import os
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fp4lab.checkpoint import layout as layout_module
from fp4lab.checkpoint.layout import FileWriter
from fp4lab.checkpoint.safetensors_file import DTYPES, SafetensorsFile, plan
from fp4lab.errors import UserError

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)
KEYS = st.text(st.characters(codec="utf-8", exclude_characters="\x00"), max_size=12).filter(lambda k: k != "__metadata__")


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Any bits."""
    count = int(torch.tensor(shape).prod()) if shape else 1
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    if dtype == torch.bool:
        raw &= 1
    return raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)


def write(path: Path, tensors: dict[str, torch.Tensor], order: list[str] | None = None, **kwargs) -> None:
    layout = plan(path.name, {k: (t.dtype, tuple(t.shape)) for k, t in tensors.items()}, **kwargs)
    with FileWriter(path, layout) as writer:
        for key in order or tensors:
            writer.put(key, tensors[key])


def bits(t: torch.Tensor) -> list[int]:
    return t.contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else []


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.dictionaries(KEYS, st.tuples(st.sampled_from(list(DTYPES.values())), SHAPES), max_size=8),
    shuffled=st.randoms(use_true_random=False),
)
def test_the_librarys_bytes(kinds, shuffled):
    """Any names, types and shapes, put in any order, give the file that the library writes; both read it alike."""
    tensors = {key: tensor(dtype, shape, i) for i, (key, (dtype, shape)) in enumerate(kinds.items())}
    order = list(tensors)
    shuffled.shuffle(order)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write(ours, tensors, order)
        save_file(tensors, theirs, metadata={"format": "pt"})
        assert ours.read_bytes() == theirs.read_bytes()
        file = SafetensorsFile(theirs)
        assert file.metadata == {"format": "pt"}
        for key, t in tensors.items():
            got = file.tensor(key)
            assert (got.dtype, got.shape, bits(got)) == (t.dtype, t.shape, bits(t))
        with FileWriter(Path(folder, "again"), file.layout("again")) as writer:
            for key in reversed(file.slots):
                writer.put(key, file.tensor(key))
        file.close()
        assert Path(folder, "again").read_bytes() == theirs.read_bytes()


def test_a_foreign_order_and_header_are_kept(tmp_path):
    """A file that no library would write so: its layout gives it again."""
    header = b'{ "b":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"data_offsets":[3,7],"shape":[],"dtype":"F32"} }   '
    data = struct.pack("<Q", len(header)) + header + b"\x01\x02\x03" + struct.pack("<f", 1.5)
    (tmp_path / "f").write_bytes(data)
    file = SafetensorsFile(tmp_path / "f")
    assert file.tensor("b").tolist() == [1, 2, 3] and file.tensor("a").item() == 1.5
    with FileWriter(tmp_path / "g", file.layout("g")) as writer:
        for key in ("a", "b"):
            writer.put(key, file.tensor(key))
    assert (tmp_path / "g").read_bytes() == data


def test_a_writer_holds_to_what_was_announced(tmp_path):
    layout = plan("f", {"a": (torch.float32, (2,)), "b": (torch.uint8, ())})
    with pytest.raises(ValueError, match=r"f: never written: b"), FileWriter(tmp_path / "f", layout) as writer:
        writer.put("a", torch.ones(2))
    for wrong in (torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(2, 1)):
        says = pytest.raises(ValueError, match=r"a: torch.float\d+ .*; announced as torch.float32 \[2\]")
        with says, FileWriter(tmp_path / "f", layout) as writer:
            writer.put("a", wrong)
    with pytest.raises(ValueError, match=r"no type for torch.complex128"):
        plan("f", {"a": (torch.complex128, ())})


def test_floats_are_cast_piece_by_piece(tmp_path, monkeypatch):
    """To the bits of casting the whole, whatever the strides; bytes never are."""
    monkeypatch.setattr(layout_module, "_PIECE", 5)
    value = torch.randn(7, 4, generator=torch.Generator().manual_seed(0)).T
    layout = plan("f", {"a": (torch.float16, (4, 7)), "b": (torch.uint8, (2,))})
    with FileWriter(tmp_path / "f", layout) as writer:
        writer.put("a", value, cast=True)
        writer.put("b", torch.tensor([1, 2], dtype=torch.uint8), cast=True)
    file = SafetensorsFile(tmp_path / "f")
    assert torch.equal(file.tensor("a"), value.to(torch.float16)) and file.tensor("b").tolist() == [1, 2]
    file.close()
    for wrong in ({"a": value[:2]}, {"b": torch.ones(2)}):
        (key, tensor) = next(iter(wrong.items()))
        with pytest.raises(ValueError, match=f"{key}: .*; announced as"), FileWriter(tmp_path / "f", layout) as writer:
            writer.put(key, tensor, cast=True)


def file_of(header: object, data: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def entry(dtype="U8", shape=(2,), offsets=(0, 2)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "0 bytes, too few"),
        (b"1234567", "7 bytes, too few"),
        (struct.pack("<Q", 100) + b"{}", "a header of 100 bytes cannot be in 10 bytes"),
        (struct.pack("<Q", 2**63) + b"{}", "cannot be in 10 bytes"),
        (file_of(b"\xff{"), "no JSON"),
        (file_of(b"[" * 100_000), "no JSON"),
        (file_of([]), "no JSON object"),
        (file_of({"__metadata__": 1}), "__metadata__ is no object"),
        (file_of(b'{"a":1,"a":2}'), "a name occurs twice"),
        (file_of({"a": 1}), "a: expected dtype, shape and data_offsets"),
        (file_of({"a": {"dtype": "U8"}}), "a: expected dtype, shape and data_offsets"),
        (file_of({"a": entry("F4")}, b"ab"), "a is of type 'F4'"),
        (file_of({"a": entry(shape=(-1,))}, b"ab"), "integers from 0 on"),
        (file_of({"a": entry(shape=(True, 2))}, b"ab"), "integers from 0 on"),
        (file_of({"a": entry(shape=(2.0,))}, b"ab"), "integers from 0 on"),
        (file_of({"a": entry(offsets=(0, 1, 2))}, b"ab"), "expected dtype, shape and data_offsets"),
        (file_of({"a": entry(shape=(3,))}, b"ab"), "does not fill bytes 0 to 2"),
        (file_of({"a": entry(shape=(2**62, 2**62))}, b"ab"), "does not fill bytes"),
        (file_of({"a": entry(offsets=(1, 3))}, b"abc"), "a begins at byte"),
        (file_of({"a": entry(), "b": entry(offsets=(1, 3))}, b"abc"), "b begins at byte"),
        (file_of({"a": entry()}, b"abc"), "its tensors end at byte"),
        (file_of({"a": entry()}, b"a"), "its tensors end at byte"),
    ],
)
def test_damage_is_named(data, says, tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=says) as e:
        SafetensorsFile(path)
    assert str(path) in str(e.value)


def test_a_file_that_is_cut_later(tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({"a": torch.ones(100)}, path)
    file = SafetensorsFile(path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="a: the file ends 1 bytes early"):
        file.tensor("a")


VALID = file_of({"__metadata__": {"format": "pt"}, "a": entry("F32", (2,), (0, 8)), "b": entry(offsets=(8, 10))}, bytes(10))


@settings(max_examples=300, deadline=None)
@given(at=st.integers(0, len(VALID) - 1), part=st.binary(min_size=1, max_size=4), keep=st.booleans(), drop=st.integers(0, 3))
@example(at=0, part=b"\xff\xff\xff\xff", keep=True, drop=0)
def test_fuzz(at, part, keep, drop):
    """A damaged file opens or raises UserError with its path; what opens reads without another error, as the library does."""
    data = VALID[:at] + part + VALID[at + (len(part) if keep else drop) :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f")
        path.write_bytes(data)
        try:
            file = SafetensorsFile(path)
        except UserError as e:
            assert str(path) in str(e)
            return
        tensors = {key: file.tensor(key) for key in file.slots}
        file.close()
        try:
            theirs = load_file(path)
        except Exception:
            return  # the library may refuse more, such as metadata that is no text
        assert {k: bits(t) for k, t in tensors.items()} == {k: bits(t) for k, t in theirs.items()}
