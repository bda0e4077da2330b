"""`python -m zsq` is the command `zsq`."""

from zsq.cli import main

main()
