"""`python -m samestep`: the same as the command `samestep`."""

from samestep.cli.commands import main

if __name__ == "__main__":
    main(prog_name="samestep")
