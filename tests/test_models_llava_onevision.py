"""LLaVA-OneVision: equal to the published implementation, with and without each method, for video and image."""

import re

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from vlm_oracle import check_base, check_method, read, read_config, write_checkpoint

from focuslib.kernels.motion import ZEROED
from focuslib.methods import Cmc
from focuslib.models import LlavaOnevision

FAMILY = "llava_onevision"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = write_checkpoint(FAMILY, tmp_path_factory.mktemp(FAMILY))
    return LlavaOnevision.load(folder, vision_config=read_config(FAMILY)["_tiny_vision_config"])


def assembled(vlm, case):
    golden = read(FAMILY, f"inputs_{case}")
    ids = golden["input_ids"][0].tolist()
    at = ids.index(-200)
    pixels = torch.from_numpy(golden["pixel_values_videos"])
    return vlm.assemble_ids(ids[:at], vlm.encode_video(pixels), ids[at + 1 :], len(pixels))


@pytest.fixture(scope="module")
def video(vlm):
    return assembled(vlm, "video")


@pytest.fixture(scope="module")
def image(vlm):
    golden = read(FAMILY, "inputs_image_small")
    ids = golden["input_ids"][0].tolist()
    at = ids.index(-200)
    width, height = golden["image_size_wh"].tolist()
    tiles = vlm.image_tiles(Image.fromarray(golden["image_uint8"]))
    features = vlm.encode_image(tiles, (height, width))
    return vlm.assemble_image_ids(ids[:at], features, ids[at + 1 :], (height, width))


def test_image_tiles_equal_the_published_ones(vlm):
    golden = read(FAMILY, "inputs_image_small")
    tiles = vlm.image_tiles(Image.fromarray(golden["image_uint8"]))
    assert np.array_equal(tiles.numpy(), golden["pixel_values"])


def test_base_video(vlm, video):
    check_base(FAMILY, "video", vlm, video)


def test_base_image(vlm, image):
    check_base(FAMILY, "image_small", vlm, image)


@pytest.mark.parametrize("case", ["focus_video", "focus_video_sec_only", "adaptiv_video", "cmc_video"])
def test_method_on_video(vlm, video, case):
    check_method(FAMILY, case, vlm, video)


def test_a_tail_interval_without_an_i_frame(vlm):
    """Ten frames: the last two have no I-frame, and the published code replaces with zeros there."""
    video10 = assembled(vlm, "video10")
    check_base(FAMILY, "video10", vlm, video10)
    check_method(FAMILY, "cmc_video10", vlm, video10)
    with Cmc(linear_threshold=0.4, query_threshold=0.4, tail="leave")(vlm) as run:
        vlm.prefill(video10)
    assert not (run.last.details["linear_match"] == ZEROED).any()


@pytest.mark.parametrize("case", ["focus_image_small", "adaptiv_image_small"])
def test_method_on_image(vlm, image, case):
    check_method(FAMILY, case, vlm, image)


@pytest.mark.parametrize("layout", ["native", "hub"])
def test_transformers_layouts_answer_the_same(vlm, video, tmp_path, layout):
    """The layout that transformers writes, and the older one of llava-hf/llava-onevision-qwen2-7b-ov-hf."""
    weights = {name: value.clone() for name, value in vlm.model.state_dict().items()}
    if layout == "hub":
        older = {
            r"^model\.language_model\.": "language_model.model.",
            r"^lm_head\.": "language_model.lm_head.",
            r"^model\.vision_tower\.": "vision_tower.vision_model.",
            r"^model\.": "",
        }
        for pattern, name in older.items():
            weights = {re.sub(pattern, name, key): value for key, value in weights.items()}
    save_file(weights, tmp_path / "model.safetensors")
    vlm.model.config.save_pretrained(tmp_path)
    again = LlavaOnevision.load(tmp_path)
    assert torch.equal(again.prefill(video), vlm.prefill(video))
