"""Two result files: what became slower beyond the noise of both.

Each side of a benchmark is compared as its ratio to the baseline of the same run, so that a machine
in a slow hour, or another one, does not look like a regression. The noise of a ratio is what the
least and the most of its rounds allow; of a single round, what rounds of other cases did. A
regression is a ratio whose whole range is below the old one's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Json = dict[str, Any]
# Rounds of a case were up to a sixth from its median (2 cores of an EPYC with neighbours).
SINGLE_ROUND = 1.2


@dataclass(frozen=True)
class Ratio:
    """Baseline over a side: how many times faster, with the range that the rounds allow."""

    typical: float
    low: float
    high: float

    @classmethod
    def of(cls, baseline: Json, side: Json) -> Ratio:
        """From median, min and max of both."""
        (low, high), (least, most) = _range(baseline), _range(side)
        return cls(baseline["median"] / side["median"], low / most, high / least)

    def __str__(self) -> str:
        return f"{self.typical:.2f}x [{self.low:.2f}, {self.high:.2f}]"


def _range(times: Json) -> tuple[float, float]:
    """Least and most."""
    if times["min"] == times["max"]:
        return times["min"] / SINGLE_ROUND, times["max"] * SINGLE_ROUND
    return times["min"], times["max"]


def ratios(result: Json) -> Iterator[tuple[str, Ratio]]:
    """Every side of ours in a result file: its name, and its ratio to the baseline."""
    sides = {(entry["group"], entry["side"]): entry for entry in result["benchmarks"]}
    for (group, name), entry in sides.items():
        if name.startswith("ours"):
            baseline = sides[group, entry["baseline"]]
            yield f"{group}, {name}", Ratio.of(_times(baseline), _times(entry))
    for case in result.get("latency", []):
        sides = case.get("sides", {})
        for name in sides.keys() - {"naive", "best stock"}:
            for unit in ("prompt_ms", "first_token_ms", "restore_ms"):
                ratio = Ratio.of(sides["naive"][unit], sides[name][unit])
                yield f"{case['what']}, {name}, {unit.removesuffix('_ms')}", ratio
    for found in result.get("peers", []):
        rows = {name: _times(row) for name, row in found["rows"].items()}
        for name in rows:
            if name.startswith("ours"):
                yield f"{found['peers']}, {name}", Ratio.of(rows["naive loop"], rows[name])
    for found in result.get("parts", []):
        if "sides" in found:
            before, after = found["sides"].values()
            yield f"{found['what']} ({found['parts']})", Ratio.of(before, after)


def _times(entry: Json) -> Json:
    return {name: entry[f"{name}_ms"] for name in ("median", "min", "max")}


def compare(old: Json, new: Json) -> tuple[str, list[str]]:
    """A line for each benchmark of both files, and the names of those that became slower.

    Raises:
        ValueError: no benchmark is in both.
    """
    before, after = dict(ratios(old)), dict(ratios(new))
    both = [name for name in after if name in before]
    if not both:
        raise ValueError(
            "compare: no benchmark is in both files; pass two results of the same TTT_FAST_BENCH."
        )
    lines = [
        f"old: {old['machine']}, commit {old['commit']}, {old['datetime'][:10]}",
        f"new: {new['machine']}, commit {new['commit']}, {new['datetime'][:10]}",
        "times faster than the baseline of the same run, with the range of its rounds",
    ]
    slower = []
    for name in both:
        was, now = before[name], after[name]
        verdict = ""
        if now.high < was.low:
            slower.append(name)
            verdict = "SLOWER"
        elif now.low > was.high:
            verdict = "faster"
        lines.append(f"{name:72} {was!s:26} {now!s:26} {verdict}")
    only = [f"only in the {which} file: {name}" for which, name in _only(before, after)]
    lines += [*only, f"{len(slower)} of {len(both)} became slower beyond the noise of both runs"]
    return "\n".join(lines), slower


def _only(before: dict[str, Ratio], after: dict[str, Ratio]) -> Iterator[tuple[str, str]]:
    for name in before.keys() - after.keys():
        yield "old", name
    for name in after.keys() - before.keys():
        yield "new", name
