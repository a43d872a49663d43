"""A job, checked once: the model, the method, the setup, the script."""
