"""The command line: `kp plan | explain | doctor | demo`.

Bad input is one line on stderr and exit code 2. A demo whose check fails, or a model that does not compile,
is exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from kp_compiler import __version__, config, doctor
from kp_compiler import target as targets
from kp_compiler.capture import explain, plan
from kp_compiler.config import KPConfigError
from kp_compiler.errors import KPError
from kp_compiler.report import Report

DTYPES = ("bfloat16", "float16", "float32", "float64")
_SOURCE = """\
SOURCE is file.py:function, module:function or the name of a demo. The function takes no arguments and returns
(model, args, kwargs); the model is called as model(*args, **kwargs)."""
_EXAMPLES = """\
examples:
  kp doctor                              what this machine can do, and what is off for which reason
  kp demo attention                      compile a transformers Llama, check it, show the plan for an H100
  kp plan job.py:build --dtype bfloat16  what kp would do on an H100 (no GPU needed, nothing is computed)
  kp plan job.py:build --why layers.3    every site whose module path holds layers.3, in full
  kp explain job.py:build --option attention.impl=flex"""


class _UsageError(Exception):
    """Bad input: one line, exit code 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code is returned."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (_UsageError, KPConfigError) as error:
        return _fail(error, 2)
    except KPError as error:
        return _fail(error, 2 if arguments.command == "demo" else 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `kp … | head`: no complaint at exit
        return 1


def _fail(error: object, code: int) -> int:
    text = str(error)
    print(f"kp: error: {_one_line(text) if code == 2 else text}", file=sys.stderr)
    return code


def _one_line(text: str, width: int = 400) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"


# ------------------------------------------------------------------------------------------------- the parser


class _Parser(argparse.ArgumentParser):
    """Errors are one line, without the usage."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = _Parser(
        prog="kp",
        formatter_class=plain,
        epilog=_EXAMPLES,
        description="kp: a torch.compile backend that proves attention masks and picks exact kernels.",
    )
    parser.add_argument("--version", action="version", version=f"kp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    text = "say what kp would do for a model on a target; nothing is computed"
    each = commands.add_parser("plan", help=text, description=f"{text}.\n\n{_SOURCE}", formatter_class=plain)
    each.add_argument(
        "--target", metavar="NAME", help="auto, cpu or cuda:smNN (default: this GPU, else cuda:sm90)"
    )
    each.add_argument("--dtype", choices=DTYPES, help="assumed for parameters and floating-point inputs")
    _add_source(each, _plan)

    text = "compile a model with kp, run it once, say what happened"
    each = commands.add_parser(
        "explain", help=text, description=f"{text}.\n\n{_SOURCE}", formatter_class=plain
    )
    output = _add_source(each, _explain)
    output.add_argument("--diff", metavar="PASS", help="print how this pass changed the graphs")

    text = "say what this machine can do, and which pass or kernel is off for what reason"
    each = commands.add_parser("doctor", help=text, description=f"{text}.")
    each.add_argument("--target", metavar="NAME", help="ask for cpu or cuda:smNN instead of this machine")
    text = "under torchrun: try every schedule of context_parallel on its processes"
    each.add_argument("--distributed", action="store_true", help=text)
    each.add_argument("--passes-markdown", action="store_true", help="print the README's table of passes")
    each.add_argument("--kernels-markdown", action="store_true", help="print the README's table of kernels")
    each.set_defaults(run=_doctor)

    text = "list the demonstrations, or run one"
    each = commands.add_parser(
        "demo", help=text, description=f"{text}. The exit code is 1 where a check fails."
    )
    each.add_argument("name", nargs="?", metavar="NAME")
    depth = each.add_mutually_exclusive_group()
    depth.add_argument("--quick", action="store_true", help="at most a minute (the default)")
    depth.add_argument(
        "--validate", action="store_true", help="check more, gradients among it; at most three minutes"
    )
    each.set_defaults(run=_demo)
    return parser


def _add_source(each: argparse.ArgumentParser, run: Any) -> Any:
    """What `plan` and `explain` share; returns the group of mutually exclusive outputs."""
    each.add_argument("source", metavar="SOURCE", help="file.py:function, module:function or a demo")
    each.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="attention.impl=flex, strict=true; may be repeated",
    )
    each.add_argument(
        "--options", metavar="JSON", help='all options at once: {"attention": {"mode": "require"}}'
    )
    each.add_argument("--no-grad", action="store_true", help="capture under torch.no_grad()")
    output = each.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument(
        "--why", metavar="MODULE", help="print the sites whose module path or source line contains this"
    )
    each.set_defaults(run=run)
    return output


# --------------------------------------------------------------------------------------------------- commands


def _plan(arguments: argparse.Namespace) -> int:
    settings = parse_options(arguments.options, arguments.option)
    if arguments.target is not None:
        targets.parse(arguments.target)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    with _example(arguments) as (model, args, kwargs):
        return _show(
            arguments,
            lambda: plan(model, *args, target=arguments.target, dtype=dtype, options=settings, **kwargs),
        )


def _explain(arguments: argparse.Namespace) -> int:
    settings = parse_options(arguments.options, arguments.option)
    if arguments.diff is not None and arguments.diff not in config.PASS_CONFIGS:
        raise _UsageError(f"--diff: got {arguments.diff!r}, expected one of {', '.join(config.PASS_CONFIGS)}")
    with _example(arguments) as (model, args, kwargs):
        return _show(arguments, lambda: explain(model, *args, options=settings, **kwargs))


def _show(arguments: argparse.Namespace, make: Any) -> int:
    """Make the report and print what was asked for."""
    with torch.no_grad() if arguments.no_grad else contextlib.nullcontext(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            report: Report = make()
        except Exception as error:
            inner = getattr(error, "inner_exception", None) or error
            if isinstance(inner, KPError):
                raise inner from None
            return _fail(f"{arguments.source}: {type(inner).__name__}: {_one_line(str(inner))}", 1)
    if arguments.json:
        print(report.to_json())
    elif arguments.why is not None:
        if not any(arguments.why in site.module or arguments.why in site.source for site in report.sites):
            raise _UsageError(f"--why: {report.why(arguments.why)}")
        print(report.why(arguments.why))
    elif getattr(arguments, "diff", None) is not None:
        print(
            report.diff(arguments.diff)
            if any(p.name == arguments.diff for p in report.passes)
            else report.table()
        )
    else:
        print(report.table())
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    target = None if arguments.target is None else targets.parse(arguments.target)
    if arguments.distributed:
        text, ok = doctor.distributed()
        print(text, end="")
        return 0 if ok else 1
    if arguments.passes_markdown:
        print(doctor.passes_markdown())
    if arguments.kernels_markdown:
        print(doctor.kernels_markdown())
    if not (arguments.passes_markdown or arguments.kernels_markdown):
        print(doctor.report(target))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from kp_compiler.demos import DEMOS

    if arguments.name is None:
        width = max(map(len, DEMOS))
        print("\n".join(f"{demo.name.ljust(width)}  {demo.summary}" for demo in DEMOS.values()))
        return 0
    if arguments.name not in DEMOS:
        raise _UsageError(f"demo: got {arguments.name!r}, expected one of {', '.join(DEMOS)}")
    return DEMOS[arguments.name].run(arguments.validate)


# ----------------------------------------------------------------------------------------------------- inputs


def parse_options(text: str | None, pairs: Sequence[str]) -> dict[str, Any]:
    """`--options JSON`, then each `--option key=value` over it; a dotted key is a pass's setting. Checked."""
    try:
        settings = json.loads(text) if text else {}
    except json.JSONDecodeError as error:
        raise _UsageError(f"--options: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise _UsageError(f"--options: got {text}, expected a JSON object")
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise _UsageError(f"--option: got {pair!r}, expected key=value")
        name, _, setting = key.partition(".")
        new: Any = {setting: _value(value)} if setting else _value(value)
        if setting or name in config.PASS_CONFIGS:  # the settings of a pass add up
            before, new = _settings(settings.get(name, {})), _settings(new)
            both = isinstance(before, Mapping) and isinstance(new, Mapping)
            new = {**before, **new} if both else new
        settings[name] = new
    config.resolve(settings)
    return settings


def _settings(value: Any) -> Any:
    """A mode or a bool as the dict it stands for."""
    if isinstance(value, bool):
        value = "on" if value else "off"
    return {"mode": value} if isinstance(value, str) else value


def _value(text: str) -> Any:
    """A JSON value where it is one, else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


@contextlib.contextmanager
def _example(arguments: argparse.Namespace) -> Iterator[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """The model and its arguments, made by the user's function, whose folder is importable meanwhile."""
    source = arguments.source
    place, colon, function = source.rpartition(":")
    if not colon:
        from kp_compiler.demos import DEMOS

        if source not in DEMOS:
            raise _UsageError(
                f"got {source!r}, expected file.py:function, module:function or a demo ({', '.join(DEMOS)})"
            )
        yield DEMOS[source].example()
        return
    folder = os.path.dirname(os.path.abspath(place)) if place.endswith(".py") else os.getcwd()
    sys.path.insert(0, folder)
    try:
        make = getattr(_load(place), function, None)
        if not callable(make):
            raise _UsageError(f"{place} has no function {function!r}")
        yield _triple(source, _call(source, make))
    finally:
        sys.path.remove(folder)


def _load(place: str) -> ModuleType:
    if place.endswith(".py") and not os.path.isfile(place):
        raise _UsageError(f"there is no file {place}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        name = os.path.splitext(os.path.basename(place))[0]
        spec = importlib.util.spec_from_file_location(name, place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(name, module)
        spec.loader.exec_module(module)
        return module
    except KPError:
        raise
    except Exception as error:
        raise _UsageError(f"{place} can't be imported: {type(error).__name__}: {error}") from None


def _call(source: str, make: Any) -> Any:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is the report's
            return make()
    except KPError:
        raise
    except (Exception, SystemExit) as error:
        raise _UsageError(f"{source} raised {type(error).__name__}: {error}") from None


def _triple(source: str, made: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    if not (isinstance(made, tuple) and len(made) == 3 and callable(made[0])):
        raise _UsageError(f"{source} returned {type(made).__name__}, expected (model, args, kwargs)")
    model, args, kwargs = made
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise _UsageError(f"{source}: expected (model, args, kwargs) with a tuple and a dict, "
                          f"got {type(args).__name__} and {type(kwargs).__name__}")  # fmt: skip
    return model, tuple(args), dict(kwargs)


if __name__ == "__main__":
    sys.exit(main())
