"""What is left when training is over: the adapter's file, the merge and the merged checkpoint, the KV cache of serving."""
