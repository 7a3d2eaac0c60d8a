"""From pytest-benchmark's JSON to a result file to commit and the table in the README.

    make bench
    python -m bench.report benchmark-*.json

A result file keeps what a number needs to mean something (machine, versions, commit, dtype and
shapes in the group's name, median and spread) and nothing else.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

ROOT = Path(__file__).parent.parent
START, END = "<!-- bench:start -->", "<!-- bench:end -->"


def condense(raw: dict[str, Any]) -> dict[str, Any]:
    """The result file: one entry for each side of each comparison, milliseconds."""
    cpu = raw["machine_info"]["cpu"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    entries, found = [], {"prompt_steps": [], "peak_memory": {}, "policy": {}}
    for benchmark in raw["benchmarks"]:
        extra, stats = benchmark["extra_info"], benchmark["stats"]
        if "side" in extra:
            entries.append(
                {
                    "group": benchmark["group"],
                    "side": extra["side"],
                    "baseline": extra["baseline"],
                    "median_ms": 1e3 * stats["median"],
                    "min_ms": 1e3 * stats["min"],
                    "max_ms": 1e3 * stats["max"],
                    "rounds": stats["rounds"],
                    "gb_per_s": extra.get("gb_per_s"),
                    "share_of_copy_bandwidth": extra.get("share_of_copy_bandwidth"),
                }
            )
        elif "sides" in extra:
            found["prompt_steps"].append(extra)
        elif "rows" in extra:
            found["policy"] = extra
        elif "peaks" in extra:
            found["peak_memory"][extra["what"]] = extra["peaks"]
        elif "naive" in extra:
            what = f"one prompt, T = 64, K = 10, {benchmark['name'].partition('[')[2][:-1]}"
            found["peak_memory"][what] = extra
    return {
        "machine": f"{cpu.get('brand_raw', 'CPU')}, {torch.get_num_threads()} threads",
        "python": raw["machine_info"]["python_version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
        "datetime": raw["datetime"],
        "benchmarks": entries,
        **found,
    }


HEAD = [
    "| what | baseline | best stock torch | ttt_fast | ratio to baseline | to best stock |",
    "|---|---|---|---|---|---|",
]


def table(result: dict[str, Any]) -> str:
    """The README's tables: whole adaptations, memory, and the single ops folded away."""
    conditions = (
        "Medians (least and most in brackets), both sides in one run, interleaved, on "
        f"{result['machine']}; torch {result['torch']}, transformers {result['transformers']}, "
        f"{result['datetime'][:10]}. Regenerate with `make bench`."
    )
    whole, ops = [], []
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in result["benchmarks"]:
        groups.setdefault(entry["group"], []).append(entry)
    for group, entries in groups.items():
        row = _group_row(group.replace("torch.", ""), entries)
        (whole if group.startswith("adapt") else ops).extend(row)
    lines = [*HEAD, *whole]
    for case in result["prompt_steps"]:
        lines += _prompt_step_rows(case)
    for name, cases in result["peak_memory"].items():
        naive = cases["naive"]["peak_bytes"]
        shares = ", ".join(
            f"{case} {row['peak_bytes'] / 2**20:.0f} MiB ({row['peak_bytes'] / naive:.2f})"
            for case, row in cases.items()
        )
        lines.append(f"\nPeak memory above the model, {name}: {shares}.")
    if result["policy"]:
        worst = max(row["auto_slowdown"] for row in result["policy"]["rows"])
        lines.append(
            f'\n`engine="auto"` was at most {worst - 1:.0%} slower than the better engine in'
            f" {len(result['policy']['rows'])} cases of T, K, deltas and scope"
            f" ({result['policy']['speeds']})."
        )
    details = ["\n<details><summary>The single ops</summary>\n", *HEAD, *ops, "\n</details>"]
    return "\n".join([*lines, *(details if ops else []), f"\n{conditions}"])


def _group_row(what: str, entries: list[dict[str, Any]]) -> list[str]:
    """One row of a comparison of whole calls; none if ours or all of stock torch are missing."""
    sides = {e["side"]: e for e in entries if not e["side"].startswith("copy (")}
    ours, baseline = sides.get("ours"), sides[entries[0]["baseline"]]
    not_stock = ("ours", "reference", "frozen")
    stock = [e for name, e in sides.items() if not name.startswith(not_stock)]
    if ours is None or not stock:
        return []
    return [_row(what, baseline, min(stock, key=lambda e: e["median_ms"]), ours)]


def _prompt_step_rows(case: dict[str, Any]) -> list[str]:
    """A row for each of our engines, of times of one step of one prompt."""
    sides = dict(case["sides"])
    baseline, stock = sides.pop(case["baseline"]), sides.pop("best stock", None)
    auto = case.get("auto")
    written = case.get("bytes_written", {})
    rows = []
    for name, side in sides.items():
        what = f"{case['what']}; a {case['unit']}"
        if name != "ours":
            what += f"; {name} engine" + (", which auto takes" if name == auto else "")
        if written:
            what += f" ({written['ours']} bytes written)"
        rows.append(_row(what, baseline, stock and {"side": "best stock", **stock}, side))
    return rows


def _row(
    what: str, baseline: dict[str, Any], stock: dict[str, Any] | None, ours: dict[str, Any]
) -> str:
    ratio, best, to_best = baseline["median_ms"] / ours["median_ms"], "", ""
    if stock is not None:
        best = f"{_ms(stock)} ({stock['side']})"
        to_best = f"{stock['median_ms'] / ours['median_ms']:.2f}x"
    return f"| {what} | {_ms(baseline)} | {best} | {_ms(ours)} | {ratio:.2f}x | {to_best} |"


def _ms(entry: dict[str, Any]) -> str:
    digits = 0 if entry["median_ms"] >= 10 else 2
    median, least, most = (
        f"{entry[name]:.{digits}f}" for name in ("median_ms", "min_ms", "max_ms")
    )
    return f"{median} ms [{least}, {most}]"


def main(*paths: str) -> None:
    """Write the result file and the README's table; one JSON for each process that measured."""
    raws = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    result = condense({**raws[0], "benchmarks": [b for raw in raws for b in raw["benchmarks"]]})
    name = result["machine"].split(",")[0].replace("(R)", "").replace(" ", "-").lower()
    file = ROOT / "bench" / "results" / f"{name}-{result['datetime'][:10]}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    readme = ROOT / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{table(result)}\n{END}{after}", encoding="utf-8")
    print(f"wrote {file.relative_to(ROOT)} and the table in README.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
