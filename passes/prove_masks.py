"""Prove what masks mean, and drop the tensors that say it.

    kp.attention(q, k, v, [mask: bool[B,1,S,T]], tensor) ─▶ kp.attention(q, k, v, [], causal)

Fires when the subgraph that builds a mask (boolean, or additive with 0 and a large negative fill) evaluates
to a formula over the query and key index, per-token vectors and scalars. The formula replaces the tensor;
per-token vectors (segments, padding) stay as operands. Refuses, with the reason, masks that arrive as inputs,
that are indexed by unknown values, or whose fully masked rows would change their meaning. Biases that are no
masks stay biases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node

from kp_compiler.lowering import mask_render, ops
from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import canonical
from kp_compiler.passes.base import Context, Emitter, Kind, Match, Rejection, Tier, loses_gradient
from kp_compiler.passes.finite import is_finite
from kp_compiler.passes.mask_eval import B, H, K, MaskEvaluator, Q
from kp_compiler.passes.mask_facts import MaskFacts, establish, operands_of
from kp_compiler.passes.mask_values import Cases, Unprovable, as_condition, as_number, choose
from kp_compiler.specs import AttentionSpec, BiasSpec, MaskSpec
from kp_compiler.writes import constant, erase_orphans, storage_of, written

_DDP_HINT = (
    "A mask made outside this graph can't be proved. Under DDP set torch._dynamo.config.optimize_ddp = "
    "'python_reducer'; with per-layer compile, compile the whole model; else pass is_causal=True."
)


@dataclass(frozen=True)
class Proof:
    """The new mask of a site: a formula and the tensors and scalars it reads."""

    mask: MaskSpec
    tensors: tuple[tuple[Node, Node | None], ...]  # with what read it, if it is written to later
    scalars: tuple[Any, ...]
    biases: tuple[tuple[Node, float], ...]
    dead_rows: Any
    fill: Any


@dataclass
class _Parts:
    """What the masks and biases of a site are made of."""

    conditions: list[Any] = dataclasses.field(default_factory=list)
    fills: list[tuple[float, str]] = dataclasses.field(default_factory=list)
    biases: list[tuple[Node, float]] = dataclasses.field(default_factory=list)

    def bias(self, node: Node, coeff: float, reader: Node, ctx: Context) -> None:
        """Keep a term as a bias. The kernel reads it later than `reader` did, so it must not change until
        then."""
        if node.graph is ctx.gm.graph and ctx.writes.between(node, node.graph.output_node(), since=reader):
            raise Unprovable(f"{node.name} is written to after it was added")
        self.biases.append((node, coeff))


class ProveMasks:
    """See the module docstring."""

    name = "prove_masks"
    tier: Tier = "exact"
    kind: Kind = "attention"
    final = False
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        return None

    def sites(self, graph: Graph) -> Iterator[Node]:
        for node in ops.attentions(graph):
            spec = ops.spec_of(node)
            if spec.mask.kind == "tensor" or spec.biases:
                yield node

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        spec = ops.spec_of(site)
        operands = tuple(site.args[3])  # type: ignore[arg-type]
        q, k = tensor_of(site.args[0]), tensor_of(site.args[1])
        assert q is not None and k is not None
        key = (operands, spec.to_json(), str(q.shape), str(k.shape), _writes_seen(operands, site, ctx))
        if key not in ctx.cache:
            ctx.cache[key] = _prove(spec, operands, site, q.shape, k.shape, ctx)
        proof = ctx.cache[key]
        if isinstance(proof, Rejection):
            return proof
        return Match(site, proof, spec=str(proof.mask))

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site, proof = match.site, match.data
        spec = ops.spec_of(site)
        bias_nodes = [node for node, _ in proof.biases]
        sink = [] if spec.sink is None else [site.args[3][spec.sink]]  # type: ignore[index]
        tensors = [
            ops.import_node(_kept(node, reader, ctx), site, ctx.calls) for node, reader in proof.tensors
        ]
        count = len(tensors)
        new = dataclasses.replace(
            spec,
            mask=proof.mask,
            biases=tuple(BiasSpec(count + i, coeff) for i, (_, coeff) in enumerate(proof.biases)),
            sink=count + len(bias_nodes) if sink else None,
            dead_rows=proof.dead_rows,
            fill=proof.fill,
        )
        scalars = [ops.import_node(node, site, ctx.calls) for node in proof.scalars]
        replaced = list(site.args[3])  # type: ignore[arg-type]
        site.args = (*site.args[:3], [*tensors, *bias_nodes, *sink], scalars, new.to_json())
        erase_orphans(graph, replaced)
        return site


def _writes_seen(operands: tuple[Node, ...], site: Node, ctx: Context) -> tuple[Node, ...]:
    """The writes before `site` to anything its masks are built from: sites that see the same share a
    proof."""
    key = ("storages", operands)
    if key not in ctx.cache:
        seen: set[Node] = set()
        queue = list(operands)
        while queue:
            node = queue.pop()
            if node not in seen:
                seen.add(node)
                queue.extend(node.all_input_nodes)
        ctx.cache[key] = {storage_of(node) for node in seen} & set(ctx.writes.by_storage)
    position = ctx.writes.position
    written = [w for storage in ctx.cache[key] for w in ctx.writes.by_storage[storage]]
    return tuple(sorted((w for w in written if position[w] < position[site]), key=position.__getitem__))


def _kept(node: Node, reader: Node | None, ctx: Context) -> Node:
    """`node`, or a copy of what `reader` saw (of a static cache's length, which the forward advances)."""
    if reader is None:
        return node
    key = ("kept", node, reader)
    if key not in ctx.cache:
        ctx.cache[key] = Emitter(reader, node).call(torch.clone, node)
    return ctx.cache[key]


def _prove(
    spec: AttentionSpec, operands: tuple[Node, ...], site: Node, q: Any, k: Any, ctx: Context
) -> Proof | Rejection:
    ev = MaskEvaluator(ctx, {B: q[0], H: q[1], Q: q[2], K: k[2]})
    parts = _Parts()
    why: Rejection | None = None
    try:
        for index in spec.mask.tensors if spec.mask.kind == "tensor" else ():
            parts.conditions.append(as_condition(ev.broadcast(operands[index], (B, H, Q, K), site)))
            parts.fills.append((-math.inf if spec.dead_rows != "mean" else -1.0, "where"))
        for bias in spec.biases:
            why = _take(ev, operands[bias.operand], bias.coeff, site, site, parts, ctx) or why
        if not parts.conditions:
            return why or Rejection("bias", "The additive term is a bias, not a mask.")
        facts = establish(sympy.And(*parts.conditions), ev)
        if spec.mask.kind not in ("tensor", "full"):
            return Rejection("two-masks", "A proved mask is combined with another one.")
        return _conclude(spec, parts, facts, ev, site)
    except Unprovable as error:
        return _unproved(operands, str(error), ctx)


def _unproved(operands: tuple[Node, ...], text: str, ctx: Context) -> Rejection:
    if any(_comes_from_input(node, ctx) for node in operands):
        return Rejection("mask-is-input", f"The mask was made outside this graph: {text}.", _DDP_HINT)
    return Rejection("mask-unproved", f"The mask could not be proved: {text}.")


def _comes_from_input(node: Any, ctx: Context) -> bool:
    """A mask that is a placeholder, or a slice, cast or comparison of one; seen through a checkpoint's
    call."""
    while isinstance(node, Node):
        if node.op == "placeholder" and ctx.calls and node.graph is ctx.gm.graph:
            places = ctx.gm.graph.find_nodes(op="placeholder")
            node = ctx.calls[0].args[1 + places.index(node)]
            continue
        inputs = [n for n in node.all_input_nodes if tensor_of(n) is not None]
        if node.op not in ("call_function", "call_method") or len(inputs) != 1:
            return node.op in ("placeholder", "get_attr")
        node = inputs[0]
    return False


def _take(
    ev: MaskEvaluator, node: Node, coeff: float, reader: Node, site: Node, parts: _Parts, ctx: Context
) -> Rejection | None:
    """Split an additive term of `site` into masks (0 or a large negative fill) and true biases."""
    current = ev.ctx.writes.current(node, reader) if node.graph is ev.ctx.gm.graph else node
    op = canonical(current) if current is not None else None
    splits = current is not None and _may_split(current, site)
    if splits and op is not None and op.name == "clone" and isinstance(op["input"], Node):
        return _take(ev, op["input"], coeff, current, site, parts, ctx)
    if splits and op is not None and coeff == 1.0:
        if (
            op.name == "add"
            and op.get("alpha", 1) == 1
            and all(tensor_of(op[x]) is not None for x in ("input", "other"))
        ):
            both = [_take(ev, op[key], coeff, current, site, parts, ctx) for key in ("input", "other")]
            return both[0] or both[1]
        if op.name in ("where", "masked_fill") and _take_filled(ev, current, op, site, parts, ctx):
            return None
    try:
        value = as_number(ev.broadcast(node, (B, H, Q, K), reader))
    except Unprovable as error:
        parts.bias(node, coeff, reader, ctx)
        tensor = tensor_of(node)
        if _comes_from_input(node, ctx) and tensor is not None and not tensor.requires_grad:
            return _unproved((node,), str(error), ctx)
        return Rejection("bias", f"The additive term stays a bias: {error}.")
    items = value.items if isinstance(value, Cases) else ((sympy.true, value),)
    numbers = [_number(item, coeff, current or node) for _, item in items]
    limit = _limit(current or node, ctx)
    if any(n is None or not (n == 0 or n <= limit) for n in numbers):
        parts.bias(node, coeff, reader, ctx)
        return Rejection("bias", "The additive term is a bias, not a mask.")
    parts.fills += [(n, "add") for n in set(numbers) if n]  # type: ignore[misc]
    keep: Any = sympy.true
    for (condition, _), number in reversed(list(zip(items, numbers, strict=True))):
        keep = choose(condition, sympy.true if number == 0 else sympy.false, keep)
    parts.conditions.append(keep)
    return None


def _may_split(node: Node, site: Node) -> bool:
    """A term may be taken apart: its parts are read where it is, unchanged, and add up as numbers do."""
    tensor = tensor_of(node)
    if tensor is None or not tensor.dtype.is_floating_point:
        return False
    return not written(node) and (node.graph is not site.graph or not loses_gradient(node, site))


def _take_filled(ev: MaskEvaluator, node: Node, op: Any, site: Node, parts: _Parts, ctx: Context) -> bool:
    """`where(keep, bias, fill)`: a mask on a bias. A bias of zeros is left to the general rule."""
    inner, fill, flag = (
        (op["input"], op["other"], op["condition"])
        if op.name == "where"
        else (op["input"], op["value"], op["mask"])
    )
    tensor, number = tensor_of(inner), constant(fill)
    if (
        tensor is None
        or tensor.dim() < 2
        or number is None
        or number > _limit(node, ctx)
        or constant(inner) is not None
    ):
        return False
    try:
        condition = as_condition(ev.broadcast(flag, (B, H, Q, K), node))
    except Unprovable:
        return False
    parts.conditions.append(condition if op.name == "where" else sympy.Not(condition))
    parts.fills.append((number, "add"))
    _take(ev, inner, 1.0, node, site, parts, ctx)
    return True


def _number(item: Any, coeff: float, term: Node) -> float | None:
    """What a constant element of a term adds to the scores, beyond the largest number an infinity."""
    if item in (sympy.oo, -sympy.oo):
        return math.copysign(math.inf, coeff * (1 if item == sympy.oo else -1))
    if not getattr(item, "is_number", False):
        return None
    number, tensor = float(item) * coeff, tensor_of(term)
    if tensor is not None and tensor.dtype.is_floating_point and abs(number) > torch.finfo(tensor.dtype).max:
        return math.copysign(math.inf, number)
    return number


def _limit(node: Node, ctx: Context) -> float:
    tensor = tensor_of(node)
    limit = ctx.config.prove_masks.fill_threshold
    if tensor is not None and tensor.dtype.is_floating_point:
        limit = max(limit, torch.finfo(tensor.dtype).min)
    return limit


def _conclude(
    spec: AttentionSpec, parts: _Parts, facts: MaskFacts, ev: MaskEvaluator, site: Node
) -> Proof | Rejection:
    dead, fill = _dead_rows(spec, parts, facts)
    if isinstance(dead, Rejection):
        return dead
    looked_up = operands_of(facts.expr, ev)
    scalars = _scalars(facts.expr, ev, site)
    if isinstance(scalars, Rejection):
        return scalars
    rename: dict[Any, Any] = {
        symbol: sympy.Symbol(f"n{i}", integer=True) for i, (symbol, _) in enumerate(scalars)
    }
    expr = facts.expr.xreplace(rename)
    for index, (name, _, _) in enumerate(looked_up):
        expr = expr.replace(sympy.Function(name, integer=True), sympy.Function(f"t{index}", integer=True))
    if not mask_render.renderable(mask_render.parse(str(expr))):
        return Rejection(
            "mask-unproved", f"The mask's formula can't be written as integer operations: {expr}."
        )
    mask = MaskSpec(
        facts.kind,
        str(expr),
        tuple(range(len(looked_up))),
        len(scalars),
        tuple(index for index, (_, _, monotone) in enumerate(looked_up) if monotone),
        facts.window,
        facts.parts,
    )
    nodes = tuple(
        (node, ev.leaves[name].reader if ev.overwritten(ev.leaves[name]) else None)
        for name, node, _ in looked_up
    )
    return Proof(mask, nodes, tuple(node for _, node in scalars), tuple(parts.biases), dead, fill)


def _dead_rows(spec: AttentionSpec, parts: _Parts, facts: MaskFacts) -> tuple[Any, Any]:
    """What fully masked rows mean, or why that can't be kept: (meaning or Rejection, how a finite fill
    entered)."""
    finite = [(value, how) for value, how in parts.fills if math.isfinite(value)]
    if facts.no_dead_row and (finite or all(is_finite(node) for node, _ in parts.biases)):
        return "none", "where"  # beside a finite fill biases are taken to be finite: raise_attention notes it
    if not finite:
        added = any(how == "add" for _, how in parts.fills)
        return ("zero" if spec.form == "sdpa" else "nan"), "add" if added else "where"
    if len(finite) != len(parts.fills) or len(finite) > 1:
        return Rejection(
            "mixed-fill", "Several fills meet and rows may be fully masked: their meaning is unclear."
        ), ""
    value, how = finite[0]
    if how == "add" and value > -1e38 and value != float(torch.finfo(torch.bfloat16).min):
        return (
            Rejection(
                "weak-fill", f"A fill of {value:g} is added and rows may be fully masked: they would differ."
            ),
            "",
        )
    return "mean", how


def _scalars(expr: Any, ev: MaskEvaluator, site: Node) -> list[tuple[Any, Node]] | Rejection:
    """The size symbols an expression uses, with a node that holds each."""
    found = []
    graphs = [site.graph] + ([ev.ctx.calls[0].graph] if ev.ctx.calls else [])
    for symbol in sorted(expr.free_symbols - {B, H, Q, K}, key=str):
        node = next(
            (
                n
                for g in graphs
                for n in g.nodes
                if isinstance(v := value_of(n), torch.SymInt) and v.node.expr == symbol
            ),
            None,
        )
        if node is None:
            return Rejection(
                "mask-unproved", f"The mask depends on {symbol}, which no node of the graph holds."
            )
        found.append((symbol, node))
    return found
