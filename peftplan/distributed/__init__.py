"""Several GPUs: the strategies, the tensors that a rank holds under each, and those that it gathers and reduces in a step."""
