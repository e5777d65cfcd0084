"""Shim of `redoubt runs`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("runs")
