"""Python source of the Hopper kernel for the gradients of q, k and v of one spec, in Gluon.

A program keeps 128 keys and has 64 or 128 queries at a time stream by, of all heads that share them. Scores
are turned around, so that probabilities and their gradients are operands from registers:

    sᵀ = k qᵀ,  dpᵀ = v doutᵀ          pᵀ, dsᵀ as the portable kernel for dk and dv has them
    dv += pᵀ dout,  dk += dsᵀ q        sums that stay in registers
    dq += ds k                         left in shared memory, added to float32 in global memory

    a warp loads         k and v once; q, dout, log-sum-exp and delta into STAGES buffers
    two warpgroups       64 keys each, and half of dq each; q kᵀ of the next tile starts before
                         dq ends: that of this tile or, `late`, of the tile before
    a warp adds          dq, by the tensor memory accelerator, in an order that varies from run to run

Method: Shah et al., FlashAttention-3 (arXiv:2407.08608), section 3 and its appendix B.
"""

from __future__ import annotations

from functools import lru_cache

from kp_compiler.lowering.into import padded
from kp_compiler.lowering.triton.attention_loops import bounds, sides
from kp_compiler.lowering.triton.attention_source import parameters
from kp_compiler.lowering.triton.attention_writer import LOG2E, Layout, Writer, indented
from kp_compiler.lowering.triton.hopper_text import (
    CHUNKS,
    FLAT,
    ROWS,
    SHARED,
    accumulators,
    barriers,
    chunked,
    constants,
    inside,
    listed_start,
    module,
    number,
    placing,
    specialised,
    told,
)
from kp_compiler.specs import AttentionSpec

REGISTERS = (240, 24, 24)  # of a thread of a consumer, of the loading and of the adding warp
DESCRIPTORS = ("q", "dout", "k", "v", "dq")
TILES = (
    "q_tiles", "dout_tiles", "k_tile", "v_tile", "ds_tile", "dq_tile", "lse_rows", "delta_rows", "starts",
)  # fmt: skip
BARRIERS = (
    "kv_full", "q_full", "dout_full", "q_free", "dout_free", "ds_full", "ds_free", "dq_full", "dq_free",
)  # fmt: skip
ORDER = ("order",)
PLACE = ("batch", "kv_head", "head_low", "head_high", "first", "last")


def backward_parameters(spec: AttentionSpec, layout: Layout) -> tuple[str, ...]:
    """Those of the portable kernel for dk and dv, where q, dout, k and v are descriptors [1,1,rows,D], and
    dq, a descriptor [1,1,*`dq_part`] of [B,H,S,D] in float32, is added to. PAIRS is B·K, CHUNK how many of
    them are gone through together; by lists, `order` says which pair and tile comes when, as pair · tiles +
    tile. Where results are `apart`, pairs are of B·H, as dk and dv are."""
    strides = {f"{name}_{dim}" for name in DESCRIPTORS for dim in "bhs"}
    names = [name for name in parameters("dkdv", spec, layout) if name not in strides]
    return ("dq", *names, *(CHUNKS if layout.block is None else ORDER))


@lru_cache(maxsize=1024)
def backward_source(spec: AttentionSpec, layout: Layout) -> str:
    """A module with `kp_attention_hopper_backward`; its parameters are `backward_parameters(spec, layout)`.
    dq is left without the scale."""
    writer = Writer("dkdv", spec, layout)
    names = backward_parameters(spec, layout)
    place = (*PLACE, *placing(names, spec))
    loading = ("q", "dout", "k", "v", "lse", "delta", *TILES, *BARRIERS, *place)
    adding = ("dq", "dq_tile", "dq_full", "dq_free", *place)
    given = (name for name in names if name not in (*DESCRIPTORS, *CHUNKS, *ORDER))
    working = tuple(dict.fromkeys((*TILES, *BARRIERS, *PLACE, *given)))
    rows, columns = dq_part(layout)
    return module(
        constants(layout, PART=rows, COLUMNS=columns, LATE=late(layout)),
        [
            ("loader", loading, _loader(writer)),
            ("adder", adding, _adder(writer)),
            ("consumer", ("WHO: tl.constexpr", *working), _consumer(writer)),
            ("kp_attention_hopper_backward", names, _begin(writer, working, loading, adding)),
        ],
        "from kp_compiler.lowering.triton.tma_add import tma_add\n",
    )


def dq_part(layout: Layout) -> tuple[int, int]:
    """Rows and columns of a tile of dq that each of two warpgroups computes: half of either, 64 rows at
    least."""
    inner, width = layout.tile[1], padded(layout.head_dim)
    return (ROWS, width) if inner == 2 * ROWS else (inner, width // 2)


def late(layout: Layout) -> int:
    """1 where dq comes one tile late. Both warpgroups compute ds of a tile and need both halves: if they take
    them a tile later, neither waits for the other. TFLOP/s of heads of 64, causal, 4k, 8k, 16k tokens: 390,
    479 and 541 late, 386, 439 and 473 else; of heads of 128, 64 queries a tile, where threads have no
    registers left: 432, 486 and 520 late, 460, 521 and 562 else (H100, 2026-11-27)."""
    return int(layout.tile[1] == 2 * ROWS)


def _begin(
    writer: Writer, working: tuple[str, ...], loading: tuple[str, ...], adding: tuple[str, ...]
) -> list[str]:
    """A program's place, its buffers and barriers, and who works on it."""
    found = {"kv_full": ("1", "1"), "q_full": ("STAGES", "1"), "dout_full": ("STAGES", "2")}
    found |= {name: ("STAGES", "2") for name in ("q_free", "dout_free")}
    found |= {name: ("1 + LATE", "2") for name in ("ds_full", "ds_free")}
    found |= {"dq_full": ("1", "2"), "dq_free": ("1", "1")}
    placed = chunked("at // members")  # the first keys first: causal masks leave most of their queries
    if writer.layout.block is not None:
        placed = ["code = tl.load(order + item)", "tile, pair = code % tiles, code // tiles"]
    if writer.layout.apart:
        heads = ["batch, head_low = pair // H, pair % H", "head_high = head_low + 1"]
        heads.append("kv_head = head_low // GROUP")
    else:
        heads = ["batch, kv_head = pair // (H // GROUP), pair % (H // GROUP)"]
        heads += ["head_low = kv_head * GROUP", "head_high = head_low + GROUP"]
    return [
        "tiles = (T + OUTER - 1) // OUTER",
        "item = tl.program_id(0)",
        *placed,
        *heads,
        *writer.span(),
        f"q_tiles = {SHARED}(q.dtype, [STAGES, 1, 1, INNER, D], q.layout)",
        f"dout_tiles = {SHARED}(dout.dtype, [STAGES, 1, 1, INNER, E], dout.layout)",
        f"k_tile = {SHARED}(k.dtype, [2, 1, 1, ROWS, D], k.layout)",
        f"v_tile = {SHARED}(v.dtype, [2, 1, 1, ROWS, E], v.layout)",
        "TURNED: tl.constexpr = tl.NVMMASharedLayout.get_default_for([ROWS, INNER], q.dtype)",
        f"ds_tile = {SHARED}(q.dtype, [2 * (1 + LATE), ROWS, INNER], TURNED)",
        f"dq_tile = {SHARED}(tl.float32, [2, 1, 1, PART, COLUMNS], dq.layout)",
        f"starts = {SHARED}(tl.int32, [STAGES, 1], {FLAT})",
        f"lse_rows = {SHARED}(tl.float32, [STAGES, INNER], {FLAT})",
        f"delta_rows = {SHARED}(tl.float32, [STAGES, INNER], {FLAT})",
        *barriers(found),
        *specialised(2, working, {"loader": loading, "adder": adding}, REGISTERS),
    ]


def _each(writer: Writer, body: list[str], outside: list[str]) -> list[str]:
    """`body` for every head of the group and every tile; `n` counts them all. By lists, the first `edges` of
    them are partly kept."""
    lines = list(outside)
    if writer.layout.block is None:
        assert writer.forms is not None
        lines += [*bounds(writer.forms, "q"), "for i in range(low, high):"]
    else:
        lines += [*writer.listed(), "for i in range(0, listed):"]
    lines += indented([*body, "n += 1"])
    return ["for head in range(head_low, head_high):", *indented(lines)]


def _start(writer: Writer) -> list[str]:
    """The first query of tile i."""
    return ["start = i * INNER"] if writer.layout.block is None else listed_start(writer)


def _edge(writer: Writer) -> str | None:
    """Whether tile i must be masked; None if none must."""
    if writer.layout.block is not None:
        return "i < edges"
    below, above = sides(writer.forms or (), "q")
    ends = (["(i < full_low)"] if below else []) + (["(i >= full_high)"] if above else [])
    return " | ".join(ends) or None


def _loader(writer: Writer) -> list[str]:
    load = "tma.async_copy_global_to_shared"
    lines = ["mbarrier.expect(kv_full.index(0), 2 * (k.block_type.nbytes + v.block_type.nbytes))"]
    for who, name in ((0, "k"), (1, "k"), (0, "v"), (1, "v")):
        place = f"[batch, kv_head, first + {who} * ROWS, 0]"
        lines.append(f"{load}({name}, {place}, kv_full.index(0), {name}_tile.index({who}))")
    body = [*_start(writer), "stage, turned = n % STAGES, ((n // STAGES) & 1) ^ 1"]
    starts = [told("starts.index(stage)", "start")] if writer.layout.block is not None else []
    for name in ("q", "dout"):
        body += [
            f"mbarrier.wait({name}_free.index(stage), turned)",
            *(starts if name == "q" else []),
            f"mbarrier.expect({name}_full.index(stage), {name}.block_type.nbytes)",
            f"{load}({name}, [batch, head, start, 0], {name}_full.index(stage), {name}_tiles.index(stage))",
        ]
    body += [
        "row = start + tl.arange(0, INNER, tl.BlockedLayout([2], [32], [1], [0]))",
        "at = (batch * H + head).to(tl.int64) * S + row",
        f"lse2 = tl.load(lse + at, mask=row < S, other=float('inf')) * {LOG2E}",
        "lse_rows.index(stage).store(tl.where(lse2 == float('-inf'), float('inf'), lse2))",
        "delta_rows.index(stage).store(tl.load(delta + at, mask=row < S, other=0.0))",
        "mbarrier.arrive(dout_full.index(stage), count=1)",
    ]
    return [
        *lines,
        "n = 0",
        *_each(writer, body, []),
        # consumers start on one tile more than there is
        "mbarrier.wait(q_free.index(n % STAGES), ((n // STAGES) & 1) ^ 1)",
        "mbarrier.arrive(q_full.index(n % STAGES), count=1)",
    ]


def _adder(writer: Writer) -> list[str]:
    body = [
        *_start(writer),
        "mbarrier.wait(dq_full.index(0), n & 1)",
        "tma_add(dq, [batch, head, start, 0], dq_tile.index(0))",
        "tma_add(dq, [batch, head, start + INNER - PART, D - COLUMNS], dq_tile.index(1))",
        "tma.store_wait(0)",
        "mbarrier.arrive(dq_free.index(0), count=1)",
    ]
    before = ["mbarrier.wait(dq_full.index(0), 0)", "mbarrier.arrive(dq_free.index(0), count=1)"]
    return [*(before if late(writer.layout) else []), "n = LATE", *_each(writer, body, [])]


def _consumer(writer: Writer) -> list[str]:
    # dq of a tile before the first, of what happens to be there, is computed and not added
    before = ["mbarrier.arrive(ds_full.index(0), count=1)"]
    after = [*_query_gradient(writer), "part = warpgroup_mma_wait(0, [rest])", *LEAVE]
    if not late(writer.layout):
        before, after = [], []
    return [
        *accumulators(SCORES="INNER", KEYS="D", VALUES="E", QUERIES="COLUMNS"),
        "k_at = (first + WHO * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES)))[:, None]",
        "dk_acc = tl.zeros([ROWS, D], tl.float32, KEYS)",
        "dv_acc = tl.zeros([ROWS, E], tl.float32, VALUES)",
        "mbarrier.wait(kv_full.index(0), 0)",
        "n = 0",
        *before,
        *_product("n"),
        "ahead = warpgroup_mma_wait(0, [product])",
        *_each(writer, _round(writer), writer.formula.outside),
        *after,
        *_results(writer),
    ]


# What the compiler can't tell from zero. With places in shared memory that don't change it would keep one
# descriptor in registers for each of a tile's 36 products, and have none left: they were in local memory.
ZERO = "(n >> 30)"


def _product(n: str) -> list[str]:
    """Start k qᵀ of the n-th tile."""
    key = f"k_tile.index(WHO + {ZERO}).reshape([ROWS, D])"
    query = f"q_tiles.index(({n}) % STAGES).reshape([INNER, D]).permute((1, 0))"
    empty = "tl.zeros([ROWS, INNER], tl.float32, SCORES)"
    return [
        f"mbarrier.wait(q_full.index(({n}) % STAGES), (({n}) // STAGES) & 1)",
        f"product = warpgroup_mma({key}, {query}, {empty}, use_acc=False, is_async=True)",
    ]


def _round(writer: Writer) -> list[str]:
    """Tile n: all products but k qᵀ, and that of the next tile."""
    row = "tl.SliceLayout(0, SCORES)"
    edge = _edge(writer)
    masks = writer.masks("pairs")
    told_start = [f"start = {number('starts.index(stage)')}"]
    lines = [
        "stage, turned = n % STAGES, (n // STAGES) & 1",
        *(_start(writer) if writer.layout.block is None else told_start),
        f"q_at = (start + tl.arange(0, INNER, {row}))[None, :]",
        "query = q_tiles.index(stage).reshape([INNER, D])",
        "grad = dout_tiles.index(stage).reshape([INNER, E])",
        "mbarrier.wait(dout_full.index(stage), turned)",
        f"value = v_tile.index(WHO + {ZERO}).reshape([ROWS, E])",
        "empty = tl.zeros([ROWS, INNER], tl.float32, SCORES)",
        "other = warpgroup_mma(value, grad.permute((1, 0)), empty, use_acc=False, is_async=True)",
        "s = ahead",
        *writer.changes(masked=""),
    ]
    if masks and edge is not None:
        lines += [f"if {edge}:", *indented(masks)]
    if "k" not in writer.layout.whole:  # what dq takes from these keys must be zeros, not infinity
        lines += ["if last < first + OUTER - 1:", "    s = tl.where(k_at < T, s, float('-inf'))"]
    lines += [
        f"lse2 = lse_rows.index(stage).load({row})",
        *writer.probabilities(),
        "weights = tl.convert_layout(p.to(q_tiles.dtype), tl.DotOperandLayout(0, VALUES, 2))",
        "dv_sum = warpgroup_mma(weights, grad, dv_acc, is_async=True)",
        "dp = warpgroup_mma_wait(1, [other])",
        f"delta_row = delta_rows.index(stage).load({row})",
        *writer.score_gradients(),
        "change = ds.to(q_tiles.dtype)",
        f"mbarrier.wait({of_ds('ds_free', 'n + LATE', '^ 1')})",
        "ds_tile.index(((n + LATE) & LATE) * 2 + WHO).store(change)",
        "fence_async_shared()",
        "mbarrier.arrive(ds_full.index((n + LATE) & LATE), count=1)",
        "dv_acc = warpgroup_mma_wait(0, [dv_sum])",
        "mbarrier.arrive(dout_free.index(stage), count=1)",
        "change = tl.convert_layout(change, tl.DotOperandLayout(0, KEYS, 2))",
    ]
    key_gradient = "dk_sum = warpgroup_mma(change, query, dk_acc, is_async=True)"
    q_free = "mbarrier.arrive(q_free.index(stage), count=1)"
    ds_free = "mbarrier.arrive(ds_free.index(n & LATE), count=1)"
    if late(writer.layout):
        lines += [*_query_gradient(writer), key_gradient, *_product("n + 1")]
        lines += ["part = warpgroup_mma_wait(2, [rest])", ds_free, *LEAVE]
        lines += ["dk_acc = warpgroup_mma_wait(1, [dk_sum])", q_free]
    else:
        lines += [key_gradient, *_query_gradient(writer), *_product("n + 1")]
        lines += ["dk_acc, part = warpgroup_mma_wait(1, [dk_sum, rest])", q_free, ds_free, *LEAVE]
    # in flight over the end of a loop, the compiler would wait for every product where it starts
    return [*lines, "ahead = warpgroup_mma_wait(0, [product])"]


def of_ds(barrier: str, n: str, turned: str = "") -> str:
    """A barrier of the n-th tile of ds, and its phase."""
    return f"{barrier}.index(({n}) & LATE), ((({n}) >> LATE) & 1) {turned}".rstrip()


def _query_gradient(writer: Writer) -> list[str]:
    """Start this warpgroup's part of ds k, of the n-th tile of ds: that of this tile or of the one before."""
    lines = [
        f"mbarrier.wait({of_ds('ds_full', 'n')})",
        "rest = tl.zeros([PART, COLUMNS], tl.float32, QUERIES)",
    ]
    buffer = "(n & LATE) * 2" if late(writer.layout) else ZERO
    for half, use in ((0, ", use_acc=False"), (1, "")):
        left = f"ds_tile.index({buffer} + {half})"
        right = f"k_tile.index({half} + {ZERO}).reshape([ROWS, D])"
        left += ".slice(WHO * PART, PART, 1)" if writer.layout.tile[1] == 2 * ROWS else ""
        right += ".slice(WHO * COLUMNS, COLUMNS, 1)" if writer.layout.tile[1] == ROWS else ""
        lines.append(f"rest = warpgroup_mma({left}.permute((1, 0)), {right}, rest{use}, is_async=True)")
    return lines


# A warpgroup's part of dq goes to the warp that adds it.
LEAVE = (
    "mbarrier.wait(dq_free.index(0), (n & 1) ^ 1)",
    "dq_tile.index(WHO).reshape([PART, COLUMNS]).store(part)",
    "fence_async_shared()",
    "mbarrier.arrive(dq_full.index(0), count=1)",
)


def _results(writer: Writer) -> list[str]:
    lines, head = [], "head_low" if writer.layout.apart else "kv_head"
    for name, width, size, layout, change in (
        ("dk", "D", writer.layout.head_dim, "KEYS", f" * {writer.spec.scale!r}"),
        ("dv", "E", writer.layout.value_dim, "VALUES", ""),
    ):
        rows = f"(first + WHO * ROWS + tl.arange(0, ROWS, tl.SliceLayout(1, {layout})))[:, None]"
        columns = f"tl.arange(0, {width}, tl.SliceLayout(0, {layout}))[None, :]"
        ragged = None if "k" in writer.layout.whole else f"{rows} < T"
        masked = inside(rows=ragged, columns=columns, size=size)
        value = f"({name}_acc{change}).to({name}.dtype.element_ty)"
        value += f" + tl.load(place{masked})" if writer.layout.adds else ""
        lines += [
            f"{name} += batch.to(tl.int64) * {name}_b + {head}.to(tl.int64) * {name}_h",
            f"place = {name} + {rows}.to(tl.int64) * {name}_s + {columns}",
            f"tl.store(place, {value}{masked})",
        ]
    return lines
