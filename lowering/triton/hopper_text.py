"""What the texts of the Hopper kernels have in common: a Gluon module of partitions, its constants, barriers,
layouts of accumulators, and the order in which programs go through heads.

Gluon is imported as `tl` in these texts: lines of masks and score changes are the portable kernels'
(`Writer.changes`).
"""

from __future__ import annotations

from collections.abc import Iterable
from textwrap import indent

from kp_compiler.lowering.into import padded
from kp_compiler.lowering.triton.attention_writer import LISTS, Layout, Writer
from kp_compiler.specs import AttentionSpec

ROWS = 64  # of a warpgroup's products
CHUNKS = ("PAIRS", "CHUNK")
SHARED = "tl.allocate_shared_memory"
FLAT = "tl.SwizzledSharedLayout(1, 1, 1, [0])"

_IMPORTS = """\
from triton.experimental import gluon
from triton.experimental.gluon import language as tl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)
"""


def module(
    constants: list[str], functions: Iterable[tuple[str, Iterable[str], list[str]]], imports: str = ""
) -> str:
    """Functions by name, parameters and lines, each with the constants; `imports` beside Gluon's."""
    texts = [
        f"@gluon.jit\ndef {name}({', '.join(names)}):\n{indent(chr(10).join(constants + lines), '    ')}\n"
        for name, names, lines in functions
    ]
    return "\n".join([_IMPORTS + imports, *texts])


def constants(layout: Layout, **more: int) -> list[str]:
    outer, inner = layout.tile
    found = {"OUTER": outer, "ROWS": ROWS, "PARTS": outer // ROWS, "INNER": inner}
    found |= {"D": padded(layout.head_dim), "E": padded(layout.value_dim), "STAGES": layout.stages, **more}
    return [f"{name}: tl.constexpr = {value}" for name, value in found.items()]


def tails(width: int) -> str:
    """The layout TAIL of [ROWS, width] numbers in the order of a tail (`lowering.into`), of which each thread
    has those that are its own of `accumulators`."""
    near = [[0, 1 << bit] for bit in range((width // 4).bit_length() - 1)]
    lanes, warps = [[0, width // 4], [0, width // 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]]
    bases = f"{[*near, [8, 0]]}, {lanes}, {warps}, [], [{ROWS}, {width}]"
    return f"TAIL: tl.constexpr = tl.DistributedLinearLayout({bases})"


def accumulators(**columns: str) -> list[str]:
    """Layouts of a warpgroup's products, by name and number of columns."""
    return [
        f"{name}: tl.constexpr = tl.NVMMADistributedLayout([3, 0], [4, 1], [16, {count}, 16])"
        for name, count in columns.items()
    ]


def barriers(found: dict[str, tuple[str, str]]) -> list[str]:
    """Barriers by name: how many there are, and how many arrivals end a phase of each."""
    lines = []
    for name, (size, count) in found.items():
        lines += [
            f"{name} = {SHARED}(tl.int64, [{size}, 1], mbarrier.MBarrierLayout())",
            f"for i in tl.static_range({size}):",
            f"    mbarrier.init({name}.index(i), {count})",
        ]
    return [*lines, "fence_async_shared()"]


def specialised(
    consumers: int, working: Iterable[str], others: dict[str, Iterable[str]], registers: tuple[int, ...]
) -> list[str]:
    """Warpgroups that run `consumer`, each told its number, and a warp for each of the others. `registers` of
    a thread: of a consumer, then of the others."""
    work = ", ".join(working)
    parts = [f"(consumer, (who{i}, {work}))" for i in range(consumers)]
    parts += [f"({name}, ({', '.join(names)}))" for name, names in others.items()]
    warps = [4] * (consumers - 1) + [1] * len(others)
    limits = [registers[0]] * (consumers - 1) + list(registers[1:])
    return [
        *(f"who{i}: tl.constexpr = {i}" for i in range(consumers)),
        f"tl.warp_specialize([{', '.join(parts)}], {warps}, {limits})",
    ]


def placing(names: Iterable[str], spec: AttentionSpec) -> list[str]:
    """Those of a kernel's parameters that tell which tiles there are."""
    wanted = {*LISTS, "H", "GROUP", "S", "T", *(f"n{i}" for i in range(spec.mask.scalars))}
    return [name for name in names if name in wanted]


def chunked(tile: str) -> list[str]:
    """`tile` and `pair` of an item: CHUNK pairs at a time, one tile of all of them after the other."""
    return [
        "chunk = item // (CHUNK * tiles)",
        "at = item - chunk * (CHUNK * tiles)",
        "members = tl.minimum(CHUNK, PAIRS - chunk * CHUNK)",
        f"tile, pair = {tile}, chunk * CHUNK + at % members",
    ]


def listed_start(writer: Writer) -> list[str]:
    """The first index of tile i of a line; zero where there is no such tile."""
    return [
        "start = 0",
        "if i < listed:",
        f"    start = {writer.listed_start('i')}",
    ]


def told(place: str, value: str) -> str:
    """A warp leaves a number in shared memory."""
    return f"{place}.store(tl.full([1], 0, tl.int32, tl.BlockedLayout([1], [32], [1], [0])) + {value})"


def number(place: str) -> str:
    """A number that a warp has left in shared memory, for a warpgroup."""
    return f"tl.max({place}.load(tl.BlockedLayout([1], [32], [4], [0])), 0)"


def inside(*, rows: str | None, columns: str, size: int) -> str:
    """The mask of a tile's load or store, as its last argument: a condition on rows, if there is one, and
    the columns that heads of this size have."""
    conditions = [] if rows is None else [f"({rows})"]
    conditions += [f"({columns} < {size})"] if padded(size) > size else []
    return f", mask={' & '.join(conditions)}" if conditions else ""
