"""Shim of `redoubt reproduce`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("reproduce")
