"""Composition: `estimate` and what is built on it. No arithmetic of its own."""
