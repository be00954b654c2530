"""Which blocks of pairs attention computes, chosen from q and k when it runs.

    scorer = SELECTORS[name](site)      one file for each selector
    scorer(rows) ─▶ [B,H,rows,blocks]   what the blocks of some rows of blocks are worth, in float32
    choose.py                           the ones that fit a budget, or hold a share of the probabilities
    lists.py                            as lists for the kernels, rows at a time: nothing of N²/128² elements

Nothing waits for the device. Every selector is plain PyTorch; it is the meaning of what kernels do faster.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from kp_compiler.lowering.selection import content, learned, random, structured, vertical_slash
from kp_compiler.lowering.selection.site import Site

Scorer = Callable[[slice], Tensor]

SELECTORS: dict[str, Callable[[Site], Scorer]] = {
    "content": content.scorer,
    "vertical_slash": vertical_slash.scorer,
    "learned": learned.scorer,
    "structured": structured.scorer,
    "random": random.scorer,
}
ESTIMATING = ("content", "vertical_slash", "learned")  # those whose scores are shares of the probabilities
