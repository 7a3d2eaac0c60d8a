"""kv="frozen": query-only test-time training, against the method written out in plain torch."""

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import AttentionInterface

from tests.families import FAMILIES
from tests.frozen_cases import (
    CONTEXT,
    SPANS,
    T,
    agree,
    fp64,
    loop,
    results,
    same_bits,
    session,
    span_loss,
    stored,
    trainer_of,
)
from tests.loops import prompt_ids
from tests.untouched import Boom, failing_backward, failing_forward, unchanged
from ttt_fast import Batch, span_attention, span_cache

ENGINES = pytest.mark.parametrize("engine", ["dense", "factored"])
# Torch's attention has no soft caps.
CASES = [(f, a) for f in FAMILIES for a in ("sdpa", "eager") if (f, a) != ("gemma2", "sdpa")]
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


# ---------------------------------------------------------------------------- the same numbers


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_as_the_method_written_out(family, attention, monkeypatch):
    model = fp64(family, attention)
    theirs = loop(model)
    read, ours = [], span_cache.span_attention
    monkeypatch.setattr(span_cache, "span_attention", lambda *a: read.append(1) or ours(*a))
    for engine in ("dense", "factored"):
        with unchanged(model):
            assert agree(session(model, engine), theirs), engine
    # Where torch attends, every layer of each step that has something before its span.
    apart = span_cache.attends_apart(model)
    assert len(read) == (2 * 3 * (len(SPANS) - 1) if apart else 0)
    # In transformers 4, which attention Qwen2-MoE computes cannot be changed any more.
    assert apart == (attention == "sdpa") or (family, attention) == ("qwen2_moe", "sdpa")


@ENGINES
@pytest.mark.parametrize("scope", ["all", "ffn", "attention"])
def test_other_scopes_leave_the_prefix_alone(engine, scope):
    model = fp64("llama_tied")
    assert agree(session(model, engine, scope=scope), loop(model, scope=scope))


@ENGINES
def test_adapters_of_peft_read_in_place_too(engine):
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(fp64("qwen2"), config).double().eval()
    assert span_cache.attends_apart(model)
    assert agree(session(model, engine, scope="lora"), loop(model, scope="lora"))


@ENGINES
def test_adapt_draws_the_spans(engine):
    """The places are the seed's; a loop that knows them gets the same."""
    model, spans = fp64("qwen3"), []
    trainer = trainer_of(model, engine, steps=5, span_tokens=6, seed=3)
    for step in range(5):
        generator = torch.Generator().manual_seed(trainer.config.random_stream(0, step))
        place = torch.rand(1, generator=generator, dtype=torch.float64).item()
        spans.append((int(place * (T - 6)), int(place * (T - 6)) + 7))
    assert len(set(spans)) > 2
    with unchanged(model), trainer.adapt(CONTEXT) as adapted:
        ours = results(adapted, trainer)
    assert agree(ours, loop(model, spans))
    again = trainer_of(model, engine, steps=5, span_tokens=6, seed=4)
    with again.adapt(CONTEXT) as adapted:
        assert not agree(results(adapted, again), ours)


@ENGINES
def test_a_prompt_of_one_span_is_adapted_as_ever(engine):
    model = fp64()
    options = dict(steps=4, span_tokens=T)
    with trainer_of(model, engine, **options).adapt(CONTEXT) as adapted:
        losses = adapted.losses
    with trainer_of(model, engine, kv="exact", **options).adapt(CONTEXT) as adapted:
        torch.testing.assert_close(losses, adapted.losses, rtol=1e-12, atol=0)


# ---------------------------------------------------------------------------- what would show


def test_the_control_that_a_prefix_of_adapted_weights_shows():
    model = fp64()
    ours = session(model, "factored")
    assert agree(ours, loop(model))
    assert not agree(ours, loop(model, prefix_of=lambda m: m), tolerance=1e-4)


def test_the_control_that_a_span_with_frozen_keys_shows(monkeypatch):
    model = fp64()
    theirs, update = loop(model), span_cache._Layer.update

    def without_gradient(self, keys, values, *args):
        return update(self, keys.detach(), values.detach(), *args)

    monkeypatch.setattr(span_cache._Layer, "update", without_gradient)
    ours = session(model, "factored")
    assert agree([ours[0][:1]], [theirs[0][:1]]) and not agree(ours, theirs, tolerance=1e-4)


@ATTENTION
@pytest.mark.parametrize("by", [-1, 1])
def test_the_control_that_a_mask_off_by_one_shows(by, attention, monkeypatch):
    model = fp64(attention=attention)
    theirs, inputs = loop(model), Batch.model_inputs

    def with_mask(self, arguments):
        P, t = self.past_key_values.starts[0], self.input_ids.shape[1]
        seen = torch.ones(t, P + t, dtype=torch.bool).tril(P + by)[None, None]
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
        return inputs(self, arguments) | {"attention_mask": seen if attention == "sdpa" else mask}

    monkeypatch.setattr(Batch, "model_inputs", with_mask)
    assert not agree(session(model, "factored", SPANS[1:3]), theirs, tolerance=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_control_that_a_position_off_by_one_shows(family):
    def later(trained, original, ids, start, stop):
        return span_loss(trained, original, ids[:, 1:], start - 1, stop - 1)

    model, spans = fp64(family), SPANS[1:]
    ours = session(model, "factored", spans)
    assert agree(ours, loop(model, spans))
    assert not agree(ours, loop(model, spans, loss=later), tolerance=1e-4)


# ---------------------------------------------------------------------------- nothing is copied


class Allocations(TorchDispatchMode):
    """Sizes of what operations give, views not counted, and of what they write to."""

    def __init__(self):
        super().__init__()
        self.largest = (0, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if not isinstance(tensor, torch.Tensor):
                continue
            written = func._schema.is_mutable or tensor.untyped_storage().data_ptr() not in known
            if written:
                self.largest = max(self.largest, (tensor.numel(), str(func)))
        return out


def largest_of_a_step(model, engine, length):
    ids = prompt_ids(length)
    saved = []

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in before:
            saved.append(tensor.numel())
        return tensor

    with trainer_of(model, engine).begin() as steps:
        frozen = steps.prefill(Batch(ids))
        before = {t.untyped_storage().data_ptr() for pair in frozen._layers[0] for t in pair}
        before |= {p.untyped_storage().data_ptr() for p in model.parameters()}
        steps.step(frozen.spans([(length // 2, length // 2 + 9)]))
        found = stored(frozen)
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with Allocations() as allocations, hooks:
            steps.step(frozen.spans([(length - 9, length)]))
        now = stored(frozen)
    assert same_bits(found, now)
    return allocations.largest, max(saved)


@ENGINES
def test_a_step_neither_copies_nor_writes_the_prefix(engine, monkeypatch):
    """No operation gives or writes as many numbers as one layer has keys before the span."""
    monkeypatch.setattr(span_attention, "SCORES_CPU", 4096)
    length = 600
    keys_of_a_layer = (length - 9) * 2 * 8
    model = fp64(max_position_embeddings=length)
    (numbers, op), saved = largest_of_a_step(model, engine, length)
    # The largest is the mask, 9 x 600.
    assert numbers <= 9 * length < keys_of_a_layer, op
    assert saved <= 9 * length
    # The control: where transformers' attention gets all in one tensor, it is.
    model = fp64(attention="eager", max_position_embeddings=length)
    (numbers, _), saved = largest_of_a_step(model, engine, length)
    assert numbers > keys_of_a_layer and saved > keys_of_a_layer


# ---------------------------------------------------------------------------- left as found


@ENGINES
@ATTENTION
@pytest.mark.parametrize("fail", [failing_forward, failing_backward])
def test_after_an_exception_in_a_step(engine, attention, fail):
    model = fp64("qwen2", attention)
    with unchanged(model):
        with pytest.raises(Boom), fail(model, Boom(), 3):
            trainer_of(model, engine, steps=4, span_tokens=6).adapt(CONTEXT)
    assert model.config._attn_implementation == attention
    with trainer_of(model, engine, steps=4, span_tokens=6).adapt(CONTEXT):
        assert model.config._attn_implementation == attention


@ENGINES
def test_a_prefill_in_the_middle_is_of_the_unadapted_weights(engine):
    model = fp64()
    other = prompt_ids(20, seed=9)
    with trainer_of(model, engine).begin() as steps:
        first = steps.prefill(Batch(CONTEXT))
        expected = stored(steps.prefill(Batch(other)))
        steps.step(first.spans([SPANS[1]]))
        before = steps.loss(first.spans([SPANS[2]])).item()
        found = stored(steps.prefill(Batch(other)))
        assert steps.loss(first.spans([SPANS[2]])).item() == before
    pairs = [
        (a, b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_weights_that_are_logged_cannot_step_aside():
    model = fp64().bfloat16()
    with trainer_of(model, "dense", snapshot="undo").begin() as steps:
        frozen = steps.prefill(Batch(CONTEXT))
        steps.step(frozen.spans([SPANS[1]]))
        with pytest.raises(ValueError, match="snapshot='undo' has the original weights again only"):
            steps.prefill(Batch(CONTEXT))


# ---------------------------------------------------------------------------- many at once


def alone(model, engine, ids, **options):
    trainer = trainer_of(model, engine, steps=3, span_tokens=6, **options)
    with trainer.adapt(ids) as adapted:
        return results(adapted, trainer)


@ENGINES
@ATTENTION
def test_prompts_of_any_lengths_as_each_alone(engine, attention):
    model = fp64("mistral", attention)
    prompts = [prompt_ids(n, seed=n)[0] for n in (40, 5, 23)]
    trainer = trainer_of(model, engine, steps=3, span_tokens=6, spans=2)
    rows = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    with trainer.adapt(prompts, deltas="independent") as adapted:
        together = [results(adapted, trainer, delta) for delta in range(3)]
    handle.remove()
    assert max(rows) == (6 if engine == "factored" else 2)
    # Eager attention takes the softmax in float32, over the padding, too.
    near = 1e-11 if attention == "sdpa" else 1e-6
    for ids, ours in zip(prompts, together, strict=True):
        assert agree(ours, alone(model, engine, ids, spans=2), tolerance=near)
    for numbers, adapted in trainer.adapt_batches(prompts):
        for delta, n in enumerate(numbers):
            assert agree(results(adapted, trainer, delta), together[n], tolerance=near)


@ENGINES
def test_one_stops_and_the_others_go_on(engine):
    model = fp64()
    prompts = [prompt_ids(n, seed=n)[0] for n in (40, 30, 23)]
    trainer = trainer_of(model, engine, steps=3, span_tokens=6)

    def stop(report):
        return report.step == 2 and not report.losses[1].isnan()

    with trainer.adapt(prompts, deltas="independent", stop=stop) as adapted:
        assert adapted.steps.tolist() == [3, 2, 3]
        ours = [results(adapted, trainer, delta) for delta in (0, 2)]
    for ids, result in zip((prompts[0], prompts[2]), ours, strict=True):
        assert agree(result, alone(model, engine, ids), tolerance=1e-11)


@ENGINES
def test_the_spans_of_a_step_have_their_mean(engine):
    model = fp64()
    options = dict(lr=0.1, steps=1, span_tokens=6, seed=2)

    def first(**more):
        with trainer_of(model, engine, **options | more).adapt(CONTEXT) as adapted:
            return adapted.losses[0, 0].item(), adapted.config

    loss, config = first(spans=3)
    generator = torch.Generator().manual_seed(config.random_stream(0, 0))
    places = torch.rand(3, generator=generator, dtype=torch.float64)
    starts = [int(place * (T - 6)) for place in places]
    expected = [span_loss(model, model, CONTEXT, s, s + 7).item() for s in starts]
    assert loss == pytest.approx(sum(expected) / 3, rel=1e-12)


@ENGINES
def test_several_contexts_train_one_delta(engine):
    model = fp64()
    prompts = [prompt_ids(n, seed=n)[0] for n in (40, 23)]
    trainer = trainer_of(model, engine, steps=1, span_tokens=6)
    weights = torch.tensor([0.25, 0.75])
    with trainer.adapt(prompts, deltas="shared", row_weights=weights) as adapted:
        loss = adapted.losses[0, 0].item()
    each = [alone(model, engine, ids)[0][0] for ids in prompts]
    assert loss == pytest.approx(0.25 * each[0] + 0.75 * each[1], rel=1e-12)


def test_a_grid_shares_one_prefill():
    model, forwards = fp64(), []
    trainer = trainer_of(model, steps=3, span_tokens=6)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    with trainer.adapt_grid(CONTEXT, lr=[0.1, 0.3]) as grid:
        ours = [results(grid, trainer, delta) for delta in range(2)]
    assert forwards == [(1, T)] + [(2, 7)] * 3
    handle.remove()
    for result, lr in zip(ours, (0.1, 0.3), strict=True):
        assert agree(result, alone(model, "factored", CONTEXT, lr=lr), tolerance=1e-11)


@ENGINES
def test_checkpointing_changes_no_bit(engine):
    model = fp64("qwen2")
    plain = session(model, engine, checkpointing=False)
    again = session(model, engine, checkpointing=True)
    assert plain[:2] == again[:2]
    assert all(torch.equal(a, b) for a, b in zip(plain[2], again[2], strict=True))


# ---------------------------------------------------------------------------- refused


def test_spans_that_do_not_fit():
    with trainer_of(fp64()).begin() as steps:
        frozen = steps.prefill(Batch(CONTEXT))
        assert frozen.nbytes == 3 * 2 * 2 * 8 * T * 8  # layers, both, heads, width, tokens, bytes
        for span in [(-1, 5), (5, 6), (7, 5), (38, T + 1)]:
            with pytest.raises(ValueError, match="of a context of 40 tokens"):
                frozen.spans([span])
        moved = Batch(CONTEXT, position_ids=torch.arange(1, T + 1)[None])
        for contexts in (frozen.spans([(3, 9)]), moved):
            with pytest.raises(ValueError, match="leave out past_key_values and position_ids"):
                steps.prefill(contexts)
        with pytest.raises(ValueError, match="no context 1"):
            frozen.spans([(0, 5)], rows=[1])


@pytest.mark.parametrize(
    "adapt",
    [
        lambda trainer: trainer.adapt(CONTEXT, labels=CONTEXT),
        lambda trainer: trainer.adapt({"input_ids": CONTEXT, "labels": CONTEXT}),
        lambda trainer: trainer.adapt_grid(CONTEXT, lr=[0.1, 0.2], labels=CONTEXT),
    ],
    ids=["given", "with the ids", "of a grid"],
)
def test_labels_cannot_be_drawn(adapt):
    with pytest.raises(ValueError, match="got labels, but kv='frozen' draws spans anywhere"):
        adapt(trainer_of(fp64()))


def test_no_spans_at_all():
    with trainer_of(fp64()).begin() as steps:
        frozen = steps.prefill(Batch(CONTEXT))
        for ends, rows in (([], None), ([(0, 5), (3, 8)], [0])):
            with pytest.raises(ValueError, match="spans: got . spans and . rows; give at least"):
                frozen.spans(ends, rows)
        with pytest.raises(ValueError, match=r"deltas \[1\] have no context; there are .* \[0\]"):
            frozen.drawn(steps.config, 0, [1])


def test_a_model_without_a_cache_is_refused():
    model = fp64()
    model.forward = lambda input_ids: pytest.fail("it ran")
    with pytest.raises(ValueError, match="LlamaForCausalLM does not put the keys and values"):
        trainer_of(model, "dense").adapt(CONTEXT)
    del model.forward


def test_a_soft_cap_is_not_forgotten():
    model = fp64("gemma2", "eager")
    with unchanged(model), trainer_of(model).begin() as steps:
        frozen = steps.prefill(Batch(CONTEXT))
        model.config._attn_implementation = "sdpa"
        with pytest.raises(
            ValueError, match="Gemma2Attention has softcap, which torch's attention"
        ):
            steps.step(frozen.spans([(20, 30)]))


def test_an_attention_that_is_not_replaced_is_noticed(monkeypatch):
    """It would see the span alone."""
    model = fp64()
    span_cache._register()
    interface = AttentionInterface._global_mapping
    monkeypatch.setitem(interface, span_cache._NAME, interface["sdpa"])
    sizes = span_cache._Layer.get_mask_sizes

    def of_the_span(self, given):
        return sizes(self, given)[0] - self.get_seq_length(), 0

    monkeypatch.setattr(span_cache._Layer, "get_mask_sizes", of_the_span)
    offset = dict(raising=False)  # transformers 5 asks for it
    monkeypatch.setattr(span_cache.SpanCache, "get_query_offset", lambda *args: 0, **offset)
    with unchanged(model), pytest.raises(ValueError, match="layer 0 does not go through"):
        session(model, "factored", SPANS[1:])
