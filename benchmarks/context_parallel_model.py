"""A Llama whose sequence GPUs share: prefill and training steps, against one GPU and against PyTorch's.

    torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py [--tokens 32768 65536] [--layers 16]
        [--repeats 3] [--providers …] [--out DIR]
    torchrun --nproc-per-node 2 benchmarks/context_parallel_model.py --tiny --out DIR

transformers' LlamaModel in the shape of Llama-3.2-1B with a vocabulary of 32768, random bfloat16 weights, one
causal sequence. `forward` gives the last hidden states; `train` is the mean loss of all tokens, backward, and
gradients added up over ranks, without an optimizer. Logits (of the embedding's weights, as in Llama-3.2) are
made for 4096 tokens at a time, and again in the backward pass, outside of what is compiled, in every arm.

`one GPU` is kp on the first GPU, while the others run a few tokens. `kp` takes the schedule that is predicted
to be fastest. `torch` is torch.distributed.tensor.experimental.context_parallel over cuDNN's kernels, by both
of its rotations, around the model as Inductor compiles it, or eager where that fails (`compiled`); masks that
transformers makes are those of a part there, so its attention is a plain causal call. Batches are divided
before anything is timed. A time is the slowest rank's, a median over rounds in which each step comes once, in
a new order; PyTorch's arms have rounds of their own, since theirs is a setting of the process. `ms` is null
where memory was short.

efficiency: t₁ / (P · t_P).   peak: of the rank with the most, above weights and inputs.
error: of the last hidden states, relative to those of one GPU.
loss_error: of the training step's loss, relative to that of one GPU's forward pass; random weights hardly say
anything of the next token, so that attention shows little in it.
--tiny runs one small layer on CPUs over gloo, once: that the arms run, which PyTorch's don't there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from harness import RESULTS, bar, here, write
from ring_attention import peak, timed
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import kp_compiler as kp
from kp_compiler.capture import merged
from kp_compiler.sharding import IGNORED

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 32768, "max_position_embeddings": 131072,
}  # fmt: skip
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 512, "max_position_embeddings": 1024,
}  # fmt: skip
ALONE = "one GPU"
SCHEDULES = {"kp": "auto", "kp ring": "ring"}
TORCH = ("torch allgather", "torch alltoall")
PROVIDERS = (ALONE, *SCHEDULES, *TORCH)
MODES = ("forward", "train")
FEW = 256  # tokens of ranks that wait
ROWS = 4096  # tokens whose logits are there at a time: 512 MiB in float32
Step = Callable[[], Tensor]
Key = tuple[str, str]  # provider, mode


@dataclass(frozen=True)
class Setting:
    """What the arms of one length have in common."""

    model: Any
    mesh: DeviceMesh
    tokens: int
    repeats: int
    tiny: bool
    providers: tuple[str, ...]

    def whole(self) -> dict[str, Tensor]:
        """One sequence [1,N], the same on every rank, with each token's next one as its label."""
        vocabulary, generator = self.model.config.vocab_size, torch.Generator().manual_seed(self.tokens)
        tokens = torch.randint(vocabulary, (1, self.tokens), generator=generator).to(self.model.device)
        return {"input_ids": tokens, "labels": kp.shifted_labels(tokens)}


@dataclass
class Found:
    """Of one arm in one mode: nothing where it did not run."""

    seconds: float | None = None
    memory: float | None = None
    hidden: Tensor | None = None  # of the whole sequence, on the CPU
    loss: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)


def build(layers: int, tiny: bool) -> Any:
    shape = TINY if tiny else SHAPE
    config = transformers.LlamaConfig(
        **shape, num_hidden_layers=layers, use_cache=False, attn_implementation="sdpa"
    )
    how: tuple[torch.dtype, str] = (torch.float32, "cpu") if tiny else (torch.bfloat16, "cuda")
    torch.manual_seed(0)
    return models.build(transformers.LlamaModel, config, *how)


def loss_sum(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    """Over hidden states [1,n,W] and labels [1,n], some tokens after the other."""
    parts = zip(hidden[0].split(ROWS), labels[0].split(ROWS), strict=True)
    return torch.stack([checkpoint(_loss_of, h, head, y, use_reentrant=False) for h, y in parts]).sum()


def _loss_of(hidden: Tensor, head: Tensor, labels: Tensor) -> Tensor:
    logits = F.linear(hidden, head).float()
    return F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED)


def forward(model: Any, inputs: dict[str, Tensor]) -> Step:
    def step() -> Tensor:
        with torch.no_grad():
            return model(**inputs).last_hidden_state

    return step


def training(model: Any, inputs: dict[str, Tensor], labels: Tensor, mesh: DeviceMesh | None) -> Step:
    """The loss, detached. `mesh`: of the ranks that share the sequence."""
    parameters, count = list(model.parameters()), (labels != IGNORED).sum()

    def step() -> Tensor:
        try:
            hidden = model(**inputs).last_hidden_state
            total = loss_sum(hidden, model.embed_tokens.weight, labels)
            loss = total / count if mesh is None else kp.sequence_mean(total, count, mesh)
            loss.backward()
            if mesh is not None:
                for work in [dist.all_reduce(p.grad, async_op=True) for p in parameters]:
                    work.wait()
            return loss.detach()
        finally:
            for parameter in parameters:
                parameter.grad = None

    return step


def steps_of(name: str, model: Any, part: dict[str, Tensor], mesh: DeviceMesh | None) -> dict[Key, Step]:
    """Both modes of an arm, on what this rank has of the batch."""
    inputs = {key: x for key, x in part.items() if key != "labels"}
    steps = forward(model, inputs), training(model, inputs, part["labels"], mesh)
    return {(name, mode): step for mode, step in zip(MODES, steps, strict=True)}


def compiled(setting: Setting, **options: Any) -> Any:
    if setting.tiny:
        options["lowering"] = "aot_eager"
    return torch.compile(setting.model, backend="kp", fullgraph=True, dynamic=False, options=options)


def steps_of_kp(setting: Setting, name: str) -> dict[Key, Step]:
    whole = setting.whole()
    if name == ALONE:
        mine = {key: x if dist.get_rank() == 0 else x[:, :FEW].contiguous() for key, x in whole.items()}
        return steps_of(name, compiled(setting), mine, None)
    tokens = whole["input_ids"]
    part = kp.shard_sequence({"input_ids": tokens, "labels": tokens}, setting.mesh)
    # Without `position_ids`, in which transformers would look for several documents
    mine = {"input_ids": part["input_ids"], "labels": part["shift_labels"]}
    model = compiled(setting, context_parallel={"mesh": setting.mesh, "schedule": SCHEDULES[name]})
    return steps_of(name, model, mine, setting.mesh)


@contextlib.contextmanager
def torch_shared(setting: Setting, rotation: str) -> Iterator[dict[str, Tensor]]:
    """Within, attention is PyTorch's over all ranks; what this rank has of the batch."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._attention import set_rotate_method

    set_rotate_method(rotation)
    batch = setting.whole()
    batch["position_ids"] = torch.arange(setting.tokens, device=setting.model.device)[None]
    buffers = list(batch.values())
    shared = context_parallel(setting.mesh, buffers=buffers, buffer_seq_dims=[1] * len(buffers))
    with shared, sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield batch


def of_torch(setting: Setting, name: str) -> dict[Key, Found]:
    """Compiled by Inductor; in eager mode what does not run so."""
    found: dict[Key, Found] = {}
    model = models.variant(setting.model, models.HAND)
    for how in ("inductor", "eager"):
        with torch_shared(setting, name.split()[1]) as mine:
            arm = model if how == "eager" else torch.compile(model, dynamic=False)
            steps = steps_of(name, arm, mine, setting.mesh)
            missing = {key: step for key, step in steps.items() if key not in found or not found[key].seconds}
            found |= measured(missing, setting, (Exception,))
        for key in missing:
            found[key].notes["compiled"] = how == "inductor"
    return found


def measured(
    steps: dict[Key, Step], setting: Setting, errors: tuple[type[Exception], ...] = (torch.OutOfMemoryError,)
) -> dict[Key, Found]:
    """All steps, in rounds; those that raise one of `errors` are left out. What is timed may not compile."""
    found: dict[Key, Found] = {key: Found() for key in steps}
    running: dict[str, Step] = {}
    with kp.capture_reports() as reports:
        for key, step in steps.items():
            before = len(reports)
            out = attempt(f"{setting.tokens} tokens, {key[0]}, {key[1]}", partial(settled, step), errors)
            if out is not None:
                running["/".join(key)] = step
                keep(out, key, setting, found[key])
            if key[0] in SCHEDULES and (sites := merged(reports[before:]).sites):
                found[key].notes["schedule"] = ", ".join(sorted({str(site.impl) for site in sites}))
    with torch.compiler.set_stance("fail_on_recompile"):
        times = once(running) if setting.tiny else timed(running, setting.repeats)
        for name, step in running.items():
            each = found[tuple(name.split("/"))]  # type: ignore[index]
            each.seconds, each.memory = times[name], None if setting.tiny else peak(step)
    return found


def settled(step: Step) -> Tensor:
    """The third call, which finds everything compiled. Raises RuntimeError if it does not."""
    for _ in range(2):
        step()
    with torch.compiler.set_stance("fail_on_recompile"):
        return step()


def attempt(name: str, step: Step, errors: tuple[type[Exception], ...]) -> Tensor | None:
    """What a step returns; None on all ranks where it fails on one, since they make the same calls. (Where it
    fails on some in the middle of an exchange, the others wait until the group's timeout.)"""
    out, problem = None, ""
    try:
        out = step()
    except errors as error:
        problem = f"{type(error).__name__}: {error}".splitlines()[0]
    failed = torch.tensor([float(out is None)], device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(failed, dist.ReduceOp.MAX)
    if not float(failed):
        return out
    if problem:
        print(f"rank {dist.get_rank()}: {name}: {problem}", file=sys.stderr, flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    return None


def once(steps: dict[str, Step]) -> dict[str, float]:
    """Seconds of one call, of the slowest rank, on CPUs."""
    found = {}
    for name, step in steps.items():
        dist.barrier()
        start = time.perf_counter()
        step()
        seconds = torch.tensor([time.perf_counter() - start])
        dist.all_reduce(seconds, dist.ReduceOp.MAX)
        found[name] = float(seconds)
    return found


def keep(out: Tensor, key: Key, setting: Setting, found: Found) -> None:
    """What results are compared by."""
    if key[1] == "train":
        found.loss = float(out)
        return
    # PyTorch divides as "zigzag" does
    shared = key[0] != ALONE
    found.hidden = (kp.unshard_sequence(out, setting.mesh, length=setting.tokens) if shared else out).cpu()
    if not shared and dist.get_rank() == 0:
        labels, head = setting.whole()["labels"], setting.model.embed_tokens.weight
        with torch.no_grad():
            found.loss = float(loss_sum(out, head, labels) / (labels != IGNORED).sum())


def measure(setting: Setting) -> Iterator[dict[Key, Found]]:
    """Of one length, some arms after the other."""
    steps: dict[Key, Step] = {}
    for name in setting.providers:
        if name not in TORCH:
            steps |= steps_of_kp(setting, name)
    yield measured(steps, setting)
    steps.clear()
    for name in TORCH:
        if name in setting.providers:
            yield of_torch(setting, name)


def rows_of(setting: Setting, found: dict[Key, Found]) -> list[dict[str, Any]]:
    """On the first rank, which has the whole sequence's results."""
    one = {mode: found.get((ALONE, mode), Found()) for mode in MODES}
    rows = []
    for (name, mode), each in found.items():
        ranks = 1 if name == ALONE else dist.get_world_size()
        row = {"tokens": setting.tokens, "provider": name, "ranks": ranks, "mode": mode, "ms": None}
        if each.seconds is not None:
            row["ms"] = round(1e3 * each.seconds, 2)
            row["tokens_per_s_per_gpu"] = round(setting.tokens / each.seconds / ranks)
            if (first := one[mode].seconds) is not None:
                row["efficiency"] = round(first / ranks / each.seconds, 4)
        if each.memory is not None:
            row["peak_mib"] = round(each.memory / 2**20, 1)
        if each.hidden is not None and (hidden := one["forward"].hidden) is not None and ranks > 1:
            row["error"] = float((each.hidden.float() - hidden.float()).norm() / hidden.float().norm())
        if mode == "train" and each.loss is not None and (loss := one["forward"].loss) is not None:
            row["loss_error"] = abs(each.loss - loss) / abs(loss)
        rows.append(row | each.notes)
    return rows


def bars_of(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    by = {(r["tokens"], r["mode"], r["provider"]): r["ms"] for r in rows}
    bars = []
    for tokens, mode in dict.fromkeys(key[:2] for key in by):
        peers = [ms for name in TORCH if (ms := by.get((tokens, mode, name)))]
        if peers and (tokens, mode, "kp") in by:
            mine = by[tokens, mode, "kp"]
            name = f"{tokens} tokens, {mode}: speed-up over the best of PyTorch's"
            bars.append(bar(name, min(peers) / mine if mine else None, 1.0))
    return bars


def _write(rows: list[dict[str, Any]], out: Path) -> None:
    """What there is so far: a run that is cut off loses nothing."""
    stamp = here()
    stamp["device"] = f"{dist.get_world_size()} x {stamp['device']}"
    peers = {"transformers": transformers.__version__, "kp": kp.__version__}
    write("context_parallel_model", rows, bars_of(rows), peers, out, stamp)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[32768, 65536])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--providers", nargs="+", default=list(PROVIDERS), choices=PROVIDERS)
    parser.add_argument("--tiny", action="store_true", help="one small layer, 256 tokens, on CPUs")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.tiny:
        options.tokens, options.layers = [256], 1
        options.providers = [name for name in options.providers if name not in TORCH]
        if options.out == RESULTS:
            parser.error("--tiny needs --out: its times are no results")
    device = "cpu" if options.tiny else "cuda"
    dist.init_process_group("gloo" if options.tiny else "nccl")
    if not options.tiny:
        torch.cuda.set_device(dist.get_node_local_rank())
    torch._dynamo.config.recompile_limit = 64  # arms and modes of one model
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    models.register_hand_written()
    model, mesh = build(options.layers, options.tiny), init_device_mesh(device, (dist.get_world_size(),))
    rows: dict[int, list[dict[str, Any]]] = {}
    for tokens in options.tokens:
        setting = Setting(model, mesh, tokens, options.repeats, options.tiny, tuple(options.providers))
        found: dict[Key, Found] = {}
        for more in measure(setting):
            found |= more
            if dist.get_rank() == 0:
                rows[tokens] = rows_of(setting, found)
                print(*rows[tokens][-len(more) :], sep="\n", flush=True)
                _write([row for several in rows.values() for row in several], options.out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
