"""Shim of `redoubt report`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("report")
