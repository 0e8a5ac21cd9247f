"""Trains the miniature on a CPU; one command gives the checkpoint, the same each time on the same machine."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import distributed, nn
from torch.nn import functional

from benchmarks.miniature.model import WIDTH, answer_logits, make_model, make_tokenizer, normalise, save, vision_states
from benchmarks.miniature.pictures import CALIBRATION, COLOURS, KINDS, PLACES, SHAPES, SIDE, TRAINING, Picture, draw
from benchmarks.miniature.scores import write_scores

# What a patch can show: a shape of a colour, the first or the second digit of a number, or the ground.
NUM_THINGS = len(SHAPES) * len(COLOURS) + 20
GROUND = NUM_THINGS
NO_TARGET = -100
# `Is the diamond left of the triangle ? ASSISTANT : yes </s>`
MAX_LENGTH = 12
# Fewest patches that the language model learns from.
MIN_KEPT = 14
WEIGHTS_NAME = "weights.pt"
LOG_STEPS, CHECK_STEPS = 100, 250


@dataclass(frozen=True)
class TrainingSettings:
    """How the miniature is trained: first the tower, then the projector and the language model after it.

    Args:
        num_tower_steps: the first steps, in which the tower learns what each patch shows.
        num_language_steps: the others, in which the tower stays as it is, as LLaVA's does, and the rest learns to
            answer. A tower that learnt from answers after few patches would write what it sees into all of them,
            and no choice of patches would be worse than another.
        batch: pictures in a step, each with all its questions.
        learning_rate: in both parts constant between a warm-up and a straight way down to zero.
        decay: the last share of the steps of a part, in which it goes down.
        warm_up: the first steps of a part.
        evenness_weight: of the loss that keeps the ground's patches alike, beside the others of the tower.
        drops_patches: whether the language model learns from fewer patches in every other step.
        num_processes: each of one thread, with its share of the batch.
        seed: of the first weights and of the dropped tokens.
    """

    num_tower_steps: int = 1600
    num_language_steps: int = 4000
    batch: int = 32
    learning_rate: float = 1.5e-3
    decay: float = 0.25
    warm_up: int = 100
    weight_decay: float = 0.02
    evenness_weight: float = 5.0
    drops_patches: bool = True
    num_processes: int = 2
    seed: int = 0

    @property
    def num_steps(self) -> int:
        """In all."""
        return self.num_tower_steps + self.num_language_steps


class Heads(nn.Module):
    """What the tower is asked about patches and the whole while it trains; no part of the checkpoint.

    A patch tells what it shows and where that thing's centre is; the class token tells what is there at all,
    so that its attention means something. Patches of the ground are to be all alike: one that tells of the things
    around it would answer in their place.
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
        things = batch["things"]
        is_foreground = things != GROUND
        shown, ground = (self.norm(states[:, 1:][mask]) for mask in (is_foreground, ~is_foreground))
        return {
            "thing": functional.cross_entropy(self.thing(shown), things[is_foreground]),
            "ground": functional.cross_entropy(self.thing(ground), things[~is_foreground]),
            "place": functional.cross_entropy(self.place(shown), batch["places"][is_foreground]),
            "centre": functional.mse_loss(self.centre(shown), batch["centres"][is_foreground]),
            "presence": functional.binary_cross_entropy_with_logits(
                self.presence(self.norm(states[:, 0])), batch["presence"]
            ),
            "unevenness": unevenness(states[:, 1:], is_foreground),
        }


def unevenness(patches: torch.Tensor, is_foreground: torch.Tensor) -> torch.Tensor:
    """How far the ground's patches lie from their mean, as a share of how far those that show something do."""
    ground = patches[~is_foreground]
    mean = ground.mean(dim=0)
    return (ground - mean).square().mean() / (patches[is_foreground] - mean).square().mean().detach()


def make_batch(tokenizer: Any, seeds: range) -> dict[str, torch.Tensor]:
    """The pictures of some seeds with all that is learnt from them."""
    pictures = [draw(seed) for seed in seeds]
    targets = [patch_targets(picture) for picture in pictures]
    batch = {name: torch.from_numpy(np.stack([target[name] for target in targets])) for name in targets[0]}
    batch["pixels"] = torch.from_numpy(np.stack([np.asarray(picture.image) for picture in pictures]))
    batch["ids"], batch["targets"] = tokenise(tokenizer, pictures)
    return batch


def tokenise(tokenizer: Any, pictures: list[Picture]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens after the picture, and the one that follows each: [pictures, questions, MAX_LENGTH - 1] twice."""
    ids = np.full((len(pictures), len(KINDS), MAX_LENGTH), tokenizer.eos_token_id)
    targets = np.full(ids.shape, NO_TARGET)
    encode = tokenizer.backend_tokenizer.encode
    for row, picture in enumerate(pictures):
        for column, question in enumerate(picture.questions):
            prompt = encode(f"{question.text} ASSISTANT:", add_special_tokens=False).ids
            answer = [*encode(question.answer, add_special_tokens=False).ids, tokenizer.eos_token_id]
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
        "owners": picture.owners,
        "things": np.array([*things, GROUND])[picture.owners],
        "places": np.array([*places, 0])[picture.owners],
        "centres": (np.array([*centres, (0, 0)], np.float32) / SIDE * 2 - 1)[picture.owners],
        "presence": presence,
    }


def drop_patches(patches: torch.Tensor, owners: torch.Tensor, seed: tuple[int, int], rank: int) -> torch.Tensor:
    """Keep some of the patches: at random, or rather those that show something.

    A language model that never saw fewer tokens counts shapes by the share of their tokens, which no rule
    that keeps the right ones survives. Each thing keeps a patch at least: from pictures that lack what they are
    asked about, only guessing can be learnt.

    Args:
        patches: [pictures, patches, WIDTH].
        owners: [pictures, patches], as in Picture.
        seed: of the training, and the step: all processes drop as many.
        rank: of the process: each drops others.
    """
    step = seed[1]
    num_patches = patches.shape[1]
    num_kept = round(float(np.exp(np.random.default_rng(seed).uniform(np.log(MIN_KEPT), np.log(num_patches)))))
    scores = torch.from_numpy(np.random.default_rng((*seed, rank)).random(owners.shape))
    if step % 4 == 1:
        scores += 0.6 * (owners >= 0)
    for owner in range(int(owners.max()) + 1):
        best = scores.masked_fill(owners != owner, 0).argmax(dim=1, keepdim=True)
        scores.scatter_add_(1, best, 2 * (owners.gather(1, best) == owner).to(scores.dtype))
    kept = scores.topk(num_kept, dim=1).indices.sort(dim=1).values
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
    language_step = step - settings.num_tower_steps
    if language_step < 0:
        return _rate(settings, step, settings.num_tower_steps), 0.0
    return 0.0, _rate(settings, language_step, settings.num_language_steps)


def _rate(settings: TrainingSettings, step: int, num_steps: int) -> float:
    left = (num_steps - step) / num_steps
    return settings.learning_rate * min(1.0, left / settings.decay, (step + 1) / settings.warm_up)


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Give every process the mean of all processes' gradients."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    together = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(together)
    together /= distributed.get_world_size()
    for gradient, mean in zip(gradients, together.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def train(rank: int, settings: TrainingSettings, output: Path) -> None:
    """One process of the training; the first writes the weights.

    Args:
        rank: of this process; each has its share of every batch.
        settings: of the training.
        output: folder for the weights.
    """
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{(output / 'rendezvous').resolve()}",
        rank=rank,
        world_size=settings.num_processes,
    )
    torch.set_num_threads(1)
    model, tokenizer = make_model(settings.seed), make_tokenizer()
    heads = Heads()
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
    held_out = make_batch(tokenizer, CALIBRATION[:200])
    share = settings.batch // settings.num_processes
    sums: dict[str, float] = {}
    started = time.perf_counter()
    for step in range(settings.num_steps):
        for group, rate in zip(optimiser.param_groups, learning_rates(settings, step), strict=True):
            group["lr"] = rate
        start = step * settings.batch + rank * share
        batch = make_batch(tokenizer, TRAINING[start : start + share])
        is_tower_step = step < settings.num_tower_steps
        with torch.set_grad_enabled(is_tower_step):
            states = vision_states(model, normalise(batch["pixels"]))
        if is_tower_step:
            losses = heads(states, batch)
        else:
            patches = states[:, 1:]
            if settings.drops_patches and step % 2:
                patches = drop_patches(patches, batch["owners"], (settings.seed, step), rank)
            losses = {"answer": answer_loss(answer_logits(model, patches, opening, batch["ids"]), batch["targets"])}
        weights = {"unevenness": settings.evenness_weight}
        loss = sum((weights.get(name, 1.0) * value for name, value in losses.items()), torch.zeros(()))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients([*vision, *language])
        nn.utils.clip_grad_norm_([*vision, *language], 1.0)
        optimiser.step()
        done = step + 1
        if rank > 0:
            continue
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item()
        if done % LOG_STEPS == 0:
            means = " ".join(f"{name} {value / LOG_STEPS:.3f}" for name, value in sums.items())
            speed = done * settings.batch / (time.perf_counter() - started)
            print(f"{time.strftime('%H:%M:%S')} step {done}: {means} | {speed:.0f} pictures/s", flush=True)
            sums = {}
        if done % CHECK_STEPS == 0 and not is_tower_step:
            print(check(model, opening, held_out), flush=True)
    if rank == 0:
        torch.save(model.state_dict(), output / WEIGHTS_NAME)
    distributed.destroy_process_group()


def main() -> None:
    """Train from the command line."""
    defaults = TrainingSettings()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("miniature"), help="folder for the checkpoint")
    parser.add_argument("--tower-steps", type=int, default=defaults.num_tower_steps)
    parser.add_argument("--language-steps", type=int, default=defaults.num_language_steps)
    parser.add_argument("--keep-all", action="store_true", help="never drop patches while the language model learns")
    options = parser.parse_args()
    settings = TrainingSettings(
        num_tower_steps=options.tower_steps,
        num_language_steps=options.language_steps,
        drops_patches=not options.keep_all,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "rendezvous").unlink(missing_ok=True)
    torch.multiprocessing.spawn(train, (settings, options.output), nprocs=settings.num_processes)
    model = make_model(settings.seed)
    model.load_state_dict(torch.load(options.output / WEIGHTS_NAME))
    checkpoint = options.output / "checkpoint"
    save(model, checkpoint)
    write_scores(checkpoint, {"command": "python -m benchmarks.miniature.train", **asdict(settings)})
    print(f"wrote {checkpoint}")


if __name__ == "__main__":
    main()
