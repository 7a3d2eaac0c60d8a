"""Other libraries and ours on one prompt: T = 64, K = 5, whole adaptations with restore.

All parameters of SmolLM2-135M, whose embedding is tied; and the feed-forward weights alone, which
Opacus can do, too. A peer that lacks an option runs without it, beside ours with it, and its losses
are compared with those of the loop without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import OPTIONS, Case
from bench.conftest import Sides, interleave, note
from bench.peers import PEERS, Options, Peer, ours
from bench.shapes import AMOUNT, SMALL, load_model
from ttt_fast import select_parameters

CASE = Case(8 if SMALL else 64, 2 if SMALL else 5, 1)
ROUNDS = 1 if SMALL else 3


@pytest.mark.skipif(AMOUNT == "quick", reason="`make bench-full` runs other libraries")
@pytest.mark.parametrize("scope", ["all", "ffn"])
def bench_peers(benchmark: Any, scope: str) -> None:
    model, ids = load_model(CASE.model, torch.float32), CASE.prompts()
    params = [selection.param for selection in select_parameters(model, scope)]
    options = Options(steps=CASE.K, **OPTIONS)
    # LoRA puts adapters on all linear layers, whatever the scope.
    names = [n for n in PEERS if n.startswith("Opacus") == (scope == "ffn") or n == "naive loop"]
    peers = [PEERS[name] for name in names if PEERS[name].installed]
    peers += [Peer(f"ours, {engine}", ours(engine, scope)) for engine in ("dense", "factored")]
    missing = sorted({PEERS[name].package for name in names if not PEERS[name].installed})
    for peer in peers:
        require_same_losses(peer, model, ids, params, options)
    sides: Sides = {p.name: (side(p, model, ids, params, options), 0) for p in peers}
    seconds = interleave(sides, ROUNDS)
    rows = {}
    for peer in peers:
        ms = [1e3 * value / CASE.K for value in seconds[peer.name]]
        lacking = [f"without {name}" for name in peer.lacks]
        rows[peer.name] = {
            "median_ms": median(ms),
            "min_ms": min(ms),
            "max_ms": max(ms),
            "remark": "; ".join(filter(None, [", ".join(lacking), peer.remark])),
        }
    info = {"peers": f"{CASE.model}, float32, T = {CASE.T}, K = {CASE.K}, {scope}", "rows": rows}
    note(benchmark, info | {"missing": missing})
    print_rows(info["peers"], rows, missing)


def side(
    peer: Peer, model: nn.Module, ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> Callable[[], None]:
    """A whole adaptation with its restore."""
    return lambda: peer.adapt(model, ids, params, peer.possible(options)).restore()


def require_same_losses(
    peer: Peer, model: nn.Module, ids: Tensor, params: Sequence[nn.Parameter], options: Options
) -> None:
    """The loop's with the same options; of another update the first, MeZO's being beside it."""
    possible = peer.possible(options)
    adapted = peer.adapt(model, ids, params, possible)
    adapted.restore()
    expected = PEERS["naive loop"].adapt(model, ids, params, possible)
    expected.restore()
    steps = slice(None) if peer.same_update else slice(1)
    tolerance = 1e-3 if peer.same_update else 2e-2
    torch.testing.assert_close(
        adapted.losses[steps].float(), expected.losses[steps].float(), atol=tolerance, rtol=0,
        msg=lambda text: f"{peer.name}: {text}",
    )  # fmt: skip


def print_rows(what: str, rows: dict[str, dict[str, Any]], missing: list[str]) -> None:
    """Print milliseconds a step, restore included."""
    print(f"\n{what}, {torch.get_num_threads()} threads: ms a step")
    naive = rows["naive loop"]["median_ms"]
    for name, row in rows.items():
        ratio = naive / row["median_ms"]
        print(f"{name:26}{row['median_ms']:10.1f}{ratio:8.2f}x  {row['remark']}")
    if missing:
        print(f"not installed, not run: {', '.join(missing)}")
