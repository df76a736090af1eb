"""Build every image-text-to-text family of the installed transformers as a tiny random model; try it under the patch.

python tests/scan_families.py [family …] (make scan); the table goes to docs/models/families.md when all are scanned.
Each family is built (see shrunk_families) in a process of its own with a limit of its memory: where a number's name is
missed, a default tower would take all there is. Exit status 1 if one is wrong.
"""

import json
import logging
import os
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from shrunk_families import FAMILIES, Tried, tried
from tiny_families import MARKERS, Asks, decoding_error, longer

from focuslib.errors import UserError
from focuslib.methods import Dense
from focuslib.prefill.decoder import find_decoder

PAGE = Path(__file__).parents[1] / "docs" / "models" / "families.md"
MEMORY, SECONDS = 4 << 30, 120  # of a family: address space beyond what the interpreter takes, time of the processor
DROPS = [((0,), (0.6,)), ((1,), (0.5,)), ((2,), (0.4,)), ((0, 1, 2), (0.6, 0.4, 0.2))]
EXACT, PARTLY, REFUSED, UNBUILT, WRONG = "exact", "exact, in part", "refused", "cannot be built", "WRONG"
RESULTS = [EXACT, PARTLY, REFUSED, UNBUILT, WRONG]


def main(names: list[str]) -> int:
    torch.set_num_threads(1)
    found = {}
    for name in names or FAMILIES:
        found[name] = in_a_process(name)
        print(f"{name}: {found[name]['result']}: {found[name]['why'][:300]}", flush=True)
    if not names:
        PAGE.write_text(page(found), encoding="utf-8")
    return 1 if any(one["result"] == WRONG for one in found.values()) else 0


def in_a_process(name: str) -> dict[str, str]:
    """What `scan` finds in a forked process: this one has imported everything, and stays as it is."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        os.write(writing, json.dumps(scan(name)).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if text:
        return json.loads(text)
    return unbuilt(f"its process ended with {status}: too slow or too large")


def unbuilt(why: str) -> dict[str, str]:
    return {"result": UNBUILT, "layer": "", "prompt": "", "why": why}


def scan(name: str) -> dict[str, str]:
    """Build a family and try it. → result, layer (the class), prompt (what it holds), why (a line)."""
    found, hindrance = [], ""
    for attention in ("sdpa", "eager"):
        try:
            family = tried(name, attention)
        except UserError as refusal:
            found.append((REFUSED, brief(refusal), "", ""))
        except Exception as error:  # whatever a family may raise; some know only one implementation
            hindrance = hindrance or brief(error)
        else:
            found.append((*check(family), layer_of(family.model), "image" if family.image else "text"))
    if not found:
        return unbuilt(hindrance)
    result, why, layer, prompt = max(found, key=lambda one: RESULTS.index(one[0]))
    return {"result": result, "layer": layer, "prompt": prompt, "why": why}


def run(family: Tried) -> torch.Tensor:
    return family.model.model(**family.inputs, use_cache=False).logits


@torch.inference_mode()
def check(family: Tried) -> tuple[str, str]:
    """What a model does under the patch: result and why."""
    model, plain = family.model, run(family)
    try:
        with Dense()(model):
            same = torch.equal(run(family), plain)
    except UserError as error:
        return REFUSED, brief(error)
    except Exception as error:
        return WRONG, f"dense fails: {brief(error)}"
    if not same:
        return WRONG, "dense differs"
    notes = []
    try:
        own = stock_error(family)
    except Exception as error:
        own = float("inf")
        notes.append(f"drops are not checked, as the unpatched model does not decode the prompt: {brief(error)}")
    else:
        if own > 2e-5:
            notes.append("drops are not checked: the unpatched model's cached decoding is not its recomputation")
    for what, error_of, allowed in (
        ("attention rows", lambda: asked_error(family, plain), 1e-5),
        *((f"drops in layers {layers}", lambda layers=layers, shares=shares: decoding_error(
            model, family.inputs, layers, shares), 2e-5) for layers, shares in (DROPS if own <= 2e-5 else [])),
    ):  # fmt: skip
        try:
            error = error_of()
        except UserError as refusal:
            notes.append(f"refused: {brief(refusal)}")
        except Exception as failure:
            return WRONG, f"{what} fail: {brief(failure)}"
        else:
            if not error <= allowed:
                return WRONG, f"{what} differ by {error:.2g}"
    return (PARTLY, "; ".join(dict.fromkeys(notes))) if notes else (EXACT, "")


def asked_error(family: Tried, plain: torch.Tensor) -> float:
    with Asks()(family.model):
        return float((run(family) - plain).abs().max())


def stock_error(family: Tried) -> float:
    """How far the unpatched model's cached decoding is from its own recomputation: a prompt may attend both ways."""
    model, inputs = family.model.model, family.inputs
    answer = model.generate(
        **inputs, do_sample=False, max_new_tokens=3, suppress_tokens=MARKERS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    new = answer.sequences[:, inputs["input_ids"].shape[1] : -1]
    again = model(**longer(inputs, new), use_cache=False).logits[0, -3:]
    return float((again - torch.cat(answer.logits)).abs().max())


def layer_of(model: Any) -> str:
    try:
        return type(find_decoder(model.model).layers[0]).__name__
    except UserError:
        return ""


def brief(error: Exception) -> str:
    """One line, without what differs from machine to machine."""
    text = " ".join(str(error).split())
    text = text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"
    return re.sub(r" \(max difference [^)]*\)", "", text)[:240]


def page(found: dict[str, dict[str, str]]) -> str:
    """The page of the documentation."""
    count = {result: sum(one["result"] == result for one in found.values()) for result in RESULTS}
    lines = [
        "# Families",
        "",
        "Every image-text-to-text family of transformers "
        f"{transformers.__version__} as a tiny random model, its decoder tried under the patch with sdpa and eager",
        "attention: dense bit-equal to the unpatched model, a method that asks for every attention matrix and changes",
        "none within 1e-5, and cached decoding of 16 tokens equal to recomputation within 2e-5 with drops at layers 0,",
        "1 and 2, and at all three. The prompt has an image in its middle where the rules find what the family's",
        "tower takes; else it is text, of which a part is called visual: the decoder is what the patch touches. What a",
        "refused one says is what a user reads; a family that cannot be built here, from a config shrunk by rule, is",
        "checked at its first prefill, as all are. `make scan` makes this page.",
        "",
        f"{count[EXACT]} exact, {count[PARTLY]} exact in part, {count[REFUSED]} refused, {count[UNBUILT]} not built, "
        f"{count[WRONG]} wrong.",
        "",
        "| Family | Decoder layer | Prompt | Result | Why |",
        "|---|---|---|---|---|",
    ]
    for name, one in sorted(found.items(), key=lambda item: (RESULTS.index(item[1]["result"]), item[0])):
        why = one["why"].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {one['layer']} | {one['prompt']} | {one['result']} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    start = time.time()
    status = main(sys.argv[1:])
    print(f"{time.time() - start:.0f} s")
    sys.exit(status)
