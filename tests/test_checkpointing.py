"""Activation checkpointing: the same bits with less memory, and nothing is recorded twice."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.test_prefix import Collecting, count_calls
from tests.untouched import unchanged
from ttt_fast import Batch, TTTConfig, TTTTrainer
from ttt_fast.arguments import build_parser, settings
from ttt_fast.scope import decoder_layers

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
STEPS = 3


def trainer_of(model, engine, checkpointing=True, **options):
    options = dict(lr=1e-2, steps=STEPS, momentum=0.9, weight_decay=0.01) | options
    return TTTTrainer(model, TTTConfig(engine=engine, checkpointing=checkpointing, **options))


def run(model, engine, checkpointing, rows=None, **options):
    rows = prompt_ids(9, n_rows=2) if rows is None else rows
    trainer = trainer_of(model, engine, checkpointing, **options)
    with trainer.adapt(rows, deltas="independent") as adapted:
        weights = list(adapted.state_dict(1).values())
        return [adapted.losses, adapted.grad_norms, *weights], adapted.nbytes


def assert_same_bits(model, engine, **options):
    plain, bytes_before = run(model, engine, False, **options)
    with unchanged(model):
        again, bytes_after = run(model, engine, True, **options)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert bytes_after == bytes_before
    assert not any("forward" in vars(module) for module in model.modules())


@ENGINES
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gpt2", "opt", "gemma2", "qwen3"])
def test_the_same_bits(engine, family):
    assert_same_bits(tiny_model(family), engine)


@ENGINES
@pytest.mark.parametrize(
    "options",
    [
        dict(scope="ffn"), dict(scope="query"), dict(scope="norm"), dict(scope="head"),
        dict(layers="-2:"), dict(scope="attention", layers="-1:"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_in_other_scopes_and_types(engine, options, dtype):
    assert_same_bits(tiny_model("llama", dtype, attn_implementation="sdpa"), engine, **options)


@ENGINES
def test_prompts_of_several_lengths(engine):
    rows = [prompt_ids(n, seed=n)[0] for n in (9, 5, 7)]
    assert_same_bits(tiny_model("llama"), engine, rows=rows)


@ENGINES
@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_drops_out_drops_out_again(engine, family):
    model = tiny_model(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        found = torch.random.get_rng_state()
        assert_same_bits(model, engine, dropout=True)
        assert torch.equal(torch.random.get_rng_state(), found)
    # Its randomness matters.
    plain, _ = run(model, engine, True)
    random, _ = run(model, engine, True, dropout=True)
    assert not torch.allclose(plain[0], random[0], rtol=1e-3)


@ENGINES
def test_every_layer_that_the_gradient_enters_runs_twice(engine, monkeypatch):
    model = tiny_model("llama")
    with monkeypatch.context() as patch:
        counts = count_calls(model, patch)
        trainer_of(model, engine, layers="-2:").adapt(prompt_ids(9)).restore()
    # The layer below is computed once for all steps.
    assert counts == {0: 1, 1: 2 * STEPS, 2: 2 * STEPS}
    with monkeypatch.context() as patch:
        counts = count_calls(model, patch)
        trainer_of(model, engine, checkpointing=False).adapt(prompt_ids(9)).restore()
    assert set(counts.values()) == {STEPS}


@ENGINES
def test_layers_save_nothing_for_the_backward(engine):
    model, held = tiny_model("llama", attn_implementation="sdpa"), {}

    def note(tensor):
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    for checkpointing in (True, False):
        trainer = trainer_of(model, engine, checkpointing, scope="ffn", steps=1)
        held.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            trainer.adapt(prompt_ids(24)).restore()
        wide = [tensor for tensor in held.values() if tensor.shape == (1, 24, 48)]
        assert bool(wide) != checkpointing


@ENGINES
def test_own_flags_are_as_they_were(engine):
    """Hugging Face's checkpointing, on in some layers, does not add a third forward."""
    model, calls = tiny_model("llama").train(), []
    model.gradient_checkpointing_enable()
    layers = decoder_layers(model)
    layers[1].gradient_checkpointing = False
    flags = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    real = type(layers[0].self_attn).forward

    def counted(*args, **kwargs):
        calls.append(1)
        return real(layers[0].self_attn, *args, **kwargs)

    layers[0].self_attn.forward = counted
    trainer_of(model, engine, dropout=True).adapt(prompt_ids(9)).restore()
    assert flags == [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    assert flags.count(True) > 0 and len(calls) == 2 * STEPS


@ENGINES
def test_a_layer_that_somebody_watches_is_seen_once_a_step(engine):
    model, seen = tiny_model("llama"), []
    decoder_layers(model)[1].mlp.register_forward_hook(lambda *_: seen.append(1))
    plain, _ = run(model, engine, False)
    seen.clear()
    again, _ = run(model, engine, True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    # In the dense engine each prompt has a forward of its own.
    assert len(seen) == STEPS * (2 if engine == "dense" else 1)


@ENGINES
def test_who_watches_every_module_sees_each_once_a_step(engine):
    model, seen = tiny_model("llama"), []
    inside = decoder_layers(model)[1].mlp
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, output: seen.append(1) if module is inside else None
    )
    try:
        trainer_of(model, engine).adapt(prompt_ids(9)).restore()
    finally:
        handle.remove()
    assert len(seen) == STEPS


@ENGINES
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_after_an_error_everything_is_given_back(engine, where):
    model, calls = tiny_model("llama"), []
    mlp = decoder_layers(model)[1].mlp.down_proj
    real, number = type(mlp).forward, {"forward": 3, "backward": 4}[where]

    def fails(x):
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return real(mlp, x)

    mlp.forward = fails  # a module that does not train
    trainer = trainer_of(model, engine, scope="attention")
    with pytest.raises(KeyboardInterrupt):
        trainer.adapt(prompt_ids(9))
    assert [module for module in model.modules() if "forward" in vars(module)] == [mlp]
    del mlp.forward
    plain, _ = run(model, engine, False, scope="attention")
    again, _ = run(model, engine, True, scope="attention")
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


# ---------------------------------------------------------------------------- when


def test_auto_is_for_what_does_not_fit():
    model = tiny_model("llama", attn_implementation="sdpa", num_hidden_layers=8)
    ids = prompt_ids(60)
    whole = trainer_of(model, "dense", "auto", scope="norm").plan(1, 60)
    again = trainer_of(model, "dense", True, scope="norm").plan(1, 60)
    assert not whole.checkpointing and again.checkpointing
    assert "computed again" in again.reason and "computed again" not in whole.reason
    needed, least = whole.predicted_bytes["dense"], again.predicted_bytes["dense"]
    assert 3 * least < needed
    assert again.predicted_ms["dense"] > whole.predicted_ms["dense"]
    results = []
    for budget in (needed, needed - 1, least):
        trainer = trainer_of(model, "dense", "auto", scope="norm", memory_budget=budget)
        with trainer.adapt(ids) as adapted:
            assert adapted.choice.checkpointing == (budget < needed)
            results.append(adapted.losses)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    tight = dict(scope="norm", memory_budget=least - 1)
    with pytest.raises(ValueError, match="with checkpointing need"):
        trainer_of(model, "dense", "auto", **tight).adapt(ids)
    without = dict(scope="norm", memory_budget=needed - 1)
    with pytest.raises(ValueError, match="What would fit: checkpointing=True"):
        trainer_of(model, "dense", False, **without).adapt(ids)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("auto", "auto")])
def test_on_the_command_line(text, value):
    args = build_parser().parse_args(["adapt", "demo", "--checkpointing", text])
    assert type(settings(args)["checkpointing"]) is type(value)
    assert TTTConfig(**settings(args)).checkpointing == value
    with pytest.raises(ValueError, match="checkpointing='often' is unknown"):
        TTTConfig(checkpointing="often")


def test_a_model_without_a_stack_of_layers():
    class Plain(Collecting):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(*self.layers)

    model = Plain()
    with pytest.raises(ValueError, match="no stack of decoder layers"):
        trainer_of(model, "dense", scope=["head.weight"]).adapt(prompt_ids(9))
    trainer_of(model, "dense", "auto", scope=["head.weight"]).adapt(prompt_ids(9)).restore()


@ENGINES
def test_a_cache_in_front_is_refused(engine):
    model = tiny_model("llama")
    with torch.no_grad():
        cache = model(prompt_ids(5), past_key_values=DynamicCache(), use_cache=True).past_key_values
    batch = Batch(prompt_ids(9), past_key_values=cache)
    with unchanged(model), trainer_of(model, engine).begin() as session:
        with pytest.raises(ValueError, match="past_key_values twice"):
            session.step(batch)
