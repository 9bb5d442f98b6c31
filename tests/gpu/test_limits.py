"""torch's own limit and its snapshot: an ordinary error, and a file that tells who held what."""

import gc
import pickle

import pytest
import torch

from fp4lab.events import File
from fp4lab.tasks.limits import SNAPSHOT, soft_limit

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")


def test_a_breach_is_an_error_with_a_snapshot(tmp_path):
    gc.collect()
    torch.cuda.empty_cache()
    limit = 1.0 + torch.cuda.memory_reserved() / 2**30  # beside what graphs of other tests keep
    config = {"device": "cuda", "guard": {"limit_gb": limit, "snapshot": True}, "out_dir": str(tmp_path)}
    events, held = [], []
    try:
        with pytest.raises(torch.OutOfMemoryError), soft_limit(config, events.append):
            while True:
                held.append(torch.empty(64 << 20, dtype=torch.uint8, device="cuda"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert 12 <= len(held) <= 16  # 1 GiB in all
    (file,) = events
    assert isinstance(file, File) and file.role == "snapshot" and file.bytes > 0
    with open(tmp_path / SNAPSHOT, "rb") as f:  # our own file
        assert pickle.load(f)["segments"]
