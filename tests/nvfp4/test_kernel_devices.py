"""Which devices the kernels are for; what they compute is tested on one (tests/gpu)."""

import pytest
import torch

from fp4lab.nvfp4 import kernels


@pytest.mark.parametrize("has, said", [((8, 0), "compute capability 8.0 has no E4M3"), ((8, 9), None), ((12, 1), None)])
def test_a_device_without_what_a_kernel_needs_is_told(monkeypatch, has, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: has)
    kernels.too_old.cache_clear()
    found = kernels.too_old(torch.device("cuda"), (8, 9), "E4M3 conversions")
    kernels.too_old.cache_clear()
    assert found is None if said is None else said in (found or "")


def test_a_cpu_has_none():
    assert not kernels.available(torch.device("cpu"))
    assert "no GPU" in kernels.describe(torch.device("cpu"))
