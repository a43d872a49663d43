"""Published measurements as run records: `python -m tools.import_runs`."""
