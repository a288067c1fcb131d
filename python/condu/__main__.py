"""`python -m condu`, also for launchers: `accelerate launch -m condu run CONFIG.yaml`."""

from condu.cli import app

app()
