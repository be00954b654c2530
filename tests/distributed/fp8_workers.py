"""What each process of a test of FP8 under DDP and FSDP2 runs. Importable by name, so that processes can be
spawned."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import kp_compiler
from tests.distributed.processes import finish, start

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


def reference(size: int, recipe: str) -> list[torch.Tensor]:
    """Gradients averaged over the ranks' inputs, in one process."""
    sums: list[torch.Tensor] = []
    for rank in range(size):
        net = model()
        compiled = torch.compile(net, backend="kp", options={**OPTIONS, "fp8_linear": fp8_settings(recipe)})
        compiled(inputs(rank)).square().mean().backward()
        grads = [p.grad / size for p in net.parameters() if p.grad is not None]
        sums = [a + b for a, b in zip(sums, grads, strict=True)] if sums else grads
    return sums


def fp8_settings(recipe: str, **settings: Any) -> dict[str, Any]:
    return {"mode": "require", "recipe": recipe, **settings}


def ddp(rank: int, size: int, file: str, recipe: str, out: str) -> None:
    """Buckets so small that Dynamo splits the graph between layers."""
    start(rank, size, file)
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net, bucket_cap_mb=1)
    compiled = torch.compile(wrapped, backend="kp", options={**OPTIONS, "fp8_linear": fp8_settings(recipe)})
    compiled(inputs(rank)).square().mean().backward()
    if rank == 0:
        torch.save([p.grad for p in net.parameters()], out)
    finish()


def fsdp(rank: int, size: int, file: str, recipe: str, out: str) -> None:
    """Every layer sharded and compiled on its own, as FSDP2's users do."""
    from torch.distributed.device_mesh import init_device_mesh

    start(rank, size, file)
    mesh = init_device_mesh("cpu", (size,))
    net = _sharded_layers(mesh, recipe)
    weights = [p.detach().clone() for p in net.parameters()]
    net(inputs(rank)).square().mean().backward()
    grads = [p.grad.full_tensor() for p in net.parameters()]
    if recipe == "delayed":
        _check_state_by_name(net, lambda: _sharded_layers(mesh, recipe), inputs(rank))
    x = inputs(rank)
    with torch.no_grad():  # inference between changes of weights: no copy of old ones may be used
        for factor in (1.0, 0.0, 1.0, 0.0):
            for p, first in zip(net.parameters(), weights, strict=True):
                p.copy_(factor * first)
            assert torch.equal(net(x), x) == (factor == 0.0)
    if rank == 0:
        torch.save(grads, out)
    finish()


def _sharded_layers(mesh: Any, recipe: str) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    net = model()
    for layer in net:
        layer.compile(backend="kp", options={**OPTIONS, "fp8_linear": fp8_settings(recipe)})
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def _check_state_by_name(net: nn.Module, fresh: Callable[[], nn.Module], x: torch.Tensor) -> None:
    """State has the names of the sharded parameters, and can be loaded before the first forward pass."""
    state = kp_compiler.state_dict(net)
    names = {name for name, _ in net.named_parameters()}
    assert {name.rpartition(".fp8_")[0] for name in state} <= names
    seen = {name: value for name, value in state.items() if name.endswith("fp8_amax")}
    assert seen and all(value.all() for value in seen.values())
    other = fresh()
    kp_compiler.load_state_dict(other, state)
    other(x).sum().backward()
    after = kp_compiler.state_dict(other)
    assert set(after) == set(state)
    assert all(torch.equal(after[f"{name}_history"][-1], value) for name, value in seen.items())


# ---------------------------------------------------------------------------------------------------------
# two steps of training in bfloat16, of weights in float32

STEPS = 2  # delayed scaling knows nothing before the second


def train_everything(rank: int, size: int, file: str, device: str, out: str) -> None:
    """Saves {(wrapper, recipe): what each weight moved by}."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    start(rank, size, file, "nccl" if device == "cuda" else "gloo")
    moved = {}
    for recipe in ("tensorwise", "delayed"):
        fp8 = fp8_settings(recipe, reduce_amax=True) if recipe == "delayed" else fp8_settings(recipe)
        options = {"strict": True, "fp8_linear": fp8} if device == "cuda" else {**OPTIONS, "fp8_linear": fp8}
        for wrapped in (replicated, sharded):
            torch._dynamo.reset()
            net = model().to(device)
            run = wrapped(net, options)
            moved[wrapped.__name__, recipe] = trained(net, run, inputs(rank).to(device))
            if recipe == "delayed":
                _check_same_scales(net)
    if rank == 0:
        torch.save(moved, out)
    finish()


def replicated(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    """One graph of Dynamo's, which its optimizer for DDP splits where buckets of gradients end."""
    compiled: Any = torch.compile(net, backend="kp", fullgraph=True, options=options)
    return nn.parallel.DistributedDataParallel(compiled, bucket_cap_mb=1)


def sharded(net: nn.Module, options: dict[str, Any]) -> nn.Module:
    """Every layer sharded and compiled on its own, in one graph."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = init_device_mesh(next(net.parameters()).device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in net.children():
        layer.compile(backend="kp", fullgraph=True, options=options)
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(net, mesh=mesh, mp_policy=policy)
    return net


def trained(net: nn.Module, run: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What each weight moves by."""
    before = [whole_tensor(p).clone() for p in net.parameters()]
    optimizer = torch.optim.SGD(run.parameters(), lr=1.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = run(x).float().square().mean()
        loss.backward()
        optimizer.step()
    return [(whole_tensor(p) - first).cpu() for p, first in zip(net.parameters(), before, strict=True)]


def trained_alone(size: int, device: str) -> list[torch.Tensor]:
    """The same without kp, in one process on the inputs of all ranks."""
    net = model().to(device)
    return trained(net, net, torch.cat([inputs(rank) for rank in range(size)]).to(device))


def whole_tensor(parameter: torch.Tensor) -> torch.Tensor:
    value: Any = parameter.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value  # type: ignore[no-any-return]


def _check_same_scales(net: nn.Module) -> None:
    """Histories of largest magnitudes are those of all ranks."""
    state = {k: v for k, v in kp_compiler.state_dict(net).items() if k.endswith("amax_history")}
    assert state
    for mine in state.values():
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)
