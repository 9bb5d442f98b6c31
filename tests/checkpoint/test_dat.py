"""The `.dat` container: its bytes, written and read, and what a damaged file says."""

import math
import tempfile
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fp4lab.checkpoint import DatError, DatFile, open_weights, save_dat, write_dat
from fp4lab.checkpoint.dat import ELEM_TYPES, FP4, leb128
from fp4lab.errors import UserError
from fp4lab.nvfp4 import pack

# Two entries by hand: "a" fp16 [2] = 1, -2 and "b.é" a scalar int64 = 258.
GOLDEN = bytes.fromhex("02" "01" "61" "05" "01" "02" "003c" "00c0" "04" "622ec3a9" "04" "00" "0201000000000000")  # fmt: skip


def entry(key: bytes, elem_type: int, dims: tuple[int, ...], payload: bytes = b"") -> bytes:
    return leb128(len(key)) + key + leb128(elem_type) + leb128(len(dims)) + b"".join(map(leb128, dims)) + payload


def write(folder: Path, data: bytes) -> Path:
    path = folder / "small.dat"
    path.write_bytes(data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(DatError) as e:
        DatFile.open(path)
    assert str(path) in str(e.value)
    return str(e.value)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.reshape(-1).tolist() == b.reshape(-1).tolist()


# -- bytes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "data"),
    [(0, "00"), (1, "01"), (127, "7f"), (128, "8001"), (300, "ac02"), (16384, "808001"), (2**63 - 1, "ff" * 8 + "7f")],
)
def test_leb128(value, data):
    assert leb128(value).hex() == data


def test_golden_file_is_read(tmp_path):
    with DatFile.open(write(tmp_path, GOLDEN)) as f:
        assert list(f.entries) == ["a", "b.é"]
        assert same_bits(f.tensor("a"), torch.tensor([1.0, -2.0], dtype=torch.float16))
        assert same_bits(f.tensor("b.é"), torch.tensor(258))
        a, b = f.entries.values()
        assert (a.offset, a.nbytes, a.number, a.elem_type, a.dims) == (6, 4, 0, 5, (2,))
        assert (b.offset, b.nbytes, b.number, b.elem_type, b.dims) == (17, 8, 1, 4, ())
        assert f.payload("a") == bytes.fromhex("003c00c0")


def test_golden_file_is_written(tmp_path):
    path = tmp_path / "out.dat"
    write_dat(path, [("a", torch.tensor([1.0, -2.0], dtype=torch.float16), None), ("b.é", torch.tensor(258), None)])
    assert path.read_bytes() == GOLDEN


def test_tensors_outlive_the_file(tmp_path):
    """Tensors are copies that may be written."""
    f = DatFile.open(write(tmp_path, GOLDEN))
    t = f.tensor("a")
    f.close()
    t += 1
    assert t.tolist() == [2.0, -1.0]
    assert (tmp_path / "small.dat").read_bytes() == GOLDEN


def test_long_form_counts_are_read(tmp_path):
    """A count in more bytes than it needs is still that count, up to 64 bits."""
    data = b"\x81\x80\x00" + b"\x01k" + b"\x80\x00" + b"\x81\x80\x80\x80\x80\x80\x80\x80\x00" + b"\x82\x00" + b"hi"
    with DatFile.open(write(tmp_path, data)) as f:
        assert f.tensor("k").tolist() == [104, 105]


# -- round trips -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3), (2, 0, 3), (1,) * 8])
@pytest.mark.parametrize("number", sorted(ELEM_TYPES))
def test_every_type_round_trips(number, shape, tmp_path):
    """Any bits, NaN included, in the type's own number, and the file is rewritten byte for byte."""
    dtype, size = ELEM_TYPES[number]
    count = math.prod(shape)
    raw = torch.randint(0, 256, (count * size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(number))
    if dtype == torch.bool:
        raw &= 1
    t = raw.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype)
    first, second = tmp_path / "a.dat", tmp_path / "b.dat"
    write_dat(first, [("k", t, number if number == FP4 else None)])
    with DatFile.open(first) as f:
        e, got = f.entries["k"], f.tensor("k")
        assert (e.elem_type, e.dims, e.nbytes, e.dtype) == (number, shape, count * size, dtype)
        assert f.payload("k") == bytes(raw.tolist())
        assert got.dtype == dtype and got.shape == shape
        write_dat(second, [("k", got, e.elem_type)])
    assert second.read_bytes() == first.read_bytes()


def test_rewriting_what_was_read(tmp_path):
    """Every entry with its own type, in the file's order, gives the file again."""
    data = b"\x04" + b"".join(
        [
            entry(b"z.qdata", FP4, (1, 8), bytes(range(8))),
            entry(b"z.scale", 101, (1, 1), b"\x7f"),
            entry(b"", 11, (2,), b"\x01\x00"),
            entry(b"a" * 200, 15, (2, 1), b"\x80\x3f\x00\xc0"),
        ]
    )
    path = write(tmp_path, data)
    with DatFile.open(path) as f:
        entries = [(k, f.tensor(k), e.elem_type) for k, e in f.entries.items()]
    write_dat(tmp_path / "again.dat", entries)
    assert (tmp_path / "again.dat").read_bytes() == data


def test_strided_and_gradient_tensors_are_written_row_major(tmp_path):
    t = torch.arange(6.0).view(2, 3).requires_grad_()
    write_dat(tmp_path / "a.dat", [("k", t.t(), None)])
    with DatFile.open(tmp_path / "a.dat") as f:
        assert f.tensor("k").tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """A key given twice, a dtype that the format lacks, a type of another size, an error halfway: no new file, no remains."""
    path = write(tmp_path, GOLDEN)
    one = torch.ones(1)

    def broken():
        yield "a", one, None
        raise OSError("disk")

    for entries, says in [
        ([("a", one, None), ("a", one, None)], "a: given twice"),
        ([("a", one.to(torch.complex64), None)], "a: torch.complex64"),
        ([("a", one, 5)], "element type 5"),
        ([("a", one, 4711)], "element type 4711"),
    ]:
        with pytest.raises(ValueError, match=says):
            write_dat(path, entries)
    with pytest.raises(OSError, match="disk"):
        write_dat(path, broken())
    assert path.read_bytes() == GOLDEN
    assert [p.name for p in tmp_path.iterdir()] == ["small.dat"]


# -- damage ------------------------------------------------------------------------------------------------------------


def test_truncated_anywhere(tmp_path):
    """Every proper prefix is refused; inside an entry the message has its number and the byte where reading stopped."""
    good = GOLDEN[:1].replace(b"\x02", b"\x03") + GOLDEN[1:] + entry(b"x" * 130, 6, (2, 2), bytes(16))
    with DatFile.open(write(tmp_path, good)) as f:
        starts = [1, 10, 25]
        assert len(f.entries) == 3 and len(good) == 25 + 2 + 130 + 4 + 16
    for n in range(len(good)):
        path = write(tmp_path, good[:n])
        message = refusal(path)
        if n == 0:
            assert "empty" in message
        elif n // 3 < 3:
            assert "3 entries cannot fit" in message
        else:
            number = sum(s <= n for s in starts) - 1
            assert f": entry {number}" in message and "truncated" in message
            at = int(message.split("byte ")[1].split(":")[0])
            assert starts[number] <= at <= n


HUGE = leb128(2**62)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"\x02" + entry(b"a", 0, (1,), b"x") * 2, r"entry 1 \(a\), byte 9: .*already used by entry 0"),
        (b"\x01" + entry(b"a", 4711, (1,), b"x"), r"entry 0 \(a\), byte 5: element type 4711 is unknown"),
        (b"\x01" + entry(b"a", 8, (1,), b"x"), r"entry 0 \(a\), byte 4: element type 8 is unknown"),
        (b"\x01" + entry(b"\xff\xfe", 0, (1,), b"x"), r"entry 0, byte 2: the key is not UTF-8"),
        (b"\x02" + entry(b"a", 0, (1,), b"x") + entry(b"\xc3", 0, (), b"x"), r"entry 1, byte 8: the key is not UTF-8"),
        (b"\x01" + entry(b"a", 0, (1,), b"xyz"), r"byte 7: 2 bytes follow the last of 1 entries"),
        (b"\x00tail", r"byte 1: 4 bytes follow the last of 0 entries"),
        (leb128(2**40) + b"abc", r"byte 6: 1099511627776 entries cannot fit into 9 bytes"),
        (b"\x01" + HUGE + b"abc", r"entry 0, byte 10: the key needs 4611686018427387904 bytes, 3 are left"),
        (b"\x01\x01a\x00" + HUGE, r"entry 0 \(a\), byte 13: 4611686018427387904 dimensions"),
        (b"\x01" + entry(b"a", 0, (1,) * 9, b"x"), r"entry 0 \(a\), byte 5: 9 dimensions; expected at most 8"),
        (b"\x01" + entry(b"a", 6, (2**62,), b"xyz"), r"entry 0 \(a\), byte 14: the payload \[4611686018427387904\] needs"),
        (b"\x01" + entry(b"a", 6, (2**31, 2**31, 2**31), b"x"), r"entry 0 \(a\), byte 20: the payload .* 1 are left"),
        (b"\x01" + entry(b"a", 0, (2**62, 2**62, 0)), r"entry 0 \(a\), byte 24: the dimensions .* are beyond any tensor"),
        (b"\x01" + b"\x80" * 12, r"entry 0, byte 1: the key length is longer than 64 bits"),
        (b"\xff" * 9 + b"\x01", r"byte 0: the entry count is 18446744073709551615, beyond any file"),
        (b"\x80" * 10 + b"\x01", r"byte 0: the entry count is longer than 64 bits"),
        (b"\x01\x01a\x00\x01" + b"\x80" * 10 + b"\x01", r"entry 0 \(a\), byte 5: a dimension is longer than 64 bits"),
    ],
)
def test_damage_is_named(data, says, tmp_path):
    """File, entry and byte in every message, and never more memory than a small file needs."""
    path = write(tmp_path, data)
    with pytest.raises(DatError, match=says):
        DatFile.open(path)
    tracemalloc.start()
    try:
        refusal(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_unreadable_paths(tmp_path):
    assert "empty" in refusal(write(tmp_path, b""))
    assert "weights.path" in refusal(tmp_path / "no.dat")
    assert "cannot read" in refusal(tmp_path)


# -- fuzz --------------------------------------------------------------------------------------------------------------


def valid_file() -> bytes:
    """A pair with a second level, and raw entries, in 300 bytes or so."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "v.dat"
        x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
        save_dat(path, {"w": pack(x, "nearest", "row"), "v": pack(x, "ct", "tensor"), "n": torch.ones(4), "s": torch.tensor(3)})
        return path.read_bytes()


VALID = valid_file()
POSITION = st.integers(0, len(VALID) - 1)
CHANGE = st.one_of(
    st.tuples(st.just("set"), POSITION, st.binary(min_size=1, max_size=3)),
    st.tuples(st.just("insert"), POSITION, st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("delete"), POSITION, st.integers(1, 9).map(bytes)),
    st.tuples(st.just("cut"), POSITION, st.just(b"")),
)


def mutated(changes: list[tuple[str, int, bytes]]) -> bytes:
    data = VALID
    for what, at, part in changes:
        if what == "set":
            data = data[:at] + part + data[at + len(part) :]
        elif what == "insert":
            data = data[:at] + part + data[at:]
        elif what == "delete":
            data = data[:at] + data[at + len(part) :]
        else:
            data = data[:at]
    return data


def read_all(data: bytes) -> str:
    """ "opened" or "refused"; any other exception goes through."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), data)
        try:
            weights = open_weights("dat", path)
            try:
                for name in weights.names():
                    value = weights.get(name)
                    parts = [value] if isinstance(value, torch.Tensor) else value.tensors()
                    assert sum(t.numel() * t.element_size() for t in parts) <= len(data)
            finally:
                weights.close()
        except UserError as e:
            assert str(path) in str(e)
            return "refused"
    return "opened"


def test_the_fuzzed_file_is_valid():
    assert read_all(VALID) == "opened"


@settings(max_examples=300, deadline=None)
@given(changes=st.lists(CHANGE, min_size=1, max_size=3))
def test_fuzz_mutations(changes):
    """A damaged file opens or raises UserError with its path, nothing else; what it gives is no larger than it is."""
    read_all(mutated(changes))


@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=60))
@example(b"\x01" + entry(b"a", 0, (2**62, 0)))
@example(b"\x01" + entry(b"a", 0, (2**62, 2**62, 0)))
@example(b"\x02" + entry(b"a.qdata", 0, (2**62, 0)) + entry(b"a.scale", 101, (2**62, 0)))
@example(b"\x02" + entry(b".qdata", 0, (0, 8)) + entry(b".scale", 5, (0, 1)))
def test_fuzz_any_bytes(data):
    """Bytes of no `.dat` at all, and dimensions that are absurd but for a zero among them."""
    read_all(data)


def test_every_single_byte_replaced():
    """Each byte of the file in turn, at the values that headers mind."""
    outcomes = {read_all(VALID[:i] + bytes([b]) + VALID[i + 1 :]) for i in range(len(VALID)) for b in (0x00, 0x7F, 0x80, 0xFF)}
    assert outcomes == {"opened", "refused"}
