"""What autograd saves in a step: the bytes of a stated formula for each scope, and nothing else."""

import weakref

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood
from ttt_fast.batch import complete_batch
from ttt_fast.engines import cost, policy
from ttt_fast.scope import decoder_layers

T = 24
ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
SCOPES = {
    "all": dict(scope="all"),
    "ffn": dict(scope="ffn"),
    "attention": dict(scope="attention"),
    "query": dict(scope="query"),
    "norm": dict(scope="norm"),
    "last two layers": dict(layers="-2:"),
    "attention of the last layer": dict(scope="attention", layers="-1:"),
    "head": dict(scope="head"),
}


def saved_by_a_step(model, **options):
    """Bytes of what the second step saves, weights aside; a storage counts once."""
    trainer = TTTTrainer(model, TTTConfig(steps=2, lr=1e-2, **options))
    weights = {param.untyped_storage().data_ptr() for param in model.parameters()}
    saved = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            # The tensor itself, so that its memory is not used again.
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with trainer.begin(1, T) as session:
        parts = session.parts(complete_batch(Batch(prompt_ids(T)), model, 1))
        session.step_parts(parts)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            session.step_parts(parts)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def stated(model, engine, **options):
    """The formula: what the layers save, and the gradient of the logits."""
    trainer = TTTTrainer(model, TTTConfig(steps=2, **options))
    work = policy.workload(model, trainer.selections, trainer.config, 1, T)
    return T * (cost.saved_bytes(work, engine) + work.itemsize * work.vocabulary)


def shared_tables(model):
    """Bytes that do not grow with the layers: rotary tables, the labels' weights, norm weights."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = model.dtype.itemsize
    norms = sum(p.numel() for p in model.parameters() if p.ndim == 1)
    return 2 * T * head_dim * itemsize + 8 * (T + 1) + 4 * norms


@ENGINES
@pytest.mark.parametrize("options", SCOPES.values(), ids=list(SCOPES))
@pytest.mark.parametrize("family", ["llama", "llama_tied", "qwen2"])
def test_bytes_are_those_of_the_formula(family, options, engine):
    model = tiny_model(family, attn_implementation="sdpa")
    saved = saved_by_a_step(model, engine=engine, **options)
    expected = stated(model, engine, **options)
    assert expected <= saved <= expected + shared_tables(model)


@ENGINES
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("scope", ["ffn", "query"])
def test_in_bfloat16_and_in_other_families(family, scope, engine):
    model = tiny_model(family, torch.bfloat16, attn_implementation="sdpa")
    saved = saved_by_a_step(model, engine=engine, scope=scope)
    assert saved == pytest.approx(stated(model, engine, scope=scope), rel=0.1)


def test_the_formula_by_hand():
    model = tiny_model("llama", attn_implementation="sdpa")
    norm, attention, mlp = 4 * 32 + 4, 4 * (32 + 16 + 16 + 32) + 4 * 4, 4 * 2 * 48
    logits = 4 * 101
    # The final norm; in the lowest layer of these scopes, what lies above the lowest weights.
    whole = 2 * (2 * norm + attention + mlp) + norm + logits
    by_hand = {
        "ffn": whole + mlp,
        "attention": whole + attention + norm + mlp,
        "query": whole + attention + norm + mlp,
        "norm": whole + norm + attention + norm + mlp,
    }
    for scope, expected in by_hand.items():
        assert stated(model, "factored", scope=scope) == T * expected, scope
    # The dense engine keeps inputs: of q, k and v one, attention's own result for o; those of MLPs.
    assert stated(model, "dense", scope="attention") == T * (by_hand["attention"] + 3 * 4 * 32)
    assert stated(model, "dense", scope="query") == T * (by_hand["query"] + 3 * 4 * 32)
    assert stated(model, "dense", scope="ffn") == T * (by_hand["ffn"] + 3 * 4 * (32 + 48))
    assert stated(model, "dense", scope="norm") == T * by_hand["norm"]


@ENGINES
def test_frozen_layers_below_cost_nothing(engine):
    shallow, deep = (
        tiny_model("llama", attn_implementation="sdpa", num_hidden_layers=n) for n in (3, 6)
    )
    saved = [saved_by_a_step(m, engine=engine, layers="-2:") for m in (shallow, deep)]
    assert saved[0] == saved[1]
    assert saved_by_a_step(deep, engine=engine) > 1.8 * saved_by_a_step(shallow, engine=engine)


def test_the_count_shows_what_is_saved_without_need():
    """Stock code, which keeps act(gate) and the inputs of frozen norms as they are in float32."""
    model = tiny_model("llama", torch.bfloat16, attn_implementation="sdpa")
    options = dict(engine="dense", scope="attention")
    stock = saved_by_a_step(model, rounding="torch", **options)
    assert stock > 1.2 * (stated(model, **options) + shared_tables(model))
    # And the formula knows of it; it leaves the loss' log-softmax in float32 out.
    own = stated(model, rounding="torch", **options)
    assert own <= stock <= own + shared_tables(model) + 4 * T * 101


@pytest.mark.parametrize(("engine", "kept"), [("factored", False), ("dense", True)])
def test_inputs_that_are_among_the_factors_are_not_kept_twice(engine, kept):
    model, seen = tiny_model("llama"), []
    # The product of gate and up, which nothing but this weight's gradient needs.
    downs = [layer.mlp.down_proj for layer in decoder_layers(model)]
    for down in downs:
        down.register_forward_pre_hook(lambda _, args: seen.append(weakref.ref(args[0])))
    alive = []

    def objective(outputs, batch):
        alive.append([ref() is not None for ref in seen])
        seen.clear()
        return negative_log_likelihood(outputs, batch)

    config = TTTConfig(steps=2, engine=engine, scope="ffn")
    TTTTrainer(model, config, objective=objective).adapt(prompt_ids(T)).restore()
    assert alive == 2 * [3 * [kept]]
