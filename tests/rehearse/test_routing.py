"""MoE routing: as many tokens for every expert, or all tokens to the same few."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from peftplan.rehearse import rehearse

MIXTURE = """
import json, torch
from torch.nn.functional import linear
tokens, experts, each = 1024, 8, 2
x = torch.randn(tokens, 64, device="cuda", requires_grad=True)
up = torch.randn(experts, 32, 64, device="cuda", requires_grad=True)
scores = linear(x, torch.randn(experts, 64, device="cuda")).softmax(-1)
weights, chosen = torch.topk(scores, each, dim=-1)
by_expert = torch.nn.functional.one_hot(chosen, num_classes=experts + 1).permute(2, 1, 0)
rows = []
for expert in torch.greater(by_expert.sum(dim=(-1, -2)), 0).nonzero():
    expert = expert[0]
    if expert == experts:
        continue
    place, token = torch.where(by_expert[expert])
    rows.append(len(linear(x[token], up[expert])))
loops = [int((chosen.view(-1) == expert).sum()) for expert in range(experts)]
table = torch.zeros([tokens, experts], device="cuda").scatter(1, chosen, 1).long().sum(0).tolist()
counts = torch.bincount(chosen.view(-1), minlength=experts).tolist()
one = [int(number) for number in torch.nn.functional.one_hot(scores.argmax(-1), experts).sum(0)]
labels = torch.tensor([[1, -100, 3]]).cuda()
filled = torch.zeros(tokens, experts, device="cuda").normal_()
print("SEEN", json.dumps([rows, loops, table, counts, one, int((labels != -100).sum()), len(filled[filled > 0])]))
"""


@pytest.mark.parametrize("experts", [8, 60])
def test_places_are_in_turn_or_the_first(experts: int) -> None:
    torch = pytest.importorskip("torch")
    from peftplan.rehearse.inside.routing import BALANCED, WORST, _places

    shape = torch.Size((4, 30, 2))
    loads = {
        routing: _places(shape, 120, experts, routing).flatten().bincount(minlength=experts) for routing in (BALANCED, WORST)
    }
    assert loads[BALANCED].tolist() == [240 // experts] * experts
    assert loads[WORST].tolist() == [120, 120] + [0] * (experts - 2)


@pytest.mark.rehearse
@pytest.mark.parametrize(("routing", "of_two", "of_one"), [("balanced", [256] * 8, [128] * 8), ("worst", [1024, 1024], [1024])])
def test_an_expert_gets_its_share_of_tokens(routing: str, of_two: list[int], of_one: list[int], tmp_path: Path) -> None:
    """A loop as transformers writes it, one as DeepSeek's repositories did, and the tables of JetMoe and of older Granite."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")
    path, output = tmp_path / "program.py", tmp_path / "output"
    path.write_text(MIXTURE, encoding="utf-8")
    with output.open("w") as file:
        result = rehearse([sys.executable, str(path)], steps=0, routing=routing, stdout=file.fileno())
    seen: list[Any] = json.loads(output.read_text(encoding="utf-8").partition("SEEN")[2])
    every = [*of_two, *[0] * (8 - len(of_two))]
    assert seen == [of_two, every, every, every, [*of_one, *[0] * (8 - len(of_one))], 2, 8192]
    assert any(text.startswith("MoE routing") for text in result.replaced)
