"""MiniCPM-V 2.6: the port is equal to the published implementation, with and without each method."""

import numpy as np
import pytest
import torch
from PIL import Image
from vlm_oracle import check_base, check_method, read, write_checkpoint

from focuslib.models import MiniCPMV
from focuslib.models.minicpmv import frame_slices

FAMILY = "minicpmv"
SCALE = 56  # of the golden slices; the real model's is 448


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    return MiniCPMV.load(write_checkpoint(FAMILY, tmp_path_factory.mktemp(FAMILY), shards=2))


@pytest.fixture(scope="module")
def video(vlm):
    golden = read(FAMILY, "inputs_video")
    frames = [Image.fromarray(frame) for frame in golden["frames_uint8"]]
    slices = [pixels for frame in frames for pixels in frame_slices(frame, SCALE)]
    bounds = [tuple(bound) for bound in golden["image_bound"].tolist()]
    return vlm.assemble_ids(golden["input_ids"][0].tolist(), bounds, vlm.encode(slices), len(frames))


def test_slices_equal_the_published_ones():
    golden = read(FAMILY, "inputs_video")
    slices = frame_slices(Image.fromarray(golden["frames_uint8"][0]), SCALE)
    assert len(slices) == 3
    for index, pixels in enumerate(slices):
        rows, columns = golden["tgt_sizes"][index]
        # published layout: the patches side by side, [3, 14, 14 · patches]
        patches = golden[f"px_{index}"].reshape(3, 14, rows, columns, 14).transpose(0, 2, 1, 3, 4)
        assert np.array_equal(pixels.numpy(), patches.reshape(pixels.shape))


def test_base(vlm, video):
    check_base(FAMILY, "video", vlm, video)


@pytest.mark.parametrize("case", ["focus_video", "adaptiv_video", "cmc_video"])
def test_method(vlm, video, case):
    check_method(FAMILY, case, vlm, video)


def test_slices_of_several_shapes_are_encoded_each_by_itself(vlm):
    shapes = [(28, 42), (56, 14), (28, 42), (14, 98)]
    slices = [torch.rand(3, *shape) for shape in shapes]
    together = vlm.encode(slices)
    alone = torch.cat([vlm.encode([pixels]) for pixels in slices])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
