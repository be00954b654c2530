"""The Hopper kernels on the device: every mask with every score change, against float64, always the same."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from kp_compiler.lowering.attend import Plan, attend
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.into import Into, tail_of
from kp_compiler.specs import AttentionSpec, MaskSpec
from tests.covering import pairwise
from tests.helpers import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
        reason="needs a Hopper GPU",
    ),
]
pytest.importorskip("triton")
from tests import attend_cases as interpreted  # noqa: E402

SHAPES = [(512, 512), (300, 300), (77, 1000), (1, 200), (1500, 640)]
DIMS = [(64, 64), (128, 128), (96, 96), (256, 256), (192, 128), (40, 24), (128, 64)]
HEADS = [(4, 2), (3, 1), (2, 2)]
DTYPES = [torch.bfloat16, torch.float16]


def site_of(one: interpreted.Case) -> tuple[Any, Any, Any]:
    """What the kernels read, and lists of blocks by queries and by keys where the mask needs them."""
    from kp_compiler.lowering.triton import attention

    listed = one.spec.mask in interpreted.LISTED.values()
    lists = interpreted.lists(one.keep(), interpreted.BLOCK) if listed else []
    block = interpreted.BLOCK if listed else None
    site = attention.Site(one.spec, one.q, one.k, one.v, one.operands, one.scalars, block=block)
    by_query, by_key = (Lists(*lists[i : i + 4]) if listed else None for i in (0, 4))
    return site, by_query, by_key


def cases(dims: list[tuple[int, int]]) -> list[tuple[Any, ...]]:
    """Every mask with every score change, the rest beside them, pair by pair."""
    pairs = list(itertools.product(interpreted.MASK_SPECS, interpreted.SCORE_CHANGES))
    return pairwise(pairs, dims, HEADS, SHAPES, DTYPES)


@pytest.mark.parametrize(("mask", "change", "dims", "heads", "shape", "dtype"), cases(DIMS))
def test_forward(mask: str, change: str, dims: Any, heads: Any, shape: Any, dtype: torch.dtype) -> None:
    from kp_compiler.lowering.triton import hopper

    with torch.device("cuda"):
        one = interpreted.case(mask, change, heads, shape, dims, dtype)
        site, given, _ = site_of(one)
        assert hopper.takes(site)
        outs = [torch.full((*one.q.shape[:3], dims[1]), float("nan"), dtype=dtype) for _ in range(3)]
        lses = [hopper.forward(site, given, Into(out)) for out in outs]
        weights, lse_weights = torch.zeros(outs[0].shape), torch.zeros(lses[0].shape)
        want = interpreted.exact(one, weights, lse_weights)
    alive = torch.where(lses[0] == float("-inf"), 0.0, lses[0])
    assert relative_error(outs[0], want[0]) < 1e-2
    assert relative_error(alive, want[1]) < 1e-4
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert all(torch.equal(lses[0], lse) for lse in lses[1:])


@pytest.mark.parametrize(
    ("mask", "change", "dims", "heads", "shape", "dtype"), cases([d for d in DIMS if d[0] <= 128])
)
def test_gradients(mask: str, change: str, dims: Any, heads: Any, shape: Any, dtype: torch.dtype) -> None:
    """Of q, k and v; dk and dv are the same every time, dq up to the order of its sums."""
    from kp_compiler.lowering.triton import attention, hopper

    with torch.device("cuda"):
        one = interpreted.case(mask, change, heads, shape, dims, dtype)
        site, by_query, by_key = site_of(one)
        out, grad = (torch.empty(*one.q.shape[:3], dims[1], dtype=dtype) for _ in range(2))
        grads = [torch.empty_like(x) for x in (one.q, one.k, one.v)]
        grad.copy_(torch.randn(grad.shape))
        lse_grad = torch.randn(grad.shape[:3])
        lse = hopper.forward(site, by_query, Into(out))
        total = torch.full_like(grads[0], float("nan"), dtype=torch.float32)
        assert hopper.takes_backward(site, grad)
        found = []
        for _ in range(3):
            for x in grads:
                x.fill_(float("nan"))
            delta = attention.delta_of(grad, out, lse_grad, total)
            hopper.gradients(site, by_key, grad, lse, delta, total, *grads)
            found.append([x.clone() for x in grads])
        want = interpreted.exact(one, grad, lse_grad)[2:5]
    for index, theirs in enumerate(want):
        mine = [each[index] for each in found]
        assert relative_error(mine[0], theirs) < 1.2e-2 or (mine[0] - theirs).abs().max() < 1e-4
        assert all(relative_error(each, mine[0]) < (4e-3 if index == 0 else 1e-30) for each in mine[1:])


def test_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator takes these kernels, unless results must be the same bit by bit."""
    from kp_compiler.lowering.triton import hopper

    taken = []
    run = hopper.gradients
    monkeypatch.setattr(hopper, "gradients", lambda *args: (taken.append(1), run(*args)))
    leaves = [
        torch.randn(1, 2, 300, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    ]
    plan = Plan(AttentionSpec(0.125, MaskSpec("causal", "k <= q"))).to_json()
    grads = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            out = attend()(*leaves, [], [], [], None, None, None, plan)[0]
            grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
        finally:
            torch.use_deterministic_algorithms(False)
    assert len(taken) == 1
    assert all(relative_error(a, b) < 1e-2 for a, b in zip(*grads, strict=True))


def lists_of_each_head(block: tuple[int, int], shape: tuple[int, int], *, start: bool) -> list[float]:
    """Errors of out, lse and, where there is a kernel for them, dq, dk and dv: blocks at random for each
    head, lines without any, in the second half of the lines causal ones; going on from an earlier pass or
    not."""
    from kp_compiler.lowering.triton import attention, hopper

    one = interpreted.case("causal", "plain", (4, 2), shape, (64, 64), torch.float16)
    sizes = tuple(-(-size // unit) for size, unit in zip(shape, block, strict=True))
    chosen = torch.rand(1, 4, *sizes) > 0.5
    chosen[:, 1] = chosen[:, :, 0] = False
    chosen[:, :, :, -1] = False
    partial = chosen & (torch.arange(sizes[0])[:, None] >= sizes[0] // 2)
    whole = chosen & ~partial
    spread = [
        x.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[..., : shape[0], : shape[1]]
        for x in (partial, whole)
    ]
    keep = (spread[0] & one.keep()) | spread[1]
    spec = dataclasses.replace(one.spec, mask=MaskSpec("tensor", "", tensors=(0,)))
    grad, lse_grad = torch.randn(one.q.shape, dtype=one.q.dtype), torch.randn(one.q.shape[:3])
    want = interpreted.exact(dataclasses.replace(one, spec=spec, operands=[keep]), grad, lse_grad)
    site = attention.Site(one.spec, one.q, one.k, one.v, (), (), block=block)
    out = torch.full(one.q.shape, float("nan"), dtype=one.q.dtype)
    before = (torch.randn(out.shape).to(out.dtype), torch.randn(out.shape[:3])) if start else None
    assert hopper.takes(site)
    lse = hopper.forward(site, Lists.of(partial, whole), Into(out, before))
    dead = ~keep.any(-1)
    exact_lse = want[1].masked_fill(dead, float("-inf"))
    if before is not None:
        both = torch.logaddexp(exact_lse, before[1].double())
        shares = (torch.exp(x.double() - both).unsqueeze(-1) for x in (exact_lse, before[1]))
        want[0] = sum(share * x.double() for share, x in zip(shares, (want[0], before[0]), strict=True))
        exact_lse = both
    assert torch.equal(torch.isinf(lse), torch.isinf(exact_lse))
    found, exact = [out, lse.nan_to_num(neginf=0.0)], [want[0], exact_lse.nan_to_num(neginf=0.0)]
    if before is None and hopper.takes_backward(site, grad):
        grads = [torch.full_like(x, float("nan")) for x in (one.q, one.k, one.v)]
        total = torch.full_like(grads[0], float("nan"), dtype=torch.float32)
        delta = attention.delta_of(grad, out, lse_grad, total)
        hopper.gradients(site, Lists.of(partial.mT, whole.mT), grad, lse, delta, total, *grads)
        found, exact = found + grads, exact + want[2:5]
    return [relative_error(mine, theirs) for mine, theirs in zip(found, exact, strict=True)]


LISTED_CASES = [
    (block, shape, start)
    for block, shape in itertools.product([(128, 128), (128, 64), (256, 128)], [(512, 512), (300, 330)])
    for start in (False, True)
]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("block", "shape", "start"), LISTED_CASES)
def test_lists_of_each_head(
    monkeypatch: pytest.MonkeyPatch, block: tuple[int, int], shape: tuple[int, int], start: bool, apart: bool
) -> None:
    from kp_compiler.lowering.triton import hopper

    monkeypatch.setattr(hopper, "_long_columns", lambda site, lists: apart)
    with torch.device("cuda"):
        assert max(lists_of_each_head(block, shape, start=start)) < 4e-3


def test_going_on_from_other_keys() -> None:
    from kp_compiler.lowering.triton import attention, hopper

    with torch.device("cuda"):
        one = interpreted.case("full", "plain", (4, 2), (300, 700), (128, 128), torch.bfloat16)
        q, k, v = one.q, one.k, one.v
        first, second = (attention.Site(one.spec, q, k[:, :, part], v[:, :, part], (), ())
                         for part in (slice(0, 256), slice(256, 700)))  # fmt: skip
        earlier, out = (torch.empty(2, 4, 300, 128)[: q.shape[0]].to(q.dtype) for _ in range(2))
        start = hopper.forward(first, None, Into(earlier))
        lse = hopper.forward(second, None, Into(out, (earlier, start)))
        weights = torch.zeros(out.shape), torch.zeros(lse.shape)
        want = interpreted.exact(one, *weights)
    assert relative_error(out, want[0]) < 1e-2
    assert relative_error(lse, want[1]) < 1e-4


TAIL_DIMS = [(128, 128), (64, 64), (96, 80), (256, 192)]


def with_a_tail(
    shape: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, *, portable: bool = False
) -> tuple[float, float, float]:
    """Relative errors of a result that four sets of keys are taken into, one of them empty for most queries,
    of one pass over all, and of the log-sum-exp. `portable`: the portable kernel takes in some of them."""
    from kp_compiler.lowering.triton import attention, hopper

    kernels = itertools.cycle([hopper, attention] if portable else [hopper])
    one = interpreted.case("causal", "plain", (4, 2), shape, dims, dtype)
    mask = MaskSpec("pointwise", "k + n0 <= q", scalars=1)
    spec = dataclasses.replace(one.spec, mask=mask)
    out, whole = (torch.full((*one.q.shape[:3], dims[1]), float("nan"), dtype=dtype) for _ in range(2))
    tail, start = tail_of(out).fill_(255), None
    ends = [0, shape[1] // 4, shape[1] // 3, shape[1] - 20, shape[1]]
    for begin, end in itertools.pairwise(ends):
        keys, values = one.k[:, :, begin:end].contiguous(), one.v[:, :, begin:end].contiguous()
        site = attention.Site(spec, one.q, keys, values, (), (begin,))
        lse = next(kernels).forward(site, None, Into(out, start, tail, last=end == ends[-1]))
        start = (out, lse)
    hopper.forward(attention.Site(spec, one.q, one.k, one.v, (), (0,)), None, Into(whole))
    exact = dataclasses.replace(one, spec=spec, scalars=(0,))
    want = interpreted.exact(exact, torch.zeros(out.shape), torch.zeros(lse.shape))
    return relative_error(out, want[0]), relative_error(whole, want[0]), relative_error(lse, want[1])


@pytest.mark.parametrize("dims", TAIL_DIMS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("shape", [(300, 700), (512, 1024)])
def test_results_with_a_tail(
    shape: tuple[int, int], dims: tuple[int, int], dtype: torch.dtype, portable: bool
) -> None:
    with torch.device("cuda"):
        mine, one, lses = with_a_tail(shape, dims, dtype, portable=portable)
    assert mine <= 1.1 * one and lses < 1e-4


def test_launched_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton's looking at arguments that are alike, with the tensors of now."""
    from kp_compiler.lowering.triton import attention, hopper, launches

    monkeypatch.setattr(hopper, "_launches", launches.Launches())
    compiled = attention.compiled
    looked: list[str] = []

    def counted(name: str, text: str) -> Any:
        looked.append(name)
        return compiled(name, text)

    monkeypatch.setattr(attention, "compiled", counted)
    for heads, rows in ((4, 300), (4, 300), (2, 300), (4, 300), (4, 301)):
        with torch.device("cuda"):
            one = interpreted.case("causal", "plain", (heads, 2), (rows, rows), (128, 128), torch.bfloat16)
            site, _, _ = site_of(one)
            grad = torch.randn_like(site.q)
            want = interpreted.exact(one, grad, torch.zeros(grad.shape[:3]))
            out, *mine = (torch.full_like(x, float("nan")) for x in (site.q, site.q, site.k, site.v))
            lse = hopper.forward(site, None, Into(out))
            total = torch.empty_like(site.q, dtype=torch.float32)
            delta = attention.delta_of(grad, out, None, total)
            hopper.gradients(site, None, grad, lse, delta, total, *mine)
            for got, exact in zip((out, *mine), (want[0], *want[2:5]), strict=True):
                assert relative_error(got, exact) < 2e-2
    assert looked == ["kp_attention_hopper", "kp_attention_hopper_backward"] * 3
