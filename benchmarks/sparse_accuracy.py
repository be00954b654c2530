"""What block-sparse attention costs a trained model: perplexity and tasks by selector and density.

    python benchmarks/sparse_accuracy.py --stage train    [--seconds 400] [--checkpoint FILE] [--out DIR]
    python benchmarks/sparse_accuracy.py --stage curve    [--limit 540]
    python benchmarks/sparse_accuracy.py --stage finetune [--seconds 120] [--limit 540]
    python benchmarks/sparse_accuracy.py --tiny           all stages, in a minute on a CPU

`train`: a decoder learns source code and the tasks of `sparse_tasks.py`, dense, in contexts that grow to 16k.
`curve`: each selector at each density, without any training for it; and, at every head, what `mass` and
`error` keep and lose against exact attention. `finetune`: the model goes on densely for two minutes, and from
the same weights, on the same batches, in as many steps, with `content` at 90 % sparsity; the curve again.

Accuracy is the mean over tasks and contexts, in percent; a task is solved when every byte of the answer is
right. Perplexity is that of a byte of held-out files. One compiled layer serves all layers, so `random` takes
the same blocks in each. A stage keeps the rows of the others, of DIR or else of benchmarks/results; `train`
begins anew. Arms that would start `--limit` seconds after the program are left out, the last selectors first.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sparse_tasks as tasks
import torch
import torch.nn.functional as F
from harness import RESULTS, bar, write
from sparse_tasks import VOCABULARY, Tests, Text
from torch import Tensor, nn

import kp_compiler as kp
from kp_compiler.lowering import mask_render
from kp_compiler.lowering.selection import lists, measure
from kp_compiler.lowering.selection.site import Site
from kp_compiler.specs import AttentionSpec, MaskSpec, SparseSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
EMULATED: dict[str, Any] = {"cpu_rewrites": True, "lowering": "aot_eager"} if DEVICE == "cpu" else {}
NAME = "sparse_accuracy"
SELECTORS = ("content", "random", "structured", "vertical_slash", "learned")
TUNED, DENSE = ("content", 0.1), ("dense", 1.0)
FREE, TUNED_DENSE, TUNED_SPARSE = "training-free", "tuned densely", "tuned with content at 90 % sparsity"
MASS, ERROR = SparseSpec("content", mass=0.95), SparseSpec("content", 0.1, error=0.05)
EVERY = 10.0  # seconds between two lines of progress
ANSWER = 4.0  # weight of an answer's byte in the loss; a byte of code has 1, the rest of a line nothing
WARM, COOL = 100, 0.4  # steps to the full learning rate; part of a training in which it falls to nothing
TUNING_RATE = 0.3  # of the learning rate
BASE, EPS = 5e5, 1e-6  # of rotary positions, of norms
GATED = 8  # sequences that the gates of `learned` are trained on
ROWS = 256  # queries of a sequence that promises are measured at

Run = Callable[..., Tensor]  # layer, x, cos, sin -> x
Arm = tuple[str, float]  # selector and density
Row = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """Meant for 400 seconds on an H100. The layers have 12.8 million weights: a token costs 79 MFLOP in
    training, and 14 kFLOP for each token of its context."""

    layers: int = 4
    dim: int = 512
    heads: int = 4
    hidden: int = 1408
    window: int = 8  # bytes that are embedded together
    rate: float = 2e-3
    tokens: int = 81920  # of a batch
    # contexts, each up to some progress of the training
    phases: tuple[tuple[int, float], ...] = ((256, 0.1), (1024, 0.3), (4096, 0.5), (16384, 1.0))
    exams: dict[int, int] = field(default_factory=lambda: {8192: 250, 16384: 125})  # of a task by context
    texts: int = 120  # windows for perplexity, of the first of these contexts
    densities: tuple[float, ...] = (0.5, 0.3, 0.2, 0.1, 0.05)


TINY = Size(
    1, 64, 1, 128, tokens=5120, phases=((256, 0.5), (1024, 1.0)), exams={1024: 5}, texts=5, densities=(0.5,)
)  # fmt: skip


class Layer(nn.Module):
    """RMSNorm, causal attention with norms of q and k, half of each head with rotary positions; SwiGLU."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.width = size.dim // size.heads
        self.norm1, self.norm2 = nn.RMSNorm(size.dim, EPS), nn.RMSNorm(size.dim, EPS)
        self.norm_q, self.norm_k = nn.RMSNorm(self.width, EPS), nn.RMSNorm(self.width, EPS)
        self.q, self.k, self.v, self.o = (nn.Linear(size.dim, size.dim, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.dim, size.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(size.hidden, size.dim, bias=False)

    def qkv(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (-1, self.width)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return rotated(self.norm_q(q), cos, sin), rotated(self.norm_k(k), cos, sin), v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x, cos, sin)
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The first half of the last dimension turned, in float32; the rest knows no position."""
    turned, rest = x.chunk(2, -1)
    a, b = turned.float().chunk(2, -1)
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


class Decoder(nn.Module):
    """Tokens [B, N] to logits [B, N, VOCABULARY]. A byte is embedded together with the ones before it: models
    of bytes gain from n-grams (Pagnoni et al., Byte Latent Transformer, arXiv:2412.09871)."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.window = size.window
        self.bytes = nn.Embedding(VOCABULARY, size.dim // size.window)
        self.mix = nn.Linear(size.dim, size.dim, bias=False)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm, self.head = nn.RMSNorm(size.dim, EPS), nn.Linear(size.dim, VOCABULARY, bias=False)
        turned = size.dim // size.heads // 4  # pairs of numbers in a head
        speeds = BASE ** -(torch.arange(turned) / turned)
        angles = torch.outer(torch.arange(max(size.exams)), speeds).to(DEVICE)
        self.turns = angles.cos(), angles.sin()

    def start(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first layer is called with: x [B, N, dim], cos and sin."""
        length = tokens.shape[1]
        x = F.pad(self.bytes(tokens.int()), (0, 0, self.window - 1, 0))
        x = self.mix(torch.cat([x[:, i : i + length] for i in range(self.window)], -1))
        cos, sin = (turn[:length] for turn in self.turns)
        return x, cos, sin

    def forward(self, tokens: Tensor, run: Run) -> Tensor:
        x, cos, sin = self.start(tokens)
        for layer in self.layers:
            x = run(layer, x, cos, sin)
        return self.head(self.norm(x))


def build(size: Size, checkpoint: Path | None = None) -> Decoder:
    torch.manual_seed(0)
    model = Decoder(size).to(DEVICE, DTYPE)
    if checkpoint is not None:
        model.load_state_dict(torch.load(checkpoint, map_location=DEVICE))
    return model


def compiled(selector: str = "dense", density: float = 1.0) -> Run:
    """What runs a layer: densely, or in that share of the blocks."""
    torch._dynamo.reset()
    options = dict(EMULATED)
    if selector != "dense":
        settings = {"selector": selector, "sparsity": round(1 - density, 6), "min_tokens": 0}
        options["sparse_attention"] = {"mode": "require", **settings}
    run = torch.compile(backend="kp", fullgraph=True, dynamic=False, options=options)
    return run(lambda layer, x, cos, sin: layer(x, cos, sin))


class Whole(nn.Module):
    """The model as one piece: each of its layers has gates of its own."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens, lambda layer, *given: layer(*given))


def forward_of(model: Decoder, selector: str, density: float, gates: Path) -> Callable[[Tensor], Tensor]:
    """Tokens to logits, with that selector."""
    if selector != "learned":
        return functools.partial(model, run=compiled(selector, density))
    torch._dynamo.reset()
    settings = {"selector": selector, "sparsity": round(1 - density, 6), "min_tokens": 0, "gates": str(gates)}
    options = {**EMULATED, "sparse_attention": {"mode": "require", **settings}}
    return torch.compile(Whole(model), backend="kp", fullgraph=True, dynamic=False, options=options)


def train_gates(model: Decoder, text: Text, size: Size, gates: Path) -> Row:
    start, context = time.perf_counter(), next(iter(size.exams))
    batch = tasks.lesson(text.train, GATED, context, torch.Generator().manual_seed(3)).to(DEVICE)
    data = [(tokens[None, :-1],) for tokens in batch.tokens]
    options = {**EMULATED, "sparse_attention": {"min_tokens": 0}}
    losses = kp.train_selectors(Whole(model), data, gates, options=options)
    seconds = round(time.perf_counter() - start, 1)
    return {"stage": "gates", "divergence": {k: round(v, 4) for k, v in losses.items()}, "seconds": seconds}


class Optimizers:
    """Muon for the matrices of layers, AdamW for the rest; both on float32 copies of the weights."""

    def __init__(self, model: Decoder, rate: float) -> None:
        self.rate = rate
        self.weights = list(model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.weights]
        inner = [n.startswith("layers.") and p.dim() == 2 for n, p in model.named_parameters()]
        matrices = list(itertools.compress(self.masters, inner))
        rest = list(itertools.compress(self.masters, (not each for each in inner)))
        muon = torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=rate, weight_decay=0.1, betas=(0.9, 0.95))
        self.optimizers = muon, adam

    def step(self, factor: float) -> None:
        """With this part of the learning rate. Takes the weights' gradients away."""
        for master, weight in zip(self.masters, self.weights, strict=True):
            master.grad, weight.grad = weight.grad.float(), None
        nn.utils.clip_grad_norm_(self.masters, 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = factor * self.rate
            optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)


def by_clock(seconds: float) -> Iterator[float]:
    """The part of the time that is over, again and again."""
    start = time.perf_counter()
    while (progress := (time.perf_counter() - start) / seconds) < 1:
        yield progress


def train(
    model: Decoder, run: Run, text: Text, size: Size, pace: Iterable[float], rate: float, seed: int
) -> tuple[list[float], Row]:
    """A step for each number of `pace`, the progress from 0 to 1, which tells the context and the learning
    rate. Returns these numbers, for another model to be trained alike, and what the training was."""
    optimizers, generator = Optimizers(model, rate), torch.Generator().manual_seed(seed)
    start, last, went = time.perf_counter(), 0.0, []
    for step, progress in enumerate(pace):
        context = next(context for context, end in size.phases if progress < end)
        batch = tasks.lesson(text.train, size.tokens // context, context, generator).to(DEVICE)
        logits = model(batch.tokens[:, :-1], run)
        losses = tasks.losses_of(logits, batch)
        weight = torch.where(batch.answers, ANSWER, (~batch.planted).float())
        ((losses * weight).sum() / weight.sum()).backward()
        optimizers.step(min((step + 1) / WARM, (1 - progress) / COOL, 1.0))
        went.append(progress)
        if step == 0 or time.perf_counter() - last > EVERY:
            found = tasks.learned(logits.detach(), losses.detach(), batch)
            last = time.perf_counter()
            print({"step": step, "seconds": round(last - start), "context": context, **found}, flush=True)
    told = {"steps": len(went), "tokens": len(went) * size.tokens}
    told |= tasks.learned(logits.detach(), losses.detach(), batch)
    return went, {**told, "seconds": round(time.perf_counter() - start, 1)}


@torch.no_grad()
def examined(forward: Callable[[Tensor], Tensor], tests: Tests, size: Size) -> Row:
    """Perplexity, and accuracies in percent."""
    row, solved = {}, []
    for (name, context), test in tests.items():
        found, step = [], size.tokens // context
        for first in range(0, len(test.tokens), step):
            batch = test.part(slice(first, first + step)).to(DEVICE)
            logits = forward(batch.tokens[:, :-1])
            score = tasks.losses_of(logits, batch).mean(1) if name == "text" else tasks.solved(logits, batch)
            found.append(score.double())
        mean = torch.cat(found).mean().item()
        if name == "text":
            row["perplexity"] = round(math.exp(mean), 5)
            continue
        row[f"{name} {context}"] = round(100 * mean, 2)
        solved += [100 * mean] * (name not in tasks.BESIDE)
    return {**row, "accuracy": round(statistics.mean(solved), 3)}


def curve(
    stage: str, model: Decoder, arms: Iterable[Arm], tests: Tests, size: Size, options: argparse.Namespace
) -> Iterator[Row]:
    """A row for each arm that can start before the deadline."""
    for selector, density in arms:
        start = time.perf_counter()
        if start > options.deadline:
            print(f"left out for want of time: {stage}, {selector} at {density}", flush=True)
            continue
        row = {"stage": stage, "selector": selector, "density": density}
        row |= examined(forward_of(model, selector, density, options.gates), tests, size)
        row["seconds"] = round(time.perf_counter() - start, 1)
        print(row, flush=True)
        yield row


@torch.no_grad()
def promised(model: Decoder, tests: Tests) -> Iterator[Row]:
    """A row for each promise and layer: the least mass kept by a head, and the most error made by one. Of two
    sequences of each test in the first context; layers get what they get densely."""
    context = next(iter(tests))[1]
    tokens = torch.cat([test.tokens[:2] for (_, length), test in tests.items() if length == context])
    x, *turns = model.start(tokens[:, :-1].to(DEVICE))
    for number, layer in enumerate(model.layers):
        q, k, v = layer.qkv(x, *turns)
        for name, sparse in (("mass=0.95", MASS), ("error=0.05", ERROR)):
            share, mass, error = measured(q, k, v, sparse)
            row = {"stage": "promises", "promise": name, "layer": number, "density": round(share, 4)}
            row |= {"least_mass": round(mass.min().item(), 4), "most_error": round(error.max().item(), 4)}
            print(row, flush=True)
            yield row
        x = layer(x, *turns)


def measured(q: Tensor, k: Tensor, v: Tensor, sparse: SparseSpec) -> tuple[float, Tensor, Tensor]:
    """The share of causal blocks that is chosen; by head [H], the mass that they hold, the mean over queries,
    and the relative error of the output. q, k and v [B, H, N, D], exact in float32 at ROWS queries of each
    sequence."""
    spec = AttentionSpec(q.shape[-1] ** -0.5, MaskSpec("causal", "k <= q"))
    site = Site(spec, sparse, q, k, [], mask_render.inequalities(spec.mask))
    found = lists.by_query(site)
    dense = measure.dense_heads(site, v, lambda: measure.sampled(site, found), [])
    length, block, causal = q.shape[2], sparse.block, torch.logical_or(*site.mask(slice(0, site.rows)))
    chosen = (found.visited(site.blocks) > 0) | (causal & dense[:, :, None, None])
    share = chosen.sum() / causal.expand_as(chosen).sum()
    place = torch.arange(length, device=q.device)
    generator = torch.Generator().manual_seed(0)
    mass, lost, norm = (torch.zeros(q.shape[1], device=q.device) for _ in range(3))
    for each in range(len(q)):
        at = torch.randperm(length, generator=generator)[:ROWS].to(q.device)
        scores = q[each, :, at].float() @ k[each].float().mT * spec.scale
        probs = scores.masked_fill(place > at[:, None], float("-inf")).softmax(-1)
        kept = probs * chosen[each][:, at // block].repeat_interleave(block, -1)[..., :length]
        held = kept.sum(-1, keepdim=True)
        exact, out = probs @ v[each].float(), (kept @ v[each].float()) / held
        mass += held.mean((1, 2)) / len(q)
        lost += (out - exact).square().sum((1, 2))
        norm += exact.square().sum((1, 2))
    return share.item(), mass, (lost / norm).sqrt()


def bars_of(rows: list[Row]) -> list[Row]:
    found = {(r["stage"], r["selector"], r["density"]): r for r in rows if "selector" in r}

    def lead(of: tuple[str, Arm], over: tuple[str, Arm], what: str = "accuracy") -> float | None:
        a, b = (found.get((stage, *arm)) for stage, arm in (of, over))
        return a[what] - b[what] if a and b else None

    lost = {d: lead((FREE, DENSE), (FREE, ("content", d))) for stage, name, d in found if name == "content"}
    density = min((d for d, points in lost.items() if points is not None and points <= 0.5), default=0.0)
    dense, sparse = (TUNED_DENSE, DENSE), (TUNED_SPARSE, TUNED)
    bars = [bar("dense: tasks solved, in percent", found.get((FREE, *DENSE), {}).get("accuracy"), 95.0)]
    for peer in ("random", "structured"):
        name = f"{FREE}, density {density} where content loses at most 0.5 points: lead over {peer}"
        bars.append(bar(name, lead((FREE, ("content", density)), (FREE, (peer, density))), 10.0))
    bars.append(bar(f"{TUNED_SPARSE}: points lost to dense", lead(dense, sparse), 0.5, at_least=False))
    more = lead(sparse, dense, "perplexity")
    part = None if more is None else more / found[(TUNED_DENSE, *DENSE)]["perplexity"]
    bars.append(bar(f"{TUNED_SPARSE}: perplexity above dense, relatively", part, 0.005, at_least=False))
    kept = [r["least_mass"] for r in rows if r.get("promise") == "mass=0.95"]
    bars.append(bar("mass=0.95: least mass kept by a head", min(kept, default=None), 0.93))
    errors = [r["most_error"] for r in rows if r.get("promise") == "error=0.05"]
    bars.append(bar("error=0.05: most error of a head", max(errors, default=None), 0.05, at_least=False))
    return bars


def train_stage(options: argparse.Namespace, size: Size, text: Text, tests: Tests) -> Iterator[Row]:
    model, seconds = build(size), options.seconds or (6.0 if options.tiny else 400.0)
    _, told = train(model, compiled(), text, size, by_clock(seconds), size.rate, seed=0)
    options.checkpoint.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), options.checkpoint)
    yield {"stage": "training", **told}
    whenever = argparse.Namespace(**{**vars(options), "deadline": math.inf})
    yield from curve(FREE, model, [DENSE], tests, size, whenever)


def curve_stage(options: argparse.Namespace, size: Size, text: Text, tests: Tests) -> Iterator[Row]:
    model = build(size, options.checkpoint)
    yield from promised(model, tests)
    yield train_gates(model, text, size, options.gates)
    arms = [DENSE, *itertools.product(SELECTORS, size.densities)]
    yield from curve(FREE, model, arms, tests, size, options)


def finetune_stage(options: argparse.Namespace, size: Size, text: Text, tests: Tests) -> Iterator[Row]:
    """The clock is for the dense model; the other one has as many steps, whatever they take. Gates are those
    of the stage before."""
    seconds = options.seconds or (2.0 if options.tiny else 120.0)
    size = dataclasses.replace(size, phases=((max(size.exams), 1.0),))
    pace: Iterable[float] = by_clock(seconds)
    others = [arm for arm in itertools.product(SELECTORS, size.densities) if arm != TUNED]
    plan = (TUNED_DENSE, DENSE, [DENSE, TUNED]), (TUNED_SPARSE, TUNED, [TUNED, DENSE, *others])
    for stage, arm, arms in plan:
        model = build(size, options.checkpoint)
        pace, told = train(model, compiled(*arm), text, size, pace, TUNING_RATE * size.rate, seed=2)
        yield {"stage": f"{stage}: training", **told}
        yield from curve(stage, model, arms, tests, size, options)


STAGES = {"train": train_stage, "curve": curve_stage, "finetune": finetune_stage}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="all of them if none is named")
    parser.add_argument("--seconds", type=float, help="of training (400) or tuning (120)")
    parser.add_argument("--limit", type=float, default=540.0)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    options.deadline = time.perf_counter() + options.limit
    options.checkpoint = options.checkpoint or options.out / f"{NAME}.pt"
    options.gates = options.checkpoint.with_suffix(".safetensors")
    size = TINY if options.tiny else Size()
    text = tasks.source(2**24) if options.tiny else tasks.source()
    tests = tasks.tests_of(text.held, size.exams, size.texts)
    for name in [options.stage] if options.stage else STAGES:
        rows: list[Row] = []
        try:
            for row in STAGES[name](options, size, text, tests):
                rows.append(row)
        finally:
            files = [folder / f"{NAME}.json" for folder in (options.out, RESULTS) if name != "train"]
            others = next((json.loads(file.read_text())["rows"] for file in files if file.exists()), [])
            mine = {row["stage"] for row in rows}
            rows = [row for row in others if row["stage"] not in mine] + rows
            write(NAME, rows, bars_of(rows), {}, options.out)


if __name__ == "__main__":
    main()
