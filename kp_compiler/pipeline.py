"""Runs the passes over a graph: flags, timing, lint, records, undoing. Knows no pass by what it does."""

from __future__ import annotations

import dataclasses
import logging
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from kp_compiler.config import Config
from kp_compiler.errors import KPError, KPRequirementError
from kp_compiler.lowering import ops
from kp_compiler.metadata import bodies, copied, fill_metadata, tensor_of
from kp_compiler.passes import ALL_PASSES
from kp_compiler.passes.base import Context, Match, Pass, inspected, left_out, module_of, revert, source_of
from kp_compiler.passes.expand_mha import expand_all
from kp_compiler.report import PassRecord, Rejection, Report, SiteRecord
from kp_compiler.runtime import forget
from kp_compiler.target import Target
from kp_compiler.verify import verify_site
from kp_compiler.verify_linear import verify_linear
from kp_compiler.writes import erase_orphans

log = logging.getLogger(__name__)


@dataclass
class Run:
    """One graph on its way through the passes."""

    gm: GraphModule
    config: Config
    target: Target
    plan_only: bool = False
    assumed_dtype: torch.dtype | None = None
    keep_graphs: bool = False
    report: Report = field(default_factory=Report)


def run(task: Run, graph_index: int = 0) -> Report:
    """Rewrite `task.gm` in place (or, under `plan_only`, decide only) and return the records.

    A pass that raises is undone: the graph goes back to how it came, and everything runs again without that
    pass.
    """
    fill_metadata(task.gm)
    pristine = _snapshot(task.gm)
    failed: dict[str, str] = {}
    while True:
        task.report = Report(target=str(task.target))
        try:
            _run_all(task, graph_index, failed)
        except _PassFailed as failure:
            if task.config.strict:
                raise failure.error from None
            log.warning(
                "kp: pass %s failed and is undone: %s", failure.name, failure.error, exc_info=failure.error
            )
            failed[failure.name] = f"{type(failure.error).__name__}: {failure.error}"
            _restore(task.gm, pristine)
            continue
        _check_requirements(task)
        return task.report


_Unit = tuple[GraphModule, tuple[Node, ...]]  # a graph, and the nodes that call it


class _PassFailed(Exception):
    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(name)
        self.name, self.error = name, error


def _run_all(task: Run, index: int, failed: dict[str, str]) -> None:
    units = list(bodies(task.gm))
    _expand(units, task, failed)
    for each in ALL_PASSES:
        if each.name in failed:
            task.report.passes.append(PassRecord(each.name, index, 0.0, 0, 0, error=failed[each.name]))
            continue
        if reason := _off(each, task.config):
            task.report.passes.append(PassRecord(each.name, index, 0.0, 0, 0, skipped=reason))
            continue
        _run_pass(each, units, task, index)
    _finish(units, task, index, failed)


def _off(each: Pass, config: Config) -> Rejection | None:
    """The user switched the pass off, or everything that it is there for."""
    modes = config.passes()
    if modes[each.name].mode == "off":
        return Rejection("flag-off", f"The flag {each.name} is off.")
    if each.serves and all(modes[name].mode == "off" for name in each.serves):
        return Rejection("not-needed", f"{' and '.join(each.serves)}, which it serves, is off.")
    return None


def _expand(units: list[_Unit], task: Run, failed: dict[str, str]) -> None:
    """Write composite calls out before the pass that recognises attention looks for it. It answers for
    errors."""
    name = ALL_PASSES[0].name
    if name in failed or getattr(task.config, name).mode == "off":
        return
    try:
        for gm, _ in units:
            expand_all(gm.graph)
    except Exception as error:
        raise _PassFailed(name, error) from error


def _run_pass(each: Pass, units: list[_Unit], task: Run, index: int) -> None:
    start = time.perf_counter()
    before = _text(task)
    fired = refused = 0
    skipped: Rejection | None = None
    program: dict[Any, Any] = {}
    try:
        for gm, calls in units:
            ctx = Context(gm, task.config, task.target, calls, task.assumed_dtype, program)
            skipped = each.applies(ctx)
            sites = [site for site in each.sites(gm.graph) if _PLANNED not in site.meta]
            for site in sites:
                outcome = skipped or _left_out(each, site, task.config) or each.inspect(site, ctx)
                if isinstance(outcome, Rejection):
                    refused += 1
                    _refuse(each, site, outcome, task, index)
                elif _accept(each, site, outcome, ctx, task, index):
                    fired += 1
                else:
                    refused += 1
            if sites:
                gm.graph.lint()
    except KPError:
        raise
    except Exception as error:
        if each.tier == "distributed":  # without it the graph would compute something else
            raise KPError(f"{each.name} failed: {type(error).__name__}: {error}") from error
        raise _PassFailed(each.name, error) from error
    took = 1e3 * (time.perf_counter() - start)
    record = PassRecord(each.name, index, took, fired, refused, before, _text(task), skipped=skipped)
    task.report.passes.append(record)


_PLANNED = "kp_planned"  # of a site that is settled, and stays as it is, as nothing is rewritten


def _left_out(each: Pass, site: Node, config: Config) -> Rejection | None:
    """The user's `skip` and `only`."""
    if not left_out(getattr(config, each.name), site):
        return None
    text = f"{each.name}.skip or {each.name}.only leaves {module_of(site)} out."
    return Rejection("skipped-by-option", text)


def _accept(each: Pass, site: Node, match: Match, ctx: Context, task: Run, index: int) -> bool:
    """Record and rewrite; False where verification refused the site."""
    if each.final:
        verdict = None
        if task.config.verify and not task.plan_only and each.tier != "distributed":
            verdict = verify_site(site, match, ctx) if each.kind == "attention" else verify_linear(match, ctx)
            if verdict.failure is not None:
                if task.config.strict:
                    raise KPError(f"{module_of(site)}: {verdict.failure}")
                _refuse(each, site, verdict.failure, task, index)
                return False
        notes = (*site.meta.get("kp_notes", ()), *match.notes)
        record = _record(each, site, "rewritten", index, impl=match.impl, spec=match.spec, shape=match.shape)
        text = None if verdict is None else verdict.text
        task.report.sites.append(
            dataclasses.replace(
                record,
                notes=notes,
                predicted=match.predicted,
                verified=text,
                approximated_by=site.meta.get("kp_approximated_by", ()),
            )
        )
        if task.plan_only:
            site.meta[_PLANNED] = True
            return True
    elif each.tier == "approximate":
        site.meta["kp_approximated_by"] = (*site.meta.get("kp_approximated_by", ()), each.name)
    each.rewrite(ctx.gm.graph, match, ctx)
    return True


def _refuse(each: Pass, site: Node, reason: Rejection, task: Run, index: int) -> None:
    """A refusal settles the site only if no later pass can still take it."""
    if "kp_root" in site.meta and each is not _settling(site):
        site.meta["kp_notes"] = (*site.meta.get("kp_notes", ()), reason)
        return
    notes = site.meta.get("kp_notes", ())
    first = next((n for n in notes if n.code in _ROOT_CAUSES), None)
    shape = _shape_text(site)
    if "kp_root" in site.meta:
        record = _record(each, site, "refused", index, reason=first or reason, shape=shape)
        task.report.sites.append(dataclasses.replace(record, notes=notes))
        revert(site)
    else:
        task.report.sites.append(_record(each, site, "refused", index, reason=reason, shape=shape))


_ROOT_CAUSES = ("mask-is-input", "mask-unproved")


def _finish(units: list[_Unit], task: Run, index: int, failed: dict[str, str]) -> None:
    """Sites that no kernel was chosen for go back; checkpoint bodies lose the arguments that nothing
    reads."""
    errors = "; ".join(f"{name}: {error}" for name, error in failed.items())
    lost = Rejection("pass-failed", f"A pass failed and was undone ({errors}).")
    for gm, _ in units:
        for site in [n for n in gm.graph.nodes if "kp_root" in n.meta and ops.is_raised(n)]:
            last = _settling(site)
            off = _off(last, task.config)
            if failed or off or not task.plan_only:
                reason = lost if failed or off is None else off
                record = _record(last, site, "refused", index, reason=reason, shape=_shape_text(site))
                task.report.sites.append(record)
            revert(site)
    for gm, calls in units:
        if calls:
            _drop_unread_arguments(gm, calls)
        gm.graph.lint()
        gm.recompile()
    task.gm.graph.lint()
    task.gm.recompile()


def _settling(site: Node) -> Pass:
    """The pass that has the last word on a site of this kind."""
    kind = "attention" if ops.is_attention(site) else "linear"
    return next(each for each in reversed(ALL_PASSES) if each.final and each.kind == kind)


def _drop_unread_arguments(body: GraphModule, calls: tuple[Node, ...]) -> None:
    """Tensors that a checkpoint body no longer reads are not handed to it, and may die outside."""
    placeholders = body.graph.find_nodes(op="placeholder")
    drop = [i for i, node in enumerate(placeholders) if not node.users]
    for index in drop:
        body.graph.erase_node(placeholders[index])
    for call in calls if drop else ():
        arguments = list(call.args[1:])
        gone = [arguments[i] for i in drop]
        call.args = (call.args[0], *(a for i, a in enumerate(arguments) if i not in drop))
        erase_orphans(call.graph, [a for a in gone if isinstance(a, Node)])


def _check_requirements(task: Run) -> None:
    """`require` and `expect`: what must have fired, did. Judged graph by graph; a graph without a site of
    the kind (a graph break makes such ones, and a classifier has a softmax too) is no place where it could
    have."""
    if task.plan_only:
        return
    for each in ALL_PASSES:
        sites = [site for site in task.report.sites if site.kind == each.kind]
        if not any(s.reason is None or _is_candidate(s.reason) for s in sites):
            continue
        fired = sum(p.fired for p in task.report.passes if p.name == each.name)
        if each.final and each.tier == "exact":  # a pass of another tier may have taken a site before
            fired = sum(site.status == "rewritten" for site in sites)
        if each.tier == "approximate" and not each.final:  # a later pass may have left the site as it was
            fired = sum(each.name in s.approximated_by for s in sites)
        if fired >= (wanted := _required(each, task.config)):
            continue
        reasons = {f"{s.module or s.source or '?'}: {s.reason}" for s in sites if s.reason is not None}
        reasons |= {f"{s.module}: {note}" for s in sites for note in s.notes}
        if not reasons:
            reasons = {f"{len(sites)} candidates, nothing more for {each.name} to do"}
        raise _requirement(each, wanted, sorted(reasons), fired)


def check_left_alone(gm: GraphModule, config: Config, why: Rejection) -> None:
    """The same for a graph that kp does not work on at all."""
    for each in ALL_PASSES:
        if not _required(each, config):
            continue
        finder = next(other for other in ALL_PASSES if other.kind == each.kind)
        for _, found in inspected(finder, gm, config, Target("cpu")):
            if not isinstance(found, Rejection) or _is_candidate(found):
                raise _requirement(each, _required(each, config), [str(why)])


def _is_candidate(reason: Rejection) -> bool:
    """A refusal of something that does look like attention: not of a router's or classifier's softmax."""
    return reason.code not in ("no-qk-product", "no-value-product")


def _required(each: Pass, config: Config) -> int:
    """At how many sites of a graph a pass has to fire."""
    settings = getattr(config, each.name)
    if settings.expect is not None:
        return settings.expect
    return 1 if settings.mode == "require" else 0


def _requirement(each: Pass, wanted: int, reasons: list[str], fired: int = 0) -> KPRequirementError:
    listed = "\n  ".join(reasons)
    return KPRequirementError(
        f"{each.name} fired at {fired} sites of this graph, {wanted} required:\n  {listed}"
    )


# ---------------------------------------------------------------------------------------------------------
# records


def _record(each: Pass, site: Node, status: Any, index: int, **fields: Any) -> SiteRecord:
    return SiteRecord(each.kind, module_of(site), source_of(site), status, each.name, graph=index, **fields)


def _shape_text(site: Node) -> str:
    tensor = tensor_of(site)
    return "" if tensor is None else f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _text(task: Run) -> str:
    if not task.keep_graphs:
        return ""
    return "\n".join(str(gm.graph) for gm, _ in bodies(task.gm))


# ---------------------------------------------------------------------------------------------------------
# undoing


def _snapshot(gm: GraphModule) -> list[tuple[GraphModule, Graph]]:
    return [(each, copied(each.graph)) for each, _ in bodies(gm)]


def _restore(gm: GraphModule, pristine: list[tuple[GraphModule, Graph]]) -> None:
    for each, graph in pristine:
        each.graph = copied(graph)
    forget(gm)
