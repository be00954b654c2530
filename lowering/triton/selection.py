"""Kernels for choosing blocks: what `selection.content` and `selection.choose` say, without their memory.

    parts     means of 16 rows of q and k, one pass over both
    shares    scores of parts by tensor cores, twice: for each row's maximum and sum, then for the shares of
              blocks; nothing but these is written
    choose    one program a row: a budget's threshold by bisection over the bits of its scores, then indices

A mask of inequalities comes as numbers: slopes along q and k, and the rest of each form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection.choose import UNIT, capacity, density
from kp_compiler.lowering.selection.content import PART
from kp_compiler.lowering.selection.site import Site

LARGEST = 2**13  # blocks of a row that a program holds
_ROWS = 8  # blocks of queries of a program of `shares`


@triton.jit(do_not_specialize=["PAIRS", "N", "P"])
def _mean(x, out, x_b, x_h, x_s, H, PAIRS, N, P, D: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr,
          TILE: tl.constexpr):  # fmt: skip
    tile, pair = tl.program_id(0) // PAIRS, (tl.program_id(0) % PAIRS).to(tl.int64)  # heads lie side by side
    x += pair // H * x_b + pair % H * x_h
    part, column = tile * TILE + tl.arange(0, TILE), tl.arange(0, WIDTH)
    total = tl.zeros([TILE, WIDTH], tl.float32)
    for i in tl.static_range(PART):
        row = part * PART + i
        there = (row < N)[:, None] & (column < D)[None, :]
        place = row.to(tl.int64)[:, None] * x_s + column[None, :]
        total += tl.load(x + place, mask=there, other=0.0).to(tl.float32)
    count = tl.minimum(tl.maximum(N - part * PART, 1), PART).to(tl.float32)
    place = out + (pair * P + part)[:, None] * D + column[None, :]
    mean = (total / count[:, None]).to(out.dtype.element_ty)
    tl.store(place, mean, mask=(part < P)[:, None] & (column < D)[None, :])


@triton.jit
def _least(first, last, SLOPE: tl.constexpr):
    """The smallest of SLOPE·x for x from first to last."""
    if SLOPE >= 0:
        return SLOPE * first
    return SLOPE * last


@triton.jit
def _range(q_first, q_last, k_first, k_last, rest, SQ: tl.constexpr, SK: tl.constexpr):
    least = _least(q_first, q_last, SQ) + _least(k_first, k_last, SK) + rest
    most = -(_least(q_first, q_last, -SQ) + _least(k_first, k_last, -SK)) + rest
    return least <= 0, most <= 0


@triton.jit
def kept(q_first, q_last, k_first, k_last, rest0, rest1, rest2, Q0: tl.constexpr, K0: tl.constexpr,
          Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
          FORMS: tl.constexpr):  # fmt: skip
    """Whether the forms keep some pair of a block, and whether all."""
    some = q_first + k_first >= 0
    every = some
    if FORMS > 0:
        can, must = _range(q_first, q_last, k_first, k_last, rest0, Q0, K0)
        some, every = some & can, every & must
    if FORMS > 1:
        can, must = _range(q_first, q_last, k_first, k_last, rest1, Q1, K1)
        some, every = some & can, every & must
    if FORMS > 2:
        can, must = _range(q_first, q_last, k_first, k_last, rest2, Q2, K2)
        some, every = some & can, every & must
    return some, every


@triton.jit
def _span(q_first, q_last, begin, end, rest, SQ: tl.constexpr, SK: tl.constexpr):
    """The keys from `begin` to `end` that a form can keep for some of the queries, and perhaps some more."""
    reach = -rest - _least(q_first, q_last, SQ)  # SK·k is at most this
    if SK > 0:
        end = tl.minimum(end, reach // SK + 1)
    if SK < 0:
        begin = tl.maximum(begin, -reach // -SK)
    return begin, end


@triton.jit
def _whole(q_first, q_last, begin, end, rest, SQ: tl.constexpr, SK: tl.constexpr):
    """The keys from `begin` to `end` that a form keeps for all of the queries, or some fewer."""
    reach = -rest + _least(q_first, q_last, -SQ)  # SK·k has to be at most this
    if SK > 0:
        end = tl.where(reach < 0, begin, tl.minimum(end, reach // SK + 1))
    if SK < 0:
        begin = tl.where(reach < 0, tl.maximum(begin, (-reach - SK - 1) // -SK), begin)
    if SK == 0:
        end = tl.where(reach < 0, begin, end)
    return begin, end


@triton.jit
def spans(q_first, q_last, T, SIZE, rest0, rest1, rest2, Q0: tl.constexpr, K0: tl.constexpr,
          Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
          FORMS: tl.constexpr):  # fmt: skip
    """The keys that the forms can keep for some of the queries, and, in whole groups of SIZE, the ones that
    they keep for all."""
    begin, end, low, high = 0, T, 0, T // SIZE * SIZE
    if FORMS > 0:
        begin, end = _span(q_first, q_last, begin, end, rest0, Q0, K0)
        low, high = _whole(q_first, q_last, low, high, rest0, Q0, K0)
    if FORMS > 1:
        begin, end = _span(q_first, q_last, begin, end, rest1, Q1, K1)
        low, high = _whole(q_first, q_last, low, high, rest1, Q1, K1)
    if FORMS > 2:
        begin, end = _span(q_first, q_last, begin, end, rest2, Q2, K2)
        low, high = _whole(q_first, q_last, low, high, rest2, Q2, K2)
    return begin, end, low, high


@triton.jit
def products(query, key, scale, cap, sharp, CAP: tl.constexpr):
    """Scores of rows of q and of k, `sharp` of them, in exponents of two."""
    s = tl.dot(query, tl.trans(key), input_precision="ieee")
    if CAP:
        s = cap * (1.0 - 2.0 / (tl.exp2(s * (scale * 2.8853900817779268 / cap)) + 1.0))
        return s * (sharp * 1.4426950408889634)
    else:
        return s * (scale * sharp * 1.4426950408889634)


@triton.jit
def _scored(query, keys, start, q_part, S, T, PARTS, scale, cap, rest0, rest1, rest2, D: tl.constexpr,
            WIDTH: tl.constexpr, INNER: tl.constexpr, PART: tl.constexpr, Q0: tl.constexpr,
            K0: tl.constexpr, Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
            FORMS: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Scores [rows,INNER] of parts in exponents of two, −∞ where the mask keeps no pair."""
    column = tl.arange(0, WIDTH)
    part = start + tl.arange(0, INNER)
    there = (column < D)[None, :]
    if MASKED:
        there = there & (part < PARTS)[:, None]
    key = tl.load(keys + part[:, None] * D + column[None, :], mask=there, other=0.0)
    s = products(query, key, scale, cap, 1.0, CAP)
    if MASKED:
        q_first, k_first = (q_part * PART)[:, None], (part * PART)[None, :]
        q_last, k_last = tl.minimum(q_first + PART, S) - 1, tl.minimum(k_first + PART, T) - 1
        some, _ = kept(q_first, q_last, k_first, k_last, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2, K2, FORMS)
        keep = (q_part * PART < S)[:, None] & (part < PARTS)[None, :] & some
        s = tl.where(keep, s, float("-inf"))
    return s


@triton.jit
def phase(begin, low, high, end, PHASE: tl.constexpr):
    """The parts of a row, in this order: some that need the mask, those that don't, some that do."""
    if PHASE == 0:
        return begin, low
    elif PHASE == 1:
        return low, high
    else:
        return high, end


@triton.jit
def _total(top, total, begin, end, query, keys, q_part, S, T, KP, scale, cap, rest0, rest1, rest2,
           D: tl.constexpr, WIDTH: tl.constexpr, INNER: tl.constexpr, PART: tl.constexpr, Q0: tl.constexpr,
           K0: tl.constexpr, Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
           FORMS: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """Maximum and sum of each row, with the parts from `begin` to `end`."""
    for start in range(begin, end, INNER):
        s = _scored(query, keys, start, q_part, S, T, KP, scale, cap, rest0, rest1, rest2, D, WIDTH, INNER,
                    PART, Q0, K0, Q1, K1, Q2, K2, FORMS, CAP, MASKED)  # fmt: skip
        above = tl.maximum(top, tl.max(s, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(s - base[:, None]), 1)
        top = above
    return top, total


@triton.jit
def _write(base, weight, begin, end, place, BLOCKS, inside, query, keys, q_part, S, T, KP, scale, cap, rest0,
           rest1, rest2, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PER: tl.constexpr,
           INNER: tl.constexpr, PART: tl.constexpr, Q0: tl.constexpr, K0: tl.constexpr, Q1: tl.constexpr,
           K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr, CAP: tl.constexpr,
           MASKED: tl.constexpr):  # fmt: skip
    """Shares of the blocks of the parts from `begin` to `end`."""
    for start in range(begin, end, INNER):
        s = _scored(query, keys, start, q_part, S, T, KP, scale, cap, rest0, rest1, rest2, D, WIDTH, INNER,
                    PART, Q0, K0, Q1, K1, Q2, K2, FORMS, CAP, MASKED)  # fmt: skip
        by_block = tl.sum(tl.reshape(tl.exp2(s - base[:, None]), [ROWS * PER, INNER // PER, PER]), 2)
        share = tl.sum(tl.reshape(by_block, [ROWS, PER, INNER // PER]), 1) * weight[:, None]
        block = start // PER + tl.arange(0, INNER // PER)
        tl.store(place + block[None, :], share, mask=inside[:, None] & (block < BLOCKS)[None, :])


@triton.jit(do_not_specialize=["S", "T", "QP", "KP", "FIRST", "COUNT", "BLOCKS", "rest0", "rest1", "rest2"])
def _shares(q, k, out, H, GROUP, S, T, QP, KP, FIRST, COUNT, BLOCKS, scale, cap, rest0, rest1, rest2,
            D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, PER: tl.constexpr,
            INNER: tl.constexpr, PART: tl.constexpr, Q0: tl.constexpr, K0: tl.constexpr,
            Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr,
            CAP: tl.constexpr):  # fmt: skip
    """Shares [pairs,COUNT,BLOCKS] of rows of blocks from FIRST on, from parts q [pairs,QP,D], k [pairs of
    key heads,KP,D]. Blocks that the forms leave no pair of are not written. The last rows, which have most
    to do, come first."""
    tiles = (COUNT + ROWS - 1) // ROWS
    pairs = tl.num_programs(0) // tiles
    tile, pair = tiles - 1 - tl.program_id(0) // pairs, (tl.program_id(0) % pairs).to(tl.int64)
    keys = k + (pair // H * (H // GROUP) + pair % H // GROUP) * KP * D
    column = tl.arange(0, WIDTH)
    q_part = (FIRST + tile * ROWS) * PER + tl.arange(0, ROWS * PER)
    there = (q_part < QP)[:, None] & (column < D)[None, :]
    query = tl.load(q + (pair * QP + q_part)[:, None] * D + column[None, :], mask=there, other=0.0)
    q_first = (FIRST + tile * ROWS) * PER * PART
    q_last = tl.minimum(q_first + ROWS * PER * PART, S) - 1
    begin, end, low, high = spans(q_first, q_last, T, PART, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2, K2,
                                  FORMS)  # fmt: skip
    # steps of INNER parts: from `begin` on with the mask, from `low` on without, from `high` to `end` with it
    begin, end = begin // (INNER * PART) * INNER, (end + PART - 1) // PART
    low = tl.minimum((low + INNER * PART - 1) // (INNER * PART) * INNER, tl.maximum(end, begin))
    high = tl.maximum(high // (INNER * PART) * INNER, low)
    low = tl.maximum(low, begin)
    high = tl.maximum(high, low)
    top = tl.full([ROWS * PER], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * PER], tl.float32)
    for PHASE in tl.static_range(3):
        start, stop = phase(begin, low, high, end, PHASE)
        top, total = _total(top, total, start, stop, query, keys, q_part, S, T, KP, scale, cap, rest0, rest1,
                            rest2, D, WIDTH, INNER, PART, Q0, K0, Q1, K1, Q2, K2, FORMS, CAP,
                            PHASE != 1)  # fmt: skip
    some = (total > 0.0) & (q_part * PART < S)
    base = tl.where(some, top + tl.log2(total), float("inf"))  # rows without a key, or not there: no share
    alive = tl.sum(tl.reshape(some.to(tl.float32), [ROWS, PER]), 1)
    weight = 1.0 / tl.maximum(alive, 1.0)
    row = tile * ROWS + tl.arange(0, ROWS)
    place, inside = out + (pair * COUNT + row)[:, None] * BLOCKS, row < COUNT
    for PHASE in tl.static_range(3):
        start, stop = phase(begin, low, high, end, PHASE)
        _write(base, weight, start, stop, place, BLOCKS, inside, query, keys, q_part, S, T, KP, scale, cap,
               rest0, rest1, rest2, D, WIDTH, ROWS, PER, INNER, PART, Q0, K0, Q1, K1, Q2, K2, FORMS, CAP,
               PHASE != 1)  # fmt: skip


@triton.jit(do_not_specialize=["ROWS_ALL", "FIRST", "COUNT", "BLOCKS", "S", "T", "kind_b", "kind_h", "MOST",
                               "unit", "sinks", "local", "offset", "rest0", "rest1", "rest2"])  # fmt: skip
def _choose(scores, kinds, edges, count, blocks, ROWS_ALL, FIRST, COUNT, BLOCKS, S, T, kind_b, kind_h, H,
            MOST, unit, mass, sinks, local, offset, rest0, rest1, rest2, SIZE: tl.constexpr,
            WIDTH: tl.constexpr, Q0: tl.constexpr, K0: tl.constexpr, Q1: tl.constexpr, K1: tl.constexpr,
            Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr, FLAGS: tl.constexpr,
            MASS: tl.constexpr, UNIT: tl.constexpr):  # fmt: skip
    """Of a row of blocks: which, as indices, those first that the mask keeps partly."""
    row, pair = FIRST + tl.program_id(0) % COUNT, (tl.program_id(0) // COUNT).to(tl.int64)
    block = tl.arange(0, WIDTH)
    inside = block < BLOCKS
    if FLAGS:
        at = pair // H * kind_b + pair % H * kind_h + row.to(tl.int64) * BLOCKS
        kind = tl.load(kinds + at + block, mask=inside, other=0)
        maybe, surely = kind > 0, kind > 1
    else:
        q_first, k_first = row * SIZE, block * SIZE
        q_last, k_last = tl.minimum(q_first + SIZE, S) - 1, tl.minimum(k_first + SIZE, T) - 1
        some, every = kept(q_first, q_last, k_first, k_last, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2, K2,
                            FORMS)  # fmt: skip
        maybe, surely = inside & some, inside & every
    allowed = tl.sum(maybe.to(tl.int32), 0)
    before = tl.cumsum(maybe.to(tl.int32), 0)
    home, away = row * SIZE + offset, tl.minimum(row * SIZE + SIZE, S) - 1 + offset
    near = (block * SIZE + SIZE * local > home) & (block * SIZE <= away)
    must = maybe & ((before <= sinks) | near)
    value = tl.load(scores + (pair * COUNT + row - FIRST) * BLOCKS + block, mask=maybe, other=0.0)
    value = tl.where(value == value, value, 0.0)
    bits = value.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # in the order of the numbers
    free = maybe & (must == 0)
    least = tl.sum(must.to(tl.int32), 0)
    most = tl.maximum((allowed.to(tl.int64) * unit // UNIT).to(tl.int32), tl.maximum(least, 1)) - least
    share = tl.where(maybe, value, 0.0)
    missing = mass * tl.sum(share, 0) - tl.sum(tl.where(must, share, 0.0), 0)
    low, high = tl.min(tl.where(free, key, 0x7FFFFFFF), 0), tl.max(key, 0) + 1
    # the largest threshold at which there are enough: low has enough or nothing has, high has not
    for _ in range(33):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # their sum may be too large for int32
        above = free & (key >= middle)
        enough = tl.sum(above.to(tl.int32), 0) >= most
        if MASS:
            enough |= tl.sum(tl.where(above, share, 0.0), 0) >= missing
        low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
    above, tied = free & (key > low), free & (key == low)
    left = most - tl.sum(above.to(tl.int32), 0)
    ranks = tl.cumsum(tied.to(tl.int32), 0)
    take = tied & (ranks <= left)
    if MASS:
        held = tl.sum(tl.where(above, share, 0.0), 0)
        take &= held + (ranks - 1).to(tl.float32) * share < missing
    chosen = must | above | take
    partly, wholly = chosen & (surely == 0), chosen & surely
    edge = tl.sum(partly.to(tl.int32), 0)
    place = tl.where(partly, tl.cumsum(partly.to(tl.int32), 0), edge + tl.cumsum(wholly.to(tl.int32), 0)) - 1
    line = pair * ROWS_ALL + row
    tl.store(blocks + line * MOST + place, block, mask=chosen)
    tl.store(edges + line, edge)
    tl.store(count + line, tl.sum(chosen.to(tl.int32), 0))


def takes(site: Site) -> bool:
    """Whether these kernels choose for a site: rows that a program holds, forms that it is told."""
    return site.blocks <= LARGEST and (site.forms is None or len(site.forms) <= 3)


def takes_content(site: Site) -> bool:
    """Whether `content` is among them: samples, or parts by their means, under a mask of inequalities."""
    plain = site.sparse.estimate != "antidiagonal" and site.forms is not None
    return takes(site) and plain and site.q.stride(3) == site.k.stride(3) == 1 and site.q.shape[3] <= 256


def mask_of(site: Site) -> dict[str, Any]:
    """A mask's forms, by parameter name."""
    found: dict[str, Any] = {"FORMS": len(site.lines)}
    for i in range(3):
        slopes, rest = site.lines[i] if i < len(site.lines) else ((0, 0), 0)
        found |= {f"Q{i}": slopes[0], f"K{i}": slopes[1], f"rest{i}": rest}
    return found


def means(x: Tensor, part: int = PART) -> Tensor:
    """[B,H,N,D] to [B,H,parts,D] in x's dtype, of `part` rows each."""
    batch, heads, length, width = x.shape
    parts = -(-length // part)
    out = torch.empty(batch, heads, parts, width, dtype=x.dtype, device=x.device)
    tile = 128 // part
    with torch.cuda.device_of(x):
        _mean[(-(-parts // tile) * batch * heads,)](
            x, out, *x.stride()[:3], heads, batch * heads, length, parts, D=width,
            WIDTH=triton.next_power_of_2(width), PART=part, TILE=tile,
        )  # fmt: skip
    return out


def content(site: Site) -> Callable[[slice], Tensor]:
    """As `selection.content.scorer`."""
    if site.sparse.estimate == "sampled":
        from kp_compiler.lowering.triton import sampled  # which takes its tools from here

        return sampled.scorer(site)
    q, k = means(site.q), means(site.k)
    batch, heads, parts, width = q.shape
    mask, cap = mask_of(site), site.spec.softcap

    def score(rows: slice) -> Tensor:
        count = rows.stop - rows.start
        out = torch.empty(batch, heads, count, site.blocks, dtype=torch.float32, device=q.device)
        per = site.sparse.block // PART
        with torch.cuda.device_of(q):
            _shares[(-(-count // _ROWS) * batch * heads,)](
                q, k, out, heads, site.group, site.q.shape[2], site.k.shape[2], parts, k.shape[2], rows.start,
                count, site.blocks, site.spec.scale, cap or 1.0, D=width,
                WIDTH=max(16, triton.next_power_of_2(width)), ROWS=_ROWS, PER=per,
                INNER=_inner(per, width * q.element_size()), PART=PART, CAP=cap is not None, **mask,
            )  # fmt: skip
        return out

    return score


def _inner(per: int, width: int) -> int:
    """Parts of keys that a step takes, a power of two and whole blocks of `per`: of `width` bytes each, no
    more than 32 KiB."""
    return max(16, per, min(16 * per, triton.next_power_of_2(2**15 // width + 1) // 2))


def _warps(blocks: int) -> int:
    """Of a program that holds a row, 32 elements a thread or fewer: one warp needs no others to wait for in
    the 33 rounds of the bisection."""
    return min(16, max(1, blocks // 1024))


def choose(site: Site, scorer: Callable[[slice], Tensor], chunk: int) -> Lists:
    """As `selection.lists.by_query`, `chunk` scores at a time."""
    batch, heads = site.q.shape[0], site.choices
    sparse, mass, device = site.sparse, site.sparse.mass, site.q.device
    forms = mask_of(site)
    most = capacity(sparse, site.blocks)
    lines = (batch, heads, site.rows)
    edges, count = (torch.empty(lines, dtype=torch.int32, device=device) for _ in range(2))
    blocks = torch.zeros(*lines, most, dtype=torch.int32, device=device)
    kinds = edges
    if site.flags is not None:
        kinds = (site.flags[0].to(torch.int8) + 2 * site.flags[1].to(torch.int8)).contiguous()
    many = [0 if kinds.shape[dim] == 1 else kinds.stride(dim) for dim in (0, 1)]
    step, width = max(1, chunk // max(1, batch * heads * site.blocks)), triton.next_power_of_2(site.blocks)
    for first in range(0, site.rows, step):
        rows = slice(first, min(first + step, site.rows))
        scores = scorer(rows)
        if heads < scores.shape[1]:
            scores = scores.unflatten(1, (heads, -1)).mean(2)
        scores = scores.contiguous()
        size = rows.stop - first
        with torch.cuda.device_of(site.q):
            _choose[(size * batch * heads,)](
                scores, kinds, edges, count, blocks, site.rows, first, size, site.blocks, site.q.shape[2],
                site.k.shape[2], *many, heads, most, density(sparse), 1.0 if mass is None else mass,
                sparse.sink_blocks, sparse.local_blocks, site.offset, SIZE=sparse.block, WIDTH=width,
                FLAGS=site.forms is None, MASS=mass is not None, UNIT=UNIT, num_warps=_warps(width),
                **forms,
            )  # fmt: skip
    return Lists.even(edges, count, blocks)
