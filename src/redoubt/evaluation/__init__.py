"""Verdicts per example: which test images a net still gets right under which attack."""
