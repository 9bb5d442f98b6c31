"""What a failed start of CUDA is told as."""

import pytest

from fp4lab.telemetry.cuda import CudaCheck, check_cuda, diagnose, verdict


@pytest.mark.parametrize(
    ("error", "built", "driver", "visible", "words"),
    [
        ("Torch not compiled with CUDA enabled", False, False, None, "CPU build; runs use the CPU"),
        ("Torch not compiled with CUDA enabled", False, True, None, "install the CUDA build"),
        ("No CUDA GPUs are available", True, True, "", "hides every GPU"),
        ("No CUDA GPUs are available", True, True, "-1", "hides every GPU"),
        ("The NVIDIA driver on your system is too old (found version 11040).", True, True, None, "driver is older"),
        ("cudaGetDeviceCount() Error 304: OS call failed or operation not supported", True, True, None, "/dev/nvidia*"),
        ("No CUDA GPUs are available", True, True, "0", "sees no GPU; try nvidia-smi"),
        ("Found no NVIDIA driver on your system.", True, False, None, "no NVIDIA driver is loaded"),
        ("CUDA error: out of memory\nmore", True, True, None, "other processes hold the GPU's memory"),
        ("CUDA error: no kernel image is available for execution on the device", True, True, None, "its architecture"),
        ("Error 802: system not yet initialized", True, True, None, "fabricmanager"),
        ("Error 803: system has unsupported display driver / cuda driver combination", True, True, None, "reboot"),
        ("CUDA error: launch failed\nmore", True, True, None, "CUDA does not start: CUDA error: launch failed"),
        ("no reason with 13040 in it", True, True, None, "CUDA does not start: no reason"),
    ],
)
def test_diagnosis(error, built, driver, visible, words):
    assert words in diagnose(error, built, driver, visible)


def test_a_gpu_that_works_and_one_that_does_not(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    h200, gb10 = ["NVIDIA H200", 139 << 30, False], ["NVIDIA GB10", 120 << 30, True]
    assert verdict({"built": "13.0", "devices": [h200], "error": ""}, True) == CudaCheck(
        "ok", "CUDA 13.0: NVIDIA H200, 139.0 GiB"
    )
    assert verdict({"built": "13.0", "devices": [gb10], "error": ""}, True).text.endswith("one memory with the CPU")
    half = verdict({"built": "13.0", "devices": [h200], "error": "CUDA error: out of memory"}, True)
    assert half.level == "warn" and "NVIDIA H200" in half.text and "hold the GPU's memory" in half.text
    none = {"built": None, "devices": [], "error": "Torch not compiled with CUDA enabled"}
    assert (verdict(none, False).level, verdict(none, True).level) == ("ok", "warn")


def test_the_check_of_this_machine():
    found = check_cuda()
    assert found.level in ("ok", "warn") and found.text
    assert check_cuda(timeout_s=0.01).text.startswith("CUDA did not start within")
