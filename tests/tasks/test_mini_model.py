from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from condu.tasks import load_benchmark
from condu.tasks.mini.model import (
    WEIGHTS,
    MiniTokenizer,
    build_model,
    image_tensor,
    load_weights,
    save_weights,
)
from condu.tasks.mini.pretrain import contrastive_loss, pretrain, rate_factor


@pytest.fixture(scope="module")
def tokenize():
    return MiniTokenizer()


def test_end_of_text_is_the_highest_id_and_padding_the_lowest(tokenize):
    short, long = tokenize(["a circle", "a photo of a red circle."])
    assert short.dtype == torch.int64
    assert short.argmax() == 3
    assert long.argmax() == 8
    assert short.max() == long.max() == tokenize.vocab_size - 1
    assert short[4:].unique().tolist() == [0]
    assert short[:4].min() > 0


def test_the_vocabulary_fits_the_model(tokenize):
    assert build_model().token_embedding.num_embeddings == tokenize.vocab_size


def test_upper_case_and_blanks_do_not_matter_and_one_string_is_one_row(tokenize):
    assert torch.equal(tokenize("A  Red CIRCLE"), tokenize(["a red circle"]))


def test_unknown_words_are_named(tokenize):
    with pytest.raises(ValueError, match=r"'zebra'.*'a red zebra'"):
        tokenize(["a circle", "a red zebra"])


def test_texts_longer_than_the_context_are_refused(tokenize):
    fits = "red " * (tokenize.context_length - 2)
    assert tokenize(fits).argmax() == tokenize.context_length - 1
    with pytest.raises(ValueError, match=f"{tokenize.context_length + 1} tokens"):
        tokenize(fits + "red")


def test_shipped_weights_are_small_half_precision_and_complete():
    assert WEIGHTS.stat().st_size <= 10_000_000
    tensors = load_file(WEIGHTS)
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    model = build_model()
    load_weights(model, WEIGHTS)
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    assert all(torch.equal(tensors[k].float(), v) for k, v in model.state_dict().items())


def test_weights_with_a_tensor_missing_are_refused(tmp_path):
    tensors = load_file(WEIGHTS)
    tensors.pop("text_projection")
    save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(RuntimeError, match="text_projection"):
        load_weights(build_model(), tmp_path / "part.safetensors")


def test_saved_weights_come_back_rounded_to_half_precision(tmp_path):
    torch.manual_seed(0)
    model, copy = build_model(), build_model()
    save_weights(model, tmp_path / "w.safetensors")
    load_weights(copy, tmp_path / "w.safetensors")
    for old, new in zip(model.parameters(), copy.parameters(), strict=True):
        assert torch.equal(old.half().float(), new)


@torch.no_grad()
def test_zero_shot_is_clearly_above_chance_on_most_tasks(tokenize):
    model = build_model().eval()
    load_weights(model, WEIGHTS)
    times_chance = []
    for task in load_benchmark("mini"):
        data = task.load("test")
        some = slice(0, None, 3)
        images = model.encode_image(image_tensor(data.images[some]), normalize=True)
        prompts = tokenize([task.templates[0].format(c) for c in task.classnames])
        guess = (images @ model.encode_text(prompts, normalize=True).T).argmax(dim=1)
        hits = (guess == torch.as_tensor(data.labels[some])).float().mean().item()
        times_chance.append(hits * len(task.classnames))
    assert sum(ratio > 2 for ratio in times_chance) >= len(times_chance) - 1, times_chance
    assert max(times_chance) > 6, times_chance


def test_two_steps_of_pretraining_write_loadable_weights_and_repeat_exactly(tmp_path):
    torch.manual_seed(9)
    for name in ("a", "b"):
        pretrain(steps=2, batch=8, seed=1, out=tmp_path / "new" / f"{name}.safetensors")
    a, b = (load_file(tmp_path / "new" / f"{n}.safetensors") for n in ("a", "b"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    model = build_model()
    load_weights(model, tmp_path / "new" / "a.safetensors")
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_pretrain_command_refuses_an_empty_run(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "condu.tasks.mini.pretrain", "--steps", "0", "--out", "x"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 2
    assert "--steps >= 1" in done.stderr
    assert not list(tmp_path.iterdir())


def test_contrastive_loss_takes_every_image_of_a_caption_as_a_positive():
    caption = torch.tensor([0, 0, 1])
    aligned = torch.tensor([[30.0, 0.0], [30.0, 0.0], [0.0, 30.0]])
    swapped = aligned.flip(1)
    half = torch.log(torch.tensor(2.0)) / 4  # the shared caption's mass lies on two images
    assert torch.allclose(contrastive_loss(aligned, caption), half, atol=1e-6)
    assert contrastive_loss(swapped, caption) > 20


def test_rate_warms_up_and_falls_to_zero():
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[0] == 0.2
    assert factors[4] == 1.0
    assert factors[5] == 1.0
    assert factors[-1] < 0.001
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert rate_factor(0, 1) == 1.0
