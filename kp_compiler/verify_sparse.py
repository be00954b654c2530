"""`verify` for sites that compute chosen blocks only: the kernels against float64 over the same blocks.

A site runs at its own sizes with random inputs. What it gives for some sampled queries is held against those
rows in float64 over the blocks that were chosen in that run, and so are the gradients that these rows send
to q, k and v. How far these blocks are from all of them is said beside it, for random inputs, where no block
holds more than others; `kp.calibrate` measures it on a model's own.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from kp_compiler.lowering import attend, reference
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.selection import measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.passes.base import Context, Emitter, Match
from kp_compiler.report import Rejection
from kp_compiler.runtime import provided_input, providers
from kp_compiler.specs import AttentionSpec
from kp_compiler.verify import (
    SLACK,
    TOLERANCE,
    Verdict,
    extract,
    forked,
    not_checked,
    random_value,
    relative_error,
)

NAMES = ("out", "grad q", "grad k", "grad v")


def verify_sparse(site: Node, match: Match, ctx: Context) -> Verdict:
    """Check one site that the attention pass is about to lower."""
    implementation, spec, shape = match.data
    skipped = not_checked((shape.batch, shape.heads, measure.SAMPLES, shape.keys), ctx)
    if skipped is not None:
        return skipped
    graph, originals, copied = extract(site)
    lowered = implementation.emit(Emitter(copied, copied), copied, spec, shape)
    kernel = next((node for node in graph.nodes if node.target is attend.attend()), None)
    lists = () if kernel is None else tuple(kernel.args[5][:4])
    graph.output_node().args = ((lowered, lists, tuple(copied.args[:5])),)
    with forked(originals), torch.set_grad_enabled(shape.training):
        leaves = [_leaf(_value(node, ctx), shape.training) for node in originals]
        return _verdict(spec, *GraphModule(torch.nn.Module(), graph)(*leaves))


def _value(node: Node, ctx: Context) -> Any:
    """What a provider has, which chooses the blocks, else something random."""
    if node.target is not provided_input:
        return random_value(node)
    number, index = node.args
    return providers(ctx.gm)[number].tensors(())[index]  # type: ignore[index]


def _leaf(x: Any, training: bool) -> Any:
    return x.requires_grad_() if training and isinstance(x, Tensor) and x.is_floating_point() else x


def _verdict(spec: AttentionSpec, out: Tensor, lists: tuple[Tensor, ...], arguments: Any) -> Verdict:
    q, k, v, operands, scalars = arguments
    assert spec.sparse is not None
    site = Site(spec, spec.sparse, q.detach(), k.detach(), scalars, None)
    rows = measure.rows(site)
    if lists:
        blocks = measure.sampled(site, Lists(*lists))
        pairs = blocks.repeat_interleave(spec.sparse.block, 3)[..., : k.shape[2]]
    else:
        pairs = reference.chosen_pairs(q, k, v, operands, scalars, spec)[:, :, rows]
    mine = _results(out[:, :, rows], (q, k, v))
    exact, plain, dense = (
        _over(spec, arguments, rows, chosen, dtype)
        for chosen, dtype in ((pairs, torch.float64), (pairs, q.dtype), (None, torch.float64))
    )
    text, failure = [], None
    for name, got, want, usual in zip(NAMES, mine, exact, plain, strict=False):
        error, theirs = relative_error(got, want), relative_error(usual, want)
        allowed = TOLERANCE * theirs + SLACK * torch.finfo(got.dtype).eps
        text.append(f"{name} {error:.1e} (eager {theirs:.1e})")
        if failure is None and not error <= allowed:
            sentence = f"The replacement's {name} is {error:.1e} off float64, {allowed:.1e} allowed."
            failure = Rejection("verify-failed", sentence)
    far = f"; {relative_error(exact[0], dense[0]):.2f} from all blocks, on random inputs"
    return Verdict(("failed: " if failure else "ok: ") + ", ".join(text) + far, failure)


def _over(
    spec: AttentionSpec, arguments: Any, rows: Tensor, chosen: Tensor | None, dtype: torch.dtype
) -> list[Tensor]:
    """Those rows by the reference, over some pairs [B,H,n,T]."""
    q, k, v, operands, scalars = arguments
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in (q, k, v)]
    whole = dataclasses.replace(spec, sparse=None)
    out = reference.attention_over(q[:, :, rows], k, v, operands, scalars, whole, chosen, rows)
    return _results(out, leaves)


def _results(out: Tensor, leaves: Any) -> list[Tensor]:
    """`out` and, where there are any, the gradients of `leaves`."""
    if not out.requires_grad:
        return [out]
    weights = torch.linspace(0.5, 1.5, out.numel(), device=out.device, dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad(out, leaves, weights.to(out.dtype), allow_unused=True)
    return [
        out.detach(),
        *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)),
    ]
