"""The scales of delayed scaling, in one kernel: what torch would take fifteen small ones for, before every
step (on one H100's host, 2026-11-26: 0.42 ms of a linear layer's 1.5)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kp_compiler.lowering.fp8.state import UNSEEN


def update(
    seen: Tensor,
    history: Tensor,
    entry: int,
    scale: Tensor,
    overflows: Tensor,
    limits: Tensor,
    guess: Tensor,
    headroom: float,
) -> Tensor:
    """Take in the largest magnitudes `seen` [sites,3,4] (the first of each line), as row `entry` of `history`
    [steps,sites,3], whose number stays where there is none; they are none afterwards. Count in `overflows`
    [sites,3] what was not finite or more than `scale` [sites,3] held. Then write the next scales there:
    `limits` [3] over `headroom` times the largest magnitude of the history, or over `guess` [3] where it has
    none. Returns scales and their inverses, [sites,6,4], each as a line of four."""
    steps, sites, roles = history.shape
    lines = torch.empty(sites, 2 * roles, seen.shape[2], device=seen.device)
    _update[(sites, roles)](
        seen, history, scale, overflows, limits, guess, lines, entry, steps, headroom,
        ROLES=roles, LINE=seen.shape[2], STEPS=triton.next_power_of_2(steps), NONE=UNSEEN, num_warps=4,
    )  # fmt: skip
    return lines


@triton.jit(do_not_specialize=["entry"])
def _update(
    seen, history, scale, overflows, limits, guess, lines, entry, steps, headroom,
    ROLES: tl.constexpr, LINE: tl.constexpr, STEPS: tl.constexpr, NONE: tl.constexpr,
):  # fmt: skip
    role, place = tl.program_id(1), tl.program_id(0) * ROLES + tl.program_id(1)
    width = tl.num_programs(0) * ROLES
    top, limit = tl.load(seen + place * LINE), tl.load(limits + role)
    held = top * tl.load(scale + place) <= limit  # false for NaN
    tl.store(seen + place * LINE, NONE)
    top = tl.where(top == NONE, tl.load(history + entry * width + place), top)
    tl.store(overflows + place, tl.load(overflows + place) + tl.where(held, 0, 1))
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)
    step = tl.arange(0, STEPS)
    past = tl.load(history + step * width + place, mask=(step < steps) & (step != entry), other=0.0)
    tl.store(history + entry * width + place, top)
    largest = tl.maximum(tl.max(past), top)
    fresh = limit / tl.where(largest > 2.0**-100, largest * headroom, tl.load(guess + role))
    tl.store(scale + place, fresh)
    line = lines + (tl.program_id(0) * 2 * ROLES + role) * LINE + tl.arange(0, LINE)
    tl.store(line, fresh + tl.zeros([LINE], tl.float32))
    tl.store(line + ROLES * LINE, 1.0 / fresh + tl.zeros([LINE], tl.float32))
