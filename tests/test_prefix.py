"""Layers that nothing adapted reaches are computed once for a batch, and nothing else changes."""

import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood
from ttt_fast.batch import complete_batch
from ttt_fast.scope import decoder_layers

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
STEPS = 4


def count_calls(model, monkeypatch):
    """How often each decoder layer computes, by its index."""
    counts = {}
    for i, layer in enumerate(decoder_layers(model)):
        attention = next(m for n, m in layer.named_children() if "attn" in n or "attention" in n)
        real = type(attention).forward
        counts[i] = 0

        def counted(*args, real=real, attention=attention, i=i, **kwargs):
            counts[i] += 1
            return real(attention, *args, **kwargs)

        monkeypatch.setitem(vars(attention), "forward", counted)
    return counts


def run(model, engine, rows=None, **options):
    rows = prompt_ids(9, n_rows=2) if rows is None else rows
    config = TTTConfig(lr=1e-2, steps=STEPS, momentum=0.9, engine=engine, **options)
    with TTTTrainer(model, config).adapt(rows, deltas="independent") as adapted:
        return adapted.losses.clone(), adapted.grad_norms.clone(), model(rows).logits.detach()


def parts_of(session, batch):
    return session.parts(complete_batch(batch, session.model, 1))


@ENGINES
@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        (dict(layers="-1:"), 2),
        (dict(layers="1:"), 1),
        (dict(scope="ffn", layers="-2:"), 1),
        (dict(scope="attention"), 0),
        (dict(scope="head"), 3),
        (dict(scope=["model.norm"]), 3),
        (dict(scope="all"), 0),
        (dict(scope="embedding"), 0),
    ],
    ids=str,
)
def test_skips_what_lies_below(engine, options, skipped, monkeypatch):
    model = tiny_model("llama")
    rows = prompt_ids(9)
    with monkeypatch.context() as patch:
        counts = count_calls(model, patch)
        config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, **options)
        # Attention's forward on the instance is ours; its linears are what the engines take over.
        TTTTrainer(model, config).adapt(rows).restore()
    expected = {i: 1 if i < skipped else STEPS for i in range(3)}
    assert counts == expected


@ENGINES
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "qwen3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_as_with_every_layer(engine, family, dtype, monkeypatch):
    model = tiny_model(family, dtype)
    n_layers = len(decoder_layers(model))
    assert n_layers > 1
    options = dict(layers=f"{n_layers - 1}:")
    with unchanged(model):
        ours = run(model, engine, **options)
    monkeypatch.setattr("ttt_fast.engines.prefix.decoder_layers", lambda model: [])
    for ours_, every in zip(ours, run(model, engine, **options), strict=True):
        assert torch.equal(ours_, every)


def test_a_tied_embedding_that_adapts_leaves_no_prefix(monkeypatch):
    model = tiny_model("llama_tied")
    with monkeypatch.context() as patch:
        counts = count_calls(model, patch)
        TTTTrainer(model, TTTConfig(lr=1e-2, steps=STEPS, scope="head")).adapt(prompt_ids(9))
    assert set(counts.values()) == {STEPS}


@ENGINES
def test_other_rows_are_computed_anew(engine):
    model = tiny_model("llama")
    config = TTTConfig(lr=1e-2, steps=4, engine=engine, layers="-1:")
    batches = [Batch(prompt_ids(7, seed=seed)) for seed in (0, 1, 0, 1)]
    losses = []
    for fresh in (False, True):
        session = TTTTrainer(model, config).begin()
        parts = {}
        for i, batch in enumerate(batches):
            if fresh:
                session.step(batch)
            else:
                # The same rows as an object that came before, or one that did not.
                complete = parts.setdefault(i % 2, parts_of(session, batch))
                session.step_parts(complete)
        with session.end() as adapted:
            losses.append(adapted.losses)
    assert torch.equal(*losses)


@ENGINES
def test_rows_that_were_written_to_are_other_rows(engine):
    model = tiny_model("llama")
    config = TTTConfig(lr=1e-2, steps=2, engine=engine, layers="-1:")
    losses = []
    for in_place in (True, False):
        ids, other = prompt_ids(7), prompt_ids(7, seed=2)
        assert not torch.equal(ids, other)
        session = TTTTrainer(model, config).begin()
        parts = parts_of(session, Batch(ids))
        session.step_parts(parts)
        if in_place:
            rows = parts[0][1]
            rows.input_ids.copy_(other)
            rows.labels.copy_(other)
        else:
            parts = parts_of(session, Batch(other))
        session.step_parts(parts)
        with session.end() as adapted:
            losses.append(adapted.losses)
    assert torch.equal(*losses)


def test_nothing_is_kept_when_the_session_is_over():
    session = TTTTrainer(tiny_model("llama"), TTTConfig(layers="-1:")).begin()
    parts = parts_of(session, Batch(prompt_ids(7)))  # its owner may go on having them
    session.step_parts(parts)
    (kept,) = session._prefix._kept.values()
    hidden = weakref.ref(kept.hidden)
    del kept
    with session.end():
        assert hidden() is None


@ENGINES
@pytest.mark.parametrize("where", ["layer", "inside"])
def test_a_layer_that_somebody_watches_runs_every_time(engine, where):
    model, seen = tiny_model("llama"), []
    layer = model.model.layers[0]
    watched = layer if where == "layer" else layer.mlp.down_proj
    watched.register_forward_hook(lambda *_: seen.append(1))
    run(model, engine, prompt_ids(7), layers="-1:")
    # Each step, and once more to look at the adapted model.
    assert len(seen) == STEPS + 1


@ENGINES
def test_whoever_begins_to_watch_later_sees_every_step_from_then_on(engine):
    model, seen = tiny_model("llama"), []
    layer = model.model.layers[0]

    def watch(report):
        if report.step == 2:
            layer.mlp.register_forward_hook(lambda *_: seen.append(1))

    config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, layers="-1:")
    TTTTrainer(model, config).adapt(prompt_ids(7), on_step=watch).restore()
    assert len(seen) == STEPS - 2


@ENGINES
def test_who_watches_every_module_sees_every_step(engine):
    model, seen = tiny_model("llama"), []
    inside = model.model.layers[0].mlp
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(1) if module is inside else None
    )
    try:
        run(model, engine, prompt_ids(7), layers="-1:")
    finally:
        handle.remove()
    assert len(seen) == STEPS + 1


class Adding(nn.Module):
    """A layer that adds to what it is given, from some pass on in place."""

    def __init__(self, in_place_from=math.inf):
        super().__init__()
        self.proj, self.in_place_from, self.passes = nn.Linear(8, 8), in_place_from, 0

    def forward(self, hidden):
        self.passes += 1
        more = self.proj(2 * hidden)
        return hidden.add_(more) if self.passes >= self.in_place_from else hidden + more


class Stack(nn.Module):
    """A language model whose last layer may write into what the one below gave."""

    def __init__(self, in_place_from):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(101, 8)
        self.layers = nn.ModuleList([Adding(), Adding(), Adding(in_place_from)])
        self.head = nn.Linear(8, 101)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        hidden = self.embed(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        return SimpleNamespace(logits=self.head(hidden))


@ENGINES
def test_a_layer_that_writes_into_what_the_last_frozen_one_gave(engine):
    losses = []
    for in_place_from in (math.inf, 1, 2):
        trainer = TTTTrainer(
            Stack(in_place_from),
            TTTConfig(lr=1e-1, steps=STEPS, engine=engine, scope=["layers.2.proj.weight"]),
        )
        with trainer.adapt(prompt_ids(7)) as adapted:
            losses.append(adapted.losses)
    assert torch.equal(losses[0], losses[1]) and torch.equal(losses[0], losses[2])


class Collecting(nn.Module):
    """A language model that returns what each layer gives, by a loop of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.config = PretrainedConfig(output_hidden_states=True)
        self.embed = nn.Embedding(101, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, 101)

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        hidden = [self.embed(input_ids)]
        for layer in self.layers:
            hidden.append(layer(hidden[-1]).tanh())
        return SimpleNamespace(logits=self.head(hidden[-1]), hidden_states=hidden)


@ENGINES
@pytest.mark.parametrize("kind", ["transformers", "own loop"])
def test_hidden_states_of_each_layer_are_those_of_the_layer(engine, kind):
    """Of a model that returns them all, the objective may use any."""
    model, seen = Collecting(), []
    if kind == "transformers":
        model = tiny_model("llama")
        model.config.output_hidden_states = True

    def objective(outputs, batch):
        seen.append(outputs.hidden_states[1].detach().clone())
        return negative_log_likelihood(outputs, batch)

    options = dict(scope=["head.weight"]) if kind == "own loop" else dict(layers="-1:")
    config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, **options)
    TTTTrainer(model, config, objective=objective).adapt(prompt_ids(7)).restore()
    assert len(seen) == STEPS and all(torch.equal(seen[0], each) for each in seen)


@ENGINES
@pytest.mark.parametrize(
    ("family", "name"), [("llama", "attentions"), ("qwen2_moe", "router_logits")]
)
def test_what_else_layers_show_is_there_at_every_step(engine, family, name):
    model, seen = tiny_model(family), []
    setattr(model.config, f"output_{name}", True)

    def objective(outputs, batch):
        seen.append([each.detach().clone() for each in getattr(outputs, name)])
        return negative_log_likelihood(outputs, batch)

    config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, scope="query", layers="-1:")
    TTTTrainer(model, config, objective=objective).adapt(prompt_ids(7)).restore()
    assert [len(each) for each in seen] == [3] * STEPS
    assert all(torch.equal(seen[0][0], each[0]) for each in seen)


@ENGINES
def test_with_dropout_every_layer_runs(engine, monkeypatch):
    model = tiny_model("llama")
    with monkeypatch.context() as patch:
        counts = count_calls(model, patch)
        config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, layers="-1:", dropout=True)
        TTTTrainer(model, config).adapt(prompt_ids(7)).restore()
    assert set(counts.values()) == {STEPS}


@ENGINES
def test_layers_are_given_back_after_an_error(engine):
    model = tiny_model("llama")

    def fails_in_third_step(report):
        if report.step == 3:
            raise KeyboardInterrupt

    config = TTTConfig(lr=1e-2, steps=STEPS, engine=engine, layers="-1:")
    with unchanged(model), pytest.raises(KeyboardInterrupt):
        TTTTrainer(model, config).adapt(prompt_ids(7), on_step=fails_in_third_step)
    assert not any("forward" in vars(module) for module in model.modules())
