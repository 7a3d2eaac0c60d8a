"""Other libraries: their numbers where they are ours too, and a failing call behind every "no"."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from bench import peer_table, peers
from bench.peers import PEERS, Options
from tests.families import tiny_model
from tests.loops import prompt_ids
from ttt_fast import TTTConfig, TTTTrainer
from ttt_fast.naive import naive_adapt, prompt_loss

IDS = prompt_ids(9)
OPTIONS = Options(steps=4, lr=2e-2, max_grad_norm=0.5)  # the clip bites
NAIVE = "naive loop; torch SGD, foreach or fused"
OPTIMI, LOMO = "torch-optimi 0.3, gradient release", "lomo-optim 0.1"
OPACUS, PEFT, TTT = "opacus 1.6, ghost clipping", "peft LoRA, AdamW", "torch-ttt 0.0.2"


def model_of(family="llama", dtype=torch.float64):
    return tiny_model(family, dtype, num_hidden_layers=2)


def needs(name):
    """A peer as a parameter, with the marker that skips it where its package is missing."""
    package, module = PEERS[name].package, PEERS[name].module
    return pytest.param(name, marks=[pytest.mark.peer(package, module)] if package else [])


ALL = [needs(name) for name in PEERS]
SAME = [needs(name) for name, peer in PEERS.items() if peer.same_update]
OTHER = [needs(name) for name, peer in PEERS.items() if not peer.same_update]
optimi_, lomo_, opacus_, peft_, torch_ttt_ = (
    pytest.mark.peer(package, module)
    for package, module in (
        ("torch-optimi", "optimi"), ("lomo-optim", "lomo_optim"), ("opacus", "opacus"),
        ("peft", "peft"), ("torch-ttt", "torch_ttt"),
    )
)  # fmt: skip


def adapt(name, model, options=OPTIONS, ids=IDS):
    peer = PEERS[name]
    return peer.adapt(model, ids, list(model.parameters()), peer.possible(options))


def naive_losses(model, options):
    result = naive_adapt(model, IDS, **vars(options))
    result.restore()
    return result.losses


# ---------------------------------------------------------------------------- every peer


@pytest.mark.parametrize("name", SAME)
def test_losses_are_those_of_the_loop_and_of_ours(name):
    model = model_of()
    possible = PEERS[name].possible(OPTIONS)
    adapted = adapt(name, model)
    adapted.restore()
    # LOMO and Opacus work in float32 in between.
    torch.testing.assert_close(adapted.losses, naive_losses(model, possible), rtol=0, atol=1e-6)
    ours = peers.ours()(model, IDS, list(model.parameters()), possible)
    ours.restore()
    torch.testing.assert_close(adapted.losses, ours.losses, rtol=0, atol=1e-6)
    assert adapted.losses.std() > 1e-3


@pytest.mark.parametrize("name", OTHER)
def test_another_update_says_so_and_starts_at_the_same_loss(name):
    """MeZO's loss is the mean of two beside the weights, so it is only near."""
    model = model_of()
    adapted = adapt(name, model)
    adapted.restore()
    losses = naive_losses(model, PEERS[name].possible(OPTIONS))
    torch.testing.assert_close(adapted.losses[0], losses[0], rtol=0, atol=1e-3)
    assert (adapted.losses[1:] - losses[1:]).abs().max() > 1e-3
    assert "not the same update" in PEERS[name].remark


@pytest.mark.parametrize("name", ALL)
def test_weights_flags_and_modules_are_given_back(name):
    model = model_of().eval()
    model.model.norm.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    adapted = adapt(name, model, replace(OPTIONS, steps=2))
    if adapted.model is not None:
        assert adapted.model.generate(input_ids=IDS, max_new_tokens=1).shape == (1, 10)
    adapted.restore()
    assert model.state_dict().keys() == before.keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key
    assert not model.training and not any(p._backward_hooks for p in model.parameters())
    assert [n for n, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
    # What it left behind would change the next one's numbers.
    torch.testing.assert_close(naive_losses(model, OPTIONS), naive_losses(model_of(), OPTIONS))


@pytest.mark.parametrize("name", [needs(name) for name, peer in PEERS.items() if peer.lacks])
def test_an_option_that_a_peer_lacks_is_refused(name):
    model = model_of()
    with pytest.raises(ValueError, match=f"has no {PEERS[name].lacks[0]}"):
        PEERS[name].adapt(model, IDS, list(model.parameters()), OPTIONS)


def test_ours_wants_the_parameters_of_its_scope():
    model = model_of()
    with pytest.raises(ValueError, match="scope='ffn' is not what params holds"):
        peers.ours(scope="ffn")(model, IDS, list(model.parameters()), OPTIONS)


# ---------------------------------------------------------------------------- the table

SHOWN: set[tuple[str, str]] = set()


def shows(*cells):
    """The test behind answers of the table that are not a plain yes."""
    SHOWN.update(cells)
    return lambda test: test


def test_every_no_of_the_table_is_shown():
    """A "no" without a failing call behind it would be an opinion."""
    noes = set()
    for row, answers in peer_table.ANSWERS.items():
        assert answers.keys() == peer_table.QUESTIONS.keys(), row
        for question, answer in answers.items():
            assert answer.startswith(("yes", "no", "only")), answer
            if not answer.startswith("yes"):
                noes.add((row, question))
    assert noes == SHOWN
    assert all(a.startswith("yes") for a in peer_table.ANSWERS["ttt_fast"].values())


@shows((NAIVE, "release"), (PEFT, "release"))
@pytest.mark.parametrize("name", [needs("naive loop"), needs("LoRA r = 8, AdamW")])
def test_a_clip_of_torch_needs_all_gradients(name, monkeypatch):
    """Every trained number has its gradient when the norm is taken."""
    held = []
    clip = nn.utils.clip_grad_norm_

    def counting(params, bound):
        params = list(params)
        held.append(sum(p.numel() for p in params if p.grad is not None))
        return clip(params, bound)

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", counting)
    model = model_of()
    adapted = adapt(name, model, replace(OPTIONS, steps=1))
    trained = model if adapted.model is model else adapted.model.base_model
    parameters = [p for n, p in trained.named_parameters() if "lora" in n or trained is model]
    assert held == [sum(p.numel() for p in parameters)]
    adapted.restore()


@shows((OPTIMI, "update"), (OPTIMI, "clip"), (OPTIMI, "release"))
@optimi_
def test_optimi_has_nothing_left_to_clip():
    import optimi

    model = model_of()
    optimizer = optimi.SGD(
        model.parameters(), OPTIONS.lr, momentum=0.9, kahan_sum=False, triton=False,
        gradient_release=True,
    )  # fmt: skip
    optimi.prepare_for_gradient_release(model, optimizer)
    before = model.lm_head.weight.detach().clone()
    prompt_loss(model, IDS).backward()
    assert all(p.grad is None for p in model.parameters())
    assert nn.utils.clip_grad_norm_(model.parameters(), 1e-6) == 0
    assert not torch.equal(model.lm_head.weight, before)
    losses = adapt("optimi, gradient release", model_of()).losses
    assert (losses - naive_losses(model_of(), OPTIONS)).abs().max() > 1e-3


@shows((LOMO, "update"), (LOMO, "momentum"))
@lomo_
def test_lomo_has_no_momentum():
    from lomo_optim import Lomo

    with pytest.raises(TypeError, match="momentum"):
        Lomo(model_of(), 1e-3, momentum=0.9)
    losses = adapt("LOMO, two passes", model_of()).losses
    assert (losses - naive_losses(model_of(), OPTIONS)).abs().max() > 1e-4


@lomo_
def test_lomo_leaves_its_hooks_on_the_parameters():
    """Why bench/peers.py removes them: the next backward of anybody changes the weights."""
    from lomo_optim import Lomo

    model = model_of()
    Lomo(model, 1e-1)
    before = model.model.norm.weight.detach().clone()
    prompt_loss(model, IDS).backward()
    assert not torch.equal(model.model.norm.weight, before)


@shows((OPACUS, "tied"))
@opacus_
def test_opacus_refuses_tied_weights():
    model = model_of("llama_tied")
    with pytest.raises(NotImplementedError, match="Parameter tying is not supported"):
        adapt("Opacus, ghost clipping", model)
    # Ours, on the same model.
    ours = peers.ours("factored")(model, IDS, list(model.parameters()), OPTIONS)
    ours.restore()
    torch.testing.assert_close(ours.losses, naive_losses(model, OPTIONS))


@shows((OPACUS, "release"))
@opacus_
def test_opacus_forms_the_gradients_after_their_norms(monkeypatch):
    held = []
    step = torch.optim.SGD.step

    def counting(self, *args):
        params = [p for group in self.param_groups for p in group["params"]]
        held.append(all(p.grad is not None and p.grad.shape == p.shape for p in params))
        return step(self, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", counting)
    adapt("Opacus, ghost clipping", model_of(), replace(OPTIONS, steps=1))
    assert held == [True]


@opacus_
def test_opacus_is_an_oracle_of_the_norms():
    """Ghost norms of each of two prompts, of every parameter: theirs, ours, and the gradients'."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    model, ids = model_of().train(), prompt_ids(9, n_rows=2)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=1.0, strict=False)
    logits = wrapped(input_ids=ids, use_cache=False).logits[:, :-1]
    losses = nn.functional.cross_entropy(
        logits.transpose(1, 2), ids[:, 1:], reduction="none"
    ).mean(1)  # fmt: skip
    losses.mean().backward()
    theirs = wrapped.get_norm_sample()
    wrapped.to_standard_module()
    trainer = TTTTrainer(model.eval(), TTTConfig(steps=1, lr=1e-3, engine="factored"))
    with trainer.adapt(ids, deltas="independent") as adapted:
        torch.testing.assert_close(adapted.grad_norms[:, 0], theirs, rtol=1e-6, atol=0)


@shows((PEFT, "update"), (TTT, "update"), ("MeZO", "update"))
@pytest.mark.parametrize(
    "name", [needs("LoRA r = 8, AdamW"), needs("torch-ttt"), needs("MeZO")]
)  # fmt: skip
def test_another_update_has_other_losses(name):
    possible = PEERS[name].possible(OPTIONS)
    losses = adapt(name, model_of()).losses
    assert (losses[-1] - naive_losses(model_of(), possible)[-1]).abs() > 1e-3


@shows((PEFT, "prompts"))
@peft_
def test_peft_refuses_an_adapter_for_each_row_while_training():
    """In eval mode it takes them, and their gradients are there: hence "only"."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules="all-linear")
    model = get_peft_model(model_of(), config, adapter_name="first")
    model.add_adapter("second", config)
    ids = prompt_ids(9, n_rows=2)
    with pytest.raises(ValueError, match="adapter_names.*training mode"):
        model.train()(input_ids=ids, adapter_names=["first", "second"])
    adapters = {n: p.requires_grad_() for n, p in model.named_parameters() if "lora" in n}
    model.eval()(input_ids=ids, adapter_names=["first", "second"]).logits.sum().backward()
    assert all(p.grad is not None for p in adapters.values())


@shows((TTT, "clip"), (TTT, "release"), (TTT, "momentum"))
@torch_ttt_
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_torch_ttt_has_adam_and_no_clip(name, monkeypatch):
    from torch_ttt.engine.base_engine import BaseEngine

    class Engine(BaseEngine):
        def __init__(self, model):
            super().__init__()
            self.model, self.optimization_parameters = model, {"optimizer_name": name}

        def ttt_forward(self, inputs):
            return None, prompt_loss(self.model, inputs)

    clips = []
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *_: clips.append(1))
    engine = Engine(model_of()).eval()
    engine.optimization_parameters["max_grad_norm"] = 1e-9
    if name == "sgd":
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'zero_grad'"):
            engine(IDS)
    else:
        engine(IDS)
    assert not clips


@shows(("MeZO", "restore"))
def test_mezo_does_not_walk_back_exactly():
    """A direction added and subtracted: in float32 the weights are not what they were."""
    model = model_of(dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    peers.mezo(model, IDS, list(model.parameters()), Options(2, 0.0, 0.0, None))  # lr=0
    assert any(not torch.equal(t, before[n]) for n, t in model.state_dict().items())


@shows(("MeZO", "clip"), ("MeZO", "release"), ("MeZO", "momentum"))
def test_mezo_has_no_gradient_and_no_state(monkeypatch):
    def no_backward(*_, **__):
        raise AssertionError("a gradient was taken")

    monkeypatch.setattr(torch.Tensor, "backward", no_backward)
    for options in (OPTIONS, replace(OPTIONS, momentum=0.0), replace(OPTIONS, max_grad_norm=None)):
        with pytest.raises(ValueError, match="MeZO has no momentum and no max_grad_norm"):
            PEERS["MeZO"].adapt(model_of(), IDS, [], options)
    adapt("MeZO", model_of())


@shows(
    (NAIVE, "prompts"), (OPTIMI, "prompts"), (LOMO, "prompts"), (OPACUS, "prompts"),
    (TTT, "prompts"), ("MeZO", "prompts"),
)  # fmt: skip
@pytest.mark.parametrize(
    "name", [needs(name) for name in PEERS if not name.startswith("LoRA")]
)  # fmt: skip
def test_prompts_of_a_batch_are_not_independent(name):
    """A batch of two trains one set of weights: its losses are not the mean of each one's own."""
    ids = prompt_ids(9, n_rows=2)
    options = replace(OPTIONS, max_grad_norm=None if "Opacus" not in name else 1e6)
    alone = [adapt(name, model_of(), options, row[None]).losses for row in ids]
    together = adapt(name, model_of(), options, ids).losses
    assert together.shape == (4,)  # of the batch, not of each prompt
    assert (together[2:] - torch.stack(alone).mean(0)[2:]).abs().min() > 1e-4
    # Ours: each as if alone.
    trainer = TTTTrainer(model_of(), TTTConfig(**vars(replace(options, momentum=0.0))))
    with trainer.adapt(ids, deltas="independent") as adapted:
        for row, losses in zip(ids, adapted.losses, strict=True):
            expected = naive_adapt(
                model_of(), row[None], **vars(replace(options, momentum=0.0))
            ).losses  # fmt: skip
            torch.testing.assert_close(losses, expected)
