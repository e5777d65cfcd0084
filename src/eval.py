"""Shim of `redoubt eval`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("eval")
