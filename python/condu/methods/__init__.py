"""Continual-learning methods, one file each. Importing this package registers them by name."""

from condu.methods import condu, individual, sequential, zero_shot
from condu.methods.base import METHODS, Method, Seconds, register

__all__ = [
    "METHODS",
    "Method",
    "Seconds",
    "condu",
    "individual",
    "register",
    "sequential",
    "zero_shot",
]
