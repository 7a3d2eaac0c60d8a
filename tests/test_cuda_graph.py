"""The loop as one graph: replayed for another prompt it leaves what steps one by one leave.

On the CPU, with :mod:`tests.emulated_graph` in the place of a CUDA graph. Bit for bit everywhere:
a replay runs the same operations in the same order.
"""

import pytest
import torch
from torch import Tensor, nn

from tests.emulated_graph import EmulatedGraph, emulate
from tests.graph_cases import (
    adapt_both,
    assert_replayed,
    assert_same,
    engines,
    prompts,
    results,
    small_model,
    trainer_of,
    twins,
)
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import Batch, DivergedError, TTTConfig, graphs, session
from ttt_fast.batch import complete_batch
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.history import History


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


GROUPS = [{"params": "norm", "lr": [0.1, 0.01, 0.05], "weight_decay": 0.0}]
BF16 = dict(dtype=torch.bfloat16)
CASES = {
    "one": dict(),
    "untied, sdpa": dict(model=dict(family="llama", attn_implementation="sdpa")),
    "gpt2": dict(model=dict(family="gpt2")),  # slices of fused projections, biases, positions
    # Scales inside its embedding, sliding windows.
    "gemma2": dict(model=dict(family="gemma2", layers=2)),
    "schedule, groups": dict(lr=[0.05, 0.01, 0.02], param_groups=GROUPS),
    "nesterov": dict(nesterov=True),
    "several, padded": dict(lengths=(9, 6)),
    "checkpointing": dict(checkpointing=True),
    "last layer": dict(layers="-1:", scope="ffn", model=dict(layers=2)),
    "bfloat16": dict(model=BF16),
}
FACTORED = {
    "dampening": dict(dampening=0.3),
    "decoupled": dict(decoupled_weight_decay=True),
    "plain": dict(momentum=0.0, weight_decay=0.0, max_grad_norm=None),
    "several in turn": dict(lengths=(9, 6, 9), max_batch_tokens=18),
    "sdpa, padded": dict(lengths=(5, 7), model=dict(attn_implementation="sdpa")),
    "shared": dict(lengths=(7, 7), deltas="shared"),
}
DENSE = {
    "adamw": dict(optimizer="adamw"),
    "delta, stochastic": dict(accumulate="delta", rounding="stochastic"),
    "bfloat16, stochastic": dict(rounding="stochastic", model=BF16),
    "undo": dict(snapshot="undo", model=BF16),
    "host": dict(snapshot="host", lengths=(9, 9)),
}
EVERY = [
    *(("factored", name, case) for name, case in (CASES | FACTORED).items()),
    *(("dense", name, case) for name, case in (CASES | DENSE).items()),
]


@pytest.mark.parametrize(
    ("engine", "case"), [(engine, case) for engine, _, case in EVERY],
    ids=[f"{engine}, {name}" for engine, name, _ in EVERY],
)  # fmt: skip
def test_a_replay_leaves_what_steps_leave(engine, case):
    case = {"model": {}} | case
    model = small_model(**case.pop("model"))
    given = {name: case.pop(name) for name in ("lengths", "deltas") if name in case}
    with unchanged(model):
        statuses = adapt_both(*twins(engine, model=model, **case), **given)
    assert_replayed(statuses)
    (graph,) = EmulatedGraph.made
    assert graph.replays == 2


# ---------------------------------------------------------------------------- what a graph holds


@engines
def test_a_step_looks_at_nothing_and_launches_as_much_as_the_last(engine):
    """That nothing waits for the device is seen by recording at all; here launches are counted."""
    counts = []
    for steps in (2, 3, 4):
        trainer = trainer_of(small_model(), engine, steps=steps)
        for seed in range(2):
            trainer.adapt(prompts(seed)).restore()
        counts.append(EmulatedGraph.made[-1].launches)
    two, three, four = counts
    assert four - three == three - two
    # Nine modules with weights in the layer, an embedding that is the head, and a last norm.
    assert 100 < (four - three).total() < 300


@engines
def test_the_same_is_computed_as_one_by_one(engine, monkeypatch):
    """While it records, transformers must not take another way through the model."""
    seen = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def look(*args, attn_mask=None, is_causal=False, **options):
        seen.append((attn_mask is None, is_causal))
        return attention(*args, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", look)
    trainer = trainer_of(small_model(attn_implementation="sdpa"), engine)
    for seed in range(2):
        trainer.adapt(prompts(seed)).restore()
    assert set(seen) == {(True, True)}
    # Without our answer about positions it builds a mask.
    monkeypatch.setattr(graphs, "_positions_known", lambda device: graphs.suppress())
    trainer = trainer_of(small_model(attn_implementation="sdpa"), engine)
    for seed in range(2):
        trainer.adapt(prompts(seed)).restore()
    assert (False, False) in seen


class Notes(dict):
    """Everything that an engine notes on the host, path -> value; of tensors the shapes."""

    def __init__(self, value):
        super().__init__()
        self._met: dict[int, str] = {}
        self._note("", value)

    def _note(self, path, value):
        if isinstance(value, Tensor):
            self[path] = value.dtype, tuple(value.shape), value.requires_grad
        elif value is None or isinstance(value, bool | int | float | str | slice | torch.dtype):
            self[path] = value
        elif isinstance(value, nn.Module | torch.device | TTTConfig) or callable(value):
            self[path] = type(value).__name__
        elif id(value) in self._met:
            self[path] = self._met[id(value)]
        else:
            self._met[id(value)] = path
            for name, each in parts_of(value):
                self._note(f"{path}.{name}", each)


def parts_of(value):
    if isinstance(value, dict):
        # Ids of objects, and objects, are other ones each time.
        named = all(isinstance(key, str) for key in value)
        return value.items() if named else enumerate(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        return enumerate(value)
    return vars(value).items() if type(value).__module__.startswith("ttt_fast") else ()


@engines
def test_the_host_has_noted_what_steps_note(engine):
    noted = []
    for trainer in twins(engine):
        for seed in range(3):
            with trainer.adapt(prompts(seed, (9, 6)), deltas="independent"):
                found = Notes(trainer._engines[engine])
        noted.append(found)
    first, second = noted
    assert len(first) > 100
    differing = [path for path in first | second if first.get(path, path) != second.get(path, path)]
    assert not differing[:3]


@engines
def test_that_a_note_left_out_would_be_noticed(engine, monkeypatch):
    kind = {"dense": DenseEngine, "factored": FactoredEngine}[engine]
    monkeypatch.setattr(kind, "adopt", lambda self, bookkeeping: None)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        test_the_host_has_noted_what_steps_note(engine)


# ---------------------------------------------------------------------------- the user's results


@engines
def test_a_later_prompt_changes_nothing_of_an_earlier_one(engine):
    graphed, _ = twins(engine)
    kept = []
    for seed in range(4):
        with graphed.adapt(prompts(seed)) as adapted:
            found = {"losses": adapted.losses, "norms": adapted.grad_norms,
                     "diverged": adapted.diverged, "landed": adapted.update_landed}  # fmt: skip
            kept.append((found, {name: tensor.clone() for name, tensor in found.items()}))
    for found, then in kept:
        assert_same(found, then)


def test_detached_adaptations_are_not_replayed_over():
    graphed, eager = twins("factored")
    detached = []
    for seed in range(4):
        adapted = graphed.adapt(prompts(seed))
        if seed == 2:
            assert adapted.cuda_graph.startswith("replayed")
        if seed >= 2:
            adapted.detach()
            detached.append(adapted)
        else:
            adapted.restore()
    for seed, adapted in zip((2, 3), detached, strict=True):
        with adapted:
            found = results(adapted)
        with eager.adapt(prompts(seed)) as expected:
            assert_same(found, results(expected))


def test_that_results_in_the_memory_of_a_graph_would_be_noticed(monkeypatch):
    def without_copies(self, state):
        self.history.replace(state.measured, state.taken)
        self._found_inf = state.found_inf
        self.engine.adopt(state.engine)

    def views(self, delta):
        return self._unread[0][0, delta : delta + 1], self._unread[0][1, delta : delta + 1]

    monkeypatch.setattr(session.Session, "adopt", without_copies)
    graphed, _ = twins("factored")
    for seed in range(2):
        graphed.adapt(prompts(seed)).restore()
    monkeypatch.setattr(History, "of", views)
    monkeypatch.setattr(session.Session, "_check", lambda self: None)
    monkeypatch.setattr("ttt_fast.adaptation._ragged", lambda rows: rows[0])
    losses = []
    for seed in range(2, 4):
        with graphed.adapt(prompts(seed)) as adapted:
            losses.append((adapted.losses, adapted.losses.clone()))
    assert not torch.equal(*losses[0])


# ---------------------------------------------------------------------------- addresses and numbers


@engines
def test_a_longer_prompt_in_between_moves_buffers(engine):
    graphed, eager = twins(engine)
    assert_replayed(adapt_both(graphed, eager, seeds=range(3)))
    adapt_both(graphed, eager, lengths=(15,), seeds=range(3, 4))
    statuses = adapt_both(graphed, eager, seeds=range(4, 6))
    assert "recorded, and checked" in statuses[0] and "replayed" in statuses[1]


@engines
def test_weights_that_moved_or_changed(engine):
    graphed, eager = twins(engine, dtype=torch.bfloat16)
    assert_replayed(adapt_both(graphed, eager))
    with torch.no_grad():
        for param in graphed.model.parameters():
            param.mul_(0.9)
    (status,) = adapt_both(graphed, eager, seeds=[3])
    assert "replayed" in status
    buffer = graphed.model.model.rotary_emb.inv_freq
    graphed.model.model.rotary_emb.inv_freq = buffer.clone()  # read by every layer, never adapted
    (status,) = adapt_both(graphed, eager, seeds=[4])
    assert "recorded, and checked" in status


def stale_buffers(monkeypatch):
    monkeypatch.setattr(graphs, "_places", lambda session: [])
    graphed, eager = twins("factored")
    adapt_both(graphed, eager)
    adapt_both(graphed, eager, lengths=(15,), seeds=[3])
    adapt_both(graphed, eager, seeds=[4])


def stale_start(monkeypatch):
    monkeypatch.setattr(FactoredEngine, "open_recording", lambda self: None)
    trainer = trainer_of(small_model(), "factored", True)
    for seed in range(2):
        trainer.adapt(prompts(seed)).restore()


@pytest.mark.parametrize("fault", [stale_buffers, stale_start])
def test_that_a_stale_address_would_be_noticed(fault, monkeypatch):
    with pytest.raises(RuntimeError, match="tensor .* that was freed"):
        fault(monkeypatch)


class Rates:
    """A schedule that its owner changes from prompt to prompt."""

    def __init__(self):
        self.rate = 0.02

    def __call__(self, step):
        return self.rate


@engines
def test_a_schedule_that_changes_is_another_graph(engine):
    rates = Rates()
    graphed, eager = twins(engine, lr=rates)
    assert_replayed(adapt_both(graphed, eager))
    rates.rate = 0.05
    (status,) = adapt_both(graphed, eager, seeds=[3])
    assert "the first prompt" in status


@engines
def test_that_a_baked_number_would_be_noticed(engine, monkeypatch):
    kind = {"dense": DenseEngine, "factored": FactoredEngine}[engine]
    monkeypatch.setattr(kind, "baked", lambda self: ())
    with pytest.raises(AssertionError):
        test_a_schedule_that_changes_is_another_graph(engine)


def test_a_grid_of_settings_some_of_which_diverge():
    graphed, eager = twins("factored")
    for seed, rates in ((0, [1e-3, 1e-2, 1e6]), (1, [1e-3, 1e-2, 1e6]), (2, [1e-3, 1e-2, 1e6]),
                        (3, [1e-2, 1e-3, 1e-3])):  # fmt: skip
        found, statuses = [], []
        for trainer in (graphed, eager):
            options = dict(lr=rates, momentum=[0.9, 0.0], max_grad_norm=[None])
            with trainer.adapt_grid(prompts(seed)[0], **options) as grid:
                found.append(results(grid))
                statuses.append(grid.cuda_graph)
        assert_same(*found)
        assert statuses[0].startswith("replayed") == (seed == 2)
        assert found[0]["diverged"].any() == (seed < 3)


@engines
def test_a_replay_that_diverges_says_so(engine):
    options = dict(lr=1e30, max_grad_norm=None, weight_decay=0.0)
    graphed, _ = twins(engine, **options)
    with unchanged(graphed.model):
        messages = set()
        for _ in range(3):
            with pytest.raises(DivergedError) as error:
                graphed.adapt(prompts(0))
            messages.add(str(error.value))
    assert len(messages) == 1


def test_only_as_many_graphs_as_may_be_are_kept(monkeypatch):
    monkeypatch.setattr(graphs, "KEPT", 2)
    graphed, eager = twins("dense", scope="ffn", layers="-1:")
    adapt_both(graphed, eager, lengths=(20,), seeds=[0])  # makes the buffers as large as they get
    for length in (5, 6, 7):
        assert_replayed(adapt_both(graphed, eager, lengths=(length,)))
    (status,) = adapt_both(graphed, eager, lengths=(6,), seeds=[3])
    assert status.startswith("replayed; 2 graphs hold")
    first, second = adapt_both(graphed, eager, lengths=(5,), seeds=[3, 4])
    assert "the first prompt of its shape lately" in first and "recorded" in second
    (status,) = adapt_both(graphed, eager, lengths=(6,), seeds=[5])
    assert status.startswith("replayed")
    # Lengths that come round too seldom are never recorded.
    n_graphs = len(EmulatedGraph.made)
    for length in (8, 9, 10, 8, 9, 10):
        adapt_both(graphed, eager, lengths=(length,), seeds=[0])
    assert len(EmulatedGraph.made) == n_graphs


# ---------------------------------------------------------------------------- lengths


@engines
def test_prompts_of_several_lengths_share_a_graph(engine):
    padded, eager = twins(engine, dtype=torch.float64, pad_to_multiple_of=8)
    exact = trainer_of(padded.model, engine, False)
    for seed, length in enumerate((5, 7, 6, 3)):
        (status,) = adapt_both(padded, eager, lengths=(length,), seeds=[seed])
        assert status.startswith("replayed") == (seed >= 1)  # each prompt comes twice
        found = []
        for trainer in (padded, exact):
            with trainer.adapt(prompts(seed, (length,))) as adapted:
                found.append((adapted.losses, adapted.grad_norms))
        for mine, theirs in zip(*found, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=0)


def test_padding_to_a_length():
    rows = complete_batch(Batch(prompt_ids(5, n_rows=2)), small_model(), 1)
    padded = rows.padded_to(8)
    assert padded.input_ids.shape == (2, 8) and padded.padded
    assert padded.labels[:, 5:].eq(-100).all() and padded.attention_mask.sum() == 10
    assert padded.position_ids.tolist() == [[0, 1, 2, 3, 4, 4, 4, 4]] * 2
    assert rows.padded_to(5) is rows and rows.padded_to(3) is rows
    trainer = trainer_of(small_model(), "dense", pad_to_multiple_of=48)
    assert trainer._padded_length(rows) == 48
    assert trainer._padded_length(rows.padded_to(50)) == 64  # the model's context
