"""kv="frozen": what generate goes on from, and what a run is said to need."""

import copy

import pytest
import torch
from transformers import DynamicCache

from tests.frozen_cases import CONTEXT, T, fp64, same_bits, stored, trainer_of
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import Adaptation, Batch, TTTConfig, TTTTrainer
from ttt_fast.engines import policy

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
GREEDY = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False)
OPTIONS = dict(steps=3, lr=2.0, span_tokens=6)


def tuned(model, adapted, delta=0):
    """A model of its own with a delta's weights."""
    other = copy.deepcopy(adapted.merge(delta=delta, copy=True))
    other.load_state_dict(adapted.state_dict(delta))
    return other


@torch.no_grad()
def answer(adapted_model, original, ids):
    """Greedy: the prompt's keys and values from one model, tokens from another."""
    cache = DynamicCache(config=original.config)
    original(ids[:, :-1], past_key_values=cache, use_cache=True)
    rows = ids
    for _ in range(GREEDY["max_new_tokens"]):
        logits = adapted_model(rows[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
        logits[:, 2] = -torch.inf  # the end is not allowed
        rows = torch.cat([rows, logits.argmax(-1)[:, None]], 1)
    return rows


@ENGINES
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "opt"])
def test_an_answer_goes_on_from_the_frozen_ones(family, engine):
    model = fp64(family)
    original = copy.deepcopy(model)
    with trainer_of(model, engine, **OPTIONS).adapt(CONTEXT) as adapted:
        other = tuned(model, adapted)
        assert adapted.reused_keys_values is None
        ours = adapted.generate(**GREEDY)
        assert torch.equal(ours, answer(other, original, CONTEXT))
        assert adapted.reused_keys_values is True
        assert "those of the unadapted weights (kv='frozen')" in adapted.report()
        # What was generated is not in the way of the next.
        assert torch.equal(adapted.generate(**GREEDY), ours)
        # The controls: they matter, and given ids are computed with the adapted weights.
        again = adapted.generate(CONTEXT, **GREEDY)
        assert adapted.reused_keys_values is False
        assert torch.equal(again, answer(other, other, CONTEXT))
    assert not torch.equal(answer(other, original, CONTEXT), answer(original, original, CONTEXT))


def test_the_control_that_frozen_ones_matter():
    """In some family another answer follows from keys and values of the adapted weights."""
    found = 0
    for family in ("llama", "qwen2", "mistral", "gpt_neox"):
        model = fp64(family)
        with trainer_of(model, "factored", **OPTIONS).adapt(CONTEXT) as adapted:
            other = tuned(model, adapted)
        found += not torch.equal(answer(other, model, CONTEXT), answer(other, other, CONTEXT))
    assert found > 0


@ENGINES
def test_answers_of_several_prompts_are_those_of_each(engine):
    model = fp64("qwen2")
    prompts = [prompt_ids(n, seed=n)[0] for n in (40, 5, 23)]
    trainer = trainer_of(model, engine, **OPTIONS)
    expected = []
    for ids in prompts:
        with trainer.adapt(ids) as adapted:
            expected.append(adapted.generate(**GREEDY)[0, -8:])
    with trainer.adapt(prompts, deltas="independent") as adapted:
        assert torch.equal(adapted.generate(**GREEDY)[:, -8:], torch.stack(expected))


@ENGINES
def test_arguments_that_cannot_go_on_are_refused(engine):
    model = fp64()
    with trainer_of(model, engine, **OPTIONS).adapt(CONTEXT) as adapted:
        with pytest.raises(ValueError, match="got max_new_tokens, num_beams; with kv='frozen'"):
            adapted.generate(num_beams=2, max_new_tokens=3)
        adapted.generate(CONTEXT, num_beams=2, max_new_tokens=3)
        model.generation_config.num_beams = 2
        with pytest.raises(ValueError, match="nor the model's own may ask for beams"):
            adapted.generate(**GREEDY)
        model.generation_config.num_beams = None
        output = adapted.generate(**GREEDY, return_dict_in_generate=True, output_scores=True)
        assert torch.equal(output.sequences, adapted.generate(**GREEDY))


def test_after_a_file_and_after_coming_back(tmp_path):
    model = fp64()
    trainer = trainer_of(model, "factored", **OPTIONS)
    with trainer.adapt(CONTEXT) as adapted:
        expected, first = adapted.generate(**GREEDY), stored(adapted._kept.frozen)
        adapted.save(tmp_path / "prompt.safetensors")
        adapted.detach()
        assert adapted._kept.frozen is None
        adapted.attach()
        with adapted.at(1):
            adapted.generate(**GREEDY)
        assert same_bits(stored(adapted._kept.frozen), first)
        assert torch.equal(adapted.generate(**GREEDY), expected)
    with unchanged(model), Adaptation.load(tmp_path / "prompt.safetensors", model) as loaded:
        assert loaded.config.kv == "frozen"
        assert torch.equal(loaded.generate(**GREEDY), expected)
        assert same_bits(stored(loaded._kept.frozen), first)


# ---------------------------------------------------------------------------- what it needs


@ENGINES
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt2", "opt"])
def test_the_bytes_of_keys_and_values_are_known(family, engine):
    model = fp64(family)
    trainer = trainer_of(model, engine, **OPTIONS)
    work = policy.workload(model, trainer.selections, trainer.config, 2, T)
    sizes = policy.dense_bytes(work) if engine == "dense" else policy.factored_bytes(work)
    with trainer.adapt([CONTEXT[0], CONTEXT[0].flip(0)], deltas="independent") as adapted:
        assert sizes["keys_values"] == adapted._kept.frozen.nbytes
    assert work.tokens == 7 and work.context == T


@ENGINES
def test_a_budget_counts_them(engine):
    model = fp64()
    options = OPTIONS | dict(checkpointing=False)
    enough = trainer_of(model, engine, **options).plan(1, T).predicted_bytes[engine]
    trainer_of(model, engine, memory_budget=enough, **options).adapt(CONTEXT).restore()
    with pytest.raises(ValueError, match=r"7 tokens and 3 steps on spans of 40 .*keys_values 30"):
        trainer_of(model, engine, memory_budget=enough - 1, **options).adapt(CONTEXT)


def test_attention_that_copies_is_counted():
    sizes = []
    for attention in ("sdpa", "eager"):
        model = fp64(attention=attention)
        trainer = trainer_of(model, **OPTIONS)
        work = policy.workload(model, trainer.selections, trainer.config, 4, T)
        sizes.append(policy.factored_bytes(work, 2)["keys_values"])
        assert sum(policy.factored_bytes(work, 2).values()) > sum(
            policy.factored_bytes(work, 1).values()
        )
    # Two rows at once, keys and values of 4 heads of 8 in 3 layers.
    assert sizes[1] - sizes[0] == 2 * T * 2 * 3 * 4 * 8 * 8


def test_a_longer_context_costs_attention_and_bytes_only():
    model = fp64()
    trainer = trainer_of(model, **OPTIONS)
    short, long = trainer.plan(1, 30), trainer.plan(1, 3000)
    for engine in ("dense", "factored"):
        assert long.predicted_ms[engine] > short.predicted_ms[engine]
        more = long.predicted_bytes[engine] - short.predicted_bytes[engine]
        assert more == 2970 * 3 * 2 * 2 * 8 * 8
    exact = TTTTrainer(model, TTTConfig(scope="query", steps=3))
    assert exact.plan(1, 3000).predicted_ms["dense"] > long.predicted_ms["dense"]


def test_a_session_takes_spans_whatever_its_settings():
    """The setting is about what adapt does; whoever prefills says what a step sees."""
    model = fp64()
    trainer = TTTTrainer(model, TTTConfig(scope="query", engine="factored"))
    with trainer.begin() as steps:
        frozen = steps.prefill(Batch(CONTEXT))
        report = steps.step(frozen.spans([(3, 9), (20, 33)]))
        assert report.losses.isfinite().all()
        with steps.end() as adapted, pytest.raises(ValueError, match="pass input_ids"):
            adapted.generate(**GREEDY)
