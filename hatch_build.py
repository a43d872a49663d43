"""What a distribution gets as it is built: the compiled replay, and a description that package indexes can show.

The replay is compiled where there is a C compiler. Without one the numbers are the same, a 70B model takes 0.3 s more.

    python hatch_build.py      in place, as `pip install -e .` does

`PEFTPLAN_PURE=1` leaves it out.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
    from hatchling.metadata.plugin.interface import MetadataHookInterface
except ImportError:  # run as a script
    BuildHookInterface = MetadataHookInterface = object  # type: ignore[assignment, misc]

SOURCE = Path("peftplan/allocator/_replay.c")
MODULE = SOURCE.with_suffix(".abi3.so")
FLAGS = ("-O2", "-fno-tree-slp-vectorize", "-fPIC")
"""By vectors GCC would write two neighbouring links at once, which takes longer."""
LINK = re.compile(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?P<target>(?!https?:|#)[^)]+)\)")
"""A relative link of Markdown, or a picture."""


def build(root: Path) -> bool:
    """Compile the module beside its source. Whether there was a compiler, with Python's headers, that did."""
    if os.environ.get("PEFTPLAN_PURE") or sys.platform == "win32" or sys.implementation.name != "cpython":
        return False
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    include = sysconfig.get_path("include")
    command = [compiler, *FLAGS, *shared, f"-I{include}", str(root / SOURCE), "-o", str(root / MODULE)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        print(f"no compiled replay: {error}", file=sys.stderr)
        return False
    if done.returncode:
        print(f"no compiled replay: {done.stderr}", file=sys.stderr)
    return not done.returncode


def repository() -> str | None:
    """The repository that a workflow publishes from; None elsewhere."""
    server, name = os.environ.get("GITHUB_SERVER_URL"), os.environ.get("GITHUB_REPOSITORY")
    return f"{server}/{name}" if server and name else None


def description(readme: str, *, url: str | None, version: str) -> str:
    """The README for package indexes, which resolve no relative link: they lead to the release's tag in the repository.

    Where no repository is known, links are their text, and the picture is left out.
    """

    def absolute(link: re.Match[str]) -> str:
        if url is None:
            return "" if link["picture"] else link["text"]
        return f"{link['picture']}[{link['text']}]({url}/{'raw' if link['picture'] else 'blob'}/v{version}/{link['target']})"

    return LINK.sub(absolute, readme)


class CustomMetadataHook(MetadataHookInterface):  # type: ignore[misc]
    """Fills in what depends on where a distribution is built."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Called by hatchling with the fields of [project]."""
        readme, url = (Path(self.root) / "README.md").read_text(encoding="utf-8"), repository()
        text = description(readme, url=url, version=metadata["version"])
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = {} if url is None else {"Repository": url}


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Puts the module into the wheel, which then is one for this platform and every Python from 3.10 on."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it builds a wheel, or an editable one."""
        if build(Path(self.root)):
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["artifacts"].append(str(MODULE))
            build_data["pure_python"] = False
            build_data["tag"] = f"cp310-abi3-{platform}"


if __name__ == "__main__":
    sys.exit(not build(Path(__file__).resolve().parent))
