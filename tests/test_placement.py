"""Noticing that a parameter is another tensor, or elsewhere."""

import pytest
import torch
from torch import nn

from ttt_fast.placement import Placement, places


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


def replace(model):
    model[0].weight = nn.Parameter(torch.ones(4, 4))


def untie(model):
    model[1].weight = nn.Parameter(torch.ones(4, 4))


def cast(model):
    model[0].weight.data = model[0].weight.data.double()


def resize(model):
    model[0].weight.data = model[0].weight.data[:2]


def move(model):
    model[0].weight.data = model[0].weight.data.clone()


@pytest.mark.parametrize(
    ("happens", "name", "now", "elsewhere"),
    [
        (replace, "0.weight", "another tensor", True),
        (untie, "1.weight", "another tensor", True),
        (lambda model: delattr(model[1], "weight"), "1.weight", "gone", True),
        (cast, "w", "float64 (4, 4)", True),
        (resize, "w", "float32 (2, 4)", True),
        (move, "w", "float32 (4, 4)", False),
    ],
)
def test_what_is_noticed(happens, name, now, elsewhere):
    model = tied()
    placement = Placement([("w", model[0].weight)], model)
    with torch.no_grad():
        model[0].weight.add_(1)
        model[0].bias.data = torch.ones(4)
    assert placement.change() is None
    happens(model)
    change = placement.change()
    assert change.name == name and change.now.startswith(now) and "float32 (4, 4)" in change.was
    # An address is another without being a change to who does not keep it.
    assert (placement.change(address=False) is not None) is elsewhere


def test_places_notice_what_moves():
    tensors = [torch.ones(2, 3), torch.ones(4)]
    before = places(tensors)
    assert places(tensors) == before
    assert places([tensors[0].t(), tensors[1]]) != before
    assert places([tensors[0], tensors[1].clone()]) != before
