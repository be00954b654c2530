"""What a compilation found, proved, rewrote and left alone: records, and their text and JSON renderings."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1


@dataclass(frozen=True)
class Rejection:
    """Why something was not done. `code` is stable (tests and tools rely on it), `text` is one sentence."""

    code: str
    text: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.text} [{self.code}]" + (f" Hint: {self.hint}" if self.hint else "")


@dataclass(frozen=True)
class SiteRecord:
    """One candidate site and what became of it."""

    kind: Literal["attention", "linear"]
    module: str
    source: str
    status: Literal["rewritten", "refused"]
    pass_name: str
    impl: str | None = None
    spec: str | None = None
    reason: Rejection | None = None
    predicted: dict[str, Any] | None = None
    verified: str | None = None
    shape: str = ""
    notes: tuple[Rejection, ...] = ()  # what was not possible at a site that was rewritten all the same
    approximated_by: tuple[str, ...] = ()  # passes before `pass_name` that changed what is computed
    graph: int = 0

    def line(self) -> str:
        """The site in one line."""
        where = self.module or self.source or "?"
        if self.status == "rewritten":
            return f"{where}: {self.impl}, {self.spec}"
        return f"{where}: refused, {self.reason}"


@dataclass(frozen=True)
class PassRecord:
    """One run of one pass over one graph."""

    name: str
    graph: int
    milliseconds: float
    fired: int
    refused: int
    before: str = ""
    after: str = ""
    error: str | None = None
    skipped: Rejection | None = None


@dataclass
class GraphRecord:
    """One graph that Dynamo handed to the backend."""

    index: int
    num_nodes: int
    device: str
    mode: str  # "rewritten", "cpu", "disabled", "planned"
    milliseconds: float = 0.0
    lowering: str = ""
    compile_id: str = ""  # Dynamo's, and its attempt at it: a later attempt replaces an earlier one
    attempt: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """Everything the backend did in one scope. Text for people, `to_json` for tools."""

    sites: list[SiteRecord] = field(default_factory=list)
    passes: list[PassRecord] = field(default_factory=list)
    graphs: list[GraphRecord] = field(default_factory=list)
    target: str = ""
    assumptions: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Report) -> None:
        """Append the records of one more compiled graph, renumbering it."""
        shift = len(self.graphs)
        for graph in other.graphs:
            self.graphs.append(dataclasses.replace(graph, index=graph.index + shift))
        self.sites.extend(dataclasses.replace(site, graph=site.graph + shift) for site in other.sites)
        self.passes.extend(dataclasses.replace(record, graph=record.graph + shift) for record in other.passes)
        self.target = self.target or other.target
        for assumption in other.assumptions:
            self.assume(assumption)
        self.versions.update(other.versions)

    def assume(self, text: str) -> None:
        """Note what was taken for granted, once."""
        if text not in self.assumptions:
            self.assumptions.append(text)

    def rewritten(self, kind: str | None = None) -> list[SiteRecord]:
        return [s for s in self.sites if s.status == "rewritten" and kind in (None, s.kind)]

    def refused(self, kind: str | None = None) -> list[SiteRecord]:
        return [s for s in self.sites if s.status == "refused" and kind in (None, s.kind)]

    def table(self) -> str:
        """One row per group of equal sites, then the notes of each graph."""
        if not self.graphs:
            return (
                "kp: the backend was not called. Either nothing was compiled in this scope, or Dynamo has "
                "reached its recompile limit for this code (torch._dynamo.config.recompile_limit) and runs "
                "it eagerly."
            )
        lines = [
            f"target: {self.target}",
            *(f"assumed: {a}" for a in self.assumptions if a not in self.target),
        ]
        rows = [("sites", "kind", "where", "shape", "result", "spec or reason")]
        for group in self._groups():
            first = group[0]
            detail = first.spec if first.status == "rewritten" else str(first.reason)
            result = first.impl if first.status == "rewritten" else "refused"
            rows.append(
                (str(len(group)), first.kind, _span(group), first.shape, str(result), _clip(str(detail)))
            )
        lines += _align(rows) if len(rows) > 1 else ["no attention or linear site was found"]
        for site in {(n.code, n.text): n for s in self.sites for n in s.notes}.values():
            lines.append(f"note: {site}")
        for failed in (p for p in self.passes if p.error is not None):
            lines.append(f"graph {failed.graph}: pass {failed.name} failed and was undone: {failed.error}")
        for graph in self.graphs:
            lines += [f"graph {graph.index}: {note}" for note in graph.notes]
        return "\n".join(lines)

    def why(self, module: str) -> str:
        """Every site whose module path or source line contains `module`, in full."""
        found = [s for s in self.sites if module in s.module or module in s.source]
        if not found:
            known = sorted({s.module for s in self.sites if s.module})
            return f"no site matches {module!r}; known: {', '.join(known) or 'none'}"
        return "\n\n".join(_explain(site) for site in found)

    def diff(self, pass_name: str) -> str:
        """Unified diff of every graph that the named pass changed."""
        if self.graphs and all(graph.mode == "planned" for graph in self.graphs):
            return "a plan changes no graph: kp.explain has the diff"
        names = sorted({p.name for p in self.passes})
        if pass_name not in names:
            raise ValueError(
                f"diff: got {pass_name!r}, expected one of {', '.join(map(repr, names)) or 'nothing'}"
            )
        chunks: list[str] = []
        for record in self.passes:
            if record.name == pass_name and record.before != record.after:
                chunks += difflib.unified_diff(
                    record.before.splitlines(),
                    record.after.splitlines(),
                    f"graph {record.graph} before {pass_name}",
                    f"graph {record.graph} after {pass_name}",
                    lineterm="",
                    n=1,
                )
        return "\n".join(chunks) or f"{pass_name} changed nothing"

    def to_json(self) -> str:
        """The whole report as JSON (schema 1); graphs' texts are left out."""
        data = dataclasses.asdict(self)
        for record in data["passes"]:
            del record["before"], record["after"]
        return json.dumps({"schema": SCHEMA, **data}, indent=1, default=str)

    def summary(self, graph: int) -> str:
        """The one line that is logged for a graph."""
        parts = []
        for kind in ("attention", "linear"):
            sites = [s for s in self.sites if s.kind == kind and s.graph == graph]
            if not sites:
                continue
            done = [s for s in sites if s.status == "rewritten"]
            how = sorted({f"{s.impl}: {s.spec}" for s in done})
            codes = sorted({s.reason.code for s in sites if s.reason is not None})
            detail = "; ".join(how + codes)
            parts.append(f"{kind} {len(done)}/{len(sites)}" + (f" ({detail})" if detail else ""))
        record = self.graphs[graph]
        what = ", ".join(parts) or "no attention site"
        return f"kp: graph {graph}: {what} [{record.mode}] in {record.milliseconds:.0f} ms"

    def _groups(self) -> list[list[SiteRecord]]:
        groups: dict[tuple[Any, ...], list[SiteRecord]] = {}
        for site in self.sites:
            key = (site.graph, site.kind, site.status, site.impl, site.spec, str(site.reason), site.shape)
            groups.setdefault(key, []).append(site)
        return list(groups.values())


def _explain(site: SiteRecord) -> str:
    lines = [
        f"{site.kind} at {site.module or '?'} ({site.source or 'no source line'})",
        f"  shape: {site.shape}",
    ]
    if site.status == "rewritten":
        lines.append(f"  rewritten by {site.pass_name} onto {site.impl}: {site.spec}")
    else:
        lines.append(f"  refused by {site.pass_name}: {site.reason}")
    lines += [f"  note: {note}" for note in site.notes]
    if site.predicted:
        lines.append("  predicted: " + ", ".join(f"{k} {v}" for k, v in site.predicted.items()))
    if site.verified:
        lines.append(f"  verified: {site.verified}")
    return "\n".join(lines)


def _span(group: list[SiteRecord]) -> str:
    names = [s.module or s.source or "?" for s in group]
    return (
        names[0]
        if len(names) == 1
        else f"{names[0]} … {names[-1].split('.')[-2] if '.' in names[-1] else names[-1]}"
    )


def _clip(text: str, width: int = 110) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _align(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    out = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [out[0], "  ".join("-" * width for width in widths), *out[1:]]
