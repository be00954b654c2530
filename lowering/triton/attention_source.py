"""Python source of the attention kernels for one spec: forward, gradients of q, of k and v, and of a bias.

    forward    s = scale q kᵀ, capped, with biases, masked     m, l: running maximum and sum of exp(s - m)
               out = Σ exp(s - m) v / l                        lse = m + log l
    backward   p = exp(s - lse),  dp = dout vᵀ,  ds = p (dp - delta),  delta = rowsum(dout out) - dlse
               dq = scale ds k,  dk = scale dsᵀ q,  dv = pᵀ dout,  dbias = ds, without its coefficient

Method: Dao, FlashAttention-2 (arXiv:2307.08691). A program owns a tile of `OUTER` indices and goes through
the other ones by `INNER`: queries outside for out, dq and dbias, keys outside for dk and dv, whose sums over
the query heads of a key head are taken in the same program. Nothing is added up by atomic operations, so
results are the same in every run. Exponentials are of base two. Head sizes are taken in pieces that are
powers of two (96 is 64 and 32), q and k of one size, v of another.

Written as text since a spec has no end of forms: its mask, biases, soft-cap, sinks and dropout are lines of
the loops, and a spec without them has none. Loads past the ends are masked unless sizes are multiples of
tiles.
"""

from __future__ import annotations

from functools import lru_cache
from textwrap import indent

from kp_compiler.lowering.triton.attention_loops import SIZES, bounds
from kp_compiler.lowering.triton.attention_writer import (
    INFINITY,
    LISTS,
    LN2,
    LOG2E,
    PRECISE,
    Layout,
    Masked,
    Writer,
    halves,
    indented,
    product,
    rounded,
)
from kp_compiler.specs import AttentionSpec


@lru_cache(maxsize=1024)
def source(kernel: str, spec: AttentionSpec, layout: Layout) -> str:
    """A module with `kp_attention_KERNEL`; its parameters are `parameters(kernel, spec, layout)`."""
    body = {"forward": _forward, "dq": _dq, "dkdv": _dkdv, "dbias": _dbias}[kernel](
        Writer(kernel, spec, layout)
    )
    return "\n".join(
        [
            "import triton",
            "import triton.language as tl",
            "",
            "@triton.jit",
            f"def kp_attention_{kernel}({', '.join(parameters(kernel, spec, layout))}):",
            f"    OUTER: tl.constexpr = {layout.tile[0]}",
            f"    INNER: tl.constexpr = {layout.tile[1]}",
            indent("\n".join(body), "    "),
            "",
        ]
    )


def parameters(kernel: str, spec: AttentionSpec, layout: Layout) -> tuple[str, ...]:
    """Names in order: tensors, then numbers (strides as NAME_DIMENSION)."""
    tensors = ["q", "k", "v"]
    tensors += ["out", "lse"] if kernel == "forward" else ["dout", "lse", "delta"]
    tensors += {"forward": [], "dq": ["dq"], "dkdv": ["dk", "dv"], "dbias": ["dbias"]}[kernel]
    if kernel == "forward" and layout.start:
        tensors += ["start_out", "start_lse"]
    if layout.tail:
        tensors.append("tail")
    strided = [t for t in tensors if t not in ("lse", "delta", "start_lse", "dbias", *layout.described)]
    numbers = [f"{t}_{dim}" for t in strided for dim in ("b", "h", "s")]
    for i, dims in enumerate(layout.lookups):
        tensors.append(f"t{i}")
        numbers += [f"t{i}_{dim}" for dim in range(dims)]
    for i in range(len(spec.biases)):
        tensors.append(f"bias{i}")
        numbers += [f"bias{i}_{dim}" for dim in range(4)]
    if spec.sink is not None and kernel == "forward":
        tensors.append("sink")
    if spec.dropout_p:
        tensors.append("seed")
    if layout.block is not None:
        tensors += ["visited"] if kernel == "dbias" else LISTS[:4]
        numbers += LISTS[4:] + (["list_length"] if kernel == "dbias" else [])
    if kernel == "dbias":
        numbers += ["batches", "heads", "own_heads", "dbias_b", "dbias_h", "dbias_q", "dbias_k"]
    return (*tensors, *numbers, "H", "GROUP", "S", "T", *(f"n{i}" for i in range(spec.mask.scalars)))


def _forward(w: Writer) -> list[str]:
    layout = w.layout
    mine = ["q", "out", *(["start_out"] if layout.start else []), *(["tail"] if layout.tail else [])]
    lines = w.begin(reverse=True) + w.advance(mine, "head") + w.advance("kv", "kv_head")
    lines += w.rows("q", "q", w.head, layout.head_dim, "first", "OUTER")
    at = "(batch * H + head).to(tl.int64) * S + first + tl.arange(0, OUTER)"
    masked = "" if "q" in layout.whole else ", mask=first + tl.arange(0, OUTER) < S"
    if layout.start:
        lines += w.started(at, masked)
        lines += w.rows("start_out", "q", w.value, layout.value_dim, "first", "OUTER", to="upper")
        if layout.continues:
            lines += w.rows("tail", "q", w.value, layout.value_dim, "first", "OUTER", to="lower")
        lines.append("many = total[:, None]")
        lines += [f"acc{i} = {w.before(f'upper{i}', f'lower{i}')}" for i in range(len(w.value))]
    else:
        lines += [
            "top = tl.full([OUTER], float('-inf'), tl.float32)",
            "total = tl.zeros([OUTER], tl.float32)",
            *(f"acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.value)),
        ]

    def body(*, masked: Masked) -> list[str]:
        lines = w.indices() + w.rows("k", "k", w.head, layout.head_dim, "start", "INNER", to="key")
        lines += w.rows("v", "k", w.value, layout.value_dim, "start", "INNER", to="value")
        lines += w.scores("q", "key", masked=masked) + w.softmax(masked=masked)
        lines += [
            "total = total * shrink + tl.sum(p, 1)",
            *w.kept(),
            f"weights = ({w.dropped('p')}).to(value0.dtype)",
        ]
        return lines + [
            f"acc{i} = tl.dot(weights, value{i}, acc{i} * shrink[:, None]{PRECISE})"
            for i in range(len(w.value))
        ]

    lines += w.loops(body)
    lines += w.finish()
    value = w.scaled("acc{0} * share[:, None]")
    if layout.unfinished:
        for i in range(len(w.value)):
            lines += rounded(value.format(i), f"bits{i}")
        value, lower = halves("bits{0}", "out.dtype.element_ty")
        lines += w.store("tail", lower, "q", w.value, layout.value_dim)
    lines += w.store("out", value, "q", w.value, layout.value_dim)
    return [*lines, f"tl.store(lse + {at}, lse2 * {LN2}{masked})"]


def _dq(w: Writer) -> list[str]:
    layout = w.layout
    lines = w.begin(reverse=True) + w.advance(["q", "dout", "dq"], "head") + w.advance("kv", "kv_head")
    lines += _query_tiles(w, "first", "OUTER")
    lines += [f"acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.head)]

    def body(*, masked: Masked) -> list[str]:
        lines = w.indices() + _key_tiles(w, "start", "INNER") + w.recomputed("query", "key", masked=masked)
        lines += product("dp", "grad", "value", w.value) + w.score_gradients()
        lines.append("ds = ds.to(key0.dtype)")
        return lines + [f"acc{i} = tl.dot(ds, key{i}, acc{i}{PRECISE})" for i in range(len(w.head))]

    lines += w.loops(body)
    return lines + w.store(
        "dq", "acc{0}" + ("" if layout.adds else f" * {w.spec.scale!r}"), "q", w.head, layout.head_dim
    )


def _dkdv(w: Writer) -> list[str]:
    layout = w.layout
    lines = w.begin(reverse=False) + w.advance(["k", "v", "dk", "dv"], "kv_head")
    lines += _key_tiles(w, "first", "OUTER")
    lines += [f"dk_acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.head)]
    lines += [f"dv_acc{i} = tl.zeros([OUTER, {width}], tl.float32)" for i, (_, width) in enumerate(w.value)]
    moved = [name for name in ("q", "dout") if name not in layout.described]
    lines += [f"all_{name} = {name} + batch.to(tl.int64) * {name}_b" for name in moved]

    def body(*, masked: Masked) -> list[str]:
        lines = w.indices() + _query_tiles(w, "start", "INNER") + w.recomputed("key", "query", masked=masked)
        lines.append(f"weights = ({w.dropped('p')}).to(grad0.dtype)")
        lines += [f"dv_acc{i} = tl.dot(weights, grad{i}, dv_acc{i}{PRECISE})" for i in range(len(w.value))]
        lines += product("dp", "value", "grad", w.value) + w.score_gradients()
        lines.append("ds = ds.to(query0.dtype)")
        return lines + [f"dk_acc{i} = tl.dot(ds, query{i}, dk_acc{i}{PRECISE})" for i in range(len(w.head))]

    lines.append("for member in range(0, GROUP):")
    lines += indented(
        [
            "head = kv_head * GROUP + member",
            *(f"{name} = all_{name} + head.to(tl.int64) * {name}_h" for name in moved),
            *w.loops(body),
        ]
    )
    lines += w.store("dk", f"dk_acc{{0}} * {w.spec.scale!r}", "k", w.head, layout.head_dim)
    return lines + w.store("dv", w.scaled("dv_acc{0}"), "k", w.value, layout.value_dim)


def _dbias(w: Writer) -> list[str]:
    """A program has a tile of pairs and goes through the batches and heads that share it."""
    lines = [
        "tiles, others = (S + OUTER - 1) // OUTER, (T + INNER - 1) // INNER",
        "first = tl.program_id(0) % tiles * OUTER",
        "last = tl.minimum(first + OUTER, S) - 1",
        "start = tl.program_id(0) // tiles % others * INNER",
        "own_batch = tl.program_id(0) // tiles // others // own_heads",
        "own_head = tl.program_id(0) // tiles // others % own_heads",
        "q_row = (first + tl.arange(0, OUTER))[:, None]",
        "q_at = q_row",
        *w.indices(),
        "acc = tl.zeros([OUTER, INNER], tl.float32)",
        "all_q, all_k, all_v, all_dout = q, k, v, dout",
        "members = batches * heads",
    ]
    if w.layout.block is None and w.forms:
        lines += [
            *bounds(w.forms, "k"),
            "members = tl.where((start // INNER >= low) & (start // INNER < high), members, 0)",
        ]
    lines.append(f"for member in tl.range(0, members, num_stages={w.layout.stages}):")
    body = ["batch, head = own_batch + member // heads, own_head + member % heads", "kv_head = head // GROUP"]
    for name, head in (("q", "head"), ("dout", "head"), ("k", "kv_head"), ("v", "kv_head")):
        body.append(f"{name} = all_{name} + batch.to(tl.int64) * {name}_b + {head}.to(tl.int64) * {name}_h")
    body += _query_tiles(w, "first", "OUTER") + _key_tiles(w, "start", "INNER") + w.formula.outside
    if w.layout.block is not None:
        inner, _ = w.block()
        body.append(f"kind = tl.load(visited + ({w.line()}).to(tl.int64) * list_length + start // {inner})")
    body += w.recomputed("query", "key", masked="pairs") + product("dp", "grad", "value", w.value)
    body += w.score_gradients()
    lines += indented(
        [*body, "acc += ds" if w.layout.block is None else "acc += tl.where(kind > 0, ds, 0.0)"]
    )
    summed = sorted(w.layout.summed)
    axes = {"q": (0, "first // OUTER", "q_at"), "k": (1, "start // INNER", "k_at")}
    lines += [f"acc = tl.sum(acc, {axes[name][0]}, keep_dims=True)" for name in summed]
    places = [f"({axes[n][1] if n in summed else axes[n][2]}).to(tl.int64) * dbias_{n}" for n in "qk"]
    base = "own_batch.to(tl.int64) * dbias_b + own_head.to(tl.int64) * dbias_h"
    masks = [f"({n}_at < {SIZES[n]})" for n in "qk" if n not in summed and n not in w.layout.whole]
    masks = [f", mask={' & '.join(masks)}"] if masks else []
    zero = "tl.zeros_like(acc).to(tl.int64)"
    lines.append(f"tl.store(dbias + {base} + {' + '.join(places)} + {zero}, acc{''.join(masks)})")
    return lines


def _query_tiles(w: Writer, start: str, count: str) -> list[str]:
    """Queries and gradients of the output with their log-sum-exp and delta."""
    return [
        *w.rows("q", "q", w.head, w.layout.head_dim, start, count, to="query"),
        *w.rows("dout", "q", w.value, w.layout.value_dim, start, count, to="grad"),
        f"lse2 = {w.vector('lse', 'q', start, count, INFINITY)} * {LOG2E}",
        "lse2 = tl.where(lse2 == float('-inf'), float('inf'), lse2)",
        f"delta_row = {w.vector('delta', 'q', start, count, '0.0')}",
    ]


def _key_tiles(w: Writer, start: str, count: str) -> list[str]:
    return [
        *w.rows("k", "k", w.head, w.layout.head_dim, start, count, to="key"),
        *w.rows("v", "k", w.value, w.layout.value_dim, start, count, to="value"),
    ]
