"""The codec against its table (reference 2.4), torchao, compressed-tensors and a plain loop."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fp4lab.nvfp4 import PackedTensor, codec, decode_e4m3, encode_e2m1, encode_e4m3, pack, repack_like, unpack

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
TIES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
FLOATS = (torch.float32, torch.bfloat16)
CHOICES = [(r, "single") for r in ("torchao", "native", "nearest", "stochastic", "four_over_six")] + [
    (r, levels) for r in ("ct", "torchao", "nearest", "stochastic", "four_over_six") for levels in ("tensor", "row")
]
KINDS = ("sd0.02", "sd1", "sd30", "outlier", "tiny", "zero_row", "ties")


def normal(*shape: int, seed: int = 0, sd: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * sd


def sample(kind: str) -> torch.Tensor:
    """[64, 128] of a kind that the comparisons name."""
    if kind.startswith("sd"):
        return normal(64, 128, seed=3, sd=float(kind[2:]))
    if kind == "ties":  # every row its own block scale, 8 .. 71 as bytes, so that amax / 6 is that scale
        scale = decode_e4m3(torch.arange(8, 72, dtype=torch.uint8))
        return torch.tensor([*TIES, 6.0, *(-t for t in TIES), -6.0]).repeat(64, 8) * scale[:, None]
    x = normal(64, 128, seed=4)
    if kind == "outlier":
        x[3, 5] = 1000.0
    elif kind == "zero_row":
        x[3] = 0
    else:
        x *= 1e-6
    return x


def nibbles_of(codes: torch.Tensor) -> torch.Tensor:
    """[rows, cols / 2] bytes -> [rows, cols] codes 0..15."""
    return torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1)


def scale_bytes(p: PackedTensor) -> torch.Tensor:
    return p.block_scale.view(torch.uint8)


def assert_same(a: PackedTensor, b: PackedTensor) -> None:
    assert torch.equal(a.codes, b.codes)
    assert torch.equal(scale_bytes(a), scale_bytes(b))
    assert a.shape == b.shape and a.divide == b.divide
    assert (a.global_scale is None) == (b.global_scale is None)
    if a.global_scale is not None:
        assert torch.equal(a.global_scale, b.global_scale)


def e4m3(byte: int) -> float:
    """By the format's definition, not by torch."""
    sign, exponent, mantissa = -1 if byte >> 7 else 1, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


# -- the code book and the scale bytes ---------------------------------------------------------------------------------


def test_code_book_and_nibble_order():
    """Codes 0..7 are the grid in order, bit 3 the sign, and the even column is the low nibble."""
    x = torch.tensor([[1.0, 6.0, 0.0, 0.5, 1.5, 2.0, 3.0, 4.0, -1.0, -6.0, -0.5, -1.5, -2.0, -3.0, -4.0, 0.0]])
    for rule in ("torchao", "nearest", "native"):
        p = pack(x, rule)
        assert scale_bytes(p).tolist() == [[0x38]], rule  # 1.0
        assert bytes(p.codes.flatten().tolist()).hex(" ") == "72 10 43 65 fa b9 dc 0e", rule
        assert torch.equal(unpack(p), x), rule
    assert pack(x, "nearest").codes[0, 0] == 0x72


def test_unpack_of_all_bytes():
    """Each of the 256 code bytes decodes to two grid values; code 8 is -0."""
    p = PackedTensor(
        torch.arange(256, dtype=torch.uint8).view(1, 256),
        torch.full((1, 32), 2.0).to(torch.float8_e4m3fn),
        torch.tensor(3.0),
        (1, 512),
    )
    signed = [*GRID, *(-v for v in GRID)]
    got = unpack(p).flatten()
    assert got.tolist() == [6 * signed[n] for byte in range(256) for n in (byte & 15, byte >> 4)]
    assert torch.signbit(got[16]) and got[16] == 0


def test_e4m3_all_bytes():
    """All 256 bytes against the formula: 256..448 are numbers, only 0x7F and 0xFF are NaN."""
    got = decode_e4m3(torch.arange(256, dtype=torch.uint8)).tolist()
    assert [b for b in range(256) if math.isnan(got[b])] == [0x7F, 0xFF]
    for byte in range(256):
        assert math.isnan(e4m3(byte)) or got[byte] == e4m3(byte), hex(byte)
    assert got[0x78:0x7F] == [256, 288, 320, 352, 384, 416, 448]
    assert (got[0x01], got[0x08], got[0x38]) == (2.0**-9, 2.0**-6, 1.0)


def test_encode_e4m3_rounds_to_even_and_saturates():
    """Midpoints go to the even byte, everything past 448 stays 448, and encoding inverts decoding."""
    byte = torch.tensor([b for b in range(256) if b not in (0x7F, 0xFF)], dtype=torch.uint8)
    assert torch.equal(encode_e4m3(decode_e4m3(byte)).view(torch.uint8), byte)
    low = torch.arange(0, 0x7E, dtype=torch.uint8)
    middle = (decode_e4m3(low) + decode_e4m3(low + 1)) / 2
    assert torch.equal(encode_e4m3(middle).view(torch.uint8), low + (low & 1))
    assert encode_e4m3(torch.tensor([449.0, 1e9, -1e9])).float().tolist() == [448.0, 448.0, -448.0]


@pytest.mark.parametrize("rounding", ["even", "away"])
def test_e2m1_thresholds(rounding):
    """Each threshold, its neighbours below and above, and saturation."""
    at = torch.tensor(TIES)
    index = torch.arange(7)
    below, above = at.nextafter(torch.tensor(0.0)), at.nextafter(torch.tensor(9.0))
    tie = index + (index & 1 if rounding == "even" else 1)
    for y, code in ((below, index), (at, tie), (above, index + 1)):
        assert encode_e2m1(y, rounding).tolist() == code.tolist()
        negative = [c | 8 for c in code.tolist()]
        assert encode_e2m1(-y, rounding).tolist() == negative
    assert encode_e2m1(torch.tensor([7.0, math.inf, -math.inf]), rounding).tolist() == [7, 7, 15]


def test_e2m1_wrong_choices():
    with pytest.raises(ValueError, match="noise"):
        encode_e2m1(torch.ones(1), "stochastic")
    with pytest.raises(ValueError, match="up"):
        encode_e2m1(torch.ones(1), "up")


# -- torchao -----------------------------------------------------------------------------------------------------------


def assert_only_midpoints(ours: torch.Tensor, theirs: torch.Tensor, y: torch.Tensor) -> None:
    """Codes equal, but where y is a midpoint of the grid to fp32's last digits; there at most one step apart."""
    ours, theirs = nibbles_of(ours), nibbles_of(theirs)
    near = ((y.abs().unsqueeze(-1) / torch.tensor(TIES, dtype=torch.float64) - 1).abs() < 2.0**-21).any(-1)
    differs = ours != theirs
    assert not (differs & ~near).any()
    assert ((ours & 8) == (theirs & 8)).all()
    assert ((ours & 7).int() - (theirs & 7).int()).abs().max() <= 1


@pytest.mark.parametrize("levels", ["single", "tensor"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_torchao(kind, levels):
    """Scale bytes equal always. Codes too, but at exact midpoints, where torchao 0.18 may land one step away:

    it multiplies by the rounded reciprocal 1 / scale, the codec divides. Random fp32 never meets a midpoint in a single
    level; bf16 and the kind made of ties do.
    """
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    for dtype in FLOATS:
        x = sample(kind).to(dtype)
        g = x.abs().amax().float() / (448 * 6) if levels == "tensor" else None
        scale, codes = nvfp4.nvfp4_quantize(x, 16, g)
        p = pack(x, "torchao", levels)
        assert (p.global_scale is None) if g is None else torch.equal(p.global_scale, g)
        assert torch.equal(scale_bytes(p), scale.view(torch.uint8)), dtype
        total = scale.double() * (1.0 if g is None else g.double())
        assert_only_midpoints(p.codes, codes, x.double() / total.repeat_interleave(16, dim=1))
        if levels == "single" and dtype == torch.float32 and kind != "ties":
            assert torch.equal(p.codes, codes)


# -- compressed-tensors ------------------------------------------------------------------------------------------------


def by_compressed_tensors(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(global scale, E4M3 block scales, packed codes), as its NVFP4 compressor gets them."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import quantize_and_pack_fp4
    from compressed_tensors.quantization.quant_scheme import NVFP4A16
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    blocks = x.view(x.shape[0], -1, 16)
    g = generate_gparam(x.min(), x.max())
    scale, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), NVFP4A16["weights"], global_scale=g)
    return g[0], scale.to(torch.float8_e4m3fn), quantize_and_pack_fp4(x, scale, g, None, 16)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_compressed_tensors(kind):
    """Byte for byte in fp32, ties included. In bf16 too with its global scale, which it computes in bf16 and pack in fp32."""
    x = sample(kind)
    g, scale, codes = by_compressed_tensors(x)
    p = pack(x, "ct", "tensor")
    assert p.divide and torch.equal(p.global_scale, g)
    assert torch.equal(scale_bytes(p), scale.view(torch.uint8))
    assert torch.equal(p.codes, codes)

    x = x.bfloat16()
    g, scale, codes = by_compressed_tensors(x)
    p = pack(x, "ct", "tensor", global_scale=g)
    assert torch.equal(scale_bytes(p), scale.view(torch.uint8))
    assert torch.equal(p.codes, codes)
    own = pack(x, "ct", "tensor").global_scale
    assert own == 2688 / x.abs().amax().float()
    assert (own / g - 1).abs() <= 2.0**-7  # reciprocal and product, each rounded to bf16


def test_ct_decodes_as_compressed_tensors():
    """unpack of a ct tensor divides by the global scale, as its decompressor does."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    p = pack(sample("sd0.02"), "ct", "tensor")
    values = unpack_fp4_from_uint8(p.codes, 64, 128, torch.float32)
    scale = (p.block_scale.float() / p.global_scale).repeat_interleave(16, dim=1)
    assert torch.equal(unpack(p), values * scale)


# -- the other rules ---------------------------------------------------------------------------------------------------


def native_loop(x: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Reference 2.4, "native", number by number."""
    bytes_up = [e4m3(b) for b in range(0x7F)]
    codes, scales = [], []
    for row in x:
        code_row, scale_row = [], []
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            wanted = float(max(abs(v) for v in block) / 6)  # in the input's dtype
            wanted = min(max(wanted, 2.0**-16), 448.0)
            best = min(range(0x7F), key=lambda b: (abs(bytes_up[b] - wanted), b & 1))
            scale_row.append(best)
            divisor = np.float32(bytes_up[best]) + np.float32(1e-12)
            for v in block.float().tolist():
                y = np.float32(v) / divisor
                code = sum(abs(y) >= np.float32(t) for t in TIES)
                code_row.append(int(code) | (8 if v < 0 else 0))
        codes.append(code_row)
        scales.append(scale_row)
    return codes, scales


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("sd", [1e-6, 5e-3, 0.05, 1.0, 1e4])
def test_native_equals_the_loop(sd, dtype):
    """Scales from 2^-16 (which become 0) to past 448, with a zero block and ties away from zero."""
    x = normal(3, 32, seed=7, sd=sd)
    x[1, :16] = 0
    x[2, :16] = torch.tensor([*TIES, 6.0, *(-t for t in TIES), -6.0])
    x = x.to(dtype)
    p = pack(x, "native")
    codes, scales = native_loop(x)
    assert scale_bytes(p).tolist() == scales
    assert nibbles_of(p.codes).tolist() == codes


def test_zero_block_scales():
    """The last column of the codec's table; every one decodes to zeros."""
    x = torch.zeros(1, 16)
    least = {"torchao": 2.0**-6, "native": 0.0, "nearest": 2.0**-9, "stochastic": 2.0**-9, "four_over_six": 2.0**-9}
    for rule, want in least.items():
        p = pack(x, rule)
        assert p.block_scale.float().item() == want, rule
        assert not unpack(p).any()
    for levels in ("tensor", "row"):
        p = pack(x, "ct", levels)
        assert p.block_scale.float().item() == 0.125 and p.global_scale.flatten().tolist() == [1.0]
        assert not unpack(p).any()


def test_smallest_scales_of_small_values():
    """Below 2^-6 torchao stays at it and nearest goes on down to 2^-9."""
    x = torch.full((1, 16), 6 * 2.0**-8)
    assert pack(x, "torchao").block_scale.float().item() == 2.0**-6
    assert pack(x, "nearest").block_scale.float().item() == 2.0**-8
    assert torch.equal(unpack(pack(x, "nearest")), x)
    assert pack(x * 2.0**-4, "nearest").block_scale.float().item() == 2.0**-9


@pytest.mark.parametrize("levels", ["tensor", "row"])
def test_second_level_uses_the_whole_range(levels):
    """The largest block scale is 448 (of each row where the level is a row), whichever the convention."""
    x = normal(4, 64, seed=8) * torch.tensor([1e-3, 1.0, 30.0, 1e3])[:, None]
    amax = x.abs().amax() if levels == "tensor" else x.abs().amax(1, keepdim=True)
    for rule in ("ct", "nearest", "torchao", "stochastic"):
        p = pack(x, rule, levels, torch.Generator().manual_seed(0))
        assert p.levels == levels and p.divide == (rule == "ct")
        assert torch.allclose(p.global_scale, 2688 / amax if rule == "ct" else amax / 2688)
        top = p.block_scale.float().amax() if levels == "tensor" else p.block_scale.float().amax(1)
        assert (top == 448).all(), rule
        if rule != "stochastic":
            peak = unpack(p).abs().amax() if levels == "tensor" else unpack(p).abs().amax(1, keepdim=True)
            assert torch.allclose(peak, amax)


@pytest.mark.parametrize(("rule", "levels"), CHOICES)
def test_error_is_bounded(rule, levels):
    """No element is further off than its block's step allows (half of it for nearest rules)."""
    x = normal(16, 64, seed=9)
    p = pack(x, rule, levels, torch.Generator().manual_seed(1))
    scale = p.block_scale.float()
    if p.global_scale is not None:
        scale = scale / p.global_scale if p.divide else scale * p.global_scale
    y = (x.view(16, 4, 16) / scale.unsqueeze(-1)).abs()
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0)) * (1.0 if rule == "stochastic" else 0.5)
    off = ((unpack(p) - x).view(16, 4, 16) / scale.unsqueeze(-1)).abs()
    assert (off <= step * (1 + 1e-5)).all()


@pytest.mark.parametrize("levels", codec.LEVELS)
@pytest.mark.parametrize("kind", KINDS)
def test_four_over_six(kind, levels):
    """Every block by hand: both scales tried with the rule "nearest", the one with the smaller squared error kept."""
    x = sample(kind)
    p = pack(x, "four_over_six", levels)
    amax = x.abs().amax() if levels == "tensor" else x.abs().amax(1, keepdim=True)
    if levels != "single":
        want = torch.where(amax > 0, amax / (6 * 256), 1.0)
        assert torch.equal(p.global_scale, want)
    g = torch.ones(()) if p.global_scale is None else p.global_scale
    grid = torch.tensor([*GRID, *(-v for v in GRID)], dtype=torch.float64)
    chosen = 0
    for r, c in np.ndindex(64, 8):
        block, second = x[r, 16 * c : 16 * c + 16].double(), float(g[r, 0] if g.ndim else g)
        errors = {}
        for top in (6, 4):
            scale = encode_e4m3((block.abs().max() / top / second).float().clamp(min=2.0**-9)).double()
            errors[top] = ((grid * scale * second)[:, None] - block).abs().amin(0).square().sum(), scale
        six, four = errors[6], errors[4]
        if abs(float(six[0] - four[0])) < 1e-6 * float(six[0]) or six[1] == four[1]:
            continue  # as good as equal: either
        best = min(six, four, key=lambda e: float(e[0]))
        assert float(p.block_scale[r, c].double()) == float(best[1]), (r, c)
        chosen += best is four
        got = (unpack(p)[r, 16 * c : 16 * c + 16].double() - block).square().sum()
        assert float(got) <= float(best[0]) * (1 + 1e-5) + 1e-30
    assert chosen > 50 or kind in ("ties", "tiny")
    plain = (unpack(pack(x, "nearest", levels)) - x).square().sum()
    assert (unpack(p) - x).square().sum() <= plain or levels != "single"


def test_four_over_six_divided():
    """In compressed-tensors' convention the second level is the reciprocal."""
    x = sample("sd0.02")
    p = pack(x, "four_over_six", "tensor", divide=True)
    assert p.divide and torch.equal(p.global_scale, 6 * 256 / x.abs().amax())
    other = pack(x, "four_over_six", "tensor")
    assert torch.equal(p.block_scale.view(torch.uint8), other.block_scale.view(torch.uint8))
    assert torch.equal(p.codes, other.codes)


# -- packing what was unpacked -----------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 4),
    cols=st.integers(1, 50),
    sd=st.floats(-3, 5).map(lambda e: 10.0**e),
    seed=st.integers(0, 2**31),
    choice=st.sampled_from(
        [("torchao", "single"), ("nearest", "single"), ("native", "single")]
        + [(r, levels) for r in ("torchao", "nearest", "ct") for levels in ("tensor", "row")]
    ),
)
def test_pack_of_unpack_is_the_same(rows, cols, sd, seed, choice):
    """Codes and scales come back in every block whose scale is 2^-6 or more, as the codec promises; torchao: in all.

    Native alone loses the sign of a -0, because it looks for x < 0.
    """
    rule, levels = choice
    p = pack(normal(rows, cols, seed=seed, sd=sd), rule, levels)
    again = pack(unpack(p), rule, levels, global_scale=p.global_scale)
    promised = (p.block_scale.float() >= 2.0**-6) | (rule == "torchao")
    assert torch.equal(scale_bytes(again)[promised], scale_bytes(p)[promised])
    wide = promised.repeat_interleave(8, dim=1)
    codes = p.codes
    if rule == "native":
        codes = torch.where(codes & 15 == 8, codes & 0xF0, codes)
        codes = torch.where(codes >> 4 == 8, codes & 0x0F, codes)
    assert torch.equal(again.codes[wide], codes[wide])


def test_repack_like_keeps_the_kind():
    """A per-tensor scale and its convention are kept, rows get new ones."""
    x = normal(4, 32, seed=10)
    for rule, levels in [("ct", "tensor"), ("ct", "row"), ("nearest", "tensor"), ("torchao", "single")]:
        p = pack(x, rule, levels)
        q = repack_like(x / 2, p, "ct" if rule == "torchao" else "torchao")
        assert (q.levels, q.divide, q.shape) == (p.levels, p.divide, p.shape)
        if levels == "tensor":
            assert torch.equal(q.global_scale, p.global_scale)
        if levels == "row":
            assert torch.equal(q.global_scale, p.global_scale * 2)
    p = pack(x, "ct", "tensor")
    assert_same(repack_like(unpack(p), p, "ct"), p)


# -- stochastic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["single", "tensor", "row"])
def test_stochastic_is_unbiased_and_never_clips(levels):
    """The mean of 2000 draws is within 5 standard errors for every element, and each draw is one of the two neighbours."""
    block = normal(16, seed=11)
    block[0], block[1] = block.abs().max() * 1.01, 0.0
    p = pack(block.repeat(2000, 1), "stochastic", levels, torch.Generator().manual_seed(2))
    scale = p.block_scale[0].double() * (1.0 if p.global_scale is None else p.global_scale.flatten()[0].double())
    assert (p.block_scale.float() == p.block_scale[0].float()).all()
    assert 6 * scale.item() >= block[0].item() * (1 - 1e-6)
    y = block.double() / scale
    grid = torch.tensor(GRID, dtype=torch.float64)
    high = torch.searchsorted(grid, y.abs().clamp(max=6 * (1 - 1e-7))).clamp(1, 7)
    low, high = grid[high - 1] * y.sign(), grid[high] * y.sign()
    drawn = unpack(p).double() / scale
    to_low, to_high = (drawn - low).abs() < 1e-5, (drawn - high).abs() < 1e-5
    assert (to_low | to_high).all()
    error = ((y - low).abs() * (high - y).abs() / 2000).clamp(min=0).sqrt()
    assert ((drawn.mean(0) - y).abs() <= 5 * error + 1e-5).all()
    assert (error > 0).sum() >= 12


def test_stochastic_numbers():
    """The generator decides, given noise replaces it, and noise 0 and just below 1 are the floor and the ceiling."""
    x = normal(8, 32, seed=12)
    a, b, c = (pack(x, "stochastic", generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert_same(a, b)
    assert not torch.equal(a.codes, c.codes)
    noise = torch.rand(8, 32, generator=torch.Generator().manual_seed(1))
    assert_same(pack(x, "stochastic", noise=noise), a)
    down = unpack(pack(x, "stochastic", noise=torch.zeros(8, 32)))
    up = unpack(pack(x, "stochastic", noise=torch.full((8, 32), 1 - 2.0**-24)))
    assert (down.abs() <= x.abs() * (1 + 1e-6)).all() and (up.abs() >= x.abs() * (1 - 1e-6)).all()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), sd=st.floats(-2, 2.5).map(lambda e: 10.0**e))
def test_stochastic_scale_is_the_next_up(seed, sd):
    """The smallest E4M3 number that holds amax / 6."""
    x = normal(4, 32, seed=seed, sd=sd)
    byte = scale_bytes(pack(x, "stochastic")).int()
    wanted = (x.view(4, 2, 16).abs().amax(-1) / 6).tolist()
    for got, want in zip(byte.flatten().tolist(), [w for row in wanted for w in row], strict=True):
        assert e4m3(got) >= want
        assert got == 1 or e4m3(got - 1) < want


# -- shapes, pieces, views ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rule", "levels"), CHOICES)
def test_pieces_do_not_matter(rule, levels, monkeypatch):
    """One row at a time, three at a time and all at once give the same bytes and the same values."""
    x = normal(11, 64, seed=13)
    noise = torch.rand(11, 64, generator=torch.Generator().manual_seed(3)) if rule == "stochastic" else None
    whole = pack(x, rule, levels, noise=noise)
    values = unpack(whole)
    for piece in (1, 64 * 3):
        monkeypatch.setattr(codec, "PIECE", piece)
        assert_same(pack(x, rule, levels, noise=noise), whole)
        assert torch.equal(unpack(whole), values)


@pytest.mark.parametrize("shape", [(3, 20), (16,), (5,), (1, 1), (2, 3, 10), (2, 4, 4), (0, 16)])
@pytest.mark.parametrize("rule", ["torchao", "native", "nearest"])
def test_shapes_and_padding(shape, rule):
    """Padding with zeros changes nothing, and ranks fold as PackedTensor says."""
    x = normal(*shape, seed=14)
    p = pack(x, rule)
    rows = 1 if len(shape) == 1 else shape[0]
    cols = math.prod(shape) // rows if rows else 16
    padded = -(-cols // 16) * 16
    assert p.codes.shape == (rows, padded // 2) and p.block_scale.shape == (rows, padded // 16)
    assert unpack(p).shape == x.shape and p.shape == shape
    full = torch.zeros(rows, padded)
    full[:, :cols] = x.reshape(rows, cols)
    q = pack(full, rule)
    assert torch.equal(p.codes, q.codes) and torch.equal(scale_bytes(p), scale_bytes(q))
    assert torch.equal(unpack(p).reshape(rows, cols), unpack(q)[:, :cols])


def test_unpack_dtype_rounds_once():
    p = pack(normal(4, 32, seed=15), "ct", "tensor")
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(unpack(p, dtype), unpack(p).to(dtype))


def test_strided_input_and_no_gradient():
    """A transposed parameter packs like its contiguous copy, and the result is off the graph."""
    x = normal(32, 8, seed=16).requires_grad_()
    assert_same(pack(x.t(), "nearest", "row"), pack(x.detach().t().contiguous(), "nearest", "row"))


@pytest.mark.parametrize("levels", ["single", "tensor", "row"])
def test_rows_is_a_view(levels):
    """Writing into rows(1, 3) writes into the whole, and reading it is reading those rows."""
    p = pack(normal(4, 20, seed=17), "nearest", levels)
    before = unpack(p)
    part = p.rows(1, 3)
    assert part.shape == (2, 20) and torch.equal(unpack(part), before[1:3])
    new = pack(normal(2, 20, seed=18), "nearest", levels, global_scale=part.global_scale)
    part.codes.copy_(new.codes)
    part.block_scale.copy_(new.block_scale)
    after = unpack(p)
    assert torch.equal(after[1:3], unpack(new)) and not torch.equal(after[1:3], before[1:3])
    assert torch.equal(after[[0, 3]], before[[0, 3]])


def test_clone_to_and_sizes():
    p = pack(normal(4, 32, seed=19), "ct", "row")
    copy = p.clone()
    copy.codes.zero_()
    assert p.codes.any() and not copy.codes.any() and copy.divide and copy.shape == p.shape
    assert_same(p.to("cpu"), p)
    assert p.nbytes == 4 * 16 + 4 * 2 + 4 * 4 and len(p.tensors()) == 3
    assert [pack(p.codes.float(), "nearest", levels).levels for levels in codec.LEVELS] == list(codec.LEVELS)


@pytest.mark.parametrize(("rule", "levels"), CHOICES)
def test_scratch_is_bounded(rule, levels, monkeypatch):
    """Nothing made on the way is larger than a piece, but the results."""

    class Largest(TorchDispatchMode):
        """The most elements of any tensor that an operation made, views left out, and how often it is as large as x."""

        def __init__(self) -> None:
            super().__init__()
            self.sizes: list[tuple[int, int]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            known = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in known:
                self.sizes.append((out.numel(), out.untyped_storage().nbytes()))
            return out

    piece, x = 2048, normal(256, 128, seed=20)
    monkeypatch.setattr(codec, "PIECE", piece)
    with Largest() as seen:
        p = pack(x, rule, levels, torch.Generator().manual_seed(4))
    results = [p.codes.numel(), p.block_scale.numel()]
    scratch = [n for n, _ in seen.sizes if n not in results and n > piece]
    assert len(seen.sizes) > 50
    assert scratch == []
    with Largest() as seen:
        unpack(p)
    assert [n for n, _ in seen.sizes if n > piece] == [x.numel()]  # the result
    assert max(size for n, size in seen.sizes if n != x.numel()) <= piece * 4


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rule": "fallback"}, "rule 'fallback'.*ct, torchao, native, nearest, stochastic"),
        ({"levels": "block"}, "levels 'block'.*single, tensor, row"),
        ({"rule": "ct"}, "'ct' always has"),
        ({"rule": "native", "levels": "tensor"}, "'native' has no"),
        ({"rule": "native", "levels": "row"}, "'native' has no"),
        ({"rule": "nearest", "global_scale": torch.tensor(1.0)}, "global_scale needs"),
    ],
)
def test_pack_refuses(options, says):
    with pytest.raises(ValueError, match=says):
        pack(torch.ones(1, 16), **options)


def test_pack_refuses_a_scalar():
    with pytest.raises(ValueError, match="scalar"):
        pack(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": torch.zeros(2, 9, dtype=torch.uint8)}, r"codes .*\[2, 9\].*\[2, 16\]"),
        ({"codes": torch.zeros(2, 16, dtype=torch.int8)}, "codes are torch.int8"),
        ({"block_scale": torch.zeros(2, 2, dtype=torch.uint8)}, "block_scale is torch.uint8"),
        ({"block_scale": torch.zeros(2, 3).to(torch.float8_e4m3fn)}, r"block_scale .*\[2, 3\].*\[2, 2\]"),
        ({"global_scale": torch.ones(2)}, r"global_scale .*\[2\].*\[2, 1\]"),
        ({"global_scale": torch.ones((), dtype=torch.float64)}, "global_scale is torch.float64"),
        ({"shape": (2, 48)}, r"shape \[2, 48\]"),
        ({"shape": ()}, "scalar"),
        ({"divide": True}, "divide=True"),
    ],
)
def test_packed_tensor_refuses(change, says):
    """Parts that do not fit, each named."""
    good = {
        "codes": torch.zeros(2, 16, dtype=torch.uint8),
        "block_scale": torch.zeros(2, 2).to(torch.float8_e4m3fn),
        "global_scale": None,
        "shape": (2, 32),
    }
    PackedTensor(**good)
    with pytest.raises(ValueError, match=says):
        PackedTensor(**{**good, **change})
