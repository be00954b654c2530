"""The walk from a softmax back to `q kᵀ`.

`trace_scores` finds the chain of nodes between the product and the softmax, has it replayed forwards, and
says what the scores are made of, or why this is not attention.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from kp_compiler.metadata import tensor_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import Context
from kp_compiler.passes.contraction import Product, scores_product
from kp_compiler.passes.replay import TRANSPARENT, Step, replay
from kp_compiler.passes.scores import Scores, Term
from kp_compiler.report import Rejection
from kp_compiler.writes import written

_MAX_DEPTH = 64


def trace_scores(softmax: Node, op: Op, ctx: Context) -> Scores | Rejection:
    """What the input of `softmax` is made of."""
    value, dim = tensor_of(op["input"]), op.get("dim")
    if value is None or not isinstance(dim, int):
        return Rejection("no-metadata", "The softmax's input has no known shape or dimension.")
    found = _find(op["input"], softmax, ctx, 0)
    if isinstance(found, Rejection):
        return found
    if dim % value.dim() != value.dim() - 1:
        return Rejection(
            "softmax-dim", f"Softmax runs over dimension {dim}, not over the keys (the last one)."
        )
    product, steps = found
    scores = Scores(product, product.dims, scale=product.alpha)
    core = steps[0].through if steps else op["input"]
    scores.chain = [core, *(step.node for step in steps)]
    scores.note_sizes(core)
    if written(core):
        return Rejection("mutation", "The scores are written into an argument of their product.")
    if product.addend is not None and product.beta != 0:
        scores.biases.append(Term(product.addend, product.dims, core, product.beta))
    refused = replay(scores, steps, ctx.writes) or _independent(scores, ctx)
    if refused is None and not any(labels == ("i",) for labels in scores.dims):
        refused = Rejection(
            "layout", "The query dimension of the scores was reshaped away before the softmax."
        )
    if refused is None and scores.dims[-1] != ("j",):
        refused = Rejection("softmax-dim", "Softmax runs over a dimension that is not the keys.")
    return refused or scores


def _find(node: Any, reader: Node, ctx: Context, depth: int) -> tuple[Product, list[Step]] | Rejection:
    """The product under `node` and the steps from it up to `node`."""
    nothing = Rejection("no-qk-product", "No product of queries and keys leads to this softmax.")
    if not isinstance(node, Node) or depth > _MAX_DEPTH:
        return nothing
    current = ctx.writes.current(node, reader)
    if current is None:
        return Rejection(
            "mutation", f"{node.name} is written to before it is read.", "Use the out-of-place form."
        )
    node = current
    op = canonical(node) or _unnamed(node)
    if op is None:
        return nothing
    product = scores_product(node, op)
    if product is not None and not _is_weight_product(product):
        return product, []
    refusal = nothing
    for argument in _carriers(op):
        found = _find(argument, node, ctx, depth + 1)
        if isinstance(found, Rejection):
            refusal = found if refusal is nothing else refusal
            continue
        found[1].append(Step(node, op, ctx.writes.current(argument, node) or argument))
        return found
    return refusal


def _unnamed(node: Node) -> Op | None:
    """An operation kp has no name for: the walk goes on behind it only to say what stands in the way."""
    first = node.args[0] if node.args else None
    return (
        Op("unnamed", {"input": first})
        if tensor_of(node) is not None and tensor_of(first) is not None
        else None
    )


def _is_weight_product(product: Product) -> bool:
    """A projection by a parameter, as routers and classifiers have: rows times a 2-D placeholder."""
    weight = product.rhs.node
    while (op := canonical(weight)) is not None and op.name in ("transpose", "cast", "permute"):
        weight = op["input"]
    tensor = tensor_of(weight)
    return (
        weight.op in ("placeholder", "get_attr")
        and tensor is not None
        and tensor.dim() == 2
        and len(product.dims) > 2
    )


def _carriers(op: Op) -> list[Any]:
    """The arguments of an operation through which scores may come."""
    if op.name in TRANSPARENT or op.name in (
        "view",
        "permute",
        "transpose",
        "dropout",
        "tanh",
        "masked_fill",
        "expand",
    ):
        return [op["input"]]
    if op.name in ("unsqueeze", "squeeze", "clamp", "exp", "log", "sigmoid", "neg", "abs", "pow", "unnamed"):
        return [op["input"]]
    if op.name in ("getitem", "repeat", "repeat_interleave", "cumsum", "flip"):  # a walk that will be refused
        return [op["input"]]
    if op.name in ("add", "mul", "maximum", "minimum"):
        return [op["input"], op["other"]]
    if op.name in ("sub", "div"):
        return [op["input"]]
    if op.name == "where":
        return [op["input"], op["other"]]
    if op.name == "cat" and isinstance(op["tensors"], tuple | list) and len(op["tensors"]) == 2:
        return [op["tensors"][0]]
    return []


def _independent(scores: Scores, ctx: Context) -> Rejection | None:
    """Masks and biases must not be computed from the scores themselves (top-k attention and the like)."""
    chain, first = set(scores.chain), ctx.writes.position.get(scores.chain[0], 0)
    queue = [term.node for term in (*scores.biases, *scores.masks)]
    seen: set[Node] = set()
    while queue:
        node = queue.pop()
        if node in chain:
            return Rejection(
                "score-dependent", "A mask or bias is computed from the scores, which a kernel does not keep."
            )
        if node in seen or ctx.writes.position.get(node, -1) < first:
            continue
        seen.add(node)
        queue.extend(_value_inputs(node))
    return None


def _value_inputs(node: Node) -> list[Node]:
    """The arguments whose elements a node reads: `x.reshape_as(y)` and the like only ask `y` for its
    shape."""
    if node.op == "call_method" and str(node.target) in ("view_as", "reshape_as", "expand_as", "type_as"):
        return node.all_input_nodes[:1]
    op = canonical(node)
    return [] if op is not None and op.name in ("full", "full_like", "size") else node.all_input_nodes
