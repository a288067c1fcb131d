"""What the commands have in common: how they end when something is wrong."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

EXTRA = {
    "accelerate": "accelerate",
    "huggingface_hub": "huggingface_hub",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "open_clip": "open_clip_torch",
    "peft": "peft",
    "pydantic": "pydantic",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "torchvision": "torchvision",
    "transformers": "transformers",
    "yaml": "pyyaml",
}
"""What the extra `train` brings: module and distribution."""

Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# a dtype that nothing can be made of is a TypeError
_USERS = (ValueError, TypeError, KeyError, OSError, RuntimeError, FloatingPointError)


@contextmanager
def errors(command: str, debug: bool) -> Iterator[None]:
    """Turn what a user can put right into one line and exit status 2, and warnings into a line."""
    # of a number of workers that decides crops, and so is not the machine's to choose
    warnings.filterwarnings("ignore", "This DataLoader will create")
    as_python_does = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"warning: {printable(str(message))}\n"
    try:
        yield
    except ModuleNotFoundError as error:
        if debug or (error.name or "").partition(".")[0] not in EXTRA:
            raise
        complain(f'condu {command} needs {error.name}: pip install "condu[train]"')
        raise typer.Exit(2) from None
    except typer.Exit:  # a RuntimeError too
        raise
    except _USERS as error:
        if debug:
            raise
        message = error.args[0] if isinstance(error, KeyError) and error.args else error
        complain(" ".join(str(message).split()))
        raise typer.Exit(2) from None
    finally:
        warnings.formatwarning = as_python_does


def complain(message: str, *, kind: str = "error") -> None:
    """Write an error, or what ``kind`` says, as one line."""
    print(f"{kind}: {printable(message)}", file=sys.stderr)


def printable(text: str) -> str:
    """A text as the terminal may have it: names of tasks and files may hold control characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
