"""Gluon on the CPU, as far as kp's Hopper kernels use it: what their partitions do, and in which order.

A program's partitions are threads, which meet at barriers with phases and bytes, as mbarriers have them.
Copies of the tensor memory accelerator arrive late, products of warpgroups read shared memory early or as
late as their wait allows, at random: a buffer that is written too soon gives wrong numbers, a barrier that
nobody arrives at an error after `PATIENCE` seconds. Layouts mean nothing here, and threads of a warpgroup are
one.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

PATIENCE = 20.0
LATE = 0.2  # how often a slow partition is late at a barrier
_local = threading.local()
_lock = threading.Lock()
_engine = ThreadPoolExecutor(8)  # copies


def _linger() -> None:
    """At times a partition is late, a slow one often."""
    if random.random() < getattr(_local, "late", 0.0):
        time.sleep(1e-3)


class Barrier:
    """An mbarrier: a phase ends when all have arrived and all bytes have come."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.count = self.missing = self.bytes = self.done = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def update(self, arrivals: int, size: int) -> None:
        _linger()
        with self.changed:
            self.missing -= arrivals
            self.bytes += size
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.bytes == 0:
                self.done, self.missing = self.done + 1, self.count
                self.changed.notify_all()

    def wait(self, parity: int) -> None:
        with self.changed:
            if not self.changed.wait_for(lambda: self.done & 1 != parity, PATIENCE):
                raise TimeoutError("a barrier's phase does not end")
        _linger()


class Barriers:
    """Several of them; one is taken for its first."""

    def __init__(self, items: list[Barrier]) -> None:
        self.items = items

    def index(self, i: Any) -> Barriers:
        return Barriers([self.items[int(i)]])


class Shared:
    """A view of shared memory."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.dtype = data, data.dtype

    def index(self, i: Any) -> Shared:
        return Shared(self.data[int(i)])

    def reshape(self, shape: list[int]) -> Shared:
        return Shared(self.data.view(shape))

    def permute(self, order: tuple[int, ...]) -> Shared:
        return Shared(self.data.permute(order))

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return Shared(self.data.narrow(dim, start, length))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: Any) -> Shared:
        size = torch.Size(shape).numel()
        return Shared(self.data.reshape(-1)[:size].view(shape))

    def store(self, value: Tensor) -> None:
        self.data.copy_(value.expand(self.data.shape))

    def load(self, layout: Any) -> Tensor:
        return self.data.clone()


class Pointer:
    """Places in a tensor's memory."""

    def __init__(self, flat: Tensor, offset: Any) -> None:
        self.flat, self.offset = flat, offset
        self.dtype = SimpleNamespace(element_ty=flat.dtype)

    def __add__(self, more: Any) -> Pointer:
        return Pointer(self.flat, self.offset + more)

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        places = torch.as_tensor(self.offset)
        mask = torch.as_tensor(True if mask is None else mask)
        places, mask = torch.broadcast_tensors(places, mask)
        outside = mask & ((places < 0) | (places >= self.flat.numel()))
        assert not outside.any(), "an access outside of the tensor"
        return places.clamp(0, self.flat.numel() - 1), mask


class Descriptor:
    """What a descriptor says to the tensor memory accelerator."""

    def __init__(self, given: Any) -> None:
        self.tensor, self.block, self.layout = given.base, list(given.block_shape), None
        self.dtype = self.tensor.dtype
        nbytes = torch.Size(self.block).numel() * self.dtype.itemsize
        self.block_type = SimpleNamespace(nbytes=nbytes)

    def parts(self, place: list[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tensor that a tile covers, and which part of the tile that is."""
        sizes = zip(map(int, place), self.block, self.tensor.shape, strict=True)
        there = tuple(slice(min(first, size), min(first + count, size)) for first, count, size in sizes)
        return self.tensor[there], tuple(slice(0, s.stop - s.start) for s in there)


class Product:
    """An asynchronous product, whose operands in shared memory are read now or when it is waited for."""

    def __init__(self, a: Any, b: Any, acc: Any, use_acc: bool) -> None:
        self.a, self.b, self.acc, self.use_acc = a, b, acc, use_acc
        self.value: Tensor | None = None
        if random.random() < 0.5:
            self.a, self.b = (x.data.clone() if isinstance(x, Shared) else x for x in (a, b))

    def run(self) -> None:
        a, b = (x.data if isinstance(x, Shared) else x for x in (self.a, self.b))
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        assert acc is not None
        found = a.float() @ b.float()
        self.value = found + acc if self.use_acc else found


# ------------------------------------------------------------------------------------------------ the modules


def _mma(a: Any, b: Any, acc: Any, use_acc: bool = True, is_async: bool = False) -> Any:
    product = Product(a, b, acc, use_acc)
    _local.products.append(product)
    return product


def _mma_wait(left: int, products: list[Any]) -> Any:
    while len(_local.products) > left:
        _local.products.pop(0).run()
    values = [product.value for product in products]
    assert all(value is not None for value in values), "a product is read before its end"
    return values[0] if len(values) == 1 else tuple(values)


def _copy_in(descriptor: Descriptor, place: list[Any], barrier: Barriers, to: Shared) -> None:
    def copy() -> None:
        time.sleep(random.choice((0.0, 0.0, 0.0, 2e-3)))
        part, inside = descriptor.parts(place)
        to.data.zero_()
        to.data[inside] = part
        barrier.items[0].update(0, -descriptor.block_type.nbytes)

    _engine.submit(copy)


def _write(
    change: Callable[[Tensor, Tensor], Any], descriptor: Descriptor, place: list[Any], tile: Shared
) -> None:
    def copy() -> None:
        part, inside = descriptor.parts(place)
        with _lock:
            change(part, tile.data[inside])

    _local.copies.append(copy)


def _store_wait(left: int) -> None:
    while len(_local.copies) > left:
        _linger()
        _local.copies.pop(0)()


def _load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Tensor:
    places, mask = pointer.places(mask)
    found = pointer.flat[places]
    return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))


def _store(pointer: Pointer, value: Tensor, mask: Any = None) -> None:
    places, mask = pointer.places(mask)
    value, mask = (x.expand(places.shape) for x in (value, mask))
    pointer.flat[places[mask]] = value[mask]


def _atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str = "") -> Tensor:
    places, mask = pointer.places(mask)
    value, mask = (torch.as_tensor(x).expand(places.shape) for x in (value, mask))
    with _lock:
        before = pointer.flat[places].clone()
        pointer.flat.index_add_(0, places[mask], value[mask].to(pointer.flat.dtype))
    return before


def _allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Any:
    if layout == "barriers":
        return Barriers([Barrier() for _ in range(shape[0])])
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else -7, dtype=dtype))


def _specialize(parts: list[tuple[Any, tuple[Any, ...]]], warps: Any, registers: Any) -> None:
    program, failures = (_local.program, _local.programs), []

    def run(function: Any, arguments: tuple[Any, ...]) -> None:
        _local.program, _local.programs = program
        _local.products, _local.copies = [], []
        _local.late = random.choice((0.0, 0.0, LATE / 10, LATE))
        try:
            function(*arguments)
            assert not _local.copies, "a program ends before its stores"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=part) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise next((f for f in failures if not isinstance(f, TimeoutError)), failures[0])


def _both(function: Any) -> Any:
    return lambda a, b: function(torch.as_tensor(a), torch.as_tensor(b))


def _nothing(*_: Any) -> None:
    return None


_language = SimpleNamespace(
    constexpr=int, float32=torch.float32, int16=torch.int16,
    int32=torch.int32, int64=torch.int64, uint8=torch.uint8,
    NVMMADistributedLayout=_nothing, SliceLayout=_nothing, DotOperandLayout=_nothing, BlockedLayout=_nothing,
    SwizzledSharedLayout=_nothing, NVMMASharedLayout=SimpleNamespace(get_default_for=_nothing),
    program_id=lambda _: torch.tensor(_local.program, dtype=torch.int32),
    num_programs=lambda _: torch.tensor(_local.programs, dtype=torch.int32),
    allocate_shared_memory=_allocate, warp_specialize=_specialize, static_range=range,
    arange=lambda a, b, layout: torch.arange(a, b, dtype=torch.int32),
    zeros=lambda shape, dtype, layout=None: torch.zeros(shape, dtype=dtype),
    full=lambda shape, value, dtype, layout=None: torch.full(shape, value, dtype=dtype),
    cast=lambda x, dtype: torch.as_tensor(x).to(dtype), convert_layout=lambda x, layout: x,
    DistributedLinearLayout=_nothing, reshape=torch.reshape, permute=torch.permute,
    where=lambda c, a, b: torch.where(torch.as_tensor(c), a, b), abs=torch.abs,
    maximum=_both(torch.maximum), minimum=_both(torch.minimum), exp2=torch.exp2, log2=torch.log2,
    max=lambda x, axis: x.amax(axis), sum=lambda x, axis: x.sum(axis),
    load=_load, store=_store, atomic_add=_atomic_add,
)  # fmt: skip
_modules = {
    "gluon": SimpleNamespace(jit=lambda f: f),
    "range": lambda *ends: (torch.tensor(i) for i in range(*map(int, ends))),
    "tl": _language,
    "fence_async_shared": _nothing,
    "warpgroup_mma": _mma,
    "warpgroup_mma_wait": _mma_wait,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barriers",
        init=lambda b, count: b.items[0].init(int(count)),
        wait=lambda b, parity: b.items[0].wait(int(parity)),
        arrive=lambda b, count=1, pred=True: b.items[0].update(count, 0) if pred else None,
        expect=lambda b, size: b.items[0].update(1, size),
    ),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=_copy_in,
        async_copy_shared_to_global=lambda d, place, tile: _write(Tensor.copy_, d, place, tile),
        store_wait=_store_wait,
    ),
    "tma_add": lambda d, place, tile: _write(Tensor.add_, d, place, tile),
}


def _argument(given: Any) -> Any:
    if isinstance(given, Tensor):
        size = given.untyped_storage().nbytes() // given.element_size()
        return Pointer(given.as_strided((size,), (1,), 0), given.storage_offset())
    return torch.tensor(given, dtype=torch.int64) if isinstance(given, int) else Descriptor(given)


class Kernel:
    """`kernel[grid](**arguments)` of a module's text."""

    def __init__(self, name: str, text: str) -> None:
        namespace: dict[str, Any] = dict(_modules)
        text = re.sub(r"\.to\(([\w.]+), bitcast=True\)", r".view(\1)", text[text.index("@gluon.jit") :])
        exec(compile(text, "<emulated>", "exec"), namespace)
        self.function = namespace[name]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(num_warps: int, **arguments: Any) -> None:
            given = {name: _argument(value) for name, value in arguments.items()}
            for program in range(grid[0]):
                _local.program, _local.programs = program, grid[0]
                self.function(**given)

        return launch
