"""``python -m condu.checkpoint …``: the commands on checkpoints, for torchrun to start."""

from condu.checkpoint_commands import app

app(prog_name="python -m condu.checkpoint")
