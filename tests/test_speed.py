"""Measuring speed: the record is complete, the settings fit a short shape, and mistakes are one line."""

import json

import pytest
import torch
from tiny_models import clip, untrained_vlm

from focuslib.errors import UserError
from focuslib.evaluation.speed import explain, load_measured, measure_speed, methods_for
from focuslib.methods import Adaptiv, Cmc, Dense, Focus


def test_a_model_is_measured_with_every_method(tmp_path):
    vlm = untrained_vlm()
    focus = Focus(selected_layers=(2,), retention=(0.4,), vector_size=16)
    methods = {"dense": Dense(), "focus": focus, "adaptiv": Adaptiv(threshold=0.2), "cmc": Cmc()}
    rows = measure_speed(vlm, methods, clip=clip(), repeats=2, out=tmp_path / "speed.json")
    assert [row["method"] for row in rows] == list(methods)
    written = json.loads((tmp_path / "speed.json").read_text())
    assert written["rows"] == json.loads(json.dumps(rows))
    assert written["machine"]["threads"] == torch.get_num_threads()
    assert written["input"]["visual_tokens"] == 144
    for row in rows:
        low, high = row["prefill_ms_quartiles"]
        assert 0 < low <= row["prefill_ms"] <= high
        assert row["first_token_ms"] > 0
    dense, pruned, adaptiv, cmc = rows
    assert dense["over_dense"] == 1 and dense["sparsity"] == 0
    assert explain(dense) == "computes everything"
    assert pruned["left"] == pytest.approx(0.4, abs=0.01) and pruned["sparsity"] > 0
    assert explain(pruned).startswith("drops tokens; the vectors it merges")
    assert explain(adaptiv) == "drops tokens: the time saved is real"
    assert explain(cmc).startswith("emulates an accelerator")


def test_a_shape_needs_no_checkpoint():
    vlm = load_measured("shape:tiny", layers=3)
    methods = methods_for(vlm, ["dense", "focus"])
    assert methods["focus"].selected_layers == (2,)
    rows = measure_speed(vlm, methods, frames=2, repeats=1, decode=False)
    assert "decode_ms" not in rows[0] and rows[1]["left"] == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: load_measured("shape:tiny", layers=99), "shape:tiny has 8 layers; layers is 99"),
        (lambda: load_measured("shape:qwen"), "unknown shape 'qwen'"),
        (lambda: load_measured("tiny_onevision", layers=2), "layers is for shapes"),
        (lambda: load_measured("shape:tiny", dtype="int4"), "unknown dtype 'int4'"),
        (lambda: measure_speed(untrained_vlm(), {"dense": Dense()}), "give a clip to measure with"),
        (lambda: measure_speed(load_measured("shape:tiny"), {}, clip=clip()), "takes no clip"),
    ],
)
def test_mistakes_are_said_in_one_line(call, message):
    with pytest.raises(UserError, match=message):
        call()
