"""Deep models at the price of shallow ones: the log of few layers, extended to all."""
