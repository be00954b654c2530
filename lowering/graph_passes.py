"""Passes over AOTAutograd's graphs, as Inductor takes them.

Inductor has attention patterns of its own. On torch 2.13 they mis-fuse at least two spellings (softmax over
the heads; K through `permute(0, 2, 3, 1)` where B = 1 and S = H), and they would replace what kp refused with
a reason. They all run in one matcher pass over the joint graph and need the softmax's last division to feed
the next operation directly. `Barrier` puts an exact no-op there before the matchers run and takes it out
after: the other patterns still apply, and no configuration outside this compilation changes.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node

from kp_compiler.config import Config
from kp_compiler.lowering.fingerprint import fingerprint
from kp_compiler.lowering.fp8.delayed import let_passes_overlap
from kp_compiler.metadata import copied, copy_nodes, stride_order
from kp_compiler.target import has_package

log = logging.getLogger("kp_compiler")
_MARK = "kp_softmax_barrier"


class Pass(CustomGraphPass):
    """A graph pass with a uuid for Inductor's cache, run after the user's own if there is one."""

    optional = False  # only makes the graph faster: undone where it fails

    def __init__(self, before: Any, config: Config) -> None:
        self.before, self.strict, self.fp8 = before, config.strict, config.fp8_linear
        self.key = f"{type(self).__name__}-{fingerprint()}-{config.fingerprint()}"

    def __call__(self, graph: Graph) -> None:
        if self.before is not None:
            self.before(graph)
        if not self.asked():
            return
        if self.strict or not self.optional:
            self.apply(graph)
        else:
            self._try(graph)

    def asked(self) -> bool:
        """Whether the options call for it."""
        return True

    def _try(self, graph: Graph) -> None:
        before = copied(graph)
        try:
            self.apply(graph)
        except Exception as error:
            _restore(graph, before)
            log.warning("kp: %s failed and was undone: %s", type(self).__name__, error, exc_info=True)

    def apply(self, graph: Graph) -> None:
        raise NotImplementedError

    def uuid(self) -> Any:
        theirs = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        if self.before is not None and theirs is None:
            return None  # their pass forbids caching
        return f"{self.key}-{theirs}"


def _restore(graph: Graph, before: Graph) -> None:
    """The nodes that `before` has, in the same object: the passes that follow are handed it."""
    for node in graph.nodes:
        node.args, node.kwargs = (), {}
    for node in list(graph.nodes):
        graph.erase_node(node)
    copy_nodes(before, graph)


class Barrier(Pass):
    """exp / sum(exp) ─▶ x          exp / sum(exp) ─▶ clamp_min(0) ─▶ x     (a probability is never below
    0)"""

    def apply(self, graph: Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.div.Tensor)):
            if not _is_softmax(node):
                continue
            with graph.inserting_after(node):
                barrier = graph.call_function(torch.ops.aten.clamp_min.default, (node, 0.0))
            barrier.meta.update(node.meta)
            barrier.meta[_MARK] = True
            node.replace_all_uses_with(barrier, delete_user_cb=lambda user, own=barrier: user is not own)


class Unbarrier(Pass):
    """Takes the barriers out again."""

    def apply(self, graph: Graph) -> None:
        for node in list(graph.find_nodes(op="call_function", target=torch.ops.aten.clamp_min.default)):
            if node.meta.get(_MARK):
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                graph.erase_node(node)


class GradLayout(Pass):
    """grad ─▶ cudnn_backward    to    grad ─▶ permute ─▶ clone ─▶ permute ─▶ cudnn_backward

    PyTorch keeps cuDNN's backward plans by the sizes and strides of q, k and v, and not by those of the
    incoming gradient: a plan made for one layout of it then reads another one wrongly. Seen on an H100, torch
    2.11, cuDNN 9.19, 2026-11-23: B2 H4 S24 D16, gradient [B,H,S,D] first and [B,S,H,D] second, relative error
    1.4. So kp always hands the gradient over in the layout of the output, which follows q's.
    """

    def apply(self, graph: Graph) -> None:
        backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
        for node in graph.find_nodes(op="call_function", target=backward):
            _match_layout(graph, node, node.args[0], node.args[4])


class Fp8Pass(Pass):
    """For products in FP8: not where the pass that makes them is off."""

    def asked(self) -> bool:
        return self.fp8.mode != "off"


class StoreProducts(Fp8Pass):
    """Products that the backward pass reads again, in FP8, where `save="fp8"` asks for it."""

    optional = True

    def asked(self) -> bool:
        return super().asked() and self.fp8.save == "fp8"

    def apply(self, graph: Graph) -> None:
        from kp_compiler.lowering.fp8.keep import store_products

        store_products(graph)


class RecomputeCasts(Fp8Pass):
    """What casts of the backward pass read is computed there."""

    optional = True

    def apply(self, graph: Graph) -> None:
        from kp_compiler.lowering.fp8.keep import recompute_casts

        recompute_casts(graph)


class LetPassesOverlap(Fp8Pass):
    """Several forward passes before the first backward pass, under delayed scaling."""

    def apply(self, graph: Graph) -> None:
        let_passes_overlap(graph)


class FuseCasts(Fp8Pass):
    """FP8 casts into their producers, one kernel for each matrix; and no more of merged products kept than is
    read. Casts that are left alone run as they stand, a kernel for each operation."""

    optional = True

    def apply(self, graph: Graph) -> None:
        from kp_compiler.lowering.fp8.fuse import fuse_casts
        from kp_compiler.lowering.fp8.keep import narrow

        if has_package("triton"):
            from kp_compiler.lowering.triton import fused_cast

            fused_cast.register()
        fuse_casts(graph)
        narrow(graph)


def _match_layout(graph: Graph, user: Node, grad: Any, out: Any) -> None:
    """Give `user` its first argument in the order of strides that `out` has."""
    order, have = stride_order(out.meta["val"]), grad.meta["val"]
    if stride_order(have) == order and have.is_contiguous() == out.meta["val"].is_contiguous():
        return
    inverse = sorted(range(len(order)), key=order.__getitem__)
    aten = torch.ops.aten
    node = grad
    with graph.inserting_before(user), have.fake_mode:
        for target, args in (
            (aten.permute.default, (order,)),
            (aten.clone.default, ()),
            (aten.permute.default, (inverse,)),
        ):
            kwargs = {"memory_format": torch.contiguous_format} if target is aten.clone.default else {}
            value = target(node.meta["val"], *args, **kwargs)
            node = graph.call_function(target, (node, *args), kwargs)
            node.meta["val"] = value
    user.replace_input_with(grad, node)


def _is_softmax(node: Node) -> bool:
    """`e / sum(e)` with `e = exp(…)`, casts aside."""
    top, bottom = node.args[0], node.args[1]
    if not isinstance(top, Node) or not isinstance(bottom, Node):
        return False
    bottom = _skip_views(bottom)
    return (
        top.target is torch.ops.aten.exp.default
        and bottom.target is torch.ops.aten.sum.dim_IntList
        and bottom.args[0] is top
    )


def _skip_views(node: Node) -> Node:
    while node.target in (torch.ops.aten.expand.default, torch.ops.prims.convert_element_type.default):
        node = node.args[0]  # type: ignore[assignment]
    return node


# When each runs, in this order: Inductor's option for it -> the passes.
PASSES: dict[str, tuple[type[Pass], ...]] = {
    "joint_custom_pre_pass": (Barrier,),
    "joint_custom_post_pass": (Unbarrier, GradLayout, StoreProducts, RecomputeCasts, LetPassesOverlap),
    "post_grad_custom_pre_pass": (FuseCasts,),
}
