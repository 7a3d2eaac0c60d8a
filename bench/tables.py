"""A result file as the tables of the README (quick) and of docs/benchmarks.md (full)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

Json = dict[str, Any]

ADAPTATIONS = [
    "| adaptation, times of a prompt | loop | best stock torch | ttt_fast | of a step | ratio"
    " | to best stock | first token | weights back | memory |",
    "|---" * 10 + "|",
]
OPS = [
    "| what | baseline | best stock torch | ttt_fast | ratio to baseline | to best stock"
    " | of a copy's bandwidth | of the GEMM rate |",
    "|---" * 8 + "|",
]
# What bench/plots.py draws, as seen from docs/.
FIGURES = (
    "![Measured and predicted times as prompts, steps, batches and models grow]"
    "(benchmark-scaling.png)\n\n"
    "![Where each engine is faster, by tokens and steps](benchmark-engines.png)"
)
# Sides of an op that are no stock torch to be held against.
NOT_STOCK = ("ours", "reference", "frozen")


def readme(result: Json, by_part: str) -> str:
    """Whole adaptations, memory, and folded away the parts of a step and the single ops."""
    parts = [adaptations(result["latency"]), studies(result["study"]), policy(result["policy"])]
    if by_part:
        parts.append(f"<details><summary>A step by part</summary>\n\n{by_part}\n\n</details>")
    ops = op_rows(result["benchmarks"])
    if ops:
        lines = ["<details><summary>The single ops</summary>\n", *OPS, *ops, "\n</details>"]
        parts.append("\n".join(lines))
    return "\n\n".join(filter(None, [*parts, conditions(result, "make bench")]))


def full(result: Json) -> str:
    """Everything of a full run."""
    parts = [adaptations(result["latency"]), *map(peers, result["peers"])]
    parts += [studies(result["study"]), policy(result["policy"])]
    if result["policy"]:
        parts.append(FIGURES)
    ops = op_rows(result["benchmarks"])
    parts += ["\n".join([*OPS, *ops])] if ops else []
    if result["not_run"]:
        missing = "; ".join(f"{row['what']} ({row['not_run']})" for row in result["not_run"])
        parts.append(f"Not run, for want of memory: {missing}.")
    return "\n\n".join(filter(None, [*parts, conditions(result, "make bench-full")]))


def conditions(result: Json, command: str) -> str:
    """What a number needs to mean something."""
    return (
        "Medians (least and most in brackets; none of a single round), both sides in one run,"
        " interleaved, on "
        f"{result['machine']}; torch {result['torch']}, transformers {result['transformers']}, "
        f"commit {result['commit']}, {result['datetime'][:10]}. Regenerate with `{command}`."
    )


# ---------------------------------------------------------------------------- adaptations


def adaptations(cases: Iterable[Json]) -> str:
    """A row for each case and engine of ours, the least gain, and what was not run."""
    rows, ratios, not_run = [], {}, []
    for case in cases:
        if "not_run" in case:
            not_run.append(f"{case['what']} ({case['not_run']})")
            continue
        for engine in case["sides"].keys() - {"naive", "best stock"}:
            row, ratio = _adaptation(case, engine)
            rows.append(row)
            ratios[f"{case['what']}, {engine} engine"] = ratio
    if not rows:
        return ""
    least = min(ratios, key=ratios.__getitem__)
    text = "\n".join([*ADAPTATIONS, *rows])
    text += f"\n\nLeast gain beside the loop: {ratios[least]:.2f}x, {least}."
    if not_run:
        text += f" Not run, being over the cap: {'; '.join(not_run)}."
    return text


def _adaptation(case: Json, engine: str) -> tuple[str, float]:
    sides = case["sides"]
    naive, ours, stock = sides["naive"], sides[engine], sides.get("best stock")
    ratio = _median(naive) / _median(ours)
    chosen = "" if engine == case["auto"] else f"; auto takes {case['auto']}"
    cells = [
        f"{case['what']} ({engine}{chosen})",
        milliseconds(naive["prompt_ms"]),
        milliseconds(stock["prompt_ms"]) if stock else "",
        milliseconds(ours["prompt_ms"]),
        f"{number(naive['step_ms']['median'])} → {number(ours['step_ms']['median'])} ms",
        f"{ratio:.2f}x",
        f"{_median(stock) / _median(ours):.2f}x" if stock else "",
        f"{number(naive['first_token_ms']['median'])} →"
        f" {number(ours['first_token_ms']['median'])} ms",
        f"{number(naive['restore_ms']['median'])} → {number(ours['restore_ms']['median'])} ms"
        f" ({ours['written_bytes'] / 2**20:.0f} MiB written)",
        _memory(case.get("peaks"), engine),
    ]
    return f"| {' | '.join(cells)} |", ratio


def _median(side: Json) -> float:
    return side["prompt_ms"]["median"]


def _memory(peaks: Json | None, engine: str) -> str:
    if not peaks:
        return ""
    naive, ours = (peaks[name]["peak_bytes"] / 2**20 for name in ("naive", engine))
    return f"{naive:.0f} → {ours:.0f} MiB"


def number(value: float) -> str:
    """A time as it is printed in tables."""
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def milliseconds(times: Json) -> str:
    """Median, and least and most in brackets, where there was more than one round."""
    text = f"{number(times['median'])} ms"
    if times["min"] == times["max"]:
        return text
    return f"{text} [{number(times['min'])}, {number(times['max'])}]"


# ---------------------------------------------------------------------------- the others


def peers(found: Json) -> str:
    """Other libraries beside ours."""
    rows = found["rows"]
    naive = rows["naive loop"]["median_ms"]
    lines = [f"{found['peers']}:\n", "| who | ms a step | beside the loop | |", "|---|---|---|---|"]
    for name, row in rows.items():
        times = {key.removesuffix("_ms"): row[key] for key in ("median_ms", "min_ms", "max_ms")}
        lines.append(
            f"| {name} | {milliseconds(times)} | {naive / row['median_ms']:.2f}x |"
            f" {row['remark']} |"
        )
    if found["missing"]:
        lines.append(f"\nNot installed: {', '.join(found['missing'])}.")
    return "\n".join(lines)


def studies(found: Iterable[Json]) -> str:
    """Seconds of a trajectory of a study beside the loop's."""
    lines = ["| study, seconds of a trajectory | loop | ttt_fast | ratio |", "|---|---|---|---|"]
    for case in found:
        naive, ours = (
            {name: case["rows"][side][f"{name}_s"] for name in ("median", "min", "max")}
            for side in ("naive", "ours")
        )
        cells = [case["study"].removeprefix("study, "), *map(_seconds, (naive, ours))]
        lines.append(f"| {' | '.join(cells)} | {naive['median'] / ours['median']:.2f}x |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _seconds(times: Json) -> str:
    return f"{times['median']:.1f} s [{times['min']:.1f}, {times['max']:.1f}]"


def policy(found: Json) -> str:
    """How well auto chose."""
    if not found:
        return ""
    slowdowns = [row["auto_slowdown"] for row in found["rows"] if row["auto_slowdown"]]
    worst = max(slowdowns)
    return (
        f'`engine="auto"` was at most {worst - 1:.0%} slower than the better engine in'
        f" {len(slowdowns)} cases of T, K, deltas, scope and model"
        f" ({found['policy']['source']})."
    )


def op_rows(entries: Iterable[Json]) -> list[str]:
    """A row for each comparison that has ours and a stock torch."""
    groups: dict[str, dict[str, Json]] = {}
    for entry in entries:
        if not entry["side"].startswith("copy ("):
            groups.setdefault(entry["group"], {})[entry["side"]] = entry
    return [
        row for group, sides in groups.items() for row in _op(group.replace("torch.", ""), sides)
    ]


def _op(what: str, sides: dict[str, Json]) -> list[str]:
    ours = sides.get("ours")
    stock = [side for name, side in sides.items() if not name.startswith(NOT_STOCK)]
    if ours is None or not stock:
        return []
    baseline = sides[ours["baseline"]]
    best = min(stock, key=lambda side: side["median_ms"])
    shares = [ours.get(name) for name in ("share_of_copy_bandwidth", "share_of_gemm_rate")]
    cells = [
        what,
        _milliseconds(baseline),
        f"{_milliseconds(best)} ({best['side']})",
        _milliseconds(ours),
        f"{baseline['median_ms'] / ours['median_ms']:.2f}x",
        f"{best['median_ms'] / ours['median_ms']:.2f}x",
        *("" if share is None else f"{share:.0%}" for share in shares),
    ]
    return [f"| {' | '.join(cells)} |"]


def _milliseconds(entry: Json) -> str:
    return milliseconds({name: entry[f"{name}_ms"] for name in ("median", "min", "max")})
