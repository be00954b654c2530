"""A sequence shared by processes: what schedules compute against one process, and are predicted to take.

A transformers Llama with a packed batch runs in one process as it is, then in two (four with `--validate`),
each with its part of the tokens: over gloo on a CPU, over NCCL where every process has a GPU. Compared are
logits, the mean loss over the whole sequence, and gradients of all weights.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from kp_compiler import context_cost
from kp_compiler import target as targets
from kp_compiler.capture import capture_reports, merged
from kp_compiler.demos import common
from kp_compiler.documents import document_order
from kp_compiler.sharding import IGNORED, sequence_mean, shard_sequence, shifted_labels, unshard_sequence
from kp_compiler.specs import CAUSAL, AttentionShape, AttentionSpec

SUMMARY = "a sequence that processes share: schedules against one process, and their predicted times"
TOKENS, VOCABULARY, DOCUMENT = 256, 512, 100
SCHEDULES = (
    ("ring", "zigzag"), ("ring", "documents"), ("allgather", "zigzag"), ("ulysses", "contiguous"),
)  # fmt: skip
BOUND = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
NAMES = ("logits", "loss", "gradients")


def example() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """A Llama of two layers, 8 heads for 2 of keys, and 256 tokens in documents of up to 100."""
    transformers = common.transformers()
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=2, attn_implementation="sdpa",
    )  # fmt: skip
    device, dtype = ("cuda", torch.bfloat16) if targets.is_available() else ("cpu", torch.float32)
    model = common.build(transformers.LlamaForCausalLM, config, device=device, dtype=dtype)
    tokens = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(TOKENS) % DOCUMENT)[None]
    return (
        model,
        (),
        {"input_ids": tokens.to(device), "position_ids": positions.to(device), "use_cache": False},
    )


def run(validate: bool) -> int:
    """Print the tables; 1 where an error is out of its bound."""
    size = 4 if validate else 2
    if targets.is_available() and torch.accelerator.device_count() < size:
        there = torch.accelerator.device_count()
        print(f"{size} processes need as many GPUs, there are {there}: nothing was run")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (size, folder), nprocs=size, join=True)
        found = torch.load(Path(folder) / "found.pt")
    rows = [("schedule", "tokens of a process", "sites", *(f"error of {name}" for name in NAMES))]
    rows += [(s, layout, sites, *(f"{e:.1e}" for e in errors)) for s, layout, sites, errors, _ in found]
    print(f"{size} processes, against one process in float64\n{common.table(rows)}")
    print(f"\npredicted for one site on H100s, 32 heads for 8 of keys, D128, causal\n{_predicted()}")
    wrong = [s for s, _, _, errors, bound in found if max(errors) > bound]
    print("\n" + (f"NOT AS EXPECTED  {', '.join(wrong)}" if wrong else "everything is within its bounds"))
    return 1 if wrong else 0


def _process(rank: int, size: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    device = "cuda" if targets.is_available() else "cpu"
    if device == "cuda":
        torch.accelerator.set_device_index(rank)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or size) // size))
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
    )
    model, _, inputs = example()
    exact = _step(copy.deepcopy(model).double(), inputs, shifted_labels(inputs["input_ids"]), None)
    found = []
    for schedule, layout in SCHEDULES:
        if rank == 0:
            print(f"{schedule}, {layout}: compiling and running", flush=True)
        with contextlib.redirect_stdout(io.StringIO()):
            found.append((schedule, layout, *_shared(model, inputs, schedule, layout, exact)))
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    dist.barrier()
    dist.destroy_process_group()


def _shared(
    model: Any, inputs: dict[str, Any], schedule: str, layout: Any, exact: list[Tensor]
) -> tuple[str, list[float], float]:
    """What the report says of the sites, errors of logits, loss and gradients, and their bound."""
    mesh = dist.group.WORLD
    options: dict[str, Any] = {"context_parallel": {"mesh": mesh, "schedule": schedule, "layout": layout}}
    if not targets.is_available():
        options["lowering"] = "aot_eager"
    whole = {**inputs, "labels": inputs["input_ids"]}
    order = document_order(inputs["position_ids"], mesh) if layout == "documents" else None
    mine = shard_sequence(whole, mesh, layout=order or layout)
    labels = mine.pop("shift_labels")
    del mine["labels"]
    twin = copy.deepcopy(model)
    with capture_reports() as reports, order or contextlib.nullcontext():
        compiled = torch.compile(twin, backend="kp", fullgraph=True, options=options)
        logits, loss, *gradients = _step(compiled, mine, labels, mesh)
    logits = unshard_sequence(logits, mesh, layout=order or layout, length=TOKENS)
    for x in gradients:
        dist.all_reduce(x)
    got = ([logits], [loss], gradients)
    want = (exact[:1], exact[1:2], exact[2:])
    sites = {site.impl or str(site.reason) for site in merged(reports).sites}
    errors = [common.relative_error(a, b) for a, b in zip(got, want, strict=True)]
    return ", ".join(sorted(sites)), errors, BOUND[model.dtype]


def _step(model: Any, inputs: dict[str, Any], labels: Tensor, mesh: Any) -> list[Tensor]:
    """Logits, the mean loss of all processes' tokens, and gradients of weights."""
    model.zero_grad()
    logits = model(**inputs).logits
    total = F.cross_entropy(
        logits.flatten(0, 1).double(), labels.flatten(), reduction="sum", ignore_index=IGNORED
    )
    counted = (labels != IGNORED).sum()
    loss = total / counted if mesh is None else sequence_mean(total, counted, mesh)
    loss.backward()
    return [logits.detach(), loss.detach(), *(p.grad for p in model.parameters())]


def _predicted() -> str:
    spec = AttentionSpec(128**-0.5, CAUSAL)
    rows: list[tuple[str, ...]] = [
        ("tokens", "GPUs", "schedule", "forward ms", "backward ms", "MiB of buffers")
    ]
    h100 = targets.parse("cuda:sm90")
    for tokens, size in ((32768, 2), (131072, 8), (1048576, 64)):
        mine = tokens // size
        shape = AttentionShape(1, 32, 8, mine, mine, 128, 128, torch.bfloat16, "cuda", training=True)
        for name, each in context_cost.predict(spec, shape, "zigzag", size, h100).items():
            ms = (f"{1e3 * seconds:.2f}" for seconds in (each.forward, each.backward))
            rows.append((str(tokens), str(size), name, *ms, f"{each.memory / 2**20:.0f}"))
    return common.table(rows)
