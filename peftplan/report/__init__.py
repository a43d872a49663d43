"""Text for people and programs: rich tables, JSON, CSV, Markdown. Reads results, computes nothing."""
