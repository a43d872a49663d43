"""Files of other training tools, read into a `ConfigPlan`: model, options, launch, and what became of every key."""
