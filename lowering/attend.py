"""kp's own attention kernels as two operators with autograd: any proved mask, any score change, and the
log-sum-exp.

    kp.attention(q, k, v, operands, scalars, spec) ─▶ kp.attend(q, k, v, operands, scalars, blocks, …)[0]

Contracts only: `triton.attention` holds the kernels and is imported when an operator first runs. A forward
pass may go on from what an earlier one over other keys gave, (start_out, start_lse), and merges both without
another kernel. Gradients reach q, k, v, biases, sinks and what the pass started from, through out and lse.
"""

from __future__ import annotations

import json
import operator
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from kp_compiler.lowering import mask_render
from kp_compiler.lowering.attend_checks import (
    DTYPES,
    LARGEST_HEAD,
    check_lists,
    check_matrices,
    check_operands,
    check_start,
)
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.lowering.dead_rows import after_zeros, unkept
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.into import Into
from kp_compiler.lowering.ops import fragment
from kp_compiler.metadata import value_of
from kp_compiler.report import Rejection
from kp_compiler.specs import AttentionShape, AttentionSpec
from kp_compiler.target import Target, detect

_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor[] operands, SymInt[] scalars, Tensor[] blocks"
_FORWARD = (
    f"({_INPUTS}, Tensor? start_out, Tensor? start_lse, Tensor? seed, str plan) -> (Tensor out, Tensor lse)"
)
_BACKWARD = (
    f"(Tensor grad, Tensor? grad_lse, {_INPUTS}, Tensor? seed, Tensor out, Tensor lse, bool[] wanted,"
    " str plan) -> (Tensor dq, Tensor dk, Tensor dv, Tensor[] doperands)"  # wanted: of q, of k or v, operands
)


@dataclass(frozen=True)
class Plan:
    """What is known when a graph is compiled: the spec, and the numbers of queries and keys that a block of
    `blocks` has."""

    spec: AttentionSpec
    block: tuple[int, int] | None = None

    def to_json(self) -> str:
        data = {"spec": self.spec.to_json(), "block": self.block, "fingerprint": fingerprint()}
        return json.dumps(data, sort_keys=True)

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: str) -> Plan:
        data = json.loads(text)
        block = tuple(data["block"]) if data["block"] else None
        return Plan(AttentionSpec.from_json(data["spec"]), block)


# ------------------------------------------------------------------------------------------------------ table


def check(spec: AttentionSpec, shape: AttentionShape, target: Target) -> Rejection | None:
    if target.device == "cpu" and not (target.reference and target.has_triton):
        return Rejection("device", "kp's kernels need a CUDA device, or Triton's interpreter.")
    if target.device == "cuda" and (target.sm < 80 or not target.has_triton):
        return Rejection("device", "kp's kernels need compute capability 8.0 or newer, and Triton.")
    if shape.dtype not in DTYPES:
        return Rejection("dtype", f"kp's kernels take half and float32, this site is {shape.dtype}.")
    sizes = (shape.head_dim, shape.value_dim)
    if not all(isinstance(size, int) and size <= LARGEST_HEAD for size in sizes):
        return Rejection(
            "head-dim", f"kp's kernels go up to head size {LARGEST_HEAD}, known at compile time."
        )
    if statically_known_true(shape.queries == 1):
        return Rejection("decode", "A single query leaves most of the device idle in kp's kernels.")
    return mask_render.unreadable(spec) or unkept(spec, shape)


def on_hopper(spec: AttentionSpec, shape: AttentionShape | None, target: Target) -> bool:
    """Whether the Hopper kernels can be expected to run (`triton.hopper.takes` says it of tensors)."""
    if target.sm != 90 or spec.dropout_p:
        return False
    if shape is None:
        return True
    sizes = (shape.head_dim, shape.value_dim)
    if shape.dtype == torch.float32 or not all(isinstance(n, int) and n % 8 == 0 for n in sizes):
        return False
    return shape.value_dim <= shape.head_dim <= (128 if shape.training else LARGEST_HEAD)


def emit(emit: Any, node: Node, spec: AttentionSpec, shape: AttentionShape) -> Node:
    """q, k, v [B,H,S,D] to out [B,H,S,E]."""
    from kp_compiler.lowering.block_mask import BLOCK, visit_lists
    from kp_compiler.lowering.select import emit_lists

    blocks: list[Node] = []
    size = None
    if spec.sparse is not None:
        blocks, size = emit_lists(emit, node, spec, shape), spec.sparse.block
    elif mask_render.inequalities(spec.mask) is None:
        blocks, size = visit_lists(emit, node, spec), BLOCK
    seed = None
    if spec.dropout_p:
        device = value_of(node.args[0]).device
        seed = emit.call(torch.randint, 0, 2**62, (1,), dtype=torch.int64, device=device)
    block = None if size is None else (size, size)
    plan = Plan(replace(spec, sparse=None), block).to_json()
    both = emit.call(attend(), *node.args[:5], blocks, None, None, seed, plan)
    out = emit.call(operator.getitem, both, 0)
    if spec.dead_rows not in ("mean", "nan"):
        return out
    column = emit.call(torch.unsqueeze, emit.call(operator.getitem, both, 1), -1)
    return after_zeros(emit, node, spec, shape, out, column)


# -------------------------------------------------------------------------------------------------- operators


def attend() -> Any:
    """`kp::attend`: q [B,H,S,D], k [B,K,T,D], v [B,K,T,E] of any strides, operands and scalars as the plan's
    spec numbers them, `seed` [1] int64 where it has dropout. Returns out [B,H,S,E] in q's dtype, laid out as
    [B,S,H,E], and lse [B,H,S] in float32, the natural logarithm of the sum of exponentials, sink included, −∞
    with zeros in out for rows without a key.

    `blocks` is empty where the mask bounds loops itself (`mask_render.inequalities`), else holds the four
    tensors of `block_lists.Lists` by blocks of queries and, if gradients are wanted, the four by blocks of
    keys: only these blocks are visited, the mask is applied in the first ones of each line.
    `start_out` [B,H,S,E], `start_lse` [B,H,S]: what attention over other keys gave, taken into the result. Of
    scores beyond 2²⁰, as finite fills of masks are, start_lse doesn't say how many keys there were.
    """
    _operators()
    return torch.ops.kp.attend.default


def attend_backward() -> Any:
    """`kp::attend_backward`: the gradients of q, k and v, laid out as [B,S,H,D], and of those operands that
    are `wanted`; empty tensors for the others. Bitwise the same in every run under
    `torch.use_deterministic_algorithms`; else the Hopper kernel adds up dq in an order that varies."""
    _operators()
    return torch.ops.kp.attend_backward.default


@cache
def _operators() -> tuple[Any, Any]:
    """Define both operators, once."""
    run = fragment("attend", _FORWARD, {"CompositeExplicitAutograd": _forward}, _forward_fake)
    back = fragment("attend_backward", _BACKWARD, {"CompositeExplicitAutograd": _backward}, _backward_fake)
    torch.library.register_autograd("kp::attend", _gradients, setup_context=_save, lib=run)
    return run, back


def by_row(x: Tensor, width: Any) -> Tensor:
    """An empty [B,H,S,width] that lies in memory as [B,S,H,width]."""
    batch, heads, rows, _ = x.shape
    return x.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], blocks: list[Tensor],
    start_out: Tensor | None, start_lse: Tensor | None, seed: Tensor | None, plan: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_start(q, v, start_out, start_lse)
    out = by_row(q, v.shape[-1])
    start = None if start_out is None or start_lse is None else (start_out, start_lse)
    return out, write(Into(out, start), q, k, v, operands, scalars, blocks, Plan.parse(plan), seed)


def write(
    into: Into, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any],
    blocks: list[Tensor], plan: Plan, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """What `kp::attend` gives, into tensors that there are, in q's dtype; returns lse."""
    if into.start is not None:
        into = replace(into, start=(into.start[0], into.start[1].contiguous()))
    known = None if operands or blocks or seed is not None else _known(q)
    if known is not None:
        kind, tensors = known.forward_kind(into), into.tensors() | {"q": q, "k": k, "v": v}
        made = known.again(kind, plan.spec, plan.block, scalars, tensors, lambda: known.results(q))
        if made is not None:
            lse: Tensor = made["lse"]
            return lse
    kernels, site = _site(q, k, v, operands, scalars, blocks, seed, plan)
    lists = Lists(*blocks[:4]) if blocks else None
    if into.start is not None:
        into = replace(into, start=(kernels.readable(into.start[0]), into.start[1]))
    hopper = _hopper(site)
    if hopper is not None and hopper.gains(site):
        kernels = hopper
    found: Tensor = kernels.forward(site, lists, into)
    return found


def add_gradients(
    to: tuple[Tensor, Tensor, Tensor], grad: Tensor, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor],
    scalars: list[Any], blocks: list[Tensor], plan: Plan, lse: Tensor, delta: Tensor,
) -> None:  # fmt: skip
    """Add the gradients of q, k and v to what is there, in float32; that of q without the scale. lse and
    delta = rowsum(grad ∘ out) are of results over these and perhaps more keys."""
    lse, delta = lse.contiguous(), delta.contiguous()
    dq, dk, dv = to
    known = None if operands or blocks or torch.are_deterministic_algorithms_enabled() else _known(q)
    if known is not None:
        tensors = {"lse": lse, "delta": delta, "dk": dk, "dv": dv, "dq": dq, "dout": grad}
        tensors |= {"q": q, "k": k, "v": v}
        if known.again(known.ADDING, plan.spec, plan.block, scalars, tensors, dict) is not None:
            return
    kernels, site = _site(q, k, v, operands, scalars, blocks, None, plan)
    grad = kernels.readable(grad)
    by_query, by_key = (Lists(*blocks[i : i + 4]) if blocks else None for i in (0, 4))
    hopper = _hopper_backward(site, grad)
    if hopper is not None:
        hopper.gradients(site, by_key, grad, lse, delta, dq, None, dk, dv)
    else:
        kernels.query_gradient(site, by_query, grad, lse, delta, dq, adds=True)
        kernels.key_gradients(site, by_key, grad, lse, delta, dk, dv, adds=True)


def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return by_row(q, v.shape[-1]), q.new_empty(q.shape[:3], dtype=torch.float32)


def _backward(
    grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor],
    scalars: list[Any], blocks: list[Tensor], seed: Tensor | None, out: Tensor, lse: Tensor,
    wanted: list[bool], plan: str,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:  # fmt: skip
    kernels, site = _site(q, k, v, operands, scalars, blocks, seed, Plan.parse(plan))
    grad, lse = kernels.readable(grad), lse.contiguous()
    if len(blocks) == 4 and wanted[1]:
        raise ValueError("kp::attend: gradients of k and v need the lists by blocks of keys, too")
    by_query, by_key = (Lists(*blocks[i : i + 4]) if len(blocks) > i else None for i in (0, 4))
    dq, dk, dv = _matrices(q, k, v, wanted)
    hopper = _hopper_backward(site, grad) if wanted[0] and wanted[1] else None
    total = None if hopper is None else torch.empty_like(dq, dtype=torch.float32)
    delta = kernels.delta_of(grad, kernels.readable(out), grad_lse, total)
    if hopper is not None:
        hopper.gradients(site, by_key, grad, lse, delta, total, dq, dk, dv)
    else:
        if wanted[0]:
            kernels.query_gradient(site, by_query, grad, lse, delta, dq)
        if wanted[1]:
            kernels.key_gradients(site, by_key, grad, lse, delta, dk, dv)
    return dq, dk, dv, _operand_gradients(kernels, site, by_query, grad, lse, delta, wanted[2:])


def _backward_fake(
    grad: Tensor, grad_lse: Any, q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    wanted = rest[-2]
    given = [o.new_empty(o.shape if want else (0,)) for o, want in zip(operands, wanted[2:], strict=True)]
    return *_matrices(q, k, v, wanted), given


def _matrices(q: Tensor, k: Tensor, v: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients of q, k and v; of no size where none is wanted."""
    wants = zip((q, k, v), (wanted[0], wanted[1], wanted[1]), strict=True)
    dq, dk, dv = (by_row(x, x.shape[-1]) if want else x.new_empty((0,)) for x, want in wants)
    return dq, dk, dv


def _operand_gradients(
    kernels: Any, site: Any, lists: Any, grad: Tensor, lse: Tensor, delta: Tensor, wanted: list[bool]
) -> list[Tensor]:
    """Of each operand: of all biases that it is, and as a sink, whose probability takes −delta."""
    found = [
        torch.zeros_like(o, memory_format=torch.contiguous_format) if want else o.new_empty((0,))
        for o, want in zip(site.operands, wanted, strict=True)
    ]
    places = [bias.operand for bias in site.spec.biases]
    for place in {place for place in places if wanted[place]}:
        coeff = sum(bias.coeff for bias in site.spec.biases if bias.operand == place)
        change = kernels.bias_gradient(site, lists, places.index(place), grad, lse, delta)
        found[place] += change if coeff == 1.0 else change * coeff
    sink = site.spec.sink
    if sink is not None and wanted[sink]:
        value = site.operands[sink].float().reshape(1, -1, 1)
        share = torch.where(torch.isinf(lse), 0.0, torch.exp(value - lse))
        found[sink] += -(share * delta).sum((0, 2)).sum_to_size(value.numel()).view_as(found[sink])
    return found


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, operands, scalars, blocks, start_out, start_lse, seed, plan = inputs
    out, lse = output
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, start_out, start_lse, seed, out, lse, *operands, *blocks)
    ctx.counts, ctx.scalars, ctx.plan = (len(operands), len(blocks)), scalars, plan


def _gradients(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, start_out, start_lse, seed, out, lse, *rest = ctx.saved_tensors
    operands, blocks = rest[: ctx.counts[0]], rest[ctx.counts[0] :]
    # custom_op takes an empty list for one of tensors, a list of numbers for one argument
    no_scalars: Any = None if ctx.scalars else []
    no_blocks = [None] * len(blocks)
    if grad is None and grad_lse is None:
        return None, None, None, [None] * len(operands), no_scalars, no_blocks, None, None, None, None
    if grad is None:
        grad = torch.zeros_like(out)
    needs = ctx.needs_input_grad
    of_operands = [bool(need) for need in needs[3]] if operands else []
    wanted = [needs[0], needs[1] or needs[2], *of_operands]
    dq, dk, dv, given = attend_backward()(
        grad, grad_lse, q, k, v, operands, ctx.scalars, blocks, seed, out, lse, wanted, ctx.plan
    )
    matrices = [x if need else None for x, need in zip((dq, dk, dv), needs[:3], strict=True)]
    given = [x if want else None for x, want in zip(given, of_operands, strict=True)]
    starts: tuple[Any, Any] = (None, None)
    if start_out is not None:
        starts = _start_gradients(grad, grad_lse, out, lse, start_out, start_lse)
    return *matrices, given, no_scalars, no_blocks, *starts, None, None


def _start_gradients(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, start_out: Tensor, start_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """out = share · start_out + …, with share = exp(start_lse - lse)."""
    share = torch.exp(start_lse - torch.where(lse == float("-inf"), 0.0, lse))
    moved = (grad.float() * (start_out.float() - out.float())).sum(-1)
    d_lse = share * (moved if grad_lse is None else moved + grad_lse)
    return (grad * share.unsqueeze(-1)).to(start_out.dtype), torch.where(share > 0, d_lse, 0.0)


def _site(
    q: Tensor, k: Tensor, v: Tensor, operands: list[Tensor], scalars: list[Any], blocks: list[Tensor],
    seed: Tensor | None, plan: Plan,
) -> tuple[Any, Any]:  # fmt: skip
    """The module of the kernels, and what they all read."""
    check_matrices(q, k, v)
    check_operands(plan.spec, operands, scalars, seed)
    check_lists(plan.spec, plan.block, q, k, blocks)
    from kp_compiler.lowering.triton import attention as kernels

    q, k, v = (kernels.readable(x) for x in (q, k, v))
    return kernels, kernels.Site(plan.spec, q, k, v, operands, scalars, seed, plan.block)


@cache
def _gluon() -> Any:
    """The module of the Hopper kernels; None with a Triton that lacks Gluon's names."""
    try:
        from kp_compiler.lowering.triton import hopper
    except ImportError:
        return None
    return hopper


def _known(q: Tensor) -> Any:
    """The module of the Hopper kernels, which knows calls that were made before, on such a GPU."""
    return _gluon() if q.is_cuda and detect(q.device).sm == 90 else None


def _hopper(site: Any) -> Any:
    """The same where its forward kernel takes this site, else None."""
    hopper = _known(site.q)
    return hopper if hopper is not None and hopper.takes(site) else None


def _hopper_backward(site: Any, grad: Tensor) -> Any:
    """The same of its backward kernel."""
    if torch.are_deterministic_algorithms_enabled():
        return None
    hopper = _hopper(site)
    return hopper if hopper is not None and hopper.takes_backward(site, grad) else None
