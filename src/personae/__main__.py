"""`python -m personae` is the command `personae`."""

from personae.cli import main

main()
