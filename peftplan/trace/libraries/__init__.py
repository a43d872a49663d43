"""What the installed transformers, peft and bitsandbytes make of a config, without weights."""
