"""A sequence that two GPUs share, over NCCL: errors against float64, beside those of one kernel; one of them
is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from kp_compiler.lowering import reference, ring
from kp_compiler.lowering.context import readers
from kp_compiler.lowering.context import ring as rings
from kp_compiler.lowering.context.layout import Layout
from kp_compiler.lowering.context.schedules import SCHEDULES
from kp_compiler.sharding import ranks_of
from kp_compiler.specs import AttentionSpec
from tests.distributed import lost
from tests.distributed.test_shared_inference import calls
from tests.gpu.test_context_gpu import PER_RANK, alone_on
from tests.helpers import relative_error
from tests.test_context import MASKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SIZE, LENGTH, WIDTH = 2, 2048, 128
CASES = [
    (schedule, name, kind, heads, rows)
    for schedule in SCHEDULES
    if schedule != "hybrid"  # of two ranks there is no grid
    for name, kind, heads, rows in (
        ("causal", "zigzag", (8, 2), 2**12), ("documents", "zigzag", (8, 8), 2**20),
        ("window", "contiguous", (8, 4), 2**12), ("full", "contiguous", (8, 1), 2**20),
        ("causal", "zigzag", (16, 1), 2**11),
    )
]  # fmt: skip


def _on_rank(rank: int, file: str, out: str) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{file}", rank=rank, world_size=SIZE)
    ranks = ranks_of(dist.group.WORLD)
    found = {}
    for number, (schedule, name, kind, heads, rows) in enumerate(CASES):
        rings.ROWS = rows  # some heads after the other, or all together
        readers.ROWS = 2**9  # several groups of readers of one key head
        mask, scalars = MASKS[name]
        spec, layout = AttentionSpec(WIDTH**-0.5, mask, dead_rows="zero"), Layout(kind, SIZE, LENGTH)  # type: ignore[arg-type]
        whole, documents = _inputs(number, heads)
        *leaves, grad = whole
        exact = [x.double().requires_grad_() for x in leaves]
        want = reference.attention_over(*exact, [documents], scalars, spec)
        wanted = [want.detach(), *torch.autograd.grad(want, exact, grad.double())]
        alone = alone_on(spec, [documents], scalars, leaves, grad)
        places = layout.positions(rank, "cuda")
        mine = [x.index_select(2, places).requires_grad_() for x in leaves]
        plan = ring.Plan.of(ranks, spec, schedule, kind).to_json()  # type: ignore[arg-type]
        got = ring.context_attention()(*mine, [documents], scalars, plan)[0]
        got = [got.detach(), *torch.autograd.grad(got, mine, grad.index_select(2, places))]
        found[f"{schedule} {name} {heads}"] = [
            tuple(relative_error(x, c.index_select(2, places)) for x in (a, b.index_select(2, places)))
            for a, b, c in zip(got, alone, wanted, strict=True)
        ]
    torch.save(found, f"{out}.{rank}")
    dist.barrier()
    dist.destroy_process_group()


def _inputs(seed: int, heads: tuple[int, int]) -> tuple[list[Tensor], Tensor]:
    """q, k, v and the gradient of out, by tokens, and numbers of documents: the same on all ranks."""
    generator = torch.Generator("cuda").manual_seed(seed)
    how: Any = {"device": "cuda", "generator": generator}
    sizes = (heads[0], heads[1], heads[1], heads[0])
    whole = [torch.randn(1, LENGTH, n, WIDTH, **how).bfloat16().transpose(1, 2) for n in sizes]
    return whole, (torch.rand(1, LENGTH, **how) < 0.005).cumsum(-1)


def test_errors(tmp_path: Path) -> None:
    """Of outputs and gradients of every schedule, on both ranks."""
    mp.spawn(_on_rank, (str(tmp_path / "store"), str(tmp_path / "found")), nprocs=SIZE, join=True)
    for rank in range(SIZE):
        for case, pairs in torch.load(tmp_path / f"found.{rank}").items():
            for what, (mine, one) in zip(("out", "dq", "dk", "dv"), pairs, strict=True):
                assert mine <= PER_RANK * one, (rank, case, what, mine, one)


@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_the_other_finishes_the_call(how: str, tmp_path: Path) -> None:
    """By itself: what waits on the device for the one that is gone ends."""
    seed, (found,) = calls(tmp_path, SIZE, "cuda", "shrink", how)
    with torch.no_grad():
        want = lost.Net()(lost.batch())
    assert found["members"] == [1 - seed % SIZE]
    assert found["seconds"] < lost.PATIENCE + 60
    for result in ("before", "result", "after"):
        assert relative_error(found[result], want) < 1e-4, (seed, result)


def test_the_other_is_told(tmp_path: Path) -> None:
    seed, (found,) = calls(tmp_path, SIZE, "cuda", "raise", "killed")
    assert "members" not in found and re.search(r"rank \d of 2 waited for ", found["told"]), (seed, found)
