"""Whether an additive term is of moderate size: one that may hold infinities, or the fills that stand for
them, may mask whole rows.

Parameters are taken to be moderate, and so are tensors with a gradient that a term is made from (not a term
handed in whole: that may be a mask), and what moderate operations make of them and of integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import canonical
from kp_compiler.writes import constant, written

LARGE = 1e30
# Operations whose result is finite where their arguments are (short of overflow).
_KEEPS = {
    "add", "sub", "mul", "neg", "abs", "clone", "cast", "detach", "view", "permute", "transpose", "expand",
    "unsqueeze", "squeeze", "repeat", "repeat_interleave", "getitem", "narrow", "flip", "cat", "cumsum",
    "floor", "minimum", "maximum", "clamp", "where", "masked_fill", "tril", "triu", "outer", "matmul", "bmm",
    "einsum", "linear", "embedding", "full_like", "softmax", "diff", "sum", "tanh", "sigmoid", "arange",
    "full", "tensor", "new_tensor",
}  # fmt: skip


def is_finite(term: Any) -> bool:
    """No element of a tensor (or number) comes near an infinity, for any input the graph may get."""
    seen: set[Node] = set()
    queue = [term]
    while queue:
        value = queue.pop()
        if isinstance(value, list | tuple):
            queue.extend(value)
        elif isinstance(value, float) and not abs(value) < LARGE:
            return False
        elif isinstance(value, Node) and value not in seen:
            seen.add(value)
            tensor = tensor_of(value)
            if tensor is None or not tensor.dtype.is_floating_point:
                continue
            found = _arguments(value, inside=value is not term)
            if found is None:
                return False
            queue.extend(found)
    return True


def _arguments(node: Node, *, inside: bool) -> list[Any] | None:
    """What a node's finiteness comes down to; None where it is not known."""
    tensor, op = tensor_of(node), canonical(node)
    if node.op in ("placeholder", "get_attr"):
        trained = inside and tensor is not None and tensor.requires_grad
        learned = trained or isinstance(tensor, torch.nn.Parameter)
        return [] if learned and not _overwritten(node) else None
    if op is None or _overwritten(node):
        return None
    if op.name == "div":
        nonzero = constant(op["other"]) or _is_power(op["other"])
        return [op["input"], op["other"]] if nonzero else None
    if op.name == "pow":
        exponent = constant(op["exponent"])
        if _is_power(node):
            return [op["exponent"]]
        return [op["input"]] if exponent is not None and exponent >= 0 else None
    if op.name in _KEEPS:
        return list(op.args.values())
    return None


def _is_power(node: Any) -> bool:
    """A power of a positive number: ALiBi's slopes."""
    op = canonical(node) if isinstance(node, Node) else None
    return op is not None and op.name == "pow" and (constant(op["input"]) or 0.0) > 0.0


def _overwritten(node: Node) -> bool:
    return any(node in written(user) for user in node.users)
