from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from condu.models import load_clip
from condu.tasks import load_benchmark
from condu.tasks.mini import draw
from condu.tasks.mini.model import load_weights
from condu.tasks.mini_vqa import _render
from condu.tasks.mini_vqa.corpus import FAMILIES, TURNS, sample_conversations
from condu.tasks.mini_vqa.domains import DOMAINS, cell_centres, other
from condu.tasks.mini_vqa.model import (
    ANSWER,
    ASSETS,
    IMAGE,
    build_tokenizer,
    build_vqa,
    copy_vision_tower,
    load_tokenizer,
    model_config,
)
from condu.tasks.mini_vqa.pretrain import Corpus, pretrain
from condu.tasks.mini_vqa.questions import CORPUS, PLACES, TASKS

NAMES = [domain.name for domain in DOMAINS]
ANSWERS = {domain.name: domain.answers for domain in DOMAINS}


def fingerprints(images: np.ndarray) -> list[str]:
    return [hashlib.sha1(image.tobytes()).hexdigest() for image in images]


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text.lower())


@pytest.fixture(scope="module")
def mini_vqa():
    return load_benchmark("mini_vqa")


@pytest.fixture(scope="module")
def vocabulary():
    return load_tokenizer().get_vocab()


@pytest.fixture(scope="module")
def conversations():
    """Image and turns of each family of the corpus."""
    rng = np.random.default_rng(0)
    return [family(rng, 150) for _, family in FAMILIES]


@pytest.mark.parametrize("name", NAMES)
def test_samples_of_a_task(mini_vqa, name):
    for split, least, most in (("train", 1000, 1050), ("test", 250, 260)):
        data = mini_vqa[name].load(split)
        assert least <= len(data) <= most
        image, question, answer = data[0]
        assert image.mode == "RGB"
        assert image.size == (draw.SIZE, draw.SIZE)
        assert type(question) is type(answer) is str
        counts = Counter(data[i][2] for i in range(len(data)))
        assert set(counts) == set(ANSWERS[name])
        assert len(set(counts.values())) == 1
        assert len(set(fingerprints(data.images))) == len(data)


@pytest.mark.parametrize("name", NAMES)
def test_train_and_test_share_no_image(mini_vqa, name):
    train, test = (set(fingerprints(mini_vqa[name].load(s).images)) for s in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("name", NAMES)
def test_the_question_does_not_give_the_answer_away(mini_vqa, name):
    data = mini_vqa[name].load("train")
    answers_to: dict[str, set[str]] = {}
    for question, answer in zip(data.questions, data.answers, strict=True):
        answers_to.setdefault(question, set()).add(answer)
    assert len(answers_to) >= 2
    # a question that names a shape is asked about 50 times: not every answer need come up
    assert min(len(answers) for answers in answers_to.values()) >= 0.75 * len(ANSWERS[name])


def test_no_question_is_asked_in_two_tasks(mini_vqa):
    asked = [
        set(task.load("train").questions) | set(task.load("test").questions) for task in mini_vqa
    ]
    assert len(set.union(*asked)) == sum(map(len, asked))


def test_a_seed_decides_every_pixel_and_every_question():
    def rendered(seed):
        sets = [task.load("test") for task in load_benchmark("mini_vqa", seed=seed)]
        return [data.images for data in sets], [data.questions for data in sets]

    images, questions = rendered(3)
    _render.cache_clear()
    again, same = rendered(3)
    others, _ = rendered(4)
    assert questions == same
    for a, b, c in zip(images, again, others, strict=True):
        assert a is not b
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


def test_a_task_is_rendered_once_per_process(mini_vqa):
    assert mini_vqa["shape"].load("test") is load_benchmark("mini_vqa")["shape"].load("test")


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_vocabulary_covers_every_question_and_answer(mini_vqa, vocabulary, name):
    for split in ("train", "test"):
        data = mini_vqa[name].load(split)
        texts = {*data.questions, *data.answers}
        assert not {word for text in texts for word in words(text)} - set(vocabulary)


def test_the_shipped_tokenizer_is_the_one_that_the_words_give(vocabulary):
    assert json.loads((ASSETS / "tokenizer.json").read_text()) == json.loads(
        build_tokenizer().to_str()
    )
    assert sorted(vocabulary.values()) == list(range(model_config()["text_config"]["vocab_size"]))


def test_the_corpus_asks_all_words_of_the_tasks_but_none_of_their_questions(
    mini_vqa, conversations
):
    facts = [fact for _, of_family in conversations for known in of_family for fact in known]
    phrases = [phrase for kind in {kind for kind, _, _ in facts} for phrase in CORPUS[kind]]
    seen = {w for text in (*phrases, *(s for _, s, _ in facts)) for w in words(text)}
    asked = {question for task in mini_vqa for question in task.load("train").questions}
    assert not {word for question in asked for word in words(question)} - seen
    assert not asked & {phrase.format(s) for kind, s, _ in facts for phrase in CORPUS[kind]}
    answers = {answer for _, _, answer in facts}
    assert {answer for domain in DOMAINS for answer in domain.answers} <= answers


def test_corpus_conversations_are_a_function_of_the_generator():
    images, turns = sample_conversations(np.random.default_rng(5), 64)
    again, same = sample_conversations(np.random.default_rng(5), 64)
    assert images.dtype == np.uint8
    assert images.shape == (64, draw.SIZE, draw.SIZE, 3)
    assert {len(conversation) for conversation in turns} == {TURNS}
    assert np.array_equal(images, again)
    assert turns == same


def test_each_family_of_the_corpus_is_asked_about_what_it_shows(conversations):
    kinds = [{kind for known in facts for kind, _, _ in known} for _, facts in conversations]
    assert [sorted(k) for k in kinds] == [
        ["colour", "shape"],
        ["colour", "place", "presence", "shape"],
        ["colour", "count", "shape"],
        ["colour", "digit"],
    ]
    for (canvas, facts), family in zip(conversations, FAMILIES, strict=True):
        assert len(canvas) == len(facts) == 150, family
        # the model reads earlier turns: no question is asked twice
        assert all(len({(k, s) for k, s, _ in known}) == len(known) >= TURNS for known in facts)


def test_two_objects_of_the_corpus_never_share_shape_colour_or_place(conversations):
    _, pairs = conversations[1]
    for known in pairs:
        for kind in ("place", "shape", "colour"):
            told = [answer for k, _, answer in known if k == kind]
            assert len(set(told)) == len(told)
        named = [subject for kind, subject, _ in known if kind in ("place", "colour")]
        assert "background" not in named


def test_presence_is_true_of_what_other_facts_mention(conversations):
    _, pairs = conversations[1]
    answers = Counter()
    for known in pairs:
        (asked, answer), *_ = [(s, a) for kind, s, a in known if kind == "presence"]
        mentioned = {w for kind, s, a in known if kind != "presence" for w in (s, a)}
        assert answer == "yes" or asked not in mentioned
        answers[answer] += 1
    assert min(answers["yes"], answers["no"]) >= 15


def test_corpus_and_tasks_share_no_image(mini_vqa):
    corpus = set(fingerprints(sample_conversations(np.random.default_rng(0), 300)[0]))
    for task in mini_vqa:
        assert not corpus & set(fingerprints(task.load("train").images))


def test_the_asked_object_lies_in_the_cell_that_is_the_answer():
    rng = np.random.default_rng(0)
    centres = cell_centres(rng, np.arange(9), jitter=1.0)
    column, row = (centres * 3 // draw.SIZE).astype(int).T
    for place, x, y in zip(PLACES, column, row, strict=True):
        assert ("left" in place, "right" in place) == (x == 0, x == 2)
        assert ("top" in place, "bottom" in place) == (y == 0, y == 2)
    assert PLACES[4] == "middle"


def test_images_of_the_colour_task_show_the_colour_that_is_the_answer(mini_vqa):
    data = mini_vqa["colour"].load("test")
    answers, pixels = np.array(data.answers), data.images.astype(int)
    for channel, name in enumerate(("red", "green", "blue")):
        rest = np.delete(pixels, channel, axis=-1).max(axis=-1)
        purest = np.sort((pixels[..., channel] - rest).reshape(len(data), -1))[:, -20:].mean(axis=1)
        others = ~np.isin(answers, (name, "cyan", "orange", "purple", "pink", "brown"))
        assert np.median(purest[answers == name]) > 2 * np.median(purest[others])


def test_images_of_the_place_task_are_brightest_where_the_answer_says(mini_vqa):
    data = mini_vqa["place"].load("test")
    edges = (0, 11, 21, draw.SIZE)
    brightness = np.stack(
        [
            np.sort(cell.reshape(len(data), -1))[:, -30:].mean(axis=1)
            for top, bottom in pairwise(edges)
            for left, right in pairwise(edges)
            for cell in [data.images[:, top:bottom, left:right].astype(float)]
        ]
    )
    found = [PLACES[i] for i in brightness.argmax(axis=0)]
    hits = sum(f == a for f, a in zip(found, data.answers, strict=True))
    assert hits > 0.9 * len(data)


def test_others_are_others():
    rng = np.random.default_rng(0)
    index = rng.integers(5, size=1000)
    assert not (other(rng, index, 5) == index).any()
    assert set(other(rng, index, 5)) == set(range(5))


def test_every_task_has_phrasings_that_the_corpus_has_not():
    assert set(TASKS) == set(NAMES) <= set(CORPUS)
    for name, phrases in TASKS.items():
        assert not set(phrases) & set(CORPUS[name])


def test_two_steps_of_pretraining_write_loadable_weights_and_repeat_exactly(tmp_path):
    for name in ("a", "b"):
        pretrain(steps=2, batch=4, seed=1, out=tmp_path / "new" / f"{name}.safetensors")
    a, b = (load_file(tmp_path / "new" / f"{n}.safetensors") for n in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    load_weights(build_vqa().model, tmp_path / "new" / "a.safetensors")


def test_pretraining_batches_ask_each_image_several_questions():
    vqa = build_vqa()
    batch = next(iter(Corpus(vqa, batch=6, seed=0)))
    end = vqa.tokenizer.eos_token_id
    assert (batch["labels"] == end).sum(dim=1).tolist() == [TURNS] * 6
    assert (batch["input_ids"] == vqa.encode(IMAGE)[0]).sum(dim=1).tolist() == [16] * 6
    answers = batch["labels"] != -100
    assert torch.equal(batch["input_ids"][answers], batch["labels"][answers])
    # what stands before an answer is the mark that asks for it
    asked = batch["input_ids"][:, :-1][answers[:, 1:] & ~answers[:, :-1]]
    assert asked.unique().tolist() == vqa.encode(ANSWER)


@torch.no_grad()
def test_the_vision_tower_of_the_mini_clip_gives_the_same_features_in_a_llava():
    clip = load_clip("mini").model.visual
    tower = build_vqa().model.model.vision_tower
    copy_vision_tower(clip, tower)
    images = torch.rand(3, 3, draw.SIZE, draw.SIZE)
    clip.transformer.resblocks = clip.transformer.resblocks[: len(tower.encoder.layers)]
    hidden = {}
    clip.transformer.register_forward_hook(lambda _, __, out: hidden.update(clip=out))
    clip(images)
    ours = tower(images).last_hidden_state
    assert torch.allclose(ours, hidden["clip"], atol=1e-4), (ours - hidden["clip"]).abs().max()
