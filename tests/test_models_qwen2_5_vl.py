"""Qwen2.5-VL: the decoder with three-dimensional positions is equal to the published implementation, with each method.

The golden file leaves out the pixels and the (stock) vision tower; its features are put in place of the tower's.
"""

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from vlm_oracle import check_base, check_method, read, read_config, write_checkpoint

from focuslib.models import Qwen25VL

FAMILY = "qwen2_5_vl"


def random_tower() -> dict[str, np.ndarray]:
    """Parameters for the vision tower that the golden file leaves out."""
    model = Qwen25VL.architecture(None, read_config(FAMILY))
    tower = model.model_class(model.config).model.visual
    return {f"visual.{name}": value.numpy() for name, value in tower.state_dict().items()}


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    folder = write_checkpoint(FAMILY, tmp_path_factory.mktemp(FAMILY), extra=random_tower())
    vlm = Qwen25VL.load(folder)
    golden, ids = read(FAMILY, "base_image"), read(FAMILY, "inputs_image")["input_ids"][0]
    features = torch.from_numpy(golden["embeds"][ids == vlm.model.config.image_token_id])
    vlm.model.model.visual.forward = lambda pixels, **kwargs: BaseModelOutputWithPooling(pooler_output=features)
    return vlm


@pytest.fixture(scope="module")
def image(vlm):
    golden = read(FAMILY, "inputs_image")
    grid = torch.from_numpy(golden["image_grid_thw"])
    return vlm.assemble_ids(golden["input_ids"][0].tolist(), torch.zeros(int(grid.prod()), 1176), grid)


def test_base(vlm, image):
    check_base(FAMILY, "image", vlm, image)


@pytest.mark.parametrize("case", ["focus_image", "adaptiv_image"])
def test_method(vlm, image, case):
    check_method(FAMILY, case, vlm, image)


def test_positions_are_three_dimensional(vlm, image):
    flat = type(image)({k: v for k, v in image.tensors.items() if k != "mm_token_type_ids"}, image.grid)
    assert (vlm.prefill(image) - vlm.prefill(flat)).abs().max() > 1e-2
