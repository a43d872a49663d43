"""The steps of the Dockerfile, as `tools.image` runs them."""

from __future__ import annotations

import re

from tools.image import HERE, packages, steps

DOCKERFILE = """# a comment
FROM python:3.12-slim
RUN apt-get update && apt-get install --yes \\
    gcc binutils && rm -rf /var/lib/apt/lists/*

ENTRYPOINT ["peftplan"]
"""


def test_steps_of_a_dockerfile() -> None:
    parsed = list(steps(DOCKERFILE))
    assert [instruction for instruction, _ in parsed] == ["FROM", "RUN", "ENTRYPOINT"]
    assert packages(parsed[1][1]) == ["gcc", "binutils"]
    assert packages("pip install torch") is None


def test_every_step_of_ours_is_one_that_the_tool_runs() -> None:
    parsed = list(steps((HERE / "Dockerfile").read_text(encoding="utf-8")))
    assert {instruction for instruction, _ in parsed} == {"FROM", "RUN", "COPY", "WORKDIR", "ENTRYPOINT"}
    assert parsed[0][1].startswith("python:3.")


def test_a_program_s_folder_is_shown_where_the_image_begins() -> None:
    """`docker run --volume HERE:THERE`, in the Dockerfile's own words, the page's and CI's."""
    dockerfile = (HERE / "Dockerfile").read_text(encoding="utf-8")
    begins = dict(steps(dockerfile))["WORKDIR"]
    texts = [
        dockerfile,
        *((HERE / path).read_text(encoding="utf-8") for path in ("docs/rehearse.md", ".github/workflows/ci.yml")),
    ]
    assert [re.findall(r'--volume "\$PWD:([^"]+)"', text) for text in texts] == [[begins]] * 3
