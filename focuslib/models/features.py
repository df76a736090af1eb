"""Clips and their visual features, kept from one prompt to the next: methods are compared on the same clips."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from focuslib.models.media import Clip, FrameSampling, read_clip
from focuslib.prefill.tower import Seen, Tower

LIMIT = 512 << 20  # bytes of everything kept
SHARE = 64  # what takes more than this part of the limit is not kept: few would fit, and none be met again


class FeatureStore:
    """What a model need not compute twice; it belongs to one model, whose weights stay as they are.

    Clips are known by their file (path, size, time of change) and sampling, features by the frames themselves: a digest
    of their shape and bytes. What was used least recently leaves first.

    limit: bytes of everything kept. used: bytes kept now. hits: how often something was there.
    """

    def __init__(self, limit: int = LIMIT):
        self.limit, self.used, self.hits = limit, 0, 0
        self._kept: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()

    def clip(self, path: str | Path, sampling: FrameSampling) -> Clip:
        """The sampled frames of a video file (see media.read_clip)."""
        file = Path(path)
        if not file.is_file():  # a folder of frames, or a mistake that read_clip names
            return read_clip(file, sampling)
        state = file.stat()
        key = str(file), state.st_size, state.st_mtime_ns, sampling
        return self._get(key, lambda: read_clip(file, sampling), lambda clip: clip.frames.nbytes)

    def features(
        self, frames: np.ndarray, encode: Callable[[np.ndarray], Tensor], tower: Tower | None = None
    ) -> Tensor:
        """The visual features of frames [F, H, W, 3] uint8, as `encode` gives them; kept in main memory.

        tower: what watches the tower that encodes; where the tower need not run it is shown what was seen before, which
        stays on its device.
        """
        if frames.nbytes > self.limit // SHARE:
            return encode(frames)
        key = frames.shape, blake2b(np.ascontiguousarray(frames).data, digest_size=16).digest()
        if tower is None:
            return self._get(key, lambda: encode(frames).cpu(), lambda found: found.nbytes)
        hits = self.hits
        features, seen = self._get(
            (*key, tower.layer), lambda: tower.watching(lambda: encode(frames).cpu()), _bytes_seen
        )
        if self.hits > hits:
            tower.show(seen)
        return features

    def _get(self, key: Hashable, make: Callable[[], Any], size: Callable[[Any], int]) -> Any:
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
            return self._kept[key][0]
        value = make()
        taken = size(value)
        if taken <= self.limit // SHARE:
            self._kept[key] = value, taken
            self.used += taken
        while self.used > self.limit:
            self.used -= self._kept.popitem(last=False)[1][1]
        return value


def _bytes_seen(watched: tuple[Tensor, Seen]) -> int:
    """Of features, and of what was seen of the tower."""
    features, (pictures, _) = watched
    return features.nbytes + sum(picture.received.nbytes + picture.keys.nbytes for picture in pictures)
