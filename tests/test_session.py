"""Four methods written on the session as their users would, each against a plain torch loop."""

import copy

import pytest
import torch
from torch.nn import functional as F

from tests.families import tiny_model
from tests.loops import distance, prompt_ids, row_loss, sgd_loop, twin, weights
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, negative_log_likelihood, ops

OPTIONS = dict(lr=2e-2, momentum=0.9, weight_decay=0.01, max_grad_norm=1.0)


def trainer_of(model, **options):
    objective = options.pop("objective", None)
    # Weights are looked at in the model; tests/test_factored.py has the other engine's sessions.
    options = dict(engine="dense") | OPTIONS | options
    return TTTTrainer(model, TTTConfig(**options), objective=objective)


def fp64(family="llama"):
    """A float64 model and a twin for the loop."""
    model = tiny_model(family, torch.float64)
    return model, twin(model)


# ---------------------------------------------------------------------------- four methods


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_one_prompt_many_times_looked_at_on_the_way(family):
    """The prompt K times; the model is evaluated after steps 0, 2 and 4 of one trajectory."""
    model, other = fp64(family)
    before = weights(model)
    prompt, question = prompt_ids(9), prompt_ids(7, seed=2)
    ours, theirs = [], []
    with trainer_of(model).begin() as session:
        for step in range(5):
            if step in (0, 2, 4):
                with torch.no_grad():
                    ours.append(model(question).logits)
            session.step(Batch(prompt))

    def loss_of(m):
        with torch.no_grad():
            theirs.append(m(question).logits)
        return row_loss(m, prompt[0])

    sgd_loop(other, [loss_of] * 5, **OPTIONS)
    for left, right in zip(ours, theirs[::2], strict=True):
        assert torch.allclose(left, right, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours[0], ours[1])
    assert all(torch.equal(value, before[n]) for n, value in model.state_dict().items())


def test_leave_one_out_few_shot():
    """Every shot is held out once: rows of one delta, with labels on the held-out answer only."""
    model, other = fp64("qwen2")
    shots = [prompt_ids(4, seed=seed)[0] for seed in range(3)]
    rows, labels = [], []
    for held_out in range(3):
        context = [shot for i, shot in enumerate(shots) if i != held_out]
        row = torch.cat([*context, shots[held_out]])
        rows.append(row)
        labels.append(torch.where(torch.arange(12) >= 10, row, -100))  # its last two tokens
    batch = Batch(torch.stack(rows), labels=torch.stack(labels))
    with trainer_of(model).begin() as session:
        for _ in range(4):
            report = session.step(batch)
        ours = weights(model)
    losses, _ = sgd_loop(
        other,
        [lambda m: sum(row_loss(m, r, t) for r, t in zip(rows, labels, strict=True)) / 3] * 4,
        **OPTIONS,
    )
    assert report.losses[0].item() == pytest.approx(losses[-1], rel=1e-12)
    for name, param in other.named_parameters():
        assert torch.allclose(ours[name], param, rtol=1e-11, atol=1e-13), name


def test_nearest_neighbours():
    """Other tokens, and another number of them, at each step; then the query."""
    model, other = fp64("gemma3")
    neighbours = [prompt_ids(n, seed=n) for n in (11, 5, 2, 8)]
    session = trainer_of(model).begin()
    for neighbour in neighbours:
        session.step(Batch(neighbour))
    with session.end() as adapted:
        losses, norms = sgd_loop(
            other, [lambda m, ids=ids: row_loss(m, ids[0]) for ids in neighbours], **OPTIONS
        )
        assert distance(model, other) <= 1e-12
        assert adapted.losses[0].tolist() == pytest.approx(losses, rel=1e-12)
        assert adapted.grad_norms[0].tolist() == pytest.approx(norms, rel=1e-12)
        query = prompt_ids(6, seed=30)
        assert adapted.loss(query).item() == pytest.approx(
            row_loss(other, query[0]).item(), rel=1e-11
        )


def test_score_then_train_streaming():
    """Each chunk is scored by the weights that have not seen it, then trained on."""
    model, other = fp64("opt")
    chunks = [prompt_ids(8, seed=seed) for seed in range(5)]
    scores = []
    with trainer_of(model, steps=1).begin() as session:
        for chunk in chunks:
            scores.append(session.loss(Batch(chunk)).item())
            session.step(Batch(chunk))
    losses, _ = sgd_loop(
        other, [lambda m, ids=ids: row_loss(m, ids[0]) for ids in chunks], **OPTIONS
    )
    assert scores == pytest.approx(losses, rel=1e-12)


def test_a_chunk_behind_a_cache():
    """A cache in front of the rows: as the whole text with labels on the chunk, K times."""
    model, _ = fp64("llama")
    text = prompt_ids(12)
    with torch.no_grad():
        cache = model(text[:, :7], use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    # Only the last layer's output side adapts, so that the cached keys stay what they are.
    scope = r"layers\.2\.mlp\.|lm_head"
    session = trainer_of(model, scope=scope).begin()
    for _ in range(3):
        session.step(Batch(text[:, 7:], past_key_values=cache))
    cached = session.end()
    with cached:
        ours = weights(model)
    assert cache.get_seq_length() == 7
    assert torch.equal(cache.layers[0].keys, kept.layers[0].keys)
    labels = torch.where(torch.arange(12) >= 8, text, -100)
    session = trainer_of(model, scope=scope).begin()
    for _ in range(3):
        session.step(Batch(text, labels=labels))
    with session.end() as whole:
        assert torch.allclose(cached.losses, whole.losses, rtol=1e-11)
        for name, value in model.state_dict().items():
            assert torch.allclose(value, ours[name], rtol=1e-10, atol=1e-12), name


def test_padding_behind_a_cache():
    model, _ = fp64("llama")
    text = prompt_ids(12)
    with torch.no_grad():
        cache = model(text[:, :7], use_cache=True).past_key_values
    session = trainer_of(model, scope="ffn").begin()
    with session:
        short = session.loss(Batch(text[:, 7:10], past_key_values=cache))
        mask = torch.tensor([[1, 1, 1, 0, 0]])
        padded = Batch(text[:, 7:], attention_mask=mask, past_key_values=cache)
        assert session.loss(padded).item() == pytest.approx(short.item(), rel=1e-12)


# ---------------------------------------------------------------------------- deltas, weights


def test_interleaved_deltas_equal_separate_sessions():
    model, _ = fp64("qwen3")
    before = weights(model)
    rows = prompt_ids(9, n_rows=4)
    trainer = trainer_of(model)
    # Delta 0 has rows 0 and 3; at odd steps delta 2 sits out.
    schedule = [([0, 1, 2, 3], [0, 1, 2, 0]), ([1, 0, 3], [1, 0, 0])] * 2
    session = trainer.begin(n_deltas=3)
    for index, deltas in schedule:
        report = session.step(Batch(rows[index], delta_index=torch.tensor(deltas)))
    assert report.losses.isnan().tolist() == [False, False, True]
    question = prompt_ids(6, seed=5)
    with session.end() as adapted:
        assert adapted.steps.tolist() == [4, 4, 2]
        assert adapted.losses.isnan().sum(1).tolist() == [0, 0, 2]
        together = []
        for delta in range(3):
            with adapted.weights_of(delta) as adapted_model, torch.no_grad():
                together.append((weights(model), adapted_model(question).logits))
            assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    for delta in range(3):
        session = trainer.begin()
        for index, deltas in schedule:
            mine = [i for i, d in zip(index, deltas, strict=True) if d == delta]
            if mine:
                session.step(Batch(rows[mine]))
        with session.end() as alone, torch.no_grad():
            kept = ~adapted.losses[delta].isnan()
            assert torch.allclose(alone.losses[0], adapted.losses[delta][kept], rtol=1e-12)
            assert torch.allclose(model(question).logits, together[delta][1], rtol=1e-11)
            for name, value in model.state_dict().items():
                assert torch.allclose(value, together[delta][0][name], rtol=1e-11, atol=1e-14)


def test_row_weights_and_token_weights():
    model, other = fp64()
    rows = prompt_ids(6, n_rows=2)
    row_weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    token_weights = torch.tensor([[9.0, 1, 2, 0, 1, 1], [9.0, 0, 0, 0.5, 0, 3]]).double()

    def loss_of(m):
        logits = m(rows, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none")
        kept = token_weights[:, 1:]
        return (row_weights * (nll * kept).sum(1) / kept.sum(1)).sum()

    sgd_loop(other, [loss_of] * 3, **OPTIONS)
    batch = Batch(rows, row_weights=row_weights, token_weights=token_weights)
    with trainer_of(model).begin() as session:
        for _ in range(3):
            session.step(batch)
        assert distance(model, other) <= 1e-12


def test_sum_over_tokens_and_the_mean_over_rows():
    model, other = fp64()
    rows = prompt_ids(6, n_rows=2)
    labels = rows.clone()
    labels[0, :4] = -100

    def loss_of(m):
        logits = m(rows, use_cache=False).logits[:, :-1]
        nll = F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none")
        return nll.sum(1).mean()

    sgd_loop(other, [loss_of] * 3, **OPTIONS)
    with trainer_of(model, reduction="sum").begin() as session:
        for _ in range(3):
            session.step(Batch(rows, labels=labels))
        assert distance(model, other) <= 1e-12


def entropy(outputs, batch):
    """Mean entropy of the predictions: learns without labels."""
    log_p = outputs.logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1).mean(1)


def test_an_objective_of_the_users_own():
    model, other = fp64("phi3")
    rows = prompt_ids(7, n_rows=2)
    sgd_loop(other, [lambda m: entropy(m(rows, use_cache=False), None).mean()] * 4, **OPTIONS)
    with trainer_of(model, objective=entropy).begin() as session:
        first = session.step(Batch(rows)).losses
        for _ in range(3):
            last = session.step(Batch(rows)).losses
        assert distance(model, other) <= 1e-12
    assert last < first


def test_an_objective_that_adds_to_the_default():
    model, other = fp64()
    ids = prompt_ids(7)

    def regularised(outputs, batch):
        return negative_log_likelihood(outputs, batch) + 0.1 * entropy(outputs, batch)

    def loss_of(m):
        outputs = m(ids, use_cache=False)
        return F.cross_entropy(outputs.logits[0, :-1], ids[0, 1:]) + 0.1 * entropy(outputs, None)[0]

    sgd_loop(other, [loss_of] * 3, **OPTIONS)
    with trainer_of(model, steps=3, objective=regularised).adapt(ids):
        assert distance(model, other) <= 1e-12


# ---------------------------------------------------------------------------- life of a session


@pytest.mark.parametrize(
    "options",
    [dict(), dict(optimizer="adamw", lr=1e-3), dict(accumulate="delta"), dict(dampening=0.5)],
    ids=["sgd", "adamw", "delta", "dampening"],
)
def test_nothing_leaks_from_prompt_to_prompt(options):
    model = tiny_model("llama_tied", torch.float32)
    trainer = trainer_of(model, steps=4, **options)
    with trainer.adapt(prompt_ids(9)) as first:
        expected = weights(model)
    with trainer.adapt(prompt_ids(20, n_rows=2, seed=8), deltas="independent"):
        pass
    with pytest.raises(DivergedError):
        poison = objective = trainer.objective
        trainer.objective = lambda outputs, batch: poison(outputs, batch) * torch.inf
        trainer.adapt(prompt_ids(9))
    trainer.objective = objective
    with trainer.adapt(prompt_ids(9)) as second:
        assert torch.equal(first.losses, second.losses)
        assert torch.equal(first.update_landed, second.update_landed)
        assert all(torch.equal(v, expected[n]) for n, v in model.state_dict().items())


def test_looking_seldom_stops_updates_at_the_step_that_was_not_finite():
    """check_every=4: step 2 is NaN; steps 3 and 4 change nothing; the error names step 2."""
    model, _ = fp64()
    before = weights(model)
    calls = []

    def broken_once(outputs, batch):
        calls.append(weights(model))
        losses = negative_log_likelihood(outputs, batch)
        return losses * torch.nan if len(calls) == 2 else losses

    session = trainer_of(model, check_every=4, objective=broken_once).begin()
    batch = Batch(prompt_ids())
    for _ in range(3):
        session.step(batch)
    with pytest.raises(DivergedError, match="step 2 ") as caught:
        session.step(batch)
    assert caught.value.step == 2 and caught.value.delta == 0
    name = "lm_head.weight"
    assert not torch.equal(calls[0][name], calls[1][name])
    assert all(torch.equal(calls[1][n], calls[3][n]) for n in before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_the_end_looks_at_what_was_not_looked_at():
    model, _ = fp64()
    session = trainer_of(
        model, check_every=100, objective=lambda o, b: negative_log_likelihood(o, b) * torch.nan
    ).begin()
    session.step(Batch(prompt_ids()))
    with pytest.raises(DivergedError, match="step 1 "):
        session.end()
    trainer_of(model).begin().abort()


def test_one_of_several_deltas_diverges():
    model, _ = fp64()

    def broken(outputs, batch):
        losses = negative_log_likelihood(outputs, batch)
        return losses * torch.where(batch.delta_index == 1, torch.inf, 1.0)

    session = trainer_of(model, lr=[0.1], steps=1, objective=broken).begin(n_deltas=2)
    with pytest.raises(DivergedError, match="step 1 of delta 1") as caught:
        session.step(Batch(prompt_ids(n_rows=2), delta_index=torch.tensor([0, 1])))
    assert caught.value.delta == 1


@pytest.mark.parametrize("close", ["end", "abort"])
def test_a_session_that_is_over_refuses(close):
    model, _ = fp64()
    session = trainer_of(model).begin()
    session.step(Batch(prompt_ids()))
    adapted = getattr(session, close)()
    for call in (
        lambda: session.step(Batch(prompt_ids())),
        lambda: session.loss(Batch(prompt_ids())),
        session.end,
    ):
        with pytest.raises(RuntimeError, match="this session is over"):
            call()
    session.abort()
    if close == "end":
        assert adapted.loss(prompt_ids()).isfinite().all()
        adapted.restore()
    trainer_of(model).begin().abort()


def test_a_batch_that_does_not_fit_leaves_the_session_as_it_was():
    model, other = fp64()
    ids = prompt_ids()
    with trainer_of(model).begin() as session:
        session.step(Batch(ids))
        with pytest.raises(ValueError, match="delta_index has values 1 to 1 .* 1 deltas"):
            session.step(Batch(ids, delta_index=torch.tensor([1])))
        with pytest.raises(TypeError, match="give a ttt_fast.Batch"):
            session.step(ids)
        assert session.step(Batch(ids)).step == 2
        sgd_loop(other, [lambda m: row_loss(m, ids[0])] * 2, **OPTIONS)
        assert distance(model, other) <= 1e-12


def test_a_number_of_deltas_that_cannot_be():
    model, _ = fp64()
    with pytest.raises(ValueError, match="n_deltas=0"):
        trainer_of(model).begin(n_deltas=0)
    with pytest.raises(ValueError, match="one delta; the session has 2"):
        trainer_of(model, snapshot="undo").begin(n_deltas=2)
    trainer_of(model).begin().abort()


def test_the_objective_must_give_one_loss_a_row():
    model, _ = fp64()
    before = weights(model)
    for objective, message in (
        (lambda o, b: o.logits.mean(), r"the objective returned \(\)"),
        (lambda o, b: 1.0, "the objective returned float"),
        (lambda o, b: torch.ones(b.n_rows), "does not depend on the selected parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            trainer_of(model, objective=objective).adapt(prompt_ids())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def test_no_two_updates_share_their_random_bits(monkeypatch):
    seeds = []
    update = ops.sgd_

    def note(*args, seed, **kwargs):
        seeds.append(seed)
        update(*args, seed=seed, **kwargs)

    monkeypatch.setattr(ops, "sgd_", note)
    model = tiny_model("llama", torch.bfloat16)
    groups = [{"params": "norm", "weight_decay": 0.1}]
    config = TTTConfig(steps=3, rounding="stochastic", param_groups=groups)
    prompts = [prompt_ids(5, seed=1)[0], prompt_ids(6, seed=2)[0]]
    TTTTrainer(model, config).adapt(prompts, deltas="independent").restore()
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 2
