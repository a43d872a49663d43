"""Measured runs as data, and what the engines say about them: records, drift, the regression `peftplan check`."""
