"""A training step on the tape: what each part of it allocates, saves for backward and frees."""
