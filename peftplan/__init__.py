"""peftplan: what a fine-tuning run needs, before a GPU is rented."""
