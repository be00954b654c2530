"""What each process of a test of shared sequences runs. Importable by name, so that processes can be
spawned."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import kp_compiler
from tests.distributed.fp8_workers import fp8_settings, whole_tensor
from tests.distributed.processes import finish, start

CONTEXT_CASES = [
    (schedule, mask, layout, heads)
    for schedule in ("ring", "allgather", "ulysses", "hybrid")
    for mask, layout, heads in (
        ("causal", "zigzag", (8, 2)), ("documents", "contiguous", (8, 8)), ("window", "zigzag", (8, 1)),
        ("full", "contiguous", (8, 4)),
    )
]  # fmt: skip


def context_cases(size: int) -> list[tuple[str, str, str, tuple[int, int]]]:
    """Those that so many ranks can do: a number that divides eight heads shares them, or rows of two do. Of
    three and of eight ranks every other one."""
    left_out = {"ulysses": 8 % size != 0, "hybrid": size % 2 != 0}
    return [case for case in CONTEXT_CASES[:: 2 if size in (3, 8) else 1] if not left_out.get(case[0])]


def sharding(rank: int, size: int) -> float:
    """What goes wrong when a batch is divided and put together again: nothing."""
    from kp_compiler.sharding import sequence_mean, shard_sequence, unshard_sequence

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 99, (2, 45), generator=generator)
    wrong = 0.0
    order = kp_compiler.document_order(torch.arange(45) % 20, dist.group.WORLD, chunks=2)
    for layout in ("contiguous", "zigzag", order):
        batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        mine = shard_sequence(batch, dist.group.WORLD, layout=layout)  # type: ignore[arg-type]
        back = {
            k: unshard_sequence(x, dist.group.WORLD, layout=layout)
            for k, x in mine.items()
            if k != "use_cache"
        }  # type: ignore[arg-type]
        wrong += float((back["input_ids"][:, :45] != ids).sum() + (back["attention_mask"].sum(1) != 45).sum())
        wrong += float(
            (back["shift_labels"][:, :44] != ids[:, 1:]).sum() + (back["labels"][:, 44:] != -100).sum()
        )
        wrong += float((back["position_ids"] != torch.arange(back["position_ids"].shape[1])).sum())
        weight = torch.ones((), requires_grad=True)
        counted = mine["labels"] != -100
        loss = sequence_mean(
            (weight * mine["labels"][counted].float()).sum(), counted.sum(), dist.group.WORLD
        )
        loss.backward()
        gradient = weight.grad.clone()  # type: ignore[union-attr]
        dist.all_reduce(gradient)
        want = ids[:, 1:].float().mean()
        wrong += float((loss - want).abs() + (gradient - want).abs()) / 1e4
    return wrong


def context(rank: int, size: int, file: str, compiled: bool, out: str) -> None:
    """Every case on this rank, through the operator; rank 0 keeps the largest error of each."""
    from kp_compiler.errors import KPConfigError
    from kp_compiler.lowering import reference, ring
    from kp_compiler.lowering.context import exchange
    from kp_compiler.lowering.context.layout import Layout
    from kp_compiler.sharding import ranks_of
    from kp_compiler.specs import AttentionSpec
    from tests.helpers import relative_error
    from tests.test_context import MASKS, tensors

    start(rank, size, file)
    grid = size % 2 == 0
    mesh = init_device_mesh(
        "cpu", (size // 2, 2) if grid else (size,), mesh_dim_names=("ring", "heads")[: 1 + grid]
    )
    ranks = ranks_of(mesh)
    if grid and size > 2:
        turned = DeviceMesh("cpu", torch.arange(size).view(2, size // 2).T, mesh_dim_names=("a", "b"))
        with pytest.raises(KPConfigError, match="not in ascending order"):
            ranks_of(turned)
    worst: dict[str, float] = {}
    for number, (schedule, name, kind, heads) in enumerate(context_cases(size)):
        generator = torch.Generator().manual_seed(number)
        exchange.NEAR = 8 if number % 2 else 0  # gathering directly, and by the transport's own way
        mask, scalars = MASKS[name]
        spec, layout = AttentionSpec(0.3, mask, dead_rows="zero"), Layout(kind, size, 48)  # type: ignore[arg-type]
        whole = [torch.randn(2, h, 48, 8, generator=generator) for h in (heads[0], heads[1], heads[1])]
        exact = [x.double().requires_grad_() for x in whole]
        want = reference.attention_over(*exact, tensors(), scalars, spec)
        want.square().sum().backward()
        place = layout.positions(rank)
        mine = [x.index_select(2, place).requires_grad_() for x in whole]
        plan = ring.Plan.of(ranks, spec, schedule, kind).to_json()  # type: ignore[arg-type]

        operator, operands = ring.context_attention(), tensors()

        def site(q: Any, k: Any, v: Any, given: Any = (operator, operands, scalars, plan)) -> Any:
            return given[0](q, k, v, *given[1:])[0]

        torch._dynamo.reset()
        function = torch.compile(site, backend="aot_eager", fullgraph=True) if compiled else site
        result = function(*mine)
        result.square().sum().backward()
        pairs = zip((result, *(x.grad for x in mine)), (want, *(x.grad for x in exact)), strict=True)
        errors = [relative_error(a.detach(), b.detach().index_select(2, place)) for a, b in pairs]
        worst[f"{schedule} {name}"] = max(errors)
    worst["sharding"] = sharding(rank, size)
    check = kp_compiler.validate_context_parallel(
        mesh, tokens=1026, heads=6, kv_heads=2, head_dim=16, dtype=torch.float32
    )
    parts = [f"1026 tokens are not {2 * size} equal parts: shard_sequence will add some"]
    parts *= 1026 % (2 * size) != 0
    parts += [f"ulysses: 6 heads can't be divided among {size} ranks"] * (6 % size != 0)
    assert list(check.problems) == parts and check.ok != bool(parts)
    assert check.link > 0 and (check.ranks, check.backend) == (size, "gloo")
    assert set(check.predicted) == set(check.errors) and len(check.errors) == 2 + (6 % size == 0) + grid
    assert all(0 < check.efficiency(name) <= 1 for name in check.predicted)
    worst["validated"] = max(check.errors.values())
    ordered = kp_compiler.validate_context_parallel(
        mesh, heads=2 * size, kv_heads=size, head_dim=16, dtype=torch.float32, layout="documents"
    )
    assert set(ordered.errors) == {"ring", "allgather", "ulysses"} == set(ordered.predicted)
    worst["validated, documents"] = max(ordered.errors.values())
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, worst)
    if rank == 0:
        torch.save({name: max(each[name] for each in everyone) for name in worst}, out)
    finish()


MODEL_CASES = [
    ("mistral", "ring", "contiguous", ""), ("llama", "ulysses", "contiguous", "padded"),
    ("gpt2", "ring", "zigzag", ""), ("llama", "auto", "zigzag", "packed, recomputed"),
    ("mixtral", "ring", "zigzag", ""), ("llama", "ring", "documents", "packed, recomputed"),
    ("llama", "ulysses", "documents", "packed"),
]  # fmt: skip


def shared_model(rank: int, size: int, file: str, out: str) -> None:
    """Whole models on parts of a sequence: logits and gradients of weights, against one process."""
    start(rank, size, file)
    worst = {"-".join(case): _shared_model(rank, size, *case) for case in MODEL_CASES}
    worst |= {f"one index-{layout}": _one_index(rank, size, layout) for layout in INDEX_LAYOUTS}
    worst["layers"] = _layers(size)
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, worst)
    if rank == 0:
        torch.save({name: max(each[name] for each in everyone) for name in worst}, out)
    finish()


INDEX_LAYOUTS = ("contiguous", "zigzag", "documents")


class OneIndex(nn.Module):
    """The same indices are positions and make a vector of the mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.places, self.qkv = nn.Embedding(48, 48), nn.Linear(48, 144)

    def forward(self, x: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        i = torch.arange(x.shape[1], device=x.device)
        x, s = x + self.places(i), segments + i // 7
        q, k, v = (y.unflatten(-1, (6, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        keep = (s[:, None, :, None] == s[:, None, None, :]) & (i[None, :] <= i[:, None])
        return nn.functional.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2)


def _one_index(rank: int, size: int, layout: Any) -> float:
    from kp_compiler.lowering.context.layout import Layout
    from tests.helpers import relative_error

    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 48, 48, generator=generator)
    segments = torch.randint(0, 2, (2, 48), generator=generator).cumsum(-1) // 9
    net = OneIndex()
    order = kp_compiler.document_order(torch.arange(48) % 20, dist.group.WORLD, chunks=3)
    divided = order.layout if layout == "documents" else Layout(layout, size, 48)
    options = {"context_parallel": {"mesh": dist.group.WORLD, "layout": layout}, "lowering": "aot_eager"}
    torch._dynamo.reset()
    compiled: Any = torch.compile(net, backend="kp", fullgraph=True, options=options)
    place = divided.positions(rank)
    with order, torch.no_grad():
        got, want = compiled(x[:, place], segments[:, place]), net(x, segments)
    return relative_error(got, want[:, place])


def _layers(size: int) -> float:
    """Of gradients, where FSDP2 shards layers, and each of them is compiled."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from tests.helpers import relative_error
    from tests.zoo import models

    mesh = init_device_mesh("cpu", (size,))
    one, other = (models.llama("sdpa") for _ in range(2))
    tokens = torch.randint(0, models.VOCAB, (1, 48), generator=torch.Generator().manual_seed(2))
    one(input_ids=tokens).logits.square().mean().backward()
    batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    mine = kp_compiler.shard_sequence(batch, mesh)
    options = {"context_parallel": {"mesh": mesh}, "lowering": "aot_eager"}
    torch._dynamo.reset()
    for layer in other.model.layers:
        layer.compile(backend="kp", fullgraph=True, options=options)
        fully_shard(layer, mesh=mesh)
    fully_shard(other, mesh=mesh)
    other(**mine).logits.square().mean().backward()  # FSDP2 gives the mean of all ranks' gradients
    got = [p.grad.full_tensor() for p in other.parameters()]
    return max(relative_error(a, b.grad) for a, b in zip(got, one.parameters(), strict=True))


def _shared_model(rank: int, size: int, name: str, schedule: str, layout: Any, kind: str) -> float:
    from kp_compiler.lowering.context.layout import Layout
    from tests.helpers import relative_error
    from tests.zoo import models

    count, vocabulary = 48, models.VOCAB
    torch.manual_seed(5)
    inputs: dict[str, Any] = {"input_ids": torch.randint(0, vocabulary, (2, count))}
    if "packed" in kind:
        inputs["position_ids"] = torch.stack([torch.arange(count) % 17, torch.arange(count) % 30])
    if kind == "padded":
        inputs["attention_mask"] = (torch.arange(count) < torch.tensor([[count], [31]])).long()
    weights = torch.randn(2, count, vocabulary)
    if kind == "padded":  # what stands at padding means nothing
        weights = weights * inputs["attention_mask"].unsqueeze(-1)
    one, other = (getattr(models, name)("sdpa") for _ in range(2))
    if "recomputed" in kind:
        other.gradient_checkpointing_enable({"use_reentrant": False})
        other.train()
    want = one(**inputs, use_cache=False).logits
    (want * weights).sum().backward()

    shared = {"mesh": dist.group.WORLD, "schedule": schedule, "layout": layout}
    options = {"context_parallel": shared, "lowering": "aot_eager"}
    divided: Any = Layout(layout, size, count) if layout != "documents" else None
    order: Any = contextlib.nullcontext()
    if divided is None:
        order = kp_compiler.document_order(inputs["position_ids"], dist.group.WORLD, chunks=3)
        divided = order.layout
    place = divided.positions(rank)
    mine = {key: x.index_select(1, place) for key, x in inputs.items()}
    torch._dynamo.reset()
    compiled: Any = torch.compile(other, backend="kp", fullgraph=True, options=options)
    with order:
        got = compiled(**mine, use_cache=False).logits
    part = weights.index_select(1, place)
    (got * part).sum().backward()
    seen = part != 0
    errors = [relative_error((got * seen).detach(), (want.index_select(1, place) * seen).detach())]
    for a, b in zip(other.parameters(), one.parameters(), strict=True):
        dist.all_reduce(a.grad)
        errors.append(relative_error(a.grad, b.grad))  # type: ignore[arg-type]
    return max(errors)


COMPOSED = ("ddp", "fsdp2", "fp8_linear", "sparse_attention")
SPARSE = {"sparse_attention": {"mode": "require", "sparsity": 0.5, "min_tokens": 1}, "cpu_rewrites": True}


def composed(rank: int, size: int, file: str, out: str) -> None:
    """A step on a mesh of two by `size` / 2: batches along the first dimension, sequences along the second.
    Rank 0 saves the largest error of gradients by what context_parallel is put together with."""
    from torch.distributed.device_mesh import init_device_mesh

    from tests.helpers import relative_error

    start(rank, size, file)
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("dp", "cp"))
    worst = {}
    for what in COMPOSED:
        tokens = 1024 if what == "sparse_attention" else 32
        x = torch.randn(2, tokens, 48, generator=torch.Generator().manual_seed(1))
        want = attention_net()
        torch._dynamo.reset()
        alone: Any = want  # itself, where attention stays exact
        if what == "sparse_attention":
            alone = torch.compile(want, backend="kp", options={**SPARSE, "lowering": "eager"})
        alone(x).square().mean().backward()
        torch._dynamo.reset()
        grads = _composed(what, mesh, x)
        worst[what] = max(relative_error(a, p.grad) for a, p in zip(grads, want.parameters(), strict=True))
    everyone: list[Any] = [None] * size
    dist.all_gather_object(everyone, worst)
    if rank == 0:
        torch.save({what: max(each[what] for each in everyone) for what in worst}, out)
    finish()


def _composed(what: str, mesh: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Gradients of weights, over the whole batch and sequence."""
    from torch.distributed.fsdp import fully_shard

    options: dict[str, Any] = {"context_parallel": {"mesh": mesh["cp"]}, "lowering": "aot_eager"}
    if what == "fp8_linear":
        options |= {"fp8_linear": fp8_settings("rowwise"), "cpu_rewrites": True}
    if what == "sparse_attention":
        options |= SPARSE
    net, ranks = attention_net(), mesh.size()
    whole = x[mesh["dp"].get_local_rank()][None]
    mine = kp_compiler.shard_sequence({"x": whole}, mesh["cp"])["x"]
    if what == "fsdp2":
        for layer in net:
            layer.compile(backend="kp", fullgraph=True, options=options)
            fully_shard(layer, mesh=mesh["dp", "cp"]._flatten("all"))
        run: Any = fully_shard(net, mesh=mesh["all"])
    else:
        compiled: Any = torch.compile(net, backend="kp", fullgraph=True, options=options)
        run = nn.parallel.DistributedDataParallel(compiled) if what == "ddp" else compiled
    total = run(mine).square().sum()
    loss = kp_compiler.sequence_mean(total, mine.numel(), mesh["cp"])
    if what in ("ddp", "fsdp2"):  # they divide by the number of ranks, of which those of a sequence are parts
        (loss * mesh["cp"].size()).backward()
        return [whole_tensor(p.grad) for p in net.parameters()]  # type: ignore[arg-type]
    loss.backward()
    for p in net.parameters():
        dist.all_reduce(p.grad)
        p.grad /= ranks // mesh["cp"].size()  # type: ignore[operator]
    return [p.grad for p in net.parameters()]  # type: ignore[misc]


def attention_net(layers: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(Attention() for _ in range(layers)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(48, 144)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (y.unflatten(-1, (6, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + a.transpose(1, 2).flatten(2)
