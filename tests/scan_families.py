"""Build every image-text-to-text family of the installed transformers as a tiny random model; try it under the patch.

python tests/scan_families.py [family …] (make scan); the table goes to docs/models/families.md when all are scanned.
Each family is built in a process of its own with a limit of its memory: its config is shrunk by the names of its
numbers, and where a name is missed, a default tower would take all there is. Exit status 1 if one is wrong.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_families import IMAGE, MARKERS, Asks, decoding_error, prompt, vlm
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as FAMILIES

from focuslib.errors import UserError
from focuslib.methods import Dense
from focuslib.prefill.decoder import find_decoder

PAGE = Path(__file__).parents[1] / "docs" / "models" / "families.md"
MEMORY, SECONDS = 4 << 30, 240  # of a family, beyond what the interpreter takes
DROPS = [((0,), (0.6,)), ((1,), (0.5,)), ((2,), (0.4,)), ((0, 1, 2), (0.6, 0.4, 0.2))]
EXACT, PARTLY, REFUSED, UNBUILT, WRONG = "exact", "exact, in part", "refused", "cannot be built", "WRONG"
RESULTS = [EXACT, PARTLY, REFUSED, UNBUILT, WRONG]
# number by the end of its name; the first that fits
SIZES = {
    r"num_key_value_heads|num_kv_heads|n_kv_heads|num_query_groups": 2,
    r"heads|n_head|num_attention_heads": 4,
    r"experts_per_tok(en)?|top_?k|moe_k": 2,
    r"num_(local_|routed_)?experts|n_routed_experts": 4,
    r"n_group|topk_group|first_k_dense_replace": 1,
    r"(layers|depth|n_layer|num_blocks)": 3,
    r"head_dim": 8,
    r"(intermediate_size|ffn_dim|mlp_dim|ffn_hidden_size|d_ff|dim_feedforward)": 48,
    r"vocab_size(_per_layer_input)?": 96,
    r"(hidden_size|d_model|embed_dim|hidden_dim|_width|(?<!head)_dim|projection_size|lora_rank)": 32,
}
LAYER_LISTS = r"(deepstack|fullatt|layer).*(ind|ids|layers)|feature_layers?$"
KEPT = ("image", "patch", "max_position", "window", "num_channels", "in_channels", "chunk", "position_embedding")


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
        signal.alarm(SECONDS)
        os.write(writing, json.dumps(scan(name)).encode()[:60000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if text:
        return json.loads(text)
    return {"result": UNBUILT, "layer": "", "why": f"its process ended with {status}: too slow or too large"}


def scan(name: str) -> dict[str, str]:
    """Build a family and try it. → result, layer (the class), why (a line)."""
    try:
        plain = {attention: tried(name, attention) for attention in ("sdpa", "eager")}
    except Exception as error:  # whatever a family may raise
        return {"result": UNBUILT, "layer": "", "why": brief(error)}
    built = {attention: model for attention, model in plain.items() if not isinstance(model, Exception)}
    if not built:
        return {"result": UNBUILT, "layer": "", "why": brief(plain["sdpa"])}
    results = [check(model) for model in built.values()]
    worst = max(results, key=lambda one: RESULTS.index(one[0]))
    return {"result": worst[0], "layer": layer_of(next(iter(built.values()))), "why": worst[1]}


def tried(name: str, attention: str) -> Any:
    """A model that runs a prompt of text; else what hinders it."""
    why: Exception | None = None
    for sections in (None, [2, 1, 1], [1, 1, 0]):  # parts of a rotary embedding that default to a large head
        try:
            torch.manual_seed(0)
            config = shrunk(CONFIG_MAPPING[name](), sections)
            if name.endswith("omni_thinker"):  # which its own generate reads
                config.vision_start_token_id = MARKERS[-1]
            model = vlm(AutoModelForImageTextToText.from_config(config, attn_implementation=attention))
            with torch.inference_mode():
                run(model)
        except Exception as error:  # whatever a family may raise
            why = why or error
        else:
            return model
    return why


def shrunk(config: Any, sections: list[int] | None) -> Any:
    """A config whose numbers are small, part by part."""
    values = shrink(config.to_dict(), iter(range(IMAGE, IMAGE + 6)))
    text = values.get("text_config", values)
    if sections and isinstance(text, dict) and isinstance(text.get("rope_parameters"), dict):
        text["rope_parameters"]["mrope_section"] = sections
    return type(config).from_dict(values)


def shrink(values: dict[str, Any], markers: Iterator[int]) -> dict[str, Any]:
    small, layers = {}, next((values[key] for key in ("num_hidden_layers", "depth") if key in values), None)
    for key, value in values.items():
        if key == "per_layer_config" and isinstance(value, dict):
            small[key] = {layer: own for layer, own in value.items() if int(layer) < 3}
        elif isinstance(value, dict) and all(isinstance(name, str) for name in value):
            small[key] = shrink(value, markers)
        elif key in ("mrope_section", "xdrope_section") and isinstance(value, list):
            small[key] = [2, 1, 1] if len(value) == 3 else [1] * len(value)
        elif isinstance(value, list) and len(value) == layers:
            small[key] = [value[0], value[-1], value[-1]]
        elif isinstance(value, list) and re.search(LAYER_LISTS, key):
            small[key] = list(range(min(len(value), 3)))
        elif re.search(r"token_(id|index)s?$", key) and type(value) is int and value > 2:
            small[key] = next(markers, IMAGE)
        else:
            small[key] = smaller(key, value)
    return small


def smaller(key: str, value: Any) -> Any:
    if type(value) is not int or any(word in key for word in KEPT):
        return value
    return next((min(size, value) for name, size in SIZES.items() if value > 0 and re.search(f"{name}$", key)), value)


def run(model: Any) -> torch.Tensor:
    return model.model(**prompt(), use_cache=False).logits


@torch.inference_mode()
def check(model: Any) -> tuple[str, str]:
    """What a model does under the patch: result and why."""
    plain, notes = run(model), []
    try:
        with Dense()(model):
            same = torch.equal(run(model), plain)
    except UserError as error:
        return REFUSED, brief(error)
    except Exception as error:
        return WRONG, f"dense fails: {brief(error)}"
    if not same:
        return WRONG, "dense differs"
    try:
        own = stock_error(model)
    except Exception as error:
        own = float("inf")
        notes.append(f"drops are not checked, as the unpatched model does not decode a text: {brief(error)}")
    else:
        if own > 2e-5:
            notes.append("drops are not checked: the unpatched model's cached decoding is not its recomputation")
    for what, error_of, allowed in (
        ("attention rows", lambda: asked_error(model, plain), 1e-5),
        *((f"drops in layers {layers}", lambda layers=layers, shares=shares: decoding_error(
            model, prompt(), layers, shares), 2e-5) for layers, shares in (DROPS if own <= 2e-5 else [])),
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


def asked_error(model: Any, plain: torch.Tensor) -> float:
    with Asks()(model):
        return float((run(model) - plain).abs().max())


def stock_error(model: Any) -> float:
    """How far the unpatched model's cached decoding is from its own recomputation: a prompt may attend both ways."""
    inputs = prompt()
    answer = model.model.generate(
        **inputs, do_sample=False, max_new_tokens=3, suppress_tokens=MARKERS, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    again = model.model(input_ids=answer.sequences[:, :-1], use_cache=False).logits[0, -3:]
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
        "1 and 2, and at all three. The prompts are text: the decoder is what the patch touches. What a refused one",
        "says is what a user reads; a family that cannot be built here, from a config shrunk by rule, is checked at",
        "its first prefill, as all are. `make scan` makes this page.",
        "",
        f"{count[EXACT]} exact, {count[PARTLY]} exact in part, {count[REFUSED]} refused, {count[UNBUILT]} not built, "
        f"{count[WRONG]} wrong.",
        "",
        "| Family | Decoder layer | Result | Why |",
        "|---|---|---|---|",
    ]
    for name, one in sorted(found.items(), key=lambda item: (RESULTS.index(item[1]["result"]), item[0])):
        why = one["why"].replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{name}` | {one['layer']} | {one['result']} | {why} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    start = time.time()
    status = main(sys.argv[1:])
    print(f"{time.time() - start:.0f} s")
    sys.exit(status)
