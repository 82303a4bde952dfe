"""Layers are made ahead, a few at a time, and put in in order."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import nn

from ipex_quant.llm.saved.streaming import made_ahead
from ipex_quant.nn import Placeholder

NAMES = [f"{index}" for index in range(7)]


def shell() -> nn.Sequential:
    model = nn.Sequential()
    for name in NAMES:
        place = Placeholder((), {}, {})
        place.stand_for(nn.Linear(1, 1))
        model.add_module(name, place)
    return model


def test_layers_come_in_order_whatever_takes_longest() -> None:
    lock, active, most = threading.Lock(), 0, 0

    def maker(name: str):
        def make(old: nn.Module) -> nn.Module:
            nonlocal active, most
            with lock:
                active += 1
                most = max(most, active)
            time.sleep(0.02 if int(name) % 2 == 0 else 0)
            assert isinstance(old, nn.Linear)
            assert not torch.is_grad_enabled()
            with lock:
                active -= 1
            return nn.Linear(1, 1 + int(name))

        return make

    model = shell()
    made = [(name, layer.out_features) for name, layer in made_ahead(model, {name: maker(name) for name in NAMES})]
    assert made == [(name, 1 + int(name)) for name in NAMES]
    assert most == 2


def test_the_first_layer_that_fails_ends_the_loading() -> None:
    seen = []

    def make(old: nn.Module) -> nn.Module:
        seen.append(old)
        if len(seen) > 2:
            raise ValueError("weight: missing")
        return old

    with pytest.raises(ValueError, match="weight: missing"):
        list(made_ahead(shell(), dict.fromkeys(NAMES, make)))
    assert len(seen) < len(NAMES)


def test_a_model_without_replacements() -> None:
    assert not list(made_ahead(shell(), {}))
