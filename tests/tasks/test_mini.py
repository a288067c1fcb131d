from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from condu.tasks import load_benchmark
from condu.tasks.mini import _handwritten, _render, draw
from condu.tasks.mini.concepts import COLOUR_NAMES, SHAPES, TEXTURES, sample_colours
from condu.tasks.mini.corpus import FAMILIES, sample_pairs
from condu.tasks.mini.domains import DOMAINS
from condu.tasks.mini.model import MiniTokenizer

NAMES = [task.name for task in load_benchmark("mini")]


def fingerprints(images: np.ndarray) -> list[str]:
    return [hashlib.sha1(image.tobytes()).hexdigest() for image in images]


@pytest.fixture(scope="module")
def mini():
    return load_benchmark("mini")


def test_at_least_six_tasks_with_eight_classes_or_more(mini):
    assert len(mini) >= 6
    assert min(len(t.classnames) for t in mini) >= 8


@pytest.mark.parametrize("name", NAMES)
def test_images_and_labels_of_a_task(mini, name):
    task = mini[name]
    for split, least, most in (("train", 1000, 2000), ("test", 250, 400)):
        data = task.load(split)
        assert least <= len(data) <= most
        image, label = data[0]
        assert image.mode == "RGB"
        assert image.size == (draw.SIZE, draw.SIZE)
        assert type(label) is int
        per_class = np.bincount([data[i][1] for i in range(len(data))])
        assert len(per_class) == len(task.classnames)
        assert per_class.min() >= 0.9 * per_class.max()
        assert len(set(fingerprints(data.images))) >= 0.99 * len(data)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_image(mini, name):
    train, test = (set(fingerprints(mini[name].load(s).images)) for s in ("train", "test"))
    assert not train & test


def test_a_seed_decides_every_pixel():
    first = [task.load("test").images for task in load_benchmark("mini", seed=3)]
    _render.cache_clear()
    _handwritten.cache_clear()
    again = [task.load("test").images for task in load_benchmark("mini", seed=3)]
    other = [task.load("test").images for task in load_benchmark("mini", seed=4)]
    for a, b, c in zip(first, again, other, strict=True):
        assert a is not b
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


def test_a_task_is_rendered_once_per_process(mini):
    assert mini["shapes"].load("test") is load_benchmark("mini")["shapes"].load("test")


@pytest.mark.parametrize("name", NAMES)
def test_the_tokenizer_tells_all_prompts_of_a_task_apart(mini, name):
    task, tokenize = mini[name], MiniTokenizer()
    for template in task.templates:
        tokens = tokenize([template.format(c) for c in task.classnames])
        assert len(torch.unique(tokens, dim=0)) == len(task.classnames)


def test_corpus_pairs_are_a_function_of_the_generator():
    images, captions = sample_pairs(np.random.default_rng(5), 64)
    again, same = sample_pairs(np.random.default_rng(5), 64)
    other, _ = sample_pairs(np.random.default_rng(6), 64)
    assert images.dtype == np.uint8
    assert images.shape == (64, draw.SIZE, draw.SIZE, 3)
    assert np.array_equal(images, again)
    assert captions == same
    assert not np.array_equal(images, other)


def test_the_tokenizer_knows_every_caption_of_every_family():
    tokenize, rng = MiniTokenizer(), np.random.default_rng(0)
    for _, family in FAMILIES:
        _, captions = family(rng, 200)
        assert len(captions) == 200
        tokenize(captions)


def test_corpus_and_tasks_share_no_image(mini):
    corpus = set(fingerprints(sample_pairs(np.random.default_rng(0), 500)[0]))
    for task in mini:
        assert not corpus & set(fingerprints(task.load("train").images))


def test_a_single_pair_can_be_drawn():
    images, captions = sample_pairs(np.random.default_rng(0), 1)
    assert len(images) == len(captions) == 1


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_fills_part_of_its_frame_and_nothing_far_outside(name):
    size = np.array([8.0])
    x, y = draw.frame(np.full((1, 2), draw.SIZE / 2), size, np.zeros(1))
    coverage = draw.fill(draw.shape(name, x, y), size)
    assert 0.02 < coverage.mean() < 0.25
    assert coverage[np.hypot(x, y) > 1.3].max() == 0


def test_unknown_shapes_are_named():
    with pytest.raises(ValueError, match="'blob'"):
        draw.shape("blob", np.zeros((1, 2, 2)), np.zeros((1, 2, 2)))


def test_frames_turn_clockwise_with_x_to_the_right_and_y_down():
    centre, radius = np.full((2, 2), draw.SIZE / 2), np.full(2, 1.0)
    x, y = draw.frame(centre, radius, np.array([0.0, np.pi / 2]))
    right, below = (0, draw.SIZE // 2, -1), (0, -1, draw.SIZE // 2)
    assert x[right] > 10
    assert abs(y[right]) < 1
    assert y[below] > 10
    assert x[(1, *below[1:])] > 10  # turned by 90 degrees, the object's x axis points down


def test_textures_differ_and_stay_in_range():
    n = len(TEXTURES)
    x, y = draw.frame(np.zeros((n, 2)), np.full(n, 6.0), np.zeros(n))
    values = draw.textures(np.arange(n), x, y)
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std(axis=(1, 2)).min() > 0.1
    assert len({v.tobytes() for v in values}) == n


def test_colours_look_like_their_names():
    rgb = {
        name: sample_colours(np.random.default_rng(0), np.full(50, i)).mean(axis=0)
        for i, name in enumerate(COLOUR_NAMES)
    }
    for channel, name in enumerate(("red", "green", "blue")):
        assert rgb[name].argmax() == channel
    assert rgb["white"].min() > 0.9 > 0.1 > rgb["black"].max()
    assert rgb["yellow"].argmin() == 2
    assert rgb["cyan"].argmin() == 0


def test_scatter_keeps_places_apart():
    places = draw.scatter(np.random.default_rng(0), 10, 4, 1.0)
    gaps = np.linalg.norm(places[:, :, None] - places[:, None], axis=-1)
    assert places.shape == (10, 16, 2)
    assert gaps[gaps > 0].min() >= draw.SIZE / 4 - 2
    assert places.min() > 0
    assert places.max() < draw.SIZE


def test_scatter_leaves_a_margin():
    places = draw.scatter(np.random.default_rng(0), 10, 4, 0.0, margin=4.0)
    pitch = (draw.SIZE - 8) / 4
    assert places.min() == 4 + pitch / 2
    assert places.max() == draw.SIZE - 4 - pitch / 2


@pytest.mark.parametrize("domain", DOMAINS, ids=lambda d: d.name)
def test_a_look_draws_a_single_image(domain):
    canvas = domain.look(np.random.default_rng(0), np.array([1]))
    assert canvas.shape == (1, draw.SIZE, draw.SIZE, 3)
    assert np.isfinite(canvas).all()
