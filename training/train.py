"""Train the tiny VLM: ``python -m training.train --out RUN [--resume]``, a bit more than an hour on one CPU core.

Answers alone teach a model this small too slowly, so throw-away linear heads add dense labels: what each visual token
shows (at the projector and at a lower decoder layer) and where it lies, the answer's word at the question mark, which
option is right at the options; and the question mark's attention in the lower layers is drawn to the tokens that show
the answer. The place of each token matters most: without it, finding the object a question is about takes twice the
steps. At first the tower is trained alone and the decoder on questions whose answer is told in words. Random visual
tokens are dropped, background first, as a regulariser that also makes steps cheaper. None of the methods of this
library takes part.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from focuslib.tasks.tinyvideo.questions import LETTERS
from focuslib.tasks.tinyvideo.scenes import FRAMES, SIZE, TRAINED
from training.data import IGNORE, LABELS, LOOKS, TYPES, WORDS, Batch, Batches, Texts
from training.model import build_model, fuse, pixels
from training.muon import Muon
from training.packed import ATTENTION, Watch, packed_forward
from training.tokenizer import build_tokenizer

SEE, ASK, CHOOSE = 2, 4, 5  # the decoder layers (from 0) after which the heads read tokens, question marks and options
LOOK = (1, 2, 3, 4)  # the layers in which question marks should attend to the evidence
SHORT = {"attributes": 0.4, "move": 0.3, "order": 0.3}
LONG = {"needle": 1.0}
PICTURE = {"attributes": 1.0}
# The shares of visual tokens that token dropout leaves, for short clips (and pictures) and for long ones, in the first
# steps and later.
KEPT_EARLY = (0.35, 0.35, 0.35, 0.5, 0.5, 1.0), (0.15, 0.15, 0.2, 0.2, 0.3, 1.0)
KEPT_LATER = (0.35, 0.5, 0.7, 1.0, 1.0), (0.15, 0.2, 0.3, 0.5, 1.0)
LEVELS_EARLY = (1, 1, 2, 2, 3)  # the difficulties of the first steps; later all alike


class Heads(nn.ModuleDict):
    """The auxiliary linear heads, thrown away after training."""

    def __init__(self, hidden: int):
        sizes = {
            **{f"tower_{name}": size for name, size in LOOKS.items()},
            **LABELS,
            "word": len(WORDS),
            "right": 1,
            "label": len(LETTERS),
        }
        super().__init__({name: nn.Linear(hidden, size) for name, size in sizes.items()})


def visual_features(model, frames: torch.Tensor) -> torch.Tensor:
    """Frames uint8 [B, F, 96, 96, 3] of clips, or of pictures if F is 1 → what the decoder reads, [B, S + 1, D]."""
    if frames.shape[1] > 1:
        return model.model.get_video_features(pixels(frames)).pooler_output
    views = pixels(frames).expand(-1, 2, -1, -1, -1)  # the whole picture, and the tile that it fills
    sizes = torch.tensor([[SIZE, SIZE]]).expand(len(frames), -1)
    return torch.stack(tuple(model.model.get_image_features(views, sizes).pooler_output))


def losses(model, heads: Heads, batch: Batch, tower_only: bool = False) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The loss terms of a batch, and which questions were answered rightly (bool [B, N])."""
    B, K = batch.keep.shape
    rows = torch.arange(B, device=batch.keep.device)[:, None]
    features = visual_features(model, batch.frames)
    terms = told(heads, "tower_", features[:, :-1], batch.looks)
    if tower_only:
        return terms, torch.zeros_like(batch.right, dtype=torch.bool)

    embed = model.get_input_embeddings()
    H, S = len(batch.header), features.shape[1] - 1
    prefix = torch.cat((embed(batch.header).expand(B, -1, -1), features[rows, batch.keep], features[:, -1:]), 1)
    head_at = torch.arange(H, device=rows.device).expand(B, -1)
    positions = torch.cat((head_at, H + batch.keep, torch.full_like(rows, H + S)), 1)
    columns = F.pad(batch.evidence, (H, 1))
    watch = Watch(LOOK, batch.ask, columns)
    states = packed_forward(model.model.language_model, prefix, positions, embed(batch.ids), watch)
    visible = columns.any(-1)  # token dropout may have taken all of a question's evidence
    terms["look"] = -torch.stack(watch.shares)[:, visible].clamp_min(1e-6).log().mean()
    seen = states[SEE][:, H : H + K]
    terms |= told(heads, "", seen, batch.labels)
    read, logits = reading(model, heads, states, prefix.shape[1], vars(batch))
    return terms | read, logits.argmax(-1) == batch.letter


def told(heads: Heads, prefix: str, states: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loss terms of what visual tokens' states [B, K, D] tell, a head of that name (after ``prefix``) for each."""
    return {
        prefix + name: F.cross_entropy(heads[prefix + name](states).flatten(0, 1), of.flatten(), ignore_index=IGNORE)
        for name, of in labels.items()
        if (of != IGNORE).any()
    }


def reading(
    model, heads: Heads, states: list[torch.Tensor], start: int, rows: dict
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The loss terms of the questions, which follow ``start`` prefix tokens, and the letters' logits [B, N, V]."""

    def at(layer: int, where: torch.Tensor) -> torch.Tensor:
        slots = states[layer][:, start:].unflatten(1, rows["ids"].shape[1:])
        return slots.gather(2, where[..., None].expand(-1, -1, -1, slots.shape[-1]))

    word = heads["word"](at(ASK, rows["ask"][..., None]))
    options = at(CHOOSE, rows["option_at"])
    labels = torch.arange(len(LETTERS), device=options.device).expand(options.shape[:3])
    letter, end = model.lm_head(at(-1, torch.stack((rows["answer"], rows["answer"] + 1), -1))).unbind(2)
    stop = torch.full_like(rows["letter"], model.config.text_config.eos_token_id)
    return {
        "word": F.cross_entropy(word.flatten(0, 2), rows["word"].flatten()),
        "right": F.cross_entropy(heads["right"](options).flatten(2).flatten(0, 1), rows["right"].flatten()),
        "label": F.cross_entropy(heads["label"](options).flatten(0, 2), labels.flatten()),
        "letter": F.cross_entropy(letter.flatten(0, 1), rows["letter"].flatten()),
        "end": 0.1 * F.cross_entropy(end.flatten(0, 1), stop.flatten()),
    }, letter


def text_losses(model, heads: Heads, header: torch.Tensor, rows: dict) -> dict[str, torch.Tensor]:
    """The loss terms of questions without a clip.

    Only the question mark sees the words that tell its answer, and only in the layers in which it should see it in a
    clip, so that what is learnt here, how to find the option from there, holds for clips.
    """
    H, T = len(header), rows["ids"].shape[2]
    place = torch.arange(T, device=header.device)
    told = (place < rows["hint"][..., None])[:, :, None, :]
    telling = told.mT
    asking = (place == rows["ask"][..., None])[..., None]
    everyone, others = F.pad(told & ~telling, (H, 0)), F.pad(told & ~telling & ~asking, (H, 0))
    barred = [others if layer in LOOK else everyone for layer in range(len(model.model.language_model.layers))]
    embed = model.get_input_embeddings()
    positions = torch.arange(H, device=header.device)[None]
    states = packed_forward(
        model.model.language_model, embed(header)[None], positions, embed(rows["ids"]), barred=barred
    )
    return {f"told_{name}": loss for name, loss in reading(model, heads, states, H, rows)[0].items()}


@torch.no_grad()
def accuracy(model, heads: Heads, stream: Batches, batches: int, device) -> dict[str, float]:
    """Letter accuracy by question type over fresh clips, all visual tokens kept."""
    right, asked = torch.zeros(len(TYPES)), torch.zeros(len(TYPES))
    for number in range(batches):
        batch = stream.batch(number).to(device)
        hit = losses(model, heads, batch)[1]
        asked.index_add_(0, batch.kind.flatten().cpu(), torch.ones(hit.numel()))
        right.index_add_(0, batch.kind.flatten().cpu(), hit.flatten().float().cpu())
    return {name: round(float(r / n), 3) for name, r, n in zip(TYPES, right, asked, strict=True) if n}


def build_optimizers(model, heads: Heads) -> list[torch.optim.Optimizer]:
    """Muon for the linear layers of tower, projector and decoder; AdamW for embeddings, heads, biases and norms."""
    matrices = [m.weight for m in model.model.modules() if isinstance(m, nn.Linear)]
    ids = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *heads.parameters()) if id(p) not in ids]
    return [
        Muon(matrices, weight_decay=0.02),
        torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then cosine to a fiftieth."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.49 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def export(model, tokenizer, folder: Path) -> None:
    """Write the checkpoint that ``from_pretrained`` loads: configuration, float32 safetensors, tokenizer."""
    attention, model.config.text_config._attn_implementation = model.config.text_config._attn_implementation, "sdpa"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model.config.text_config._attn_implementation = attention


def train(args: argparse.Namespace) -> None:
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, args.seed).to(device)
    model.model.language_model.config._attn_implementation = ATTENTION
    fuse(model)
    heads = Heads(model.config.text_config.hidden_size).to(device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizers = build_optimizers(model, heads)
    step, spent, state_file = 0, 0.0, args.out / "state.pt"
    if args.resume and state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"]), heads.load_state_dict(state["heads"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["seconds"]

    def stream(kinds: dict[str, float], clips: int, shares=(1.0,), **kw) -> Batches:
        return Batches(tokenizer, kinds, clips, args.asked, shares, seed=args.seed, **kw)

    def load(dataset):
        return iter(DataLoader(dataset, batch_size=None, num_workers=1, prefetch_factor=4))

    def parts(step: int):
        """The losses of one step, a part at a time, each with the accuracy by question type where there is one."""
        if step < args.told_steps:  # after the warm-up fewer, which keep the reading alive until clips are understood
            asked = args.texts if step < args.warm_steps else args.texts // 3
            told = {name: rows[:, :asked].to(device) for name, rows in next(texts).items()}
            yield text_losses(model, heads, header, told), {}
        if step < args.warm_steps:
            for loader in (short, pictures):
                yield losses(model, heads, next(loader).to(device), tower_only=True)[0], {}
            return
        for loader in (short, pictures, long):
            batch = next(loader).to(device)
            terms, hit = losses(model, heads, batch)
            what = "picture_" if loader is pictures else ""
            yield terms, {what + TYPES[k]: hit[batch.kind == k].float().mean() for k in batch.kind.unique()}

    texts = load(Texts(tokenizer, args.texts, start=step))
    tests = {kind: stream({kind: 1.0}, 64 // FRAMES[kind] + 2, split="tune") for kind in FRAMES}
    tests["picture"] = stream(PICTURE, 10, split="tune", picture=True)
    header = tests["picture"].header.to(device)
    began, running = time.monotonic() - spent, {}
    short = pictures = long = None
    while step < args.steps:
        if short is None or step == args.told_steps:
            early = step < args.told_steps
            kept, levels = (KEPT_EARLY, LEVELS_EARLY) if early else (KEPT_LATER, TRAINED)
            short = load(stream(SHORT, args.short, kept[0], levels=levels, start=step))
            pictures = load(stream(PICTURE, args.pictures, kept[0], levels=levels, start=step, picture=True))
            long = load(stream(LONG, args.long, kept[1], levels=levels, start=max(0, step - args.warm_steps)))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, args.steps, args.lr)
        for terms, right in parts(step):
            sum(terms.values()).backward()
            for name, value in (terms | right).items():
                running[name] = 0.95 * running.get(name, value.item()) + 0.05 * value.item()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        if step % args.log == 0:
            line = {
                "step": step,
                "seconds": round(time.monotonic() - began),
                **{k: round(v, 3) for k, v in running.items()},
            }
            print(json.dumps(line), flush=True)
        if step % args.check == 0 or step == args.steps:
            state = {
                "model": model.state_dict(),
                "heads": heads.state_dict(),
                "optimizers": [o.state_dict() for o in optimizers],
            }
            torch.save({**state, "step": step, "seconds": time.monotonic() - began}, args.out / "state.tmp")
            os.replace(args.out / "state.tmp", state_file)
            export(model, tokenizer, args.out / "checkpoint")
            batches = 20 if step == args.steps else 3
            checks = {name: accuracy(model, heads, test, batches, device) for name, test in tests.items()}
            print(json.dumps({"step": step, "check": checks}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the run's state and checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's last state")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--warm-steps", type=int, default=160, help="first steps, that train tower and decoder apart")
    parser.add_argument(
        "--told-steps", type=int, default=1000, help="first steps, that also ask questions without a clip"
    )
    parser.add_argument("--texts", type=int, default=48, help="questions without a clip a warm step")
    parser.add_argument("--short", type=int, default=6, help="8-frame clips a step")
    parser.add_argument("--pictures", type=int, default=3, help="pictures a step")
    parser.add_argument("--long", type=int, default=2, help="32-frame clips a step")
    parser.add_argument("--asked", type=int, default=5, help="questions a clip")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--log", type=int, default=25)
    parser.add_argument("--check", type=int, default=250)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    train(parser.parse_args())


if __name__ == "__main__":
    main()
