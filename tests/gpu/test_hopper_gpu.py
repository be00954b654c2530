"""The Hopper kernels on the device: every mask with every score change, against float64, always the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.helpers import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]
pytest.importorskip("triton")
from tests import test_attend as interpreted  # noqa: E402

SHAPES = [(512, 512), (300, 300), (77, 1000), (1, 200), (1500, 700)]
TURN = itertools.cycle(
    itertools.product([(64, 64), (128, 128)], [(4, 2), (3, 1)], SHAPES, [torch.bfloat16, torch.float16])
)
CASES = [
    (mask, change, *next(TURN))
    for mask, change in itertools.product(interpreted.MASK_SPECS, interpreted.SCORE_CHANGES)
]


@pytest.mark.parametrize(("mask", "change", "dims", "heads", "shape", "dtype"), CASES)
def test_forward(mask: str, change: str, dims: Any, heads: Any, shape: Any, dtype: torch.dtype) -> None:
    from kp_compiler.lowering.triton import attention, hopper

    with torch.device("cuda"):
        one = interpreted.case(mask, change, heads, shape, dims, dtype)
        listed = mask in interpreted.LISTED
        lists = interpreted.lists(one.keep(), interpreted.BLOCK) if listed else []
        site = attention.Site(
            one.spec,
            one.q,
            one.k,
            one.v,
            one.operands,
            one.scalars,
            block=interpreted.BLOCK if listed else None,
        )
        assert hopper.takes(site)
        outs = [torch.full((*one.q.shape[:3], dims[1]), float("nan"), dtype=dtype) for _ in range(3)]
        given = attention.Lists(*lists[:4]) if listed else None
        lses = [hopper.forward(site, given, out) for out in outs]
        weights, lse_weights = torch.zeros(outs[0].shape), torch.zeros(lses[0].shape)
        want = interpreted.exact(one, weights, lse_weights)
    alive = torch.where(lses[0] == float("-inf"), 0.0, lses[0])
    assert relative_error(outs[0], want[0]) < 1e-2
    assert relative_error(alive, want[1]) < 1e-4
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert all(torch.equal(lses[0], lse) for lse in lses[1:])


def test_going_on_from_other_keys() -> None:
    from kp_compiler.lowering.triton import attention, hopper

    with torch.device("cuda"):
        one = interpreted.case("full", "plain", (4, 2), (300, 700), (128, 128), torch.bfloat16)
        q, k, v = one.q, one.k, one.v
        first, second = (attention.Site(one.spec, q, k[:, :, part], v[:, :, part], (), ())
                         for part in (slice(0, 256), slice(256, 700)))  # fmt: skip
        earlier, out = (torch.empty(2, 4, 300, 128)[: q.shape[0]].to(q.dtype) for _ in range(2))
        start = hopper.forward(first, None, earlier)
        lse = hopper.forward(second, None, out, (earlier, start))
        weights = torch.zeros(out.shape), torch.zeros(lse.shape)
        want = interpreted.exact(one, *weights)
    assert relative_error(out, want[0]) < 1e-2
    assert relative_error(lse, want[1]) < 1e-4
