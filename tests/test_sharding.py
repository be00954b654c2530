"""What of a batch each rank gets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from kp_compiler import document_order
from kp_compiler.errors import KPError, KPExchangeError
from kp_compiler.lowering.context.order import active
from kp_compiler.sharding import sequence_mean, shard_sequence, shifted_labels, unshard_sequence


@pytest.fixture
def group() -> Iterator[Any]:
    """Rank 1 of 4; nothing is ever sent."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    yield dist.group.WORLD
    dist.destroy_process_group()


def test_zigzag(group: Any) -> None:
    ids = torch.arange(100, 116).expand(2, -1)
    found = shard_sequence({"input_ids": ids, "labels": ids, "flag": True, "scale": torch.ones(3)}, group)
    assert found["position_ids"].tolist() == [[2, 3, 12, 13]] * 2
    assert found["input_ids"].tolist() == [[102, 103, 112, 113]] * 2
    assert found["labels"].tolist() == [[103, 104, 113, 114]] * 2
    assert found["flag"] is True and torch.equal(found["scale"], torch.ones(3))
    assert torch.equal(found["labels"], found["shift_labels"])


def test_contiguous_and_lengthened(group: Any) -> None:
    batch = {"input_ids": torch.arange(14)[None], "position_ids": torch.arange(7, 21)[None],
             "attention_mask": torch.ones(1, 14), "labels": torch.arange(14)[None]}  # fmt: skip
    found = shard_sequence(batch, group, layout="contiguous", multiple=2)
    assert found["input_ids"].tolist() == [[4, 5, 6, 7]]
    last = shard_sequence(batch, group, layout="contiguous", multiple=3)
    assert last["input_ids"].shape == (1, 6)
    by_token = shard_sequence({"input_ids": batch["input_ids"].T}, group, layout="contiguous", dim=0)
    assert by_token["input_ids"].shape == (4, 1) and by_token["position_ids"].tolist() == [4, 5, 6, 7]
    with pytest.raises(
        KPError, match="unshard_sequence: 5 tokens of a rank are no part of the layout 'zigzag'"
    ):
        unshard_sequence(torch.ones(1, 5), group)
    whole = torch.arange(14)[None]
    assert shifted_labels(whole).tolist() == [[*range(1, 14), -100]]


def packed(tokens: int) -> torch.Tensor:
    """position_ids [tokens] of documents of random lengths, up to half of them all."""
    lengths = (1 + torch.rand(64) ** 4 * tokens / 2).long()
    return torch.cat([torch.arange(int(n)) for n in lengths])[:tokens]


def test_order_of_documents(group: Any) -> None:
    """Every rank has as many tokens, and nearly as many pairs; places and other tensors go with them."""
    positions = torch.stack([packed(2**14) for _ in range(2)])
    ids = torch.arange(positions.shape[1]).expand(2, -1)
    order = document_order(positions, group)
    places = order.layout.places.view(4, -1)
    assert torch.equal(places.flatten().sort().values, torch.arange(order.layout.tokens))
    assert torch.equal(places, places.sort(1).values)
    pairs = (torch.nn.functional.pad(positions, (0, order.layout.tokens - len(ids[0]))) + 1).sum(0)
    shares = pairs[places].sum(1) / pairs.sum() * 4
    assert shares.max() < 1.01 and order.imbalance == pytest.approx(float(shares.max()), rel=0.02)
    mine = shard_sequence({"input_ids": ids, "position_ids": positions, "flag": 1}, group, layout=order)
    real = places[1] < len(ids[0])
    assert torch.equal(mine["input_ids"][:, real], ids[:, places[1][real]])
    assert torch.equal(mine["position_ids"][:, real], positions[:, places[1][real]])
    assert document_order(positions, group, window=1).imbalance == 1


class Again(torch.autograd.Function):
    """Asks for the order while gradients are computed, as a graph does that is checkpointed from outside."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: str) -> torch.Tensor:
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        active(ctx.group, 64)


def test_an_order_of_another_call_is_not_taken(group: Any) -> None:
    x = torch.ones(1, requires_grad=True)
    with document_order(packed(64), group), pytest.raises(KPError, match="is run again for its gradients"):
        Again.apply(x, group.group_name).backward()


def test_orders_that_are_refused(group: Any) -> None:
    order = document_order(packed(4096), group)
    with pytest.raises(KPError, match="layout: the order of 4096 tokens is not one of 4000 on this mesh"):
        shard_sequence({"input_ids": torch.ones(1, 4000)}, group, layout=order)
    with pytest.raises(KPError, match=r"position_ids: got torch.float32 \[8\], expected integers"):
        document_order(torch.ones(8), group)
    with pytest.raises(KPError, match="multiple: got 2, but a document_order has its length"):
        shard_sequence({"input_ids": torch.ones(1, 4096)}, group, layout=order, multiple=2)
    with pytest.raises(KPError, match="chunks: got 0"):
        document_order(packed(8), group, chunks=0)
    with pytest.raises(KPError, match=r"needs an order: with kp\.document_order"):
        active(group.group_name, 4096)
    with order:
        assert active(group.group_name, 4096) is order
        with document_order(packed(64), group) as inner:
            assert active(group.group_name, 64) is inner
        with pytest.raises(KPError, match="the order is one of 4096 tokens, ranks have 8192 together"):
            active(group.group_name, 8192)
    with pytest.raises(KPError, match="needs an order"):
        active(group.group_name, 4096)


def test_what_is_refused(group: Any) -> None:
    ids = torch.arange(13)[None]
    with pytest.raises(KPError, match="features has 13 tokens, 16 are needed"):
        shard_sequence({"features": torch.randn(1, 13, 4)}, group)
    assert shard_sequence({"features": torch.randn(1, 13, 4)}, group, padding={"features": 0.0})
    with pytest.raises(KPError, match="no one length"):
        shard_sequence({"input_ids": ids, "labels": ids[:, 1:]}, group)
    with pytest.raises(KPError, match="expected 'contiguous', 'zigzag' or a document_order"):
        shard_sequence({"input_ids": ids}, group, layout="documents")  # type: ignore[arg-type]
    with pytest.raises(KPError, match="got a list, expected tensors by name"):
        shard_sequence([ids], group)  # type: ignore[arg-type]
    with pytest.raises(KPError, match="multiple: got 0, expected at least 1"):
        shard_sequence({"input_ids": ids}, group, multiple=0)
    with pytest.raises(KPError, match="expected 'contiguous', 'zigzag' or a document_order"):
        unshard_sequence(ids, group, layout="zig")  # type: ignore[arg-type]
    with pytest.raises(KPError, match=r"unshard_sequence: length: got \d+, of \d+ tokens"):
        unshard_sequence(ids, group, layout="contiguous", length=1000)
    with pytest.raises(KPError, match="mesh: got 3 dimensions, expected a DeviceMesh of one dimension"):
        shard_sequence({"input_ids": ids}, init_device_mesh("cpu", (1, 1, 1)))
    with pytest.raises(KPError, match="needs names for them"):
        shard_sequence({"input_ids": ids}, init_device_mesh("cpu", (1, 1)))
    with pytest.raises(KPError, match="mesh: got 'cp', expected a DeviceMesh of one dimension"):
        shard_sequence({"input_ids": ids}, "cp")


def test_a_mean_without_its_ranks(group: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", closed)
    told = "sequence_mean: rank 1 of 4 waited for sums of all ranks, which failed: Connection closed by peer"
    with pytest.raises(KPExchangeError, match=told):
        sequence_mean(torch.ones(()), 3, group)
