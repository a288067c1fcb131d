"""``python -m condu.checkpoint …`` is the command ``condu``, for torchrun to start."""

from condu.cli import app

app(prog_name="python -m condu.checkpoint")
