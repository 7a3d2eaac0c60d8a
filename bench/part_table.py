"""What bench/bench_parts.py found, as tables: frozen models, steps by part, the last layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from bench.parts import PARTS
from bench.tables import conditions, milliseconds, number

Json = dict[str, Any]

FROZEN = [
    "| nothing adapts | eager torch | ttt_fast | ratio | floor | ttt_fast to floor |",
    "|---" * 6 + "|",
]
LAYERS = [
    "| times of a prompt and step, factored | all layers | last layers | share | floor's share |",
    "|---" * 5 + "|",
]


def section(result: Json) -> str:
    """The section of docs/benchmarks.md."""
    return f"{table(result['parts'])}\n\n{conditions(result, 'make bench-full')}"


def table(found: list[Json]) -> str:
    """All tables that have something in them, and what they rest on; "" if none has."""
    kinds: dict[str, list[Json]] = {}
    for each in found:
        kinds.setdefault(each["parts"], []).append(each)
    sections = [
        _lines(FROZEN, map(_frozen, kinds.get("frozen", []))),
        *map(step, kinds.get("step", [])),
        _lines(LAYERS, map(_layers, kinds.get("layers", []))),
        _not_run(kinds.get("not run", [])),
        floors(found),
    ]
    return "\n\n".join(filter(None, sections))


def _lines(head: list[str], rows: Iterable[str]) -> str:
    lines = [*head, *rows]
    return "\n".join(lines) if len(lines) > len(head) else ""


def _frozen(case: Json) -> str:
    before, after = case["sides"].values()
    floor = sum(case["floor_ms"].values())
    cells = [
        case["what"],
        milliseconds(before),
        milliseconds(after),
        f"{before['median'] / after['median']:.2f}x",
        f"{number(floor)} ms",
        f"{after['median'] / floor:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def step(case: Json) -> str:
    """A table of the parts of both sides, the floor beside them, and what is in the rest."""
    before, after = case["sides"].values()
    loop, ours = case["by_part"].values()
    floors = case["floor_ms"]
    floor = sum(floors.values())
    lines = [
        f"{case['what']}: milliseconds of a prompt and step; ttt_fast takes"
        f" {after['median'] / floor:.2f} times the floor, the loop"
        f" {before['median'] / floor:.2f}.\n",
        "| part | loop | ttt_fast | floor |",
        "|---|---|---|---|",
    ]
    for part in PARTS:
        cells = [loop["ms"][part], ours["ms"][part], floors.get(part)]
        lines.append(f"| {part} | {' | '.join(map(_number, cells))} |")
    sums = [sum(loop["ms"].values()), sum(ours["ms"].values()), floor]
    lines.append(f"| sum, under the profiler | {' | '.join(map(_number, sums))} |")
    whole = [milliseconds(before), milliseconds(after), f"{number(floor)} ms"]
    lines.append(f"| without the profiler | {' | '.join(whole)} |")
    for name, side in (("the loop", loop), ("ttt_fast", ours)):
        rest = ", ".join(f"{what} {number(ms)}" for what, ms in side["rest"].items())
        lines.append(f"\nRest of {name}: {rest}.")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else number(value)


def _layers(case: Json) -> str:
    whole, last = case["sides"].values()
    floors = list(case["floor_ms"].values())
    cells = [
        case["what"],
        milliseconds(whole),
        milliseconds(last),
        f"{last['median'] / whole['median']:.2f}",
        f"{floors[1] / floors[0]:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _not_run(cases: Iterable[Json]) -> str:
    missing = "; ".join(f"{case['what']} ({case['not_run']})" for case in cases)
    return f"Not run, being over the cap: {missing}." if missing else ""


def floors(found: Iterable[Json]) -> str:
    """What the floors and the parts are."""
    rates = [each["gemm_gflop_per_s"] for each in found if "gemm_gflop_per_s" in each]
    if not rates:
        return ""
    return (
        "Floors are the operations of forward, input gradients, delta products and Grams at the"
        f" GEMM rate of the same rounds ({min(rates):.0f} to {max(rates):.0f} Gflop/s); what is no"
        " product has none. Parts are sums of torch.profiler's own times over one more run, and add"
        " up to all of it; of ours, what adapted layers take beyond the first step, which has no"
        " deltas yet, is the deltas'."
    )
