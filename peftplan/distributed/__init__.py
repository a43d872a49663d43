"""Several GPUs: the strategies, what a rank holds under each, and what it gathers and reduces during a step."""
