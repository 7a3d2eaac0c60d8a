"""Heads whose logits somebody sees or changes: they are left to the model's own code."""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from tests.factored_cases import fp64
from tests.families import tiny_model
from tests.head_cases import STEPS, T, batch_of, run, trainer_of, with_logits
from tests.loops import prompt_ids
from tests.untouched import unchanged
from ttt_fast import negative_log_likelihood
from ttt_fast.engines import head as head_module
from ttt_fast.engines.head import expects_no_logits

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])


@ENGINES
def test_a_soft_cap_is_found_at_the_first_forward(engine, monkeypatch):
    model, forwards = fp64("gemma2"), []
    model.register_forward_pre_hook(lambda *call: forwards.append(call))
    batch, options = batch_of("plain"), dict(engine=engine, scope="ffn")
    expected, _ = run(model, batch, with_logits(), **options)
    once = len(forwards)
    ours, head = run(model, batch, **options)
    assert head.plain is False and len(forwards) == 2 * once + 1
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    # To take it for a plain one gives other losses.
    monkeypatch.setattr(head_module._Call, "is_answered_by", lambda self, outputs: True)
    wrong, head = run(model, batch, **options)
    assert head.plain and not torch.allclose(wrong[0], expected[0], rtol=1e-3)


class Llama(LlamaForCausalLM):
    """Does something after its forward."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, use_cache=None):
        inputs = input_ids, attention_mask, position_ids
        return self.after(super().forward(*inputs, use_cache=use_cache))


class InPlace(Llama):
    """Writes into the logits that it returns."""

    def after(self, outputs):
        outputs.logits[..., 3:50] -= 2.0
        return outputs


class Twice(Llama):
    """Calls its head again, on something else."""

    def after(self, outputs):
        self.second = self.lm_head(torch.ones(4, T, 32, dtype=torch.float64))
        return outputs


class Numbers(Llama):
    """Looks at its logits."""

    def after(self, outputs):
        self.highest = outputs.logits.max().item()
        return outputs


class Fickle(Llama):
    """Scales its logits from a certain forward on."""

    forwards, plain = 0, 2

    def after(self, outputs):
        self.forwards += 1
        if self.forwards > self.plain:
            outputs.logits = outputs.logits * 0.5
        return outputs


def llama_of(kind):
    """The tiny Llama as one of these."""
    model = fp64("llama")
    model.__class__ = kind
    return model


@ENGINES
@pytest.mark.parametrize("kind", [InPlace, Twice, Numbers])
def test_a_model_that_uses_its_logits_has_them(engine, kind):
    model, batch = llama_of(kind), batch_of("masked")
    ours, head = run(model, batch, engine=engine, scope="ffn")
    theirs, _ = run(model, batch, with_logits(), engine=engine, scope="ffn")
    assert head.plain is False
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=0)


@ENGINES
def test_a_model_that_begins_to_change_its_logits_is_refused(engine):
    model = llama_of(Fickle)
    with unchanged(model, but=["attributes"]):
        with pytest.raises(RuntimeError, match="the model changed its head's logits"):
            run(model, batch_of("plain"), engine=engine, scope="ffn")
    model.plain = 1 << 30
    run(model, batch_of("plain"), engine=engine, scope="ffn")


def watched_head(model, seen):
    return model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out))


def watched_model(model, seen):
    return model.register_forward_hook(lambda m, args, out: seen.append(out.logits))


def watched_everywhere(model, seen):
    def look(module, args, output):
        if module is model.lm_head:
            seen.append(output)

    return nn.modules.module.register_module_forward_hook(look)


class OwnForward:
    """Somebody's forward on the instance, as a handle."""

    def __init__(self, model, seen):
        self.model, own = model, model.forward

        @functools.wraps(own)
        def forward(*args, **kwargs):
            outputs = own(*args, **kwargs)
            seen.append(outputs.logits)
            return outputs

        model.forward = forward

    def remove(self):
        del self.model.forward


WATCHERS = [watched_head, watched_model, watched_everywhere, OwnForward]


@ENGINES
@pytest.mark.parametrize("watch", WATCHERS, ids=lambda watch: watch.__name__)
def test_who_watches_sees_logits(engine, watch):
    model, seen = fp64("llama"), []
    handle = watch(model, seen)
    try:
        _, head = run(model, batch_of("plain"), engine=engine, scope="ffn")
    finally:
        handle.remove()
    assert head.plain is None and len(seen) > STEPS
    assert all(logits.device.type == "cpu" and logits.isfinite().all() for logits in seen)
    assert run(model, batch_of("plain"), engine=engine, scope="ffn")[1].plain


def test_an_objective_of_the_users_sees_logits():
    seen = []

    def objective(outputs, batch):
        seen.append(outputs.logits)
        return negative_log_likelihood(outputs, batch)

    _, head = run(fp64("llama"), batch_of("plain"), objective, engine="dense")
    assert head.plain is None
    assert all(logits.device.type == "cpu" and logits.shape == (2, T, 101) for logits in seen)


class Wrapper(nn.Module):
    """Has a model's head, but not among its modules."""

    def __init__(self, model):
        super().__init__()
        self.body, self.config = model.model, model.config
        object.__setattr__(self, "head", model.lm_head)

    def get_input_embeddings(self):
        return self.body.embed_tokens

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        hidden = self.body(input_ids, attention_mask, position_ids, use_cache=False)[0]
        return SimpleNamespace(logits=self.head(hidden))


@ENGINES
def test_a_head_outside_the_model_is_left_alone(engine):
    model, options = fp64("llama"), dict(engine=engine, scope="ffn")
    expected, _ = run(model, batch_of("padded"), **options)
    ours, head = run(Wrapper(model), batch_of("padded"), **options)
    assert head.plain is None
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)


def test_stock_torchs_bits_are_those_behind_logits():
    _, head = run(tiny_model("llama"), batch_of("plain"), engine="dense", rounding="torch")
    assert head.plain is None


def test_under_autocast_it_is_left_alone():
    with torch.autocast("cpu", torch.bfloat16):
        _, head = run(tiny_model("llama"), batch_of("plain"), engine="dense")
    assert head.plain is None


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [("llama", {}, True), ("gemma2", {}, False), ("gemma2", dict(final_logit_softcapping=None), 1)],
    ids=str,
)
def test_what_is_expected_before_the_first_forward(family, options, expected):
    assert expects_no_logits(tiny_model(family, **options)) == expected


def test_what_was_found_is_planned_with():
    model = llama_of(InPlace)
    trainer = trainer_of(model, engine="dense")
    before = trainer.plan(1, 64).predicted_bytes["dense"]
    trainer.adapt(prompt_ids(T)).restore()
    after = trainer.plan(1, 64).predicted_bytes["dense"]
    assert after >= before + 64 * 101 * 8
