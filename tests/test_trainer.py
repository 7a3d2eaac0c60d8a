"""What the trainer takes, and what can be done with an adaptation."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from tests.families import FAMILIES, tiny_model
from tests.loops import distance, prompt_ids, row_loss, sgd_loop, twin, weights
from tests.trainer_cases import GENERATE, IDS, OPTIONS, padded, trainer_of
from tests.untouched import unchanged
from ttt_fast import Batch, TTTConfig, TTTTrainer, negative_log_likelihood

PAD_CASES = [
    *[(family, "eager") for family in FAMILIES],
    *[(family, "sdpa") for family in FAMILIES if family not in ("gemma2",)],
]


class Tokenizer:
    """One token a character."""

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(c) % 90 for c in text], "attention_mask": [1] * len(text)}


def adapted_weights(model, prompt, **call):
    with trainer_of(model, tokenizer=Tokenizer()).adapt(prompt, **call) as adapted:
        return weights(model), adapted.losses


def assert_same(left, right, rtol=0.0, atol=0.0):
    for name, value in left.items():
        assert torch.allclose(value, right[name], rtol=rtol, atol=atol), name


# ---------------------------------------------------------------------------- prompts


@pytest.mark.parametrize(
    "prompt",
    [
        IDS[0],
        IDS.int(),
        IDS.tolist(),
        IDS[0].tolist(),
        [IDS[0]],
        [IDS],
        (IDS[0].numpy(),),
        IDS.numpy(),
        {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)},
        BatchEncoding({"input_ids": IDS[0].tolist(), "attention_mask": [1] * 7}),
        BatchEncoding({"input_ids": IDS.tolist(), "token_type_ids": "not looked at"}),
        BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones(1, 7).bool()}),
    ],
    ids=range(12),
)
def test_every_way_to_pass_a_prompt(prompt):
    model = tiny_model("llama")
    expected, _ = adapted_weights(model, IDS)
    assert_same(adapted_weights(model, prompt)[0], expected)


def test_text_needs_a_tokenizer():
    model = tiny_model("llama")
    ids = torch.tensor(Tokenizer()("some text")["input_ids"])
    expected, _ = adapted_weights(model, ids)
    assert_same(adapted_weights(model, "some text")[0], expected)
    with pytest.raises(ValueError, match="no tokenizer"):
        trainer_of(model).adapt("some text")
    with trainer_of(model, tokenizer=Tokenizer()).adapt(["some text"]) as adapted:
        assert torch.equal(adapted.loss("some text"), adapted.loss(ids))


def test_texts_of_several_lengths():
    model = tiny_model("gpt2", torch.float64)
    texts = ["one", "and another", "x y z"]
    trainer = trainer_of(model, tokenizer=Tokenizer())
    with trainer.adapt(texts, deltas="independent") as adapted:
        together = adapted.losses
    for n, text in enumerate(texts):
        with trainer.adapt(text) as adapted:
            assert torch.allclose(adapted.losses[0], together[n], rtol=1e-10)


def test_an_encoding_that_was_not_padded():
    model = tiny_model("llama", torch.float64)
    rows = [IDS[0].tolist(), IDS[0, :4].tolist()]
    encoding = BatchEncoding({"input_ids": rows, "attention_mask": [[1] * 7, [1] * 4]})
    expected, losses = adapted_weights(model, rows, deltas="shared")
    assert_same(adapted_weights(model, encoding, deltas="shared")[0], expected)
    encoding["attention_mask"][1][0] = 0
    with pytest.raises(ValueError, match="attention_mask has rows of different lengths"):
        trainer_of(model).adapt(encoding, deltas="shared")
    with pytest.raises(ValueError, match="labels cannot go with prompts of different lengths"):
        trainer_of(model).adapt(rows, labels=torch.zeros(2, 7).long(), deltas="shared")


def test_labels_weights_and_mask_of_one_row():
    model = tiny_model("llama")
    labels = torch.where(torch.arange(7) < 4, -100, IDS)
    expected, _ = adapted_weights(model, IDS, labels=labels)
    assert_same(adapted_weights(model, IDS[0], labels=labels[0])[0], expected)
    ones = (torch.arange(7) >= 4).float()
    assert_same(adapted_weights(model, IDS, token_weights=ones)[0], expected, rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------- several prompts


def test_independent_equals_one_by_one():
    """The same rows, so the same numbers to the bit, except for what a batched forward rounds."""
    model = tiny_model("llama_tied")
    rows = prompt_ids(8, n_rows=3)
    trainer = trainer_of(model)
    with trainer.adapt(rows, deltas="independent") as adapted:
        assert adapted.losses.shape == adapted.grad_norms.shape == (3, 3)
        assert adapted.steps.tolist() == [3, 3, 3]
        states = [adapted.state_dict(delta) for delta in range(3)]
        losses, own = adapted.losses, adapted.loss()
    for n in range(3):
        with trainer.adapt(rows[n]) as alone:
            assert torch.equal(alone.losses[0], losses[n])
            assert torch.equal(alone.loss()[0], own[n])
            assert_same(states[n], weights(model))


def test_shared_is_the_mean_over_rows():
    model = tiny_model("llama", torch.float64)
    rows = prompt_ids(8, n_rows=2)
    with trainer_of(model).begin() as session:
        for _ in range(3):
            session.step(Batch(rows))
        expected = weights(model)
    assert_same(adapted_weights(model, rows, deltas="shared")[0], expected)
    row_weights = torch.tensor([1.0, 0.0])
    only_first, _ = adapted_weights(model, rows, deltas="shared", row_weights=row_weights)
    assert_same(only_first, adapted_weights(model, rows[0])[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 1)])
def test_padding_of_a_prompt_on_its_own_changes_no_bit(left, right):
    model = tiny_model("gemma3")
    ids, mask = padded(IDS, left, right)
    expected, losses = adapted_weights(model, IDS)
    got, got_losses = adapted_weights(model, ids, attention_mask=mask)
    assert torch.equal(got_losses, losses)
    assert_same(got, expected)


@pytest.mark.parametrize(("family", "attention"), PAD_CASES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_among_longer_rows_changes_only_rounding(family, attention, side):
    """Two rows, one delta, against the mean of the rows' losses without padding."""
    # In float64 transformers' eager attention turns rows that see nothing into NaN: it takes the
    # softmax in float32, where the mask of float64 is -inf. And RMS norms compute in float32.
    exact = family in ("gpt2", "opt", "gpt_neox") and (attention, side) != ("eager", "left")
    dtype, rtol = (torch.float64, 1e-10) if exact else (torch.float32, 2e-5)
    model = tiny_model(family, dtype, attn_implementation=attention)
    other = twin(model)
    short, long = prompt_ids(7), prompt_ids(10, seed=2)
    options = OPTIONS | dict(steps=2, momentum=0.9)
    ids, mask = padded(short, 3, 0) if side == "left" else padded(short, 0, 3)
    ids = torch.cat([ids, long])
    mask = torch.cat([mask, torch.ones_like(long)])
    options.pop("steps")
    losses, _ = sgd_loop(
        other, [lambda m: (row_loss(m, short[0]) + row_loss(m, long[0])) / 2] * 2, **options
    )
    with trainer_of(model, steps=2).adapt(ids, attention_mask=mask, deltas="shared") as adapted:
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=rtol)
        assert distance(model, other) < rtol


@pytest.mark.parametrize("family", ["opt", "gpt2", "gemma3"])
def test_ragged_prompts_adapt_to_the_bit_as_they_would_alone(family):
    model = tiny_model(family)
    prompts = [prompt_ids(n, seed=n)[0] for n in (5, 12, 8)]
    with trainer_of(model).adapt(prompts, deltas="independent") as adapted:
        together, own = adapted.losses, adapted.loss()
    for n, prompt in enumerate(prompts):
        with trainer_of(model).adapt(prompt) as alone:
            assert torch.equal(alone.losses[0], together[n])
            assert torch.equal(alone.loss()[0], own[n])


# ---------------------------------------------------------------------------- results


def test_loss_state_dict_and_report():
    model = tiny_model("llama_tied")
    with trainer_of(model).adapt(IDS) as adapted:
        before_last = adapted.losses[0, -1].item()
        assert adapted.loss().item() < before_last
        labels = torch.where(torch.arange(7) < 5, -100, IDS)
        assert adapted.loss(IDS, labels).item() != pytest.approx(adapted.loss().item())
        state = adapted.state_dict()
        assert_same(state, weights(model))
        assert "3 steps, loss" in adapted.report()
        assert "active" in repr(adapted)
        assert adapted.nbytes >= 2 * sum(p.nbytes for p in model.parameters())
        adapted.generate(**GENERATE)
    phases = ["snapshot", "forward", "backward", "update", "generate", "restore"]
    assert list(adapted.timings) == phases == list(adapted.peak_bytes)
    assert all(ms > 0 for ms in adapted.timings.values())
    assert all(phase in adapted.report() for phase in phases)
    assert "restored" in repr(adapted)
    assert not torch.equal(state["lm_head.weight"], model.lm_head.weight)


@pytest.mark.parametrize("n_rows", [1, 3])
def test_merge_keeps_the_weights(n_rows):
    model = tiny_model("llama")
    rows = prompt_ids(7, n_rows=n_rows)
    deltas = "independent" if n_rows > 1 else None
    trainer = trainer_of(model)
    adapted = trainer.adapt(rows, deltas=deltas)
    expected = adapted.state_dict(n_rows - 1)
    if n_rows > 1:
        with pytest.raises(ValueError, match="say which, merge"):
            adapted.merge()
    with pytest.raises(ValueError, match="they count from 0"):
        adapted.merge(n_rows)
    assert adapted.merge(n_rows - 1) is model
    assert_same(expected, weights(model))
    adapted.restore()
    assert_same(expected, weights(model))
    with pytest.raises(RuntimeError, match="was merged"):
        adapted.generate()
    # The next adaptation starts from the merged weights and comes back to them.
    with trainer.adapt(IDS):
        assert not torch.equal(expected["lm_head.weight"], model.lm_head.weight)
    assert_same(expected, weights(model))


def test_one_deltas_weights_inside_anothers():
    model = tiny_model("llama")
    before = weights(model)
    with trainer_of(model).adapt(prompt_ids(7, n_rows=2), deltas="independent") as adapted:
        states = [adapted.state_dict(delta) for delta in range(2)]
        with adapted.weights_of(0):
            assert_same(states[0], weights(model))
            adapted.loss()
            with adapted.weights_of(1):
                assert_same(states[1], weights(model))
            assert_same(states[0], weights(model))
        assert_same(before, weights(model))
        with pytest.raises(ValueError, match="they count from 0"):
            adapted.state_dict(2)


def test_on_step_and_stop():
    model = tiny_model("llama")
    seen = []
    with trainer_of(model, steps=5).adapt(IDS, on_step=seen.append) as adapted:
        assert [report.step for report in seen] == [1, 2, 3, 4, 5]
        assert torch.equal(torch.stack([r.losses for r in seen], 1), adapted.losses)
        assert torch.equal(torch.stack([r.grad_norms for r in seen], 1), adapted.grad_norms)
    steps = []

    def stop(report):
        steps.append(report.step)
        # Delta 0 stops after two steps, delta 1 never.
        return report.step == 2 and not report.losses[0].isnan()

    rows = prompt_ids(7, n_rows=2)
    config = dict(steps=4, lr=[0.1, 0.1, 0.05, 0.02])
    with trainer_of(model, **config).adapt(rows, deltas="independent", stop=stop) as adapted:
        assert adapted.steps.tolist() == [2, 4]
        assert adapted.losses.isnan().sum(1).tolist() == [2, 0]
        assert "delta 0: 2 steps" in adapted.report()
    assert steps == [1, 2, 1, 2, 3, 4]


def test_the_bar_shows_steps_and_loss(capsys):
    with trainer_of(tiny_model("llama"), steps=4).adapt(IDS, progress=True):
        assert "loss=" in capsys.readouterr().err


def test_its_settings_stay():
    """Engines were made for them: others would have the number of steps, and not the step size."""
    trainer = TTTTrainer(tiny_model("llama"), TTTConfig(steps=3))
    with pytest.raises(AttributeError, match="settings cannot be replaced.*Make another"):
        trainer.config = replace(trainer.config, steps=4, lr=0.1)
    assert trainer.config == TTTConfig(steps=3)


@pytest.mark.parametrize("how", ["wrapped", "in place", "a layer"])
def test_a_model_under_torch_compile(how):
    """None of our operations is in its graph; the dense engine does the rest."""
    model, ids, made = tiny_model("llama", num_hidden_layers=2), prompt_ids(9), []

    def backend(graph, inputs):
        made.append(graph)
        return graph.forward

    options = dict(steps=3, lr=0.1, layers="-1:")
    with TTTTrainer(model, TTTConfig(engine="dense", **options)).adapt(ids) as adapted:
        losses, after = adapted.losses, adapted.loss()
    torch._dynamo.reset()
    compiled = model
    if how == "wrapped":
        compiled = torch.compile(model, backend=backend)
    else:
        (model if how == "in place" else model.model.layers[0]).compile(backend=backend)
    with unchanged(model):
        with TTTTrainer(compiled, TTTConfig(**options)).adapt(ids) as adapted:
            torch.testing.assert_close(adapted.losses, losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(adapted.loss(), after, rtol=1e-5, atol=0)
    assert made
    with pytest.raises(ValueError, match="under torch.compile.*Use engine='dense'"):
        TTTTrainer(compiled, TTTConfig(engine="factored", **options)).adapt(ids)


def test_no_steps():
    model = tiny_model("llama")
    before = weights(model)
    with trainer_of(model, steps=0).adapt(IDS) as adapted:
        assert adapted.losses.shape == (1, 0)
        assert adapted.update_landed.tolist() == [1.0]
        assert "0 steps" in adapted.report()
        assert_same(before, weights(model))
        assert torch.equal(adapted.generate(**GENERATE), model.generate(IDS, **GENERATE))


def test_a_step_size_of_zero_changes_no_bit():
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        before = weights(model)
        with trainer_of(model, lr=0.0).adapt(IDS) as adapted:
            assert_same(before, weights(model))
            assert adapted.losses[0].unique().numel() == 1


def test_losses_are_float64_for_a_float64_model():
    model = tiny_model("llama", torch.float64)
    session = trainer_of(model).begin(n_deltas=2)
    session.step(Batch(IDS))
    with session.end() as adapted:
        assert adapted.losses.dtype == adapted.grad_norms.dtype == torch.float64
        assert adapted.losses.isnan().tolist() == [[False], [True]]


# ---------------------------------------------------------------------------- dropout


def test_dropout_repeats_with_its_seed_and_leaves_random_states_alone():
    model = tiny_model("gpt2")
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    runs = []
    for options in (dict(seed=1), dict(seed=1), dict(seed=2), dict(dropout=False)):
        with trainer_of(model, **(dict(dropout=True) | options)).adapt(IDS) as adapted:
            runs.append(adapted.losses[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[3])
    # Each step draws a mask of its own: with lr 0 nothing else differs between them.
    with trainer_of(model, dropout=True, lr=0.0).adapt(IDS) as adapted:
        assert adapted.losses[0].unique().numel() == 3
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()
    assert states[2] == random.getstate()


def test_eval_mode_by_default():
    model = tiny_model("gpt2").train()
    modes = []

    def objective(outputs, batch):
        modes.append({module.training for module in model.modules()})
        return negative_log_likelihood(outputs, batch)

    for dropout in (False, True):
        config = TTTConfig(steps=1, dropout=dropout)
        TTTTrainer(model, config, objective=objective).adapt(IDS).restore()
    assert modes == [{False}, {True}]
