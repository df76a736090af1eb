"""Checkpoints that do not load: each says why in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from vlm_oracle import read_config, write_checkpoint

from focuslib.errors import UserError
from focuslib.models import MODELS, LlavaOnevision, LlavaVideo, MiniCPMV, Qwen25VL, TinyOnevision

FAMILIES = {LlavaOnevision: "llava_onevision", LlavaVideo: "llava_video", MiniCPMV: "minicpmv", Qwen25VL: "qwen2_5_vl"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The checkpoint of each family, LLaVA-Video's in three shards."""
    base = tmp_path_factory.mktemp("checkpoints")
    return {
        cls: write_checkpoint(family, base / family, shards=3 if cls is LlavaVideo else 1)
        for cls, family in FAMILIES.items()
    }


@pytest.fixture
def shards(folders, tmp_path):
    """A copy of the sharded checkpoint, to spoil."""
    return shutil.copytree(folders[LlavaVideo], tmp_path / "copy")


def load_video(folder, **settings):
    return LlavaVideo.load(folder, vision_config=read_config("llava_video")["_tiny_vision_config"], **settings)


def complaint(load, *arguments, **settings) -> str:
    with pytest.raises(UserError) as caught:
        load(*arguments, **settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_names():
    assert set(MODELS) == {"llava_vid", "llava_onevision", "minicpm_v", "qwen2_5_vl", "tiny_onevision", "hf"}
    assert all(cls.name == name for name, cls in MODELS.items())


def test_nothing_of_that_name(tmp_path):
    message = complaint(LlavaOnevision.load, "nobody/no-such-model")
    assert "nobody/no-such-model" in message and "hf download" in message
    assert "no config.json" in complaint(LlavaOnevision.load, tmp_path)


@pytest.mark.parametrize("cls", FAMILIES)
@pytest.mark.parametrize("other", FAMILIES)
def test_wrong_family(folders, cls, other):
    if cls is not other:
        message = complaint(cls.load, folders[other])
        assert str(folders[other]) in message and cls.name in message


def test_llava_video_in_the_transformers_layout_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava_onevision"}))
    assert "original layout" in complaint(LlavaVideo.load, tmp_path)


def test_spoilt_config(shards):
    (shards / "config.json").write_text('{"model_type": "llava_q')
    assert "config.json: not valid JSON" in complaint(load_video, shards)


def test_missing_shard(shards):
    (shards / "model-00002-of-00003.safetensors").unlink()
    message = complaint(load_video, shards)
    assert "model-00002-of-00003.safetensors: named in model.safetensors.index.json but missing" in message


@pytest.mark.parametrize("share", [0, 0.0001, 0.001, 0.6, 0.9999])
def test_half_downloaded_shard(shards, share):
    path = shards / "model-00003-of-00003.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    assert complaint(load_video, shards).startswith(f"{path}: ")


def test_no_weights(shards):
    for path in shards.glob("*.safetensors*"):
        path.unlink()
    assert "model.safetensors: missing" in complaint(load_video, shards)


@pytest.mark.parametrize("cls", [LlavaVideo, MiniCPMV])
def test_keys_that_do_not_fit(folders, tmp_path, cls, caplog):
    folder = write_checkpoint(FAMILIES[cls], tmp_path / "one")
    weights = load_file(folder / "model.safetensors")
    load = load_video if cls is LlavaVideo else cls.load
    name = next(name for name in sorted(weights) if name.endswith("layers.3.mlp.up_proj.weight"))
    kept = name.removeprefix("model.")  # the transformers name ends the same

    save_file({key: value for key, value in weights.items() if key != name}, folder / "model.safetensors")
    message = complaint(load, folder)
    assert "1 missing keys" in message and kept in message

    save_file({**weights, "stranger": np.zeros(3, np.float32)}, folder / "model.safetensors")
    assert "1 unexpected keys (such as stranger)" in complaint(load, folder)

    save_file({**weights, name: weights[name][:-1]}, folder / "model.safetensors")
    message = complaint(load, folder)
    assert "1 mismatched keys" in message and kept in message
    assert "LOAD REPORT" not in caplog.text


def test_dtype_and_device_map(folders):
    half = load_video(folders[LlavaVideo], dtype=torch.bfloat16, device_map={"": "cpu"})
    assert half.dtype == torch.bfloat16
    assert half.encode_video(torch.zeros(1, 3, 55, 55)).dtype == torch.bfloat16
    assert load_video(folders[LlavaVideo]).dtype == torch.float32


def test_media_of_other_shapes_are_refused():
    vlm = TinyOnevision.__new__(TinyOnevision)
    for array in (np.zeros((0, 8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8), np.zeros((1, 8, 8, 3))):
        assert "uint8" in complaint(vlm.frames, array)
    assert vlm.frames(np.zeros((8, 9, 3), np.uint8)).shape == (1, 8, 9, 3)
