"""Symbolic evaluation of the subgraph that builds a mask: the value at an index, as a formula of that index.

`MaskEvaluator.at(node, index)` returns a sympy expression, a sympy condition, or `Cases` (values by
condition) for the element of `node` at `index`, by the rules of `mask_rules`. What it has no rule for becomes
a look-up t(index) into that node, so every formula is exact; only what the formula is made of decides whether
a mask counts as proved.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch.fx import Node

from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.normalize import canonical
from kp_compiler.passes.base import Context
from kp_compiler.passes.mask_rules import RULES
from kp_compiler.passes.mask_values import (
    EXACT,
    Cases,
    Index,
    Leaf,
    Segments,
    Unprovable,
    Value,
    constant_value,
    is_condition,
    rounded_value,
    size_index,
    sympify_size,
)

B, H, Q, K = sympy.symbols("b h q k", integer=True, nonnegative=True)
_MAX_NODES = 4000


class MaskEvaluator:
    """Formulas over one graph. `ranges` bounds the index symbols by sizes; those of queries and keys that
    ranks share by `parts` where tensors of the graph are read, which have a rank's tokens, and by the whole
    sequence's everywhere else, as places are."""

    def __init__(self, ctx: Context, ranges: dict[sympy.Symbol, Any]) -> None:
        self.ctx = ctx
        self.parts = {symbol: sympify_size(size) for symbol, size in ranges.items()}
        shared = ctx.config.ranks
        self.ranges = {
            symbol: size * shared if symbol in (Q, K) else size for symbol, size in self.parts.items()
        }
        self.leaves: dict[str, Leaf] = {}
        self.budget = _MAX_NODES

    # ------------------------------------------------------------------------------------------------ entry
    # points

    def at(self, node: Any, index: Index, reader: Node | None = None) -> Value:
        """The element of `node` (or a constant) at `index`, as `reader` sees it."""
        if not isinstance(node, Node):
            return constant_value(node)
        self.budget -= 1
        if self.budget < 0:
            raise Unprovable("the mask's formula grows too large")
        value = value_of(node)
        if isinstance(value, torch.SymInt):
            return sympify_size(value)
        if isinstance(value, int | float | bool):
            return constant_value(value)
        outer = self._outside(node)
        if outer is not None:
            return outer.at(self._argument(node), index)
        current = node if reader is None else self.current(node, reader)
        if current is None:
            raise Unprovable(f"{node.name} is written to before the mask is built from it")
        tensor = tensor_of(current)
        if tensor is None:
            raise Unprovable(f"{node.name} is not a tensor")
        op = canonical(current)
        rule = RULES.get(op.name) if op is not None else None
        found = None if op is None or rule is None else rule(self, current, op, index)
        value = self.leaf(current, index, reader) if found is None else found
        return self.held(value, tensor.dtype)

    def held(self, value: Value, dtype: torch.dtype) -> Value:
        """`value` as a tensor of `dtype` holds it: constants rounded, formulas only where none is rounded."""
        if isinstance(value, Cases):
            return Cases(tuple((condition, self.held(item, dtype)) for condition, item in value.items))
        if is_condition(value) or dtype == torch.bool or value.is_infinite:
            return value
        if value.is_number:
            return rounded_value(value, dtype)
        limits = EXACT.get(dtype)
        if limits is None or isinstance(value, AppliedUndef):  # a look-up is what its tensor holds
            return value
        if value.atoms(sympy.Float):
            raise Unprovable(f"{value} is not about integers")
        found = self.bounds(value)
        room = (sympy.nan, sympy.nan) if found is None else (found[0] - limits[0], limits[1] - found[1])
        if dtype == torch.int32:  # symbolic sizes and look-ups are taken to fit
            if any(side.is_negative for side in room):
                raise Unprovable(f"{value} overflows {dtype}")
        elif not all(side.is_nonnegative for side in room):
            raise Unprovable(f"{dtype} does not hold every value of {value} exactly")
        return value

    def broadcast(self, node: Any, index: Index, reader: Node) -> Value:
        """Like `at`, for an operand that broadcasts against a result of index `index`."""
        tensor = tensor_of(node)
        if tensor is None:
            return self.at(node, (), reader)
        own = index[len(index) - tensor.dim() :] if tensor.dim() else ()
        return self.at(
            node, tuple(size_index(size, i) for size, i in zip(tensor.shape, own, strict=True)), reader
        )

    def leaf(
        self,
        node: Node,
        index: Index,
        reader: Node | None = None,
        *,
        monotone: bool = False,
        segments: Segments | None = None,
    ) -> Value:
        """A look-up into `node`. Booleans are stored as 0 and 1."""
        tensor = tensor_of(node)
        assert tensor is not None
        if tensor.dtype.is_floating_point or tensor.dtype.is_complex:
            raise Unprovable(f"{node.name} holds floating-point numbers kp knows nothing about")
        name = f"t_{node.name}"
        while name in self.leaves and self.leaves[name].node is not node:
            name += "_"  # the graph around a checkpoint body has names of its own
        self.leaves.setdefault(name, Leaf(node, reader or node, monotone, segments))
        index = tuple(size_index(size, i) for size, i in zip(tensor.shape, index, strict=True))
        looked_up = sympy.Function(name, integer=True)(*index)
        return sympy.Ne(looked_up, 0) if tensor.dtype == torch.bool else looked_up

    # -----------------------------------------------------------------------------------------------
    # checkpoint bodies

    def current(self, node: Node, reader: Node) -> Node | None:
        """The node that holds what `reader` reads as `node`."""
        return self.ctx.writes.current(node, reader)

    def _outside(self, node: Node) -> _Outer | None:
        """For a placeholder of a checkpoint body: an evaluator of the graph around it."""
        if node.op != "placeholder" or not self.ctx.calls or node.graph is not self.ctx.gm.graph:
            return None
        arguments = {self._argument(node, call) for call in self.ctx.calls}
        if len(arguments) != 1:
            raise Unprovable(f"{node.name} differs between the calls of a shared checkpoint body")
        return _Outer(self)

    def _argument(self, node: Node, call: Node | None = None) -> Any:
        position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
        return (call or self.ctx.calls[0]).args[1 + position]

    def overwritten(self, leaf: Leaf) -> bool:
        """A looked-up tensor is written to after the mask was built from it."""
        outside = leaf.node.graph is not self.ctx.gm.graph
        writes = self.ctx.outer_writes if outside else self.ctx.writes
        assert writes is not None
        changed = bool(writes.between(leaf.node, leaf.node.graph.output_node(), since=leaf.reader))
        if changed and outside:
            raise Unprovable(f"{leaf.node.name} is written to after the mask was built from it")
        return changed

    # -------------------------------------------------------------------------------------------------------
    # bounds

    def bounds(self, expr: sympy.Expr, *, of_part: bool = False) -> tuple[Any, Any] | None:
        """Smallest and largest value of an integer formula that is affine in the index symbols."""
        expr = sympy.expand(expr)
        low = high = expr
        for symbol, size in (self.parts if of_part else self.ranges).items():
            if symbol not in expr.free_symbols:
                continue
            coeff = expr.coeff(symbol, 1)
            if expr.diff(symbol) != coeff or coeff.free_symbols:
                return None
            top = size - 1
            low = low.subs(symbol, 0 if coeff >= 0 else top)
            high = high.subs(symbol, top if coeff >= 0 else 0)
        return None if low.atoms(sympy.Function) else (sympy.expand(low), sympy.expand(high))


class _Outer:
    """Evaluates in the graph around a checkpoint body, leaves included."""

    def __init__(self, inner: MaskEvaluator) -> None:
        self.inner = inner

    def at(self, node: Any, index: Index) -> Value:
        ctx = self.inner.ctx
        call = ctx.calls[0]
        outer = Context(ctx.gm, ctx.config, ctx.target)
        assert ctx.outer_writes is not None
        outer.writes = ctx.outer_writes
        evaluator = MaskEvaluator.__new__(MaskEvaluator)
        evaluator.__dict__.update(self.inner.__dict__, ctx=outer)
        return evaluator.at(node, index, call)
