"""What `tools/rehearsed_program.py` runs, by the library whose trainer it is. Nothing of peftplan runs in it."""
