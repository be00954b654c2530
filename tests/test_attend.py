"""kp's own attention kernels in Triton's interpreter: every mask with every score change, against float64."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import kp_compiler
from kp_compiler.lowering import reference
from kp_compiler.lowering.attend import Plan, add_gradients, attend, write
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.into import Into, joined, tail_of
from kp_compiler.specs import AttentionSpec, BiasSpec, MaskSpec
from tests.attend_cases import BLOCK, MASK_SPECS, case, covering, exact, lists, run
from tests.helpers import REFERENCE, relative_error, run_both
from tests.test_flex import MASKS, SCORES, inputs

pytest.importorskip("triton", reason="kp's kernels need Triton, here its interpreter")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on the device in tests/gpu")


@pytest.mark.parametrize(("mask", "change", "heads", "shape", "dims", "dtype"), covering())
def test_against_float64(
    mask: str, change: str, heads: tuple[int, int], shape: tuple[int, int], dims: tuple[int, int],
    dtype: torch.dtype,
) -> None:  # fmt: skip
    one = case(mask, change, heads, shape, dims, dtype)
    weights = torch.randn(*one.q.shape[:3], dims[1])
    lse_weights = torch.randn(one.q.shape[:3])
    bound = 4e-6 if dtype == torch.float32 else 4e-3
    got, want = run(one, weights, lse_weights), exact(one, weights, lse_weights)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.isfinite().all()
        slack = 3 if theirs.dim() == 1 else 1  # a sink's gradient is a sum over all rows, of either sign
        assert relative_error(mine, theirs) < bound * slack or (mine - theirs).abs().max() < bound * 1e-2


@pytest.mark.parametrize("change", ["plain", "bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("block", [(128, 128), (128, 64), (64, 64)])
def test_lists_of_each_head(block: tuple[int, int], dtype: torch.dtype, change: str) -> None:
    """Blocks chosen at random, another set for each head; causal inside them. Nothing outside them has a
    gradient, though the mask keeps it. Tiles are not larger than blocks."""
    one = case("causal", change, (4, 2), (200, 200), (64, 64), dtype)
    rows, columns = (-(-200 // unit) for unit in block)
    chosen = torch.rand(1, 4, rows, columns) > 0.4
    spread = chosen.repeat_interleave(block[0], 2).repeat_interleave(block[1], 3)[..., :200, :200]
    weights, lse_weights = torch.randn(1, 4, 200, 64), torch.zeros(1, 4, 200)
    mask, bias = MaskSpec("tensor", "", tensors=(0, 1)), [BiasSpec(2)] if change == "bias" else []
    spec = dataclasses.replace(one.spec, mask=mask, biases=tuple(bias))
    whole = dataclasses.replace(one, spec=spec, operands=[spread, one.keep(), *one.operands])
    want = exact(whole, weights, lse_weights)
    leaves = [x.detach().clone().requires_grad_() for x in one.inputs()]
    # all chosen blocks as partial ones: the causal mask is applied in each
    none = torch.zeros_like(chosen)
    partial = [*Lists.of(chosen, none).tensors(), *Lists.of(chosen.mT, none.mT).tensors()]
    plan = Plan(one.spec, block).to_json()
    out, _ = attend()(*leaves[:3], leaves[3:], [], partial, None, None, None, plan)
    (out * weights).sum().backward()
    for mine, theirs in zip([out.detach(), *(x.grad for x in leaves)], [want[0], *want[2:]], strict=True):
        assert relative_error(mine, theirs) < (4e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("sink", [False, True])
def test_going_on_from_other_keys(sink: bool) -> None:
    """Attention over the first keys, then over the rest from there: as over all at once, gradients too. A row
    that sees no key in one part is what the other says."""
    one = case("full", "sink" if sink else "plain", (4, 2), (70, 130), (64, 32), torch.float32)
    late = torch.arange(130) >= 60
    weights, lse_weights = torch.randn(1, 4, 70, 32), torch.randn(1, 4, 70)
    leaves = [x.detach().clone().requires_grad_() for x in one.inputs()]
    q, k, v = leaves[:3]
    plan, bare = Plan(one.spec), Plan(dataclasses.replace(one.spec, sink=None))
    start = attend()(q, k[:, :, ~late], v[:, :, ~late], [], [], [], None, None, None, bare.to_json())
    out, lse = attend()(
        q, k[:, :, late], v[:, :, late], leaves[3:], [], [], start[0], start[1], None, plan.to_json()
    )
    ((out * weights).sum() + (lse * lse_weights).sum()).backward()
    got = [out.detach(), lse.detach(), *(x.grad for x in leaves)]
    for mine, theirs in zip(got, exact(one, weights, lse_weights), strict=True):
        assert relative_error(mine, theirs) < 2e-6


def test_results_to_be_added_up() -> None:
    """Sixteen sets of keys one after the other are off no more than one, gradients in float32."""
    from kp_compiler.lowering.triton import attention

    q, k, v, grad = (torch.randn(1, h, n, 16).half() for h, n in ((4, 40), (2, 256), (2, 256), (4, 40)))
    spec = AttentionSpec(0.25)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = reference.attention_over(*leaves, [], [], spec)
    exact = torch.autograd.grad(want, leaves, grad.double())
    given = ([], [], [], Plan(spec))
    one, out = (torch.full_like(q, float("nan")) for _ in range(2))
    write(Into(one), q, k, v, *given)
    tail, start = tail_of(out).fill_(255), None
    spans = [slice(span, span + 16) for span in range(0, 256, 16)]
    for span in spans:
        into = Into(out, start, tail, last=span == spans[-1])
        lse = write(into, q, k[:, :, span], v[:, :, span], *given)
        if start is None:
            first = reference.attention_over(leaves[0], *(x[:, :, span] for x in leaves[1:]), [], [], spec)
            assert relative_error(joined(out, tail), first.detach()) < 5e-4
        start = (out, lse)
    assert relative_error(out, want.detach()) <= 1.1 * relative_error(one, want.detach())
    delta = attention.delta_of(grad, out, None)
    before = [torch.randn(x.shape) for x in (q, k, v)]
    found = [x.clone() for x in before]
    for span in spans:
        pair, sums = ([x[:, :, span] for x in some] for some in ((k, v), found[1:]))
        add_gradients((found[0], *sums), grad, q, *pair, *given, lse, delta)
    changes = [x - y for x, y in zip(found, before, strict=True)]
    changes[0] *= spec.scale
    assert all(relative_error(mine, theirs) < 1e-3 for mine, theirs in zip(changes, exact, strict=True))


def test_starting_from_nothing() -> None:
    """Rows that have seen nothing, before or now."""
    one = case("late rows", "plain", (2, 2), (70, 70), (64, 64), torch.float32)
    plan = Plan(one.spec).to_json()
    nothing = torch.zeros(2, 2, 70, 64), torch.full((2, 2, 70), float("-inf"))
    alone = attend()(one.q, one.k, one.v, [], [], [], None, None, None, plan)
    after = attend()(one.q, one.k, one.v, [], [], [], *nothing, None, plan)
    assert torch.equal(alone[0], after[0])
    assert torch.allclose(alone[1], after[1], atol=1e-6)
    assert (alone[1][:, :, :40] == float("-inf")).all()
    assert (alone[0][:, :, :40] == 0).all()


def test_dropout() -> None:
    """The same seed drops the same pairs, forward and backward; as many as asked for; gradients are those of
    attention with these pairs dropped."""
    one = case("causal", "plain", (4, 2), (70, 70), (64, 70), torch.float32)
    spec = dataclasses.replace(one.spec, dropout_p=0.3)
    plan, seed = Plan(spec).to_json(), torch.tensor([2**61 + 12345])

    def attention(q: Tensor, k: Tensor, v: Tensor, seed: Tensor = seed) -> Tensor:
        return attend()(q, k, v, [], [], [], None, None, seed, plan)[0]

    identity = torch.eye(70).expand(1, 2, 70, 70)
    probs = attention(one.q, one.k, identity)
    assert torch.equal(probs, attention(one.q, one.k, identity))
    assert not torch.equal(probs, attention(one.q, one.k, identity, seed + 1))
    kept = (probs != 0)[one.keep()].float()
    assert abs(kept.mean() - 0.7) < 0.015
    leaves = [x.detach().clone().requires_grad_() for x in (one.q, one.k, one.v)]
    weights = torch.randn(1, 4, 70, 70)
    (attention(*leaves) * weights).sum().backward()
    wide = [x.detach().double().requires_grad_() for x in leaves]
    k, v = (x.repeat_interleave(2, dim=1) for x in wide[1:])
    scores = (wide[0] @ k.transpose(-1, -2) * spec.scale).masked_fill(~one.keep(), float("-inf"))
    ((scores.softmax(-1) * (probs != 0) / 0.7 @ v) * weights).sum().backward()
    for mine, theirs in zip(leaves, wide, strict=True):
        assert relative_error(mine.grad, theirs.grad) < 2e-6


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_after_other_keys(p: float) -> None:
    """Of a pass that goes on, not of what it goes on from."""
    one = case("full", "plain", (4, 2), (70, 70), (64, 48), torch.float32)
    plan, seed = Plan(dataclasses.replace(one.spec, dropout_p=p)).to_json(), torch.tensor([7])
    start = torch.randn(1, 4, 70, 48), torch.randn(1, 4, 70) + 4
    out, lse = attend()(one.q, one.k, one.v, [], [], [], None, None, seed, plan)
    both = attend()(one.q, one.k, one.v, [], [], [], *start, seed, plan)
    assert p < 1.0 or (out == 0).all()
    want = torch.logaddexp(lse, start[1])
    merged = sum(torch.exp(x - want).unsqueeze(-1) * y for x, y in ((lse, out), start[::-1]))
    assert relative_error(both[0], merged) < 1e-6 and torch.allclose(both[1], want, atol=1e-5)


def test_dropout_in_lists() -> None:
    """The blocks that are visited are those of the lists, whatever is dropped."""
    one = case("prefix", "plain", (4, 2), (200, 200), (16, 200), torch.float32)
    plan = Plan(dataclasses.replace(one.spec, dropout_p=0.3), (64, 64)).to_json()
    identity = torch.eye(200).expand(1, 2, 200, 200)
    listed, seed = lists(one.keep(), (64, 64)), torch.tensor([3])
    probs = attend()(one.q, one.k, identity, [], [], listed, None, None, seed, plan)[0]
    whole = exact(dataclasses.replace(one, v=identity), torch.zeros(1, 4, 200, 200), torch.zeros(1, 4, 200))[
        0
    ]
    assert relative_error(probs, whole * (probs != 0) / 0.7) < 4e-6
    assert abs((probs != 0)[one.keep()].float().mean() - 0.7) < 0.015


def test_finite_fills_of_a_bias() -> None:
    """A row of finfo.min is the average of all values, a row of infinities nothing."""
    one = case("full", "bias", (1, 1), (70, 70), (32, 32), torch.float32)
    bias = one.operands[0]
    bias[..., :4, :], bias[..., 4:8, :] = torch.finfo(torch.float32).min, float("-inf")
    bias[..., 8:, 60:] = torch.finfo(torch.float32).min
    plan = Plan(one.spec).to_json()
    out, lse = attend()(one.q, one.k, one.v, [bias], [], [], None, None, None, plan)
    weights = torch.zeros(2, 1, 70, 32), torch.zeros(2, 1, 70)
    assert relative_error(out[:, :, :4], one.v.mean(2, keepdim=True).expand(2, 1, 4, 32)) < 1e-6
    assert (out[:, :, 4:8] == 0).all()
    assert (lse[:, :, 4:8] == float("-inf")).all()
    bias[..., 4:8, :] = 0
    out = attend()(one.q, one.k, one.v, [bias], [], [], None, None, None, plan)[0]
    assert relative_error(out[:, :, 8:], exact(one, *weights)[0][:, :, 8:]) < 4e-6


@pytest.mark.parametrize("limit", [2**31 - 1, 2**31 + 100, -(2**31) + 5, 0])
@pytest.mark.parametrize("text", ["k <= q + n0", "k >= q - n0", "q - k <= 2147483646", "k <= n0"])
def test_large_scalars(text: str, limit: int) -> None:
    one = case("full", "plain", (1, 1), (70, 70), (16, 16), torch.float32)
    mask = MaskSpec("pointwise", text, scalars=int("n0" in text))
    one = dataclasses.replace(one, spec=dataclasses.replace(one.spec, mask=mask), scalars=[limit])
    weights, lse_weights = torch.randn(2, 1, 70, 16), torch.zeros(2, 1, 70)
    for mine, theirs in zip(run(one, weights, lse_weights), exact(one, weights, lse_weights), strict=True):
        assert (mine - theirs).abs().max() < 1e-4


def test_lookups_past_32_bits() -> None:
    """A mask whose batches lie more than 2³¹ elements apart."""
    one = case("tensor", "plain", (1, 1), (16, 16), (16, 16), torch.float32)
    far = torch.empty(2**31 + 2**10, dtype=torch.bool).as_strided((2, 1, 16, 16), (2**31, 2**31, 16, 1))
    near = torch.rand(2, 1, 16, 16) > 0.4
    far.copy_(near)
    weights, lse_weights = torch.randn(2, 1, 16, 16), torch.zeros(2, 1, 16)
    one.operands[0] = far
    got = run(one, weights, lse_weights)
    one.operands[0] = near
    for mine, theirs in zip(got, run(one, weights, lse_weights), strict=True):
        assert torch.equal(mine, theirs)


def test_sink_of_minus_infinity() -> None:
    """As if there were none, also in rows without a key."""
    one = case("late rows", "sink", (4, 2), (70, 70), (32, 32), torch.float32)
    one.operands[0] = torch.tensor([float("-inf"), 0.0, 1.0, float("-inf")])
    weights, lse_weights = torch.randn(1, 4, 70, 32), torch.zeros(1, 4, 70)
    got = run(one, weights, lse_weights)
    assert all(x.isfinite().all() for x in got)
    bare = dataclasses.replace(one, spec=dataclasses.replace(one.spec, sink=None), operands=[])
    for mine, theirs in zip(got, run(bare, weights, lse_weights), strict=False):
        assert torch.allclose(mine[:, [0]], theirs[:, [0]], atol=1e-5) or mine.shape[1] == 2


@pytest.mark.parametrize("cap", [1.0, 50.0, 5000.0])
def test_soft_cap_keeps_float32(cap: float) -> None:
    one = case("causal", "plain", (1, 1), (70, 70), (32, 32), torch.float32)
    one = dataclasses.replace(one, spec=dataclasses.replace(one.spec, softcap=cap))
    weights, lse_weights = torch.randn(2, 1, 70, 32), torch.zeros(2, 1, 70)
    for mine, theirs in zip(run(one, weights, lse_weights), exact(one, weights, lse_weights), strict=True):
        assert relative_error(mine, theirs) < 2e-6


@pytest.mark.parametrize("sizes", [(0, 70), (70, 0)])
def test_nothing_to_attend_to(sizes: tuple[int, int]) -> None:
    one = case("full", "two biases", (1, 1), sizes, (16, 16), torch.float32)
    got = run(one, torch.zeros(2, 1, sizes[0], 16), torch.zeros(2, 1, sizes[0]))
    assert all(x.isfinite().all() and not x.any() for x in got)


def test_only_what_is_wanted() -> None:
    """Gradients of a bias alone, of q alone, of v alone: the others are None."""
    one = case("causal", "bias", (1, 1), (70, 70), (16, 16), torch.float32)
    weights, lse_weights = torch.randn(2, 1, 70, 16), torch.zeros(2, 1, 70)
    want = exact(one, weights, lse_weights)[2:]
    for wanted in (0, 2, 3):
        leaves = [x.detach().clone().requires_grad_(i == wanted) for i, x in enumerate(one.inputs())]
        out = attend()(*leaves[:3], leaves[3:], [], [], None, None, None, Plan(one.spec).to_json())[0]
        (out * weights).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(4)]
        assert relative_error(leaves[wanted].grad, want[wanted]) < 4e-6


def test_what_does_not_fit_is_refused() -> None:
    one = case("causal", "bias", (4, 2), (40, 40), (16, 16), torch.float32)
    plan, rest = Plan(one.spec).to_json(), ([], [], None, None, None)
    q, k, v, bias = one.inputs()
    for arguments in (
        (q, k, v.half(), [bias], *rest), (q.double(), k.double(), v.double(), [bias], *rest),
        (q, k[:, :, :9], v, [bias], *rest), (q[:, :3], k, v, [bias], *rest), (q, k, v, [], *rest),
        (q, k, v, [bias], [], [], q, None, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="kp::attend"):
            attend()(*arguments, plan)
    listed, start = lists(one.keep(), BLOCK), (q.new_zeros(q.shape), q.new_zeros(q.shape[:3]))
    for block, given in (
        (BLOCK, []), (BLOCK, listed[:3]), (None, listed), ((96, 128), listed), ((16, 16), listed),
        (BLOCK, [listed[0].long(), *listed[1:]]), (BLOCK, [x.unsqueeze(0) for x in listed]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"kp::attend: .*lists"):
            attend()(q, k, v, [bias], [], given, None, None, None, Plan(one.spec, block).to_json())
    for out, lse in ((start[0], None), (start[0].mT, start[1]), (start[0], start[1].double())):
        with pytest.raises(ValueError, match="start_out"):
            attend()(q, k, v, [bias], [], [], out, lse, None, plan)
    prefix, offset = (dataclasses.replace(one.spec, mask=MASK_SPECS[name]) for name in ("prefix", "offset"))
    with pytest.raises(ValueError, match="needs lists"):
        attend()(q, k, v, [bias], *rest, Plan(prefix).to_json())
    with pytest.raises(ValueError, match="numbers"):
        attend()(q, k, v, [bias], *rest, Plan(offset).to_json())
    few = [x.detach().requires_grad_() for x in (q, k, v)]
    plan = Plan(one.spec, BLOCK).to_json()
    out = attend()(*few, [bias], [], listed[:4], None, None, None, plan)[0]
    with pytest.raises(ValueError, match="lists by blocks of keys"):
        out.sum().backward()
    dropped = dataclasses.replace(one.spec, dropout_p=0.5)
    with pytest.raises(ValueError, match="seed"):
        attend()(q, k, v, [bias], *rest, Plan(dropped).to_json())


def test_tiles_fit_the_device() -> None:
    """Within the shared memory of devices that have less than Hopper's (8.6, 8.9, 12.0: 99 KiB)."""
    from kp_compiler.lowering.triton.attention import tile_for

    for kernel, width, size in itertools.product(("forward", "dq", "dkdv"), (64, 128, 256), (2, 4)):
        for pair in (0, 2 * size):  # two biases
            tile = tile_for(kernel, width, size).fitted(kernel, (width, width), size, pair, 99 * 1024, None)
            owned = width if kernel == "forward" else 2 * width
            rows = size * (tile.outer * owned + tile.stages * tile.inner * 2 * width)
            assert rows + tile.stages * tile.outer * tile.inner * pair <= 99 * 1024
            assert min(tile.outer, tile.inner) >= 16


def added_to_dead_rows(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    rows = torch.arange(q.shape[2])
    fill = torch.where(rows[None, :] <= rows[:, None] - 3, 0.0, torch.finfo(torch.float32).min)
    return (q @ k.transpose(-1, -2) * 0.25 + bias + fill).softmax(-1) @ v


def test_learnt_bias_of_dead_rows_is_refused() -> None:
    tensors = (*(torch.randn(1, 2, 20, 16) for _ in range(3)), torch.randn(2, 20, 20))
    options = {"attention": {"impl": "triton"}}
    outcome = run_both(added_to_dead_rows, tensors, train=True, options=options)
    assert [site.reason.code for site in outcome.report.sites] == ["dead-rows"]


def left_padding(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.25 + bias).softmax(-1) @ v


def test_mask_that_comes_as_numbers() -> None:
    """What Hugging Face makes of left padding: rows of finfo.min alone."""
    lowest = torch.finfo(torch.float32).min
    bias = torch.zeros(2, 1, 20, 20).masked_fill(torch.ones(20, 20).triu(1) > 0, lowest)
    bias[0, :, :5] = lowest
    tensors = (*(torch.randn(2, 2, 20, 16) for _ in range(3)), bias)
    outcome = run_both(left_padding, tensors, options={"attention": {"impl": "triton"}})
    assert [site.status for site in outcome.report.sites] == ["rewritten"]
    assert outcome.error < 1e-5


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("change", ["plain", "bias", "sink"])
def test_opcheck(change: str, start: bool) -> None:
    one = case("causal", change, (4, 2), (40, 40), (32, 16), torch.float32)
    leaves = [x.detach().clone().requires_grad_() for x in one.inputs()]
    started = [torch.randn(1, 4, 40, 16), torch.randn(1, 4, 40)] if start else [None, None]
    plan = Plan(one.spec).to_json()
    torch.library.opcheck(attend(), (*leaves[:3], leaves[3:], [], [], *started, None, plan))


@pytest.mark.parametrize("train", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("function", [*MASKS, *SCORES], ids=lambda f: f.__name__)
def test_compiled(function: Any, train: bool) -> None:
    """Recognised, proved and lowered onto the kernels, in one graph."""
    options = {"attention": {"impl": "triton"}}
    outcome = run_both(function, inputs(129), train=train, options=options)
    assert [(s.status, s.impl) for s in outcome.report.sites] == [("rewritten", "triton")], (
        outcome.report.why("")
    )
    assert outcome.error < 1e-5


@pytest.mark.parametrize("name", ["causal", "document"])
def test_dynamic_length_is_compiled_once(name: str) -> None:
    function = next(f for f in MASKS if f.__name__ == name)
    options = {**REFERENCE, "attention": {"impl": "triton", "mode": "require"}}
    compiled = torch.compile(function, backend="kp", fullgraph=True, options=options)
    with kp_compiler.capture_reports() as reports:
        for length in (150, 140, 270):  # one block would be a size of one, which is compiled anew
            arguments = inputs(length)
            for argument in arguments:
                torch._dynamo.mark_dynamic(argument, 1 if argument.dim() == 2 else 2)
            assert relative_error(compiled(*arguments), function(*arguments)) < 1e-5
    assert len(reports) == 1
