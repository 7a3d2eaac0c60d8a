"""Keys and values of the prompt are kept between generations where nothing changes them."""

import pytest
import torch
from transformers import GenerationConfig

from tests.families import FAMILIES, tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer, select_parameters
from ttt_fast.keys_values import KeptPrompts, changed_by, keys_values

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
GREEDY = dict(max_new_tokens=6, do_sample=False, min_new_tokens=6)
EXACT = {
    "head": dict(scope="head"),
    "final norm": dict(scope=["model.norm"]),
    "ffn of the last layer": dict(scope="ffn", layers="-1:"),
    "query of the last layer": dict(scope="query", layers="-1:"),
}
CHANGING = {
    "all": dict(scope="all"),
    "ffn": dict(scope="ffn", layers="-2:"),
    "attention of the last layer": dict(scope="attention", layers="-1:"),
    "norms of the last layer": dict(scope="norm", layers="-1:"),
}


def adapt(model, engine, n_prompts=1, **options):
    trainer = TTTTrainer(model, TTTConfig(steps=3, lr=0.3, engine=engine, **options))
    rows = [prompt_ids(n, seed=n)[0] for n in (9, 5, 7)[:n_prompts]]
    return trainer.adapt(rows, deltas="independent")


def cache_of(model):
    ids = prompt_ids(9)
    everything = frozenset({"input_ids", "past_key_values", "use_cache", "position_ids"})
    layers = keys_values(model, ids, torch.ones_like(ids), everything).layers
    return [tensor for layer in layers for tensor in (layer.keys, layer.values)]


def test_a_model_that_gives_no_cache_is_not_said_to_have_reused_one(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("ttt_fast.keys_values.keys_values", lambda *args: None)
    with adapt(model, "dense", scope="head") as adapted:
        first = adapted.generate(**GREEDY)
        assert torch.equal(adapted.generate(**GREEDY), first)
        assert adapted.reused_keys_values is False


@ENGINES
@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("options", EXACT.values(), ids=list(EXACT))
def test_the_same_tokens_as_from_the_start(options, n_prompts, engine, monkeypatch):
    model, lengths = tiny_model("llama", attn_implementation="sdpa"), []
    with adapt(model, engine, n_prompts, **options) as adapted:
        model.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
            with_kwargs=True,
        )
        assert adapted.reused_keys_values is None
        first = adapted.generate(**GREEDY)
        assert adapted.reused_keys_values is False and max(lengths) > 1
        lengths.clear()
        second = adapted.generate(**GREEDY)
        assert adapted.reused_keys_values is True and set(lengths) == {1}
        assert "prompt: reused" in adapted.report()
        monkeypatch.setattr(KeptPrompts, "options", lambda self, *args: args[-1])
        expected = adapted.generate(**GREEDY)
        assert torch.equal(first, expected) and torch.equal(second, expected)


@ENGINES
@pytest.mark.parametrize("options", CHANGING.values(), ids=list(CHANGING))
def test_what_changes_them_is_computed_again(options, engine):
    model = tiny_model("llama", attn_implementation="sdpa")
    with adapt(model, engine, **options) as adapted:
        for _ in range(2):
            adapted.generate(**GREEDY)
            assert adapted.reused_keys_values is False
        assert "prompt: computed with the adapted weights" in adapted.report()


def test_earlier_steps_go_on_from_the_same():
    model = tiny_model("llama", attn_implementation="sdpa")
    with adapt(model, "factored", scope="head") as adapted:
        answers = []
        for step in range(4):
            with adapted.at(step):
                answers.append(adapted.generate(**GREEDY))
                assert adapted.reused_keys_values == (step > 0)
        assert not torch.equal(answers[0], answers[3])
        # Other rows, or another way to generate, are left to Hugging Face; so is a second time.
        adapted.generate(prompt_ids(9), **GREEDY)
        assert adapted.reused_keys_values is False
        adapted.generate(num_beams=2, **GREEDY)
        assert adapted.reused_keys_values is False
        adapted.detach()
        adapted.attach()
        assert torch.equal(adapted.generate(**GREEDY), answers[3])
        assert adapted.reused_keys_values is False


@ENGINES
def test_what_given_settings_leave_open_is_the_models_own(engine):
    """Beams, here: more rows than there are in what was kept."""
    model = tiny_model("llama", attn_implementation="sdpa")
    model.generation_config.num_beams = 3
    settings = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=0)
    with adapt(model, engine, scope="head") as adapted:
        expected = adapted.generate(prompt_ids(9, seed=9), generation_config=settings)
        for _ in range(2):
            assert torch.equal(adapted.generate(generation_config=settings), expected)
            assert adapted.reused_keys_values is False


def test_the_cache_that_gemmas_own_settings_name_is_the_usual_one():
    model = tiny_model("gemma3", attn_implementation="sdpa")
    model.generation_config.cache_implementation = "hybrid"
    with adapt(model, "factored", scope=["model.norm"]) as adapted:
        first = adapted.generate(**GREEDY)
        assert torch.equal(adapted.generate(**GREEDY), first)
        assert adapted.reused_keys_values is True


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_to_leave_them_alone_does(family):
    model, kept = tiny_model(family), 0
    before = cache_of(model)
    for selection in select_parameters(model, "all"):
        if changed_by(model, [selection]) is not None:
            continue
        with torch.no_grad():
            selection.param.mul_(1.5).add_(0.1)
        kept += 1
    assert kept > 0
    assert all(torch.equal(a, b) for a, b in zip(before, cache_of(model), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.k_proj.weight", "model.layers.2.self_attn.v_proj.weight",
        "model.layers.2.input_layernorm.weight", "model.layers.1.mlp.down_proj.weight",
        "model.embed_tokens.weight",
    ],
)  # fmt: skip
def test_the_control_that_others_do_change_them(name):
    model = tiny_model("llama")
    before = cache_of(model)
    (selection,) = [s for s in select_parameters(model, "all") if s.name == name]
    assert changed_by(model, [selection]) == name
    with torch.no_grad():
        selection.param.mul_(1.5).add_(0.1)
    assert not all(torch.equal(a, b) for a, b in zip(before, cache_of(model), strict=True))


def test_a_tied_head_changes_them():
    model = tiny_model("llama_tied")
    assert changed_by(model, select_parameters(model, "head")) == "model.embed_tokens.weight"
