"""What occupies the device: allocations, the ledger of lines, and the timeline of a training step."""
