"""Trains the miniature on a CPU; one command gives the checkpoint, the same each time on the same machine."""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.miniature.model import WIDTH, answer_logits, make_model, make_tokenizer, save, vision_states
from benchmarks.miniature.pictures import CALIBRATION, COLOURS, KINDS, PLACES, SHAPES, SIDE, Picture, draw

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
# What a patch can show: a shape of a colour, the first or the second digit of a number, or the ground.
NUM_THINGS = len(SHAPES) * len(COLOURS) + 20
GROUND = NUM_THINGS
NO_TARGET = -100
# `Is the diamond left of the triangle ? ASSISTANT : yes </s>`
MAX_LENGTH = 12


@dataclass(frozen=True)
class TrainingSettings:
    """How the miniature is trained.

    Args:
        num_steps: in all.
        num_patch_steps: the first of them, in which the tower alone learns what each patch shows. Without
            them the answers stay at their most frequent values for long.
        batch: pictures in a step, each with all its questions.
        learning_rate: the highest; a warm-up leads to it, a cosine to zero.
        warm_up: steps, for the tower from the first step on, for the language model from its own first.
        patch_weight: of the losses on patches and on the class token once questions are learnt too.
        seed: of the first weights and of the dropped tokens.
    """

    num_steps: int = 4000
    num_patch_steps: int = 300
    batch: int = 64
    learning_rate: float = 1.5e-3
    warm_up: int = 200
    weight_decay: float = 0.02
    patch_weight: float = 0.3
    seed: int = 0


class Heads(nn.Module):
    """What the tower is asked about patches and the whole while it trains; no part of the checkpoint.

    A patch tells what it shows and where that thing's centre is; the class token tells what is there at all,
    so that its attention means something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.thing = nn.Linear(WIDTH, NUM_THINGS + 1)
        self.place = nn.Linear(WIDTH, len(PLACES))
        self.centre = nn.Linear(WIDTH, 2)
        self.presence = nn.Linear(WIDTH, NUM_THINGS)

    def forward(self, states: torch.Tensor, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The losses, by name; `states` is [pictures, 1 + patches, WIDTH]."""
        states = self.norm(states)
        things, patches = batch["things"], states[:, 1:]
        is_foreground = things != GROUND
        shown = patches[is_foreground]
        return {
            "thing": functional.cross_entropy(self.thing(patches).flatten(0, 1), things.flatten()),
            "place": functional.cross_entropy(self.place(shown), batch["places"][is_foreground]),
            "centre": functional.mse_loss(self.centre(shown), batch["centres"][is_foreground]),
            "presence": functional.binary_cross_entropy_with_logits(self.presence(states[:, 0]), batch["presence"]),
        }


class Batches(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batches of training pictures by step, each a pure function of its number."""

    def __init__(self, seeds: range, size: int, first: int = 0) -> None:
        self.seeds, self.size, self.first = seeds, size, first
        self.tokenizer = make_tokenizer()

    def __len__(self) -> int:
        return len(self.seeds) // self.size - self.first

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index >= len(self):
            raise IndexError(index)
        start = (self.first + index) * self.size
        pictures = [draw(seed) for seed in self.seeds[start : start + self.size]]
        targets = [patch_targets(picture) for picture in pictures]
        batch = {name: torch.from_numpy(np.stack([target[name] for target in targets])) for name in targets[0]}
        batch["pixels"] = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in pictures]))
        batch["ids"], batch["targets"] = self._tokens(pictures)
        return batch

    def _tokens(self, pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
        ids = np.full((len(pictures), len(KINDS), MAX_LENGTH), self.tokenizer.eos_token_id)
        targets = np.full(ids.shape, NO_TARGET)
        encode = self.tokenizer.backend_tokenizer.encode
        for row, picture in enumerate(pictures):
            for column, question in enumerate(picture.questions):
                prompt = encode(f"{question.text} ASSISTANT:", add_special_tokens=False).ids
                answer = [*encode(question.answer, add_special_tokens=False).ids, self.tokenizer.eos_token_id]
                end = len(prompt) + len(answer)
                ids[row, column, :end] = prompt + answer
                targets[row, column, len(prompt) : end] = answer
        return torch.from_numpy(ids[..., :-1].copy()), torch.from_numpy(targets[..., 1:].copy())


def patch_targets(picture: Picture) -> dict[str, Any]:
    """What a picture's patches are to tell: things, places and centres [144, ...], and what is present."""
    tens, ones = divmod(picture.number, 10)
    num_pairs = len(SHAPES) * len(COLOURS)
    things = [SHAPES.index(shape.shape) * len(COLOURS) + list(COLOURS).index(shape.colour) for shape in picture.shapes]
    things += [num_pairs + tens, num_pairs + 10 + ones]
    top, left = picture.number_at
    centres = [(shape.row, shape.column) for shape in picture.shapes] + [(top + 7, left + 5), (top + 7, left + 17)]
    places = [int(row * 3 / SIDE) * 3 + int(column * 3 / SIDE) for row, column in centres]
    presence = np.zeros(NUM_THINGS, np.float32)
    presence[things] = 1
    # An owner of -1, the ground, takes the last entry.
    return {
        "things": np.array([*things, GROUND])[picture.owners],
        "places": np.array([*places, 0])[picture.owners],
        "centres": (np.array([*centres, (0, 0)], np.float32) / SIDE * 2 - 1)[picture.owners],
        "presence": presence,
    }


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [pictures, SIDE, SIDE, 3] as the image processor of the checkpoint gives them."""
    scaled = (pixels.float() / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)
    return scaled.permute(0, 3, 1, 2).contiguous()


def drop_patches(patches: torch.Tensor, is_foreground: torch.Tensor, step: int, seed: int) -> torch.Tensor:
    """In every other step, keep only some of the patches: at random, or rather those that show something.

    A language model that never saw fewer tokens counts shapes by the share of their tokens, which no rule
    that keeps the right ones survives.
    """
    if step % 2 == 0:
        return patches
    random = torch.Generator().manual_seed(seed * 1_000_003 + step)
    num_patches = patches.shape[1]
    low, high = math.log(14), math.log(num_patches)
    num_kept = round(math.exp(low + (high - low) * torch.rand((), generator=random).item()))
    score = torch.rand(patches.shape[:2], generator=random)
    if step % 4 == 1:
        score = score + 0.6 * is_foreground
    kept = score.topk(num_kept, dim=1).indices.sort(dim=1).values
    return patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))


def answer_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens."""
    return functional.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=NO_TARGET)


def check(model: Any, opening: torch.Tensor, batch: dict[str, torch.Tensor]) -> str:
    """Shares of right answers by kind, on pictures that are not trained on."""
    with torch.no_grad():
        states = vision_states(model, normalise(batch["pixels"]))
        logits = answer_logits(model, states[:, 1:], opening, batch["ids"])
    is_right = ((logits.argmax(-1) == batch["targets"]) | (batch["targets"] == NO_TARGET)).all(-1).float()
    shares = [f"{kind} {100 * share:.1f}" for kind, share in zip(KINDS, is_right.mean(0).tolist(), strict=True)]
    return f"  all {100 * is_right.mean():.1f} | " + " ".join(shares)


def learning_rates(settings: TrainingSettings, step: int) -> tuple[float, float]:
    """Of the tower and of the language model."""
    cosine = 0.5 * (1 + math.cos(math.pi * step / settings.num_steps))
    tower = settings.learning_rate * cosine * min(1.0, (step + 1) / settings.warm_up)
    language = settings.learning_rate * cosine * min(1.0, (step + 1 - settings.num_patch_steps) / settings.warm_up)
    return tower, max(language, 0.0)


def train(settings: TrainingSettings, output: Path) -> Any:
    """Train, or go on where an interrupted run stopped, and return the model.

    Args:
        settings: of the training.
        output: folder for the state, `state.pt`, from which a run goes on.
    """
    torch.manual_seed(settings.seed)
    model, heads, tokenizer = make_model(settings.seed), Heads(), make_tokenizer()
    opening = torch.tensor(tokenizer("USER:")["input_ids"])
    vision = [*model.model.vision_tower.parameters(), *heads.parameters()]
    language = [
        *model.model.multi_modal_projector.parameters(),
        *model.model.language_model.parameters(),
        *model.lm_head.parameters(),
    ]
    optimiser = torch.optim.AdamW(
        [{"params": vision}, {"params": language}], betas=(0.9, 0.98), weight_decay=settings.weight_decay
    )
    output.mkdir(parents=True, exist_ok=True)
    state_file, first = output / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file)
        first = state["step"]
        for part, name in ((model, "model"), (heads, "heads"), (optimiser, "optimiser")):
            part.load_state_dict(state[name])
        print(f"goes on at step {first}", flush=True)
    held_out = Batches(CALIBRATION, 250)[0]
    seeds = range(settings.num_steps * settings.batch)
    batches = torch.utils.data.DataLoader(
        Batches(seeds, settings.batch, first), batch_size=None, num_workers=1, prefetch_factor=8
    )
    sums: dict[str, float] = {}
    started = time.perf_counter()
    for step, batch in enumerate(batches, start=first):
        for group, rate in zip(optimiser.param_groups, learning_rates(settings, step), strict=True):
            group["lr"] = rate
        states = vision_states(model, normalise(batch["pixels"]))
        losses = heads(states, batch)
        loss = sum(losses.values(), torch.zeros(()))
        if step >= settings.num_patch_steps:
            patches = drop_patches(states[:, 1:], batch["things"] != GROUND, step, settings.seed)
            losses["answer"] = answer_loss(answer_logits(model, patches, opening, batch["ids"]), batch["targets"])
            loss = settings.patch_weight * loss + losses["answer"]
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([*vision, *language], 1.0)
        optimiser.step()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        done = step + 1
        if done % 50 == 0:
            means = " ".join(f"{name} {value / 50:.3f}" for name, value in sums.items())
            speed = (done - first) * settings.batch / (time.perf_counter() - started)
            print(f"{time.strftime('%H:%M:%S')} step {done}: {means} | {speed:.0f} pictures/s", flush=True)
            sums = {}
        if done % 500 == 0 or done == settings.num_steps:
            if done > settings.num_patch_steps:
                print(check(model, opening, held_out), flush=True)
            state = {"step": done, "model": model.state_dict(), "heads": heads.state_dict()}
            torch.save(state | {"optimiser": optimiser.state_dict()}, state_file.with_suffix(".new"))
            state_file.with_suffix(".new").rename(state_file)
    return model


def main() -> None:
    """Train from the command line."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("miniature"), help="state and checkpoint")
    parser.add_argument("--steps", type=int, default=defaults.num_steps)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = train(TrainingSettings(num_steps=options.steps), options.output)
    save(model, options.output / "checkpoint")
    print(f"wrote {options.output / 'checkpoint'}")


if __name__ == "__main__":
    main()
