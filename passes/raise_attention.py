"""Recognise attention, however it is spelt, and put one `kp.attention` node in its place.

    matmul ─▶ * scale ─▶ + mask ─▶ softmax ─▶ dropout ─▶ matmul ─▶ …          kp.attention(q, k, v, [mask],
    spec) ─▶ … F.scaled_dot_product_attention(q, k, v, mask) ─▶ …

Fires when the walk from a softmax back to a product of two activations, and forward to one product with the
values, meets only operations that an AttentionSpec can express; on every F.scaled_dot_product_attention.
Refuses, with the reason, whatever else the probabilities are used for, masks after the softmax, other softmax
dimensions, writes in between. The original nodes stay until a kernel has been chosen: a site that is not
lowered goes back to them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from kp_compiler.metadata import number_of, tensor_of
from kp_compiler.normalize import Op, canonical
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    copy_provenance,
    grad_switches,
    same,
)
from kp_compiler.passes.contraction import Dims, Operand, value_product
from kp_compiler.passes.expand_mha import is_composite, refusal
from kp_compiler.passes.finite import is_finite
from kp_compiler.passes.operands import (
    Frame,
    Peeled,
    frame_of,
    num_heads,
    peel,
    peel_keys_values,
    place,
    restore,
    with_strides_of,
)
from kp_compiler.passes.scores import Scores, Term
from kp_compiler.passes.trace_scores import trace_scores
from kp_compiler.specs import AttentionSpec, BiasSpec, MaskSpec
from kp_compiler.writes import constant

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """A recognised site: operands, and how to read them."""

    root: Node  # the node whose value the rewrite replaces
    scores: Scores
    frame: Frame
    q: Peeled
    k: Peeled
    v: Peeled
    out_dims: Dims
    dtype: torch.dtype
    spec: AttentionSpec
    terms: tuple[Term, ...]  # biases, then masks, in the spec's operand order
    sink: Node | None = None


class RaiseAttention:
    """See the module docstring."""

    name = "raise_attention"
    tier: Tier = "exact"
    kind: Kind = "attention"
    final = False
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        return None

    def sites(self, graph: Graph) -> Iterator[Node]:
        for node in graph.nodes:
            if is_flex(node) or is_composite(node):
                yield node
            elif (op := canonical(node)) is not None and op.name in ("softmax", "sdpa"):
                yield node

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        if is_flex(site):
            return Rejection("already-fused", "FlexAttention is a fused kernel already and is left as it is.")
        if is_composite(site):
            return refusal(site) or Rejection("unknown-op", "This call was not written out.")
        if is_transformed(site):
            return Rejection("functorch", "Attention inside torch.func transforms is left as it is.")
        op = canonical(site)
        assert op is not None
        found = from_sdpa(site, op, ctx) if op.name == "sdpa" else from_softmax(site, op, ctx)
        if isinstance(found, Rejection):
            return found
        refused = _check_reads(found, ctx) or _check_heads(found)
        return refused or Match(site, found, spec=str(found.spec))

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site: Site = match.data
        emit = Emitter(site.root, site.root)
        q, k, v = (
            _operand(emit, peeled.operand, site, tail)
            for peeled, tail in ((site.q, ("i", "d")), (site.k, ("j", "d")), (site.v, ("j", "e")))
        )
        q = _match_batch(emit, v, _match_batch(emit, k, q))
        k, v = _match_batch(emit, q, k), _match_batch(emit, q, v)
        operands = [_term(emit, term, site) for term in site.terms]
        if site.sink is not None:
            operands.append(_sink(emit, site.sink))
        node = emit.attention(q, k, v, operands, [], site.spec.to_json())
        out = restore(emit, node, site.out_dims, site.frame, site.scores)
        out = with_strides_of(emit, out, site.root)
        node.meta["kp_notes"] = _assumptions(site)
        node.meta["kp_out"], node.meta["kp_root"] = out, site.root
        node.meta["kp_operands"] = [p.operand.node for p in (site.q, site.k, site.v)]
        copy_provenance(match.site, node)
        site.root.replace_all_uses_with(out, propagate_meta=False)
        site.root.meta["kp_replaced"] = True
        return node


def _assumptions(site: Site) -> tuple[Rejection, ...]:
    """What is taken for granted of tensors whose values are not known."""
    fills = [term.fill for term in site.terms if term.fill is not None]
    biases = [term.node for term in site.terms if term.fill is None]
    root = tensor_of(site.root)
    trained = site.spec.form == "softmax" and root is not None and root.requires_grad
    if not (trained or any(map(math.isfinite, fills))) or all(map(is_finite, biases)):
        return ()
    return (Rejection("bias-finite", "The bias is taken to leave no row with nothing but infinities."),)


def is_transformed(node: Node) -> bool:
    """A value inside `torch.func.vmap` or `grad`, which only their own interpreters may touch."""
    tensor = tensor_of(node)
    return tensor is not None and torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def is_flex(node: Node) -> bool:
    return node.op == "call_function" and str(node.target) == "flex_attention"


# ------------------------------------------------------------------------------------------------------
# recognition


def from_sdpa(node: Node, op: Op, ctx: Context) -> Site | Rejection:
    """`F.scaled_dot_product_attention`: operands by name, the mask aligned top-left if causal."""
    q, k, v = op["query"], op["key"], op["value"]
    tensors = [tensor_of(x) for x in (q, k, v)]
    out = tensor_of(node)
    if any(t is None for t in tensors) or out is None:
        return Rejection("no-metadata", "The shapes of this site are unknown.")
    if any(t.dim() != out.dim() or t.dim() < 2 for t in tensors if t is not None):
        return Rejection("layout", "Query, key and value differ in rank.")
    if any(t.is_nested for t in tensors if t is not None):
        return Rejection("nested", "Nested tensors keep PyTorch's own kernels.")
    width = tensors[0].shape[-1]  # type: ignore[union-attr]
    scale = op["scale"]
    if scale is None and not isinstance(width, int):
        return Rejection("dynamic-head-dim", "The head size is not known at compile time.")
    scale = 1.0 / math.sqrt(width) if scale is None else constant(scale)
    if scale is None:
        return Rejection("scale", "The scale is not a number known at compile time.")
    dropout_p = number_of(op["dropout_p"])
    if not isinstance(op["is_causal"], bool) or dropout_p is None:
        return Rejection("dynamic-flag", "is_causal or dropout_p is not known at compile time.")
    batch = tuple((f"b{index}",) for index in range(out.dim() - 2))
    dims: Dims = (*batch, ("i",), ("j",))
    scores = Scores(product=None, dims=dims)  # type: ignore[arg-type]
    for index, labels in enumerate(batch):
        scores.sizes[labels[0]] = (node, index)
    frame = (
        Frame(tuple(x[0] for x in batch[:-1]), tuple(x[0] for x in batch[-1:]))
        if len(batch) > 1
        else Frame(tuple(x[0] for x in batch), ())
    )
    head = frame.heads[0] if frame.heads else None
    q_operand, k_operand, v_operand = (
        Operand(x, _sdpa_dims(x, (*batch, *tail)))
        for x, tail in ((q, (("i",), ("d",))), (k, (("j",), ("d",))), (v, (("j",), ("e",))))
    )
    q_side = peel(q_operand, node, None, ctx.writes)
    k_side, v_side = peel_keys_values(k_operand, node, v_operand, node, head, scores, ctx.writes)
    mask = MaskSpec()
    terms: tuple[Term, ...] = ()
    biases: tuple[BiasSpec, ...] = ()
    if op["is_causal"]:
        mask = MaskSpec("causal", "k <= q", parts=("causal",))
    given = op["attn_mask"]
    if isinstance(given, Node):
        value = tensor_of(given)
        if value is None or op["is_causal"]:
            return Rejection("mask-shape", "The mask has no known shape, or is given beside is_causal.")
        terms = (Term(given, dims, node, fill=-math.inf if value.dtype == torch.bool else None),)
        if value.dtype == torch.bool:
            mask = MaskSpec("tensor", "", (0,))
        else:
            biases = (BiasSpec(0),)
    spec = AttentionSpec(
        scale * q_side.scale * k_side.scale,
        mask,
        biases,
        dropout_p=dropout_p,
        dead_rows="zero" if _may_mask(terms) else "none",
        form="sdpa",
    )
    out_dims: Dims = (*batch, ("i",), ("e",))
    return Site(node, scores, frame, q_side, k_side, v_side, out_dims, out.dtype, spec, terms)


def _sdpa_dims(node: Node, dims: Dims) -> Dims:
    tensor = tensor_of(node)
    assert tensor is not None
    return tuple(
        () if index < len(dims) - 3 and same(size, 1) else labels
        for index, (labels, size) in enumerate(zip(dims, tensor.shape, strict=True))
    )


def from_softmax(node: Node, op: Op, ctx: Context) -> Site | Rejection:
    """Attention by hand: back from the softmax to q kᵀ, forward to the product with v."""
    scores = trace_scores(node, op, ctx)
    if isinstance(scores, Rejection):
        return scores
    used = _trace_values(node, scores, ctx)
    if isinstance(used, Rejection):
        return used
    root, value, out_dims, dropout_p = used
    fills = {mask.fill for mask in scores.masks}
    if len(fills) > 1:
        return Rejection("mixed-fill", "Masks with different fills are mixed.")
    if any(fill is None or fill > 0 or math.isnan(fill) for fill in fills):
        return Rejection("mask-fill", "The mask's fill is not a large negative number.")
    frame = frame_of(scores.split(scores.dims), scores.split(scores.product.rhs.dims))
    head = frame.heads[0] if len(frame.heads) == 1 else None
    core = scores.chain[0]
    q = peel(scores.product.lhs, core, None, ctx.writes)
    k, v = peel_keys_values(scores.product.rhs, core, value, root, head, scores, ctx.writes)
    dtype = _kernel_dtype(scores, q, k, root)
    if isinstance(dtype, Rejection):
        return dtype
    if any(math.isfinite(fill or 0.0) and (fill or 0.0) > _fill_limit(scores, ctx) for fill in fills):
        return Rejection(
            "mask-fill", f"A fill of {max(f for f in fills if f is not None):g} is too small to mask."
        )
    terms = (*scores.biases, *scores.masks)
    count = len(scores.biases)
    mask = (
        MaskSpec("tensor", "", tuple(range(count, count + len(scores.masks)))) if scores.masks else MaskSpec()
    )
    finite = any(math.isfinite(fill or 0.0) for fill in fills)
    if scores.sink is not None and head is None:
        return Rejection("sink", "The heads of the sink and of the scores do not go together.")
    spec = AttentionSpec(
        scores.scale * q.scale * k.scale,
        mask,
        tuple(BiasSpec(index, bias.coeff) for index, bias in enumerate(scores.biases)),
        softcap=scores.softcap,
        sink=count + len(scores.masks) if scores.sink is not None else None,
        dropout_p=dropout_p,
        dead_rows="mean" if finite else "nan" if _may_mask(terms) else "none",
        form="softmax",
    )
    return Site(root, scores, frame, q, k, v, out_dims, dtype, spec, terms, scores.sink)


def _may_mask(terms: tuple[Term, ...]) -> bool:
    """Some term may leave keys out: a mask, or an additive tensor that can be an infinity."""
    return any(term.fill is not None or not is_finite(term.node) for term in terms)


def _fill_limit(scores: Scores, ctx: Context) -> float:
    """Fills at or below this leave an element out: the most negative number of the scores' dtype, or the
    threshold."""
    tensor = tensor_of(scores.chain[0])
    limit = ctx.config.prove_masks.fill_threshold
    return max(limit, torch.finfo(tensor.dtype).min) if tensor is not None else limit


def _kernel_dtype(scores: Scores, q: Peeled, k: Peeled, root: Node) -> torch.dtype | Rejection:
    """The one dtype that q, k and v are used in. Under autocast only the products' results tell."""
    product, out = tensor_of(scores.chain[0]), tensor_of(root)
    sides = [tensor_of(x.operand.node) for x in (q, k)]
    assert product is not None and out is not None
    dtypes = {t.dtype for t in sides if t is not None}
    used = (
        product.dtype if len(dtypes) > 1 or product.dtype in (torch.float16, torch.bfloat16) else dtypes.pop()
    )
    if used == out.dtype:
        return used
    return Rejection(
        "mixed-dtype",
        f"Scores are computed from {used} and the result in {out.dtype}; one kernel can't do both exactly.",
    )


def _trace_values(
    softmax: Node, scores: Scores, ctx: Context
) -> tuple[Node, Operand, Dims, float] | Rejection:
    """Follow the probabilities to the product with v: (that product, v, its result's labels, dropout)."""
    node, dropout_p, dropped_sink = softmax, 0.0, scores.sink is None
    while True:
        users = [user for user in node.users if not _is_shape_query(user)]
        if len(users) != 1:
            return _used_elsewhere(node, users)
        user = users[0]
        op = canonical(user)
        if user.op == "output" or op is None:
            return _used_elsewhere(node, users)
        if ctx.writes.current(node, user) is not node:
            return Rejection("mutation", "The probabilities are written to before they are used.")
        found = value_product(op, node, scores.dims)
        if found is not None:
            if not dropped_sink:
                return Rejection("sink", "The sink's probability is not dropped before the values.")
            return user, found[0], found[1], dropout_p
        if op.get("input") is not node:
            return _used_elsewhere(node, users)
        before, after = tensor_of(node), tensor_of(user)
        assert before is not None and after is not None
        if op.name in ("cast", "clone") and after.dtype in FLOATS:
            pass
        elif op.name == "dropout":
            if dropout_p and op["p"]:
                return Rejection("dropout-twice", "Dropout is applied to the probabilities twice.")
            dropout_p = max(dropout_p, op["p"])
        elif op.name == "view" and scores.reshape(user, before.shape, after.shape):
            pass
        elif op.name == "getitem" and not dropped_sink and _drops_last(op):
            dropped_sink = True
        elif op.name in ("mul", "masked_fill", "where"):
            return Rejection(
                "mask-after-softmax", f"{op.name} acts on the probabilities, after they were normalised."
            )
        elif op.name == "div":
            return Rejection("renormalised", "The probabilities are normalised again after the softmax.")
        else:
            return _used_elsewhere(node, users)
        node = user


def _is_shape_query(node: Node) -> bool:
    op = canonical(node)
    return op is not None and (
        op.name == "size" or (op.name == "getattr" and op["name"] in ("shape", "dtype", "device"))
    )


def _used_elsewhere(node: Node, users: list[Node]) -> Rejection:
    if {"div", "sum"} <= {_name(user) for user in users}:
        return Rejection("renormalised", "The probabilities are normalised again after the softmax.")
    products = [u for u in users if (op := canonical(u)) is not None and value_product_like(op, node)]
    if not products and not any(user.op == "output" for user in users):
        names = ", ".join(sorted({_name(user) for user in users})) or "nothing"
        return Rejection("no-value-product", f"The softmax does not weigh values: it is used by {names}.")
    return Rejection(
        "probabilities-used",
        "The attention probabilities are used outside the product with the values.",
        "output_attentions=False, or need_weights=False for nn.MultiheadAttention, frees the fast kernels.",
    )


def value_product_like(op: Op, node: Node) -> bool:
    return (op.name in ("matmul", "bmm", "baddbmm", "einsum") and op.get("input") is node) or node in (
        op.get("operands") or ()
    )


def _name(node: Node) -> str:
    op = canonical(node)
    return op.name if op is not None else str(getattr(node.target, "__name__", node.target))


def _drops_last(op: Op) -> bool:
    index = op["index"]
    if not isinstance(index, tuple) or not index:
        return False
    rest, last = index[:-1], index[-1]
    whole = all(item is Ellipsis or item == slice(None) for item in rest)
    return whole and last == slice(None, -1, None)


def _check_heads(site: Site) -> Rejection | None:
    """K and V have as many heads as Q, or a divisor of that, and the batch that Q has, or none."""
    operands = [peeled.operand for peeled in (site.q, site.k, site.v)]
    if not all(_has_batch(operand, site) for operand in operands):
        return Rejection("layout", "Query, key and value differ in their batch dimensions.")
    if len(site.frame.heads) != 1:
        return _check_merged_heads(site, operands)
    sizes = [num_heads(operand, site.frame.heads[0], site.scores) for operand in operands]
    heads, kv_heads = sizes[0], sizes[1]
    grouped = isinstance(heads, int) and isinstance(kv_heads, int) and heads % kv_heads == 0
    if same(kv_heads, sizes[2]) and (same(heads, kv_heads) or grouped):
        return None
    return Rejection(
        "layout", f"Heads of query, key and value do not go together: {', '.join(map(str, sizes))}."
    )


def _has_batch(operand: Operand, site: Site) -> bool:
    """An operand has every batch dimension of the scores in its size, or none of them."""
    tensor, dims = tensor_of(operand.node), site.scores.split(operand.dims)
    assert tensor is not None
    have = {label for labels in dims for label in labels}
    sizes = {label: tensor_of(node).shape[dim] for label, (node, dim) in site.scores.sizes.items()}  # type: ignore[union-attr]
    wanted = [label for label in site.frame.batch if not same(sizes.get(label, 0), 1)]
    if any(label in have for label in wanted) and not all(label in have for label in wanted):
        return False
    alone = {
        labels[0]: size for labels, size in zip(operand.dims, tensor.shape, strict=True) if len(labels) == 1
    }
    return all(same(alone[x], sizes[x]) for x in site.frame.batch if x in alone and x in sizes)


def _check_merged_heads(site: Site, operands: list[Operand]) -> Rejection | None:
    """Heads made of several dimensions: Q has all of them, K and V the same leading ones."""
    present = [
        [label for label in site.frame.heads if any(label in d for d in site.scores.split(operand.dims))]
        for operand in operands
    ]
    heads = list(site.frame.heads)
    if present[0] == heads and present[1] == present[2] == heads[: len(present[1])]:
        return None
    return Rejection("layout", "Heads of query, key and value do not go together.")


def _check_reads(site: Site, ctx: Context) -> Rejection | None:
    """Nothing the site reads may be written between being read now and being read by the replacement."""
    reads = [(p.operand.node, p.reader) for p in (site.q, site.k, site.v)]
    reads += [(term.node, term.reader) for term in site.terms]
    if site.sink is not None:
        reads.append((site.sink, site.sink))
    first = site.root if site.scores.product is None else site.scores.chain[0]
    position = ctx.writes.position
    switches = (position.get(node, -1) for node in grad_switches(ctx.gm.graph))
    if any(position[first] < p < position[site.root] for p in switches):
        return Rejection("grad-mode", "Gradients are switched on or off inside the attention.")
    for node, reader in reads:
        if ctx.writes.between(node, site.root, since=reader):
            return Rejection(
                "mutation", f"{node.name} is written to before the attention that reads it is finished."
            )
    return None


# ---------------------------------------------------------------------------------------------------------
# emission


def _operand(emit: Emitter, operand: Operand, site: Site, tail: tuple[str, str]) -> Node:
    node = place(emit, operand.node, operand.dims, site.frame, tail, site.scores, term=False)
    return emit.cast(node, site.dtype)


def _match_batch(emit: Emitter, q: Node, node: Node) -> Node:
    """Broadcast a k or v that is shared by the batch."""
    a, b = tensor_of(q), tensor_of(node)
    assert a is not None and b is not None
    if same(a.shape[0], b.shape[0]) or not same(b.shape[0], 1):
        return node
    return emit.call(torch.ops.aten.expand.default, node, [emit.size(q, 0), -1, -1, -1])


def _term(emit: Emitter, term: Term, site: Site) -> Node:
    tensor = tensor_of(term.node)
    assert tensor is not None
    frame = term.frame[len(term.frame) - tensor.dim() :]
    dims = tuple(() if same(size, 1) else labels for labels, size in zip(frame, tensor.shape, strict=True))
    node = place(emit, term.node, dims, site.frame, ("i", "j"), site.scores, term=True)
    return node if term.keep else emit.call(torch.logical_not, node)


def _sink(emit: Emitter, sink: Node) -> Node:
    """The sink's logits as [H] (or [1]): the batch, query and key dimensions are 1."""
    return emit.call(torch.reshape, sink, [-1])
