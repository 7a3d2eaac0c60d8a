"""The model type of lm-evaluation-harness: the weights of a loop written by hand, each once."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests import study_cases as cases
from tests.loops import row_loss, sgd_loop, weights
from ttt_fast import TTTTrainer

ROOT = Path(__file__).parents[1]
SETTINGS = dict(steps=3, lr=5e-2, momentum=0.9, max_grad_norm=1.0, scope="ffn")
CONTEXTS = ("the cat sat on the mat and", "absence makes the heart grow", "how many pears")
OPTIONS = (" light stone", " heavy", " fonder river cat")

pytestmark = pytest.mark.lm_eval


@pytest.fixture(scope="module")
def tokenizer():
    return cases.tokenizer()


@pytest.fixture
def make(tokenizer):
    """Makes the harness's model of a torch model, and its own of the same."""

    def make(model, **options):
        from ttt_fast.harness import TTTLM

        return TTTLM(model, tokenizer=tokenizer, **(SETTINGS | options))

    return make


@pytest.fixture
def bare(tokenizer):
    def bare(model, **options):
        from lm_eval.models.huggingface import HFLM

        return HFLM(model, tokenizer=tokenizer, **options)

    return bare


@pytest.fixture
def request_of():
    def request_of(*arguments):
        from lm_eval.api.instance import Instance

        return Instance("loglikelihood", {}, arguments, 0)

    return request_of


def adapted_by_hand(model, losses):
    """A copy of the model behind the loop."""
    other = copy.deepcopy(model)
    params = [p for name, p in other.named_parameters() if ".mlp." in name]
    values, _ = sgd_loop(other, losses, lr=5e-2, momentum=0.9, max_grad_norm=1.0, params=params)
    other.requires_grad_(False)
    return other, values


def ids_of(tokenizer, text):
    return torch.tensor(tokenizer(text)["input_ids"])


def log_likelihood(model, context, whole):
    logs = model(whole[None]).logits[0, :-1].log_softmax(-1)
    chosen = logs.gather(1, whole[1:, None])[:, 0]
    return float(chosen[context.numel() - 1 :].sum())


@pytest.mark.parametrize("engine", ["factored", "dense"])
@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_options_are_scored_by_the_loops_weights(
    make, request_of, tokenizer, monkeypatch, engine, batch_size
):
    model = cases.model(torch.float64)
    before = weights(model)
    prompts = []
    adapt = TTTTrainer.adapt
    monkeypatch.setattr(
        TTTTrainer, "adapt", lambda self, p, **o: prompts.extend(p) or adapt(self, p, **o)
    )
    lm = make(model, engine=engine, batch_size=batch_size)
    # An option after the other, as a task gives them, and in another order.
    pairs = [(context, option) for option in OPTIONS for context in CONTEXTS]
    found = lm.loglikelihood([request_of(*pair) for pair in pairs], disable_tqdm=True)
    assert len(prompts) == len(CONTEXTS)  # once each, whatever the number of options
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for (context, option), (likelihood, greedy) in zip(pairs, found, strict=True):
        ids = ids_of(tokenizer, context)
        other, _ = adapted_by_hand(model, [lambda m, ids=ids: row_loss(m, ids)] * 3)
        whole = ids_of(tokenizer, context + option)
        assert likelihood == pytest.approx(log_likelihood(other, ids, whole), rel=1e-10)
        best = other(whole[None]).logits[0, ids.numel() - 1 : -1].argmax(-1)
        assert greedy == bool((best == whole[ids.numel() :]).all())


def test_neighbours_and_order_change_nothing(make, request_of):
    model = cases.model(torch.float64)
    pairs = [(context, option) for context in CONTEXTS for option in OPTIONS]
    requests = [request_of(*pair) for pair in pairs]
    lm = make(model, engine="factored")
    together = lm.loglikelihood(requests, disable_tqdm=True)
    turned = lm.loglikelihood(requests[::-1], disable_tqdm=True)[::-1]
    alone = [lm.loglikelihood([each], disable_tqdm=True)[0] for each in requests]
    for one, two, three in zip(together, turned, alone, strict=True):
        assert one == pytest.approx(two, rel=1e-12)
        assert one == pytest.approx(three, rel=1e-10)


def test_without_a_step_it_is_hf_to_the_bit(make, bare, request_of):
    model = cases.model()
    ours, theirs = make(model, steps=0), bare(model)
    pairs = [request_of(context, option) for context in CONTEXTS for option in OPTIONS]
    answers = [request_of(c, {"until": ["."], "max_gen_toks": 6}) for c in CONTEXTS]
    options = {"disable_tqdm": True}
    assert ours.loglikelihood(pairs, **options) == theirs.loglikelihood(pairs, **options)
    assert ours.generate_until(answers, **options) == theirs.generate_until(answers, **options)


def test_nothing_is_learned_without_a_context(make, bare, request_of, monkeypatch):
    model = cases.model()
    monkeypatch.setattr(TTTTrainer, "adapt", lambda *a, **o: pytest.fail("it adapted"))
    pair = [request_of("", " heavy stone")]
    options = {"disable_tqdm": True}
    assert make(model).loglikelihood(pair, **options) == bare(model).loglikelihood(pair, **options)


def test_answers_are_those_of_the_loops_weights(make, bare, request_of):
    model = cases.model(torch.float64)
    before = weights(model)
    lm = make(model, lr=0.5)
    tokens = {"until": ["."], "max_gen_toks": 8}
    requests = [request_of(context, tokens) for context in CONTEXTS]
    found = lm.generate_until(requests, disable_tqdm=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    unadapted = bare(model).generate_until(requests, disable_tqdm=True)
    assert found != unadapted
    for context, request, text in zip(CONTEXTS, requests, found, strict=True):
        other = copy.deepcopy(model)
        ids = ids_of(lm.tokenizer, context)
        params = [p for name, p in other.named_parameters() if ".mlp." in name]
        sgd_loop(other, [lambda m, ids=ids: row_loss(m, ids)] * 3, lr=0.5, momentum=0.9,
                 max_grad_norm=1.0, params=params)  # fmt: skip
        assert text == bare(other).generate_until([request], disable_tqdm=True)[0]


# ---------------------------------------------------------------------------- whole texts


def test_texts_are_scored_and_then_trained_on(make, request_of, tokenizer):
    """With room for 8 tokens a segment of 3 is scored behind the 5 before it."""
    model = cases.model(torch.float64)
    before = weights(model)
    text = "the cat sat on the mat and absence makes the heart grow fonder"
    lm = make(model, segment_tokens=3, max_length=8)
    (found,) = lm.loglikelihood_rolling([request_of(text)], disable_tqdm=True)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    ids = torch.cat([torch.tensor([tokenizer.eos_token_id]), ids_of(tokenizer, text)])

    def losses():
        for start in range(0, ids.numel(), 3):
            row = ids[max(0, start + 3 - 8) : start + 3]
            if start + 3 > ids.numel():
                row = ids[max(0, ids.numel() - 8) :]
            n = min(3, ids.numel() - start) - (start == 0)

            def loss(m, row=row, n=n):
                return F.cross_entropy(m(row[None]).logits[0, -n - 1 : -1], row[-n:])

            yield n, loss

    counts = [n for n, _ in losses()]
    _, values = adapted_by_hand(model, [loss for _, loss in losses() for _ in range(3)])
    expected = -sum(n * value for n, value in zip(counts, values[::3], strict=True))
    assert found == pytest.approx(expected, rel=1e-10)


def test_texts_without_a_step_are_scored_as_hf_does(make, bare, request_of):
    model = cases.model(torch.float64)
    requests = [request_of(" ".join(CONTEXTS)), request_of("cat"), request_of("")]
    ours = make(model, steps=0, segment_tokens=3).loglikelihood_rolling(requests, disable_tqdm=True)
    theirs = bare(model).loglikelihood_rolling(requests, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-10)


# ---------------------------------------------------------------------------- few examples


def test_examples_are_tasks_of_each_other(make, request_of, tokenizer):
    model = cases.model(torch.float64)
    before = weights(model)
    shots = ["Q how many cat A 3", "Q how many mat A 5 .", "Q how many stone A 7"]
    question = "Q how many pears A"
    context = "|".join(["As an expert", *shots, question])
    lm = make(model, leave_one_out=3, fewshot_delimiter="|")
    found = lm.loglikelihood([request_of(context, " 4"), request_of(context, " 5")])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    def task(m):
        losses = []
        for n, shot in enumerate(shots):
            others = "|".join(["As an expert", *shots[:n], *shots[n + 1 :]]) + "|"
            row = ids_of(tokenizer, others + shot)
            first = ids_of(tokenizer, others).numel()
            losses.append(F.cross_entropy(m(row[None]).logits[0, first - 1 : -1], row[first:]))
        return sum(losses) / len(losses)

    other, _ = adapted_by_hand(model, [task] * 3)
    ids = ids_of(tokenizer, context)
    for option, (likelihood, _) in zip((" 4", " 5"), found, strict=True):
        whole = ids_of(tokenizer, context + option)
        assert likelihood == pytest.approx(log_likelihood(other, ids, whole), rel=1e-9)


def test_a_single_example_without_a_heading_is_learned_whole(make, request_of, tokenizer):
    model = cases.model(torch.float64)
    lm = make(model, leave_one_out=1, fewshot_delimiter="|")
    ((found, _),) = lm.loglikelihood([request_of("the cat sat|on the", " mat")])
    row = ids_of(tokenizer, "the cat sat")
    other, _ = adapted_by_hand(model, [lambda m: row_loss(m, row)] * 3)
    ids = ids_of(tokenizer, "the cat sat|on the")
    expected = log_likelihood(other, ids, ids_of(tokenizer, "the cat sat|on the mat"))
    assert found == pytest.approx(expected, rel=1e-9)


def test_too_few_examples_are_named(make, request_of):
    lm = make(cases.model(), leave_one_out=3, fewshot_delimiter="|")
    with pytest.raises(ValueError, match="leave_one_out=3, but a context has 2 parts"):
        lm.loglikelihood([request_of("one|two", " cat")])


# ---------------------------------------------------------------------------- the harness


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"scope": "nonsense"}, "nonsense"),
        ({"leave_one_out": -1}, "leave_one_out=-1"),
        ({"kv": "frozen"}, "kv='frozen', but likelihoods"),
        ({"segment_tokens": 1}, "segment_tokens=1"),
        ({"optimizer": "adam"}, "'adam' is unknown"),
    ],
)
def test_bad_settings(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(cases.model(), **options)


@pytest.fixture
def task_folder(tmp_path):
    """Questions with three options each, as a task of the harness."""
    rows = [
        {"question": context, "choices": [o.strip() for o in OPTIONS], "answer": n % 3}
        for n, context in enumerate(CONTEXTS)
    ]
    data = cases.write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "tiny.yaml").write_text(
        f"""task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
    )
    return tmp_path


def test_a_task_of_the_harness(make, task_folder, monkeypatch):
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", task_folder / "cache")
    model = cases.model(torch.float64)
    manager = TaskManager(include_path=str(task_folder), include_defaults=False)
    lm = make(model, max_grad_norm="none")
    results = lm_eval.simple_evaluate(
        lm, tasks=["tiny_choice"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    assert results["config"]["ttt_fast"]["steps"] == 3
    assert results["config"]["ttt_fast"]["max_grad_norm"] is None
    samples = results["samples"]["tiny_choice"]
    assert len(samples) == len(CONTEXTS)
    for sample, context in zip(samples, CONTEXTS, strict=True):
        assert sample["arguments"][0][0] == context
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1


@pytest.mark.slow
def test_the_command(task_folder, tmp_path):
    """From the command line to the harness's own table and file of results."""
    folder = tmp_path / "model"
    cases.tokenizer().save_pretrained(folder)
    cases.model().save_pretrained(folder)
    arguments = f"pretrained={folder},steps=2,lr=1e-2,scope=ffn,max_grad_norm=none,dtype=float32"
    command = [sys.executable, "-m", "ttt_fast", "lm-eval", "run", "--model", "ttt_fast",
               "--model_args", arguments, "--tasks", "tiny_choice", "--include_path",
               task_folder, "--device", "cpu", "--batch_size", 3,
               "--output_path", tmp_path / "results"]  # fmt: skip
    environment = os.environ | {
        "HF_DATASETS_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny_choice" in done.stdout
    (path,) = (tmp_path / "results").rglob("results_*.json")
    assert json.loads(path.read_text())["config"]["ttt_fast"]["lr"] == 1e-2
