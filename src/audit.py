"""Shim of `redoubt audit`."""

from redoubt.cli import main

if __name__ == "__main__":
    main("audit")
