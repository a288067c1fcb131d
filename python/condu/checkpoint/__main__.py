"""``python -m condu.checkpoint …``: condu's commands for checkpoints, for torchrun to start.

Only they share their work among processes; of the state's commands one process is enough.
"""

import typer

from condu import checkpoint_commands, state_commands

app = typer.Typer(
    help="Fuse fine-tuned checkpoints of one base model, by ranges and by any number of processes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(checkpoint_commands.app)
app.add_typer(state_commands.app)

app(prog_name="python -m condu.checkpoint")
