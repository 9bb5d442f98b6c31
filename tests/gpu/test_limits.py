"""torch's own limit and its snapshot: an ordinary error, and a file that tells who held what."""

import pickle

import pytest
import torch

from fp4lab.events import File
from fp4lab.tasks.limits import SNAPSHOT, soft_limit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_a_breach_is_an_error_with_a_snapshot(tmp_path):
    config = {"device": "cuda", "guard": {"limit_gb": 1.0, "snapshot": True}, "out_dir": str(tmp_path)}
    events, held = [], []
    with pytest.raises(torch.OutOfMemoryError), soft_limit(config, events.append):
        while True:
            held.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
    assert 12 <= len(held) <= 16  # 1 GiB in all
    (file,) = events
    assert isinstance(file, File) and file.role == "snapshot" and file.bytes > 0
    with open(tmp_path / SNAPSHOT, "rb") as f:  # our own file
        assert pickle.load(f)["segments"]
