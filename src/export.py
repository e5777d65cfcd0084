"""Shim of `redoubt export`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("export")
