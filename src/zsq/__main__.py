"""`python -m zsq` is the command `zsq`."""

from zsq.cli.main import main

main()
