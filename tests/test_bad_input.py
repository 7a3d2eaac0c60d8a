"""Every bad input has a clear error of its own, and nothing has changed after it."""

import re

import pytest
import torch
from torch import nn

from tests.families import tiny_model
from tests.loops import prompt_ids
from tests.untouched import IDS, STEPS, assert_adapts, lived_in, trainer_of, unchanged
from ttt_fast import Batch

# ---------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "an empty prompt": (dict(prompt=[]), ValueError, "the prompt is empty"),
    "an empty tensor": (dict(prompt=torch.empty(0)), ValueError, "the prompt is empty"),
    "an empty row": (
        dict(prompt=torch.empty(1, 0, dtype=torch.int64)), ValueError, "the prompt is empty"),
    "no rows": (
        dict(prompt=torch.empty(0, 4, dtype=torch.int64)), ValueError, "the prompt is empty"),
    "an empty row among others": (
        dict(prompt=[[5, 6], []], deltas="shared"), ValueError, "the prompt is empty"),
    "one token": (dict(prompt=[5]), ValueError, "prompt 0 has 1 token, .*nothing to predict"),
    "one token among others": (
        dict(prompt=[[5, 6, 7], [5]], deltas="independent"), ValueError, "prompt 1 has 1 token,"),
    "all labels masked": (
        dict(prompt=IDS, labels=torch.full_like(IDS, -100)), ValueError, "labels mask out every"),
    "only the first label": (
        dict(prompt=IDS, labels=torch.where(torch.arange(8) == 0, IDS, -100)),
        ValueError, "labels mask out every token of prompt 0"),
    "everything is padding": (
        dict(prompt=IDS, attention_mask=torch.zeros_like(IDS)), ValueError, "has 0 tokens"),
    "ids above the vocabulary": (
        dict(prompt=IDS + 100), ValueError, r"token ids run from .* vocabulary has 101 entries"),
    "ids below zero": (dict(prompt=IDS - 200), ValueError, "token ids run from -"),
    "labels outside the vocabulary": (
        dict(prompt=IDS, labels=IDS + 100), ValueError, "labels has value 1.*token ids below 101"),
    "longer than the context": (
        dict(prompt=prompt_ids(65)), ValueError, "has 65 tokens but the model's context is 64"),
    "several rows": (
        dict(prompt=prompt_ids(5, n_rows=3)), ValueError, "got 3 rows; say deltas='independent'"),
    "deltas of another kind": (
        dict(prompt=IDS, deltas="both"), ValueError, "deltas='both' is unknown"),
    "ids that are not integers": (dict(prompt=IDS.float()), TypeError, "dtype torch.float32"),
    "three dimensions": (dict(prompt=IDS[None]), ValueError, r"shape \(1, 1, 8\)"),
    "a list of matrices": (
        dict(prompt=[prompt_ids(5, 2)], deltas="shared"), ValueError, r"prompt 0 has shape"),
    "no prompt": (dict(prompt=None), TypeError, "got NoneType"),
    "a mapping without ids": (
        dict(prompt={"labels": IDS}), ValueError, r"\['labels'\]; it needs 'input_ids'"),
    "a mask of another shape": (
        dict(prompt=IDS, attention_mask=torch.ones(1, 3)), ValueError, "attention_mask is"),
    "labels that are no tensor": (dict(prompt=IDS, labels=[1]), ValueError, "labels is list"),
    "weights that are not finite": (
        dict(prompt=IDS, token_weights=torch.full((1, 8), torch.nan)),
        ValueError, "token_weights must be finite"),
    "weights that are all zero": (
        dict(prompt=IDS, token_weights=torch.zeros(1, 8)), ValueError, "must not sum to 0"),
    "too many row weights": (
        dict(prompt=IDS, row_weights=torch.ones(3)), ValueError, r"row_weights has shape \(3,\)"),
    "row weights that are not finite": (
        dict(prompt=IDS, row_weights=torch.tensor([torch.inf])), ValueError, "must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case):
    call, error, message = BAD_INPUT[case]
    model = lived_in()
    trainer = trainer_of(model)
    with unchanged(model), pytest.raises(error, match=message):
        trainer.adapt(**call)
    assert_adapts(model)


BAD_CONFIG = {
    "lr nan": (dict(lr=float("nan")), "lr=nan"),
    "lr infinite": (dict(lr=float("inf")), "lr=inf"),
    "lr negative": (dict(lr=-1e-3), "lr=-0.001"),
    "steps negative": (dict(steps=-1), "steps=-1"),
    "scope unknown": (dict(scope="fnn"), "scope 'fnn'"),
    "scope empty": (dict(scope="lora"), "scope 'lora' selects nothing"),
    "callable that selects nothing": (dict(scope=lambda name, param: False), "selects nothing"),
    "group without parameters": (
        dict(scope="ffn", param_groups=[{"params": "norm", "lr": 0.1}]),
        r"param_groups\[0\] .* no parameter of scope 'ffn' left"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CONFIG)
def test_bad_configuration(case):
    options, message = BAD_CONFIG[case]
    model = lived_in()
    with unchanged(model), pytest.raises(ValueError, match=message):
        trainer_of(model, **options).adapt(IDS)
    assert_adapts(model)


def test_a_schedule_that_goes_wrong_on_the_way():
    model = lived_in()
    with unchanged(model), pytest.raises(ValueError, match="lr=-1.0 at step 3"):
        trainer_of(model, lr=lambda step: -1.0 if step == 2 else 0.01).adapt(IDS)
    with unchanged(model), trainer_of(model, lr=[0.1] * STEPS).begin() as session:
        for _ in range(STEPS):
            session.step(Batch(IDS))
        with pytest.raises(ValueError, match="lr has 4 values but step 5"):
            session.step(Batch(IDS))


def test_quantised_weights():
    model = tiny_model("llama")
    down = model.model.layers[0].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with unchanged(model), pytest.raises(ValueError, match=re.escape("down_proj.weight")):
        trainer_of(model, scope="ffn")
