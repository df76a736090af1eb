"""Everything one view shows, and its packed form: a JSON header and raw arrays, read by static/explore.js."""

import base64
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from focuslib.errors import UserError
from focuslib.explore.recorder import NEVER, Cancelled, Recorder, Recording, SiteView, trace_recording
from focuslib.grid import grid_from_dict
from focuslib.methods import Dense, Focus, Method
from focuslib.models.base import VLM, Inputs, Media
from focuslib.models.layout import TokenLayout, grid_layout
from focuslib.models.media import FrameSampling, is_image_file, read_image, read_video
from focuslib.prefill.ops import SITES, dense_operations
from focuslib.prefill.patch import install
from focuslib.prefill.record import Links, PrefillRecord, Ranking, Run
from focuslib.prefill.trace import Trace

PICTURE_SIDE = 448  # pixels; larger frames are shrunk for the view
FORMAT = 1

# What `ViewData.save` writes as arrays, and what as text.
_LAYOUT_ARRAYS = ("frame", "panel", "box")
_SITE_ARRAYS = ("shown", "codes", "similar", "zero", "follows", "mean", "steps", "above")
_RECORDING_ARRAYS = ("dropped", "thresholds", "importance", "neighbours")
_RECORDING_WORDS = ("candidates", "doublings", "threshold", "applied")
_VIEW_WORDS = ("title", "retained", "kept", "question", "answers", "operations", "notes")

Progress = Callable[[float, str], None]  # share done, what is being done
Cancel = Callable[[], bool]  # whether to stop


@dataclass
class ViewData:
    """What a view shows: a recording with its pictures, question, answers and counts.

    frames: [F, H, W, 3] uint8, or None if unknown. answers: name → text. retained: visual tokens that each layer's MLP
    sees. kept: layer → positions (0 … S − 1) of the tokens left after a drop there. operations: multiplications over
    visual tokens of the prefill, by name. notes: lines to show.
    """

    recording: Recording
    layout: TokenLayout
    frames: np.ndarray | None
    title: str
    retained: list[int]
    kept: dict[str, list[int]] = field(default_factory=dict)
    question: str = ""
    answers: dict[str, str] = field(default_factory=dict)
    operations: dict[str, float] = field(default_factory=dict)
    links: Links | None = None
    notes: list[str] = field(default_factory=list)

    def sparsity(self, site: str, layer: int, threshold: float | None = None) -> float:
        """(similar + zero) / (S·V) at a site: the run's, or what a threshold (of recording.thresholds) would give."""
        view = self.recording.sites[site]
        if threshold is None or view.above is None:
            similar = int(view.similar[layer].sum(dtype=np.int64))
        else:
            similar = int(view.above[layer, np.argmin(abs(self.recording.thresholds - threshold))])
        return (similar + int(view.zero[layer].sum(dtype=np.int64))) / (self.recording.grid.length * view.vectors)

    def pack(self) -> bytes:
        """The packed form, deflated: header length (uint32, little endian), JSON header, arrays aligned to 8 bytes."""
        recording, arrays = self.recording, _Arrays()
        names = ("codes", "similar", "zero", "follows", "mean", "steps", "above")
        sites = {}
        for site in SITES:
            view = recording.sites[site]
            sites[site] = {"vectors": view.vectors, "shown": view.shown.tolist()} | {
                name: arrays.add(getattr(view, name)) for name in names if getattr(view, name) is not None
            }
        header = {
            "format": FORMAT,
            "title": self.title,
            "question": self.question,
            "answers": self.answers,
            "operations": self.operations,
            "notes": [*self.notes, *self._reductions()],
            "tokens": recording.grid.length,
            "layers": len(self.retained),
            "retained": self.retained,
            "sites": sites,
            "candidates": [[distance, *place] for distance, place in recording.candidates],
            "hops": 2 ** min(recording.doublings, 30),
            "thresholds": recording.thresholds.tolist(),
            "threshold": recording.threshold,
            "applied": recording.applied,
            "dropped": arrays.add(recording.dropped),
            "frame": arrays.add(self.layout.frame),
            "panel": arrays.add(self.layout.panel),
            "box": arrays.add(self.layout.box),
            "panels": self.layout.panels,
            "names": self.layout.names,
            "pictures": self._pictures(arrays),
        }
        if recording.neighbours is not None:
            header["neighbours"] = arrays.add(recording.neighbours)
        if recording.importance is not None:
            most = recording.importance.max(1, keepdims=True)
            header["importance"] = arrays.add(
                np.round(65535 * recording.importance / np.maximum(most, 1e-30)).astype(np.uint16)
            )
            header["importance_most"] = most[:, 0].tolist()
        header["rankings"] = [
            {"stage": ranking.stage, "by": ranking.by, "scores": arrays.add(ranking.scores.numpy()),
             "place": arrays.add(rank_shares(ranking.scores.numpy()))}
            for ranking in recording.rankings
        ]  # fmt: skip
        if self.links is not None:
            links = self.links
            header["links"] = {
                "title": links.title, "kinds": links.kinds,
                "target": arrays.add(links.target), "kind": arrays.add(links.kind),
            }  # fmt: skip
        text = json.dumps(header).encode()
        text += b" " * (-(4 + len(text)) % 8)
        return zlib.compress(np.uint32(len(text)).astype("<u4").tobytes() + text + arrays.data.getvalue(), 6)

    def save(self, path: Path) -> None:
        """Write everything to one .npz file, atomically: plain arrays, and a JSON text for the rest."""
        recording = self.recording
        arrays = {f"layout.{name}": getattr(self.layout, name) for name in _LAYOUT_ARRAYS}
        arrays |= {name: getattr(recording, name) for name in _RECORDING_ARRAYS}
        arrays["frames"] = self.frames
        arrays |= {f"ranking.{number}": ranking.scores.numpy() for number, ranking in enumerate(recording.rankings)}
        for site, view in recording.sites.items():
            arrays |= {f"{site}.{name}": getattr(view, name) for name in _SITE_ARRAYS}
        if self.links is not None:
            arrays |= {"links.target": self.links.target, "links.kind": self.links.kind}
        text = {
            **{name: getattr(self, name) for name in _VIEW_WORDS},
            **{name: getattr(recording, name) for name in _RECORDING_WORDS},
            "rankings": [[ranking.stage, ranking.by] for ranking in recording.rankings],
            "grid": recording.grid.to_dict(),
            "panels": self.layout.panels,
            "names": self.layout.names,
            "vectors": {site: view.vectors for site, view in recording.sites.items()},
            "links": self.links and {"title": self.links.title, "kinds": self.links.kinds},
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open("wb") as file:
            present = {name: array for name, array in arrays.items() if array is not None}
            np.savez_compressed(file, text=np.array(json.dumps(text)), **present)
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> "ViewData":
        """Read what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        text = json.loads(str(arrays.pop("text")))
        candidates = [(distance, tuple(place)) for distance, place in text["candidates"]]
        sites = {
            site: SiteView(vectors, **_present(arrays, _SITE_ARRAYS, f"{site}."))
            for site, vectors in text["vectors"].items()
        }
        words: dict[str, Any] = {name: text[name] for name in _RECORDING_WORDS} | {"candidates": candidates}
        recording = Recording(grid_from_dict(text["grid"]), sites, **_present(arrays, _RECORDING_ARRAYS), **words)
        recording.rankings = [
            Ranking(stage, by, torch.from_numpy(arrays[f"ranking.{number}"]))
            for number, (stage, by) in enumerate(text.get("rankings", []))  # views of older versions have none
        ]
        panels, names = tuple(text["panels"]), tuple(text.get("names", ()))  # the latter since there are several media
        layout = TokenLayout(**_present(arrays, _LAYOUT_ARRAYS, "layout."), panels=panels, names=names)
        links = text["links"] and Links(
            text["links"]["title"], tuple(text["links"]["kinds"]), arrays["links.target"], arrays["links.kind"]
        )
        words = {name: text[name] for name in _VIEW_WORDS}
        return cls(recording, layout, arrays.get("frames"), links=links, **words)

    def base64(self) -> str:
        """The packed form as text, for an HTML page."""
        return base64.b64encode(self.pack()).decode()

    def _pictures(self, arrays: "_Arrays") -> dict[str, Any]:
        """The frames as image files. Small ones are kept exactly, large ones shrunk."""
        if self.frames is None:
            return {"count": self.layout.num_frames, "width": 4, "height": 3, "files": []}
        height, width = self.frames.shape[1:3]
        files = []
        for frame in self.frames:
            image, file = Image.fromarray(frame), io.BytesIO()
            image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
            image.save(file, **({"format": "PNG"} if max(width, height) <= 128 else {"format": "JPEG", "quality": 85}))
            files.append(arrays.add(np.frombuffer(file.getvalue(), np.uint8)))
        return {"count": len(files), "width": width, "height": height, "files": files}

    def _reductions(self) -> list[str]:
        """What is drawn from less than all vectors, in words."""
        lines = [
            f"{site}: {len(view.shown)} of {view.vectors} vectors a token"
            for site, view in self.recording.sites.items()
            if len(view.shown) < view.vectors
        ]
        if not lines:
            return []
        return ["Sub-sampled for drawing: " + ", ".join(lines) + "; counts, means and sparsities are over all vectors."]


def rank_shares(scores: np.ndarray) -> np.ndarray:
    """How many of the tokens that were ranked have at most this score, in 65535ths; 0: not ranked. [S] → [S] uint16."""
    ranked = np.sort(scores[~np.isneginf(scores)])
    shares = np.searchsorted(ranked, scores, side="right") / max(1, len(ranked))
    return np.ceil(65535 * shares).astype(np.uint16)


def _present(arrays: dict[str, Any], names: tuple[str, ...], before: str = "") -> dict[str, Any]:
    """Those arrays of `names` that are there; `before` stands before their names in the file."""
    return {name: arrays[before + name] for name in names if before + name in arrays}


class _Arrays:
    """Arrays one after another, each aligned to 8 bytes."""

    def __init__(self):
        self.data = io.BytesIO()

    def add(self, array: np.ndarray) -> dict[str, Any]:
        """Append an array; returns its place, for the header."""
        array = np.ascontiguousarray(array)
        place = {"dtype": array.dtype.name, "shape": array.shape, "at": self.data.tell()}
        self.data.write(array.astype(array.dtype.newbyteorder("<")).tobytes())
        self.data.write(b"\0" * (-self.data.tell() % 8))
        return place


def run_view(
    vlm: VLM,
    media: Media | list[Media],
    question: str,
    method: Method,
    probe: Focus,
    *,
    dense_answer: str | None = None,
    max_new_tokens: int = 16,
    progress: Progress = lambda share, text: None,
    cancelled: Cancel = lambda: False,
) -> ViewData:
    """Run the model on a question, dense and under the method, and collect what a view shows.

    probe: measures the similarities if the method is not Focus. dense_answer: known from an earlier run.
    progress: called with the share done and what is being done. cancelled: asked between layers; Cancelled is raised.
    """

    def check() -> None:
        if cancelled():
            raise Cancelled

    def step(share: float, text: str) -> None:
        check()
        progress(share, text)

    step(0, "reading the clip")
    layers = vlm.model.config.get_text_config().num_hidden_layers
    answers = {}
    opened = [vlm.clip(one) for one in media] if isinstance(media, (list, tuple)) else vlm.clip(media)
    inputs: Inputs | None = None

    def run(used: Method, first: float, last: float) -> tuple[str, Recorder, Run, Inputs]:
        nonlocal inputs
        seen = Recorder(used, used if isinstance(used, Focus) else probe, lambda layer: step(
            first + (last - first) * layer / layers, f"{used.name}: layer {layer + 1} of {layers}"
        ))  # fmt: skip
        with install(seen, vlm) as live:
            if inputs is None or used.watched_layer is not None:  # which watches the tower at work
                inputs = vlm.prepare(opened, question)
            ids = vlm.generate_ids(inputs, max_new_tokens, streamer=_Steps(check))
        return vlm.decode(ids), seen, live, inputs

    if not isinstance(method, Dense):
        answers["dense"] = run(Dense(), 0.05, 0.5)[0] if dense_answer is None else dense_answer
    answers[method.name], seen, live, inputs = run(method, 0.5, 0.98)
    recording, record = seen.recording(), live.last
    frames, layout = vlm.drawing(opened, inputs)
    dense = dense_operations(record.shape, record.grid.length)
    notes = estimates(method, record)
    if not recording.applied:
        notes.append(
            f"{method.name} does not use these similarities: they are measured beside it, with vectors of "
            f"{probe.vector_size} channels and a threshold of {probe.similarity_threshold:g}."
        )
    return ViewData(
        recording=recording,
        layout=layout,
        frames=frames,
        title=f"{vlm.name} under {method}",
        retained=record.retained,
        kept={str(layer): positions.tolist() for layer, positions in record.kept.items()},
        question=question,
        answers=answers,
        operations={"dense": dense, method.name: dense * (1 - live.sparsity)},
        links=method.links(record),
        notes=notes,
    )


def estimates(method: Method, record: PrefillRecord) -> list[str]:
    """A line on what the prefill's visual tokens would take on the method's accelerator (hardware); none if unknown."""
    try:
        from focuslib.hardware.energy import (
            energy,  # the hardware's tables need pandas, which recording a view does not
        )
        from focuslib.hardware.samples import record_cost

        cost, design = record_cost(method.name, record)
    except (ModuleNotFoundError, UserError):
        return []
    millijoules = energy(cost, design).total
    return [f"Estimated on the {design.name} accelerator: {1000 * cost.seconds:.3g} ms, {millijoules:.3g} mJ."]


class _Steps:
    """What generate() takes as a streamer: told of every new token."""

    def __init__(self, check: Callable[[], None]):
        self.check = check

    def put(self, ids: torch.Tensor) -> None:
        self.check()

    def end(self) -> None:
        pass


def trace_view(path: str | Path, media: Media | None = None, layout: TokenLayout | None = None) -> ViewData:
    """A recorded native trace, without a model. media: its clip, for the pictures; layout: from a VLM's `layout`."""
    path = Path(path)
    trace = Trace.load(path)
    recording = trace_recording(trace)
    layout = layout or grid_layout(trace.grid)
    frames = None
    if media is not None:
        frames = _pictures_of(media, layout.num_frames)
        if len(frames) != layout.num_frames:
            raise UserError(f"{media}: {len(frames)} frames, but the trace has {layout.num_frames}; give its own clip")
    gone = recording.dropped
    retained = [int(((gone == NEVER) | (gone > 2 * layer + 1)).sum()) for layer in range(trace.num_layers)]
    notes = ["A trace holds no similarities, importance or answers; run the model to see them."]
    return ViewData(recording, layout, frames, f"trace {path.name}", retained, notes=notes)


def _pictures_of(media: Media, count: int) -> np.ndarray:
    if not isinstance(media, (str, Path)):
        media = np.asarray(media)
        return media[None] if media.ndim == 3 else media
    return np.asarray(read_image(media))[None] if is_image_file(media) else read_video(media, FrameSampling(count))
