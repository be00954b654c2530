"""Fill the marked blocks of README.md: results of benchmarks, and the tables of passes and kernels.

    python benchmarks/readme_table.py [--check]

A block stands between `<!-- NAME:begin -->` and `<!-- NAME:end -->`. `bench` and `sharing` come from
benchmarks/results/*.json, `passes` and `kernels` from the code. `--check` writes nothing and is exit code 1
where the README is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"
EMPTY = "no results yet"
MOST_ROWS = 120  # that a reader would scroll through


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    before = README.read_text(encoding="utf-8")
    after = filled(before, blocks())
    if options.check:
        print("README.md is up to date" if after == before else "README.md is out of date: run make readme")
        return int(after != before)
    README.write_text(after, encoding="utf-8")
    return 0


def blocks() -> dict[str, str]:
    """The content of every block."""
    from kp_compiler import doctor

    return {
        "bench": benchmarks(RESULTS),
        "passes": doctor.passes_markdown(),
        "kernels": doctor.kernels_markdown(),
        "sharing": sharing(RESULTS / "ring_attention.json"),
    }


def filled(text: str, contents: dict[str, str]) -> str:
    """`text` with every block replaced; a block that is missing is an error."""
    for name, content in contents.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"README.md lacks the markers {begin} and {end}")
        text = f"{head}{begin}\n{content}\n{end}{tail}"
    return text


def benchmarks(folder: Path) -> str:
    """One section per result file, in the order of their names."""
    sections = [_section(path) for path in sorted(folder.glob("*.json"))]
    return "\n\n".join(sections) or EMPTY


ARMS = {
    "ring": "`ring`", "allgather": "`allgather`", "ulysses": "`ulysses`",
    "torch": "best of PyTorch's `context_parallel`", "by hand": "all-to-all by hand, cuDNN",
}  # fmt: skip


def sharing(path: Path) -> str:
    """Efficiencies of two GPUs, forward / forward and backward; a line for each setting."""
    data = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[int, int, int], dict[tuple[str, str], float]] = {}
    for row in data["rows"]:
        arm = row["provider"].split()[0] if row["provider"].startswith("torch") else row["provider"]
        if arm in ARMS and "efficiency" in row:
            heads, keys = map(int, row["heads"].split(":"))
            cell = found.setdefault((heads, keys, row["length"]), {})
            cell[arm, row["mode"]] = max(row["efficiency"], cell.get((arm, row["mode"]), 0.0))
    table = [("heads, tokens", *ARMS.values())]
    for setting in sorted(found, key=lambda setting: (-setting[1], -setting[0], setting[2])):
        (heads, keys, length), cell = setting, found[setting]
        cells = (
            " / ".join(f"{cell[arm, mode]:.3f}" for mode in ("forward", "both"))
            if (arm, "both") in cell
            else "-"
            for arm in ARMS
        )
        table.append((f"{heads} for {keys} of keys, {length // 1024}k", *cells))
    count = max(row["ranks"] for row in data["rows"])
    return f"{count} {data['device']}, {data['date']}, commit {data['commit']}.\n\n{_markdown(table)}"


def _section(path: Path) -> str:
    data = json.loads(path.read_text(encoding="utf-8"))
    peers = ", ".join(f"{name} {version}" for name, version in data.get("peers", {}).items())
    about = f"{data['device']}, torch {data['torch']}" + (
        f", triton {data['triton']}" if data.get("triton") else ""
    )
    lines = [
        f"### {data['benchmark']}",
        "",
        f"{about}{', ' + peers if peers else ''}; {data['date']}, commit {data['commit']}. "
        f"Source: [{path.name}](benchmarks/results/{path.name}).",
    ]
    if (picture := path.with_suffix(".png")).exists():
        lines += ["", f"![{data['benchmark']}](benchmarks/results/{picture.name})"]
    if data.get("bars"):
        lines += ["", _bars(data["bars"])]
    if len(data.get("rows", ())) > MOST_ROWS:
        lines += ["", f"The file has {len(data['rows'])} rows."]
    elif data.get("rows"):
        rows = _rows(data["rows"])
        lines += ["", f"<details><summary>all {len(data['rows'])} rows</summary>", "", rows, "", "</details>"]
    return "\n".join(lines)


def _bars(bars: list[dict[str, Any]]) -> str:
    """Every bar, also those that are not met."""
    found = [("what", "value", "bar", "met")]
    for bar in bars:
        sign = "at most" if bar.get("better") == "lower" else "at least"
        found.append(
            (
                bar["name"],
                _cell(bar["value"]),
                f"{sign} {_cell(bar['target'])}",
                "yes" if bar["ok"] else "**no**",
            )
        )
    return _markdown(found)


def _rows(rows: list[dict[str, Any]]) -> str:
    """Rows of the same setting become one line, an arm a column; rows without arms stay as they are."""
    if not all({"arm", "ms", "peak_gib"} <= row.keys() for row in rows):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        return _markdown([tuple(keys), *(tuple(_cell(row.get(key)) for key in keys) for row in rows)])
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    names = [key for key in ("setting", "mode") if key in rows[0]]
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        cell = "-" if row["ms"] is None else f"{_cell(row['ms'])} / {_cell(row['peak_gib'])}"
        lines.setdefault(tuple(str(row[name]) for name in names), {})[row["arm"]] = cell
    header = (*names, *(f"{arm}, ms / GiB" for arm in arms))
    return _markdown(
        [header, *((*key, *(cells.get(arm, "-") for arm in arms)) for key, cells in lines.items())]
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


if __name__ == "__main__":
    sys.exit(main())
