"""The built-in dataset: samples depend only on the config."""

from __future__ import annotations

from dataclasses import replace

from configs import DataConfig
from data.sources.open import open_dataset
from data.world import questions


def test_samples_of_the_world_are_drawn_on_access():
    source = open_dataset(DataConfig(seed=3, world_questions=2), "val")
    assert len(source) == 2000
    a, b = source[5], questions.train_sample(3, "val", 5, 2, 0.25)
    assert a.turns == b.turns and len(a.turns) == 4
    assert a.images[0].tobytes() == b.images[0].tobytes()
    assert a.turns != open_dataset(DataConfig(seed=4, world_questions=2), "val")[5].turns
    assert a.turns != open_dataset(DataConfig(seed=3, world_questions=2), "train")[5].turns
    fewer = DataConfig(seed=3, world_questions=2, world_min_shapes=1)  # training settings
    assert open_dataset(fewer, "val")[5].turns == a.turns
    other, usual = (open_dataset(replace(fewer, world_min_shapes=n), "train") for n in (1, 2))
    assert any(other[i].turns != usual[i].turns for i in range(20))
