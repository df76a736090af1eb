"""LLaVA-Video: equal to the published implementation, with and without each method."""

import pytest
import torch
from vlm_oracle import check_base, check_method, read, read_config, write_checkpoint

from focuslib.models import LlavaVideo

FAMILY = "llava_video"


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = write_checkpoint(FAMILY, tmp_path_factory.mktemp(FAMILY), shards=3)
    return LlavaVideo.load(folder, vision_config=read_config(FAMILY)["_tiny_vision_config"])


@pytest.fixture(scope="module")
def video(vlm):
    golden = read(FAMILY, "inputs_video")
    ids = golden["input_ids"][0].tolist()
    at = ids.index(-200)
    pixels = torch.from_numpy(golden["pixel_values_videos"])
    return vlm.assemble_ids(ids[:at], vlm.encode_video(pixels), ids[at + 1 :], len(pixels))


def test_base(vlm, video):
    check_base(FAMILY, "video", vlm, video)


@pytest.mark.parametrize("case", ["focus_video", "focus_video_sec_only", "adaptiv_video", "cmc_video"])
def test_method(vlm, video, case):
    check_method(FAMILY, case, vlm, video)
