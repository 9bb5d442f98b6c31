"""What a failed start of CUDA is told as."""

import pytest

from fp4lab.telemetry.cuda import check_cuda, diagnose


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
        ("CUDA error: out of memory\nmore", True, True, None, "CUDA does not start: CUDA error: out of memory"),
    ],
)
def test_diagnosis(error, built, driver, visible, words):
    assert words in diagnose(error, built, driver, visible)


def test_the_check_of_this_machine():
    found = check_cuda()
    assert found.level in ("ok", "warn") and found.text
    assert check_cuda(timeout_s=0.01).text.startswith("CUDA did not start within")
