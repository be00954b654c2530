"""A proved mask as one boolean tensor in the graph, for kernels that take nothing better."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from kp_compiler.lowering import mask_render
from kp_compiler.metadata import tensor_of, value_of
from kp_compiler.specs import AttentionSpec


def emit_mask(emit: Any, node: Node, spec: AttentionSpec) -> Node:
    """Boolean, broadcastable to [B, H, S, T]; true keeps."""
    operands: Any = node.args[3]
    if spec.mask.kind == "tensor":
        out = operands[spec.mask.tensors[0]]
        for index in spec.mask.tensors[1:]:
            out = emit.call(torch.logical_and, out, operands[index])
        return out
    tensors = [operands[index] for index in spec.mask.tensors]
    # type: ignore[arg-type]
    algebra = GraphIndices(emit, tensors, list(node.args[4]), index_nodes(emit, node))
    return mask_render.render(mask_render.parse(spec.mask.expr), algebra)


def index_nodes(emit: Any, node: Node) -> dict[str, Node]:
    """arange over each dimension of the scores, shaped to broadcast."""
    q, k = node.args[0], node.args[1]
    device = value_of(q).device
    found = {}
    for dim, name in enumerate(mask_render.INDEX_NAMES):
        size = emit.size(k if name == "k" else q, 2 if name == "k" else dim)
        line = emit.call(torch.arange, size, device=device)
        shape = [1, 1, 1, 1]
        shape[dim] = -1
        found[name] = emit.call(torch.ops.aten.reshape.default, line, shape)
    return found


class GraphIndices:
    """The algebra that writes nodes. Values are nodes or Python numbers."""

    def __init__(self, emit: Any, tensors: list[Any], scalars: list[Any], index: dict[str, Any]) -> None:
        self.emit = emit
        self.tensors = tensors
        self.scalars = scalars
        self.index = index

    def integer(self, value: int) -> Any:
        return value

    def truth(self, value: bool) -> Any:
        like = next(iter(self.index.values()))
        return self._call(torch.full_like, like, value, dtype=torch.bool)

    def symbol(self, name: str) -> Any:
        return self.index[name] if name in self.index else self.scalars[int(name[1:])]

    def lookup(self, index: int, args: list[Any]) -> Any:
        """Constant indices select; the others gather together."""
        tensor = self.tensors[index]
        for dim in reversed(range(len(args))):
            if isinstance(args[dim], int):
                tensor = self.emit.call(torch.select, tensor, dim, args[dim])
        places = [a for a in args if not isinstance(a, int)]
        return self._call(torch.ops.aten.index.Tensor, tensor, places) if places else tensor

    def add(self, a: Any, b: Any) -> Any:
        return (
            a + b if isinstance(a, int) and isinstance(b, int) else self._call(torch.add, *self._first(a, b))
        )

    def mul(self, a: Any, b: Any) -> Any:
        return (
            a * b if isinstance(a, int) and isinstance(b, int) else self._call(torch.mul, *self._first(a, b))
        )

    def floor_div(self, a: Any, divisor: int) -> Any:
        return a // divisor if isinstance(a, int) else self._call(torch.floor_divide, a, divisor)

    def mod(self, a: Any, divisor: int) -> Any:
        return a % divisor if isinstance(a, int) else self._call(torch.remainder, a, divisor)

    def minimum(self, a: Any, b: Any) -> Any:
        return self._extremum(torch.minimum, torch.clamp_max, a, b)

    def maximum(self, a: Any, b: Any) -> Any:
        return self._extremum(torch.maximum, torch.clamp_min, a, b)

    def le_zero(self, a: Any) -> Any:
        return self._call(torch.le, a, 0)

    def eq_zero(self, a: Any) -> Any:
        return self._call(torch.eq, a, 0)

    def both(self, a: Any, b: Any) -> Any:
        return self._call(torch.logical_and, a, b)

    def either(self, a: Any, b: Any) -> Any:
        return self._call(torch.logical_or, a, b)

    def negate(self, a: Any) -> Any:
        return self._call(torch.logical_not, a)

    def _call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return self.emit.call(target, *args, **kwargs)

    def _first(self, a: Any, b: Any) -> tuple[Any, Any]:
        """A tensor first: torch.add(2, x) is not a thing."""
        return (b, a) if tensor_of(a) is None else (a, b)

    def _extremum(self, pair: Any, with_number: Any, a: Any, b: Any) -> Any:
        if tensor_of(a) is not None and tensor_of(b) is not None:
            return self._call(pair, a, b)
        if tensor_of(a) is None and tensor_of(b) is None:
            return self._call(torch.sym_min if pair is torch.minimum else torch.sym_max, a, b)
        return self._call(with_number, *self._first(a, b))
