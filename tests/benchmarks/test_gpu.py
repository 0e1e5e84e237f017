"""The GPU's benchmark runs where there is no GPU: a tiny shape, in seconds."""

import json
import sys
from unittest import mock

import pytest
import torch

from benchmarks import gpu


def test_a_tiny_shape_on_the_cpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "NEW_TOKENS", 5)
    monkeypatch.setitem(gpu.CONTENDERS, "guide", {"rbm_guidance": 10.0})  # of so few tokens it changes one
    argv = ["gpu", "--device", "cpu", "--seconds", "3600", "--output", str(tmp_path / "gpu.json")]
    with mock.patch.object(sys, "argv", argv):
        gpu.main()
    results, printed = json.loads((tmp_path / "gpu.json").read_text()), capsys.readouterr().out
    rows = {(row["dtype"], row["beams"], row["contender"]): row for row in results["rows"]}
    assert len(rows) == len(results["rows"]) == 5 + 4 + 5  # bf16 with 3 beams and 1, fp32 with 3
    assert {name for dtype, beams, name in rows if beams == 3} == set(gpu.CONTENDERS)
    assert all(row["images_per_second"] > 0 and row["of_bound"] > 0 and row["waiting"] == 0 for row in rows.values())
    assert rows["float32", 3, "RBM off"]["same_tokens"] and not rows["float32", 3, "guide"]["same_tokens"]
    stock = {(dtype, beams): row["reads"] for (dtype, beams, name), row in rows.items() if name == "stock BLIP"}
    assert all(row["reads"] < stock[dtype, beams] for (dtype, beams, name), row in rows.items() if name != "stock BLIP")
    assert [row["contender"] for row in results["rbm"]] == ["plain loop", "boltzmann"] * 2
    assert results["left_out"] == [] and all(name in printed for name in gpu.CONTENDERS)


def test_cells_that_take_too_long_are_named(tmp_path, capsys):
    with mock.patch.object(
        sys, "argv", ["gpu", "--device", "cpu", "--seconds", "0", "--output", str(tmp_path / "gpu.json")]
    ):
        gpu.main()
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert not results["rows"] and len(results["left_out"]) == 3 and "left out after 0 s" in capsys.readouterr().out


@pytest.mark.parametrize("hidden", [5])
def test_both_loops_learn_the_same_way(hidden):
    """Rows that are all alike: the bias of a unit that is on rises, of one that is off falls, in both."""
    v = torch.tensor([[1.0, 0.0, 1.0]]).repeat(64, 1)
    for kind in ("boltzmann", "plain loop"):
        step = gpu.rbm_steps(kind, v, hidden)
        for _ in range(40):
            step()
        b = next(cell.cell_contents for cell, name in zip(step.__closure__, step.__code__.co_freevars) if name == "b")
        assert b[0] > 0.1 and b[1] < -0.1 and b[2] > 0.1, kind
