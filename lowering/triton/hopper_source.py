"""Python source of the Hopper forward kernel for one spec, in Gluon: the portable one's mathematics by
Hopper's own means.

    a warp loads    q of two items, tiles of k and v into STAGES buffers, by the tensor memory accelerator
    two or three    64 queries each: while products of one run on the tensor cores, another takes its
    warpgroups      exponentials (they take turns), and each starts q kᵀ of a tile before p v of the last

Method: Shah et al., FlashAttention-3 (arXiv:2407.08608). An item is a tile of queries of one head; a program
goes through several, so that loads and first products of the next run beside the end of the last. Tiles of
keys come from the high end of the loop down, or in the order of lists. Each warpgroup masks those that its
own rows don't keep wholly (`attention_loops.bounds`).
"""

from __future__ import annotations

from functools import lru_cache

from kp_compiler.lowering.into import padded
from kp_compiler.lowering.triton.attention_loops import bounds, sides
from kp_compiler.lowering.triton.attention_source import parameters
from kp_compiler.lowering.triton.attention_writer import LN2, Layout, Writer, halves, indented, rounded
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
    tails,
    told,
)
from kp_compiler.specs import AttentionSpec

# of a consumer's threads and of the producer's, by the number of consumers: 65536 in all, a warp counts four
REGISTERS = {2: (240, 24), 3: (160, 32)}
BUFFERS = (
    "q_tiles", "k_tiles", "v_tiles", "items", "starts", "turn", "q_full", "q_free", "k_full", "k_free",
    "v_full", "v_free", "item_full", "item_free",
)  # fmt: skip
ITEMS = ("taken", *CHUNKS)


def hopper_parameters(spec: AttentionSpec, layout: Layout) -> tuple[str, ...]:
    """Those of the portable kernel, where q, k, v and out are descriptors [1,1,rows,D] of [B,H,S,D]; then
    `taken`, a zero in int32, PAIRS, B·H, and CHUNK, how many heads are gone through together."""
    strides = {f"{name}_{dim}" for name in ("q", "k", "v", "out") for dim in "bhs"}
    return (*(name for name in parameters("forward", spec, layout) if name not in strides), *ITEMS)


@lru_cache(maxsize=1024)
def hopper_source(spec: AttentionSpec, layout: Layout) -> str:
    """A module with `kp_attention_hopper`; its parameters are `hopper_parameters(spec, layout)`."""
    writer = Writer("forward", spec, layout)
    names = hopper_parameters(spec, layout)
    working = (*BUFFERS, *(name for name in names if name not in ("q", "k", "v")))
    loading = ("q", "k", "v", *BUFFERS, *placing(names, spec), *ITEMS)
    return module(
        constants(layout, QUEUE=_queue(layout)),  # items whose queries are in shared memory
        [
            ("producer", loading, _producer(writer)),
            ("consumer", ("WHO: tl.constexpr", *working), _consumer(writer)),
            ("kp_attention_hopper", names, _begin(layout, working, loading)),
        ],
    )


def _queue(layout: Layout) -> int:
    return 2 if padded(layout.head_dim) <= 128 else 1


def _begin(layout: Layout, working: tuple[str, ...], loading: tuple[str, ...]) -> list[str]:
    """A program's buffers and barriers, and who works on it."""
    parts = layout.tile[0] // ROWS
    found = {"turn": ("PARTS", "1"), "q_full": ("QUEUE", "1"), "q_free": ("QUEUE", "PARTS")}
    found |= {"item_full": ("2", "1"), "item_free": ("2", "PARTS")}
    found |= {f"{name}_full": ("STAGES", "1") for name in "kv"}
    found |= {f"{name}_free": ("STAGES", "PARTS") for name in "kv"}
    return [
        f"q_tiles = {SHARED}(q.dtype, [QUEUE * PARTS, 1, 1, ROWS, D], q.layout)",
        f"k_tiles = {SHARED}(k.dtype, [STAGES, 1, 1, INNER, D], k.layout)",
        f"v_tiles = {SHARED}(v.dtype, [STAGES, 1, 1, INNER, E], v.layout)",
        f"items = {SHARED}(tl.int32, [2, 1], {FLAT})",
        f"starts = {SHARED}(tl.int32, [STAGES, 1], {FLAT})",
        *barriers(found),
        "mbarrier.arrive(turn.index(0), count=1)",
        *specialised(parts, working, {"producer": loading}, REGISTERS[parts]),
    ]


def _items(writer: Writer, before: list[str], body: list[str]) -> list[str]:
    """`body` for each item of a program: its own number first, then whichever `body` sets as `next_item`.
    Items go through CHUNK heads at a time, the last tiles of all of them first, where causal masks leave most
    to do. `lap` counts items, `n` tiles of keys."""
    place = [
        *chunked("tiles - 1 - at // members"),
        "batch, head = pair // H, pair % H",
        "kv_head = head // GROUP",
        *writer.span(),
        *_tiles(writer),
    ]
    return [
        "tiles = (S + OUTER - 1) // OUTER",
        "item = tl.program_id(0)",
        "lap = 0",
        "n = 0",
        *before,
        "while item < tiles * PAIRS:",
        *indented([*place, *body, "item = next_item", "lap += 1", "n += count"]),
    ]


def _tiles(writer: Writer) -> list[str]:
    """An item's `count` tiles, one at least: down from the one before `end`, or in order of lists, the first
    `edges` of them partly kept."""
    if writer.layout.block is None:
        assert writer.forms is not None
        lines = bounds(writer.forms, "k")
        end = "end = tl.minimum(tl.maximum(high, 1), (T + INNER - 1) // INNER)"
        return [*lines, end, "count = tl.maximum(end - low, 1)"]
    return [*writer.listed(), "count = tl.maximum(listed, 1)"]


def _start(writer: Writer) -> list[str]:
    """The first key of tile i; of one that is wholly masked where there are none to visit. Of lists, the
    producer tells it."""
    if writer.layout.block is None:
        return ["start = (end - 1 - i) * INNER"]
    return listed_start(writer)


def _edge(writer: Writer) -> str:
    """Whether tile i holds pairs that a warpgroup must leave out. Lists don't say which block holds the end;
    a line of them may be empty."""
    ragged = "k" not in writer.layout.whole
    if writer.layout.block is not None:
        return "(i < edges) | (i >= listed)" + (" | (start + INNER > T)" if ragged else "")
    below, above = sides(writer.forms or (), "k")
    ends = ["(end - 1 - i >= full_high)"] if above or ragged else []
    return " | ".join([*ends, *(["(end - 1 - i < full_low)"] if below else [])])


def _producer(writer: Writer) -> list[str]:
    load = "tma.async_copy_global_to_shared"
    loop = [*_start(writer), "stage, turned = (n + i) % STAGES, (((n + i) // STAGES) & 1) ^ 1"]
    starts = [told("starts.index(stage)", "start")] if writer.layout.block is not None else []
    for name in "kv":
        loop += [
            f"mbarrier.wait({name}_free.index(stage), turned)",
            *(starts if name == "k" else []),
            f"mbarrier.expect({name}_full.index(stage), {name}.block_type.nbytes)",
            f"{load}({name}, [batch, kv_head, start, 0], "
            f"{name}_full.index(stage), {name}_tiles.index(stage))",
        ]
    body = [
        "mbarrier.wait(q_free.index(lap % QUEUE), ((lap // QUEUE) & 1) ^ 1)",
        "mbarrier.expect(q_full.index(lap % QUEUE), PARTS * q.block_type.nbytes)",
        "for part in tl.static_range(PARTS):",
        f"    {load}(q, [batch, head, first + part * ROWS, 0], q_full.index(lap % QUEUE), "
        "q_tiles.index(lap % QUEUE * PARTS + part))",
        "next_item = tl.atomic_add(taken, 1, sem='relaxed') + tl.num_programs(0)",
        "mbarrier.wait(item_free.index(lap % 2), ((lap // 2) & 1) ^ 1)",
        told("items.index(lap % 2)", "next_item"),
        "mbarrier.arrive(item_full.index(lap % 2), count=1)",
        "for i in range(0, count):",
        *indented(loop),
    ]
    items = _items(writer, [], body)
    if _queue(writer.layout) == 1:
        return items
    return [
        *items,
        # consumers start on one tile more than there is
        "mbarrier.wait(q_free.index(lap % QUEUE), ((lap // QUEUE) & 1) ^ 1)",
        "mbarrier.arrive(q_full.index(lap % QUEUE), count=1)",
        "mbarrier.wait(k_free.index(n % STAGES), ((n // STAGES) & 1) ^ 1)",
        "mbarrier.arrive(k_full.index(n % STAGES), count=1)",
    ]


def _consumer(writer: Writer) -> list[str]:
    early = _queue(writer.layout) > 1
    before = _first(writer, "lap", "n") + _waited("n") if early else []
    layouts = accumulators(SCORES="INNER", VALUES="E")
    if writer.layout.tail:
        layouts.append(tails(padded(writer.layout.value_dim)))
    return [*layouts, *_items(writer, before, _item(writer, early=early)), "tma.store_wait(0)"]


def _item(writer: Writer, *, early: bool) -> list[str]:
    """All tiles of keys for a warpgroup's queries. If `early`, q kᵀ of the next item's first tile runs beside
    the end of this one, whose queries' memory takes the result."""
    forms = writer.forms if writer.layout.block is None else None
    lines = [
        "mine = first + WHO * ROWS",
        # which tiles a warpgroup's own rows keep wholly
        *(["first, last = mine, tl.minimum(mine + ROWS, S) - 1", *bounds(forms, "k")] if forms else []),
        "q_at = (mine + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES)))[:, None]",
        "held = q_tiles.index(lap % QUEUE * PARTS + WHO)",
        "query = held.reshape([ROWS, D])",
        *_begun(writer),
        *writer.formula.outside,
        "i = 0",
        *([] if early else _first(writer, "lap", "n") + _waited("n")),
        *(_start(writer) if writer.layout.block is None else ["start = begin"]),
        "s = ahead",
        *_softmax(writer),
        *(_grown() if writer.layout.start else ["total = tl.sum(p, 1)"]),
        *(_freed("lap - 1", "lap > 0") if early else []),
        "mbarrier.wait(v_full.index(n % STAGES), (n // STAGES) & 1)",
        "weights = tl.convert_layout(p.to(q_tiles.dtype), tl.DotOperandLayout(0, VALUES, 2))",
        "for i in range(1, count):",
        *indented(_round(writer)),
        "mbarrier.wait(item_full.index(lap % 2), (lap // 2) & 1)",
        f"next_item = {number('items.index(lap % 2)')}",
        "mbarrier.arrive(item_free.index(lap % 2), count=1)",
        "final = (n + count - 1) % STAGES",
        "value = v_tiles.index(final).reshape([INNER, E])",
        "sum = warpgroup_mma(weights, value, acc, is_async=True)",
        *(_first(writer, "lap + 1", "n + count") if early else []),
        f"acc = warpgroup_mma_wait({int(early)}, [sum])",
        "mbarrier.arrive(v_free.index(final), count=1)",
        *_end(writer),
    ]
    return lines + (_waited("n + count") if early else _freed("lap", "True"))


def _first(writer: Writer, lap: str, n: str) -> list[str]:
    """Start q kᵀ of an item's first tile."""
    query = f"q_tiles.index(({lap}) % QUEUE * PARTS + WHO).reshape([ROWS, D])"
    lines = [
        f"mbarrier.wait(q_full.index(({lap}) % QUEUE), (({lap}) // QUEUE) & 1)",
        *_product(query, n, f"({n}) % STAGES"),
    ]
    if writer.layout.block is not None:
        lines.append(f"begin = {number(f'starts.index(({n}) % STAGES)')}")
    return lines


def _waited(n: str) -> list[str]:
    """The first tile's products; in flight over the end of a loop, the compiler would wait for every one."""
    return [
        "ahead = warpgroup_mma_wait(0, [product])",
        f"mbarrier.arrive(k_free.index(({n}) % STAGES), count=1)",
    ]


def _freed(lap: str, there: str) -> list[str]:
    """Queries may come where the result of an item went out from."""
    return [
        "tma.store_wait(0)",
        f"mbarrier.arrive(q_free.index(({lap}) % QUEUE), count=1, pred={there})",
    ]


def _product(query: str, n: str, stage: str) -> list[str]:
    """Start q kᵀ of the n-th tile, which is in buffer `stage`."""
    key = f"k_tiles.index({stage}).reshape([INNER, D]).permute((1, 0))"
    empty = "tl.zeros([ROWS, INNER], tl.float32, SCORES)"
    return [
        f"mbarrier.wait(k_full.index({stage}), (({n}) // STAGES) & 1)",
        f"product = warpgroup_mma({query}, {key}, {empty}, use_acc=False, is_async=True)",
    ]


def _softmax(writer: Writer) -> list[str]:
    """p and shrink from the products of tile i."""
    keys = "k_at = (start + tl.arange(0, INNER, tl.SliceLayout(0, SCORES)))[None, :]"
    masks, edge = _masks(writer), _edge(writer)
    lines = []
    if writer.spec.biases or (masks and edge):
        lines = [keys]
    lines += writer.changes(masked="")
    if masks and edge:
        lines += [f"if {edge}:", *indented(masks)]
    return lines + writer.softmax(masked=bool(masks))


def _masks(writer: Writer) -> list[str]:
    """Of an edge. By lists, some are wholly kept but for their end, and those of an empty line have none."""
    if writer.layout.block is None:
        return writer.masks("pairs")
    kept = [] if writer.keep is None else [f"({writer.keep} | (i >= edges))"]
    kept.append("(k_at < tl.where(i < listed, T, 0))")
    return [*writer.formula.inside, f"s = tl.where({' & '.join(kept)}, s, float('-inf'))"]


def _round(writer: Writer) -> list[str]:
    """Tile i: its q kᵀ, and p v of the tile before."""
    told_start = [f"start = {number('starts.index(stage)')}"]
    total, acc = _grown()
    return [
        "mbarrier.wait(turn.index(WHO), (n - lap + i - 1) & 1)",  # an item has a round less than tiles
        "stage = (n + i) % STAGES",
        *_product("query", "n + i", "stage"),
        *(_start(writer) if writer.layout.block is None else told_start),
        "before = (n + i - 1) % STAGES",
        "value = v_tiles.index(before).reshape([INNER, E])",
        "sum = warpgroup_mma(weights, value, acc, is_async=True)",
        "mbarrier.arrive(turn.index((WHO + 1) % PARTS), count=1)",
        "s = warpgroup_mma_wait(1, [product])",
        "mbarrier.arrive(k_free.index(stage), count=1)",
        *_softmax(writer),
        total,
        # also keeps the compiler from waiting for the second product before the exponentials
        "mbarrier.wait(v_full.index(stage), ((n + i) // STAGES) & 1)",
        "acc = warpgroup_mma_wait(0, [sum])",
        "mbarrier.arrive(v_free.index(before), count=1)",
        acc,
        "weights = tl.convert_layout(p.to(q_tiles.dtype), tl.DotOperandLayout(0, VALUES, 2))",
    ]


def _grown() -> list[str]:
    """Sums of all tiles before, by what the maximum has grown, and of p."""
    return [
        "total = total * shrink + tl.sum(p, 1)",
        "acc = acc * tl.convert_layout(shrink, tl.SliceLayout(1, VALUES))[:, None]",
    ]


def _begun(writer: Writer) -> list[str]:
    """Sums of nothing, or what the pass goes on from."""
    if not writer.layout.start:
        return [
            "top = tl.full([ROWS], float('-inf'), tl.float32, tl.SliceLayout(1, SCORES))",
            "total = tl.zeros([ROWS], tl.float32, tl.SliceLayout(1, SCORES))",
            "acc = tl.zeros([ROWS, E], tl.float32, VALUES)",
        ]
    lines = writer.started(*_at(writer))
    lines.append(f"upper = tl.load({''.join(_place(writer, 'start_out', 'VALUES'))})")
    if writer.layout.continues:
        lines += [
            f"lower = tl.load({''.join(_place(writer, 'tail', 'TAIL'))})",
            "lower = tl.permute(tl.reshape(lower, [ROWS, 4, E // 8, 2]), (0, 2, 1, 3))",
            "lower = tl.convert_layout(tl.reshape(lower, [ROWS, E]), VALUES)",
        ]
    lines.append("many = tl.convert_layout(total, tl.SliceLayout(1, VALUES))[:, None]")
    return [*lines, f"acc = {writer.before('upper', 'lower')}"]


def _at(writer: Writer) -> tuple[str, str]:
    """The place of a number of each row in [B,H,S], and the end of a load's arguments."""
    index = "mine + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES))"
    masked = "" if "q" in writer.layout.whole else f", mask={index} < S"
    return f"(batch * H + head).to(tl.int64) * S + {index}", masked


def _place(writer: Writer, name: str, layout: str) -> tuple[str, str]:
    """Those of all numbers of each row of a matrix; of a tail, all that it has memory for."""
    rows = f"(mine + tl.arange(0, ROWS, tl.SliceLayout(1, {layout})))[:, None]"
    columns = f"tl.arange(0, E, tl.SliceLayout(0, {layout}))[None, :]"
    size = writer.layout.value_dim
    base = f"{name} + batch.to(tl.int64) * {name}_b + head.to(tl.int64) * {name}_h"
    some = None if "q" in writer.layout.whole else f"{rows} < S"
    masked = inside(rows=some, columns=columns, size=padded(size) if name == "tail" else size)
    return f"{base} + {rows}.to(tl.int64) * {name}_s + {columns}", masked


def _end(writer: Writer) -> list[str]:
    """Sinks, and both results. `out` goes by way of these queries' memory, its tail straight from
    registers."""
    at, there = _at(writer)
    lines = [*writer.finish(), f"tl.store(lse + {at}, lse2 * {LN2}{there})"]
    value = "acc * tl.convert_layout(share, tl.SliceLayout(1, VALUES))[:, None]"
    upper = f"({value}).to(q_tiles.dtype)"
    if writer.layout.unfinished:
        upper, tail = halves("bits", "q_tiles.dtype")
        place, masked = _place(writer, "tail", "TAIL")
        lines += [
            *rounded(value, "bits"),
            f"lower = tl.permute(tl.reshape({tail}, [ROWS, E // 8, 4, 2]), (0, 2, 1, 3))",
            f"tl.store({place}, tl.convert_layout(tl.reshape(lower, [ROWS, E]), TAIL){masked})",
        ]
    return [
        *lines,
        "result = held._reinterpret(q_tiles.dtype, [1, 1, ROWS, E], out.layout)",
        f"result.reshape([ROWS, E]).store({upper})",
        "fence_async_shared()",
        "tma.async_copy_shared_to_global(out, [batch, head, mine, 0], result)",
    ]
