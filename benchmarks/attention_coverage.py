"""Which attention sites of `transformers` kp rewrites: all text and image families.

    python benchmarks/attention_coverage.py [--families llama bert …] [--jobs 2] [--out DIR]

Each family is built from its default configuration with at most two layers, on the meta device, and planned
for an H100 in bfloat16, eager and sdpa (`kp.plan`: nothing is computed, no GPU is needed). The peer is
Inductor: the matches of its own attention patterns in the same eager models, traced in float32, where it
matches most. A family that can't be built so, on meta tensors and without more packages, has a row with the
error and counts nowhere; one without softmax and SDPA has a row of no sites. Softmaxes that no product of
queries and keys leads to, or that weigh no values (routers, classifiers), are counted apart.
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from harness import RESULTS, bar, write
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import kp_compiler
from kp_compiler.fakes import new_mode, to_fake

NO_ATTENTION = ("no-qk-product", "no-value-product")
NAMED = ("llama", "gpt2", "bert", "vit", "t5", "mistral", "qwen2")
SECONDS = 120  # what one model may take
_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers",
    "num_decoder_layers", "num_encoder_layers",
)  # fmt: skip
_KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "image": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}


def kind_of(family: str) -> str | None:
    return next((kind for kind, names in _KINDS.items() if family in names), None)


def build(family: str, kind: str, implementation: str) -> tuple[Any, dict[str, Any]]:
    """A shallow model of a family on the meta device, and inputs for it."""
    name = _KINDS[kind][family]
    config = shallow(CONFIG_MAPPING[family])
    with torch.device("meta"):
        cls = getattr(transformers, name if isinstance(name, str) else name[0])
        model = cls._from_config(config, attn_implementation=implementation).eval()
        return model, inputs(config, kind)


def shallow(config: Any) -> Any:
    """The default configuration with two layers, where it can be told so."""
    whole = config()
    depths = {name: 2 for name in _DEPTHS if isinstance(d := getattr(whole, name, None), int) and d > 2}
    try:
        return config(**depths)
    except Exception:  # a configuration that lists its layers one by one
        return whole


def inputs(config: Any, kind: str) -> dict[str, Any]:
    if kind == "image":
        size = getattr(config, "image_size", 224)
        side = size if isinstance(size, int) else size[0]
        return {"pixel_values": torch.zeros(1, getattr(config, "num_channels", None) or 3, side, side)}
    ids = {"input_ids": torch.zeros(2, 199, dtype=torch.long)}
    if kind == "seq2seq":
        ids["decoder_input_ids"] = torch.zeros(2, 77, dtype=torch.long)
    return ids if kind == "masked" else {**ids, "use_cache": False}


def planned(family: str, kind: str, implementation: str) -> dict[str, Any]:
    """What kp would do with one model."""
    model, given = build(family, kind, implementation)
    with torch.no_grad():
        report = kp_compiler.plan(
            model, target="cuda:sm90", dtype=torch.bfloat16, options={"attention": "on"}, **given
        )
    codes = [s.reason.code for s in report.refused()]
    refused = [code for code in codes if code not in NO_ATTENTION]
    return {
        "sites": len(report.rewritten()) + len(refused),
        "rewritten": len(report.rewritten()),
        "specs": dict(collections.Counter(str(s.spec) for s in report.rewritten())),
        "refused": dict(collections.Counter(refused)),
        "other_softmaxes": len(codes) - len(refused),
    }


def fused_by_inductor(family: str, kind: str) -> int:
    """Matches of Inductor's attention patterns; nothing is compiled behind its graph passes."""
    from torch._dynamo.utils import counters
    from torch._inductor.compile_fx import compile_fx

    def backend(gm: Any, example_inputs: Any) -> Any:
        compile_fx(gm, list(example_inputs), inner_compile=lambda inner, *_, **__: inner.forward)
        return gm.forward

    model, given = to_fake(build(family, kind, "eager"), None, new_mode())
    counters.clear()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend)(**given)
    return int(counters["inductor"]["fuse_attention"])


def rows_of(family: str) -> Iterator[dict[str, Any]]:
    """One row for each implementation of a family."""
    kind = kind_of(family)
    assert kind is not None
    for implementation in ("eager", "sdpa"):
        row = {"family": family, "implementation": implementation}
        try:
            with time_limit():
                row |= planned(family, kind, implementation)
        except Exception as error:
            yield row | {"error": _first_line(error)}
            continue
        if row["sites"] and implementation == "eager":
            try:
                with time_limit():
                    row["inductor"] = fused_by_inductor(family, kind)
            except Exception as error:
                print(f"{family} under Inductor: {_first_line(error)}", file=sys.stderr, flush=True)
                row["inductor"] = None
        yield row


class time_limit:
    """A model that takes too long is left out."""

    def __enter__(self) -> None:
        def stop(*_: Any) -> None:
            raise TimeoutError(f"more than {SECONDS} s")

        signal.signal(signal.SIGALRM, stop)
        signal.alarm(SECONDS)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def corpus() -> list[dict[str, Any]]:
    """The thirty forms and the look-alikes, as the tests run them."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.corpus.forms import FORMS
    from tests.corpus.lookalikes import LOOK_ALIKES

    options = {"cpu_rewrites": True, "lowering": "aot_eager"}
    rows = []
    for form in FORMS:
        report = kp_compiler.explain(form.function, *form.inputs(torch.float32), options=options)
        rows.append({"form": form.name, "number": form.number, "rewritten": len(report.rewritten())})
    for twin in LOOK_ALIKES:
        report = kp_compiler.explain(twin.function, *twin.inputs(torch.float32), options=options)
        rows.append({"look-alike": twin.name, "rewritten": len(report.rewritten())})
    return rows


def survey(families: list[str], jobs: int) -> list[dict[str, Any]]:
    """Rows of all families, from `jobs` processes that take every n-th one each."""
    command = [sys.executable, __file__, "--worker"]
    workers = [
        subprocess.Popen([*command, *families[i::jobs]], stdout=subprocess.PIPE, text=True)
        for i in range(jobs)
    ]
    rows = [json.loads(line) for worker in workers for line in worker.communicate()[0].splitlines()]
    return sorted(rows, key=lambda row: (row["family"], row["implementation"]))


def bars_of(rows: list[dict[str, Any]], cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [row for row in rows if "sites" in row]
    named = [row for row in rows if row["family"] in NAMED]
    compared = [row for row in rows if row.get("inductor") is not None]
    sdpa = [row for row in rows if row["implementation"] == "sdpa" and row.get("sites")]
    forms = {row["number"] for row in cases if "form" in row}
    fired = {row["number"] for row in cases if "form" in row and row["rewritten"]}
    bars = [
        bar("seven named families: share of sites rewritten", _share(named, "rewritten"), 1.0),
        bar(f"forms recognised, of {len(forms)}", len(fired), 28),
        bar(
            "look-alikes rewritten", sum(row["rewritten"] for row in cases if "look-alike" in row), 0,
            at_least=False,
        ),
        bar(
            f"eager, {len(compared)} families, {sum(r['sites'] for r in compared)} sites: share rewritten "
            f"(Inductor's patterns: {_share(compared, 'inductor'):.3f})",
            _share(compared, "rewritten"), 50 / 132,
        ),
        bar(
            f"sdpa, {len(sdpa)} families, {sum(r['sites'] for r in sdpa)} sites: share rewritten",
            _share(sdpa, "rewritten"), 50 / 132,
        ),
    ]  # fmt: skip
    return bars


def _share(rows: list[dict[str, Any]], key: str) -> float:
    return sum(row[key] for row in rows) / max(1, sum(row["sites"] for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--families", nargs="*", default=[f for f in CONFIG_MAPPING if kind_of(f)])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", nargs="*")
    options = parser.parse_args()
    if options.worker is not None:
        transformers.logging.set_verbosity_error()
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        for family in options.worker:
            for row in rows_of(family):
                print(json.dumps(row), flush=True)
        return
    rows, cases = survey(options.families, options.jobs), corpus()
    peers = {"transformers": transformers.__version__, "kp": kp_compiler.__version__}
    write("attention_coverage", [*rows, *cases], bars_of(rows, cases), peers, options.out)


if __name__ == "__main__":
    main()
