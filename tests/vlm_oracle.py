"""Tiny checkpoints in the published layouts, and what the published implementations answered (golden/README.md)."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from focuslib.kernels.motion import ZEROED
from focuslib.methods import Adaptiv, Cmc, Focus
from focuslib.models import VLM, Inputs
from focuslib.prefill.ops import SITES

torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other

FOLDER = Path(__file__).parent / "golden" / "vlm"
METHODS = {"focus": Focus, "adaptiv": Adaptiv, "cmc": Cmc}
TOLERANCE = 1e-4  # of logits: other arithmetic than the published implementation's
CLOSE = 1e-6  # a decision nearer than this to flipping may flip


def read(family: str, name: str) -> dict[str, np.ndarray]:
    with np.load(FOLDER / family / f"{name}.npz") as data:
        return {key: data[key] for key in data.files}


def read_meta(family: str) -> dict:
    return json.loads((FOLDER / family / "meta.json").read_text())


def read_config(family: str) -> dict:
    return json.loads((FOLDER / family / "config.json").read_text())


def read_weights(family: str) -> dict[str, np.ndarray]:
    """The checkpoint's parameters, float32 (stored as four planes of bytes, because the high ones compress)."""
    stored = read(family, "weights")
    flat = np.ascontiguousarray(stored["planes"].T).view(np.float32).ravel()
    shapes = [json.loads(shape) for shape in stored["shapes"].tolist()]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    parts = np.split(flat, ends[:-1])
    names = stored["names"].tolist()
    return {name: part.reshape(shape) for name, part, shape in zip(names, parts, shapes, strict=True)}


def write_checkpoint(family: str, folder: Path, shards: int = 1, extra: dict[str, np.ndarray] | None = None) -> Path:
    """The checkpoint as a folder in the published layout, in one file or in shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(read_config(family)))
    weights = {**read_weights(family), **(extra or {})}
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return folder
    names = sorted(weights)
    files = {name: f"model-{index % shards + 1:05}-of-{shards:05}.safetensors" for index, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder


def generate(vlm: VLM, inputs: Inputs) -> list[int]:
    """Eight greedy tokens, as the golden vectors were made."""
    plain = {"eos_token_id": None, "pad_token_id": 0, "repetition_penalty": 1.0}
    return vlm.generate_ids(inputs, max_new_tokens=8, min_new_tokens=8, **plain).tolist()


def check_logits(got: torch.Tensor, golden: dict[str, np.ndarray], tolerance: float = TOLERANCE) -> None:
    """The logits of the last tokens, all of them text."""
    expected = golden["logits"]
    np.testing.assert_allclose(got[0, -len(expected) :].float().numpy(), expected, rtol=0, atol=tolerance)


def check_base(family: str, media: str, vlm: VLM, inputs: Inputs) -> None:
    """The model without a method."""
    golden = read(family, f"base_{media}")
    if "inputs_embeds" in inputs.tensors:
        embeds = inputs.tensors["inputs_embeds"][0, ::64].numpy()
        np.testing.assert_allclose(embeds, golden["embeds"], rtol=0, atol=5e-5)
    check_logits(vlm.prefill(inputs), golden)
    assert generate(vlm, inputs) == golden["gen_ids"].tolist()


def check_method(family: str, case: str, vlm: VLM, inputs: Inputs) -> None:
    """A method's decisions, logits, answer and sparsity, and that it leaves the model as it was."""
    meta, golden = read_meta(family)[case], read(family, case)
    if "grid" in meta:
        assert inputs.grid.to_dict() == meta["grid"]
    margins = [margin for margin in meta.get("margins", {}).values() if margin is not None]
    close = min(margins, default=1.0) < CLOSE
    method = METHODS[case.split("_")[0]](**meta["settings"])
    before = vlm.prefill(inputs)
    with method(vlm, trace=method.name == "focus") as run:
        check_logits(vlm.prefill(inputs), golden, 1e-3 if close else TOLERANCE)
        record = run.last
        if "zero.query" in golden:
            check_trace(run.trace, golden, close)
        assert generate(vlm, inputs) == golden["gen_ids"].tolist()
    assert torch.equal(vlm.prefill(inputs), before)
    check_kept(record, golden, close)
    check_sparsity(record, meta["sparsity"], inputs.grid.length)
    if "cmc_table" in golden:
        check_motion(record.details["linear_match"].numpy(), golden, inputs.grid)


def check_trace(trace, golden: dict[str, np.ndarray], close: bool) -> None:
    """Masks and group indices of every site, layer, token and vector."""
    parts = trace.to_dict()
    for site in SITES:
        zero, similar, index = (parts[kind][site][:, 0].numpy() for kind in ("mask_zero", "mask_similar", "group_idx"))
        tokens, vectors = zero.shape[1:]
        own = np.arange(tokens * vectors).reshape(tokens, vectors)
        expected_index = own - golden[f"distance.{site}"].astype(np.int64) * vectors
        for got, bits in ((zero, golden[f"zero.{site}"]), (similar, golden[f"similar.{site}"])):
            expected = np.unpackbits(bits, count=got.size).reshape(got.shape).astype(bool)
            check_equal(got, expected, close, site)
        check_equal(index, expected_index, close, site)


def check_equal(got: np.ndarray, expected: np.ndarray, close: bool, what: str) -> None:
    """Equal; where a decision was close, equal but for one in ten thousand."""
    assert got.shape == expected.shape, what
    share = (got == expected).mean()
    assert share == 1 or (close and share >= 0.9999), f"{what}: {share:.6f} equal"


def check_kept(record, golden: dict[str, np.ndarray], close: bool) -> None:
    """The visual tokens left after each drop (golden: sequence indices, text included)."""
    grid, drops = record.grid, [record.kept[layer] for layer in sorted(record.kept)]
    expected = [golden[key] for key in ("retained_0", "retained_1", "retained_2", "kept") if key in golden]
    if "retained_last" in golden:
        drops, expected = drops[-1:], [golden["retained_last"]]
    for got, rows in zip(drops, expected, strict=bool(expected)):
        visual = rows[(rows >= grid.start) & (rows < grid.stop)] - grid.start
        assert len(got) == len(visual)
        differing = len(set(got.tolist()) ^ set(visual.tolist()))
        assert differing == 0 or (close and differing <= 2)


def check_sparsity(record, expected: dict[str, float], length: int) -> None:
    """The published numbers: a site's share of similar and zero vectors, or the method's own."""
    stats = {"pre_attn": "sparsity", "fc": "linear_sparsity"}
    for name, value in expected.items():
        if record.counts.layers:
            got = np.mean([layer[name].sparsity(length) for layer in record.counts.layers])
        else:
            got = record.stats[stats.get(name, f"{name}_sparsity")]
        assert abs(got - value) < 1e-6, name


def check_motion(match: np.ndarray, golden: dict[str, np.ndarray], grid) -> None:
    """CMC's table of the input embeddings: which I-frame token replaces each token of the other frames.

    The tokens of an interval without an I-frame are replaced by the zeros of the padded one.
    """
    size = grid.length // grid.num_frames
    table, mask = (golden[key][: grid.num_frames] for key in ("cmc_table", "cmc_mask"))
    for number, found in enumerate(match.reshape(grid.num_frames, size)):
        i_frame = number // 8 * 8 + 3
        if i_frame >= grid.num_frames:
            assert np.array_equal(found == ZEROED, mask[number]) and (found < 0).all()
        elif number != i_frame:
            assert np.array_equal(found >= 0, mask[number])
            assert np.array_equal((found - i_frame * size)[found >= 0], table[number][mask[number]])
