"""`python -m inhouse`: the same as the command `inhouse`."""

from inhouse.cli.main import main

if __name__ == "__main__":
    main()
