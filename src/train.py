"""Shim of `redoubt train`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("train")
