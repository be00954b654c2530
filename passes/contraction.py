"""Matrix products as contractions over labelled dimensions, whatever they are spelt as.

A *label* names a dimension: "i" queries, "j" keys, "d" head size, "e" value size, and batch labels "b0",
"b1", …. A dimension of a tensor carries a tuple of labels (several where a reshape merged them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import Op
from kp_compiler.passes.base import same

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Operand:
    """A tensor and the labels of its dimensions; a dimension that broadcasts has none."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class Product:
    """`alpha * lhs · rhs + beta * addend`, the result labelled `dims`."""

    lhs: Operand
    rhs: Operand
    dims: Dims
    alpha: float = 1.0
    addend: Node | None = None
    beta: float = 0.0


def scores_product(node: Node, op: Op) -> Product | None:
    """The product as scores: rows "i" from one operand, columns "j" (last) from the other, summed over
    "d"."""
    if op.name == "einsum":
        return _einsum_scores(node, op)
    pair = _matmul_pair(op)
    if pair is None:
        return None
    lhs, rhs, alpha, addend, beta = pair
    a, b = tensor_of(lhs), tensor_of(rhs)
    if a is None or b is None or a.dim() < 2 or b.dim() < 2:
        return None
    batch = _batch_labels(max(a.dim(), b.dim()) - 2)
    out = (*batch, ("i",), ("j",))
    return Product(
        Operand(lhs, _aligned(a.shape, (*batch, ("i",), ("d",)))),
        Operand(rhs, _aligned(b.shape, (*batch, ("d",), ("j",)))),
        out,
        alpha,
        addend,
        beta,
    )


def value_product(op: Op, probs: Node, dims: Dims) -> tuple[Operand, Dims] | None:
    """`probs @ v`, with `probs` labelled `dims`: the value operand and the labels of the result."""
    if op.name == "einsum":
        return _einsum_values(op, probs, dims)
    pair = _matmul_pair(op)
    if pair is None or pair[0] is not probs or pair[2] != 1.0 or (pair[3] is not None and pair[4] != 0.0):
        return None
    value = pair[1]
    tensor = tensor_of(value)
    if (
        tensor is None
        or tensor.dim() < 2
        or tensor.dim() > len(dims)
        or dims[-1] != ("j",)
        or dims[-2] != ("i",)
    ):
        return None
    return Operand(value, _aligned(tensor.shape, (*dims[:-2], ("j",), ("e",)))), (*dims[:-1], ("e",))


def _matmul_pair(op: Op) -> tuple[Node, Node, float, Node | None, float] | None:
    if op.name in ("matmul", "bmm"):
        lhs, rhs = op["input"], op["other"]
        extra: tuple[float, Node | None, float] = (1.0, None, 0.0)
    elif op.name == "baddbmm":
        lhs, rhs = op["batch1"], op["batch2"]
        if not isinstance(op["alpha"], int | float) or not isinstance(op["beta"], int | float):
            return None
        extra = (float(op["alpha"]), op["input"] if op["beta"] != 0 else None, float(op["beta"]))
    else:
        return None
    return (lhs, rhs, *extra) if isinstance(lhs, Node) and isinstance(rhs, Node) else None


def _batch_labels(count: int) -> tuple[tuple[str, ...], ...]:
    return tuple((f"b{index}",) for index in range(count))


def _aligned(shape: Any, dims: Dims) -> Dims:
    """Labels for a tensor that broadcasts against `dims` from the right; batch dimensions of size 1 get
    none."""
    own = dims[len(dims) - len(shape) :]
    return tuple(
        () if index < len(shape) - 2 and same(size, 1) else labels
        for index, (size, labels) in enumerate(zip(shape, own, strict=True))
    )


def parse_einsum(op: Op) -> tuple[list[str], str, list[Node]] | None:
    equation, operands = op["equation"], list(op["operands"])
    if not isinstance(equation, str) or len(operands) != 2 or not all(isinstance(o, Node) for o in operands):
        return None
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != 2:
        return None
    if "..." in equation:
        tensors = [tensor_of(operand) for operand in operands]
        ranks = {
            -1 if tensor is None else tensor.dim() - len(term.replace("...", ""))
            for tensor, term in zip(tensors, inputs, strict=True)
            if "..." in term
        }
        if len(ranks) != 1 or "..." not in right:
            return None
        dots = "ABCDEFGHIJ"[: ranks.pop()]
        inputs, right = [t.replace("...", dots) for t in inputs], right.replace("...", dots)
    if any(len(set(term)) != len(term) for term in (*inputs, right)):
        return None
    return inputs, right, operands


def _einsum_scores(node: Node, op: Op) -> Product | None:
    parsed = parse_einsum(op)
    if parsed is None:
        return None
    (left, right), out, operands = parsed
    shared = set(left) & set(right)
    summed = [c for c in left if c in shared and c not in out]
    rows = [c for c in left if c not in right]
    columns = [c for c in right if c not in left]
    if (
        len(summed) != 1
        or len(rows) != 1
        or len(columns) != 1
        or not out
        or set(out) != set(left + right) - set(summed)
    ):
        return None
    if out[-1] == rows[0]:  # 'bjd,bid->bij' and the like: the keys came first
        left, right, rows, columns, operands = right, left, columns, rows, operands[::-1]
    if out[-1] != columns[0]:
        return None
    batch = [c for c in out if c in shared]
    label: dict[str, tuple[str, ...]] = {c: (f"b{index}",) for index, c in enumerate(batch)}
    label |= {summed[0]: ("d",), rows[0]: ("i",), columns[0]: ("j",)}
    lhs, rhs = (Operand(o, _einsum_dims(o, t, label)) for o, t in zip(operands, (left, right), strict=True))
    return Product(lhs, rhs, tuple(label[c] for c in out))


def _einsum_values(op: Op, probs: Node, dims: Dims) -> tuple[Operand, Dims] | None:
    parsed = parse_einsum(op)
    if parsed is None:
        return None
    terms, out, operands = parsed
    if operands[0] is operands[1] or probs not in operands:
        return None
    position = operands.index(probs)
    mine, other, value = terms[position], terms[1 - position], operands[1 - position]
    label = dict(zip(mine, dims, strict=True))
    free = [c for c in other if c not in mine]
    keys = next((c for c in mine if label[c] == ("j",)), None)
    if (
        len(free) != 1
        or keys is None
        or keys not in other
        or keys in out
        or set(out) != set(mine + other) - {keys}
    ):
        return None
    if any(label[c] == ("i",) for c in other if c in label):
        return None
    label[free[0]] = ("e",)
    return Operand(value, _einsum_dims(value, other, label)), tuple(label[c] for c in out)


def _einsum_dims(node: Node, term: str, label: dict[str, tuple[str, ...]]) -> Dims:
    tensor = tensor_of(node)
    assert tensor is not None
    return tuple(
        () if label[c][0].startswith("b") and same(size, 1) else label[c]
        for c, size in zip(term, tensor.shape, strict=True)
    )
