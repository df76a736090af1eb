"""What only a GPU can say, in some minutes on one of 80 GB: `python -m benchmarks.gpu`; writes results/gpu/<name>.json.

The golden cases on the device (float32 without TF32, exact as on a CPU), masks in bfloat16, SIC compiled against as it
is written, and prefill and memory of a 28-layer 7B shape under every method. `--device cpu` tries it on tiny sizes.
"""

import argparse
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from focuslib.evaluation.speed import load_measured, machine, measure_speed, methods_for
from focuslib.files import write_json
from focuslib.grid import VisualGrid
from focuslib.kernels.compiled import uncompiled
from focuslib.kernels.similarity import ITSELF, ZERO, concentrate
from focuslib.methods import Focus
from focuslib.models import LlavaOnevision

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
CASES = ("focus_video", "focus_video_sec_only", "adaptiv_video", "cmc_video")
MINUTES = 7.0  # after which no further method is begun


def golden_cases(device: str) -> dict[str, str]:
    """Each golden case of a whole model on the device, in float32: "exact", or what differs."""
    threads = torch.get_num_threads()
    from vlm_oracle import check_method, read, read_config, write_checkpoint

    torch.set_num_threads(threads)  # which the oracle sets for tests
    family = LlavaOnevision.name
    outcome = {}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_checkpoint(family, Path(folder) / family)
        tower = read_config(family)["_tiny_vision_config"]
        vlm = LlavaOnevision.load(checkpoint, vision_config=tower, device=device, dtype=torch.float32)
        given = read(family, "inputs_video")
        ids = given["input_ids"][0].tolist()
        at = ids.index(-200)
        pixels = torch.from_numpy(given["pixel_values_videos"])
        with torch.inference_mode():
            features = vlm.encode_video(pixels.to(vlm.device))
            inputs = vlm.assemble_ids(ids[:at], features, ids[at + 1 :], len(pixels))
        for case in CASES:
            try:
                check_method(family, case, vlm, inputs)
                outcome[case] = "exact"
            except AssertionError as error:
                outcome[case] = " ".join(str(error).split())[:200] or "differs"
    return outcome


def site(frames: int, channels: int, device: str, dtype: torch.dtype):
    """A site's input with temporal redundancy, its positions and grid."""
    generator = torch.Generator().manual_seed(0)
    grid = VisualGrid(0, frames * 182, frames, 13, 14, 182, 14)
    still = torch.randn(1, 182, channels, generator=generator)
    noise = torch.randn(frames, 182, 1, generator=generator).abs() * 0.4
    x = (still + noise * torch.randn(frames, 182, channels, generator=generator)).flatten(0, 1)
    return x.to(device, dtype), torch.arange(grid.length, device=device), grid


def masks(device: str, frames: int, channels: int) -> dict[str, float]:
    """Share of vectors whose similar mask is the CPU's: float32, and bfloat16 against float32 of the same values."""
    shares = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        x, positions, grid = site(frames, channels, device, dtype)
        here = concentrate(x, positions, grid, threshold=0.9).codes.cpu()
        there = concentrate(x.cpu().float(), positions.cpu(), grid, threshold=0.9).codes
        similar = [(codes != ITSELF) & (codes != ZERO) for codes in (here, there)]
        shares[name] = float((similar[0] == similar[1]).double().mean())
    return shares


def compiled_against_eager(device: str, frames: int, channels: int) -> list[dict[str, Any]]:
    """Median milliseconds of a site, compiled and as it is written, in turns."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        x, positions, grid = site(frames, channels, device, dtype)
        y, times = x.clone(), {"compiled": [], "eager": []}

        def once(y=y, positions=positions, grid=grid) -> float:
            _wait(device)
            start = time.perf_counter()
            concentrate(y, positions, grid, threshold=0.9, overwrite=True)
            _wait(device)
            return 1000 * (time.perf_counter() - start)

        for turn in range(9):
            y.copy_(x)
            compiled = once()
            y.copy_(x)
            with uncompiled():
                eager = once()
            if turn:
                times["compiled"].append(compiled)
                times["eager"].append(eager)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        rows.append({"dtype": str(dtype).removeprefix("torch."), "shape": list(x.shape), **medians})
    return rows


def prefills(device: str, tiny: bool, deadline: float, say) -> list[dict[str, Any]]:
    """Prefill and memory of dense and every method, SEC and SIC apart, each against dense in the same turns."""
    vlm = load_measured("shape:tiny" if tiny else "shape:qwen2-7b", device=device, dtype="bfloat16")
    methods = methods_for(vlm, ["dense", "focus", "framefusion", "adaptiv", "cmc"])
    dense, cmc = methods.pop("dense"), methods.pop("cmc")
    full = methods["focus"].settings()
    methods["focus, SEC only"] = Focus(**{**full, "sec_only": True})
    methods["focus, SIC only"] = Focus(**{**full, "selected_layers": (), "retention": ()})
    methods["cmc"] = cmc  # last: it takes longest
    rows = []
    for label, method in methods.items():
        if time.monotonic() > deadline:
            rows.append({"method": label, "left_out": "no time left"})
            continue
        say(f"prefill: {label}")
        pair = {"dense": dense, label: method}
        measured = measure_speed(vlm, pair, frames=4 if tiny else 64, repeats=1 if label == "cmc" else 3, decode=False)
        rows += measured if not rows else measured[1:]
    return rows


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu for a dry run on tiny sizes")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder (default %(default)s)")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    if cuda and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA GPU here; --device cpu tries the code on tiny sizes", file=sys.stderr)
        return 1
    deadline = time.monotonic() + 60 * MINUTES
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    frames, channels = (64, 3584) if cuda else (8, 512)
    result: dict[str, Any] = {"machine": machine(torch.device(options.device)), "dry_run": not cuda}
    say("golden cases")
    result["golden"] = golden_cases(options.device)
    with torch.inference_mode():
        say("masks")
        result["masks"] = masks(options.device, min(frames, 16), channels)
        say("SIC")
        result["sic_ms"] = compiled_against_eager(options.device, frames, channels)
    result["prefill"] = prefills(options.device, not cuda, deadline, say)
    name = re.sub(r"[^a-z0-9]+", "-", result["machine"]["device"].lower()).strip("-")
    write_json(options.out / f"{name}.json", result)
    print(options.out / f"{name}.json")
    exact = all(outcome == "exact" for outcome in result["golden"].values())
    return 0 if exact and min(result["masks"].values()) >= 0.999 else 1


if __name__ == "__main__":
    sys.exit(main())
