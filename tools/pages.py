"""Write every page and picture that takes seconds, after a change of what commands print: `python -m tools.pages`."""

from __future__ import annotations

import subprocess
import sys

TOOLS = ("tools.reference", "tools.documents", "tools.picture", "tools.transcripts")

if __name__ == "__main__":
    for name in TOOLS:
        subprocess.run([sys.executable, "-m", name], check=True)
