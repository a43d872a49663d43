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


SETTING = """
import torch
scores = torch.randn(64, 8, device="cuda").softmax(-1)
"""
COUNTED = {
    "where": "[torch.where(scores.topk(2).indices == expert) for expert in range(8)]",
    "bincount": "torch.bincount(scores.topk(2).indices.view(-1), minlength=8)",
    "masked": "scores[scores.topk(1).indices.squeeze(1) == 1]",
    "table": "torch.zeros(64, 8, device='cuda').scatter(1, scores.topk(2).indices, 1)",
    "one_hot": "torch.nn.functional.one_hot(scores.argmax(-1), 8)",
}
NOT_COUNTED = {
    "accuracy": "(scores.argmax(-1) == torch.ones(64, dtype=torch.int64).cuda()).sum().item()",
    "of the five highest": "scores.topk(5).indices.t().eq(torch.ones(64, dtype=torch.int64).cuda())[:3].float().sum().item()",
    "proposals": "scores[scores.topk(2, dim=-1).indices[0]]",
    "labels that count": "scores.argmax(-1)[torch.ones(64, dtype=torch.int64).cuda() != -100]",
}


@pytest.mark.rehearse
def test_made_up_places_are_said_where_a_length_follows_from_them(tmp_path: Path) -> None:
    """Not where a program compares what scores highest with labels, or picks it."""
    torch = pytest.importorskip("torch")
    if torch.version.cuda is None:
        pytest.skip("needs the CUDA build of torch")

    def says(lines: str) -> bool:
        path = tmp_path / "program.py"
        path.write_text(SETTING + lines, encoding="utf-8")
        result = rehearse([sys.executable, str(path)], steps=0)
        assert result.exit_code == 0
        return any(text.startswith("MoE routing") for text in result.replaced)

    assert [name for name, line in COUNTED.items() if not says(line)] == []
    assert not says("\n".join(NOT_COUNTED.values()))


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
