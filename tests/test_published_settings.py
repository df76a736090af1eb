"""params/methods.yaml and params/paper against the published hyper-parameters and experiments, entry by entry."""

import pytest

from focuslib.evaluation.settings import method_settings
from focuslib.experiments.params import read_params
from focuslib.methods.settings import make_method
from focuslib.paths import project_root

VIDEO, IMAGE = ("videomme", "mlvu", "mvbench"), ("vqav2", "mme", "mmbench")
USUAL = (0.4, 0.3, 0.2, 0.15, 0.1)

# (model, data set) → selected layers, retention, similarity threshold
FOCUS = {
    **{("llava_vid", dataset): ((3, 6, 9, 18, 26), USUAL, 0.9) for dataset in VIDEO},
    **{("llava_onevision", dataset): ((2, 5, 8, 16, 25), USUAL, 0.9) for dataset in ("videomme", "mlvu", *IMAGE)},
    ("llava_onevision", "mvbench"): ((2, 5, 8, 16, 25), (0.4, 0.3, 0.25, 0.2, 0.1), 0.9),
    **{("minicpm_v", dataset): ((2, 5, 8, 16, 25), USUAL, 0.95) for dataset in ("videomme", "mlvu")},
    ("minicpm_v", "mvbench"): ((2, 5, 8, 16, 25), USUAL, 0.9),
    **{("qwen2_5_vl", dataset): ((10, 15, 20), (0.3, 0.2, 0.1), 0.9) for dataset in IMAGE},
    ("another", "another"): ((2, 5, 8, 16, 25), USUAL, 0.9),
}
# model → thresholds of the input embeddings, the queries and the attention rows
CMC = {
    "llava_vid": (0.4, 0.8, 5e-5),
    "llava_onevision": (0.5, 0.6, 5e-5),
    "minicpm_v": (0.4, 0.8, 5e-5),
    "another": (0.4, 0.8, 5e-5),
}
ADAPTIV = {
    ("llava_vid", "videomme"): 0.5,
    ("llava_vid", "mlvu"): 0.6,
    ("llava_vid", "mvbench"): 0.55,
    **{("llava_onevision", dataset): 0.5 for dataset in (*VIDEO, "mme", "mmbench")},
    ("llava_onevision", "vqav2"): 0.2,
    ("minicpm_v", "videomme"): 0.15,
    ("minicpm_v", "mlvu"): 0.2,
    ("minicpm_v", "mvbench"): 0.1,
    **{("qwen2_5_vl", dataset): 0.4 for dataset in IMAGE},
    ("another", "another"): 0.6,
}


def published(method: str, model: str, dataset: str):
    return make_method(method, method_settings(method, model, dataset))


@pytest.mark.parametrize(("model", "dataset"), FOCUS)
def test_focus(model, dataset):
    focus = published("focus", model, dataset)
    assert (focus.selected_layers, focus.retention, focus.similarity_threshold) == FOCUS[model, dataset]
    assert (focus.vector_size, focus.frame_block, focus.block, focus.m_tile) == (32, 2, 2, 1024)
    assert not focus.sec_only and not focus.full_resolution


@pytest.mark.parametrize("model", CMC)
@pytest.mark.parametrize("dataset", VIDEO)
def test_cmc(model, dataset):
    cmc = published("cmc", model, dataset)
    assert (cmc.linear_threshold, cmc.query_threshold, cmc.score_threshold) == CMC[model]
    assert (cmc.interval, cmc.i_frame, cmc.skip_score_layers, cmc.simplified) == (8, 3, (27,), False)


@pytest.mark.parametrize(("model", "dataset"), ADAPTIV)
def test_adaptiv(model, dataset):
    assert published("adaptiv", model, dataset).threshold == ADAPTIV[model, dataset]


@pytest.mark.parametrize("model", CMC)
@pytest.mark.parametrize("dataset", VIDEO)
def test_framefusion(model, dataset):
    method = published("framefusion", model, dataset)
    assert (method.cost, method.similarity_lower_bound, method.ratio_lower_bound) == (0.3, 0.6, 0.1)


@pytest.mark.parametrize(
    ("experiment", "models", "datasets", "methods", "limit"),
    [
        ("main", ["llava_vid", "llava_onevision", "minicpm_v"], VIDEO, {"dense", "focus"}, None),
        (
            "baselines",
            ["llava_vid", "llava_onevision", "minicpm_v"],
            VIDEO,
            {"dense", "framefusion", "adaptiv", "cmc", "focus"},
            None,
        ),
        ("image", ["llava_onevision", "qwen2_5_vl"], IMAGE, {"dense", "adaptiv", "focus"}, 1000),
    ],
)
def test_paper_profile(experiment, models, datasets, methods, limit):
    params = read_params(project_root() / "params" / "paper" / f"{experiment}.yaml")
    assert (params["models"], tuple(params["datasets"]), set(params["methods"])) == (models, datasets, methods)
    assert (params["limit"], params["trace_samples"], params["dtype"]) == (limit, 10, "bfloat16")


def test_the_settings_are_found_from_anywhere(tmp_path, monkeypatch):
    inside = method_settings("focus", "tiny_onevision", "")
    monkeypatch.chdir(tmp_path)
    assert method_settings("focus", "tiny_onevision", "") == inside != method_settings("focus", "llava_vid", "")
