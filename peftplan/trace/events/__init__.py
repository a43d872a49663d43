"""Every allocation of a traced step: who made it, when it is freed, what is alive at a peak."""
