"""What ``ttt-fast adapt`` shows: a run, alone or beside the naive loop's, or several prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

PHASES = ("snapshot", "forward", "backward", "update", "generate", "restore")


@dataclass
class Run:
    """What one way of adapting did: ours, or the naive loop.

    Attributes:
        losses: loss before each update.
        grad_norms: global gradient norm before clipping.
        loss_after: loss on the prompt after the last update.
        answer: the continuation by the adapted model.
        ms: phase -> milliseconds.
        peak_bytes: phase -> peak bytes above the model at rest, None where not measurable.
        update_landed: share of the intended updates that reached the weights; None for the naive
            loop.
    """

    losses: list[float]
    grad_norms: list[float]
    loss_after: float
    answer: str
    ms: dict[str, float]
    peak_bytes: dict[str, int | None]
    update_landed: float | None = None


def ratios(runs: dict[str, Run]) -> dict[str, float] | None:
    """Naive milliseconds over ours, by phase, for the adaptation without generate, and in total."""
    if "naive" not in runs:
        return None
    naive, ours = runs["naive"].ms, runs["ours"].ms
    ratios = {p: naive[p] / ours[p] for p in PHASES if p in naive and ours.get(p)}
    for name, left_out in (("without_generate", "generate"), ("total", None)):
        sums = [sum(ms for p, ms in run.items() if p != left_out) for run in (naive, ours)]
        ratios[name] = sums[0] / sums[1]
    return ratios


def page(result: dict[str, Any]) -> str:
    """The result for people."""
    ours, naive, ratio = result["ours"], result.get("naive"), result["ratio"]
    config, weights = result["config"], result["weights"]
    lines = [
        f"{_where(result)}; {result['prompt_tokens']} tokens",
        f"{config['steps']} steps of {config['optimizer']} at lr {config['lr']:g} on "
        f"{result['selected_parameters'] / 1e6:.1f} M parameters (scope {config['scope']})",
        "",
        f"prompt         {_short(result['prompt'])}",
        f"answer before  {_short(result['answer_before'])}",
        f"answer after   {_short(ours['answer'])}",
    ]
    if naive:
        same = "the same" if naive["answer"] == ours["answer"] else _short(naive["answer"])
        lines.append(f"naive loop's   {same}")
    lines += ["", f"loss before    {result['loss_before']:.4f}"]
    lines.append("loss by step   " + " ".join(f"{loss:.4f}" for loss in ours["losses"]))
    lines.append(f"loss after     {ours['loss_after']:.4f}")
    if naive:
        pairs = zip(
            ours["losses"] + [ours["loss_after"]],
            naive["losses"] + [naive["loss_after"]],
            strict=True,
        )
        worst = max(abs(a - b) / max(abs(b), 1e-12) for a, b in pairs)
        lines.append(f"naive loop's   {naive['loss_after']:.4f}; largest difference {worst:.1e}")
    lines.append(f"update landed  {ours['update_landed']:.4f} of what was intended")
    lines += ["", *_table(ours, naive, ratio), ""]
    lines.append(f"sha256 of all parameters before {weights['before']}")
    lines.append(f"                          after {weights['after']}")
    return "\n".join([*lines, _verdict(result), result["engine"]])


def page_of_several(result: dict[str, Any]) -> str:
    """The result of several prompts for people: a block for each."""
    lines = [
        f"{_where(result)}; {len(result['prompts'])} prompts,"
        f" {result['config']['steps']} steps each",
        result["engine"],
    ]
    for n, one in enumerate(result["prompts"], 1):
        losses = [*one["losses"][:1], one["loss_after"]]  # 0 steps: only the last
        lines += [
            "",
            f"prompt {n:<4} {_short(one['prompt'])}",
            f"answer      {_short(one['answer'])}",
            f"loss        {' -> '.join(f'{loss:.4f}' for loss in losses)}, update landed "
            f"{one['update_landed']:.4f}",
        ]
    times = ", ".join(f"{phase} {ms:.1f} ms" for phase, ms in result["ms"].items())
    return "\n".join([*lines, "", times, _verdict(result)])


def _where(result: dict[str, Any]) -> str:
    return "{model}, {dtype} on {device}, {threads} threads".format_map(result)


def _verdict(result: dict[str, Any]) -> str:
    equal = result["weights"]["bitwise_equal"]
    return "the weights are back, bitwise equal" if equal else "THE WEIGHTS DIFFER"


def _table(
    ours: dict[str, Any], naive: dict[str, Any] | None, ratio: dict[str, float] | None
) -> list[str]:
    """Milliseconds and peak MiB above the model at rest, by phase."""
    heads = ["phase", "ours ms", "peak MiB"] + (["naive ms", "peak MiB", "ratio"] if naive else [])
    rows = [heads]
    runs = [ours] + ([naive] if naive else [])
    for phase in (*PHASES, "total"):
        row = [phase]
        for run in runs:
            if phase == "total":
                ms = sum(run["ms"].values())
                known = [peak for peak in run["peak_bytes"].values() if peak is not None]
                peak = max(known, default=None)
            else:
                ms, peak = run["ms"].get(phase, 0.0), run["peak_bytes"].get(phase)
            row += [f"{ms:.1f}", "-" if peak is None else f"{peak / 2**20:.0f}"]
        if ratio:
            row.append(f"{ratio[phase]:.2f}x" if phase in ratio else "-")
        rows.append(row)
    if ratio:
        rows.append(["without generate", *[""] * 4, f"{ratio['without_generate']:.2f}x"])
    return [f"{r[0]:<16}" + "".join(f"{cell:>11}" for cell in r[1:]) for r in rows]


def _short(text: str, width: int = 300) -> str:
    """Text on one line, the middle left out where it is long."""
    text = text.strip().replace("\n", "⏎")
    return text if len(text) <= width else f"{text[: width - 100]} … {text[-100:]}"


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw the losses of each run into a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    styles = {"naive": ("naive loop", "o", "tab:gray"), "ours": ("ttt_fast", ".", "tab:blue")}
    for name, (label, marker, color) in styles.items():
        if name in result:
            losses = [*result[name]["losses"], result[name]["loss_after"]]
            axes.plot(range(len(losses)), losses, label=label, marker=marker, color=color)
    axes.set_xlabel("step")
    per_token = result["config"]["reduction"] == "mean"
    axes.set_ylabel(f"loss of the prompt (nats{' a token' if per_token else ''})")
    axes.set_ylim(bottom=0)
    axes.legend()
    figure.savefig(path, dpi=120, format="png")
