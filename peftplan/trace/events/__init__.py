"""Every allocation of a traced step: which operation made it, when it is freed, and what is alive at a peak."""
