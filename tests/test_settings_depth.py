"""Layers as shares of the depth: one setting for shallow and deep decoders."""

import pytest
import torch
from tiny_families import GRID, TOKENS, family

from focuslib.errors import UserError
from focuslib.evaluation.settings import method_settings
from focuslib.methods import Cmc, Focus
from focuslib.methods.depth import layer_numbers
from focuslib.methods.settings import make_method

PUBLISHED = (2, 5, 8, 16, 25)
SHARES = tuple(layer / 28 for layer in PUBLISHED)


def test_shares_of_the_published_depth_are_the_published_layers():
    assert tuple(layer_numbers(SHARES, 28)) == PUBLISHED
    assert layer_numbers((27 / 28,), 28) == [27]


@pytest.mark.parametrize("depth", [1, 2, 12, 36, 64])
def test_shares_are_layers_of_every_depth(depth):
    numbers = layer_numbers((*SHARES, 27 / 28, 0.9999), depth)
    assert numbers == sorted(numbers) and numbers[-1] == depth - 1
    assert all(abs(number - share * depth) <= 1 for number, share in zip(numbers, SHARES, strict=False))


def test_numbers_stay_as_they_are():
    assert layer_numbers((0, 1, 90), 28) == [0, 1, 90]
    assert Focus(selected_layers=(2.0, 5), retention=(0.5, 0.4)).selected_layers == (2, 5)


@pytest.mark.parametrize("layers", [(0.1, 3), (-0.1,), (2.5,), (0.5, 0.2)])
def test_neither_numbers_nor_shares(layers):
    with pytest.raises(UserError, match="method focus: selected_layers"):
        Focus(selected_layers=layers, retention=(0.5,) * len(layers))


def test_shares_as_users_write_them():
    method = make_method("focus", {"selected_layers": "0.25,0.5", "retention": "0.5,0.3"})
    assert method.selected_layers == (0.25, 0.5)
    assert make_method("cmc", {"skip_score_layers": "0.96"}).skip_score_layers == (0.96,)


@pytest.mark.parametrize("layers", [2, 3, 7])
def test_one_schedule_prunes_decoders_of_every_depth(layers):
    vlm = family("qwen2", "sdpa", num_hidden_layers=layers)
    method = Focus(selected_layers=(0.34, 0.67), retention=(0.5, 0.25), vector_size=8)
    with method(vlm) as run, torch.inference_mode():
        vlm.model(inputs_embeds=torch.randn(1, TOKENS, 32))
    first, second = layer_numbers((0.34, 0.67), layers)
    wanted = [GRID.length if layer < first else 12 if layer < second else 6 for layer in range(layers)]
    assert run.last.retained == wanted


def test_the_last_layer_of_any_model_is_skipped():
    vlm = family("qwen2", "sdpa", num_hidden_layers=5)
    with Cmc(skip_score_layers=(27 / 28,), interval=2, i_frame=1)(vlm) as run, torch.inference_mode():
        vlm.model(inputs_embeds=torch.randn(1, TOKENS, 32))
    assert ["score" in rows for rows in run.last.rows] == [True] * 4 + [False]


@pytest.mark.parametrize("method", ["focus", "cmc"])
@pytest.mark.parametrize("layers", [2, 12, 36])
def test_the_settings_of_any_model_suit_its_depth(method, layers):
    vlm = family("qwen2", "sdpa", num_hidden_layers=layers)
    made = make_method(method, method_settings(method, "a-model", "videomme", adapter="hf"))
    with made(vlm) as run, torch.inference_mode():
        vlm.model(inputs_embeds=torch.randn(1, TOKENS, 32))
    assert run.last.retained[-1] == (2 if method == "focus" else GRID.length)
