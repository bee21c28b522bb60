"""Sharding plans, linted both ways."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from parallel.plan import Plan, styles_of
from pretrain.config import recipe_names, resolve
from pretrain.models import FAMILIES


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({"0": nn.Linear(2, 2), "1": nn.Linear(2, 2)})
        self.norm = nn.LayerNorm(2)


PLAN = Plan(blocks="layers.*", tensor={"layers.*": "column", "norm": "sequence"})


def test_every_module_gets_its_style():
    assert styles_of(Small(), PLAN) == {"layers.0": "column", "layers.1": "column", "norm": "sequence"}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"layers.*": "column"}, "plan of Small: no pattern says how norm.weight lies under parallel.tp"),
        ({**PLAN.tensor, "layer.*": "row"}, "plan pattern 'layer.*' matches no module of Small"),
        (
            {**PLAN.tensor, "layers.0": "row"},
            "plan pattern 'layers.0' matches layers.0, which another pattern matches too",
        ),
        ({"layers.*": "gather", "norm": "sequence"}, "no pattern says how layers.0.weight lies"),
    ],
)
def test_a_plan_that_does_not_fit_its_model_is_refused(tensor, message):
    with pytest.raises(ValueError, match=message):
        styles_of(Small(), replace(PLAN, tensor=tensor))


@pytest.mark.parametrize("recipe", recipe_names())
def test_the_plan_of_every_recipe_fits_its_model(recipe):
    config = resolve(recipe)[0].model.model_copy(update={"vocab_size": 64})
    family = FAMILIES[config.family]
    with torch.device("meta"):
        model = family.build(config)
    plan = family.plan(config)
    assert {name.rpartition(".")[0] for name, _ in model.named_parameters()} <= styles_of(model, plan).keys()
    assert dict(model.named_modules()).keys() >= set(plan.last)
