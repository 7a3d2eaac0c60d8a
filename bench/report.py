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
    entries, memory = [], {}
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
        elif extra:
            memory[benchmark["name"]] = extra
    return {
        "machine": f"{cpu.get('brand_raw', 'CPU')}, {torch.get_num_threads()} threads",
        "python": raw["machine_info"]["python_version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
        "datetime": raw["datetime"],
        "benchmarks": entries,
        "peak_memory": memory,
    }


def table(result: dict[str, Any]) -> str:
    """The README's table: for each comparison the baseline, the best stock torch and ours."""
    lines = [
        "| what | baseline | best stock torch | ttt_fast | ratio to baseline | to best stock |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, list[dict[str, Any]]] = {}
    for entry in result["benchmarks"]:
        groups.setdefault(entry["group"], []).append(entry)
    for group, entries in groups.items():
        sides = {e["side"]: e for e in entries if not e["side"].startswith("copy (")}
        ours, baseline = sides.get("ours"), sides[entries[0]["baseline"]]
        stock = [e for name, e in sides.items() if not name.startswith(("ours", "reference"))]
        if ours is None or not stock:
            continue
        best = min(stock, key=lambda e: e["median_ms"])
        lines.append(
            f"| {group.replace('torch.', '')} | {_ms(baseline)} | {_ms(best)} ({best['side']}) | "
            f"{_ms(ours)} | {baseline['median_ms'] / ours['median_ms']:.2f}x | "
            f"{best['median_ms'] / ours['median_ms']:.2f}x |"
        )
    for name, cases in result["peak_memory"].items():
        naive = cases["naive"]["peak_bytes"]
        shares = ", ".join(
            f"{case} {row['peak_bytes'] / 2**20:.0f} MiB ({row['peak_bytes'] / naive:.2f})"
            for case, row in cases.items()
        )
        lines.append(f"\nPeak memory above the model, {name.partition('[')[2][:-1]}: {shares}.")
    lines.append(
        "\nMedians (least and most in brackets), both sides in one run, interleaved, on "
        f"{result['machine']}; torch {result['torch']}, transformers {result['transformers']}, "
        f"{result['datetime'][:10]}. Regenerate with `make bench`."
    )
    return "\n".join(lines)


def _ms(entry: dict[str, Any]) -> str:
    return f"{entry['median_ms']:.0f} ms [{entry['min_ms']:.0f}, {entry['max_ms']:.0f}]"


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
