"""Which graphs treat the tokens of a shared sequence one by one: real models, and operations that do not."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from kp_compiler.config import Config, Ranks, RingAttentionConfig
from kp_compiler.lowering import ops
from kp_compiler.metadata import bodies, fill_metadata
from kp_compiler.passes import sequence
from kp_compiler.passes.base import Context
from kp_compiler.passes.prove_masks import ProveMasks
from kp_compiler.passes.raise_attention import RaiseAttention
from kp_compiler.report import Rejection
from kp_compiler.specs import MaskSpec
from kp_compiler.target import Target
from tests.zoo import models

TOKENS, DIM = 24, 32


def traced(function: Any, *args: Any, **kwargs: Any) -> tuple[GraphModule, sequence.Sharing | Rejection]:
    """The graph with its sites recognised, and what was found."""
    found: list[Any] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        recognised(gm)
        found.extend([gm, sequence.trace(gm)])
        return _stop

    torch._dynamo.reset()
    with pytest.raises(_Stop):
        torch.compile(function, backend=backend, fullgraph=True)(*args, **kwargs)
    return found[0], found[1]


def recognised(gm: GraphModule, config: Config | None = None) -> None:
    """Attention sites with proved masks."""
    fill_metadata(gm)
    units = list(bodies(gm))
    for each, (unit, calls) in itertools.product((RaiseAttention(), ProveMasks()), units):
        ctx = Context(unit, config or Config(), Target("cuda", 90), calls)
        for site in list(each.sites(unit.graph)):
            match = each.inspect(site, ctx)
            if not isinstance(match, Rejection):
                each.rewrite(unit.graph, match, ctx)


class _Stop(Exception):
    pass


def _stop(*args: Any) -> None:
    raise _Stop


class Block(nn.Module):
    """Attention with learned positions, in one of several ways wrong."""

    def __init__(self, how: str = "") -> None:
        super().__init__()
        self.how = how
        self.qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)
        self.norm, self.places = nn.LayerNorm(DIM), nn.Embedding(64, DIM)
        self.conv = nn.Conv1d(DIM, DIM, 3, padding=1)
        self.register_buffer("table", torch.randn(TOKENS, DIM))
        self.registers = nn.Parameter(torch.randn(1, 2, DIM))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.places(torch.arange(x.shape[1], device=x.device))
        if self.how == "convolution":
            x = self.conv(x.mT).mT
        if self.how == "table":
            x = x + self.table
        if self.how == "cumsum":
            x = x.cumsum(1)
        if self.how == "mean over tokens":
            x = x - x.mean(1, keepdim=True)
        if self.how == "shift":
            x = x + F.pad(x[:, :-1], (0, 0, 1, 0))
        if self.how == "written":
            x = x.clone()
            x[:, 1:] += x[:, :-1]
        if self.how == "zeroed":
            x = x.clone()
            x[:, 0] = 0
        if self.how == "copied":
            x.narrow(1, 0, 1).copy_(x.new_zeros(()))
        if self.how == "registers":
            x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        if self.how == "from one":
            x = x * torch.arange(1, x.shape[1] + 1).view(1, -1, 1)
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(a.transpose(1, 2).flatten(2))
        if self.how == "starts":  # of answers, as question answering scores them
            return F.cross_entropy(x[..., 0], torch.zeros(len(x), dtype=torch.long))
        if self.how == "largest":
            return x.amax(1)
        if self.how == "pooled":
            return self.out(x.mean(1)).softmax(-1)
        if self.how == "means":
            return x.mean(1) * x.square().mean(1)
        return x[:, -1] if self.how == "last token" else x


def test_token_by_token() -> None:
    gm, found = traced(Block(), torch.randn(2, TOKENS, DIM))
    assert isinstance(found, sequence.Sharing), found
    assert [node.target for node in found.positions] == [torch.arange]
    assert not found.sums
    (result,) = gm.graph.output_node().args[0]
    assert found.along[result] == sequence.Along(1)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("convolution", "not known to treat tokens one by one"), ("table", "is not shared among ranks"),
        ("cumsum", "cumsum"), ("mean over tokens", "a sum over the tokens of one rank"),
        ("shift", "some tokens"),
        ("from one", "not from zero"), ("last token", "some tokens"), ("written", "some tokens"),
        ("zeroed", "known to treat|some tokens"), ("copied", "some tokens"),
        ("registers", "do not have the sequence"), ("starts", "one over the sequence"),
        ("largest", "one over the sequence"), ("pooled", "only be a result"), ("means", "only be a result"),
    ],
)  # fmt: skip
def test_what_mixes_tokens(how: str, why: str) -> None:
    _, found = traced(Block(how), torch.randn(2, TOKENS, DIM))
    assert isinstance(found, Rejection) and found.code == "mixes-tokens"
    assert re.search(why, found.text), found.text


@pytest.mark.parametrize("size", [1, 2])
def test_a_window_of_the_whole_sequence(size: int) -> None:
    """Of which a rank's part has fewer tokens: no bound of a part decides what a mask keeps."""
    ranks = Ranks("group", 0, size, "cpu")
    config = Config(ring_attention=RingAttentionConfig(mode="auto", mesh=ranks))
    found: list[MaskSpec] = []

    def backend(gm: GraphModule, example_inputs: Any) -> Any:
        recognised(gm, config)
        found.extend(ops.spec_of(site).mask for site in ops.attentions(gm.graph))
        return gm.forward

    def window(x: Tensor) -> Tensor:
        i = torch.arange(x.shape[2])
        keep = (i <= i[:, None]) & (i > i[:, None] - TOKENS - 4)
        return F.scaled_dot_product_attention(x, x, x, keep)

    torch.compile(window, backend=backend, fullgraph=True, dynamic=False)(torch.randn(1, 2, TOKENS, 8))
    assert [mask.window for mask in found] == [TOKENS + 4 if size == 2 else None], found


def test_nothing_to_share() -> None:
    _, found = traced(lambda x: x * 2, torch.randn(3))
    assert isinstance(found, Rejection) and found.code == "no-site"


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(
    ("name", "how"),
    [("llama", "sdpa"), ("llama", "eager"), ("mistral", "sdpa"), ("qwen2", "sdpa"), ("gemma2", "eager"),
     ("gpt2", "sdpa"), ("mixtral", "sdpa"), ("deepseek", "sdpa"), ("gpt_oss", "eager"), ("cohere", "sdpa"),
     ("llama4", "sdpa")],
)  # fmt: skip
def test_models(name: str, how: str, positions: bool) -> None:
    """Losses of transformers' models; what they make of indices are positions."""
    ids = models.ids(TOKENS)
    more = {"position_ids": torch.arange(TOKENS).expand(2, -1)} if positions else {}
    if name != "gpt2":  # whose loss breaks the graph
        more |= {"labels": ids, "shift_labels": ids}
    gm, found = traced(getattr(models, name)(how), input_ids=ids, use_cache=False, **more)
    assert isinstance(found, sequence.Sharing), found
    results = gm.graph.output_node().args[0]
    assert len([each for each in results if each in found.sums]) == (name != "gpt2")
    assert bool(found.positions) != positions
