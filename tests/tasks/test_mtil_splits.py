"""Which images, which words: splits, few-shot subsets, orders, names and templates of MTIL."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import random_split as random_split_of_torch

from condu.tasks.few_shot import few_shot
from condu.tasks.mtil import ORDERS, SOURCES
from condu.tasks.mtil.classnames import classnames
from condu.tasks.mtil.splits import random_split

TEMPLATES = {source.name: source.templates for source in SOURCES}


@pytest.mark.parametrize(
    ("name", "images"), [("Caltech101", 8677), ("EuroSAT", 27000), ("SUN397", 108754)]
)
def test_random_split_is_that_of_the_public_code_and_has_its_sizes(name: str, images: int) -> None:
    train, test = random_split(images)
    cut = int(0.8 * images)
    generator = torch.Generator().manual_seed(42)
    expected = random_split_of_torch(range(images), [cut, images - cut], generator=generator)
    assert train.tolist() == expected[0].indices
    assert test.tolist() == expected[1].indices
    (sizes,) = [source.sizes for source in SOURCES if source.name == name]
    assert (len(train), len(test)) == (sizes.train, sizes.test)


def test_random_split_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    random_split(100)
    assert torch.equal(torch.rand(1), expected)


def test_few_shot_takes_so_many_of_each_class_and_all_of_a_small_one() -> None:
    labels = np.array([2] * 40 + [0] * 30 + [1] * 3)
    chosen = few_shot(labels, 5, seed=0, name="a")
    assert np.bincount(labels[chosen]).tolist() == [5, 3, 5]
    assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_few_shot_depends_on_the_seed_and_the_name() -> None:
    labels = np.arange(300) % 3
    draws = {
        tuple(few_shot(labels, 5, seed=seed, name=name).tolist())
        for seed, name in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))
    }
    assert len(draws) == 3


def test_orders_are_two_orders_of_the_same_eleven() -> None:
    assert len(SOURCES) == 11
    assert ORDERS["I"][:3] == ("Aircraft", "Caltech101", "CIFAR100")
    assert ORDERS["II"][:3] == ("StanfordCars", "Food101", "MNIST")
    assert ORDERS["II"][-1] == "CIFAR100"
    assert sorted(ORDERS["I"]) == sorted(ORDERS["II"]) == sorted(source.name for source in SOURCES)


def test_sizes_are_the_benchmarks() -> None:
    assert sum(source.sizes.classes for source in SOURCES) == 1201
    tests = [3333, 1736, 10000, 1880, 5400, 6149, 25250, 10000, 3669, 8041, 21751]
    assert [source.sizes.test for source in SOURCES] == tests


def test_numbers_of_templates() -> None:
    assert {name: len(templates) for name, templates in TEMPLATES.items()} == {
        "Aircraft": 2,
        "Caltech101": 34,
        "CIFAR100": 18,
        "DTD": 8,
        "EuroSAT": 3,
        "Flowers102": 1,
        "Food101": 1,
        "MNIST": 1,
        "OxfordPet": 1,
        "StanfordCars": 9,
        "SUN397": 2,
    }
    for templates in TEMPLATES.values():
        assert len(set(templates)) == len(templates)


@pytest.mark.parametrize(
    ("name", "place", "prompt"),
    [
        ("Aircraft", 0, "a photo of a X, a type of aircraft."),
        ("Aircraft", 1, "a photo of the X, a type of aircraft."),
        ("Caltech101", 0, "a photo of a X."),
        ("Caltech101", 8, "a embroidered X."),
        ("Caltech101", 10, "a X in a video game."),
        ("Caltech101", 33, "a doodle of the X."),
        ("CIFAR100", 0, "a photo of a X."),
        ("CIFAR100", 2, "a black and white photo of a X."),
        ("CIFAR100", 9, "a photo of the X."),
        ("CIFAR100", 17, "a photo of the big X."),
        ("DTD", 0, "a photo of a X texture."),
        ("DTD", 7, "a photo of the X object."),
        ("EuroSAT", 0, "a centered satellite photo of X."),
        ("EuroSAT", 2, "a centered satellite photo of the X."),
        ("Flowers102", 0, "a photo of a X, a type of flower."),
        ("Food101", 0, "a photo of a X, a type of food."),
        ("MNIST", 0, 'a photo of the number: "X".'),
        ("OxfordPet", 0, "a photo of a X, a type of pet."),
        ("StanfordCars", 0, "a photo of a X, a type of car."),
        ("StanfordCars", 3, "a photo of my X."),
        ("StanfordCars", 4, "i love my X!"),
        ("StanfordCars", 8, "a photo of my old X."),
        ("SUN397", 1, "a photo of the X."),
    ],
)
def test_templates(name: str, place: int, prompt: str) -> None:
    assert TEMPLATES[name][place].format("X") == prompt


@pytest.mark.parametrize(
    ("name", "own", "spoken"),
    [
        ("Aircraft", "F-16A/B", "F-16A/B"),
        ("Caltech101", "Faces_easy", "centered face"),
        ("Caltech101", "water_lilly", "water lilly"),
        ("CIFAR100", "aquarium_fish", "aquarium fish"),
        ("EuroSAT", "HerbaceousVegetation", "brushland or shrubland"),
        ("Flowers102", "pink-yellow dahlia?", "pink-yellow dahlia"),
        ("Food101", "macaroni_and_cheese", "macaroni and cheese"),
        ("MNIST", "7 - seven", "7 - seven"),
        ("SUN397", "apartment_building/outdoor", "apartment building/outdoor"),
    ],
)
def test_names_of_classes_as_prompts_say_them(name: str, own: str, spoken: str) -> None:
    assert classnames(name, ["first", own]) == ("first", spoken)
