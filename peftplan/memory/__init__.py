"""What occupies the device: allocations, the ledger of lines, and (later) the timeline of a training step."""
