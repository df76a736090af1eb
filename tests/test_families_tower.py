"""That what is read in a vision tower is pooled to the tokens that its patches become, on every family with a tower."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from test_families import loaded, media_of, picture
from tiny_families import CHECKPOINTS

from focuslib.errors import UserError
from focuslib.methods import Method
from focuslib.methods.frames import frame_shapes
from focuslib.prefill.decoder import find_decoder
from focuslib.prefill.tower import Picture, find_tower

torch.set_num_threads(1)
CLS = ("llava_next_video", "internvl")
REFUSED = {  # a wide picture, cut into tiles
    "internvl": "the frames here are no whole rows of tokens", "smolvlm": "the frames here are no whole rows of tokens",
    "llava_next_video": "the vision tower saw 3 pictures and the prompt has 2 frames of tokens",
}  # fmt: skip


@dataclass(frozen=True)
class Pools(Method):
    """Pools each patch's own map: details pooled [N, patches], which tokens a patch counts for."""

    name = "pools"

    @property
    def watched_layer(self):
        return -1

    def end(self, prefill):
        tower, shapes = prefill.watched, frame_shapes(self.name, prefill.grid)
        sizes = [len(picture.received) for picture in tower.pictures]
        columns = []
        for number, size in enumerate(sizes):
            for patch in range(size):
                tower.pictures = [Picture(torch.zeros(other), torch.zeros(other, 1)) for other in sizes]
                tower.pictures[number].received[patch] = 1
                columns.append(prefill.tower(shapes).received)
        prefill.record.details["pooled"] = torch.stack(columns, 1)


class _Embedded(Exception):
    pass


def visual_tokens(vlm, media) -> torch.Tensor:
    """The visual tokens [S, D] that enter the decoder."""
    inputs = vlm.prepare(media, "What moves?")

    def stop(module, args, kwargs):
        stop.embeds = kwargs["inputs_embeds"][0]
        raise _Embedded

    hook = find_decoder(vlm.model).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        vlm.prefill(inputs)
    except _Embedded:
        return stop.embeds[inputs.grid.rows()]
    finally:
        hook.remove()


def reached(vlm, media, cls: int, patches: int) -> torch.Tensor:
    """Which token changes when a patch leaves the tower's last layer otherwise: [N, patches] bool."""
    layers = find_tower(vlm.model, find_decoder(vlm.model))[2]
    last: Any = layers[getattr(vlm.model.config, "vision_feature_layer", -1)]
    plain, columns = visual_tokens(vlm, media), []
    for patch in range(patches):

        def change(module, args, output, patch=patch):
            change = 5 * torch.randn(output.shape[-1], generator=torch.Generator().manual_seed(patch))
            output = output.clone()
            rows = output.view(1, -1, len(change)) if cls == 0 else output[:, cls:]
            rows[patch // rows.shape[1], patch % rows.shape[1]] += change
            return output

        hook = (last.feed_forward if hasattr(last, "feed_forward") else last.mlp).register_forward_hook(change)
        columns.append(((visual_tokens(vlm, media) - plain).abs() > 1e-6).any(1))
        hook.remove()
    return torch.stack(columns, 1)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", CHECKPOINTS)
@torch.inference_mode()
def test_a_patch_counts_for_the_token_that_it_becomes(family_checkpoint, name, wide):
    """With a CLS token (CLIP, InternVL) and without, merged in the tower or after it, shuffled, in windows."""
    vlm, media = loaded(family_checkpoint(name, tower=3)), picture(96, 48) if wide else media_of(name)
    inputs = vlm.prepare(media, "What moves?")
    if wide and name in REFUSED:
        with pytest.raises(UserError, match=REFUSED[name]), Pools()(vlm):
            vlm.prefill(inputs)
        return
    with Pools()(vlm) as run:
        vlm.prefill(inputs)
    pooled = run.last.details["pooled"]
    assert torch.equal(pooled > 0, reached(vlm, media, int(name in CLS), pooled.shape[1]))
    shares = pooled.sum(0) * pooled.shape[1] / len(pooled)  # a patch counts as one of those of its token
    torch.testing.assert_close(shares, torch.ones_like(shares))
