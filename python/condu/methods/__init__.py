"""Continual-learning methods, one file each. Importing this package registers them by name."""

from condu.methods import condu, individual, pam, sequential, zero_shot
from condu.methods.base import METHODS, Learned, Method, register

__all__ = [
    "METHODS",
    "Learned",
    "Method",
    "condu",
    "individual",
    "pam",
    "register",
    "sequential",
    "zero_shot",
]
