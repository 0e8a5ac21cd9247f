from __future__ import annotations

import numpy as np
import torch

from benchmarks.miniature import train
from benchmarks.miniature.model import WIDTH, make_tokenizer
from benchmarks.miniature.pictures import COLOURS, SHAPES, SIDE, draw
from benchmarks.miniature.train import (
    GROUND,
    TrainingSettings,
    drop_patches,
    learning_rates,
    make_batch,
    patch_targets,
    unevenness,
)


def test_a_patch_is_to_tell_the_shape_and_colour_or_the_digit_that_it_shows():
    picture = draw(3)
    targets = patch_targets(picture)
    assert ((targets["things"] != GROUND) == (picture.owners >= 0)).all()
    for index, thing in enumerate(picture.shapes):
        is_shown = picture.owners == index
        label = SHAPES.index(thing.shape) * len(COLOURS) + list(COLOURS).index(thing.colour)
        assert (targets["things"][is_shown] == label).all()
        assert (targets["places"][is_shown] == thing.place).all()
        centres = (targets["centres"][is_shown] + 1) / 2 * SIDE
        assert np.allclose(centres, (thing.row, thing.column), atol=1e-3)
        assert targets["presence"][label] == 1
    first_digit = targets["things"][picture.owners == len(picture.shapes)]
    assert (first_digit == len(SHAPES) * len(COLOURS) + picture.number // 10).all()
    assert targets["presence"].sum() == len(picture.shapes) + 2


def patches_of_their_own_index() -> torch.Tensor:
    return torch.arange(144.0)[None, :, None].expand(3, -1, WIDTH)


def test_some_patches_are_kept_in_raster_order():
    patches, owners = patches_of_their_own_index(), torch.full((3, 144), -1)
    counts = []
    for step in range(1, 40, 2):
        kept = drop_patches(patches, owners, (0, step), rank=0)
        counts.append(kept.shape[1])
        assert (kept.diff(dim=1) > 0).all()
    assert all(train.MIN_KEPT <= count <= 144 for count in counts)
    assert len(set(counts)) > 5


def test_processes_drop_as_many_patches_but_others():
    patches, owners = patches_of_their_own_index(), torch.full((3, 144), -1)
    first, again, other = (drop_patches(patches, owners, (0, 7), rank) for rank in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape == other.shape
    assert not torch.equal(first, other)


def test_one_step_in_four_rather_keeps_what_shows_something():
    patches, owners = patches_of_their_own_index(), torch.full((3, 144), -1)
    owners[:, :36] = 0
    shares = {1: [], 3: []}
    for step in range(1, 80, 2):
        kept = drop_patches(patches, owners, (0, step), rank=0)
        shares[step % 4].append((kept[..., 0] < 36).float().mean().item() * kept.shape[1] / 36)
    assert np.mean(shares[1]) > np.mean(shares[3]) + 0.1


def test_every_thing_keeps_a_patch():
    owners = torch.full((3, 144), -1)
    for thing in range(6):
        owners[:, 20 * thing : 20 * thing + 4] = thing
    # The second picture has no sixth thing.
    owners[1, 100:104] = -1
    for step in range(1, 60, 2):
        kept = drop_patches(patches_of_their_own_index(), owners, (0, step), rank=0)[..., 0].long()
        seen = owners.gather(1, kept)
        for picture, num_things in zip(seen, (6, 5, 6), strict=True):
            assert set(picture.tolist()) >= set(range(num_things))


def test_unevenness_is_what_the_ground_varies_by_beside_what_it_shows():
    is_foreground = torch.tensor([[True, True, False, False]])
    patches = torch.tensor([[[4.0], [0.0], [1.0], [3.0]]])
    # Around the ground's mean of 2: 1 and 1, and 4 and 4.
    assert unevenness(patches, is_foreground) == 0.25
    assert unevenness(torch.tensor([[[4.0], [0.0], [2.0], [2.0]]]), is_foreground) == 0


def test_the_tower_learns_first_and_stays_as_it_is_while_the_language_model_learns(tmp_path, monkeypatch):
    settings = TrainingSettings()
    assert learning_rates(settings, settings.warm_up) == (settings.learning_rate, 0)
    assert learning_rates(settings, settings.num_tower_steps - 1)[0] < settings.learning_rate / 100
    in_language = settings.num_tower_steps + settings.warm_up
    assert learning_rates(settings, in_language) == (0, settings.learning_rate)
    assert learning_rates(settings, settings.num_steps - 1)[1] < settings.learning_rate / 500

    monkeypatch.setattr(train, "check", lambda *_: "")
    states = []
    for num_language_steps in (0, 2):
        settings = TrainingSettings(
            num_tower_steps=2, num_language_steps=num_language_steps, warm_up=2, batch=4, num_processes=1
        )
        train.train(0, settings, tmp_path)
        states.append(torch.load(tmp_path / train.WEIGHTS_NAME))
        (tmp_path / "rendezvous").unlink(missing_ok=True)
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[1][name])}
    assert changed
    assert not [name for name in changed if "vision_tower" in name]
    assert not torch.equal(states[0]["lm_head.weight"], states[1]["lm_head.weight"])


def test_a_batch_is_a_function_of_its_seeds():
    first, again = (make_batch(make_tokenizer(), range(10, 12)) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
