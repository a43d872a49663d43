"""Files of other training tools, read into a `ConfigPlan`: model, options, launch, and how every key is treated."""
