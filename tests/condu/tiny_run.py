"""A benchmark and a CLIP so small that a whole run takes a second; and, as a script, kills.

    python tiny_run.py run FOLDER [METHOD…]
                                      a run, also under a launcher of several processes; of two
                                      steps a task if methods are given
    python tiny_run.py kill FOLDER METHOD…
                                      a run killed before each of its renames in turn, and resumed

The second prints one line of JSON: the outcome of an undisturbed run, then of each resumed one.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from open_clip.model import CLIP
from PIL import Image
from torch import Tensor

from condu.config import RunConfig, make_config
from condu.models.clip import ClipModel
from condu.tasks.benchmark import Benchmark, Task
from condu.tasks.reference import ReferenceSet
from condu.trainer import ContinualTrainer
from condu.weights import load_weights
from condu_ext import UnifiedDelta

WORDS = ("a", "photo", "of", "picture", "red", "green", "blue", "dark", "light", "grey")
CONTEXT = 8


class Images(torch.utils.data.Dataset):
    """Noisy squares in the colour of their class: [(RGB image, label), …]."""

    def __init__(self, colours: Sequence[Sequence[int]], split: str) -> None:
        count = {"train": 48, "test": 90}[split]
        noise = np.random.default_rng(count).integers(-120, 120, (count, 16, 16, 3))
        self.labels = [i % len(colours) for i in range(count)]
        pixels = np.asarray(colours)[self.labels][:, None, None, :] + noise
        self.pixels = pixels.clip(0, 255).astype(np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.labels[index]


def tiny_benchmark() -> Benchmark:
    colours = [(160, 90, 90), (90, 160, 90), (90, 90, 160)]
    greys = [(90, 90, 90), (128, 128, 128), (165, 165, 165)]
    names, prompts = ("red", "green", "blue"), ("a photo of {}", "a picture of {}")
    hues = Task("hues", names, prompts, lambda split: Images(colours, split))
    names, prompts = ("dark", "grey", "light"), ("a picture of {}",)
    tones = Task("tones", names, prompts, lambda split: Images(greys, split))
    return Benchmark("tiny", (hues, tones), tiny_reference)


def tiny_reference() -> ReferenceSet:
    """Squares in colours of no task."""
    images = Images([(190, 190, 60), (60, 190, 190), (190, 60, 190)], "train")
    captions = ("a dark picture of red", "a photo of light green", "a grey picture", "a blue photo")
    return ReferenceSet([images[i][0] for i in range(len(images))], captions)


def tiny_clip() -> ClipModel:
    torch.manual_seed(0)
    model = CLIP(
        embed_dim=16,
        vision_cfg={"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
        text_cfg={
            "context_length": CONTEXT,
            "vocab_size": len(WORDS) + 2,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    )
    return ClipModel("tiny", model, tokenize, to_tensor, to_tensor)


def tokenize(texts: Sequence[str]) -> Tensor:
    tokens = torch.zeros(len(texts), CONTEXT, dtype=torch.int64)
    for row, text in zip(tokens, texts, strict=True):
        ids = [1 + WORDS.index(word) for word in text.split()]
        row[: len(ids) + 1] = torch.tensor([*ids, len(WORDS) + 1])  # end of text is the highest
    return tokens


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255 - 0.5


def tiny_config(**changes: Any) -> RunConfig:
    values: dict[str, Any] = {
        "benchmark": {"name": "mini"},
        "methods": ["zero_shot", "individual", "sequential", "condu", "condu_lora", "pam"],
        "training": {"steps": 16, "batch_size": 16, "lr": 3e-3},
        "lora": {"rank": 4, "lr": 0.03, "targets": ["c_fc", "c_proj", "attn"]},
        "pam": {"rank": 4, "period": 2},
        "zscl": {"batch_size": 16, "average_every": 4},
        "rail": {"hidden": 64},
        "evaluation": {"batch_size": 16},
    }
    for key, value in changes.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    return make_config(values)


def tiny_trainer(out: Path, **changes: Any) -> ContinualTrainer:
    return ContinualTrainer(tiny_clip(), tiny_benchmark(), tiny_config(**changes), out)


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """The methods' part of results.json without seconds and memory."""
    return {
        name: {
            "protocols": method["protocols"],
            "misaligned": [session["misaligned"] for session in method["sessions"]],
            "fused": [session["fused"] for session in method["sessions"]],
        }
        for name, method in results["methods"].items()
    }


def _run_in_child(
    out: Path, methods: Sequence[str], *, kill_before: int | None, resume: bool
) -> bool:
    """Run in a fork, which kills itself before rename number `kill_before`; True if it lived."""
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and status != 0:
            raise SystemExit(f"the run in {out} failed")
        return not os.WIFSIGNALED(status)
    rename, renames = os.replace, 0

    def counted(*paths: Any) -> None:
        nonlocal renames
        if renames == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        renames += 1
        rename(*paths)

    os.replace = counted  # type: ignore[assignment]
    status = 1
    try:
        tiny_trainer(out, methods=methods, training={"steps": 2}).run(resume=resume)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)


def outcome(out: Path) -> dict[str, Any]:
    """What a finished run found, and a digest of every weight that it left."""
    results = json.loads((out / "results.json").read_text())
    weights = {
        str(file.relative_to(out)): load_weights(file)
        for file in sorted(out.rglob("*.safetensors"))
        if file.parent.name != "state" and file.stem != "prototypes"
    }
    for state in sorted(out.glob("*/state")):
        weights[state.parent.name] = dict(UnifiedDelta.load(state).delta)
    digests = {
        name: xxhash.xxh3_64_hexdigest(b"".join(t.numpy().tobytes() for t in tensors.values()))
        for name, tensors in weights.items()
    }
    return {"numbers": numbers(results), "weights": digests}


def kill(folder: Path, methods: Sequence[str]) -> None:
    os.fsync = lambda descriptor: None  # a killed process loses nothing that it wrote
    gc.freeze()  # children need not look through all the modules again
    _run_in_child(folder / "undisturbed", methods, kill_before=None, resume=False)
    killed = 0
    while not _run_in_child(folder / f"killed-{killed}", methods, kill_before=killed, resume=False):
        _run_in_child(folder / f"killed-{killed}", methods, kill_before=None, resume=True)
        killed += 1
    outcomes = [outcome(folder / f"killed-{n}") for n in range(killed)]
    print(json.dumps([outcome(folder / "undisturbed"), *outcomes]))


def run_in_two_processes(out: Path, *methods: str) -> None:
    """A run of this script in a launcher's two processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, __file__, "run", str(out), *methods],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


if __name__ == "__main__":
    torch.set_num_threads(1)
    action, folder = sys.argv[1], Path(sys.argv[2])
    if action == "kill":
        kill(folder, sys.argv[3:])
    else:
        short: dict[str, Any] = {"methods": sys.argv[3:], "training": {"steps": 2}}
        tiny_trainer(folder, **(short if sys.argv[3:] else {})).run()
