"""From pytest-benchmark's JSON to a result file to commit, the README's tables and the plots.

    make bench
    python -m bench.report benchmark-*.json
    python -m bench.report --compare old.json new.json     # result files; 1 if something is slower

A result file keeps what a number needs to mean something (machine, versions, commit, dtype and
shapes in its name, median and spread) and nothing else.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from bench import part_table, tables
from bench.compare import compare
from bench.documents import BENCHMARKS, ROOT, write_block
from bench.shapes import AMOUNT

RESULTS = ROOT / "bench" / "results"
# What a run of all files finds beside the parts of a step.
OTHERS = ("benchmarks", "latency", "peers", "policy", "study")
Json = dict[str, Any]


def condense(raws: Sequence[Json]) -> Json:
    """The result file of the runs of pytest-benchmark, one for each process that measured."""
    first = raws[0]
    cpu = first["machine_info"]["cpu"]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT
    )
    result: Json = {
        "machine": f"{cpu.get('brand_raw', 'CPU')}, {torch.get_num_threads()} threads",
        "python": first["machine_info"]["python_version"],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit.stdout.strip(),
        "datetime": first["datetime"],
        "amount": AMOUNT,
        "benchmarks": [],
        "latency": [],
        "peers": [],
        "policy": {},
        "study": [],
        "parts": [],
        "not_run": [],
    }
    for benchmark in (b for raw in raws for b in raw["benchmarks"]):
        extra = benchmark["extra_info"]
        if "side" in extra:
            result["benchmarks"].append(_side(benchmark["group"], extra, benchmark["stats"]))
        elif "latency" in extra:
            result["latency"].append(extra)
        elif "peers" in extra:
            result["peers"].append(extra)
        elif "policy" in extra:
            result["policy"] = extra
        elif "study" in extra:
            result["study"].append(extra)
        elif "parts" in extra:
            result["parts"].append(extra)
        elif "not_run" in extra:
            result["not_run"].append(extra)
    return result


def _side(group: str, extra: Json, stats: Json) -> Json:
    """One side of a comparison of ops."""
    return {
        "group": group,
        "side": extra["side"],
        "baseline": extra["baseline"],
        "median_ms": 1e3 * stats["median"],
        "min_ms": 1e3 * stats["min"],
        "max_ms": 1e3 * stats["max"],
        "rounds": stats["rounds"],
        "gb_per_s": extra.get("gb_per_s"),
        "share_of_copy_bandwidth": extra.get("share_of_copy_bandwidth"),
        "share_of_gemm_rate": extra.get("share_of_gemm_rate"),
    }


def write(raws: Sequence[Json], results: Path, readme: Path, benchmarks: Path) -> Path:
    """Write the result file, the tables of both documents, and the plots; return the first."""
    result = condense(raws)
    if result["amount"] == "small" and readme.is_relative_to(ROOT):
        raise ValueError(
            "TTT_FAST_BENCH=small measures nothing, so there is nothing to write down."
        )
    name = result["machine"].split(",")[0].replace("(R)", "").replace(" ", "-").lower()
    quick = "" if result["amount"] == "quick" else f"-{result['amount']}"
    # Of one file alone: the tables of all others stay as they are.
    alone = bool(result["parts"]) and not any(result[kind] for kind in OTHERS)
    parts = "-parts" if alone else ""
    file = results / f"{name}-{result['datetime'][:10]}{quick}{parts}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if result["parts"] and result["amount"] != "quick":
        write_block(benchmarks, "parts", part_table.section(result))
    if alone:
        return file
    if result["amount"] == "full":
        write_block(benchmarks, "measured", tables.full(result))
        if result["policy"]:
            from bench import plots

            plots.write(result, benchmarks.parent)
    else:
        write_block(readme, "bench", tables.readme(result, part_table.table(result["parts"])))
    return file


def main(arguments: Sequence[str] | None = None) -> int:
    """Write what was measured, or compare two results; return the exit status."""
    parser = argparse.ArgumentParser(description="Results, tables and plots of benchmarks.")
    parser.add_argument("files", nargs="*", help="JSON of pytest-benchmark")
    parser.add_argument("--compare", nargs=2, metavar=("OLD", "NEW"), help="two result files")
    args = parser.parse_args(arguments)
    if bool(args.files) == bool(args.compare):
        parser.error("pass JSON files of pytest-benchmark, or --compare and two result files.")
    if args.compare:
        old, new = (json.loads(Path(path).read_text(encoding="utf-8")) for path in args.compare)
        text, slower = compare(old, new)
        print(text)
        return 1 if slower else 0
    raws = [json.loads(Path(path).read_text(encoding="utf-8")) for path in args.files]
    file = write(raws, RESULTS, ROOT / "README.md", BENCHMARKS)
    print(f"wrote {file.relative_to(ROOT)} and its tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
