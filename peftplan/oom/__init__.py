"""Why a program ran out of memory: what torch's message, a log or a memory snapshot says, and what to try next."""
