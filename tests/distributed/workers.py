"""What each process of a distributed test runs. Importable by name, so that processes can be spawned."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

OPTIONS: dict[str, Any] = {"cpu_rewrites": True, "lowering": "aot_eager", "strict": True}
DIM = 256


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(DIM, DIM, bias=False) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(3)))


def inputs(rank: int) -> torch.Tensor:
    return torch.randn(32, DIM, generator=torch.Generator().manual_seed(10 + rank))


def start(rank: int, size: int, file: str) -> None:
    os.environ["KP_PASSES"] = ""
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)


def reference(size: int, recipe: str) -> list[torch.Tensor]:
    """Gradients averaged over the ranks' inputs, in one process."""
    sums: list[torch.Tensor] = []
    for rank in range(size):
        net = model()
        compiled = torch.compile(net, backend="kp", options={**OPTIONS, "fp8_linear": _fp8(recipe)})
        compiled(inputs(rank)).square().mean().backward()
        grads = [p.grad / size for p in net.parameters() if p.grad is not None]
        sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
    return sums


def _fp8(recipe: str) -> dict[str, Any]:
    return {"mode": "require", "recipe": recipe}


def ddp(rank: int, size: int, file: str, recipe: str, out: str) -> None:
    """Buckets so small that Dynamo splits the graph between layers."""
    start(rank, size, file)
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)
    compiled = torch.compile(wrapped, backend="kp", options={**OPTIONS, "fp8_linear": _fp8(recipe)})
    compiled(inputs(rank)).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], out)
    dist.destroy_process_group()


def fsdp(rank: int, size: int, file: str, recipe: str, out: str) -> None:
    """Every layer sharded and compiled on its own, as FSDP2's users do."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    start(rank, size, file)
    net = model()
    mesh = init_device_mesh("cpu", (size,))
    for layer in net:
        layer.compile(backend="kp", options={**OPTIONS, "fp8_linear": _fp8(recipe)})
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    weights = [p.detach().clone() for p in net.parameters()]
    net(inputs(rank)).square().mean().backward()
    grads = [p.grad.full_tensor() for p in net.parameters()]
    x = inputs(rank)
    with torch.no_grad():  # inference between changes of weights: no copy of old ones may be used
        for factor in (1.0, 0.0, 1.0, 0.0):
            for p, first in zip(net.parameters(), weights, strict=True):
                p.copy_(factor * first)
            assert torch.equal(net(x), x) == (factor == 0.0)
    if rank == 0:
        torch.save(grads, out)
    dist.destroy_process_group()
