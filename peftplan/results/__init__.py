"""What an engine returns: an estimate, its peaks, a verdict per card. Data only."""
