"""What is asked, checked once: the model, the method, the setup, the script."""
