"""Python source of the Hopper forward kernel for one spec, in Gluon: the portable one's mathematics by
Hopper's own means.

    a warp loads       q once, tiles of k and v into STAGES buffers each, by the tensor memory accelerator
    two warpgroups     64 queries each: while one's products run on the tensor cores, the other takes its
                       exponentials (they take turns), and each starts q kᵀ of a tile before p v of the last

Method: Shah et al., FlashAttention-3 (arXiv:2407.08608). Tiles of a program come from the high end of its
loop down; those at both ends are masked, the ones between are not (`attention_loops.bounds`), or lists say
which. Lines of masks and score changes are the portable kernel's (`Writer.changes`): Gluon is imported as
`tl` here.
"""

from __future__ import annotations

from functools import lru_cache
from textwrap import indent

from kp_compiler.lowering.triton.attention_loops import bounds, sides
from kp_compiler.lowering.triton.attention_source import parameters
from kp_compiler.lowering.triton.attention_writer import LN2, Layout, Writer
from kp_compiler.specs import AttentionSpec

REGISTERS = (240, 24)  # of a consumer's threads and of the producer's: 504 of a multiprocessor's 512 a lane
ROWS = 64  # queries of a warpgroup
BUFFERS = ("q_tile", "k_tiles", "v_tiles", "q_full", "k_full", "v_full", "k_free", "v_free", "turn")
PLACE = ("batch", "head", "kv_head", "first", "count", "high", "edge_high", "edge_low")


def hopper_parameters(spec: AttentionSpec, layout: Layout) -> tuple[str, ...]:
    """Those of the portable kernel, where q, k and v are descriptors [1,1,rows,D] of tensors [B,H,S,D]."""
    strides = {f"{name}_{dim}" for name in "qkv" for dim in "bhs"}
    return tuple(name for name in parameters("forward", spec, layout) if name not in strides)


@lru_cache(maxsize=1024)
def hopper_source(spec: AttentionSpec, layout: Layout) -> str:
    """A module with `kp_attention_hopper`; its parameters are `hopper_parameters(spec, layout)`."""
    writer = Writer("forward", spec, layout)
    names = hopper_parameters(spec, layout)
    rest = [name for name in names if name not in ("q", "k", "v")]
    inner = layout.tile[1]
    constants = [
        f"OUTER: tl.constexpr = {2 * ROWS}",
        f"ROWS: tl.constexpr = {ROWS}",
        f"INNER: tl.constexpr = {inner}",
        f"D: tl.constexpr = {layout.head_dim}",
        f"E: tl.constexpr = {layout.value_dim}",
        f"STAGES: tl.constexpr = {layout.stages}",
    ]
    scores = f"SCORES: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {inner}, 16])"
    values = f"VALUES: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {layout.value_dim}, 16])"
    shared = ", ".join((*BUFFERS, *PLACE))
    lists = [name for name in rest if name in _LISTS]
    return "\n".join(
        [
            "from triton.experimental import gluon",
            "from triton.experimental.gluon import language as tl",
            "from triton.experimental.gluon.language.nvidia.hopper import (",
            "    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,",
            ")",
            "",
            "@gluon.jit",
            f"def producer({', '.join(('q', 'k', 'v', shared, *lists))}):",
            _text(constants + _producer(writer)),
            "",
            "@gluon.jit",
            f"def consumer(WHO: tl.constexpr, {', '.join((shared, *rest))}):",
            _text([*constants, scores, values, *_consumer(writer)]),
            "",
            "@gluon.jit",
            f"def kp_attention_hopper({', '.join(names)}):",
            _text(constants + _begin(writer, shared, rest, lists)),
            "",
        ]
    )


_LISTS = ("partial_count", "partial", "full_count", "full", "list_b", "list_h", "list_length")


def _text(lines: list[str]) -> str:
    return indent("\n".join(lines), "    ")


def _begin(writer: Writer, shared: str, rest: list[str], lists: list[str]) -> list[str]:
    """What a program does, its buffers and barriers, and who works on it."""
    lines = writer.position(reverse=True) + _tiles(writer)
    lines += [
        "q_tile = tl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, D], q.layout)",
        "k_tiles = tl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, INNER, D], k.layout)",
        "v_tiles = tl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, INNER, E], v.layout)",
        "q_full = tl.allocate_shared_memory(tl.int64, [1], mbarrier.MBarrierLayout())",
        "turn = tl.allocate_shared_memory(tl.int64, [2, 1], mbarrier.MBarrierLayout())",
        "mbarrier.init(q_full, 1)",
        "mbarrier.init(turn.index(0), 1)",
        "mbarrier.init(turn.index(1), 1)",
    ]
    for name in ("k_full", "v_full", "k_free", "v_free"):
        lines.append(f"{name} = tl.allocate_shared_memory(tl.int64, [STAGES, 1], mbarrier.MBarrierLayout())")
    lines.append("for i in tl.static_range(STAGES):")
    for name, count in (("k_full", 1), ("v_full", 1), ("k_free", 2), ("v_free", 2)):
        lines.append(f"    mbarrier.init({name}.index(i), {count})")
    work = ", ".join((shared, *rest))
    return [
        *lines,
        "fence_async_shared()",
        "mbarrier.arrive(turn.index(0), count=1)",
        "zero: tl.constexpr = 0",
        "one: tl.constexpr = 1",
        "tl.warp_specialize(",
        f"    [(consumer, (zero, {work})), (consumer, (one, {work})),",
        f"     (producer, ({', '.join(('q', 'k', 'v', shared, *lists))}))],",
        f"    [4, 1], [{REGISTERS[0]}, {REGISTERS[1]}],",
        ")",
    ]


def _tiles(writer: Writer) -> list[str]:
    """`count` tiles, one at least: the i-th from the high end is masked where i < edge_high or i >= edge_low,
    by lists where i < edge_high."""
    if writer.layout.block is None:
        assert writer.forms is not None
        return [
            *bounds(writer.forms, "k"),
            "high = tl.maximum(high, 1)",
            "count = tl.maximum(high - low, 1)",
            "edge_high = high - full_high",
            "edge_low = high - full_low",
        ]
    _, per = writer.block()
    return [
        f"line = {writer.line()}",
        f"edge_high = tl.load(partial_count + line) * {per}",
        f"edge_low = edge_high + tl.load(full_count + line) * {per}",
        "count = tl.maximum(edge_low, 1)",
        "high = (T + INNER - 1) // INNER + 1",
    ]


def _start(writer: Writer) -> list[str]:
    """The first key of tile i. Where there are none at all, one past the end."""
    if writer.layout.block is None:
        return ["start = (high - 1 - i) * INNER"]
    inner, per = writer.block()
    return [
        f"line = ({writer.line()}).to(tl.int64) * list_length",
        "start = (high - 1) * INNER",
        "if i < edge_high:",
        f"    start = tl.load(partial + line + i // {per}) * {inner} + i % {per} * INNER",
        "elif i < edge_low:",
        "    at = i - edge_high",
        f"    start = tl.load(full + line + at // {per}) * {inner} + at % {per} * INNER",
    ]


def _producer(writer: Writer) -> list[str]:
    load = "tma.async_copy_global_to_shared"
    loop = [*_start(writer), "stage, turned = i % STAGES, ((i // STAGES) & 1) ^ 1"]
    for name in "kv":
        loop += [
            f"mbarrier.wait({name}_free.index(stage), turned)",
            f"mbarrier.expect({name}_full.index(stage), {name}.block_type.nbytes)",
            f"{load}({name}, [batch, kv_head, start, 0], "
            f"{name}_full.index(stage), {name}_tiles.index(stage))",
        ]
    return [
        "mbarrier.expect(q_full, 2 * q.block_type.nbytes)",
        f"{load}(q, [batch, head, first, 0], q_full, q_tile.index(0))",
        f"{load}(q, [batch, head, first + ROWS, 0], q_full, q_tile.index(1))",
        "for i in range(count):",
        *(f"    {line}" for line in loop),
    ]


def _consumer(writer: Writer) -> list[str]:
    lines = [
        "mine = first + WHO * ROWS",
        "q_at = (mine + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES)))[:, None]",
        "mbarrier.wait(q_full, 0)",
        "q = q_tile.index(WHO).reshape([ROWS, D])",
        "top = tl.full([ROWS], float('-inf'), tl.float32, tl.SliceLayout(1, SCORES))",
        "total = tl.zeros([ROWS], tl.float32, tl.SliceLayout(1, SCORES))",
        "acc = tl.zeros([ROWS, E], tl.float32, VALUES)",
        *writer.formula.outside,
        "i = 0",
        *_product(),
        "s = warpgroup_mma_wait(0, [product])",
        "mbarrier.arrive(k_free.index(0), count=1)",
        *_softmax(writer, masked=True),
        "total = tl.sum(p, 1)",
        "mbarrier.wait(v_full.index(0), 0)",
        "weights = tl.convert_layout(p.to(q_tile.dtype), tl.DotOperandLayout(0, VALUES, 2))",
    ]
    masks_all = "k" not in writer.layout.whole  # lists don't say which block holds the end
    edge_high, edge_low = (f"tl.minimum(tl.maximum({edge}, 1), count)" for edge in ("edge_high", "edge_low"))
    spans = [("1", edge_high, True), (edge_high, "count", masks_all)]
    if writer.layout.block is None:
        below, above = sides(writer.forms or (), "k")
        spans = [("1", edge_high, True)] if above or masks_all else []
        spans.append((edge_high if spans else "1", edge_low, False))
        spans += [(edge_low, "count", True)] if below else []
    for low, high, masked in spans:
        lines.append(f"for i in range({low}, {high}):")
        lines += [f"    {line}" for line in _round(writer, masked=masked)]
    lines += [
        "last = (count - 1) % STAGES",
        "value = v_tiles.index(last).reshape([INNER, E])",
        "acc = warpgroup_mma_wait(0, [warpgroup_mma(weights, value, acc, is_async=True)])",
    ]
    return lines + _end(writer)


def _product() -> list[str]:
    """Start q kᵀ of tile i."""
    return [
        "stage = i % STAGES",
        "mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)",
        "key = k_tiles.index(stage).reshape([INNER, D]).permute((1, 0))",
        "empty = tl.zeros([ROWS, INNER], tl.float32, SCORES)",
        "product = warpgroup_mma(q, key, empty, use_acc=False, is_async=True)",
    ]


def _softmax(writer: Writer, *, masked: bool) -> list[str]:
    """p and shrink from the products of tile i."""
    lines = []
    if masked or writer.spec.biases:
        lines = [*_start(writer), "k_at = (start + tl.arange(0, INNER, tl.SliceLayout(0, SCORES)))[None, :]"]
    return lines + writer.changes(masked=masked) + writer.softmax(masked=masked)


def _round(writer: Writer, *, masked: bool) -> list[str]:
    """Tile i: its q kᵀ, and p v of the tile before."""
    return [
        "mbarrier.wait(turn.index(WHO), (i - 1) & 1)",
        *_product(),
        "before = (i - 1) % STAGES",
        "value = v_tiles.index(before).reshape([INNER, E])",
        "sum = warpgroup_mma(weights, value, acc, is_async=True)",
        "mbarrier.arrive(turn.index(1 - WHO), count=1)",
        "s = warpgroup_mma_wait(1, [product])",
        "mbarrier.arrive(k_free.index(stage), count=1)",
        *_softmax(writer, masked=masked),
        "total = total * shrink + tl.sum(p, 1)",
        # also keeps the compiler from waiting for the second product before the exponentials
        "mbarrier.wait(v_full.index(stage), (i // STAGES) & 1)",
        "acc = warpgroup_mma_wait(0, [sum])",
        "mbarrier.arrive(v_free.index(before), count=1)",
        "acc = acc * tl.convert_layout(shrink, tl.SliceLayout(1, VALUES))[:, None]",
        "weights = tl.convert_layout(p.to(q_tile.dtype), tl.DotOperandLayout(0, VALUES, 2))",
    ]


def _end(writer: Writer) -> list[str]:
    """Sinks, what the pass started from, and both results."""
    whole = "q" in writer.layout.whole
    index = "mine + tl.arange(0, ROWS, tl.SliceLayout(1, SCORES))"
    at, there = f"(batch * H + head).to(tl.int64) * S + {index}", "" if whole else f", mask={index} < S"
    share = "tl.convert_layout(share, tl.SliceLayout(1, VALUES))[:, None]"
    rows = "(mine + tl.arange(0, ROWS, tl.SliceLayout(1, VALUES)))[:, None]"
    columns = "tl.arange(0, E, tl.SliceLayout(0, VALUES))[None, :]"
    masked = "" if whole else f", mask={rows} < S"
    lines = writer.finish(at, there)
    value = f"acc * {share}"
    if writer.layout.start:
        lines += [
            "start_out += batch.to(tl.int64) * start_out_b + head.to(tl.int64) * start_out_h",
            f"before = tl.load(start_out + {rows}.to(tl.int64) * start_out_s + {columns}{masked})",
        ]
        lines.append("rest = tl.convert_layout(rest, tl.SliceLayout(1, VALUES))[:, None]")
        value += " + tl.where(rest > 0.0, before.to(tl.float32) * rest, 0.0)"
    return [
        *lines,
        "out += batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h",
        f"result = ({value}).to(out.dtype.element_ty)",
        f"tl.store(out + {rows}.to(tl.int64) * out_s + {columns}, result{masked})",
        f"tl.store(lse + {at}, lse2 * {LN2}{there})",
    ]
