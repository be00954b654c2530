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
from kp_compiler.target import detect

ROWS = 16  # blocks of queries of a program: 64 samples
STEP = 64  # blocks whose shares are made at a time
STAGES = 3


@triton.jit
def _sums(top, total, begin, end, query, keys, logs, sample, q_at, T, KP, scale, cap, sharp, rest0, rest1,
          rest2, D: tl.constexpr, WIDTH: tl.constexpr, MANY: tl.constexpr, WIDE: tl.constexpr,
          PER: tl.constexpr, PAIR: tl.constexpr, Q0: tl.constexpr, K0: tl.constexpr, Q1: tl.constexpr,
          K1: tl.constexpr, Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr, CAP: tl.constexpr,
          MASKED: tl.constexpr):  # fmt: skip
    """The logarithm of each sample's sum over each block from `begin` to `end`, WIDE of them at a time, in
    exponents of two, to `logs`; and over all of them, as maximum and sum."""
    column = tl.arange(0, WIDTH)
    for start in range(begin, end, WIDE):
        pair = start * PER + tl.arange(0, WIDE * PER)
        there = (column < D)[None, :]
        if MASKED:
            there = there & (pair < KP)[:, None]
        key = tl.load(keys + pair[:, None] * D + column[None, :], mask=there, other=0.0)
        s = products(query, key, scale, cap, sharp, CAP)
        if MASKED:
            first = (pair * PAIR)[None, :]
            last = tl.minimum(first + PAIR, T) - 1
            some, _ = kept(q_at[:, None], q_at[:, None], first, last, rest0, rest1, rest2, Q0, K0, Q1, K1, Q2,
                           K2, FORMS)  # fmt: skip
            s = tl.where((pair < KP)[None, :] & some, s, float("-inf"))
        s = tl.reshape(s, [MANY, WIDE, PER])
        most = tl.max(s, 2)
        base = tl.where(most == float("-inf"), 0.0, most)
        here = base + tl.log2(tl.sum(tl.exp2(s - base[:, :, None]), 2))
        tl.store(logs + (start + tl.arange(0, WIDE))[None, :] * MANY + sample[:, None], here)
        above = tl.maximum(top, tl.max(here, 1))
        base = tl.where(above == float("-inf"), 0.0, above)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(here - base[:, None]), 1)
        top = above
    return top, total


@triton.jit(do_not_specialize=["S", "T", "KP", "FIRST", "COUNT", "BLOCKS", "rest0", "rest1", "rest2"])
def _shares(q, k, logs, out, q_b, q_h, q_s, H, GROUP, S, T, KP, FIRST, COUNT, BLOCKS, scale, cap, sharp,
            rest0, rest1, rest2, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
            WIDE: tl.constexpr, SAMPLES: tl.constexpr, SIZE: tl.constexpr, PAIR: tl.constexpr,
            STEP: tl.constexpr, Q0: tl.constexpr, K0: tl.constexpr, Q1: tl.constexpr, K1: tl.constexpr,
            Q2: tl.constexpr, K2: tl.constexpr, FORMS: tl.constexpr, CAP: tl.constexpr):  # fmt: skip
    """Shares [pairs,COUNT,BLOCKS] of rows of blocks from FIRST on, of q [B,H,S,D] and pairs of keys k [pairs
    of key heads,KP,D]; `logs` [programs,BLOCKS + 2 WIDE,ROWS·SAMPLES] is room. Blocks that the forms leave no
    pair of may not be written. The last rows, which have most to do, come first."""
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
    # WIDE blocks at a time: from `begin` on with the mask, from `low` on without, from `high` on with it
    begin, end = begin // SIZE, tl.maximum((end + SIZE - 1) // SIZE, begin // SIZE)
    masked = tl.maximum(low - begin * SIZE + SIZE * WIDE - 1, 0) // (SIZE * WIDE) * WIDE
    low = tl.minimum(begin + masked, end)
    high = low + tl.maximum(tl.minimum(high // SIZE, end) - low, 0) // WIDE * WIDE
    line = logs + tl.program_id(0).to(tl.int64) * (BLOCKS + 2 * WIDE) * ROWS * SAMPLES
    top = tl.full([ROWS * SAMPLES], float("-inf"), tl.float32)
    total = tl.zeros([ROWS * SAMPLES], tl.float32)
    for PHASE in tl.static_range(3):
        start, stop = phase(begin, low, high, end, PHASE)
        top, total = _sums(top, total, start, stop, query, keys, line, sample, q_at, T, KP, scale, cap, sharp,
                           rest0, rest1, rest2, D, WIDTH, ROWS * SAMPLES, WIDE, SIZE // PAIR, PAIR, Q0, K0,
                           Q1, K1, Q2, K2, FORMS, CAP, PHASE != 1)  # fmt: skip
    tl.debug_barrier()  # other threads read what these have written
    some = total > 0.0
    base = tl.where(some, top + tl.log2(total), float("inf"))  # samples without a key have no share
    alive = tl.sum(tl.reshape(some.to(tl.float32), [ROWS, SAMPLES]), 1)
    row = tile * ROWS + tl.arange(0, ROWS)
    for start in range(begin, end, STEP):
        block = start + tl.arange(0, STEP)
        there = line + block[:, None] * (ROWS * SAMPLES) + sample[None, :]
        mine = tl.load(there, mask=(block < end)[:, None], other=float("-inf"))
        share = tl.sum(tl.reshape(tl.exp2(mine - base[None, :]), [STEP, ROWS, SAMPLES]), 2)
        share = tl.trans(share / tl.maximum(alive, 1.0)[None, :])
        found = out + (pair * COUNT + row)[:, None] * BLOCKS + block[None, :]
        tl.store(found, share, mask=(row < COUNT)[:, None] & (block < end)[None, :])


def _wide(site: Site) -> int:
    """Blocks of keys of a step: two where their tiles fit into shared memory. Choosing a tenth of the blocks,
    32 heads for 8 of keys, D128, 32k and 128k tokens: 0.32 and 4.5 ms with two, 0.35 and 4.9 with one; with
    128 samples a program 0.39 and 5.5 (H100, 2026-11-27)."""
    keys = 2 * site.sparse.block // PAIR * STAGES
    row = max(16, triton.next_power_of_2(site.q.shape[3])) * site.q.element_size()
    return 2 if (ROWS * SAMPLES + keys) * row <= detect(site.q.device).shared_memory else 1


def scorer(site: Site) -> Callable[[slice], Tensor]:
    """As `selection.sampled.scorer`."""
    q, k = site.q, means(site.k, PAIR)
    batch, heads, length, width = q.shape
    mask, cap, wide = mask_of(site), site.spec.softcap, _wide(site)

    def score(rows: slice) -> Tensor:
        count = rows.stop - rows.start
        programs = -(-count // ROWS) * batch * heads
        out = torch.empty(batch, heads, count, site.blocks, dtype=torch.float32, device=q.device)
        room = site.blocks + 2 * wide
        logs = torch.empty(programs, room, ROWS * SAMPLES, dtype=torch.float32, device=q.device)
        with torch.cuda.device_of(q):
            _shares[(programs,)](
                q, k, logs, out, *q.stride()[:3], heads, site.group, length, site.k.shape[2], k.shape[2],
                rows.start, count, site.blocks, site.spec.scale, cap or 1.0, sharper(site), D=width,
                WIDTH=max(16, triton.next_power_of_2(width)), ROWS=ROWS, WIDE=wide, SAMPLES=SAMPLES,
                SIZE=site.sparse.block, PAIR=PAIR, STEP=STEP, CAP=cap is not None,
                num_stages=STAGES, **mask,
            )  # fmt: skip
        return out

    return score
