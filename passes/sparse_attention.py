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
from collections.abc import Iterator

from torch.fx import Graph, Node

from kp_compiler import cost
from kp_compiler.config import SparseAttentionConfig
from kp_compiler.lowering import ops, select, table
from kp_compiler.metadata import hint
from kp_compiler.passes.attention import shape_of
from kp_compiler.passes.base import Context, Kind, Match, Rejection, Tier, module_of, not_on_cpu
from kp_compiler.specs import AttentionShape, AttentionSpec, SparseSpec

SPARSITY = 0.9  # where neither a share of blocks nor one of the probabilities is asked for


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
        sparse = sparse_spec(config, module_of(site))
        spec = dataclasses.replace(ops.spec_of(site), sparse=sparse)
        refused = select.refused(spec, shape)
        if refused is not None:
            return refused
        chosen = table.choose(spec, shape, ctx.target, ctx.config.attention)
        if isinstance(chosen, Rejection):
            return chosen
        if config.mode == "auto" and (reason := _no_gain(spec, shape, chosen.name, ctx)) is not None:
            return reason
        return Match(site, spec, spec=str(spec))

    def rewrite(self, graph: Graph, match: Match, ctx: Context) -> Node:
        match.site.update_arg(5, match.data.to_json())
        return match.site


def sparse_spec(config: SparseAttentionConfig, module: str) -> SparseSpec:
    """What the settings say for one module."""
    sparsity = config.sparsity
    if sparsity is None:
        sparsity = SPARSITY if config.mass is None else 0.0
    dense = {head for part, heads in config.dense_heads.items() if part in module for head in heads}
    return SparseSpec(
        config.selector, 1.0 - sparsity, config.mass, config.error, config.sink_blocks, config.local_blocks,
        tuple(sorted(dense)), config.estimate, config.shared, config.seed,
    )  # fmt: skip


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
