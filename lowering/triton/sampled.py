"""Kernels for `selection.sampled`: shares of blocks by sampled queries, without their memory.

    pairs     means of two rows of k, one pass over it
    shares    scores of samples and pairs by tensor cores, once: of each block and sample the logarithm of the
              sum is kept, and read back when that of the row is known

Blocks of keys that lie outside of what a program's queries see are not visited.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from kp_compiler.lowering.selection.sampled import PAIR, SAMPLES, sharper
from kp_compiler.lowering.selection.site import Site
from kp_compiler.lowering.triton.selection import kept, mask_of, means, phase, products, spans

ROWS = 16  # blocks of queries of a program: 64 samples
STEP = 64  # blocks whose shares are made at a time


@triton.jit
def _sums(top, total, begin, end, query, keys, logs, q_at, T, KP, scale, cap, sharp, rest0, rest1, rest2,
          D: tl.constexpr, WIDTH: tl.constexpr, PER: tl.constexpr, PAIR: tl.constexpr, Q0: tl.constexpr,
          K0: tl.constexpr, Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr,
          FORMS: tl.constexpr, CAP: tl.constexpr, MASKED: tl.constexpr):  # fmt: skip
    """The logarithm of each sample's sum over each block from `begin` to `end`, in exponents of two, to
    `logs`; and over all of them, as maximum and sum."""
    column = tl.arange(0, WIDTH)
    for block in range(begin, end):
        pair = block * PER + tl.arange(0, PER)
        there = (column < D)[None, :]
        if MASKED:
            there = there & (pair < KP)[:, None]
        key = tl.load(keys + pair[:, None] * D + column[None, :], mask=there, other=0.0)
        s = products(query, key, scale, cap, CAP) * sharp
        if MASKED:
            first = (pair * PAIR)[None, :]
            last = tl.minimum(first + PAIR, T) - 1
            some, _ = kept(q_at[:, None], q_at[:, None], first, last, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2,
                           K2, FORMS)  # fmt: skip
            s = tl.where((pair < KP)[None, :] & some, s, float("-inf"))
        most = tl.max(s, 1)
        base = tl.where(most == float("-inf"), 0.0, most)
        here = base + tl.log2(tl.sum(tl.exp2(s - base[:, None]), 1))
        tl.store(logs + block, here)
        above = tl.maximum(top, here)
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - base) + tl.exp2(here - base)
        top = above
    return top, total


@triton.jit(do_not_specialize=["S", "T", "KP", "FIRST", "COUNT", "BLOCKS", "rest0", "rest1", "rest2"])
def _shares(q, k, logs, out, q_b, q_h, q_s, H, GROUP, S, T, KP, FIRST, COUNT, BLOCKS, scale, cap, sharp,
            rest0, rest1, rest2, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            SAMPLES: tl.constexpr, SIZE: tl.constexpr, PAIR: tl.constexpr, STEP: tl.constexpr,
            Q0: tl.constexpr, K0: tl.constexpr,
            Q1: tl.constexpr, K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr,
            CAP: tl.constexpr):  # fmt: skip
    """Shares [pairs,COUNT,BLOCKS] of rows of blocks from FIRST on, of q [B,H,S,D] and pairs of keys k [pairs
    of key heads,KP,D]; `logs` [programs,ROWS·SAMPLES,BLOCKS] is room. Blocks that the forms leave no pair of
    may not be written. The last rows, which have most to do, come first."""
    tiles = (COUNT + ROWS - 1) // ROWS
    pairs = tl.num_programs(0) // tiles
    tile, pair = tiles - 1 - tl.program_id(0) // pairs, (tl.program_id(0) % pairs).to(tl.int64)
    keys = k + (pair // H * (H // GROUP) + pair % H // GROUP) * KP * D
    column, sample = tl.arange(0, WIDTH), tl.arange(0, ROWS * SAMPLES)
    q_row = FIRST + tile * ROWS
    q_at = (q_row + sample // SAMPLES) * SIZE + sample % SAMPLES * (SIZE - 1) // (SAMPLES - 1)
    q_at = tl.minimum(q_at, S - 1)
    place = q + pair // H * q_b + pair % H * q_h + q_at.to(tl.int64)[:, None] * q_s + column[None, :]
    query = tl.load(place, mask=(column < D)[None, :], other=0.0)
    q_first, q_last = tl.minimum(q_row * SIZE, S - 1), tl.minimum((q_row + ROWS) * SIZE, S) - 1
    begin, end, low, high = spans(q_first, q_last, T, SIZE, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2, K2,
                                  FORMS)  # fmt: skip
    # blocks: from `begin` on with the mask, from `low` on without, from `high` to `end` with it
    begin, end = begin // SIZE, tl.maximum((end + SIZE - 1) // SIZE, begin // SIZE)
    low = tl.maximum(tl.minimum((low + SIZE - 1) // SIZE, end), begin)
    high = tl.maximum(tl.minimum(high // SIZE, end), low)
    line = logs + (tl.program_id(0).to(tl.int64) * ROWS * SAMPLES + sample) * BLOCKS
    top = tl.full([ROWS * SAMPLES], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * SAMPLES], tl.float32)
    for PHASE in tl.static_range(3):
        start, stop = phase(begin, low, high, end, PHASE)
        top, total = _sums(top, total, start, stop, query, keys, line, q_at, T, KP, scale, cap, sharp, rest0,
                           rest1, rest2, D, WIDTH, SIZE // PAIR, PAIR, Q0, K0, Q1, K1, Q2, K2, FORMS, CAP,
                           PHASE != 1)  # fmt: skip
    tl.debug_barrier()  # other threads read what these have written
    some = total > 0.0
    base = tl.where(some, top + tl.log2(total), float("inf"))  # samples without a key have no share
    alive = tl.sum(tl.reshape(some.to(tl.float32), [ROWS, SAMPLES]), 1)
    row = tile * ROWS + tl.arange(0, ROWS)
    for start in range(begin, end, STEP):
        block = start + tl.arange(0, STEP)
        mine = tl.load(line[:, None] + block[None, :], mask=(block < end)[None, :], other=float("-inf"))
        share = tl.sum(tl.reshape(tl.exp2(mine - base[:, None]), [ROWS, SAMPLES, STEP]), 1)
        share = share / tl.maximum(alive, 1.0)[:, None]
        found = out + (pair * COUNT + row)[:, None] * BLOCKS + block[None, :]
        tl.store(found, share, mask=(row < COUNT)[:, None] & (block < end)[None, :])


def scorer(site: Site) -> Callable[[slice], Tensor]:
    """As `selection.sampled.scorer`."""
    q, k = site.q, means(site.k, PAIR)
    batch, heads, length, width = q.shape
    mask, cap = mask_of(site), site.spec.softcap

    def score(rows: slice) -> Tensor:
        count = rows.stop - rows.start
        programs = -(-count // ROWS) * batch * heads
        out = torch.empty(batch, heads, count, site.blocks, dtype=torch.float32, device=q.device)
        logs = torch.empty(programs, ROWS * SAMPLES, site.blocks, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            _shares[(programs,)](
                q, k, logs, out, *q.stride()[:3], heads, site.group, length, site.k.shape[2], k.shape[2],
                rows.start, count, site.blocks, site.spec.scale, cap or 1.0, sharper(site), D=width,
                WIDTH=max(16, triton.next_power_of_2(width)), ROWS=ROWS, SAMPLES=SAMPLES,
                SIZE=site.sparse.block, PAIR=PAIR, STEP=STEP, CAP=cap is not None, **mask,
            )  # fmt: skip
        return out

    return score
