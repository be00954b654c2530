"""Compile the Hopper kernels for sm90, without a GPU: `python -m tests.compile_hopper`. Prints registers that
were spilled to local memory, instructions that store and load them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kp_compiler.lowering.into import padded
from kp_compiler.lowering.triton.attention import Site, Tile
from kp_compiler.lowering.triton.hopper_backward_source import backward_parameters, backward_source, dq_part
from kp_compiler.lowering.triton.hopper_source import hopper_parameters, hopper_source
from kp_compiler.lowering.triton.hopper_text import ROWS
from kp_compiler.lowering.triton.text import compiled
from kp_compiler.specs import AttentionSpec, MaskSpec

TARGET = GPUTarget("cuda", 90, 32)
LENGTH, HEADS, KV_HEADS = 8192, 32, 8


class Driver:
    """In place of a device's, for the compiler to ask."""

    def get_current_target(self) -> GPUTarget:
        return TARGET


def descriptor(rows: int, columns: int, dtype: Any = gl.bfloat16) -> str:
    block = [1, 1, rows, columns]
    name = "bf16" if dtype == gl.bfloat16 else "fp32"
    return f"tensordesc<{name}{block},{gl.NVMMASharedLayout.get_default_for(block, dtype)!r}>"


def spilled(text: str, function: str, names: tuple[str, ...], types: dict[str, str]) -> int:
    """Loads and stores of local memory in the machine code of a kernel."""
    signature = {name: types.get(name, "i32") for name in names}
    aligned = [
        i for i, n in enumerate(names) if types.get(n, "").startswith("*") or n[-2:] in ("_b", "_h", "_s")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource(compiled(function, text), signature, {}, attributes)
    found = triton.compile(source, target=TARGET, options={"num_warps": 4})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.asm["cubin"])
        listing = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    assert "HGMMA" in listing
    return len(re.findall(r"\b(?:LDL|STL)\b", listing))


def site(width: int) -> Site:
    def tensor(heads: int) -> torch.Tensor:
        return torch.empty(1, LENGTH, heads, width, dtype=torch.bfloat16, device="meta").transpose(1, 2)

    spec = AttentionSpec(width**-0.5, MaskSpec("causal", "k <= q"))
    return Site(spec, tensor(HEADS), tensor(KV_HEADS), tensor(KV_HEADS), (), ())


def forward(width: int, tile: Tile, *, unfinished: bool = False) -> int:
    """`unfinished`: from a result with a tail to another one."""
    here = site(width)
    layout = here.layout("forward", tile, **dict.fromkeys(("start", "continues", "unfinished"), unfinished))
    types = {"q": descriptor(ROWS, padded(width)), "out": descriptor(ROWS, padded(width))}
    types |= {name: descriptor(tile.inner, padded(width)) for name in "kv"}
    types |= {"lse": "*fp32", "taken": "*i32", "start_out": "*bf16", "start_lse": "*fp32", "tail": "*u8"}
    names = hopper_parameters(here.spec, layout)
    return spilled(hopper_source(here.spec, layout), "kp_attention_hopper", names, types)


def backward(width: int, tile: Tile, *, apart: bool = False) -> int:
    here = site(width)
    layout = here.layout("dkdv", tile, apart=apart)
    types = {name: descriptor(tile.inner, padded(width)) for name in ("q", "dout")}
    types |= {name: descriptor(ROWS, padded(width)) for name in "kv"}
    types |= {"dq": descriptor(*dq_part(layout), gl.float32), "lse": "*fp32", "delta": "*fp32"}
    types |= dict.fromkeys(("dk", "dv"), "*fp32" if apart else "*bf16")
    names = backward_parameters(here.spec, layout)
    return spilled(backward_source(here.spec, layout), "kp_attention_hopper_backward", names, types)


if __name__ == "__main__":
    triton.runtime.driver.set_active(Driver())
    print("forward 64", forward(64, Tile(192, 128, 4, 3)))
    print("forward 128", forward(128, Tile(128, 128, 4, 2)))
    print("forward 64, unfinished", forward(64, Tile(192, 128, 4, 3), unfinished=True))
    print("forward 128, unfinished", forward(128, Tile(128, 128, 4, 2), unfinished=True))
    print("forward 256, unfinished", forward(256, Tile(128, 64, 4, 2), unfinished=True))
    print("backward 128", backward(128, Tile(128, 64, 4, 2)))
    print("backward 128, apart", backward(128, Tile(128, 64, 4, 2), apart=True))
