from __future__ import annotations

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from condu.config import ConfigError
from condu.models import load_clip
from condu.models.clip import ClipModel
from condu.tasks.mini import draw
from condu.tasks.mini.model import image_tensor


@pytest.fixture(scope="module")
def mini():
    return load_clip("mini")


def test_mini_encodes_images_and_texts_into_one_unit_sphere(mini):
    image = Image.new("RGB", (draw.SIZE, draw.SIZE), (200, 10, 10))
    with torch.no_grad():
        images = mini.model.encode_image(mini.test_transform(image)[None], normalize=True)
        texts = mini.model.encode_text(mini.tokenize(["a red circle", "a star"]), normalize=True)
        assert images.shape == (1, texts.shape[1])
        assert len(texts) == 2
        assert torch.allclose(texts.norm(dim=1), torch.ones(2))
        assert torch.isfinite(mini.model.logit_scale.exp())


def test_mini_is_in_eval_mode_with_trainable_fp32_parameters(mini):
    assert not mini.model.training
    assert {p.dtype for p in mini.model.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in mini.model.parameters())


def test_every_call_returns_a_model_of_its_own(mini):
    other = load_clip("mini")
    for p in other.model.parameters():
        p.data.zero_()
    assert all(p.any() for p in mini.model.parameters() if p.ndim > 1)


def test_test_transform_is_what_pretraining_saw(mini):
    pixels = torch.arange(draw.SIZE * draw.SIZE * 3, dtype=torch.uint8)
    pixels = pixels.reshape(draw.SIZE, draw.SIZE, 3).numpy()
    assert torch.allclose(
        mini.test_transform(Image.fromarray(pixels)), image_tensor(pixels[None])[0], atol=1e-6
    )


def test_train_transform_crops_at_random(mini):
    image = Image.linear_gradient("L").convert("RGB")
    torch.manual_seed(0)
    first, second = mini.train_transform(image), mini.train_transform(image)
    assert first.shape == second.shape == (3, draw.SIZE, draw.SIZE)
    assert not torch.equal(first, second)


def test_open_clip_models_load_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    source = load_clip("ViT-S-32-alt")
    torch.save(source.model.state_dict(), tmp_path / "weights.pt")
    loaded = load_clip("ViT-S-32-alt", str(tmp_path / "weights.pt"))
    assert loaded.name == "ViT-S-32-alt"
    assert not loaded.model.training
    for a, b in zip(source.model.parameters(), loaded.model.parameters(), strict=True):
        assert torch.equal(a, b)
    image = Image.new("RGB", (300, 200))
    assert loaded.test_transform(image).shape == loaded.train_transform(image).shape
    tokens = loaded.tokenize(["a zebra"])
    assert tokens.dtype == torch.int64
    assert len(tokens) == 1


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("no-such-model", None, "unknown model 'no-such-model'"),
        ("ViT-B-32", "no-such-tag", "unknown weights 'no-such-tag' for model 'ViT-B-32'"),
        ("mini", "openai", "'mini' ships its weights, got pretrained='openai'"),
    ],
)
def test_unknown_models_and_weights_are_named(name, pretrained, message):
    with pytest.raises(ValueError, match=message):
        load_clip(name, pretrained)


def towers(image, text):
    """Layers by their names in a stack like open_clip's."""
    model = nn.Module()
    for path in (*(f"visual.trunk.{name}" for name in image), *text):
        *parents, name = path.split(".")
        inner = model
        for parent in parents:
            if not hasattr(inner, parent):
                inner.add_module(parent, nn.Module())
            inner = getattr(inner, parent)
        inner.add_module(name, nn.Linear(2, 2))
    return ClipModel("stack", model, list, None, None)


@pytest.mark.parametrize(
    ("image", "text", "expected"),
    [
        (["c_fc", "c_proj"], ["transformer.c_fc", "transformer.c_proj"], ("c_fc", "c_proj")),
        (["fc1", "fc2", "qkv"], ["transformer.c_fc"], ("c_fc", "fc1", "fc2")),
    ],
)
def test_adapters_go_to_the_mlps_of_both_towers(image, text, expected):
    assert towers(image, text).lora_targets == expected


@pytest.mark.parametrize(
    ("image", "text", "tower"),
    [(["conv1"], ["text.c_fc"], "image"), (["fc1"], ["text.dense", "my.visual.fc1x"], "text")],
)
def test_a_tower_without_layers_to_adapt_is_named(image, text, tower):
    with pytest.raises(ConfigError, match=rf"lora\.targets: .* {tower} tower of model 'stack'"):
        _ = towers(image, text).lora_targets


@pytest.mark.parametrize("kind", ["text", "empty", "cut off", "of another model", "no tensors"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_without_the_models_weights_is_named_in_one_line(tmp_path, kind, suffix):
    file = tmp_path / f"weights{suffix}"
    if kind == "no tensors":
        torch.save([1, 2], file)
    elif suffix == ".pt":
        torch.save({"a": torch.zeros(999)}, file)
    else:
        save_file({"a": torch.zeros(999)}, file)
    whole = file.read_bytes()
    if kind in ("text", "empty", "cut off"):
        file.write_bytes({"text": b"hello world", "empty": b"", "cut off": whole[:1000]}[kind])
    with pytest.raises(ValueError, match="holds no weights of model 'ViT-S-32-alt': ") as caught:
        load_clip("ViT-S-32-alt", str(file))
    message = str(caught.value)
    assert str(file) in message
    assert "\n" not in message
    assert len(message) < 250 + len(str(file))


def test_weights_of_another_activation_are_refused_before_they_are_fetched(monkeypatch):
    def fetch(*arguments, **options):
        raise FileNotFoundError("no route")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", fetch)
    with pytest.raises(ValueError, match=r"with QuickGELU.* take model 'ViT-B-16-quickgelu'"):
        load_clip("ViT-B-16", "openai")
    for name, tag in (("ViT-B-16-quickgelu", "openai"), ("ViT-B-16", "laion2b_s34b_b88k")):
        expected = (
            rf"weights '{tag}' of model '{name}' could not be fetched \(FileNotFoundError: no"
        )
        with pytest.raises(ValueError, match=expected + r".* give a file .*from (timm|laion)/"):
            load_clip(name, tag)
