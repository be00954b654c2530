"""Whole Hugging Face models: native eager, Inductor, hand-written, Hugging Face sdpa + Inductor, and kp.

    python benchmarks/attention_models.py [--suite llama batch wide long gpt2 bert] [--repeats N] [--out DIR]
    python benchmarks/attention_models.py --merge PART.json …

Every arm has the same weights and inputs (random), all run interleaved in one process; medians of CUDA-event
times, peak memory above the weights. Bars are those of the issue that asked for this benchmark.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import torch
import transformers
from harness import RESULTS, bar, peak_gib, time_interleaved, warm, write

import kp_compiler

SUITES = ("llama", "batch", "wide", "long", "gpt2", "bert")
ARMS = ("native", "inductor-eager", "inductor-sdpa", "hand", "kp-eager", "kp-sdpa")


def forward_step(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    def step() -> Any:
        with torch.no_grad():
            return model(**inputs)

    return step


def training_step(model: Any, inputs: dict[str, Any]) -> Callable[[], Any]:
    def step() -> None:
        model(**inputs).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step


def make_arm(name: str, model: Any, hand: str) -> Any:
    """A callable model for one arm."""
    if name == "native":
        return models.variant(model, "eager")
    kind, _, implementation = name.partition("-")
    if kind == "hand":
        return torch.compile(models.variant(model, hand), backend="inductor")
    return torch.compile(models.variant(model, implementation), backend="kp" if kind == "kp" else "inductor")


def measure(
    label: str,
    model: Any,
    inputs: dict[str, Any],
    *,
    train: bool,
    arms: tuple[str, ...],
    repeats: int,
    hand: str = models.HAND,
) -> list[dict[str, Any]]:
    """Rows of one setting."""
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.empty_cache()
    model.train(train)
    steps: dict[str, Callable[[], Any]] = {}
    compile_s: dict[str, float] = {}
    memory: dict[str, float] = {}
    for name in arms:
        arm = make_arm(name, model, hand).train(train)
        step = (training_step if train else forward_step)(arm, inputs)
        start = time.perf_counter()
        if warm(name, step, 1):
            compile_s[name] = time.perf_counter() - start
            step()
            memory[name] = peak_gib(step)
            steps[name] = step
    times = time_interleaved(steps, repeats)
    rows = []
    for name in arms:
        rows.append(
            {
                "setting": label,
                "mode": "train" if train else "forward",
                "arm": name,
                "ms": round(times[name], 3) if name in times else None,
                "peak_gib": round(memory[name], 4) if name in memory else None,
                "first_call_s": round(compile_s[name], 2) if name in compile_s else None,
            }
        )
        ms, gib, first = (rows[-1][key] for key in ("ms", "peak_gib", "first_call_s"))
        print(f"{label:24s} {rows[-1]['mode']:8s} {name:15s} {ms} ms  {gib} GiB  {first} s", flush=True)
    return rows


def tokens(count: int, vocab: int = 32000, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, vocab, (batch, count), device="cuda")


def causal_inputs(count: int, train: bool, batch: int = 1) -> dict[str, Any]:
    ids = tokens(count, batch=batch)
    return (
        {"input_ids": ids, "labels": ids, "use_cache": False}
        if train
        else {"input_ids": ids, "use_cache": False, "logits_to_keep": 1}
    )


def packed_positions(count: int) -> torch.Tensor:
    """Positions of documents of random length up to a quarter of the sequence, restarting at 0."""
    generator = torch.Generator().manual_seed(0)
    lengths: list[int] = []
    while sum(lengths) < count:
        lengths.append(
            min(int(torch.randint(256, count // 4 + 1, (), generator=generator)), count - sum(lengths))
        )
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0).cuda()


def run_llama(
    repeats: int, sizes: tuple[int, ...], train_sizes: tuple[int, ...], arms: tuple[str, ...]
) -> list[dict[str, Any]]:
    model = models.llama()
    rows = []
    for count in sizes:
        rows += measure(
            f"llama {count}", model, causal_inputs(count, False), train=False, arms=arms, repeats=repeats
        )
    for count in train_sizes:
        few = tuple(a for a in arms if a != "native") if count >= 8192 else arms
        rows += measure(
            f"llama {count}", model, causal_inputs(count, True), train=True, arms=few, repeats=repeats
        )
    return rows


def run_batch(repeats: int) -> list[dict[str, Any]]:
    """Sequences of 2048 tokens, as many as fill the GPU: a single one is bound by the host, whose time moves
    by a tenth between arms that run the same kernels."""
    arms = tuple(arm for arm in ARMS if arm != "native")
    model, rows = models.llama(), []
    for train in (False, True):
        inputs = causal_inputs(2048, train, batch=4)
        rows += measure("llama 4x2048", model, inputs, train=train, arms=arms, repeats=repeats)
    ids = tokens(2048, batch=8)
    inputs, hand = {"input_ids": ids, "labels": ids}, f"{models.HAND}_full"
    rows += measure("bert 8x2048", models.bert(), inputs, train=True, arms=arms, repeats=repeats, hand=hand)
    return rows


def run_wide(repeats: int) -> list[dict[str, Any]]:
    """The same Llama with an MLP of 8192: more of the time is spent where kp changes nothing."""
    inputs, arms = (
        causal_inputs(8192, False),
        ("inductor-eager", "inductor-sdpa", "hand", "kp-eager", "kp-sdpa"),
    )
    return measure(
        "llama-ffn8192 8192", models.llama(ffn=8192), inputs, train=False, arms=arms, repeats=repeats
    )


def run_long(repeats: int) -> list[dict[str, Any]]:
    """32k tokens: causal, windowed and packed."""
    count, arms = 32768, ("inductor-sdpa", "hand", "kp-sdpa")
    rows = []
    model = models.llama(2, 16, 4)
    rows += measure(
        "llama-2x16:4 32768", model, causal_inputs(count, False), train=False, arms=arms, repeats=repeats
    )
    packed = causal_inputs(count, False) | {"position_ids": packed_positions(count)}
    rows += measure("packed 32768", model, packed, train=False, arms=arms, repeats=repeats)
    del model
    rows += measure(
        "mistral-w1024 32768",
        models.mistral(),
        causal_inputs(count, False),
        train=False,
        arms=arms,
        repeats=repeats,
    )
    return rows


def run_gpt2(repeats: int, sizes: tuple[int, ...], arms: tuple[str, ...]) -> list[dict[str, Any]]:
    model = models.gpt2()
    rows = []
    for count in sizes:
        rows += measure(
            f"gpt2 {count}", model, causal_inputs(count, False), train=False, arms=arms, repeats=repeats
        )
    rows += measure(
        f"gpt2 {sizes[0]}", model, causal_inputs(sizes[0], True), train=True, arms=arms, repeats=repeats
    )
    return rows


def run_bert(repeats: int, sizes: tuple[int, ...], arms: tuple[str, ...]) -> list[dict[str, Any]]:
    model = models.bert()
    hand = f"{models.HAND}_full"
    rows = []
    for count in sizes:
        inputs = {"input_ids": tokens(count, batch=2)}
        rows += measure(f"bert {count}", model, inputs, train=False, arms=arms, repeats=repeats, hand=hand)
    labelled = {"input_ids": tokens(sizes[0], batch=2), "labels": tokens(sizes[0], batch=2)}
    rows += measure(f"bert {sizes[0]}", model, labelled, train=True, arms=arms, repeats=repeats, hand=hand)
    return rows


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = {(r["setting"], r["mode"], r["arm"]): r for r in rows}

    def ratio(setting: str, mode: str, a: str, b: str, key: str = "ms") -> float | None:
        x, y = (found.get((setting, mode, arm), {}).get(key) for arm in (a, b))
        return x / y if x and y else None

    bars = []
    for setting, mode, implementation, target in (
        ("llama 8192", "forward", "eager", 5.2), ("llama 8192", "forward", "sdpa", 1.75),
        ("llama 16384", "forward", "eager", 7.2), ("llama 16384", "forward", "sdpa", 2.3),
        ("llama 8192", "train", "eager", 2.95), ("llama 8192", "train", "sdpa", 1.55),
        ("llama-2x16:4 32768", "forward", "sdpa", 2.7), ("mistral-w1024 32768", "forward", "sdpa", 4.8),
        ("packed 32768", "forward", "sdpa", 3.8),
    ):  # fmt: skip
        value = ratio(setting, mode, f"inductor-{implementation}", f"kp-{implementation}")
        bars.append(bar(f"{setting} {mode} {implementation}: speed-up over Inductor", value, target))
    value = ratio("llama 8192", "train", "kp-eager", "inductor-eager", "peak_gib")
    bars.append(bar("llama 8192 train eager: memory against Inductor", value, 0.12, at_least=False))
    for setting, mode in dict.fromkeys((r["setting"], r["mode"]) for r in rows):
        if setting.startswith(("mistral", "packed")):  # the hand-written model masks less there
            continue
        for arm in ("kp-eager", "kp-sdpa"):
            if (setting, mode, arm) in found:
                value = ratio(setting, mode, "hand", arm)
                bars.append(bar(f"{setting} {mode} {arm}: speed against hand-written", value, 0.97))
    for setting in ("llama-2x16:4 32768", "mistral-w1024 32768", "packed 32768"):
        value = ratio(setting, "forward", "kp-sdpa", "hand", "peak_gib")
        bars.append(bar(f"{setting}: peak memory against hand-written", value, 1.03, at_least=False))
    return [b for b in bars if b["value"] is not None] or bars


def merged(paths: list[Path]) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """Rows, stamp and peers of partial runs, which must agree on device and versions. An arm and its peers
    are never in different runs, so every ratio is of one."""
    parts = [json.loads(path.read_text()) for path in paths]
    keys = ("device", "torch", "triton", "peers")
    for part in parts:
        if any(part[key] != parts[0][key] for key in keys):
            raise SystemExit(f"partial runs differ in one of {', '.join(keys)}: they are not one result")
    stamp = {key: parts[0][key] for key in ("date", "commit", "device", "torch", "triton")}
    stamp["commit"] = ", ".join(dict.fromkeys(part["commit"] for part in parts))
    return [row for part in parts for row in part["rows"]], stamp, parts[0]["peers"]


def run_suites(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    torch._dynamo.config.recompile_limit = 256
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    models.register_hand_written()
    repeats, sizes = options.repeats, tuple(options.sizes)
    suites: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "llama": lambda: run_llama(repeats, sizes, tuple(options.train_sizes), ARMS),
        "batch": lambda: run_batch(repeats),
        "wide": lambda: run_wide(repeats),
        "long": lambda: run_long(repeats),
        "gpt2": lambda: run_gpt2(repeats, sizes, ARMS),
        "bert": lambda: run_bert(repeats, sizes, ARMS),
    }
    return [row for name in names for row in suites[name]()]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", nargs="+", default=list(SUITES), choices=SUITES)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[2048, 4096, 8192, 16384], help="tokens, forward"
    )
    parser.add_argument("--train-sizes", type=int, nargs="*", default=[2048, 8192])
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="attention_models")
    parser.add_argument("--merge", type=Path, nargs="*", help="result files of partial runs to put together")
    options = parser.parse_args()
    if options.merge:
        rows, stamp, peers = merged(options.merge)
    else:
        rows, stamp = run_suites(options.suite, options), None
        peers = {"transformers": transformers.__version__, "kp": kp_compiler.__version__}
    write(options.name, rows, bars_of(rows), peers, options.out, stamp)


if __name__ == "__main__":
    main()
