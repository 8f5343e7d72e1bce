"""What the GPU at hand is to software."""

from typing import Literal

import torch


def gpu_at_hand() -> tuple[Literal["cuda", "rocm"], str]:
    """The kind of the GPU at hand, and its capability or architecture: "9.0" or "gfx942".

    Raises:
        RuntimeError: there is none (torch's own words).
    """
    if torch.version.hip:
        name: str = torch.cuda.get_device_properties(0).gcnArchName
        return "rocm", name.split(":")[0]
    major, minor = torch.cuda.get_device_capability()
    return "cuda", f"{major}.{minor}"


def architecture_name(device: str, capability: str) -> str:
    """What kernels are compiled for: "sm_90" or "gfx942"; empty where that is no GPU."""
    if device == "cuda":
        return f"sm_{capability.replace('.', '')}"
    return capability if device == "rocm" else ""


def this_architecture() -> str:
    """The architecture of the GPU at hand, such as "sm_90" or "gfx942"."""
    return architecture_name(*gpu_at_hand())
