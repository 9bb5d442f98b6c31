"""What a checkpoint holds, told without loading it."""

import pytest
import torch
from safetensors.torch import save_file

from fp4lab.checkpoint import open_weights, save_dat, write_dat
from fp4lab.checkpoint.entries import entries
from fp4lab.errors import UserError
from fp4lab.nvfp4 import pack


def test_a_dat_files_entries(tmp_path):
    path = tmp_path / "m.dat"
    packed = pack(torch.randn(8, 32))
    save_dat(path, {"a.weight": packed, "norm.weight": torch.ones(4, dtype=torch.float16)})
    codes, scale, norm = entries(path)
    assert (codes.key, codes.pair, codes.shape, codes.nbytes) == ("a.weight.qdata", "a.weight.scale", (8, 16), 128)
    bytes_ = packed.block_scale.view(torch.uint8)
    assert (scale.pair, scale.scale_min, scale.scale_max) == ("a.weight.qdata", int(bytes_.min()), int(bytes_.max()))
    assert (norm.pair, norm.scale_min, norm.type) == (None, None, "5 float16")
    assert not any(e.refused for e in (codes, scale, norm))


def test_what_would_be_refused_is_told_and_is_refused(tmp_path):
    path = tmp_path / "m.dat"
    parts = [("a.qdata", torch.zeros(8, 16, dtype=torch.uint8), 100), ("b", torch.ones(3), None)]
    write_dat(path, parts)
    alone, fine = entries(path)
    assert ".scale entry is missing" in alone.refused and fine.refused is None
    with pytest.raises(UserError, match="scale entry is missing"):
        open_weights("dat", path)


def test_a_folders_entries(tmp_path):
    save_file({"x": torch.ones(2, 3, dtype=torch.bfloat16), "y": torch.ones(4, dtype=torch.int8)}, tmp_path / "m.safetensors")
    found = {e.key: e for e in entries(tmp_path)}
    assert (found["x"].type, found["x"].shape, found["x"].nbytes, found["x"].refused) == ("BF16", (2, 3), 12, None)
    assert found["y"].nbytes == 4 and "I8" in found["y"].refused


def test_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        list(entries(tmp_path / "none"))
