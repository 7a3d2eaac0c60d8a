"""Many prompts in batches that fit, deltas that stop on their own, and which engine is planned."""

from dataclasses import replace

import pytest
import torch

from tests.families import tiny_model
from tests.loops import prompt_ids, weights
from ttt_fast import Batch, DivergedError, TTTConfig, TTTTrainer, calibration
from ttt_fast.engines import policy

LENGTHS = (9, 4, 13, 6, 9, 11, 5)
STEPS = 3
# Speeds with which each engine wins: a memory in which writing weights takes for ever, and modules
# that take long to be taken over.
SLOW_UPDATES = replace(
    calibration.default_machine("float32"),
    source="made up", update_gb_s=1e-3, copy_gb_s=1e-3, dense_module_us=1e4,
)  # fmt: skip
SLOW_FACTORS = replace(
    calibration.default_machine("float32"), source="made up", factored_module_us=1e6
)


def prompts_of(lengths=LENGTHS):
    return [prompt_ids(length, seed=n)[0] for n, length in enumerate(lengths)]


def fp64(family="llama_tied", **overrides):
    overrides = dict(attn_implementation="sdpa", num_hidden_layers=2) | overrides
    return tiny_model(family, torch.float64, **overrides)


def trainer_of(model, engine="factored", **options):
    return TTTTrainer(model, TTTConfig(**(dict(engine=engine, steps=STEPS, lr=2e-2) | options)))


def on(monkeypatch, machine):
    monkeypatch.setattr(calibration, "machine", lambda dtype, device="cpu": machine)


def assert_free_and_as_before(model, before):
    after = weights(model)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert all("forward" not in vars(module) for module in model.modules())
    trainer_of(model, steps=1).adapt(prompt_ids(5)).restore()


# ---------------------------------------------------------------------------- batches of prompts


@pytest.mark.parametrize("bound", [None, 40, 26, 1])
def test_every_prompt_once_by_length_within_the_bound(bound):
    model, prompts = tiny_model("llama", num_hidden_layers=2), prompts_of()
    trainer = trainer_of(model, max_batch_tokens=bound)
    batches = []
    for numbers, adapted in trainer.adapt_batches(prompts):
        assert adapted.n_deltas == len(numbers)
        for delta, number in enumerate(numbers):
            kept = adapted.prompt.attention_mask[delta] != 0
            assert torch.equal(adapted.prompt.input_ids[delta][kept], prompts[number])
        batches.append(numbers)
    taken = [number for numbers in batches for number in numbers]
    assert sorted(taken) == list(range(len(prompts)))
    lengths = [LENGTHS[number] for number in taken]
    assert lengths == sorted(LENGTHS)
    if bound is None:
        assert len(batches) == 1
        return
    for numbers, following in zip(batches, [*batches[1:], None], strict=True):
        longest = max(LENGTHS[number] for number in numbers)
        assert len(numbers) == 1 or len(numbers) * longest <= bound
        if following is not None:
            # As many as fit: one more would not have.
            assert (len(numbers) + 1) * LENGTHS[following[0]] > bound
    assert bound != 1 or len(batches) == len(prompts)


@pytest.mark.parametrize("engine", ["factored", "dense", "auto"])
def test_as_one_by_one(engine):
    model, prompts = fp64(), prompts_of()
    alone = []
    for prompt in prompts:
        with trainer_of(model).adapt(prompt) as adapted:
            alone.append((adapted.losses[0], adapted.grad_norms[0], adapted.state_dict()))
    seen = []
    for numbers, adapted in trainer_of(model, engine, max_batch_tokens=30).adapt_batches(prompts):
        for delta, number in enumerate(numbers):
            losses, norms, state = alone[number]
            torch.testing.assert_close(adapted.losses[delta], losses, rtol=1e-12, atol=0)
            torch.testing.assert_close(adapted.grad_norms[delta], norms, rtol=1e-11, atol=0)
            for name, tensor in adapted.state_dict(delta).items():
                torch.testing.assert_close(tensor, state[name], rtol=1e-10, atol=1e-13)
            seen.append(number)
    assert sorted(seen) == list(range(len(prompts)))


def test_the_dense_engine_takes_one_at_a_time():
    batches = trainer_of(tiny_model("llama"), "dense").adapt_batches(prompts_of())
    assert [len(numbers) for numbers, _ in batches] == [1] * len(LENGTHS)


def test_the_dense_engine_is_weighed_without_copies(monkeypatch):
    """Each batch is restored before the next, so what D copies would need decides nothing."""
    plan, copies = TTTTrainer.plan, []

    def only_without_copies(self, n_deltas, n_tokens, in_turn=False, **found):
        choice = plan(self, n_deltas, n_tokens, in_turn=in_turn, **found)
        copies.append(
            choice.predicted_bytes["dense"] > plan(self, 1, n_tokens).predicted_bytes["dense"]
        )
        return choice if copies[-1] else replace(choice, engine="dense")

    trainer = trainer_of(tiny_model("llama"))
    monkeypatch.setattr(TTTTrainer, "plan", only_without_copies)
    assert trainer._prompts_at_once([8, 8, 8, 8]) == 1
    assert True in copies and copies[-1] is False


def test_as_many_as_the_memory_holds():
    model, prompts = tiny_model("llama"), prompts_of((8,) * 6)
    plan = trainer_of(model).plan(6, 8)
    for at_once in (1, 2, 4):
        # What at_once deltas need, as the plan for them says; one more does not fit.
        work = policy.workload(
            model, trainer_of(model).selections, TTTConfig(steps=STEPS), at_once, 8
        )
        budget = sum(policy.factored_bytes(work).values())
        batches = trainer_of(model, memory_budget=budget).adapt_batches(prompts)
        assert max(len(numbers) for numbers, _ in batches) == at_once
    assert plan.deltas_at_once == 6


def test_generation_answers_each_prompt():
    model, prompts = tiny_model("llama", attn_implementation="sdpa"), prompts_of((4, 9, 6, 5))
    options = dict(max_new_tokens=4, do_sample=False)
    trainer = trainer_of(model, lr=0.2, max_batch_tokens=14)
    answers = {}
    for numbers, adapted in trainer.adapt_batches(prompts):
        for number, ids in zip(numbers, adapted.generate(**options), strict=True):
            answers[number] = ids[-4:]
    assert len(answers) == 4
    for number, prompt in enumerate(prompts):
        with trainer.adapt(prompt) as alone:
            assert torch.equal(alone.generate(**options)[0, -4:], answers[number])


def test_the_model_is_free_between_batches():
    model, prompts = tiny_model("llama"), prompts_of((5, 6, 7))
    before = weights(model)
    trainer = trainer_of(model, max_batch_tokens=1)
    earlier = []
    for _, adapted in trainer.adapt_batches(prompts):
        assert all("restored" in repr(other) for other in earlier)
        assert "attached" in repr(adapted)
        earlier.append(adapted)
    assert "restored" in repr(earlier[-1])
    assert_free_and_as_before(model, before)


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_leaving_the_loop_early_restores(engine):
    model = tiny_model("llama")
    before = weights(model)
    for _, adapted in trainer_of(model, engine, max_batch_tokens=1).adapt_batches(prompts_of()):
        left = adapted
        break
    assert "restored" in repr(left)
    assert_free_and_as_before(model, before)


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_an_error_in_the_loop_restores(engine):
    model = tiny_model("llama")
    before = weights(model)
    trainer = trainer_of(model, engine, max_batch_tokens=1)
    with pytest.raises(KeyError, match="the caller's"):
        for numbers, _ in trainer.adapt_batches(prompts_of()):
            if numbers == [6]:
                raise KeyError("the caller's")
    # A generator that somebody still refers to ends when it is closed.
    batches = trainer.adapt_batches(prompts_of())
    next(batches)
    batches.close()
    assert_free_and_as_before(model, before)


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_a_batch_that_diverges_restores(engine):
    model = tiny_model("llama")
    before = weights(model)
    with pytest.raises(DivergedError):
        for _ in trainer_of(model, engine, lr=1e30, max_grad_norm=None).adapt_batches(prompts_of()):
            pass
    assert_free_and_as_before(model, before)


def test_options_are_adapts_and_the_bar_counts_prompts(capsys):
    model, reports = tiny_model("llama"), []
    trainer = trainer_of(model, max_batch_tokens=20)
    steps = [
        adapted.steps.tolist()
        for _, adapted in trainer.adapt_batches(
            prompts_of((5, 9, 6)), progress=True, on_step=reports.append,
            stop=lambda report: report.step == 2,
        )
    ]  # fmt: skip
    assert steps == [[2, 2], [2]]
    assert [report.step for report in reports] == [1, 2, 1, 2]
    assert "3/3" in capsys.readouterr().err
    with pytest.raises(TypeError, match="labels_of"):
        next(trainer.adapt_batches(prompts_of(), labels_of=1))


def test_texts():
    def tokenizer(text):
        return {"input_ids": [3 + ord(c) % 90 for c in text]}

    trainer = TTTTrainer(tiny_model("llama"), TTTConfig(steps=1), tokenizer=tokenizer)
    texts = ["a longer text", "short", "a text"]
    taken = [number for numbers, _ in trainer.adapt_batches(texts) for number in numbers]
    assert taken == [1, 2, 0]


def test_refused_batches():
    trainer = trainer_of(tiny_model("llama"))
    ids = prompt_ids(6, n_rows=2)
    with pytest.raises(ValueError, match="got attention_mask with the prompts"):
        next(trainer.adapt_batches({"input_ids": ids, "attention_mask": torch.ones_like(ids)}))
    with pytest.raises(ValueError, match="empty"):
        next(trainer.adapt_batches([]))
    with pytest.raises(ValueError, match="at least two tokens"):
        next(trainer.adapt_batches([ids[0], torch.tensor([5])]))
    with pytest.raises(ValueError, match="no tokenizer"):
        next(trainer.adapt_batches(["a", "b"]))


# ---------------------------------------------------------------------------- stop


@pytest.mark.parametrize("bound", [None, 1])
def test_each_delta_stops_for_itself_in_both_engines(bound):
    """The same losses, steps and weights, whatever goes through the model together."""
    model, prompts = fp64(), prompts_of((9, 6, 11, 7))
    ends = {0: 2, 1: 5, 2: 1, 3: 3}

    def stop(report):
        (delta,) = (~report.losses.isnan()).nonzero().flatten().tolist()
        assert report.grad_norms.isnan().sum() == 3
        return report.step == ends[delta]

    runs = {}
    for engine in ("factored", "dense"):
        trainer = trainer_of(model, engine, steps=5, weight_decay=0.1, max_batch_tokens=bound)
        with trainer.adapt(prompts, deltas="independent", stop=stop) as adapted:
            assert adapted.steps.tolist() == [2, 5, 1, 3]
            assert adapted.losses.isnan().sum(1).tolist() == [3, 0, 4, 2]
            runs[engine] = adapted, [adapted.state_dict(delta) for delta in range(4)]
    (ours, states), (theirs, expected) = runs["factored"], runs["dense"]
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=1e-11, atol=0, equal_nan=True)
    torch.testing.assert_close(
        ours.grad_norms, theirs.grad_norms, rtol=1e-11, atol=0, equal_nan=True
    )
    for state, other in zip(states, expected, strict=True):
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("engine", ["factored", "dense"])
def test_a_delta_that_stopped_is_what_it_was_at_that_step(engine):
    model, prompts = fp64(), prompts_of((9, 6))

    def stop(report):
        return report.step == 2 and not report.losses[0].isnan()

    trainer = trainer_of(model, engine, steps=4)
    with trainer.adapt(prompts, deltas="independent", stop=stop) as adapted:
        states = [adapted.state_dict(delta) for delta in range(2)]
    for delta, steps in enumerate((2, 4)):
        with trainer_of(model, engine, steps=steps).adapt(prompts[delta]) as alone:
            for name, tensor in alone.state_dict().items():
                torch.testing.assert_close(states[delta][name], tensor, rtol=1e-10, atol=1e-13)


def test_a_report_of_one_delta():
    seen = []
    model = tiny_model("llama")
    with trainer_of(model, steps=1).adapt(
        prompt_ids(7, n_rows=3), deltas="independent", on_step=seen.append
    ):
        pass
    (report,) = seen
    for delta in range(3):
        one = report.of(delta)
        assert one.step == report.step
        for name in ("losses", "grad_norms"):
            kept = getattr(one, name)
            assert kept[delta] == getattr(report, name)[delta]
            assert kept.isnan().tolist() == [d != delta for d in range(3)]
            # The whole report stays whole.
            assert not getattr(report, name).isnan().any()


# ---------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(
    ("machine", "engine"), [(SLOW_UPDATES, "factored"), (SLOW_FACTORS, "dense")], ids=str
)
def test_auto_takes_what_is_predicted_to_be_faster(monkeypatch, machine, engine):
    on(monkeypatch, machine)
    model = fp64()
    trainer = trainer_of(model, "auto")
    plan = trainer.plan(2, 9)
    other = {"factored": "dense", "dense": "factored"}[engine]
    assert plan.engine == engine
    assert plan.predicted_ms[engine] < plan.predicted_ms[other]
    with trainer.adapt(prompt_ids(9, n_rows=2), deltas="independent") as adapted:
        assert adapted.choice == trainer.plan(2, 9)
        assert adapted.report().startswith(f"engine {engine}")
        assert f"chosen {plan.reason}" in adapted.report()
        assert plan.reason.startswith(f"{engine}: ") and other in plan.reason
        losses = adapted.losses
    # It is only a matter of time: the numbers are the same.
    with trainer_of(model, other).adapt(prompt_ids(9, n_rows=2), deltas="independent") as adapted:
        assert adapted.choice.engine == other
        assert f"chosen {other}: asked for" in adapted.report()
        torch.testing.assert_close(adapted.losses, losses, rtol=1e-11, atol=0)


def test_the_memory_budget_decides_before_the_time(monkeypatch):
    on(monkeypatch, SLOW_UPDATES)
    model = tiny_model("llama")
    free = trainer_of(model, "auto", steps=400).plan(1, 60)
    needed = free.predicted_bytes
    assert free.engine == "factored" and needed["dense"] < needed["factored"]
    budget = (needed["dense"] + needed["factored"]) // 2
    plan = trainer_of(model, "auto", steps=400, memory_budget=budget).plan(1, 60)
    assert plan.engine == "dense" and plan.reason.startswith("dense: it fits with")
    # And the other way about, where the dense engine's copies do not fit.
    on(monkeypatch, SLOW_FACTORS)
    free = trainer_of(model, "auto").plan(1, 5)
    needed = free.predicted_bytes
    assert free.engine == "dense" and needed["factored"] < needed["dense"]
    trainer = trainer_of(model, "auto", memory_budget=(needed["dense"] + needed["factored"]) // 2)
    with trainer.adapt(prompt_ids(5)) as adapted:
        assert adapted.choice.engine == "factored"
        assert "dense would need" in adapted.report()


def test_what_is_left_of_the_device_without_a_budget(monkeypatch):
    trainer = trainer_of(tiny_model("llama"), "auto")
    monkeypatch.setattr(policy, "free_bytes", lambda device="cpu": 1)
    assert "neither engine fits" in trainer.plan(1, 9).reason


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(optimizer="adamw"), "adamw is not linear in the gradient"),
        (dict(rounding="stochastic"), "rounding='stochastic' is about weights that are written"),
        (dict(rounding="torch"), "rounding='torch'"),
        (dict(accumulate="delta"), "accumulate='delta' keeps a dense delta"),
        (dict(snapshot="undo"), "snapshot='undo'"),
    ],
    ids=str,
)
def test_auto_is_dense_for_what_only_dense_can(monkeypatch, options, reason):
    on(monkeypatch, SLOW_UPDATES)
    model = tiny_model("llama", torch.bfloat16)
    assert trainer_of(model, "auto").plan(1, 9).engine == "factored"
    with trainer_of(model, "auto", **options).adapt(prompt_ids(9)) as adapted:
        assert adapted.choice.engine == "dense"
        assert adapted.choice.reason.startswith(f"dense: {reason}")
        assert list(adapted.choice.predicted_ms) == ["dense"]


def test_auto_is_dense_for_experts(monkeypatch):
    on(monkeypatch, SLOW_UPDATES)
    with trainer_of(tiny_model("mixtral"), "auto").adapt(prompt_ids(9)) as adapted:
        assert adapted.choice.engine == "dense"
        assert "chosen dense: model.layers.0.mlp" in adapted.report()
    plan = trainer_of(tiny_model("mixtral"), "auto", scope="attention").plan(1, 9)
    assert plan.engine == "factored"


def test_auto_is_dense_under_autocast(monkeypatch):
    """Factors would be in the dtype of the weights."""
    on(monkeypatch, SLOW_UPDATES)
    trainer = trainer_of(tiny_model("llama"), "auto")
    assert trainer.plan(1, 9).engine == "factored"
    with torch.autocast("cpu", torch.bfloat16):
        assert trainer.plan(1, 9).engine == "dense"


def test_one_plan_may_be_asked_for_another_engine():
    trainer = trainer_of(tiny_model("llama"), "auto")
    for engine in ("factored", "dense"):
        plan = trainer.plan(3, 9, engine)
        assert plan.engine == engine and plan.reason.startswith(f"{engine}: asked for")
    with pytest.raises(ValueError, match="engine='fast' is unknown"):
        trainer.plan(1, 9, "fast")


# ---------------------------------------------------------------------------- sessions


@pytest.mark.parametrize("n_tokens", [None, 5, 9])
def test_a_session_is_planned_with_its_numbers(monkeypatch, n_tokens):
    """More tokens than were announced are no error: n_tokens is for the plan."""
    model, rows = fp64(), prompt_ids(9, n_rows=2)
    asked = []
    trainer = trainer_of(model, "auto")
    choose = trainer._planner.choose
    monkeypatch.setattr(
        trainer._planner,
        "choose",
        lambda work: asked.append((work.deltas, work.tokens)) or choose(work, "factored"),
    )
    with trainer.begin(n_deltas=2, n_tokens=n_tokens) as session:
        for _ in range(STEPS):
            session.step(Batch(rows, delta_index=torch.arange(2)))
        with session.end() as adapted:
            losses = adapted.losses
    assert asked == [(2, n_tokens or 64)]
    with trainer_of(model).adapt(rows, deltas="independent") as adapted:
        assert torch.equal(adapted.losses, losses)


@pytest.mark.parametrize("n_deltas", [0, -1])
def test_a_session_without_deltas(n_deltas):
    with pytest.raises(ValueError, match=f"n_deltas={n_deltas}; it must be at least 1"):
        trainer_of(tiny_model("llama")).begin(n_deltas=n_deltas)


def test_load_brings_an_adaptation_back(tmp_path):
    model = tiny_model("llama")
    trainer = trainer_of(model, lr=0.2)
    prompts = prompts_of((7, 9))
    options = dict(max_new_tokens=4, do_sample=False)
    with trainer.adapt(prompts, deltas="independent") as adapted:
        adapted.save(tmp_path / "two.safetensors")
        expected, losses, own = adapted.generate(**options), adapted.losses, adapted.loss()
        with pytest.raises(RuntimeError, match="held by"):
            trainer.load(tmp_path / "two.safetensors")
    with trainer.load(tmp_path / "two.safetensors") as loaded:
        assert torch.equal(loaded.losses, losses)
        assert torch.equal(loaded.loss(), own)
        assert torch.equal(loaded.generate(**options), expected)
    other = trainer_of(tiny_model("llama", seed=5))
    with pytest.raises(ValueError, match="made for another model: its model.embed_tokens.weight"):
        other.load(tmp_path / "two.safetensors")
    # A refusal holds nothing.
    other.adapt(prompts[0]).restore()


def test_load_uses_the_trainers_objective(tmp_path):
    model = tiny_model("llama")

    def first_token(outputs, batch):
        return outputs.logits[:, 0, 5]

    trainer = TTTTrainer(model, TTTConfig(engine="factored", steps=2), objective=first_token)
    with trainer.adapt(prompt_ids(6)) as adapted:
        adapted.save(tmp_path / "one.safetensors")
        expected = adapted.loss()
    with trainer.load(tmp_path / "one.safetensors") as loaded:
        assert torch.equal(loaded.loss(), expected)
    with trainer_of(model).load(tmp_path / "one.safetensors") as loaded:
        assert not torch.equal(loaded.loss(), expected)
