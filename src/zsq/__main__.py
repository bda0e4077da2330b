"""`python -m zsq` is the command `zsq`."""

from zsq.cli.start import main

main()
