"""Modules that real models do not have, or have once: computed right, or refused by name."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.factored_cases import (
    RICH,
    assert_as_loop,
    assert_as_loops,
    prompts_of,
    run_schedule,
    trainer_of,
)
from tests.loops import prompt_ids


class Toy(nn.Module):
    """A language model with what real ones do not have, told apart by ``kind``."""

    def __init__(self, kind=""):
        super().__init__()
        self.kind = kind
        self.embed = nn.Embedding(101, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 101, bias=False)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for param in self.parameters():
                param.copy_(0.5 * torch.randn(param.shape, generator=generator))
        self.double()
        if kind == "tied":
            self.second.weight = self.first.weight

    def get_input_embeddings(self):
        return self.embed

    def forward(self, input_ids, use_cache=None):
        h = self.embed(input_ids)
        if self.kind == "skips" and bool((input_ids == 50).any()):
            return SimpleNamespace(logits=self.head(h))
        if self.kind == "changes" and bool((input_ids == 50).any()):
            # What was one tensor for both is one each.
            return SimpleNamespace(logits=self.head(h + self.first(h) + self.second(h.cos()).sin()))
        if self.kind == "changes":
            return SimpleNamespace(logits=self.head(h + self.first(h) + self.second(h).sin()))
        if self.kind == "same":
            h = h + self.second(h) + self.first(h).cos() + self.second(h).sin()
        if self.kind == "of positions":
            positions = torch.linspace(-1, 1, 8 * input_ids.shape[1], dtype=h.dtype)
            h = h + self.second(positions.view(-1, 8))
        h = h + self.first(h).tanh()
        if self.kind == "twice":
            h = h + self.first(h).tanh() + 0.5 * self.embed(input_ids.flip(1))
        if self.kind == "half":
            h = h + self.first(h.cos()).detach()
        if self.kind == "called":
            self.second(h)
        else:
            h = h + self.second(h).sin()
        h = self.norm(h)
        if self.kind == "norm twice":
            h = self.norm(h.exp())
        if self.kind == "outside":
            h = h + F.linear(h, self.second.weight)
        if self.kind == "bias outside":
            h = h + self.first.bias
        return SimpleNamespace(logits=self.head(h))


def prompts_with(token, at):
    """Prompts; those numbered by ``at`` hold the token, the others do not."""
    prompts = prompts_of()
    for i, prompt in enumerate(prompts):
        prompt[prompt == token] = token + 1
        if i in at:
            prompt[1] = token
    return prompts


@pytest.mark.parametrize("kind", ["", "twice", "same", "half", "called", "norm twice", "tied"])
def test_modules_called_more_than_once_or_for_nothing(kind):
    model, ids = Toy(kind), prompt_ids()
    assert_as_loop(model, ids, **RICH)
    # A model without an attention mask takes rows of one length.
    prompts = [prompt_ids(9, seed=seed)[0] for seed in range(3)]
    assert_as_loops(Toy(kind), prompts, **RICH)


def test_a_module_that_is_given_no_rows_is_refused_where_deltas_differ():
    """What all rows share, here vectors of positions, is nobody's: as many as a delta's tokens."""
    rows = prompt_ids(10, n_rows=2)
    with pytest.raises(ValueError, match=r"second was given .* 2 rows for 2 deltas"):
        trainer_of(Toy("of positions")).adapt(rows, deltas="independent")
    # With one delta there is nothing to tell apart.
    assert_as_loop(Toy("of positions"), rows[:1], **RICH)


def test_modules_that_shared_an_input_and_then_do_not():
    """And the other way round: which step they meet in first is chance."""
    prompts = prompts_with(50, at=(0, 2, 3))
    for order in (prompts, prompts[1:]):
        run_schedule(Toy("changes"), [([p], [0]) for p in order], 1, weight_decay=0.1)


def test_a_module_that_some_steps_skip():
    """Its parameters sit these steps out, as torch's do: no decay, no momentum, no first step."""
    prompts = prompts_with(50, at=(0, 2))
    model = Toy("skips")
    run_schedule(model, [([p], [0]) for p in prompts * 2], 1, weight_decay=0.1)
    rows = [prompt_ids(9, seed=seed)[0] for seed in range(4)]
    for row, token in zip(rows, (50, 51, 50, 51), strict=True):
        row[row == 50] = 51
        row[1] = token
    # Delta 1 has two rows, so the deltas go one after the other and each skips on its own.
    schedule = [
        ([rows[i], rows[j], rows[j]], [0, 1, 1]) for i, j in ((0, 1), (1, 0), (2, 3), (3, 3))
    ]
    run_schedule(model, schedule, 2, weight_decay=0.1, nesterov=True)


@pytest.mark.parametrize(
    ("kind", "name"), [("outside", "second.weight"), ("bias outside", "first.bias")]
)
def test_a_parameter_used_outside_its_module_is_refused_by_name(kind, name):
    model = Toy(kind)
    with pytest.raises(ValueError, match=f"{name} is used outside the module.*engine='dense'"):
        trainer_of(model).adapt(prompt_ids())
    assert all("forward" not in vars(module) for module in model.modules())
    # Where it is not selected, it may be used anywhere.
    assert_as_loop(Toy(kind), prompt_ids(), scope="head|embed")


def test_a_module_with_a_forward_of_its_own_is_refused_by_name():
    model = Toy()
    model.first.forward = lambda x: x
    with pytest.raises(ValueError, match=r"first\.weight of first .*replaced on the instance"):
        trainer_of(model).adapt(prompt_ids())
    assert_as_loop(Toy(), prompt_ids(), scope="head|embed")
    # Or where it came after the engine was made.
    model = Toy()
    trainer = trainer_of(model)
    trainer.adapt(prompt_ids()).restore()
    model.second.forward = own = model.second.forward
    with pytest.raises(ValueError, match="second has a forward of its own"):
        trainer.adapt(prompt_ids())
    assert vars(model.second)["forward"] == own and "forward" not in vars(model.first)


@pytest.mark.parametrize("options", [dict(max_norm=1.0), dict(scale_grad_by_freq=True)])
def test_embeddings_with_rules_of_their_own_are_refused(options):
    model = Toy()
    for name, value in options.items():
        setattr(model.embed, name, value)
    with pytest.raises(ValueError, match=r"embed\.weight of embed .*not supported"):
        trainer_of(model).adapt(prompt_ids())


def test_modules_that_nobody_knows_are_refused():
    model = Toy()
    model.second = nn.Bilinear(8, 8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second\.weight of second \(Bilinear\)"):
        trainer_of(model).adapt(prompt_ids())


def test_a_subclass_of_linear_with_code_of_its_own_is_refused():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = Toy()
    model.second = Scaled(8, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"second\.weight of second \(Scaled\)"):
        trainer_of(model).adapt(prompt_ids())


def test_a_norm_with_code_of_its_own_is_refused_by_name():
    """As Nemotron's: a LayerNorm that adds 1 to its weight is not computed as a LayerNorm."""

    class ShiftedLayerNorm(nn.LayerNorm):
        def forward(self, x):
            return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)

    model = Toy()
    model.norm = ShiftedLayerNorm(8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"norm\.weight of norm \(ShiftedLayerNorm\)"):
        trainer_of(model).adapt(prompt_ids())
