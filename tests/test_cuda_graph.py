"""The loop as one graph: replayed for another prompt it leaves what steps one by one leave.

On the CPU, with :mod:`tests.emulated_graph` in the place of a CUDA graph. Bit for bit everywhere:
a replay runs the same operations in the same order.
"""

import signal
import warnings

import pytest
import torch
from torch import Tensor, nn
from transformers import masking_utils

from tests.emulated_graph import EmulatedGraph, LooksError, StaleError, emulate
from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, graphs, placement, session
from ttt_fast.batch import complete_batch
from ttt_fast.engines import head
from ttt_fast.engines.dense import DenseEngine
from ttt_fast.engines.factored import FactoredEngine
from ttt_fast.history import History

OPTIONS = dict(steps=2, lr=2e-2, weight_decay=0.01, max_grad_norm=1.0)
ENGINES = ["dense", "factored"]
engines = pytest.mark.parametrize("engine", ENGINES)


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    emulate(monkeypatch)


def small_model(family="llama_tied", dtype=torch.float32, layers=1, **options):
    name = "n_layer" if family == "gpt2" else "num_hidden_layers"
    return tiny_model(family, dtype, **{name: layers}, **options)


def trainer_of(model, engine, cuda_graph="auto", **options):
    return TTTTrainer(model, TTTConfig(engine=engine, cuda_graph=cuda_graph, **OPTIONS | options))


def twins(engine, family="llama_tied", dtype=torch.float32, model=None, **options):
    """Trainers of one model: one that may replay, and one that takes every step."""
    model = small_model(family, dtype) if model is None else model
    return trainer_of(model, engine, **options), trainer_of(model, engine, False, **options)


def results(adapted, whole=True) -> dict[str, Tensor]:
    """Everything that an adaptation says and, as a whole, does."""
    found = {
        "losses": adapted.losses, "grad_norms": adapted.grad_norms, "steps": adapted.steps,
        "landed": adapted.update_landed, "loss": adapted.loss(), "diverged": adapted.diverged,
    }  # fmt: skip
    if not whole:
        return found
    found["generated"] = adapted.generate(max_new_tokens=3, do_sample=False)
    for delta in range(adapted.n_deltas):
        found |= {f"{delta} {n}": t for n, t in adapted.state_dict(delta).items()}
    if hasattr(adapted, "rewind"):
        found["delta_norm"] = adapted.delta_norm()
        found["cosine"] = adapted.grad_cosine(0, -1)
        adapted.rewind(1)
        found["loss after 1"] = adapted.loss()
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert torch.equal(nan_as_number(found[name]), nan_as_number(expected[name])), name


def nan_as_number(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(nan=-1e9) if tensor.is_floating_point() else tensor


def prompts(seed, lengths=(9,)):
    return [prompt_ids(n, seed=10 * seed + i)[0] for i, n in enumerate(lengths)]


def adapt_both(graphed, eager, lengths=(9,), seeds=range(3), **given):
    """Statuses of the prompts of one trainer; the results of both are the same."""
    statuses = []
    given = {"deltas": "independent"} | given
    for seed in seeds:
        found = []
        for trainer in (graphed, eager):
            with trainer.adapt(prompts(seed, lengths), **given) as adapted:
                statuses += [adapted.cuda_graph] if trainer is graphed else []
                found.append(results(adapted, whole=statuses[-1].startswith("replayed")))
        assert_same(*found)
    return statuses


def assert_replayed(statuses):
    assert "the first prompt" in statuses[0]
    assert "recorded, and checked" in statuses[1]
    assert all(status.startswith("replayed") for status in statuses[2:])


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


# ---------------------------------------------------------------------------- what goes wrong


def looking(reduce_rows):
    """The reduction of losses, with a look at one while a graph is recorded."""

    def reduce(losses, *more):
        if torch.cuda.is_current_stream_capturing():
            losses.sum().item()
        return reduce_rows(losses, *more)

    return reduce


def interrupted(*args):
    raise KeyboardInterrupt


@engines
@pytest.mark.parametrize("fault", ["look", "interrupt"])
def test_recording_that_fails(engine, fault, monkeypatch):
    graphed, eager = twins(engine)
    adapt_both(graphed, eager, seeds=[0])
    faulty = interrupted if fault == "interrupt" else looking(head.reduce_rows)
    monkeypatch.setattr(head, "reduce_rows", faulty)
    with unchanged(graphed.model):
        if fault == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                graphed.adapt(prompts(1))
            return
        with pytest.warns(UserWarning, match=r"recording failed \(LooksError"):
            (status,) = adapt_both(graphed, eager, seeds=[1])
        assert "recording failed" in status
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert "recording failed" in adapt_both(graphed, eager, seeds=[2])[0]
        demanding = trainer_of(graphed.model, engine, True)
        demanding.adapt(prompts(0)).restore()
        with pytest.raises(RuntimeError, match="cuda_graph=True: recording failed"):
            demanding.adapt(prompts(1))


@engines
def test_ctrl_c_waits_for_the_end_of_the_recording(engine, monkeypatch):
    """Nothing of what surrounds a recording is left half done."""
    trainer, reduced = trainer_of(small_model(), engine), []
    reduce_rows, own = head.reduce_rows, masking_utils.find_packed_sequence_indices

    def interrupted(*args):
        reduced.append(masking_utils.find_packed_sequence_indices is own)
        if len(reduced) == 1:
            signal.raise_signal(signal.SIGINT)
        return reduce_rows(*args)

    trainer.adapt(prompts(0)).restore()
    monkeypatch.setattr(head, "reduce_rows", interrupted)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with unchanged(trainer.model), pytest.raises(KeyboardInterrupt):
            trainer.adapt(prompts(1))
    finally:
        signal.signal(signal.SIGINT, found)
    assert len(reduced) == OPTIONS["steps"]
    assert masking_utils.find_packed_sequence_indices is own


@engines
def test_a_replay_that_fails(engine, monkeypatch):
    def fail(graph):
        raise torch.OutOfMemoryError("too small")

    graphed, eager = twins(engine)
    adapt_both(graphed, eager, seeds=[0])
    monkeypatch.setattr(EmulatedGraph, "on_replay", fail)
    with unchanged(graphed.model), pytest.warns(UserWarning, match="a replay failed .*too small"):
        (status,) = adapt_both(graphed, eager, seeds=[1])
    assert "too small" in status


@engines
def test_a_replay_that_gives_other_numbers(engine, monkeypatch):
    def spoil(graph):
        """Leave the last softmax out."""
        names = [call.func.name() for call in graph.calls]
        del graph.calls[len(names) - 1 - names[::-1].index("ttt_fast::nll_")]

    graphed, eager = twins(engine)
    with unchanged(graphed.model):
        adapt_both(graphed, eager, seeds=[0])
        monkeypatch.setattr(EmulatedGraph, "on_replay", spoil)
        wrong = "a replay gave a loss of nan at step 2, one by one it is"
        with pytest.warns(UserWarning, match=wrong):
            (status,) = adapt_both(graphed, eager, seeds=[1])
        assert wrong in status
        assert wrong in adapt_both(graphed, eager, seeds=[2])[0]
        demanding = trainer_of(graphed.model, engine, True)
        demanding.adapt(prompts(0)).restore()
        with pytest.raises(RuntimeError, match=f"cuda_graph=True: {wrong}"):
            demanding.adapt(prompts(1))


# ---------------------------------------------------------------------------- what is not recorded


REFUSED = {
    "on_step": (dict(), dict(on_step=lambda report: None), "on_step and stop look"),
    "stop": (dict(), dict(stop=lambda report: False), "on_step and stop look"),
    "check_every": (dict(check_every=1), dict(), "check_every=1 looks"),
    "dropout": (dict(dropout=True), dict(), "dropout=True"),
    "torch": (dict(rounding="torch"), dict(), "looks at found_inf"),
    "backend": (dict(backend="torch", engine="dense"), dict(), "looks at found_inf"),
    "spans": (dict(kv="frozen"), dict(), "kv='frozen' takes another span"),
    "no steps": (dict(steps=0), dict(), "steps=0"),
    "positions": (dict(), dict(position_ids=torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])),
                  "position ids other than"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_recorded(name):
    options, given, reason = REFUSED[name]
    options = {"engine": "dense"} | options
    model = small_model()
    trainer = trainer_of(model, cuda_graph="auto", **options)
    for _ in range(3):
        with trainer.adapt(prompts(0), **given) as adapted:
            assert reason in adapted.cuda_graph
    with unchanged(model), pytest.raises(ValueError, match=f"cuda_graph=True, but .*{reason}"):
        trainer_of(model, cuda_graph=True, **options).adapt(prompts(0), **given)
    assert not EmulatedGraph.made


def test_objectives_hooks_and_budgets_are_not_recorded():
    model, options = small_model(), OPTIONS | {"cuda_graph": "auto"}
    trainer = TTTTrainer(model, TTTConfig(**options), objective=lambda outputs, batch: None)
    assert "Python of your objective" in trainer._graph_obstacle(watched=False)
    trainer = TTTTrainer(model, TTTConfig(**options))
    assert trainer._graph_obstacle(watched=False) is None
    handle = model.model.layers[0].register_forward_hook(lambda *args: None)
    assert "would not run the hooks" in trainer._graph_obstacle(watched=False)
    handle.remove()
    handle = model.model.norm.weight.register_hook(lambda grad: grad)
    assert "would not run the hooks" in trainer._graph_obstacle(watched=False)
    handle.remove()
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward
    assert "forwards of their own" in trainer._graph_obstacle(watched=False)
    del model.model.layers[0].mlp.forward
    model.model.layers[0].compile(backend="eager")
    assert "under torch.compile" in trainer._graph_obstacle(watched=False)
    model.model.layers[0]._compiled_call_impl = None
    trainer = TTTTrainer(model, TTTConfig(memory_budget=10**9, **options))
    assert "memory_budget" in trainer._graph_obstacle(watched=False)
    trainer = TTTTrainer(model, TTTConfig(memory_budget=10**9, **options | {"cuda_graph": True}))
    assert trainer._graph_obstacle(watched=False) is None


def test_none_on_the_cpu(monkeypatch):
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    model = small_model()
    with trainer_of(model, "dense").adapt(prompts(0)) as adapted:
        assert adapted.cuda_graph == (
            "steps ran one by one: the model is on cpu, not on a CUDA device"
        )
    with unchanged(model), pytest.raises(ValueError, match="cuda_graph=True, but the model is on"):
        trainer_of(model, "dense", True).adapt(prompts(0))
    with trainer_of(model, "dense", False).adapt(prompts(0)) as adapted:
        assert adapted.cuda_graph == "steps ran one by one: cuda_graph=False"


# ---------------------------------------------------------------------------- that this can fail


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


def test_places_notice_what_moves():
    tensors = [torch.ones(2, 3), torch.ones(4)]
    before = placement.places(tensors)
    assert placement.places(tensors) == before
    assert placement.places([tensors[0].t(), tensors[1]]) != before
    assert placement.places([tensors[0], tensors[1].clone()]) != before
