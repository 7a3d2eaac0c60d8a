"""Settings: what is refused, and what a group overrides."""

import dataclasses

import pytest

from ttt_fast import TTTConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(optimizer="lion"), "optimizer='lion' is unknown; use one of 'sgd', 'adamw'"),
        (dict(reduction="max"), "reduction='max'"),
        (dict(engine="fast"), "engine='fast' is unknown; use one of 'auto', 'factored', 'dense'"),
        (dict(accumulate="sum"), "accumulate='sum'"),
        (dict(rounding="down"), "rounding='down'"),
        (dict(snapshot="disk"), "snapshot='disk'"),
        (dict(backend="metal"), "backend='metal'"),
        (dict(kv="cached"), "kv='cached' is unknown; use one of 'exact', 'frozen'"),
        (dict(span_tokens=0), "span_tokens=0; it must be an integer >= 1"),
        (dict(spans=1.5), "spans=1.5; it must be an integer >= 1"),
        (dict(steps=-1), "steps=-1; it must be an integer >= 0"),
        (dict(steps=2.0), "steps=2.0"),
        (dict(steps=True), "steps=True"),
        (dict(check_every=0), "check_every=0; it must be an integer >= 1"),
        (dict(lr=float("nan")), "lr=nan; it must be finite and >= 0"),
        (dict(lr=float("inf")), "lr=inf"),
        (dict(lr=-1e-3), "lr=-0.001"),
        (dict(lr="fast"), "lr='f"),
        (dict(lr=None), "lr=None"),
        (dict(lr=[0.1] * 3, steps=4), "lr has 3 values for 4 steps"),
        (dict(lr=[0.1, -0.1], steps=2), "lr=-0.1"),
        (dict(momentum=-0.1), "momentum=-0.1"),
        (dict(momentum=float("nan")), "momentum=nan"),
        (dict(weight_decay=-1), "weight_decay=-1"),
        (dict(dampening=float("inf")), "dampening=inf"),
        (dict(eps=-1e-8), "eps=-1e-08"),
        (dict(nesterov=True, momentum=0.0), "nesterov needs momentum > 0"),
        (dict(nesterov=True, dampening=0.1), "nesterov needs .* dampening=0.1"),
        (dict(betas=(0.9, 1.0)), "betas"),
        (dict(betas=(0.9,)), "betas"),
        (dict(max_grad_norm=0.0), "max_grad_norm=0.0; it must be > 0, or None"),
        (dict(max_grad_norm=float("nan")), "max_grad_norm=nan"),
        (dict(accumulate="delta", rounding="torch"), "keeps no delta"),
        (dict(accumulate="delta", snapshot="host"), "snapshot='host' is not"),
        (dict(accumulate="delta", snapshot="undo"), "snapshot='undo' is not"),
        (dict(param_groups=[{"lr": 0.1}]), r"param_groups\[0\] has keys \['lr'\]"),
        (dict(param_groups=[{"params": "norm", "steps": 3}]), r"keys \['params', 'steps'\]"),
        (dict(param_groups=[{"params": "norm", "lr": -1}]), r"param_groups\[0\]: lr=-1"),
        (
            dict(param_groups=[{"params": "ffn"}, {"params": "norm", "nesterov": True,
                                                   "momentum": 0.0}]),
            r"param_groups\[1\]: nesterov",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TTTConfig(**options)


def test_settings_cannot_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TTTConfig().lr = 1.0


def test_step_sizes():
    assert TTTConfig(lr=0.5).lr_at(99) == 0.5
    assert TTTConfig(lr=0).lr_at(0) == 0.0
    assert [TTTConfig(lr=(0.1, 0.2), steps=2).lr_at(step) for step in (0, 1)] == [0.1, 0.2]
    assert TTTConfig(lr=lambda step: 1 / (1 + step)).lr_at(3) == 0.25
    with pytest.raises(ValueError, match="lr has 2 values but step 3"):
        TTTConfig(lr=(0.1, 0.2), steps=2).lr_at(2)
    with pytest.raises(ValueError, match="lr=nan at step 1"):
        TTTConfig(lr=lambda step: float("nan")).lr_at(0)


def test_a_group_overrides_what_it_names():
    config = TTTConfig(lr=0.1, weight_decay=0.2, param_groups=[{"params": "norm", "lr": 0.3}])
    group = config.for_group(config.param_groups[0])
    assert (group.lr, group.weight_decay, group.param_groups) == (0.3, 0.2, ())


def test_every_step_of_every_delta_has_a_random_stream_of_its_own():
    streams = {
        TTTConfig(seed=seed).random_stream(delta, step)
        for seed in (0, 1, 2**62)
        for delta in range(3)
        for step in range(4)
    }
    assert len(streams) == 36
    assert all(0 <= stream < 2**63 for stream in streams)


DENSE_ONLY = [
    ("optimizer", "adamw", "sgd"),
    ("rounding", "stochastic", "nearest"),
    ("rounding", "torch", "nearest"),
    ("accumulate", "delta", "weight"),
    ("snapshot", "host", "device"),
    ("snapshot", "undo", "device"),
]


@pytest.mark.parametrize(("name", "value", "only"), DENSE_ONLY)
def test_what_only_the_dense_engine_does_is_refused_for_the_other(name, value, only):
    message = (
        f"TTTConfig: {name}='{value}' asks for something that only engine='dense' does;"
        f" engine='factored' needs {name}='{only}'"
    )
    with pytest.raises(ValueError, match=message):
        TTTConfig(engine="factored", **{name: value})
    for engine in ("auto", "dense"):
        assert getattr(TTTConfig(engine=engine, **{name: value}), name) == value
    config = TTTConfig(**{name: value})
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(config, engine="factored")


def test_the_factored_engine_takes_all_of_sgd():
    config = TTTConfig(
        engine="factored", nesterov=True, weight_decay=0.1, decoupled_weight_decay=True,
        max_grad_norm=None, lr=[0.1] * 20, param_groups=[{"params": "norm", "momentum": 0.5}],
        reduction="sum", dropout=True, check_every=5, seed=3, layers="-2:", backend="torch",
    )  # fmt: skip
    assert config.engine == "factored"


@pytest.mark.parametrize("name", ["max_batch_tokens", "memory_budget"])
def test_bounds(name):
    for value in (None, 1, 2**40):
        assert getattr(TTTConfig(**{name: value}), name) == value
    for value in (0, -1, 2.0, "all"):
        with pytest.raises(ValueError, match=f"{name}={value!r}; it must be None or at least 1"):
            TTTConfig(**{name: value})
