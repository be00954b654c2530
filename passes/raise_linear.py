"""Recognise products with a weight, however they are spelt, and put one `kp.linear` node in their place.

    F.linear(x, w, b)      addmm(b, x, w)      x @ w.t() + b      einsum("bsk,nk->bsn", x, w)
                     ─▶ kp.linear(x, w, b, spec)

Fires on every F.linear, and on products of an activation with a matrix that is a parameter: transposed or
cast on the way, used several times, with any leading dimensions. Refuses, with the reason, factors of low
rank (LoRA branches), weights that are written to in between, scaled additions. A bias added by `+` afterwards
stays an addition. The original node stays until a pass has taken the site; otherwise it comes back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import Op, canonical, permutation
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    loses_gradient,
)
from kp_compiler.passes.contraction import parse_einsum
from kp_compiler.passes.raise_attention import is_transformed
from kp_compiler.specs import LinearSpec

LOW_RANK = 8  # one side so many times the other makes a factor of a low-rank update
_SPELLINGS = ("linear", "addmm", "matmul", "einsum")


@dataclass(frozen=True)
class Linear:
    """A recognised site: the nodes it reads. `weight` is the parameter itself where only views and casts
    stand between."""

    x: Node
    weight: Node
    bias: Node | None
    spec: LinearSpec


class RaiseLinear:
    """See the module docstring."""

    name = "raise_linear"
    tier: Tier = "exact"
    kind: Kind = "linear"
    final = False
    serves: tuple[str, ...] = ("fp8_linear",)

    def applies(self, ctx: Context) -> Rejection | None:
        return None

    def sites(self, graph: Graph) -> Iterator[Node]:
        for node in graph.nodes:
            op = canonical(node)
            if (
                op is not None
                and op.name in _SPELLINGS
                and (op.name == "linear" or _weight_of(op) is not None)
            ):
                yield node

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        if is_transformed(site):
            return Rejection("functorch", "Products inside torch.func transforms are left as they are.")
        op = canonical(site)
        assert op is not None
        found = from_linear(op) if op.name == "linear" else from_product(site, op)
        if isinstance(found, Rejection):
            return found
        found = _at_parameter(found, site, ctx)
        return _check(found, site, ctx) or Match(site, found, spec=found.spec.form)

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site, found = match.site, match.data
        node = Emitter(site, site).linear(found.x, found.weight, found.bias, found.spec.to_json())
        node.meta["kp_out"], node.meta["kp_root"] = node, site
        site.replace_all_uses_with(node, propagate_meta=False)
        return node


def from_linear(op: Op) -> Linear | Rejection:
    """`F.linear`: whatever stands for the weight."""
    x, weight, bias = op["input"], op["weight"], op["bias"]
    if not isinstance(x, Node) or not isinstance(weight, Node):
        return Rejection("no-metadata", "The operands of this site are unknown.")
    return Linear(x, weight, bias, LinearSpec(bias=bias is not None))


def from_product(site: Node, op: Op) -> Linear | Rejection:
    """A product with a parameter on the right: matmul, addmm, einsum."""
    if op.name == "addmm":
        if op["alpha"] != 1 or op["beta"] != 1:
            return Rejection("scaled-addition", "addmm scales the product or what it adds.")
        bias = op["input"]
        if (tensor := tensor_of(bias)) is None or tensor.dim() != 1:
            return Rejection("bias", "addmm adds something else than one number per output.")
        return Linear(op["mat1"], op["mat2"], bias, LinearSpec(True, True, "addmm"))
    if op.name == "matmul":
        return Linear(op["input"], op["other"], None, LinearSpec(True, False, "matmul"))
    return _from_einsum(op)


def _from_einsum(op: Op) -> Linear | Rejection:
    """`…k,nk->…n` and `…k,kn->…n`, in either order of the operands."""
    parsed = parse_einsum(op)
    if parsed is None:
        return Rejection("einsum", "This einsum is not a product of two tensors.")
    (left, right), out, (x, weight) = parsed
    if len(left) == 2 and _is_parameter(x):
        left, right, x, weight = right, left, weight, x
    inner = [letter for letter in right if letter in left]
    outer = [letter for letter in right if letter not in left]
    if len(right) != 2 or len(inner) != 1 or left[-1:] != inner[0] or out != left[:-1] + outer[0]:
        return Rejection("einsum", "This einsum is not `…k,nk->…n`.")
    return Linear(x, weight, None, LinearSpec(right[0] == inner[0], False, "einsum"))


def _weight_of(op: Op) -> Node | None:
    """The operand that is a parameter, of a product whose other operand is none."""
    if op.name == "einsum":
        operands = [o for o in op["operands"] if isinstance(o, Node)]
        found = [o for o in operands if _is_parameter(o)]
        return found[0] if len(operands) == 2 and len(found) == 1 else None
    left, right = (op["mat1"], op["mat2"]) if op.name == "addmm" else (op["input"], op["other"])
    if not isinstance(left, Node) or not isinstance(right, Node) or _is_parameter(left):
        return None
    return right if _is_parameter(right) else None


def _is_parameter(node: Node) -> bool:
    """A matrix that is a parameter, seen through transposes and casts."""
    tensor = tensor_of(node)
    return (
        tensor is not None and tensor.dim() == 2 and isinstance(tensor_of(_peel(node)[0]), torch.nn.Parameter)
    )


def _peel(node: Node) -> tuple[Node, bool, list[Node]]:
    """What a matrix is a transpose or cast of, whether transposed, and the nodes on the way."""
    swapped, passed = False, []
    while (op := canonical(node)) is not None and not op.inplace and isinstance(op.get("input"), Node):
        source, value = op["input"], tensor_of(op["input"])
        if value is None or value.dim() != 2 or not value.is_floating_point():
            break
        if op.name in ("transpose", "permute"):
            order = permutation(op, 2)
            if order is None:
                break
            swapped ^= order == [1, 0]
        elif op.name != "cast" or op["dtype"] not in (None, torch.bfloat16, torch.float16, torch.float32):
            break
        passed.append(node)
        node = source
    return node, swapped, passed


def _at_parameter(found: Linear, site: Node, ctx: Context) -> Linear:
    """The same site reading the parameter itself, where nothing is lost by that: a weight that is cast or
    transposed for every use is quantised from where it lies."""
    weight, swapped, passed = _peel(found.weight)
    tensor = tensor_of(weight)
    if not isinstance(tensor, torch.nn.Parameter) or any(loses_gradient(node, site) for node in passed):
        return found
    if ctx.writes.between(weight, site):
        return found
    transposed = found.spec.transposed ^ swapped
    return Linear(found.x, weight, found.bias, LinearSpec(transposed, found.spec.bias, found.spec.form))


def _check(found: Linear, site: Node, ctx: Context) -> Rejection | None:
    x, weight, out = tensor_of(found.x), tensor_of(found.weight), tensor_of(site)
    if x is None or weight is None or out is None:
        return Rejection("no-metadata", "The shapes of this site are unknown.")
    if weight.dim() != 2 or x.dim() < 2:
        return Rejection("rank", "The weight is no matrix, or the input is a single vector.")
    if any(t.is_nested or t.is_sparse for t in (x, weight)):
        return Rejection("nested", "Nested and sparse tensors keep PyTorch's own kernels.")
    if not all(isinstance(size, int) for size in weight.shape):
        return Rejection("dynamic-weight", "The sizes of the weight are not known at compile time.")
    if not out.dtype.is_floating_point or (found.bias is not None and tensor_of(found.bias) is None):
        return Rejection("dtype", f"The result is {out.dtype}.")
    small, large = sorted(weight.shape)
    if small * LOW_RANK <= large and small <= 256:
        return Rejection("low-rank", f"A weight of {small} by {large} is a narrow factor and is left alone.")
    return None
