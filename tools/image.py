"""Run the steps of the Dockerfile where no container runtime is: in a root folder of its own, in order, as they are written.

    python -m tools.image FOLDER --python PREFIX [-- ARGUMENT …]

FOLDER becomes the image: a copy of a Python of the base image's version stands in its /usr/local, this system's compiler,
libraries and certificates are shown beside it, read-only, and nothing else of this system. A step of the system's package manager
is not run: its packages have to be installed here. ARGUMENTs go to the entry point at the end, in the working directory. Steps
that FOLDER has are not run again. pip's options come from the environment, such as `PIP_CONSTRAINT`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent.parent
SHOWN = ("bin", "lib", "lib64", "libexec", "sbin", "include", "share")
"""Folders of /usr that the root shows."""
OF_THE_KERNEL = ("proc", "sys", "dev")
PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"


def steps(text: str) -> Iterator[tuple[str, str]]:
    """Instruction and arguments of each step of a Dockerfile."""
    for line in re.sub(r"\\\n", "", re.sub(r"(?m)^\s*#.*\n", "", text)).splitlines():
        if line.strip():
            instruction, _, rest = line.strip().partition(" ")
            yield instruction, rest.strip()


def packages(command: str) -> list[str] | None:
    """The system's packages that a step installs; None for a step that installs none."""
    words = shlex.split(command.partition("apt-get install")[2].partition("&&")[0])
    return [word for word in words if not word.startswith("-")] if "apt-get install" in command else None


def make_root(root: Path, python: Path) -> None:
    """A root with a Python in /usr/local, and places for what is shown of this system."""
    shutil.copytree(python, root / "usr/local", symlinks=True)
    for script in (root / "usr/local/bin").iterdir():
        if script.is_file() and script.read_bytes()[:2] == b"#!":
            text = script.read_text(encoding="utf-8")
            script.write_text(text.replace(f"#!{python}/", "#!/usr/local/", 1), encoding="utf-8")
    for name in (*(f"usr/{name}" for name in SHOWN), *OF_THE_KERNEL, "etc", "tmp", "root", "work"):
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / name).symlink_to(f"usr/{name}")


def inside(root: Path, command: str, directory: str) -> None:
    """Run a command as `docker build` does: by a shell, with this root. Ends with its exit code where it fails."""
    mounts = [
        f"mount --rbind {shlex.quote(str(root))} {shlex.quote(str(root))}",
        f"cd {shlex.quote(str(root))}",
        *(f"mount --rbind /{name} {name}" for name in (*OF_THE_KERNEL, "etc", *(f"usr/{name}" for name in SHOWN))),
        *(f"mount -o remount,bind,ro {name}" for name in (f"usr/{name}" for name in SHOWN)),
        "pivot_root . tmp",  # not chroot: the kernel lets nobody make namespaces in one, which a scratch layer needs
        "cd /",
        "umount -l /tmp",
        f"mkdir -p {shlex.quote(directory)}",
        f"cd {shlex.quote(directory)}",
        f"exec /bin/sh -c {shlex.quote(command)}",
    ]
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    environment = {"PATH": PATH, "HOME": "/root", "LANG": "C.UTF-8", "LD_LIBRARY_PATH": "/usr/local/lib", **pip}
    enter = ["unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-ec", "\n".join(mounts)]
    done = subprocess.run(enter, env=environment, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def copy(root: Path, source: str, target: str) -> None:
    """What `COPY` takes: all that .dockerignore does not leave out."""
    ignored = (HERE / ".dockerignore").read_text(encoding="utf-8").split()
    names = [pattern.removeprefix("**/") for pattern in ignored]
    shutil.copytree(HERE / source, root / target.lstrip("/"), ignore=shutil.ignore_patterns(*names), dirs_exist_ok=True)


def main() -> None:
    """Run each step, then the entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", type=Path, required=True)
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, arguments = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    root, directory, entry = options.folder.resolve(), "/", []
    log = root / "steps.txt"
    done = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    for number, (instruction, rest) in enumerate(steps((HERE / "Dockerfile").read_text(encoding="utf-8"))):
        print(f"{instruction} {rest}", flush=True)
        if instruction == "WORKDIR":
            directory = rest
        elif instruction == "ENTRYPOINT":
            entry = json.loads(rest)
        elif f"{number} {instruction} {rest}" not in done:
            if instruction == "FROM":
                make_root(root, options.python)
            elif instruction == "COPY":
                copy(root, *rest.split())
            elif (installed := packages(rest)) is not None:
                subprocess.run(["dpkg-query", "--show", *installed], check=True)
            else:
                inside(root, rest, directory)
            with log.open("a", encoding="utf-8") as file:
                file.write(f"{number} {instruction} {rest}\n")
    if arguments:
        inside(root, shlex.join([*entry, *arguments]), directory)


if __name__ == "__main__":
    main()
