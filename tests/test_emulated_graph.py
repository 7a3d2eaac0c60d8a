"""The emulation of a CUDA graph: it records what runs, and notices what a graph cannot do."""

import pytest
import torch

from tests.emulated_graph import EmulatedGraph, LooksError, StaleError, emulate


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


def record(body):
    graph = EmulatedGraph(torch.device("cpu"))
    with graph.recording():
        out = body()
    return graph, out


def test_the_emulation_runs_nothing_while_it_records_and_all_when_it_replays():
    x, y = torch.ones(3), torch.zeros(3)
    graph, z = record(lambda: y.add_(x) * 2)
    assert torch.equal(y, torch.zeros(3)) and z.isnan().all()
    graph.replay()
    x.fill_(10)
    graph.replay()
    assert torch.equal(y, torch.full((3,), 11.0)) and torch.equal(z, 2 * y)
    assert graph.launches == {"aten::add_": 1, "aten::mul": 1}


def test_the_emulation_bakes_numbers_and_addresses():
    factor, x = [2.0], torch.ones(3)
    graph, z = record(lambda: x * factor[0])
    factor[0] = 3.0
    graph.replay()
    assert torch.equal(z, torch.full((3,), 2.0))
    x = torch.ones(3)
    with pytest.raises(StaleError):
        graph.replay()


def test_the_emulation_poisons_what_nobody_wrote():
    graph, z = record(lambda: torch.empty(3) + 1)
    graph.replay()
    assert z.isnan().all()


@pytest.mark.parametrize(
    "look",
    [
        lambda t: t.sum().item(), lambda t: bool((t > 0).any()), lambda t: t.nonzero(),
        lambda t: t.cpu(), lambda t: t.tolist(), lambda t: t[t > 0], lambda t: torch.equal(t, t),
        lambda t: torch.tensor(0.5), lambda t: t.masked_select(t > 0), lambda t: t.unique(),
    ],
    ids=["item", "bool", "nonzero", "cpu", "tolist", "mask", "equal", "tensor", "select", "unique"],
)  # fmt: skip
def test_the_emulation_notices_a_look(look):
    with pytest.raises(LooksError):
        record(lambda: look(torch.ones(3)))
