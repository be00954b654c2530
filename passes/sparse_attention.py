"""Compute only the blocks of attention that hold most of it, chosen from q and k when the model runs.

    kp.attention(q, k, v, [], causal) ─▶ kp.attention(q, k, v, [], causal, content, 10% of blocks)

An approximation, and off by default. Which blocks is decided for each head and each 128 queries, on the
device; inside of the blocks the mask stays what it is, and gradients are those of what was computed.

Fires where the mask is proved and kp's own kernels take the site. Refuses contexts shorter than `min_tokens`,
scores with biases that the selector would not see, rows without keys that mean something else than zeros,
and, under `auto`, sites where choosing is predicted to cost what leaving out saves; those stay dense.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from kp_compiler import cost
from kp_compiler.lowering import ops, select, table
from kp_compiler.lowering.tap import emit_tap
from kp_compiler.metadata import hint, tensor_of
from kp_compiler.passes import sparse_choice
from kp_compiler.passes.attention import shape_of
from kp_compiler.passes.base import (
    Context,
    Emitter,
    Kind,
    Match,
    Rejection,
    Tier,
    fake_mode,
    module_of,
    not_on_cpu,
)
from kp_compiler.runtime import add_inputs
from kp_compiler.specs import AttentionShape, AttentionSpec


class SparseAttention:
    """See the module docstring."""

    name = "sparse_attention"
    tier: Tier = "approximate"
    kind: Kind = "attention"
    final = False
    serves: tuple[str, ...] = ()

    def applies(self, ctx: Context) -> Rejection | None:
        return not_on_cpu(ctx)

    def sites(self, graph: Graph) -> Iterator[Node]:
        yield from (node for node in graph.nodes if ops.is_attention(node))

    def inspect(self, site: Node, ctx: Context) -> Match | Rejection:
        config, shape = ctx.config.sparse_attention, shape_of(site, ctx)
        if hint(shape.keys) < config.min_tokens:
            return Rejection(
                "short",
                f"{hint(shape.keys)} keys are fewer than {config.min_tokens}.",
                "sparse_attention={'min_tokens': …} sets where it begins.",
            )
        choice = sparse_choice.choose(config, module_of(site), shape)
        if isinstance(choice, Rejection):
            return choice
        if choice.gates is not None and ctx.calls:
            return Rejection("checkpoint", "Gates can't be handed to the body of a checkpoint.")
        spec = dataclasses.replace(ops.spec_of(site), sparse=choice.sparse)
        refused = select.refused(spec, shape)
        if refused is not None:
            return refused
        chosen = table.choose(spec, shape, ctx.target, ctx.config.attention)
        if isinstance(chosen, Rejection):
            return chosen
        if (
            config.observer is None
            and config.mode == "auto"
            and (reason := _no_gain(spec, shape, chosen.name, ctx)) is not None
        ):
            return reason
        return Match(site, (spec, choice), spec=str(spec))

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        site, (spec, choice) = match.site, match.data
        observer = ctx.config.sparse_attention.observer
        if observer is not None:
            site.update_arg(0, emit_tap(Emitter(site, site), site, spec, module_of(site), observer))
            return site
        if choice.gates is not None:
            spec = _with_gates(site, spec, choice.gates, ctx)
        site.update_arg(5, spec.to_json())
        site.meta["kp_measured"] = choice.measured
        return site


def _with_gates(site: Node, spec: AttentionSpec, gates: tuple[Tensor, Tensor], ctx: Context) -> AttentionSpec:
    """Gates become inputs of the graph, and operands of the site."""
    given, q = site.args[3], tensor_of(site.args[0])
    assert isinstance(given, list | tuple) and q is not None and spec.sparse is not None
    with fake_mode(site.graph):
        fakes = [torch.empty(x.shape, device=q.device) for x in gates]
    nodes = add_inputs(ctx.gm, Gates(gates, q.device), fakes, site, [True, True])
    site.update_arg(3, [*given, *nodes])
    sparse = dataclasses.replace(spec.sparse, gates=(len(given), len(given) + 1))
    return dataclasses.replace(spec, sparse=sparse)


@dataclass(frozen=True, eq=False)
class Gates:
    """Provides them, on the device of a site."""

    gates: tuple[Tensor, Tensor]
    device: torch.device
    there: list[Tensor] = field(default_factory=list)

    def tensors(self, args: Sequence[Any]) -> Sequence[Tensor]:
        if not self.there:
            self.there.extend(x.to(self.device) for x in self.gates)
        return self.there


def _no_gain(spec: AttentionSpec, shape: AttentionShape, impl: str, ctx: Context) -> Rejection | None:
    whole = dataclasses.replace(spec, sparse=None)
    dense = table.choose(whole, shape, ctx.target, ctx.config.attention)
    if isinstance(dense, Rejection):
        return None
    mine, theirs = (
        cost.predict(each, shape, name, ctx.target) for each, name in ((spec, impl), (whole, dense.name))
    )
    if mine is None or theirs is None or mine["forward_ms"] < theirs["forward_ms"]:
        return None
    return Rejection(
        "no-gain",
        f"Choosing and computing blocks is predicted to take {mine['forward_ms']} ms, {dense.name} for all "
        f"of them {theirs['forward_ms']}.",
        "sparse_attention='on' takes it all the same.",
    )
