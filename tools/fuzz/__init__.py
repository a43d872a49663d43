"""Random input for every command and Python call: each is answered, or refused in one line, in bounded time and memory."""
