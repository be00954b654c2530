"""Choosing blocks: against oracles in loops, budgets, masks, planted patterns, lists."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection import ESTIMATING, SELECTORS, choose, lists, sampled
from kp_compiler.lowering.selection.content import PART
from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import AttentionSpec, MaskSpec, SparseSpec
from tests.helpers import relative_error

MASKS = {
    "causal": (MaskSpec("causal", "k <= q"), []),
    "full": (MaskSpec(), []),
    "window": (MaskSpec("window", "(k <= q) & (q - k <= 150)", window=151), []),
    "offset": (MaskSpec("causal", "k <= q + n0", scalars=1), [70]),
    "both sides": (MaskSpec("pointwise", "(k - q <= 120) & (q - k <= 120)"), []),
}


def site(selector: str = "content", mask: str = "causal", queries: int = 300, keys: int = 300,
         heads: tuple[int, int] = (4, 2), batch: int = 2, **settings: Any) -> Site:  # fmt: skip
    spec, scalars = MASKS[mask]
    q, k = torch.randn(batch, heads[0], queries, 16), torch.randn(batch, heads[1], keys, 16)
    sparse = SparseSpec(selector, **{"density": 0.4, "block": 32, **settings})
    forms = mask_render.inequalities(spec)
    gates = (torch.randn(heads[0], 16, 8), torch.randn(heads[0], 48, 8)) if selector == "learned" else ()
    return Site(AttentionSpec(0.5, spec), sparse, q, k, scalars, forms, gates=gates)


def all_rows(here: Site) -> slice:
    return slice(0, here.rows)


def pairs(here: Site) -> Tensor:
    """The mask [S,T] from its definition."""
    q, k = torch.arange(here.q.shape[2])[:, None], torch.arange(here.k.shape[2])
    n0 = here.scalars[0] if here.scalars else 0
    return {
        "k <= q": k <= q, "True": (k >= 0) & (q >= 0), "(k <= q) & (q - k <= 150)": (k <= q) & (q - k <= 150),
        "k <= q + n0": k <= q + n0, "(k - q <= 120) & (q - k <= 120)": (k - q).abs() <= 120,
    }[here.spec.mask.expr]  # fmt: skip


def blocks_of(keep: Tensor, size: int) -> list[list[Tensor]]:
    return [list(row.split(size, 1)) for row in keep.split(size, 0)]


# --------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize(("queries", "keys"), [(300, 300), (256, 256), (100, 333), (333, 100)])
@pytest.mark.parametrize("mask", MASKS)
def test_mask_by_block(mask: str, queries: int, keys: int) -> None:
    here = site(mask=mask, queries=queries, keys=keys)
    partial, whole = (x.expand(1, 1, here.rows, here.blocks)[0, 0] for x in here.mask(all_rows(here)))
    for i, row in enumerate(blocks_of(pairs(here), 32)):
        for j, block in enumerate(row):
            assert bool(whole[i, j]) == bool(block.all())
            assert bool(partial[i, j]) >= bool(block.any() and not block.all())  # never skipped wrongly
            assert not (partial[i, j] and whole[i, j])


def test_mask_by_block_of_flags() -> None:
    """A mask that is no set of forms comes as flags; the choice is the same."""
    here = site()
    flags = here.mask(all_rows(here))
    given = dataclasses.replace(here, forms=None, flags=flags)
    for selector in ("structured", "random"):
        sparse = dataclasses.replace(here.sparse, selector=selector)
        one, other = (dataclasses.replace(x, sparse=sparse) for x in (here, given))
        for mine, theirs in zip(lists.by_query(one).tensors(), lists.by_query(other).tensors(), strict=True):
            assert torch.equal(mine, theirs)
    for selector in ESTIMATING:  # coarser in blocks on the diagonal: same shape, same rules
        there = dataclasses.replace(site(selector), q=here.q, k=here.k, forms=None, flags=flags)
        partial, whole = lists.flags(there, all_rows(here))
        assert not ((partial | whole) & ~(flags[0] | flags[1])).any()


# ------------------------------------------------------------------------------------------------- selectors


def content_oracle(here: Site, b: int, h: int, row: int) -> list[float]:
    """Shares of a row of blocks, part by part in loops."""
    size, group = here.sparse.block, here.group
    q, k = here.q[b, h].double(), here.k[b, h // group].double()
    keep = pairs(here)
    totals = [0.0] * here.blocks
    for first in range(row * size, min((row + 1) * size, q.shape[0]), PART):
        scores = {}
        for start in range(0, k.shape[0], PART):
            if not keep[first : first + PART, start : start + PART].any():
                continue
            mine, theirs = q[first : first + PART], k[start : start + PART]
            if here.sparse.estimate == "pooled":
                score = float(mine.mean(0) @ theirs.mean(0))
            else:
                score = (
                    sum(
                        float(mine[i] @ theirs[PART - 1 - i])
                        for i in range(PART)
                        if i < len(mine) and PART - 1 - i < len(theirs)
                    )
                    / PART
                )
            scores[start] = math.exp(score * here.spec.scale)
        for start, score in scores.items():
            totals[start // size] += score / sum(scores.values())
    return [total / max(sum(totals), 1e-30) for total in totals]


def sampled_oracle(here: Site, b: int, h: int, row: int) -> list[float]:
    """Shares of a row of blocks by its samples, pair of keys by pair in loops."""
    size, keep = here.sparse.block, pairs(here)
    q, k = here.q[b, h].double(), here.k[b, h // here.group].double()
    totals = [0.0] * here.blocks
    for step in range(sampled.SAMPLES):
        at = min(row * size + step * (size - 1) // (sampled.SAMPLES - 1), q.shape[0] - 1)
        scores = {
            start: math.exp(2 * float(q[at] @ k[start : start + 2].mean(0)) * here.spec.scale)
            for start in range(0, k.shape[0], 2)
            if keep[at, start : start + 2].any()
        }
        for start, score in scores.items():
            totals[start // size] += score / sum(scores.values())
    return [total / max(sum(totals), 1e-30) for total in totals]


@pytest.mark.parametrize("estimate", ["sampled", "pooled", "antidiagonal"])
@pytest.mark.parametrize(
    ("mask", "queries", "keys"), [("causal", 300, 300), ("offset", 130, 200), ("full", 64, 90)]
)
def test_content(mask: str, queries: int, keys: int, estimate: Any) -> None:
    here = site(mask=mask, queries=queries, keys=keys, estimate=estimate)
    found = SELECTORS["content"](here)(all_rows(here))
    for b, h, row in ((0, 0, 0), (1, 3, here.rows - 1), (0, 2, here.rows // 2)):
        oracle = sampled_oracle if estimate == "sampled" else content_oracle
        want = torch.tensor(oracle(here, b, h, row))
        assert torch.allclose(found[b, h, row], want, atol=1e-5), (b, h, row)


@pytest.mark.parametrize(
    ("mask", "queries", "keys"), [("causal", 300, 300), ("window", 200, 200), ("full", 50, 90)]
)
def test_vertical_slash(mask: str, queries: int, keys: int) -> None:
    here = site("vertical_slash", mask, queries, keys)
    found = SELECTORS["vertical_slash"](here)(all_rows(here))
    keep, size = pairs(here), here.sparse.block
    for b, h in ((0, 1), (1, 2)):
        scores = here.q[b, h].double() @ here.k[b, h // here.group].double().T * here.spec.scale
        probs = scores.masked_fill(~keep, -math.inf).softmax(-1).nan_to_num(0.0)
        vertical, slash = [0.0] * here.blocks, collections.Counter[int]()
        for q in range(max(0, queries - 64), queries):
            for k in range(keys):
                vertical[k // size] += float(probs[q, k])
                slash[(q + keys - queries) // size - k // size] += float(probs[q, k])
        for row in (0, here.rows - 1):
            last = min((row + 1) * size, queries) - 1
            want = []
            for block in range(here.blocks):
                seen = keep[row * size : last + 1, block * size : (block + 1) * size].any()
                away = (last + keys - queries) // size - block
                want.append(vertical[block] + slash[away] if seen else 0.0)
            want = torch.tensor(want) / max(sum(want), 1e-30)
            assert torch.allclose(found[b, h, row], want, atol=1e-4), (b, h, row)


def test_learned() -> None:
    """The gates' products, block by block; the last rows stand for missing ones."""
    here = site("learned", queries=130, keys=200)
    found = SELECTORS["learned"](here)(all_rows(here))
    wq, wk = (x.double() for x in here.gates)
    for b, h, row in ((0, 0, 0), (1, 3, 4), (0, 2, 2)):
        q = here.q[b, h, 32 * row : 32 * row + 32].double()
        q = torch.cat([q, q[-1:].expand(32 - len(q), -1)]).mean(0) @ wq[h]
        scores = []
        for block in range(here.blocks):
            k = here.k[b, h // 2, 32 * block : 32 * block + 32].double()
            k = torch.cat([k, k[-1:].expand(32 - len(k), -1)])
            scores.append(float(torch.cat([k.mean(0), k.amax(0), k.amin(0)]) @ wk[h] @ q) / 8**0.5)
        kept = torch.logical_or(*here.mask(all_rows(here)))[0, 0, row]
        want = torch.tensor(scores).masked_fill(~kept, -math.inf).softmax(-1)
        assert torch.allclose(found[b, h, row], want.float(), atol=1e-5)
    part = SELECTORS["learned"](here)(slice(2, 4))
    assert torch.allclose(part, found[:, :, 2:4], atol=1e-6)


def test_structured_is_near_and_spread() -> None:
    here = site("structured", queries=4096, keys=4096, density=0.25, sink_blocks=0, local_blocks=1)
    partial, whole = lists.flags(here, all_rows(here))
    row = (partial | whole)[0, 0, -1].nonzero().flatten().tolist()
    near = [j for j in row if j >= 128 - 20]
    far = [j for j in row if j < 128 - 20]
    assert len(row) == 32 and len(near) >= 16
    gaps = [b - a for a, b in itertools.pairwise(far)]
    assert max(gaps) <= 2 * min(gaps)


def test_random_is_uniform_and_repeats() -> None:
    here = site("random", queries=2048, keys=2048)
    scores = SELECTORS["random"](here)(all_rows(here))
    assert torch.equal(scores, SELECTORS["random"](here)(all_rows(here)))
    assert torch.equal(scores[:, :, 3:9], SELECTORS["random"](here)(slice(3, 9)))
    assert abs(float(scores.mean()) - 0.5) < 0.01 and abs(float((scores < 0.1).float().mean()) - 0.1) < 0.01
    other = dataclasses.replace(here, sparse=dataclasses.replace(here.sparse, seed=1))
    assert abs(float(torch.corrcoef(torch.stack([scores.flatten(),
               SELECTORS["random"](other)(all_rows(here)).flatten()]))[0, 1])) < 0.02  # fmt: skip
    assert not torch.equal(scores[0], scores[1]) and not torch.equal(scores[:, 0], scores[:, 1])


def test_planted_needle_is_found() -> None:
    """One block of keys that a block of queries looks for, far away."""
    for selector in ("content", "vertical_slash"):
        here = site(selector, queries=2048, keys=2048, density=0.2)
        here.k[:, :, 320:352] = 3.0
        here.q[:, :, 1984:] = 3.0
        partial, whole = lists.flags(here, all_rows(here))
        assert (partial | whole)[:, :, -2:, 10].all(), selector


def test_planted_diagonal_is_found() -> None:
    """Keys that look like the query 640 places later."""
    here = site("vertical_slash", queries=2048, keys=2048, heads=(2, 2), density=0.2)
    here.q[:, :, 640:] = here.k[:, :, :-640] * 3
    partial, whole = lists.flags(here, all_rows(here))
    for row in range(25, here.rows):
        assert (partial | whole)[:, :, row, row - 20].all(), row


# --------------------------------------------------------------------------------------------------- choosing


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("density", [0.05, 0.2, 0.9, 1.0])
@pytest.mark.parametrize("mask", MASKS)
def test_budget_and_mask(selector: str, density: float, mask: str) -> None:
    here = site(selector, mask, queries=700, keys=700, density=density)
    partial, whole = lists.flags(here, all_rows(here))
    maybe, surely = here.mask(all_rows(here))
    kept, found = (maybe | surely).expand_as(partial), partial | whole
    assert not (found & ~kept).any() and not (whole & ~surely).any() and not (partial & ~maybe).any()
    must = choose.forced(here, all_rows(here), kept)
    allowed = kept.sum(-1)
    budget = torch.maximum((allowed * density + 1e-6).floor(), must.sum(-1).clamp(min=1))
    assert (found.sum(-1) <= budget).all() and not (must & ~found).any()
    assert (found.sum(-1) >= (allowed * density + 1e-6).floor()).all()
    if density == 1.0:
        assert torch.equal(found, kept)


def test_best_are_chosen() -> None:
    sparse = SparseSpec("content", density=0.5, sink_blocks=1, local_blocks=1)
    scores, kept = torch.rand(1, 2, 5, 12), torch.rand(1, 1, 5, 12) > 0.2
    scores[0, 0, 0, :6] = 0.25  # ties: the first ones
    scores[0, 1, 1, 3] = float("nan")
    must = torch.rand(1, 2, 5, 12) > 0.8
    found = choose.chosen(sparse, scores, kept.expand_as(scores), must & kept)
    for h in range(2):
        for row in range(5):
            there = [j for j in range(12) if kept[0, 0, row, j]]
            want = {j for j in there if must[0, h, row, j]}
            worth = {j: float(scores[0, h, row, j].nan_to_num(0.0)) for j in there}
            for j in sorted(there, key=lambda j: (-worth[j], j)):
                if len(want) < len(there) // 2:
                    want.add(j)
            assert set(found[0, h, row].nonzero().flatten().tolist()) == want


@pytest.mark.parametrize("mass", [0.5, 0.9, 0.999])
def test_mass(mass: float) -> None:
    """As few as hold the share, forced ones among them, and not more than the density allows."""
    sparse = SparseSpec("content", density=0.75, mass=mass, sink_blocks=1, local_blocks=1)
    scores = torch.rand(1, 1, 40, 16).pow(6)
    kept = torch.ones(1, 1, 40, 16, dtype=torch.bool)
    must = torch.zeros_like(kept)
    must[..., [0, -1]] = True
    found = choose.chosen(sparse, scores, kept, must)
    for row in range(40):
        values = scores[0, 0, row].double()
        chosen = found[0, 0, row]
        if chosen.sum() < 12:
            assert values[chosen].sum() >= mass * values.sum() * (1 - 1e-9)
        last = values[1:-1][chosen[1:-1]]
        if last.numel():
            assert values[chosen].sum() - last.min() < mass * values.sum()


# ------------------------------------------------------------------------------------------------------ lists


def flags_of(found: Lists, others: int) -> tuple[Tensor, Tensor]:
    kinds = found.visited(others)
    return kinds == 1, kinds == 2


@pytest.mark.parametrize("chunk", [2**24, 100])
@pytest.mark.parametrize("selector", SELECTORS)
def test_lists(monkeypatch: pytest.MonkeyPatch, selector: str, chunk: int) -> None:
    """The same whatever is in memory at a time; by keys, the same pairs."""
    monkeypatch.setattr(lists, "CHUNK", chunk)
    here = site(selector, queries=500, keys=500)
    want = lists.flags(here, all_rows(here))
    mine = lists.by_query(here)
    assert all(torch.equal(a, b) for a, b in zip(flags_of(mine, here.blocks), want, strict=True))
    turned = lists.by_key(mine, here.blocks)
    assert all(torch.equal(a.mT, b) for a, b in zip(flags_of(turned, here.rows), want, strict=True))
    assert turned.blocks.numel() <= mine.blocks.numel() + 2 * 4


@pytest.mark.parametrize("size", [2**28, 300])
def test_turned_by_kernels(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Some heads at a time, too."""
    kernels = pytest.importorskip("kp_compiler.lowering.triton.turn_lists")
    monkeypatch.setattr(kernels, "BYTES", size)
    here = site("random", queries=300, keys=500, mask="full")
    found = lists.by_query(here)
    mine, want = kernels.turn(found, here.blocks), lists.by_key(found, here.blocks)
    assert torch.equal(mine.visited(here.rows), want.visited(here.rows))
    assert all(torch.equal(a, b) for a, b in zip(mine.tensors()[:3], want.tensors()[:3], strict=True))
    assert mine.blocks.shape == want.blocks.shape


def test_one_choice_for_a_group() -> None:
    """By the mean of what its heads score."""
    here = site(shared=True, queries=900, keys=900)
    found = lists.by_query(here)
    assert found.count.shape == (2, 2, here.rows)
    scores = SELECTORS["content"](here)(all_rows(here)).unflatten(1, (2, 2)).mean(2)
    kept = torch.logical_or(*here.mask(all_rows(here))).expand_as(scores)
    want = choose.chosen(here.sparse, scores, kept, choose.forced(here, all_rows(here), kept))
    assert torch.equal(found.visited(here.blocks) > 0, want)


def test_no_query_is_left_without_keys() -> None:
    """Where its own key is left, whatever else is not chosen: windows, offsets, future keys."""
    cases = [(name, 300, 300) for name in ("window", "full", "both sides", "causal")]
    for mask, queries, keys in (*cases, ("offset", 200, 270), ("both sides", 300, 260), ("causal", 300, 200)):
        here = site("random", mask, queries, keys, density=0.01, sink_blocks=0, local_blocks=1)
        partial, whole = lists.flags(here, all_rows(here))
        spread = (partial | whole).repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :queries, :keys]
        assert torch.equal((spread & pairs(here)).any(-1), pairs(here).any(-1).expand(2, 4, -1)), mask


def test_home_is_where_queries_stand() -> None:
    """Whatever a mask lets them see ahead."""
    for mask, queries, keys, offset in (
        ("causal", 300, 300, 0), ("both sides", 300, 300, 0), ("full", 300, 400, 100),
        ("offset", 200, 270, 70), ("causal", 300, 400, 0), ("window", 300, 300, 0), ("causal", 300, 200, 0),
    ):  # fmt: skip
        assert site(mask=mask, queries=queries, keys=keys).offset == offset, mask


@pytest.mark.parametrize("selector", ["content", "random"])
def test_attention_over_the_chosen(selector: str) -> None:
    """kp's kernels over the lists are attention under the chosen blocks' mask, gradients too."""
    from kp_compiler.lowering.attend import Plan, attend

    here = site(selector, queries=200, keys=200)
    v = torch.randn_like(here.k)
    partial, whole = lists.flags(here, all_rows(here))
    spread = (partial | whole).repeat_interleave(32, 2).repeat_interleave(32, 3)[..., :200, :200]
    keep = spread & pairs(here)
    leaves = [x.clone().requires_grad_() for x in (here.q, here.k, v)]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    k, value = (x.repeat_interleave(2, 1) for x in wide[1:])
    want = (wide[0] @ k.mT * here.spec.scale).masked_fill(~keep, -math.inf).softmax(-1) @ value
    mine = lists.by_query(here)
    given = [*mine.tensors(), *lists.by_key(mine, here.blocks).tensors()]
    out = attend()(*leaves, [], [], given, None, None, None, Plan(here.spec, (32, 32)).to_json())[0]
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (want * weights).sum().backward()
    assert relative_error(out, want) < 4e-6
    for a, b in zip(leaves, wide, strict=True):
        assert relative_error(a.grad, b.grad) < 4e-6


# ---------------------------------------------------------------------------------------------------- kernels


CONTENT = [("causal", 300, 300), ("window", 130, 333), ("offset", 100, 200), ("full", 256, 256)]
CONTENT += [("causal", 600, 600), ("full", 100, 1100)]  # with steps that need no mask


@pytest.mark.parametrize("estimate", ["sampled", "pooled"])
@pytest.mark.parametrize(("mask", "queries", "keys"), CONTENT)
def test_content_by_kernels(mask: str, queries: int, keys: int, estimate: str) -> None:
    """In Triton's interpreter."""
    kernels = pytest.importorskip("kp_compiler.lowering.triton.selection")
    here = site(mask=mask, queries=queries, keys=keys, heads=(2, 1), batch=1, estimate=estimate)
    spec = dataclasses.replace(here.spec, softcap=2.0 if queries == 300 else None)
    here = dataclasses.replace(here, spec=spec)
    assert kernels.takes_content(here)
    for rows in (all_rows(here), slice(2, 3)):
        mine, want = kernels.content(here)(rows), SELECTORS["content"](here)(rows)
        kept = torch.logical_or(*here.mask(rows))  # others are not written
        assert want.isfinite().all() and torch.allclose(mine.where(kept, 0.0), want, atol=1e-5)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    ("causal", {}), ("window", {"density": 0.1}), ("offset", {"mass": 0.6}), ("full", {"mass": 0.9}),
    ("causal", {"sink_blocks": 0, "local_blocks": 1}), ("full", {"shared": True}),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "settings"), SETTINGS)
def test_choice_by_kernels(mask: str, settings: dict[str, Any]) -> None:
    """By numbers and, where scores don't depend on them, by flags."""
    kernels = pytest.importorskip("kp_compiler.lowering.triton.selection")
    selectors = ["content"] if "mass" in settings else ["content", "structured"]
    for selector in selectors:
        here = site(selector, mask, 200, 200, (2, 1), batch=1, **settings)
        ones = [here]
        if selector == "structured":
            ones.append(dataclasses.replace(here, forms=None, flags=here.mask(all_rows(here))))
        for one in ones:
            mine = kernels.choose(one, SELECTORS[selector](one), 50)
            want = lists.by_query(one)
            for a, b in zip(mine.tensors()[:3], want.tensors()[:3], strict=True):
                assert torch.equal(a, b)
            assert torch.equal(mine.visited(one.blocks), want.visited(one.blocks))


def test_ties_by_kernels() -> None:
    kernels = pytest.importorskip("kp_compiler.lowering.triton.selection")
    here = site(queries=260, keys=260, heads=(2, 1))
    scores = torch.randint(0, 3, (2, 2, here.rows, here.blocks)).float()
    scores[0, 0, :, 5] = float("nan")
    kept = torch.logical_or(*here.mask(all_rows(here))).expand_as(scores)
    want = choose.chosen(here.sparse, scores, kept, choose.forced(here, all_rows(here), kept))
    mine = kernels.choose(here, lambda rows: scores[:, :, rows], 2**20)
    assert torch.equal(mine.visited(here.blocks) > 0, want)
