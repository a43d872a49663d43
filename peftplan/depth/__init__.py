"""Deep models at the price of shallow ones: a log of a few layers is extended to the full depth."""
