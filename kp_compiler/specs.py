"""What an attention site computes, as pure data: hashable, comparable, JSON-able, free of graph nodes.

Dimensions: B batch, H query heads, K key/value heads (H % K == 0), S query length, T key length, D head size
of q and k, E head size of v. An attention site computes

    s[b,h,i,j] = scale * q[b,h,i,:] . k[b,h//(H/K),j,:]
    s          = cap * tanh(s / cap)                    if softcap
    s          = s + sum_n coeff_n * bias_n[b,h,i,j]    biases broadcast to [B,H,S,T]
    p          = softmax over j with mask[b,h,i,j] false meaning "left out", plus an optional sink logit
    out        = dropout(p) @ v

Tensors that a spec refers to (biases, masks, sinks, per-token vectors) are the op's `operands`, by index.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from typing import Any, Literal

DeadRows = Literal["none", "zero", "nan", "mean"]
MaskKind = Literal[
    "full", "causal", "window", "document", "padding", "prefix", "chunked", "pointwise", "tensor"
]


@dataclass(frozen=True)
class MaskSpec:
    """Which (query i, key j) pairs take part.

    `expr` is a sympy expression over the symbols b, h, q, k, scalars n0, n1, … and look-ups t0(b, k), t1(b,
    q), … written as a string; "True" keeps everything. `tensors` and `scalars` say which operand each name
    reads. A mask that could not be proved has kind "tensor": then `expr` is empty and `tensors` holds the
    operands whose conjunction is the mask (True keeps).
    """

    kind: MaskKind = "full"
    expr: str = "True"
    tensors: tuple[int, ...] = ()
    scalars: int = 0  # how many of the op's scalars the expression reads, as n0, n1, …
    monotone: tuple[int, ...] = ()  # which tN never decrease along their last dimension
    window: int | None = None  # number of keys seen, the query's own included
    parts: tuple[str, ...] = ()  # names of the conjuncts, for people

    def __str__(self) -> str:
        label = "+".join(self.parts) or self.kind
        return f"{label}({self.window})" if self.window is not None else label


CAUSAL = MaskSpec("causal", "k <= q", parts=("causal",))


@dataclass(frozen=True)
class BiasSpec:
    """One additive term: `coeff * operand`, the operand broadcasting to [B, H, S, T]."""

    operand: int
    coeff: float = 1.0


@dataclass(frozen=True)
class SparseSpec:
    """Which blocks of pairs a site computes, chosen for each head when it runs: those that `selector` gives
    most, as many as `density` of the blocks that the mask leaves, or, where `mass` is given, as few as hold
    this share of the estimated probabilities. Always among them are the first `sink_blocks` that the mask
    leaves a row of blocks, and `local_blocks`, one at least: that of the queries' own keys and those before.
    Heads in `dense`, and heads whose output is off by more than `error`, as sampled rows show it, compute
    all. The mask stays what it is inside of blocks."""

    selector: str
    density: float = 1.0
    mass: float | None = None
    error: float | None = None
    sink_blocks: int = 1
    local_blocks: int = 2
    dense: tuple[int, ...] = ()
    estimate: Literal["sampled", "pooled", "antidiagonal"] = "sampled"  # of `content`
    shared: bool = False  # one choice for all query heads of a key head
    seed: int = 0  # of `random`
    gates: tuple[int, ...] = ()  # of `learned`: the operands that they are
    block: int = 128  # queries, and keys

    def __str__(self) -> str:
        parts = [f"{self.density:.0%} of blocks" if self.mass is None else f"{self.mass:.0%} of mass"]
        if self.error is not None:
            parts.append(f"error below {self.error:g}")
        if self.dense:
            parts.append(f"{len(self.dense)} head{'s' * (len(self.dense) > 1)} dense")
        return ", ".join([self.selector, *parts])


@dataclass(frozen=True)
class AttentionSpec:
    """See the module docstring. `dead_rows` says what a query with every key masked returns."""

    scale: float
    mask: MaskSpec = field(default_factory=MaskSpec)
    biases: tuple[BiasSpec, ...] = ()
    softcap: float | None = None
    sink: int | None = None
    dropout_p: float = 0.0
    dead_rows: DeadRows = "none"
    fill: Literal["where", "add"] = (
        "where"  # how a finite fill entered the scores: matters to gradients of dead rows
    )
    form: str = "sdpa"  # the spelling it was raised from
    sparse: SparseSpec | None = None  # not all pairs that the mask keeps: an approximation

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> AttentionSpec:
        data = json.loads(text)
        data.pop("fingerprint", None)  # there for cache keys
        data["mask"] = MaskSpec(**_tuples(data["mask"]))
        data["biases"] = tuple(BiasSpec(**bias) for bias in data["biases"])
        data["sparse"] = SparseSpec(**_tuples(data["sparse"])) if data.get("sparse") else None
        return cls(**data)

    def operands(self) -> tuple[int, ...]:
        """Indices of every operand the spec reads."""
        used = [*self.mask.tensors, *(bias.operand for bias in self.biases)]
        if self.sink is not None:
            used.append(self.sink)
        if self.sparse is not None:
            used += self.sparse.gates
        return tuple(sorted(set(used)))

    def renumbered(self, new: dict[int, int]) -> AttentionSpec:
        """The same spec with operand indices mapped through `new`."""
        mask = dataclasses.replace(self.mask, tensors=tuple(new[i] for i in self.mask.tensors))
        biases = tuple(BiasSpec(new[bias.operand], bias.coeff) for bias in self.biases)
        sink = None if self.sink is None else new[self.sink]
        sparse = self.sparse
        if sparse is not None:
            sparse = dataclasses.replace(sparse, gates=tuple(new[i] for i in sparse.gates))
        return dataclasses.replace(self, mask=mask, biases=biases, sink=sink, sparse=sparse)

    def __str__(self) -> str:
        parts = [str(self.mask)]
        if self.softcap is not None:
            parts.append(f"softcap {self.softcap:g}")
        if self.biases:
            parts.append(f"{len(self.biases)} bias" + ("es" if len(self.biases) > 1 else ""))
        if self.sink is not None:
            parts.append("sink")
        if self.dropout_p:
            parts.append(f"dropout {self.dropout_p:g}")
        if self.sparse is not None:
            parts.append(str(self.sparse))
        return ", ".join(parts)


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of a site (ints, or SymInts where dynamic), its dtype, and whether gradients are needed."""

    batch: Any
    heads: Any
    kv_heads: Any
    queries: Any
    keys: Any
    head_dim: Any
    value_dim: Any
    dtype: Any
    device: str
    training: bool
    bias_grad: bool = False

    def describe(self) -> str:
        heads = f"{self.heads}" if str(self.heads) == str(self.kv_heads) else f"{self.heads}:{self.kv_heads}"
        return (
            f"B{self.batch} H{heads} S{self.queries}x{self.keys} D{self.head_dim} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


@dataclass(frozen=True)
class LinearSpec:
    """out[..., n] = sum_k x[..., k] * weight[n, k] + bias[n].

    `transposed`: the weight is stored [K, N], as GPT-2's Conv1D and `x @ w` have it; otherwise [N, K].
    """

    transposed: bool = False
    bias: bool = False
    form: str = "linear"  # the spelling it was raised from

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> LinearSpec:
        return cls(**json.loads(text))


@dataclass(frozen=True)
class LinearShape:
    """M rows (the product of all leading sizes; an int or SymInt), K inputs, N outputs, the dtype of the
    result, and which gradients are needed."""

    rows: Any
    inputs: Any
    outputs: Any
    dtype: Any
    grad_x: bool = False
    grad_w: bool = False

    def describe(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"M{self.rows} K{self.inputs} N{self.outputs} {dtype}"
