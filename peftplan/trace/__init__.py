"""A real training step of the real model on fake tensors. Needs torch, but no GPU."""
