"""Attention over a sequence that ranks share: layouts, masks of parts, every schedule against one process;
ranks are threads here."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from kp_compiler.lowering import mask_render, reference
from kp_compiler.lowering.context import pairs, partial, readers, ring
from kp_compiler.lowering.context.layout import Layout, Ordered
from kp_compiler.lowering.context.schedules import SCHEDULES, Groups
from kp_compiler.lowering.context.shard import Shard
from kp_compiler.lowering.context.task import Task
from kp_compiler.lowering.into import Into, joined
from kp_compiler.lowering.selection.site import lines_of
from kp_compiler.specs import AttentionSpec, MaskSpec, SparseSpec
from tests.covering import pairwise
from tests.helpers import relative_error
from tests.virtual import one_after_the_other, run

LOOKUP = "Eq(t0(b, k), t0(b, q))"
MASKS: dict[str, tuple[MaskSpec, list[int]]] = {
    "full": (MaskSpec(), []),
    "causal": (MaskSpec("causal", "k <= q", parts=("causal",)), []),
    "offset": (MaskSpec("causal", "k <= q + n0", scalars=1), [3]),
    "window": (MaskSpec("window", "(k <= q) & (q - k <= 20)", window=21), []),
    "prefix": (MaskSpec("prefix", "(k <= q) | (k < 13)"), []),
    "documents": (MaskSpec("document", f"(k <= q) & {LOOKUP}", tensors=(0,), monotone=(0,)), []),
    "padding": (MaskSpec("padding", "Ne(t0(b, k), 2)", tensors=(0,)), []),
    "chunked": (MaskSpec("chunked", "(k <= q) & Eq(floor(q/16), floor(k/16))"), []),
}


# ---------------------------------------------------------------------------------------------------- layouts


def layout_of(kind: Any, size: int, tokens: int, chunks: int = 3) -> Layout:
    """Where the order is a batch's, chunks of any rank."""
    if kind != "documents":
        return Layout(kind, size, tokens)
    chunk = tokens // (size * chunks)
    starts = chunk * torch.randperm(size * chunks).view(size, chunks).sort(1).values
    return Ordered(kind, size, tokens, (starts.view(-1, 1) + torch.arange(chunk)).flatten())


@pytest.mark.parametrize("kind", ["contiguous", "zigzag", "documents"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_layout(kind: Any, size: int) -> None:
    layout = layout_of(kind, size, 24 * size)
    order = torch.cat([layout.positions(rank) for rank in range(size)])
    assert order.sort().values.tolist() == list(range(24 * size))
    assert layout.joined(order.chunk(size), 0).tolist() == list(range(24 * size))
    for rank in range(size):
        part = layout.positions(rank)
        assert torch.equal(part, order[24 * rank : 24 * rank + 24])
        assert torch.equal(layout.taken(rank, torch.arange(24 * size)), part)
        halves = torch.cat([torch.cat(parts) for parts in layout.divided(torch.arange(24 * size), 0)])
        assert torch.equal(halves, order)
        assert kind == "documents" or all(
            part[i * layout.part] == start for i, start in enumerate(layout.starts(rank))
        )


def test_zigzag_is_balanced_under_a_causal_mask() -> None:
    layout = Layout("zigzag", 4, 64)
    counts = {int((layout.positions(rank) + 1).sum()) for rank in range(4)}
    assert len(counts) == 1


# -------------------------------------------------------------------------------------------- masks of parts


def tensors(batch: int = 2, tokens: int = 48) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    steps = torch.rand(batch, tokens, generator=generator) < 0.08
    return [steps.cumsum(-1)]


def whole_mask(mask: MaskSpec, scalars: list[int], tokens: int) -> Tensor:
    like = torch.empty(2, 2, tokens, tokens)
    found = reference.mask(mask, tensors(tokens=tokens), scalars, like)
    return torch.ones(2, 2, tokens, tokens, dtype=torch.bool) if found is None else found.expand(2, 2, -1, -1)


@pytest.mark.parametrize("name", MASKS)
def test_mask_of_a_pair(name: str) -> None:
    """Where parts begin anywhere, and of any length; nothing is called empty or whole wrongly."""
    mask, scalars = MASKS[name]
    local = pairs.local(mask)
    assert local is not None
    want = whole_mask(mask, scalars, 48)
    lines = lines_of(pairs.bounds(mask), tuple(scalars))
    bounded = mask_render.inequalities(mask) is not None
    seen = set()
    for q0, n, k0, m in ((0, 16, 0, 16), (16, 16, 0, 16), (0, 16, 32, 16), (30, 7, 10, 5), (40, 8, 0, 48)):
        here = local.operands(tensors(), q0, n, k0, m)
        found = reference.mask(local.mask, here, [*scalars, q0, k0], torch.empty(2, 2, n, m))
        part = want[:, :, q0 : q0 + n, k0 : k0 + m]
        if found is not None:
            assert torch.equal(found.expand_as(part), part)
        relation = pairs.relation(lines, bounded, q0, n, k0, m)
        assert relation != "none" or not part.any()
        assert relation != "all" or part.all()
        seen.add(relation)
    if name in ("causal", "window"):
        assert seen >= {"none", "some"} and ("all" in seen) == (name == "causal")


def test_masks_that_look_elsewhere_are_refused() -> None:
    for expr in ("Eq(t0(b, k + 1), t0(b, q))", "t0(q, k) <= 0", "Eq(t0(h, k), 1)"):
        assert pairs.local(MaskSpec("pointwise", expr, tensors=(0,))) is None
    assert pairs.local(MaskSpec("tensor", "", tensors=(0,))) is None


# -------------------------------------------------------------------------------------------- partial results


class Masked(Task):
    """A task whose mask is a tensor."""

    def __init__(self, spec: AttentionSpec, kept: Tensor) -> None:
        super().__init__(spec)
        object.__setattr__(self, "kept", kept)

    def keep(self, q: Tensor, k: Tensor) -> Tensor:
        return self.kept  # type: ignore[attr-defined]


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_partial_results_add_up(softcap: float | None) -> None:
    """Over any division of the keys, with rows that have none in one of them."""
    q, k, v = (torch.randn(2, h, n, 8, dtype=torch.float64) for h, n in ((4, 10), (2, 24), (2, 24)))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    keep = torch.rand(2, 1, 10, 24) > 0.4
    keep[:, :, 3, :9] = False
    keep[:, :, 5] = False
    spec = AttentionSpec(0.3, softcap=softcap, dead_rows="zero")
    want = reference.attention_over(*leaves, [], [], spec, keep)
    grad = torch.randn_like(want)
    exact = torch.autograd.grad(want, leaves, grad)
    with torch.no_grad():
        start, spans = None, (slice(0, 9), slice(9, 10), slice(10, 24))
        out = torch.full_like(want, float("nan"))
        for span in spans:
            task = Masked(spec, keep[..., span])
            start = out, partial.forward(q, k[:, :, span], v[:, :, span], task, None, Into(out, start))
        assert start is not None and torch.allclose(out, want)
        delta = partial.delta_of(grad, out)
        dq, dk, dv = (torch.zeros_like(x) for x in leaves)
        for span in spans:
            given = (k[:, :, span], v[:, :, span], Masked(spec, keep[..., span]))
            partial.backward(grad, q, *given, start[1], delta, dq, dk[:, :, span], dv[:, :, span])
    for mine, theirs in zip((dq * spec.scale, dk, dv), exact, strict=True):
        assert torch.allclose(mine, theirs)


# -------------------------------------------------------------------------------------------------- schedules


def on_ranks(
    schedule: str, layout: Layout, spec: AttentionSpec, operands: list[Tensor], scalars: list[int],
    whole: list[Tensor],
) -> list[Tensor]:  # fmt: skip
    """out, lse, dq, dk, dv of the whole sequence, from what each rank has of it. `whole`: q, k, v, grad."""
    forward, backward = SCHEDULES[schedule]

    def one(groups: Groups) -> list[Tensor]:
        rank = groups.every.rank
        q, k, v, grad = (x.index_select(2, layout.positions(rank)) for x in whole)
        shard = Shard(spec, layout, rank, operands, scalars)
        out, lse = forward(shard, groups, q, k, v)
        delta = (grad * out).sum(-1)
        return [out, lse, *backward(shard, groups, grad, q, k, v, lse, delta)]

    row = random.choice([n for n in (2, 3, 4) if layout.size % n == 0])
    found = run(layout.size, one, row)
    return [layout.joined(parts, 2) for parts in zip(*found, strict=True)]


# 24 heads: as many for 2, 3, 4 and 8 ranks; 3 of keys are not
CASES = pairwise(
    list(itertools.product(SCHEDULES, MASKS)),
    ["contiguous", "zigzag", "documents"], [2, 3, 4, 8], [24, 8, 3, 1], ["none", "softcap", "sink"],
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_schedules_against_one_process(monkeypatch: pytest.MonkeyPatch, case: tuple[Any, ...]) -> None:
    schedule, name, kind, size, key_heads, change = case
    monkeypatch.setattr(ring, "ROWS", random.choice((1, 2 * 24 * 48 // size // 2, 2**17)))
    mask, scalars = MASKS[name]
    if schedule == "hybrid" and kind == "documents":
        kind = "zigzag"  # rows have no order of their own
    layout = layout_of(kind, size, 48, chunks=2)
    spec = AttentionSpec(0.3, mask, dead_rows="zero", softcap=2.0 if change == "softcap" else None)
    operands = tensors()
    if change == "sink":
        spec = dataclasses.replace(spec, sink=1)
        operands.append(torch.randn(24, dtype=torch.float64))
    whole = [torch.randn(2, heads, 48, 8, dtype=torch.float64) for heads in (24, key_heads, key_heads)]
    leaves = [x.clone().requires_grad_() for x in whole]
    want = reference.attention_over(*leaves, operands, scalars, spec)
    grad = torch.randn_like(want)
    exact = torch.autograd.grad(want, leaves, grad)
    out, _, *found = on_ranks(schedule, layout, spec, operands, scalars, [*whole, grad])
    assert relative_error(out, want.detach()) < 1e-12
    assert all(relative_error(mine, theirs) < 1e-12 for mine, theirs in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "zigzag") for name in MASKS), ("documents", "documents")]
)
def test_kernels(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    """kp's own, in Triton's interpreter: partial results and gradients in float32 of half precision."""
    from kp_compiler.lowering.context import kernels, shard

    monkeypatch.setattr(shard, "engine", lambda q: kernels)
    mask, scalars = MASKS[name]
    spec, layout = AttentionSpec(0.3, mask, dead_rows="zero", softcap=4.0), layout_of(kind, 2, 48)
    whole = [torch.randn(2, heads, 48, 16).half() for heads in (4, 2, 2)]
    leaves = [x.double().requires_grad_() for x in whole]
    want = reference.attention_over(*leaves, tensors(), scalars, spec)
    grad = torch.randn(want.shape).half()
    exact = torch.autograd.grad(want, leaves, grad.double())
    found = one_after_the_other(layout, spec, tensors(), scalars, [*whole, grad])
    assert found[0].dtype == torch.half and relative_error(found[0], want.detach()) < 5e-4
    assert all(relative_error(mine, theirs) < 2e-3 for mine, theirs in zip(found[1:], exact, strict=True))


def test_readers_of_one_key_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients of some readers beside each other, none of which adds to what another stream adds to."""
    from kp_compiler.lowering.context import kernels, shard

    monkeypatch.setattr(shard, "engine", lambda q: kernels)
    monkeypatch.setattr(readers, "ROWS", 1)
    add, stream, streams_of = kernels.add_gradients, itertools.cycle([0]), {}

    @contextlib.contextmanager
    def beside(q: Tensor, count: int) -> Any:
        nonlocal stream
        stream = itertools.cycle(range(min(count, readers.STREAMS)))
        streams_of.clear()
        yield lambda call: call()

    def adds(to: tuple[Tensor, ...], *given: Any) -> None:
        mine = next(stream)
        for x in to:
            assert streams_of.setdefault(x.data_ptr(), mine) == mine
        add(to, *given)

    monkeypatch.setattr(kernels, "beside", beside)
    monkeypatch.setattr(kernels, "add_gradients", adds)
    spec, layout = AttentionSpec(0.3, MASKS["causal"][0]), Layout("zigzag", 2, 48)
    whole = [torch.randn(1, heads, 48, 16).half() for heads in (6, 1, 1)]
    assert readers.grouped(*whole[:2], Task(spec)) == [slice(i, i + 1) for i in range(6)]
    with monkeypatch.context() as patch:
        patch.setattr(readers, "ROWS", 2**14)
        sizes = ((8192, 8192), (4096, 4096), (8192, 4096), (16384, 8192), (16384, 16384), (32768, 131072))
        assert [readers.count(1, 32, *each) for each in sizes] == [8, 8, 8, 8, 4, 1]
    assert readers.grouped(whole[0], whole[0], Task(spec)) == [slice(0, 6)]
    leaves = [x.double().requires_grad_() for x in whole]
    want = reference.attention_over(*leaves, [], [], spec)
    grad = torch.randn(want.shape).half()
    exact = torch.autograd.grad(want, leaves, grad.double())
    found = one_after_the_other(layout, spec, [], [], [*whole, grad])
    assert all(relative_error(mine, theirs) < 2e-3 for mine, theirs in zip(found[1:], exact, strict=True))


@pytest.mark.parametrize("name", ["causal", "window", "documents"])
@pytest.mark.parametrize("shared", [False, True])
def test_blocks_are_chosen_as_by_one_process(name: str, shared: bool) -> None:
    """By ranks that share heads; each sees all keys of its own."""
    mask, scalars = MASKS[name]
    sparse = SparseSpec("content", 0.4, block=16, sink_blocks=0, local_blocks=1, shared=shared)
    spec = AttentionSpec(0.3, mask, dead_rows="zero", sparse=sparse)
    whole = [torch.randn(1, heads, 160, 8) for heads in (8, 4, 4)]
    operands = [(torch.rand(1, 160) < 0.03).cumsum(-1)]
    leaves = [x.clone().requires_grad_() for x in whole]
    want = reference.attention(*leaves, operands, scalars, spec.to_json())
    assert relative_error(want, reference.attention_over(*leaves, operands, scalars, spec)) > 0.01
    grad = torch.randn_like(want)
    exact = torch.autograd.grad(want, leaves, grad)
    layout = Layout("zigzag", 4, 160)
    out, _, *found = on_ranks("ulysses", layout, spec, operands, scalars, [*whole, grad])
    assert relative_error(out, want.detach()) < 1e-5
    assert all(relative_error(mine, theirs) < 1e-5 for mine, theirs in zip(found, exact, strict=True))


def test_chosen_blocks_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter."""
    from kp_compiler.lowering.context import kernels, shard

    monkeypatch.setattr(shard, "engine", lambda q: kernels)
    sparse = SparseSpec("content", 0.4, block=32, sink_blocks=0, local_blocks=1)
    spec = AttentionSpec(0.3, MASKS["causal"][0], dead_rows="zero", sparse=sparse)
    whole = [torch.randn(1, heads, 200, 16).half() for heads in (4, 2, 2)]
    leaves = [x.float().requires_grad_() for x in whole]
    want = reference.attention(*leaves, [], [], spec.to_json())
    grad = torch.randn(want.shape).half()
    exact = torch.autograd.grad(want, leaves, grad.float())
    found = one_after_the_other(Layout("contiguous", 1, 200), spec, [], [], [*whole, grad])
    for mine, theirs in zip(found, [want.detach(), *exact], strict=True):
        assert relative_error(mine, theirs) < 2e-3


def test_what_travels() -> None:
    """Keys and values once round, or once; those that a window sees, from neighbours alone."""
    heads, tokens, size = (8, 2), 400, 4
    part = torch.randn(1, heads[1], tokens // size, 8)

    def sent(schedule: str, mask: str, kind: Any) -> int:
        layout, spec = Layout(kind, size, tokens), AttentionSpec(0.3, MASKS[mask][0], dead_rows="zero")

        def one(groups: Groups) -> int:
            q = torch.randn(1, heads[0], tokens // size, 8)
            SCHEDULES[schedule][0](Shard(spec, layout, groups.every.rank, [], []), groups, q, part, part)
            return sum(groups.every.moved)  # type: ignore[attr-defined]

        return max(run(size, one))

    keys = 2 * part.numel()
    assert sent("ring", "causal", "zigzag") == (size - 1) * keys
    assert sent("allgather", "causal", "contiguous") == keys
    assert sent("ring", "window", "contiguous") == keys
    window = Shard(AttentionSpec(0.3, MASKS["window"][0]), Layout("contiguous", 4, 400), 2, [], [])
    assert [len(pieces) for pieces in window.pieces] == [0, 1, 1, 0]
    for kind, mask, reach in (
        ("contiguous", "causal", 3),
        ("zigzag", "window", 3),
        ("contiguous", "full", 3),
    ):
        assert Shard(AttentionSpec(0.3, MASKS[mask][0]), Layout(kind, 4, 400), 1, [], []).reach == reach


def test_pieces_are_few() -> None:
    """Of two ranks that share a causal sequence in zigzag: of its own keys each of a rank's parts sees those
    up to its last, of the other's keys there is a single rectangle; of all keys in order each part sees one
    run."""
    spec, layout = AttentionSpec(0.3, MASKS["causal"][0]), Layout("zigzag", 2, 64)
    first, second = (Shard(spec, layout, rank, [], []) for rank in range(2))
    for shard in (first, second):
        own = [(piece.parts, piece.keys) for piece in shard.pieces[shard.rank]]
        assert own == [((0,), slice(0, 16)), ((1,), slice(0, 32))]
    ((other,), (another,)) = (shard.pieces[1 - shard.rank] for shard in (first, second))
    assert (other.parts, other.keys, other.task.mask) == ((1,), slice(0, 32), None)
    assert (another.parts, another.keys) == ((0, 1), slice(0, 16))
    assert [piece.keys.stop for piece in first.pieces_of_all] == [16, 64]
    assert [piece.keys.stop for piece in second.pieces_of_all] == [32, 48]
    everything = Shard(AttentionSpec(0.3), layout, 0, [], [])
    assert [(piece.parts, piece.task.mask) for piece in everything.pieces[0]] == [((0, 1), None)]


def test_results_have_a_tail_until_their_last_keys() -> None:
    """Parts that have seen all of theirs are as exact as one kernel's, the others are with their tail."""
    spec, layout = AttentionSpec(0.3, MASKS["causal"][0]), Layout("zigzag", 3, 96)
    whole = [torch.randn(1, 2, 96, 8).half() for _ in "qkv"]
    shard, places = Shard(spec, layout, 1, [], []), [layout.positions(rank) for rank in range(3)]
    q = whole[0][:, :, places[1]]
    out, seen = torch.full_like(q, float("nan")), torch.zeros(96, dtype=torch.bool)
    results = shard.results(out, itertools.chain(*shard.pieces))
    for source, done in ((1, []), (0, [0]), (2, [0, 1])):
        shard.attend(q, *(x[:, :, places[source]] for x in whole[1:]), shard.pieces[source], results)
        seen[places[source]] = True
        keep = seen & (torch.arange(96) <= places[1][:, None])
        leaves = [x.double() for x in (q, *whole[1:])]
        want = reference.attention_over(*leaves, [], [], AttentionSpec(0.3), keep)
        for i, rows in enumerate((slice(0, 16), slice(16, 32))):
            assert results.tail is not None and (results.left[i] == 0) == (i in done)
            found = out if i in done else joined(out, results.tail)
            error = relative_error(found[:, :, rows], want[:, :, rows])
            assert error < (5e-4 if i in done else 2e-5)
    assert results.finish().shape == (1, 2, 32)


def test_masks_that_ask_for_the_order_alone() -> None:
    document = MaskSpec("document", "Eq(t0(b, q), t0(b, k)) & (k <= q)", tensors=(2,))
    assert all(map(pairs.by_order, (MaskSpec(), MASKS["causal"][0], document)))
    assert not pairs.by_order(MASKS["window"][0])
    for expr in ("k < q", "k <= q + 1", "Eq(floor(k/4), floor(q/4))", "k <= 5"):
        assert not pairs.by_order(MaskSpec("pointwise", expr))
    assert pairs.numbered(document).tensors == (0,)
