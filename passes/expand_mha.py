"""Write `F.multi_head_attention_forward` out as the operations it stands for.

Dynamo keeps it as one node. Before the passes run it becomes projections, attention and output projection:

    multi_head_attention_forward(q, k, v, …)[0] ─▶ linear ×3, SDPA (or matmul, softmax, matmul), linear

With `need_weights=True` PyTorch computes the softmax by hand, so rows with every key masked are NaN; with
False it calls SDPA, where they are 0. Each is written out as what it is. Calls whose weights are used, and
the rare arguments (bias_k, add_zero_attn, static keys), stay as they are; `refusal` says why.
"""

from __future__ import annotations

import inspect
import math
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from kp_compiler.metadata import number_of, tensor_of
from kp_compiler.passes.base import Emitter
from kp_compiler.report import Rejection

_SIGNATURE = inspect.signature(F.multi_head_attention_forward)
_UNSUPPORTED = ("bias_k", "bias_v", "static_k", "static_v", "add_zero_attn")


def expand_all(graph: Graph) -> int:
    """Expand every call that can be; returns how many."""
    calls = [node for node in graph.find_nodes(op="call_function", target=F.multi_head_attention_forward)]
    good = [node for node in calls if refusal(node) is None]
    for node in good:
        _expand(node)
    return len(good)


def is_composite(node: Node) -> bool:
    """A call that computes attention among other things, and that the walk does not look into."""
    return node.op == "call_function" and (
        node.target is F.multi_head_attention_forward or getattr(node.target, "__name__", "") in _FAST_PATHS
    )


_FAST_PATHS = ("_native_multi_head_attention", "_transformer_encoder_layer_fwd")


def refusal(node: Node) -> Rejection | None:
    """Why a composite call stays as it is."""
    if node.target is not F.multi_head_attention_forward:
        return Rejection(
            "already-fused",
            "PyTorch's fast path for inference computes this layer in one call.",
            "torch.backends.mha.set_fastpath_enabled(False) lets kp see its attention.",
        )
    a = _arguments(node)
    users = list(node.users)
    query = tensor_of(a["query"])
    plain = all(u.op == "call_function" and u.target is operator.getitem for u in users)
    if not plain or any(u.args[1] != 0 and u.users for u in users):
        return Rejection(
            "probabilities-used", "The attention probabilities are used outside the product with the values.",
            "need_weights=False frees the fast kernels.",
        )  # fmt: skip
    if query is None or query.dim() != 3:
        return Rejection("layout", "nn.MultiheadAttention without a batch dimension is left as it is.")
    rare = [name for name in _UNSUPPORTED if a[name] not in (None, False)]
    if rare:
        return Rejection("unknown-op", f"nn.MultiheadAttention with {', '.join(rare)} is left as it is.")
    if not isinstance(a["need_weights"], bool) or number_of(a["dropout_p"]) is None:
        return Rejection("dynamic-flag", "need_weights or dropout_p is not known at compile time.")
    return None


def _arguments(node: Node) -> dict[str, Any]:
    call = _SIGNATURE.bind(*node.args, **node.kwargs)
    call.apply_defaults()
    return call.arguments


def _expand(node: Node) -> None:
    result = _write(Emitter(node, node), _arguments(node))
    for user in list(node.users):
        user.replace_all_uses_with(result)
        node.graph.erase_node(user)
    node.graph.erase_node(node)


def _write(emit: Emitter, a: dict[str, Any]) -> Node:
    q, k, v = (_heads(emit, x, a["num_heads"]) for x in _project(emit, a))
    dropout = number_of(a["dropout_p"]) if a["training"] else 0.0
    assert dropout is not None
    attend = _by_hand if a["need_weights"] else _sdpa
    out = attend(emit, a, q, k, v, dropout)
    length, batch = emit.size(a["query"], 0), emit.size(a["query"], 1)
    flat = emit.call(
        torch.reshape, emit.call(torch.permute, out, [2, 0, 1, 3]), [length, batch, a["embed_dim_to_check"]]
    )
    return emit.call(F.linear, flat, a["out_proj_weight"], a["out_proj_bias"])


def _project(emit: Emitter, a: dict[str, Any]) -> list[Node]:
    """Queries, keys and values, each [length, batch, embed]."""
    inputs = [a["query"], a["key"], a["value"]]
    biases: list[Any] = [None] * 3
    if not a["use_separate_proj_weight"] and inputs[0] is inputs[1] is inputs[2]:
        packed = emit.call(F.linear, inputs[0], a["in_proj_weight"], a["in_proj_bias"])
        return _thirds(emit, packed, -1)
    if a["in_proj_bias"] is not None:
        biases = _thirds(emit, a["in_proj_bias"], 0)
    separate = [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]]
    weights = separate if a["use_separate_proj_weight"] else _thirds(emit, a["in_proj_weight"], 0)
    return [emit.call(F.linear, x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True)]


def _thirds(emit: Emitter, node: Node, dim: int) -> list[Node]:
    parts = emit.call(torch.chunk, node, 3, dim)
    return [emit.call(operator.getitem, parts, index) for index in range(3)]


def _heads(emit: Emitter, node: Node, heads: int) -> Node:
    """[length, batch, embed] as [batch, heads, length, head size]."""
    tensor = tensor_of(node)
    assert tensor is not None
    sizes = [emit.size(node, 0), emit.size(node, 1), heads, tensor.shape[2] // heads]
    return emit.call(torch.permute, emit.call(torch.reshape, node, sizes), [1, 2, 0, 3])


def _sdpa(emit: Emitter, a: dict[str, Any], q: Node, k: Node, v: Node, dropout: float) -> Node:
    causal = bool(a["is_causal"]) and a["key_padding_mask"] is None
    mask = None if causal else _mask(emit, a)
    return emit.call(F.scaled_dot_product_attention, q, k, v, mask, dropout, causal)


def _by_hand(emit: Emitter, a: dict[str, Any], q: Node, k: Node, v: Node, dropout: float) -> Node:
    tensor = tensor_of(q)
    assert tensor is not None
    scaled = emit.call(torch.mul, q, math.sqrt(1.0 / tensor.shape[-1]))
    scores = emit.call(torch.matmul, scaled, emit.call(torch.transpose, k, -2, -1))
    mask = _mask(emit, a)
    if mask is not None:
        scores = emit.call(torch.add, scores, mask)
    probs = emit.call(F.softmax, scores, dim=-1)
    if dropout > 0.0:
        probs = emit.call(F.dropout, probs, p=dropout)
    return emit.call(torch.matmul, probs, v)


def _mask(emit: Emitter, a: dict[str, Any]) -> Node | None:
    """attn_mask and key_padding_mask as one additive mask that broadcasts to [batch, heads, S, T]."""
    total: Node | None = None
    for name in ("attn_mask", "key_padding_mask"):
        mask = a[name]
        if mask is None:
            continue
        mask = _additive(emit, mask, a["query"])
        tensor = tensor_of(mask)
        assert tensor is not None
        if name == "key_padding_mask":
            mask = emit.call(torch.unsqueeze, emit.call(torch.unsqueeze, mask, 1), 1)
        elif tensor.dim() == 3:
            sizes = [emit.size(a["query"], 1), a["num_heads"], emit.size(mask, 1), emit.size(mask, 2)]
            mask = emit.call(torch.reshape, mask, sizes)
        total = mask if total is None else emit.call(torch.add, total, mask)
    return total


def _additive(emit: Emitter, mask: Node, query: Node) -> Node:
    """Boolean masks of this function are true where a key is left out."""
    tensor, like = tensor_of(mask), tensor_of(query)
    assert tensor is not None and like is not None
    if tensor.dtype != torch.bool:
        return mask
    zeros = emit.call(torch.zeros_like, mask, dtype=like.dtype)
    return emit.call(torch.masked_fill, zeros, mask, -math.inf)
