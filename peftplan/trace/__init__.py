"""A real training step of the real model on fake tensors: needs torch, and no card."""
