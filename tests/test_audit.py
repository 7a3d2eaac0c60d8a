"""The audit's numbers against loops written out here in torch, and what it leaves behind."""

import json
import math
import re
import statistics

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch import nn
from torch.nn import functional as F

from tests.families import tiny_model
from tests.loops import distance, prompt_ids, row_loss, sgd_loop, twin
from tests.untouched import Boom, assert_adapts, lived_in, unchanged
from ttt_fast import Adaptation, audit_report
from ttt_fast import audit as audit_module
from ttt_fast.audit import MODES, AuditReport, AuditRow, audit
from ttt_fast.audit_report import Mode
from ttt_fast.trainer import TTTTrainer

IDS = prompt_ids(9)
STEPS = 4
SETTINGS = {"momentum": 0.9, "weight_decay": 0.1, "max_grad_norm": 1.0}


def rows_of(report: AuditReport, mode: str) -> list[AuditRow]:
    return [row for row in report.rows if row.mode == mode]


def bf16_loop(model, lr, *, momentum=0.9, weight_decay=0.1, max_grad_norm=1.0, keep_delta=False):
    """A bfloat16 loop beside a float32 shadow of what each step meant; changes the model.

    Stock torch writes the step, or (keep_delta) the shadow does: W = round(W0 + Δ).
    """
    params = list(model.parameters())
    originals = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(
        params, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True
    )
    deltas = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    buffers = None
    dot = square = 0.0
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = row_loss_float(model)
        loss.backward()
        losses.append(loss.item())
        before = [p.detach().clone() for p in params]
        grads = [p.grad.clone() for p in params]
        if keep_delta:
            norm = torch.stack([g.float().square().sum() for g in grads]).sum().sqrt()
            clip = float((max_grad_norm / (norm + 1e-6)).clamp(max=1))
        else:
            norm = nn.utils.clip_grad_norm_(params, max_grad_norm, foreach=True)
            clip = float((max_grad_norm / (norm + 1e-6)).clamp(max=1))
        decayed = [
            (o.float() + d if keep_delta else b.float())
            for o, d, b in zip(originals, deltas, before, strict=True)
        ]
        means = [clip * g.float() + weight_decay * w for g, w in zip(grads, decayed, strict=True)]
        if buffers is not None:
            means = [momentum * b.float() + m for b, m in zip(buffers, means, strict=True)]
        with torch.no_grad():
            if keep_delta:
                buffers = [m.bfloat16() for m in means]
                for p, o, d, m in zip(params, originals, deltas, means, strict=True):
                    d -= lr * m
                    p.copy_(o.float() + d)
            else:
                optimizer.step()
                buffers = [optimizer.state[p]["momentum_buffer"].clone() for p in params]
            for p, b, m in zip(params, before, means, strict=True):
                step = -lr * m.double()
                dot += float(((p.double() - b.double()) * step).sum())
                square += float(step.square().sum())
    moved = [p.detach().double() - o.double() for p, o in zip(params, originals, strict=True)]
    return {
        "update_landed": dot / square,
        "changed": sum(int((m != 0).sum()) for m in moved) / sum(m.numel() for m in moved),
        "moved": math.sqrt(sum(float(m.square().sum()) for m in moved)),
        "loss_before": losses[0],
        "loss_after": row_loss_float(model).item(),
    }


def row_loss_float(model):
    logits = model(input_ids=IDS, use_cache=False).logits[0, :-1].float()
    return F.cross_entropy(logits, IDS[0, 1:])


@pytest.mark.parametrize("lr", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(("mode", "keep_delta"), [("torch", False), ("delta", True)])
def test_bfloat16_numbers_are_those_of_a_loop(mode, keep_delta, lr):
    model = tiny_model("llama_tied", torch.bfloat16)
    expected = bf16_loop(twin(model), lr, keep_delta=keep_delta)
    [row] = audit(model, IDS, lrs=[lr], steps=STEPS, modes=[mode], **SETTINGS).rows
    for name, value in expected.items():
        # A step of float32 rounding may fall on the other side of a bfloat16 rounding boundary.
        assert getattr(row, name) == pytest.approx(value, rel=5e-3), name
    if mode == "torch":  # bitwise stock torch, so the weights are the same ones
        assert row.changed == expected["changed"]
        assert row.moved == pytest.approx(expected["moved"], rel=1e-6)
        assert row.loss_after == pytest.approx(expected["loss_after"], rel=1e-6)


def test_the_comparison_with_the_loop_can_fail():
    model = tiny_model("llama_tied", torch.bfloat16)
    expected = bf16_loop(twin(model), 1e-2, momentum=0.8)
    [row] = audit(model, IDS, lrs=[1e-2], steps=STEPS, modes=["torch"], **SETTINGS).rows
    assert row.changed != expected["changed"]
    assert row.moved != pytest.approx(expected["moved"], rel=5e-3)


def test_the_float32_model_is_the_float32_loop():
    model = tiny_model("llama", torch.bfloat16)
    reference, lr = twin(model).float(), 1e-2
    original = twin(reference)
    losses, norms = sgd_loop(reference, [lambda m: row_loss(m, IDS[0])] * STEPS, lr=lr, **SETTINGS)
    [row] = audit(model, IDS, lrs=[lr], steps=STEPS, modes=["float32"], **SETTINGS).rows
    moved = [p - q for p, q in zip(reference.parameters(), original.parameters(), strict=True)]
    assert row.loss_before == pytest.approx(losses[0], rel=1e-5)
    assert row.grad_norm == pytest.approx(norms[0], rel=1e-5)
    assert row.loss_after == pytest.approx(row_loss(reference, IDS[0]).item(), rel=1e-4)
    norm = math.sqrt(sum(float(m.detach().double().square().sum()) for m in moved))
    assert row.moved == pytest.approx(norm, rel=1e-4)
    assert row.update_landed == pytest.approx(1, abs=1e-4)
    assert distance(reference, original) > 0


@pytest.mark.parametrize("family", ["llama_tied", "qwen2"])
def test_activation_change_is_what_the_layers_see(family):
    model = tiny_model(family, torch.bfloat16)
    options = {"scope": "ffn"} if family == "qwen2" else {}
    [row] = audit(model, IDS, lrs=[1e-2], steps=3, modes=["float32"], momentum=0.0, **options).rows
    original, adapted = twin(model).float(), twin(model).float()
    adapts = [p for n, p in adapted.named_parameters() if not options or ".mlp." in n]
    sgd_loop(
        adapted, [lambda m: row_loss(m, IDS[0])] * 3, lr=1e-2, max_grad_norm=10.0, params=adapts
    )
    weights = dict(original.named_modules())
    ratios = []

    def see(name):
        def hook(module, inputs, output):
            old = weights[name].weight
            change, y = F.linear(inputs[0], module.weight - old), F.linear(inputs[0], old)
            ratios.append(float(change.norm() / y.norm()))

        return hook

    selected = {id(p) for p in adapts}
    for name, module in adapted.named_modules():
        if isinstance(module, nn.Linear) and id(module.weight) in selected:
            module.register_forward_hook(see(name))
    with torch.no_grad():
        adapted(input_ids=IDS)
    assert row.activation_change == pytest.approx(statistics.median(ratios), rel=1e-3)


def test_what_the_modes_differ_in():
    """Small steps: stock torch swallows them, a delta keeps them, noise is right on average."""
    model = tiny_model("llama", torch.bfloat16)
    report = audit(model, IDS, lrs=[1e-4], steps=20, momentum=0.0)
    landed = {row.mode: row.update_landed for row in report.rows}
    moved = {row.mode: row.moved for row in report.rows}
    assert landed["torch"] < 0.5 < landed["delta"]
    assert landed["nearest"] < 0.5
    assert landed["stochastic"] == pytest.approx(1, abs=0.3)
    assert landed["float32"] == pytest.approx(1, abs=1e-3)
    assert moved["torch"] < 0.5 * moved["float32"]
    assert moved["stochastic"] > 1.5 * moved["float32"]  # the noise that it pays with
    assert moved["factored"] == pytest.approx(moved["float32"], rel=0.02)
    assert "measures rounding" in report.conclusion()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wide_weights_swallow_nothing(dtype):
    report = audit(tiny_model("llama", dtype), IDS, lrs=[1e-4, 1e-2], steps=STEPS)
    assert {row.mode for row in report.rows} == {"torch", "nearest", "factored"}
    assert all(row.update_landed == pytest.approx(1, abs=1e-3) for row in report.rows)
    assert "everything lands" in report.conclusion()
    assert "Limit" not in report.page()


def test_the_factored_engine_moves_as_far_as_the_weights_that_are_written():
    model = tiny_model("llama_tied", torch.float64)
    report = audit(model, IDS, lrs=[1e-2], steps=STEPS, modes=["nearest", "factored"], **SETTINGS)
    dense, factored = report.rows
    assert factored.changed is None
    assert factored.moved == pytest.approx(dense.moved, rel=1e-9)
    assert factored.loss_after == pytest.approx(dense.loss_after, rel=1e-9)


def test_float16():
    report = audit(tiny_model("llama", torch.float16), IDS, lrs=[1e-4], steps=STEPS)
    assert {row.mode for row in report.rows} == {*MODES}
    assert rows_of(report, "torch")[0].update_landed < 0.9
    assert "rounding of float16 activations" in report.page()


def test_adamw_and_scope():
    model = tiny_model("qwen2", torch.bfloat16)
    report = audit(model, IDS, lrs=[1e-3], steps=2, optimizer="adamw", scope="ffn")
    assert report.conditions["selected_parameters"] == 3 * 3 * 32 * 48
    # AdamW is not linear in the gradient, so there are no factors.
    assert [row.mode for row in report.rows] == [mode for mode in MODES if mode != "factored"]
    assert "factored was left out: TTTConfig: optimizer='adamw'" in report.page()
    assert all(row.loss_after < row.loss_before for row in report.rows)


# ---------------------------------------------------------------------------- what it leaves


def forward_fails(model, number, error):
    """Raise in the ``number``-th forward of a model, of its copies too."""
    calls = []

    def hook(module, inputs):
        calls.append(module)
        if len(calls) == number:
            raise error

    model.register_forward_pre_hook(hook)


def test_the_model_is_untouched():
    model = lived_in("gpt2", torch.bfloat16)
    with unchanged(model):
        report = audit(model, IDS, lrs=[1e-3, 1e30], steps=2, max_grad_norm=None)
    assert report.restored
    assert_adapts(model)


@pytest.mark.parametrize("number", [1, 4, 8, 12, 15])
@pytest.mark.parametrize("error", [KeyboardInterrupt, Boom])
def test_the_model_is_untouched_after_an_error(error, number):
    model = lived_in("llama", torch.bfloat16)
    forward_fails(model, number, error)
    with unchanged(model), pytest.raises(error):
        audit(model, IDS, lrs=[1e-2], steps=2)
    assert_adapts(model)


def test_a_lost_weight_is_reported(monkeypatch):
    monkeypatch.setattr(audit_module.Snapshot, "verify", lambda self: False)
    report = audit(tiny_model("llama"), IDS, lrs=[1e-3], steps=1, modes=["nearest"])
    assert not report.restored
    assert "DID NOT COME BACK" in report.page()


# ---------------------------------------------------------------------------- divergence


def test_a_diverging_mode_is_a_row_that_says_so(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    options = dict(steps=3, modes=["torch", "delta"], max_grad_norm=None)
    report = audit(model, IDS, lrs=[1e30, 1e-2], **options)
    assert [(row.lr, row.mode, row.diverged_at) for row in report.rows] == [
        (1e-2, "torch", None), (1e-2, "delta", None), (1e30, "torch", 2), (1e30, "delta", 2),
    ]  # fmt: skip
    assert report.table().count("diverged at step 2") == 2
    assert json.loads(report.to_json())["rows"][2]["update_landed"] is None
    report.plot(tmp_path / "audit.png")
    assert "diverged" in report._crosses()
    assert report._crosses() != audit(model, IDS, lrs=[1e-2], **options)._crosses() == ""


def test_a_last_update_that_diverges_is_seen(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    monkeypatch.setattr(Adaptation, "loss", lambda self: torch.tensor([math.nan]))
    report = audit(model, IDS, lrs=[1e-3], steps=1, modes=["torch"])
    assert report.rows[0].diverged_at == 2
    assert report.rows[0].loss_after is None
    assert "diverged after the last step" in report.table()


def test_only_divergence_becomes_a_row(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("not finite, says somebody else")

    monkeypatch.setattr(TTTTrainer, "adapt", fail)
    with pytest.raises(RuntimeError, match="somebody else"):
        audit(tiny_model("llama"), IDS, lrs=[1e-3], steps=1)


def test_an_engine_that_refuses_is_a_row(monkeypatch):
    class Trainer(TTTTrainer):
        def __init__(self, model, config):
            if config.backend == "torch":
                raise ValueError("3-D experts:\n  use dense")
            super().__init__(model, config)

    monkeypatch.setattr(audit_module, "TTTTrainer", Trainer)
    refusable = Mode("factored", {"backend": "torch"}, "", refusable=True)
    monkeypatch.setitem(MODES, "factored", refusable)
    report = audit(tiny_model("llama"), IDS, lrs=[1e-3], steps=1, modes=["torch", "factored"])
    assert rows_of(report, "factored")[0].refused == "3-D experts: use dense"
    assert "refused: 3-D experts: use dense" in report.table()
    assert rows_of(report, "torch")[0].update_landed is not None
    json.loads(report.to_json())
    monkeypatch.setitem(MODES, "nearest", Mode("nearest", {"backend": "torch"}, ""))
    with pytest.raises(ValueError, match="3-D experts"):  # the dense engine takes every model
        audit(tiny_model("llama"), IDS, lrs=[1e-3], steps=1, modes=["nearest"])


# ---------------------------------------------------------------------------- what it shows


@pytest.fixture(scope="module")
def report():
    model = tiny_model("llama", torch.bfloat16)
    return audit(model, IDS, lrs=[1e-2, 1e-5, 1e-3, 1e-3], steps=STEPS, momentum=0.5)


def test_a_row_for_each_mode_and_lr(report):
    order = list(MODES)
    keys = [(row.lr, order.index(row.mode)) for row in report.rows]
    assert keys == sorted(set(keys))
    assert {row.lr for row in report.rows} == {1e-5, 1e-3, 1e-2}
    assert {row.mode for row in report.rows} == {*MODES}


def test_table_is_aligned_and_shows_the_numbers(report):
    head, *lines = report.table().splitlines()
    assert len(lines) == len(report.rows)
    ends = [match.end() for match in re.finditer(r"loss (before|after)|moved|changed", head)]
    for line, row in zip(lines, report.rows, strict=True):
        assert line.startswith(f"{row.lr:.0e}".replace("e-0", "e-"))
        assert f"{row.update_landed:.4f}" in line
        assert line.endswith(f"{row.loss_after:.4f}")
        assert all(line[end - 1] != " " and line[end : end + 1] in ("", " ") for end in ends), line


def test_page_begins_with_the_conclusion_and_says_the_limit(report):
    page = report.page()
    assert page.splitlines()[0] == report.conclusion()
    assert "momentum 0.5" in page
    assert "7e-4" in page
    assert "bfloat16 activations dominates in every mode" in page
    assert re.search(r"Here, .* it is \S+ at lr 1e-5", page)
    assert str(report) == page


def test_json_has_everything(report):
    content = json.loads(report.to_json())
    assert content["rows"] == [vars(row) for row in report.rows]
    assert content["conclusion"] == report.conclusion()
    conditions = content["conditions"]
    assert conditions["dtype"] == "bfloat16"
    assert conditions["steps"] == STEPS
    assert conditions["momentum"] == 0.5
    assert conditions["input_ids"] == IDS.tolist()
    assert conditions["versions"]["torch"] == torch.__version__


def colours(path):
    pixels = imread(path)[..., :3].reshape(-1, 3)
    return {
        name
        for name, look in audit_report._LOOKS.items()
        if (abs(pixels - to_rgb(look["color"])).max(1) < 2 / 255).any() and name != "torch"
    }  # stock torch is black, as is the text


def test_plot_shows_every_mode(report, tmp_path):
    report.plot(tmp_path / "all.png")
    assert colours(tmp_path / "all.png") == {row.mode for row in report.rows} - {"torch"}
    fewer = AuditReport([r for r in report.rows if r.mode != "delta"], report.conditions)
    fewer.plot(tmp_path / "fewer.png")
    assert colours(tmp_path / "fewer.png") == colours(tmp_path / "all.png") - {"delta"}


@pytest.mark.parametrize(
    ("shares", "dtype", "sentence"),
    [
        ({1e-5: 0.004, 1e-4: 0.2, 1e-3: 0.8}, "bfloat16",
         "At lr 1e-5 a stock bfloat16 loop applies 0.4 % of its update: a sweep over learning rates"
         " of 1e-4 and below measures rounding."),
        ({1e-5: 0.004, 2.5e-4: 0.2}, "bfloat16",
         "At lr 1e-5 a stock bfloat16 loop applies 0.4 % of its update: this whole sweep, up to lr"
         " 2.5e-4, measures rounding."),
        ({1e-3: 0.71, 1e-2: 0.99}, "bfloat16",
         "At lr 1e-3 a stock bfloat16 loop applies 71.0 % of its update: a part of a sweep over"
         " learning rates is rounding."),
        ({1e-3: 0.99996, 1e-2: 1.0}, "float32",
         "In float32 everything lands here: a stock float32 loop applies at least 99.9 % of its"
         " update at every learning rate audited."),
        ({1e-3: 1.06}, "bfloat16",
         "At lr 1e-3 a stock bfloat16 loop applies 106.0 % of its update: a part of a sweep over"
         " learning rates is rounding."),
        ({1e-3: None}, "bfloat16",
         "A stock bfloat16 loop took no step that could be measured; see the table."),
    ],
)  # fmt: skip
def test_conclusion(shares, dtype, sentence):
    rows = [AuditRow("torch", lr, update_landed=share) for lr, share in shares.items()]
    rows += [AuditRow("delta", lr, update_landed=0.123) for lr in shares]
    assert AuditReport(rows, {"dtype": dtype}).conclusion() == sentence


# ---------------------------------------------------------------------------- what runs


def test_the_reference_needs_memory(monkeypatch):
    model = tiny_model("llama", torch.bfloat16)
    for free, words in [(0, "GiB and 0.0 are free"), (None, "does not tell")]:
        monkeypatch.setattr(audit_module, "free_bytes", lambda device, free=free: free)
        report = audit(model, IDS, lrs=[1e-3], steps=1)
        assert not rows_of(report, "float32")
        assert "No float32 reference" in report.page()
        assert words in report.page()
        forced = audit(model, IDS, lrs=[1e-3], steps=1, modes=["float32"])
        assert rows_of(forced, "float32")


@pytest.mark.parametrize("fits", [True, False])
def test_the_reference_keeps_to_the_memory_budget(fits):
    model = tiny_model("llama", torch.bfloat16)
    n_params = sum(param.numel() for param in model.parameters())
    # The copy and a snapshot of it are 8 bytes a parameter, momentum is 4 more.
    budget = 4 * 12 * n_params if fits else 12 * n_params
    report = audit(model, IDS, lrs=[1e-3], steps=1, memory_budget=budget)
    assert bool(rows_of(report, "float32")) == fits


def test_progress_bar(capsys):
    model = tiny_model("llama", torch.bfloat16)
    audit(model, IDS, lrs=[1e-3, 1e9], steps=3, modes=["torch"], max_grad_norm=None, progress=True)
    assert "6/6" in capsys.readouterr().err  # the steps that a run that diverged did not take, too
    audit(model, IDS, lrs=[1e-3], steps=1, modes=["torch"])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lrs": []}, "at least one"),
        ({"lrs": [1e-3, -1.0]}, "> 0"),
        ({"lrs": [math.nan]}, "finite"),
        ({"steps": 0}, "at least 1"),
        ({"modes": []}, "'stochastic'"),
        ({"modes": ["torch", "kahan"]}, "kahan"),
        ({"rounding": "nearest"}, "rounding is what the audit varies"),
        ({"lr": 1e-3}, "lrs="),
        ({"momentun": 0.9}, "momentun"),
        ({"momentum": -1}, "momentum"),
        ({"snapshot": "undo"}, "snapshot"),
        ({"scope": "nonsense"}, "nonsense"),
        ({"input_ids": torch.tensor([5])}, "at least two tokens"),
        ({"input_ids": torch.tensor([[5, 1000]])}, "vocabulary"),
    ],
)  # fmt: skip
def test_bad_input(change, message):
    model = tiny_model("llama")
    model.register_forward_pre_hook(lambda *call: pytest.fail("it ran"))
    arguments = {"input_ids": IDS, "lrs": [1e-3], "steps": 2} | change
    with pytest.raises(ValueError, match=message):
        audit(model, arguments.pop("input_ids"), **arguments)
