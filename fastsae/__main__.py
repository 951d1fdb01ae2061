"""python -m fastsae is the command `fastsae`."""

from .cli import run

run()
