"""Does CUDA start here? Asked in a process of its own, because a failed start cannot be tried again in the same one."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROBE = """
import json, torch
answer = {"built": torch.version.cuda, "devices": [], "error": ""}
try:
    torch.cuda.init()
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        torch.zeros(1, device=f"cuda:{i}")
        answer["devices"].append([p.name, p.total_memory, bool(getattr(p, "is_integrated", False))])
except (RuntimeError, AssertionError) as e:
    answer["error"] = str(e)
print(json.dumps(answer))
"""
_DRIVER = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/nvhost-gpu"))
_SIGNS = {
    "out of memory": "other processes hold the GPU's memory: a context could not be made; the lines under gpu name them",
    "no kernel image": "this torch has no kernels for this GPU: install a torch built for its architecture",
    "error 802": "the GPUs are not ready yet (error 802): on a machine with NVSwitch nvidia-fabricmanager must run",
    "error 803": "the driver and its libraries differ in version (error 803): reboot after an update, or rebuild the image",
    "error 999": "the driver is in a bad state (error 999): often after a suspend; reload nvidia_uvm or reboot",
}


@dataclass(frozen=True)
class CudaCheck:
    """`level` is ok or warn: a run on the CPU needs no CUDA."""

    level: str
    text: str


def check_cuda(timeout_s: float = 60.0) -> CudaCheck:
    """Initialises CUDA and touches every device in a child process. Seconds: it imports torch."""
    try:
        done = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return CudaCheck("warn", f"CUDA did not start within {timeout_s:g} s; a driver that hangs needs a reboot")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return CudaCheck("warn", f"the check itself ended badly: {last}")
    return verdict(json.loads(done.stdout.strip().splitlines()[-1]), any(path.exists() for path in _DRIVER))


def verdict(answer: dict[str, Any], driver_present: bool) -> CudaCheck:
    """What the child's `answer` (built, devices, error) amounts to."""
    text = diagnose(answer["error"], answer["built"] is not None, driver_present, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if not answer["devices"]:
        return CudaCheck("warn" if driver_present else "ok", text)
    devices = "; ".join(
        f"{name}, {total / (1 << 30):.1f} GiB" + (", one memory with the CPU" if unified else "")
        for name, total, unified in answer["devices"]
    )
    if answer["error"]:
        return CudaCheck("warn", f"CUDA {answer['built']}: {devices}; but not the device after: {text}")
    return CudaCheck("ok", f"CUDA {answer['built']}: {devices}")


def diagnose(error: str, built_for_cuda: bool, driver_present: bool, visible: str | None) -> str:
    """What stands in the way of CUDA, and what to do, from torch's own message and what the system shows.

    `visible` is CUDA_VISIBLE_DEVICES. Error numbers are those of cudaError_t in the CUDA runtime's documentation.
    """
    said = error.lower()
    if not built_for_cuda:
        advice = "install the CUDA build of the same version to use the GPU" if driver_present else "runs use the CPU"
        return f"this torch is the CPU build; {advice}"
    if visible is not None and visible.strip() in ("", "-1"):
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides every GPU; unset it"
    if "too old" in said or "insufficient" in said:
        return f"the driver is older than this torch needs: update it, or install a torch for an older CUDA ({error})"
    if re.search(r"\berror 304\b", said) or "os call failed" in said or "operating system" in said:
        return (
            "CUDA error 304, an operating system call failed: the device nodes /dev/nvidia* are missing or may not be opened; "
            "in a container pass the GPU through (--gpus all) and look at the nodes' permissions"
        )
    if "no cuda-capable device" in said or "no cuda gpus" in said:
        return "the driver sees no GPU" + ("" if driver_present else ", or is not loaded") + "; try nvidia-smi"
    if "no nvidia driver" in said or not driver_present:
        return "no NVIDIA driver is loaded: runs use the CPU"
    for sign, meaning in _SIGNS.items():
        if sign in said:
            return meaning
    return f"CUDA does not start: {error.splitlines()[0] if error else 'no reason given'}"
