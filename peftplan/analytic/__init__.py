"""The instant engine: a step on the tape, compiled once and evaluated at any size."""
