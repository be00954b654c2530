"""Attention kernels alone: TFLOP/s of every provider over masks, head sizes and lengths, both ways.

    python benchmarks/attention_kernels.py [--masks causal full …] [--dims 64 128 256] [--lengths 4096 …]
        [--providers cudnn …] [--sparse 32768 …] [--repeats 5] [--add FILE] [--out DIR]

bfloat16, 16384 tokens in all where one sequence is shorter, a hidden size of 2048 (D64 has 32 heads, D128 16,
D256 8). TFLOP/s count pairs that the mask keeps, 4·D each forward and 2.5 times that backward. `packed` holds
documents of up to a quarter of the length, `window` 1024 keys, both from 2048 tokens on. cuDNN and
FlashAttention-2 know causal and full masks; `masked` is PyTorch's attention with the mask as a tensor.
FlexAttention and kp's kernels read the same block lists, which are made before anything is timed. All run as
CUDA graphs, the backward pass as both passes less the forward. FlexAttention is measured with D128 and at two
lengths, as it compiles for ten seconds at each. `portable` is kp's forward kernel for any GPU, where `kp`
takes the one for Hopper. A product of 8192³ is timed before and after: what the device gives that day.
`--add` keeps the rows of another file of the same day and device: a table of all masks takes longer than a
machine may be had for. Rows of the result file that name a commit or a device are of that one.

`--sparse`: 32 query and 8 key heads, D128, blocks of 128 x 128 drawn at random for each head under a causal
mask, a tenth of them and all of them, against cuDNN's causal kernel and FlexAttention with the same lists.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from attention_models import packed_positions
from harness import RESULTS, Step, bar, installed, recorded, time_interleaved, warm, write
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from kp_compiler.lowering import attend
from kp_compiler.lowering.block_lists import Lists
from kp_compiler.specs import AttentionSpec, MaskSpec

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
FLEX_LENGTHS = (8192, 32768)
TOKENS, HIDDEN, WINDOW, BLOCK = 16384, 2048, 1024, 128
PROVIDERS = ("cudnn", "flash", "masked", "flex", "kp", "portable", "fa4")
SPECS = {
    "full": MaskSpec(),
    "causal": MaskSpec("causal", "k <= q"),
    "window": MaskSpec("window", f"(k <= q) & (q - k <= {WINDOW - 1})", window=WINDOW),
    "packed": MaskSpec("document", "(k <= q) & Eq(t0(b, k), t0(b, q))", tensors=(0,)),
}
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """One line of the tables."""

    mask: str
    length: int
    width: int
    heads: int
    kv_heads: int
    batch: int

    def __str__(self) -> str:
        heads = f"{self.heads}:{self.kv_heads}"
        return f"{self.mask}, {self.batch} x {self.length}, {heads} heads, D{self.width}"


def documents(setting: Setting) -> Tensor:
    """Which document each token belongs to, [B,N]."""
    if setting.mask != "packed":
        return torch.zeros(setting.batch, setting.length, dtype=torch.int64, device="cuda")
    return (packed_positions(setting.length) == 0).cumsum(-1).expand(setting.batch, -1).contiguous()


def mask_function(setting: Setting, segments: Tensor) -> Callable[..., Tensor]:
    """FlexAttention's form of a mask."""

    def keep(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if setting.mask == "packed":
            return (k <= q) & (segments[b, q] == segments[b, k])
        return (k <= q) & (q - k < WINDOW) if setting.mask == "window" else k <= q

    return keep


def pairs(setting: Setting, segments: Tensor) -> float:
    """Pairs that one head keeps in one sequence."""
    n = setting.length
    if setting.mask == "packed":
        sizes = torch.bincount(segments[0]).double()
        return float((sizes * (sizes + 1) / 2).sum())
    if setting.mask == "window":
        w = min(WINDOW, n)
        return w * n - w * (w - 1) / 2
    return n * n if setting.mask == "full" else n * (n + 1) / 2


def lists_of(blocks: BlockMask) -> list[Tensor]:
    """As kp's kernels take them."""
    found: list[Tensor] = []
    for kind in ("kv", "q"):
        partial, whole = (
            _flags(getattr(blocks, f"{name}_num_blocks"), getattr(blocks, f"{name}_indices"))
            for name in (kind, f"full_{kind}")
        )
        found += Lists.of(partial, whole).tensors()
    return found


def _flags(count: Tensor, indices: Tensor) -> Tensor:
    """Counts [b,h,lines] and indices [b,h,lines,blocks] as flags."""
    there = torch.arange(indices.shape[-1], device=count.device) < count.unsqueeze(-1)
    return torch.zeros_like(there).scatter(-1, indices.long(), there)


def kp_call(spec: MaskSpec, width: int, operands: list[Tensor], blocks: BlockMask | None) -> Call:
    block = None if blocks is None else (BLOCK, BLOCK)
    plan = attend.Plan(AttentionSpec(width**-0.5, spec), block).to_json()
    lists = [] if blocks is None else lists_of(blocks)
    return lambda q, k, v: attend.attend()(q, k, v, operands, [], lists, None, None, None, plan)[0]


def portable_call(call: Call) -> Call:
    """The same without the Hopper kernels, forward."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with mock.patch.object(attend, "_hopper", return_value=None):
            return call(q, k, v)

    return run


def sdpa_call(backend: SDPBackend, *, causal: bool, mask: Tensor | None = None) -> Call:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1]
            )

    return call


def flex_call(blocks: BlockMask | None) -> Call:
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q, k, v, block_mask=blocks, enable_gqa=q.shape[1] != k.shape[1])


def fa4_call(setting: Setting) -> Call:
    from flash_attn.cute import flash_attn_func

    causal, window = setting.mask != "full", (WINDOW - 1, 0) if setting.mask == "window" else (None, None)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out = flash_attn_func(q, k, v, causal=causal, window_size=window)
        return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

    return call


def calls(setting: Setting, segments: Tensor, wanted: list[str]) -> Iterator[tuple[str, Call]]:
    """Providers that take this mask."""
    plain = setting.mask in ("full", "causal")
    blocks = None
    if setting.mask == "packed" or (setting.mask != "full" and setting.length in FLEX_LENGTHS):
        sizes = (setting.batch if setting.mask == "packed" else None, None, setting.length, setting.length)
        blocks = create_block_mask(
            mask_function(setting, segments), *sizes, device="cuda", BLOCK_SIZE=BLOCK, _compile=True
        )
    if plain and setting.width <= 128:
        yield "cudnn", sdpa_call(SDPBackend.CUDNN_ATTENTION, causal=setting.mask == "causal")
    if plain:
        yield "flash", sdpa_call(SDPBackend.FLASH_ATTENTION, causal=setting.mask == "causal")
    if not plain and "masked" in wanted:
        rows = torch.arange(setting.length, device="cuda")
        keep = mask_function(setting, segments)(torch.zeros_like(rows[:1]), None, rows[:, None], rows)
        yield "masked", sdpa_call(SDPBackend.EFFICIENT_ATTENTION, causal=False, mask=keep)
    if "flex" in wanted and setting.length in FLEX_LENGTHS and setting.width == 128:
        yield "flex", flex_call(blocks)
    listed = blocks if setting.mask == "packed" else None
    mine = kp_call(SPECS[setting.mask], setting.width, [segments] if listed is not None else [], listed)
    yield "kp", mine
    yield "portable", portable_call(mine)
    if setting.mask != "packed" and setting.width <= 128:
        try:
            yield "fa4", fa4_call(setting)
        except ImportError:
            pass


def tensors(setting: Setting) -> tuple[Tensor, ...]:
    """q, k, v and the gradient of the output, as projections give them: [B,N,H,D] in memory."""

    def one(heads: int) -> Tensor:
        x = torch.randn(
            setting.batch, setting.length, heads, setting.width, device="cuda", dtype=torch.bfloat16
        )
        return x.transpose(1, 2)

    return one(setting.heads), one(setting.kv_heads), one(setting.kv_heads), one(setting.heads)


def captured(name: str, step: Step) -> Step:
    try:
        return recorded(step)
    except RuntimeError as error:
        print(f"  {name}: times are the host's, too; no CUDA graph: {error}", file=sys.stderr)
        return step


def steps_of(
    found: dict[str, Call], q: Tensor, k: Tensor, v: Tensor, grad: Tensor
) -> dict[tuple[str, str], Any]:
    """By provider and mode, forward alone and both passes, as CUDA graphs: kernels, not what starts them."""
    steps: dict[tuple[str, str], Any] = {}
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    for name, call in found.items():

        def forward(call: Call = call) -> None:
            with torch.no_grad():
                call(q, k, v)

        if not warm(name, forward):
            continue
        steps[name, "forward"] = captured(name, forward)
        if name == "portable":
            continue

        def both(call: Call = call) -> None:
            torch.autograd.grad(call(*leaves), leaves, grad)

        if warm(name, both):
            steps[name, "backward"] = captured(name, both)
    return steps


def measure(setting: Setting, providers: list[str], repeats: int) -> list[dict[str, Any]]:
    segments = documents(setting)
    q, k, v, grad = tensors(setting)
    found = {name: call for name, call in calls(setting, segments, providers) if name in providers}
    return timed(steps_of(found, q, k, v, grad), setting, pairs(setting, segments), repeats)


def timed(
    steps: dict[tuple[str, str], Any], setting: Setting, kept: float, repeats: int
) -> list[dict[str, Any]]:
    times = time_interleaved({"/".join(key): step for key, step in steps.items()}, repeats, 0.02)
    work = 4.0 * setting.width * setting.heads * setting.batch * kept
    rows = []
    for name, mode in steps:
        ms = times[f"{name}/{mode}"]
        if mode == "backward":  # both passes were timed
            ms -= times[f"{name}/forward"]
        tflops = work * (1.0 if mode == "forward" else 2.5) / ms / 1e9
        rows.append({"setting": str(setting), **vars(setting), "mode": mode, "provider": name,
                     "ms": round(ms, 4), "tflops": round(tflops, 1)})  # fmt: skip
    text = {f"{n} {m[0]}": round(r["tflops"]) for (n, m), r in zip(steps, rows, strict=True)}
    print(f"{setting}: {text}", flush=True)
    return rows


# ----------------------------------------------------------------------------------------------- block-sparse


def random_blocks(heads: int, length: int, share: float) -> BlockMask:
    """For each head and row of blocks, a share of those under the diagonal, and the one on it."""
    count = length // BLOCK
    rows = torch.arange(count, device="cuda")
    below = rows < rows[:, None]
    take = (rows[:, None] * share).round()
    rank = torch.rand(1, heads, count, count, device="cuda").masked_fill(~below, 2.0).argsort(-1).argsort(-1)
    full = below & (rank < take)
    diagonal = torch.eye(count, dtype=torch.bool, device="cuda").expand(1, heads, -1, -1)

    def listed(flags: Tensor) -> tuple[Tensor, Tensor]:
        return flags.sum(-1, dtype=torch.int32), torch.argsort((~flags).int(), dim=-1, stable=True).int()

    return BlockMask.from_kv_blocks(
        *listed(diagonal), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=lambda b, h, q, k: k <= q
    )


def sparse(length: int, share: float, repeats: int, providers: list[str]) -> list[dict[str, Any]]:
    setting = Setting(f"blocks {share:.0%}", length, 128, 32, 8, 1)
    blocks = random_blocks(setting.heads, length, share)
    found = {
        "cudnn": sdpa_call(SDPBackend.CUDNN_ATTENTION, causal=True),
        "flex": flex_call(blocks),
        "kp": kp_call(SPECS["causal"], setting.width, [], blocks),
        "kp, no lists": kp_call(SPECS["causal"], setting.width, [], None),
    }
    providers = [*providers, "kp, no lists"] if share == 1.0 else providers
    steps = steps_of({n: c for n, c in found.items() if n in providers}, *tensors(setting))
    return timed(steps, setting, length * (length + 1) / 2, repeats)  # cuDNN's pairs: times are what compares


# -------------------------------------------------------------------------------------------------- errors


def errors(mask: str, width: int, length: int = 2048) -> list[dict[str, Any]]:
    """Relative errors of out and of the gradients of q, k and v, by provider, against float64."""
    setting = Setting(mask, length, width, 8, 2, 1)
    *inputs, grad = tensors(setting)
    found = {
        "cudnn": sdpa_call(SDPBackend.CUDNN_ATTENTION, causal=mask == "causal"),
        "kp": kp_call(SPECS[mask], width, [], None),
        "exact": sdpa_call(SDPBackend.MATH, causal=mask == "causal"),
    }
    results = {}
    for name, call in found.items():
        leaves = [(x.double() if name == "exact" else x).detach().requires_grad_() for x in inputs]
        out = call(*leaves)
        results[name] = [out, *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
    rows = []
    for name in ("cudnn", "kp"):
        pairs = zip(("out", "dq", "dk", "dv"), results[name], results["exact"], strict=True)
        off = {what: float((mine - theirs).norm() / theirs.norm()) for what, mine, theirs in pairs}
        rows.append({"setting": f"errors: {setting}", "provider": name, **off})
        print(rows[-1], flush=True)
    return rows


def error_bar(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The largest of kp's errors in parts of cuDNN's."""
    by = {(r["setting"], r["provider"]): r for r in rows if "dq" in r}
    ratios = [
        mine[what] / by[setting, "cudnn"][what]
        for (setting, provider), mine in by.items()
        for what in ("out", "dq", "dk", "dv")
        if provider == "kp"
    ]
    return bar("error against float64, in parts of cuDNN's", max(ratios, default=None), 1.1, at_least=False)


def product() -> float:
    """TFLOP/s of a bfloat16 product of 8192³."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / time_interleaved({"product": lambda: a @ b}, 3)["product"] / 1e9


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {(r["mask"], r["length"], r["width"], r["mode"], r["provider"]): r for r in rows}

    def least(
        mask: str, width: int, mode: str, peer: str, lengths: tuple[int, ...], provider: str = "kp"
    ) -> float | None:
        ratios = []
        for length in lengths:
            mine, theirs = (found.get((mask, length, width, mode, p)) for p in (provider, peer))
            if mine and theirs:
                ratios.append(theirs["ms"] / mine["ms"])
        return min(ratios, default=None)

    long = (4096, 8192, 16384, 32768)
    bars = [
        bar(
            "causal D128 forward against cuDNN, 4k to 32k",
            least("causal", 128, "forward", "cudnn", long),
            1.0,
        ),
        bar(
            "causal D64 forward against cuDNN, 4k to 32k", least("causal", 64, "forward", "cudnn", long), 1.0
        ),
        bar(
            "causal D128 backward against cuDNN, 4k to 32k",
            least("causal", 128, "backward", "cudnn", long),
            0.95,
        ),
        bar(
            "causal D128 backward against FlexAttention", least("causal", 128, "backward", "flex", long), 1.2
        ),
    ]
    portable = least("causal", 128, "forward", "cudnn", long, "portable")
    bars.append(bar("causal D128 forward, portable, against cuDNN", portable, 0.8))
    for mask, tflops in (("packed", 400), ("window", 350)):
        row = found.get((mask, 32768, 128, "forward", "kp"))
        bars.append(bar(f"{mask} 32k D128 forward, useful TFLOP/s", row["tflops"] if row else None, tflops))
        bars.append(
            bar(f"{mask} 32k against a mask tensor", least(mask, 128, "forward", "masked", (32768,)), 15.0)
        )
        bars.append(
            bar(f"{mask} 32k against FlexAttention", least(mask, 128, "forward", "flex", (32768,)), 1.3)
        )
    for length, against in ((32768, 7.2), (131072, 8.3)):
        if ("blocks 10%", length, 128, "forward", "kp") in found:
            for peer, target in (("cudnn", against), ("flex", 1.2)):
                value = least("blocks 10%", 128, "forward", peer, (length,))
                bars.append(bar(f"a tenth of the blocks, {length}, forward against {peer}", value, target))
            name = f"a tenth of the blocks, {length}, forward and backward against cudnn"
            bars.append(bar(name, _both(found, ("blocks 10%", length, 128)), 7.0))
        whole = [found.get(("blocks 100%", length, 128, "forward", who)) for who in ("kp", "kp, no lists")]
        if whole[0] and whole[1]:
            name = f"all of the blocks, {length}, forward: time of lists against none"
            bars.append(bar(name, whole[0]["ms"] / whole[1]["ms"], 1.08, at_least=False))
    return bars


def _both(found: dict[Any, Any], setting: tuple[Any, ...]) -> float | None:
    """How much longer cuDNN takes than kp for forward and backward."""
    times = []
    for who in ("cudnn", "kp"):
        rows = [found.get((*setting, mode, who)) for mode in ("forward", "backward")]
        if not rows[0] or not rows[1]:
            return None
        times.append(rows[0]["ms"] + rows[1]["ms"])
    return times[0] / times[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--masks", nargs="*", default=list(SPECS))
    parser.add_argument("--dims", nargs="*", type=int, default=[64, 128, 256])
    parser.add_argument("--lengths", nargs="*", type=int, default=LENGTHS)
    parser.add_argument("--providers", nargs="*", default=PROVIDERS)
    parser.add_argument("--sparse", nargs="*", type=int, default=[32768, 131072], metavar="LENGTH")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--add", type=Path, metavar="FILE")
    options = parser.parse_args()
    torch._dynamo.config.recompile_limit = 1024
    rows: list[dict[str, Any]] = json.loads(options.add.read_text())["rows"] if options.add else []
    rows.append({"setting": "product 8192³, before", "provider": "cuBLAS", "tflops": round(product(), 1)})
    for mask in options.masks:
        for width in options.dims:
            for length in options.lengths:
                if mask in ("packed", "window") and length < 2048:
                    continue
                heads = HIDDEN // width
                setting = Setting(mask, length, width, heads, heads, max(1, TOKENS // length))
                rows += measure(setting, options.providers, options.repeats)
        _write(rows, options.out)
    for length in options.sparse:
        for share in (0.1, 1.0) if length <= 32768 else (0.1,):
            rows += sparse(length, share, options.repeats, options.providers)
        _write(rows, options.out)
    for mask, width in itertools.product(("causal", "full"), (64, 128)):
        if mask in options.masks and width in options.dims:
            rows += errors(mask, width)
    rows.append({"setting": "product 8192³, after", "provider": "cuBLAS", "tflops": round(product(), 1)})
    _write(rows, options.out)


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    """What there is so far: a run that is cut off loses nothing."""
    bars = [*bars_of([r for r in rows if "mask" in r]), error_bar(rows)]
    write("attention_kernels", rows, bars, installed("flash-attn-4"), out)


if __name__ == "__main__":
    main()
