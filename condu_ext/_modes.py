"""The mode in which states are made and changed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def without_autograd(function: Function) -> Function:
    """Run without recording, and make ordinary tensors even inside ``torch.inference_mode()``: a
    state made there is used and changed elsewhere."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return cast(Function, run)
