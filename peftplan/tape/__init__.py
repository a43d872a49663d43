"""The pocket autograd: tensors without values, operations, and the log of what is alive when."""
