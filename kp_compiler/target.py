"""What the hardware and the installed libraries can do, detected or assumed.

The only module that asks `torch.cuda` or looks for optional packages. Passes and lowering consult a Target,
so that `plan` can decide for a machine that is not there.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from kp_compiler.errors import KPConfigError


@dataclass(frozen=True)
class Target:
    """A device kind and what is usable on it."""

    device: str  # "cuda" or "cpu"
    sm: int = 0  # compute capability times ten: 90 for Hopper
    name: str = ""
    cudnn: int = 0  # cuDNN's version number, 91900 for 9.19
    has_flash: bool = False  # ATen was built with FlashAttention-2
    has_triton: bool = False  # on a CPU: Triton is there and in its interpreter (TRITON_INTERPRET=1)
    has_fa4: bool = False
    has_te: bool = False
    shared_memory: int = 227 * 1024  # bytes that a kernel's block may have: Hopper's
    multiprocessors: int = 132
    assumed: bool = False
    reference: bool = False  # lower everything onto the reference kernels (cpu_rewrites)

    def __str__(self) -> str:
        if self.device == "cpu":
            return "cpu, reference kernels" if self.reference else "cpu"
        how = "assumed" if self.assumed else self.name
        return f"cuda:sm{self.sm} ({how})"


def detect(device: torch.device | str, *, reference: bool = False) -> Target:
    """The target that tensors on `device` run on."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available():
        return Target(device="cpu", name="cpu", reference=reference, has_triton=interprets_triton())
    return _detect_cuda(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _detect_cuda(index: int) -> Target:
    major, minor = torch.cuda.get_device_capability(index)
    properties = torch.cuda.get_device_properties(index)
    return Target(
        device="cuda",
        sm=10 * major + minor,
        name=torch.cuda.get_device_name(index),
        cudnn=_cudnn_version(),
        has_flash=torch.backends.cuda.is_flash_attention_available(),
        has_triton=has_package("triton"),
        has_fa4=has_fa4(),
        has_te=has_te(),
        shared_memory=properties.shared_memory_per_block_optin,
        multiprocessors=properties.multi_processor_count,
    )


def _cudnn_version() -> int:
    """cuDNN's version, 0 where PyTorch can't use the one that this process has loaded (another library may
    have brought its own)."""
    try:
        return torch.backends.cudnn.version() or 0
    except RuntimeError:
        return 0


def parse(text: str) -> Target:
    """A target from a name: "cuda:sm90", "cuda:sm80", "cpu", or "auto" for this machine."""
    if text == "auto":
        return detect("cuda" if torch.cuda.is_available() else "cpu")
    if text == "cpu":
        return Target(device="cpu", name="cpu", assumed=True)
    match = re.fullmatch(r"cuda:sm(\d{2,3})a?", text)
    if match is None:
        raise KPConfigError(
            f"target: got {text!r}, expected 'auto', 'cpu' or 'cuda:smNN' such as 'cuda:sm90'"
        )
    sm = int(match[1])
    return Target(
        device="cuda", sm=sm, cudnn=91900, has_flash=sm >= 80, has_triton=True, has_fa4=False, has_te=False,
        assumed=True,
    )  # fmt: skip


@cache
def has_package(name: str) -> bool:
    """Whether `name` could be imported. Looks, does not import."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def interprets_triton() -> bool:
    """Triton's kernels run on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_package("triton")


def has_fa4() -> bool:
    """FlashAttention-4's CuTe kernels (package flash-attn-4) are importable."""
    return has_package("flash_attn") and has_package("flash_attn.cute") and has_package("cutlass")


@cache
def has_te() -> bool:
    """Transformer Engine (package transformer-engine) is there from version 2.11 on, with its extension for
    torch. That is no module before the package, which loads CUDA's libraries, is imported: its file is looked
    for where the package looks."""
    try:
        found = importlib.util.find_spec("transformer_engine")
        version = re.match(r"(\d+)\.(\d+)", importlib.metadata.version("transformer-engine"))
    except (ImportError, ValueError):
        return False
    if found is None or version is None or (int(version[1]), int(version[2])) < (2, 11):
        return False
    package = [Path(path) for path in found.submodule_search_locations or ()]
    package.append(Path(sysconfig.get_path("purelib"), "transformer_engine"))
    places = [place for path in package for place in (path.parent, path, path / "wheel_lib")]
    return any(next(place.glob("transformer_engine_torch*.so"), None) for place in places)


@cache
def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor takes, the first of its list that answers, where that one works."""
    from torch._inductor import config as inductor_config

    wanted = inductor_config.cpp.cxx
    names = wanted if isinstance(wanted, list | tuple) else (wanted,)
    paths = (shutil.which(str(name)) for name in names if name)
    path = next((p for p in paths if p is not None and _succeeds([p, "--version"])), None)
    if path is None:
        return None
    line = b'#include <cmath>\nextern "C" double probe(double x) { return std::exp(x); }\n'
    with tempfile.TemporaryDirectory() as folder:
        library = os.path.join(folder, "probe.so")
        works = _succeeds(
            [path, "-shared", "-fPIC", "-x", "c++", "-", "-o", library], line
        ) and os.path.exists(library)
    return path if works else None


def _succeeds(command: list[str], text: bytes = b"") -> bool:
    try:
        subprocess.run(command, input=text, capture_output=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return False
    return True


def may_shard_parameters() -> bool:
    """FSDP is loaded beside a process group: parameters may be gathered into memory whose version counter
    stands still."""
    import torch.distributed as dist

    return "torch.distributed.fsdp" in sys.modules and dist.is_available() and dist.is_initialized()


def is_available() -> bool:
    """A CUDA device is usable in this process."""
    return torch.cuda.is_available()
