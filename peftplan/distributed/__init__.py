"""Several GPUs: the strategies, the tensors that a rank stores under each, and those that it gathers and reduces in a step."""
