"""One prompt under every combination of settings, against a separate run of each."""

import itertools

import pytest
import torch

from tests.families import tiny_model
from tests.loops import distance, prompt_ids, row_loss, sgd_loop, twin, weights
from ttt_fast import TTTConfig, TTTTrainer

AXES = dict(
    lr=[1e-2, 4e-2], momentum=[0.0, 0.9], weight_decay=[0.0, 0.1], max_grad_norm=[None, 0.5]
)  # fmt: skip
IDS = prompt_ids(9)
STEPS = 4


def fp64(family="llama_tied", **overrides):
    return tiny_model(family, torch.float64, attn_implementation="sdpa", **overrides)


def trainer_of(model, **options):
    return TTTTrainer(model, TTTConfig(**(dict(steps=STEPS, max_grad_norm=1.0) | options)))


def settings_of(config):
    return config.lr, config.momentum, config.weight_decay, config.max_grad_norm


def loop_of(model, ids=IDS, **settings):
    """A copy of the model after the loop, its losses and its norms."""
    other = twin(model)
    losses, norms = sgd_loop(other, [lambda m: row_loss(m, ids[0])] * STEPS, **settings)
    return other, losses, norms


def assert_close(state, other, tolerance=1e-12):
    """A state dict against a model, each parameter by its norm."""
    for name, param in other.named_parameters():
        error = float((state[name] - param.detach()).norm() / param.detach().norm())
        assert error <= tolerance, (name, error)


# ---------------------------------------------------------------------------- the same numbers


def test_every_combination_is_the_loop_with_its_settings():
    model = fp64(num_hidden_layers=2)
    before = weights(model)
    combinations = list(itertools.product(*AXES.values()))
    loops = [loop_of(model, **dict(zip(AXES, values, strict=True))) for values in combinations]
    with trainer_of(model).adapt_grid(IDS, **AXES) as adapted:
        assert [settings_of(config) for config in adapted.configs] == combinations
        assert adapted.losses.shape == adapted.grad_norms.shape == (16, STEPS)
        assert adapted.steps.tolist() == [STEPS] * 16
        assert not adapted.diverged.any()
        for delta, (other, losses, norms) in enumerate(loops):
            assert adapted.losses[delta].tolist() == pytest.approx(losses, rel=1e-12)
            assert adapted.grad_norms[delta].tolist() == pytest.approx(norms, rel=1e-12)
            assert_close(adapted.state_dict(delta), other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_the_comparison_notices_the_settings_of_a_neighbour():
    model = fp64(num_hidden_layers=2)
    other, _, _ = loop_of(model, lr=1e-3, momentum=0.9, weight_decay=1e-4, max_grad_norm=1.0)
    with trainer_of(model).adapt_grid(IDS, weight_decay=[0.0, 1e-4]) as adapted:
        assert_close(adapted.state_dict(1), other)
        with pytest.raises(AssertionError):
            assert_close(adapted.state_dict(0), other)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_a_grid_is_its_adaptations_one_by_one(family):
    model = fp64(family)
    axes = dict(lr=[1e-2, 3e-2], weight_decay=[0.0, 0.1])
    options = dict(nesterov=True, dampening=0.0, decoupled_weight_decay=True, layers="1:")
    with trainer_of(model, **options).adapt_grid(IDS, **axes) as adapted:
        states = [adapted.state_dict(delta) for delta in range(4)]
    assert [(c.lr, c.weight_decay) for c in adapted.configs] == [
        (1e-2, 0.0), (1e-2, 0.1), (3e-2, 0.0), (3e-2, 0.1)
    ]  # fmt: skip
    for delta, config in enumerate(adapted.configs):
        assert config.engine == "factored" and config.nesterov and config.layers == "1:"
        with TTTTrainer(model, config).adapt(IDS) as alone:
            assert adapted.losses[delta].tolist() == pytest.approx(
                alone.losses[0].tolist(), rel=1e-12
            )
            for name, tensor in alone.state_dict().items():
                torch.testing.assert_close(states[delta][name], tensor, rtol=1e-11, atol=1e-13)


def test_what_is_not_an_axis_is_the_configurations():
    model = fp64(num_hidden_layers=2)
    schedules = [[0.02, 0.01, 0.01, 0.005], lambda step: 0.02 / (1 + step), 0.01]
    config = dict(momentum=0.7, weight_decay=0.05, max_grad_norm=0.8, scope="ffn")
    with trainer_of(model, **config).adapt_grid(IDS, lr=schedules) as adapted:
        assert [c.lr for c in adapted.configs] == schedules
        losses = adapted.losses
    assert len({(c.momentum, c.weight_decay, c.max_grad_norm) for c in adapted.configs}) == 1
    for delta, lr in enumerate(schedules):
        with trainer_of(model, lr=lr, **config).adapt(IDS) as alone:
            assert losses[delta].tolist() == pytest.approx(alone.losses[0].tolist(), rel=1e-12)
    with trainer_of(model, **config).adapt_grid(IDS) as adapted:
        assert adapted.n_deltas == 1 and adapted.configs[0].lr == 1e-3


def test_groups_keep_what_they_override():
    """A group's own decay is not the axis's; its lr, which it leaves open, is."""
    model = fp64(num_hidden_layers=2)
    groups = [{"params": "norm", "weight_decay": 0.0}]
    with trainer_of(model, param_groups=groups).adapt_grid(
        IDS, lr=[1e-2, 3e-2], weight_decay=[0.1, 0.3]
    ) as adapted:
        states = [adapted.state_dict(delta) for delta in range(4)]
    for delta, config in enumerate(adapted.configs):
        with TTTTrainer(model, config).adapt(IDS) as alone:
            for name, tensor in alone.state_dict().items():
                torch.testing.assert_close(states[delta][name], tensor, rtol=1e-11, atol=1e-13)


def test_cut_into_parts_it_is_the_same():
    model = fp64(num_hidden_layers=2)
    runs = []
    for bound in (None, 30, 1):
        with trainer_of(model, max_batch_tokens=bound).adapt_grid(
            IDS, lr=[1e-2, 2e-2, 3e-2, 4e-2]
        ) as adapted:
            runs.append((adapted.losses, [adapted.state_dict(delta) for delta in range(4)]))
    for losses, states in runs[1:]:
        torch.testing.assert_close(losses, runs[0][0], rtol=1e-12, atol=0)
        for state, expected in zip(states, runs[0][1], strict=True):
            for name, tensor in expected.items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-11, atol=1e-13)


def test_labels_tell_what_is_learnt():
    model = fp64(num_hidden_layers=2)
    labels = torch.where(torch.arange(9) < 5, -100, IDS)
    with trainer_of(model).adapt_grid(IDS, lr=[1e-2, 3e-2], labels=labels) as adapted:
        losses = adapted.losses
    for delta, lr in enumerate([1e-2, 3e-2]):
        with trainer_of(model, lr=lr).adapt(IDS, labels=labels) as alone:
            assert losses[delta].tolist() == pytest.approx(alone.losses[0].tolist(), rel=1e-12)
    assert losses[0, 0] != row_loss(model, IDS[0])


# ---------------------------------------------------------------------------- what one gets


def test_all_earlier_steps_of_all_combinations():
    model = fp64(num_hidden_layers=2)
    with trainer_of(model).adapt_grid(IDS, lr=[1e-2, 4e-2], momentum=[0.0, 0.9]) as adapted:
        for step in range(STEPS):
            with adapted.at(step):
                torch.testing.assert_close(
                    adapted.loss(), adapted.losses[:, step], rtol=1e-12, atol=0
                )
        best = adapted.losses.min(1)
        with adapted.at(best.indices):
            torch.testing.assert_close(adapted.loss(), best.values, rtol=1e-12, atol=0)


def test_each_combination_continues_the_prompt():
    model = tiny_model("llama", attn_implementation="sdpa")
    options = dict(max_new_tokens=5, do_sample=False)
    with trainer_of(model).adapt_grid(IDS, lr=[0.0, 0.3]) as adapted:
        together = adapted.generate(**options)
    assert torch.equal(together[0], model.generate(IDS, **options)[0])
    with trainer_of(model, lr=0.3).adapt(IDS) as alone:
        assert torch.equal(together[1], alone.generate(**options)[0])
    assert not torch.equal(together[0], together[1])


def test_one_combination_is_merged():
    model = fp64(num_hidden_layers=2)
    other, _, _ = loop_of(model, lr=4e-2, momentum=0.9, max_grad_norm=1.0)
    trainer_of(model).adapt_grid(IDS, lr=[1e-2, 4e-2]).merge(1)
    assert distance(model, other) < 1e-12


def test_every_step_is_reported_for_all():
    model = tiny_model("llama")
    seen = []
    with trainer_of(model).adapt_grid(IDS, lr=[1e-2, 4e-2], on_step=seen.append) as adapted:
        assert [report.step for report in seen] == [1, 2, 3, 4]
        assert torch.equal(torch.stack([r.losses for r in seen], 1), adapted.losses)
        assert torch.equal(torch.stack([r.grad_norms for r in seen], 1), adapted.grad_norms)
        assert adapted.choice.engine == "factored"
        assert "delta 1: 4 steps" in adapted.report()


def test_text_and_the_bar(capsys):
    model = tiny_model("llama")

    def tokenizer(text):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    trainer = TTTTrainer(model, TTTConfig(steps=2), tokenizer=tokenizer)
    with trainer.adapt_grid("some text", lr=[1e-3, 1e-2, 1e-1], progress=True) as adapted:
        assert adapted.n_deltas == 3
    assert "6/6" in capsys.readouterr().err


# ---------------------------------------------------------------------------- divergence


@pytest.mark.parametrize("check_every", [1, 3])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_that_diverges_stops_and_touches_no_other(place, check_every):
    model = fp64(num_hidden_layers=2)
    # The momentum of its neighbours would carry a NaN on, were one to reach them.
    rates = [1e-2, 4e-2]
    options = dict(check_every=check_every, max_grad_norm=None)
    with trainer_of(model, **options).adapt_grid(IDS, lr=rates) as adapted:
        expected = [adapted.state_dict(delta) for delta in range(2)]
        losses, norms, question = adapted.losses, adapted.grad_norms, adapted.loss()
        assert not adapted.diverged.any()
    before = weights(model)
    rates.insert(place, 1e300)
    others = [delta for delta in range(3) if delta != place]
    with trainer_of(model, **options).adapt_grid(IDS, lr=rates) as adapted:
        assert adapted.diverged.tolist() == [delta == place for delta in range(3)]
        torch.testing.assert_close(adapted.losses[others], losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(adapted.grad_norms[others], norms, rtol=1e-12, atol=0)
        torch.testing.assert_close(adapted.loss()[others], question, rtol=1e-12, atol=0)
        for delta, state in zip(others, expected, strict=True):
            for name, tensor in adapted.state_dict(delta).items():
                torch.testing.assert_close(tensor, state[name], rtol=1e-11, atol=1e-13)
        last = adapted.state_dict(place)
        assert all(bool(tensor.isfinite().all()) for tensor in last.values())
        # It is where one step, which was finite, had brought it.
        assert torch.isfinite(adapted.losses[place, 0])
        assert not torch.isfinite(adapted.losses[place, 1:]).any()
        with adapted.at(0):
            torch.testing.assert_close(adapted.loss(), adapted.losses[:, 0], rtol=1e-12, atol=0)
    one_step = trainer_of(model, **(options | dict(lr=1e300, steps=1, engine="factored")))
    with one_step.adapt(IDS) as once:
        for name, tensor in once.state_dict().items():
            torch.testing.assert_close(last[name], tensor, rtol=1e-11, atol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(model).items())


def test_all_may_diverge():
    model = fp64(num_hidden_layers=2)
    with trainer_of(model, max_grad_norm=None).adapt_grid(IDS, lr=[1e300, 1e290]) as adapted:
        assert adapted.diverged.tolist() == [True, True]


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (dict(lr=[]), r"adapt_grid: lr=\[\]; give a list of at least one value"),
        (dict(momentum=()), r"momentum=\(\)"),
        (dict(lr="fast"), "lr='fast'; give a list"),
        (dict(lr=[1e-3, -1.0]), "lr=-1.0; it must be finite"),
        (dict(max_grad_norm=[1.0, 0.0]), "max_grad_norm=0.0; it must be > 0, or None"),
        (dict(lr=[[1e-3] * 3]), "lr has 3 values for 4 steps"),
    ],
    ids=str,
)
def test_axes_that_cannot_be(axes, message):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        trainer_of(model).adapt_grid(IDS, **axes)
    # Nothing holds the model.
    trainer_of(model).adapt(IDS).restore()


def test_nesterov_has_no_combination_without_momentum():
    with pytest.raises(ValueError, match="nesterov needs momentum > 0"):
        trainer_of(tiny_model("llama"), nesterov=True).adapt_grid(IDS, momentum=[0.9, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(optimizer="adamw"), "optimizer='adamw' .* only engine='dense'"),
        (dict(rounding="stochastic"), "rounding='stochastic'"),
        (dict(accumulate="delta"), "accumulate='delta'"),
        (dict(snapshot="host"), "snapshot='host'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["auto", "dense"])
def test_what_only_the_dense_engine_does(options, message, engine):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model("llama"), engine=engine, **options).adapt_grid(IDS, lr=[1e-3])


def test_experts_are_refused():
    with pytest.raises(ValueError, match="engine='factored': .*mlp"):
        trainer_of(tiny_model("mixtral")).adapt_grid(IDS, lr=[1e-3])


def test_one_prompt_only():
    with pytest.raises(ValueError, match="got 2 rows"):
        trainer_of(tiny_model("llama")).adapt_grid(prompt_ids(n_rows=2), lr=[1e-3])


def test_a_model_that_is_held():
    model = tiny_model("llama")
    with trainer_of(model).adapt(IDS):
        with pytest.raises(RuntimeError, match="held by"):
            trainer_of(model).adapt_grid(IDS, lr=[1e-3])
