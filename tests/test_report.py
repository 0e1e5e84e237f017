"""The tables of the documents, made of results files."""

import json

import pytest

from training import report


def test_blocks_are_renewed_and_the_rest_stays():
    text = "before <!-- a --> old <!-- /a --> between\n<!-- b -->\nold\nlines\n<!-- /b -->\nafter"
    filled = report.filled(text, {"a": "1.5", "b": "| new |"})
    assert filled == "before <!-- a -->1.5<!-- /a --> between\n<!-- b -->\n| new |\n<!-- /b -->\nafter"
    assert report.filled(filled, {"a": "1.5", "b": "| new |"}) == filled


def test_an_empty_block_is_filled_on_lines_of_its_own():
    assert report.filled("<!-- a -->\n<!-- /a -->", {"a": "| x |"}) == "<!-- a -->\n| x |\n<!-- /a -->"


def test_a_name_stands_in_a_document_twice():
    assert report.filled("<!-- a -->1<!-- /a --> <!-- a -->2<!-- /a -->", {"a": "3"}).count("3") == 2


def test_yaml_comments_are_markers_too():
    assert report.filled("---\n# a\nold: 1\n# /a\nkept: 2", {"a": "new: 3"}) == "---\n# a\nnew: 3\n# /a\nkept: 2"


def test_unknown_and_open_markers_are_refused():
    with pytest.raises(ValueError, match="speeed"):
        report.filled("<!-- speeed -->1<!-- /speeed -->", {"speed": "2"})
    with pytest.raises(ValueError, match="not closed"):
        report.filled("<!-- speed -->1", {"speed": "2"})
    with pytest.raises(ValueError, match="not closed"):
        report.filled("# speed\nname: x# /speed", {"speed": "2"})


def test_table_and_interval():
    assert report.table(["", "R@1"], [["a", "3"], ["b", "5"]]) == "|  | R@1 |\n|---|---|\n| a | 3 |\n| b | 5 |"
    assert report.interval({"difference": 7.32, "low": -0.51, "high": 9.6}) == "+7.3 [-0.5, +9.6]"


def test_results_that_were_not_measured_stay_empty():
    blip = {"CIDEr-D": 11.0, "BLEU-4": 3.0, "ROUGE-L": 7.0, "vocabulary": 13, "novel": 0.5}
    results = {
        "images": 1031,
        "dataset": "d",
        "split": "s",
        "systems": {"BLIP": blip},
        "ablation": {},
        "difference": {"CIDEr-D": {"difference": 2.0, "low": 1.0, "high": 3.0}},
    }
    lines = report.systems_table(results, {"BLIP": "said"}).splitlines()
    assert lines[0].startswith("| 1,031 images of d s | CIDEr-D |")
    assert lines[2] == "| said | 11.0 | 3.0 | 7.0 |  | 13 | 0.50 |"
    assert lines[3] == "| BLIP-RBM minus BLIP [95 % interval] | +2.0 [+1.0, +3.0] |  |  |  |  |  |"


def test_worlds_that_were_measured_are_shown(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPO", tmp_path)
    assert report.worlds_block("results") == "Not measured yet: `make evaluate`."
    blip = {
        "CIDEr-D": 31.04,
        "BLEU-4": 7.0,
        "ROUGE-L": 13.0,
        "METEOR": 11.0,
        "vocabulary": 431,
        "CHAIR-i": 17.0,
        "CHAIR-s": 23.0,
    }
    ours = blip | {"CIDEr-D": 37.0, "CHAIR-i": 19.0}
    entry = {"difference": 5.96, "low": -1.0, "high": 9.0}
    results = {"images": 1009, "split": "validation", "systems": {"BLIP": blip, "BLIP-RBM": ours}}
    (tmp_path / "results").mkdir()
    for name, differences in (("coco", {"CIDEr-D": entry}), ("old_coco", {}), ("web", {"CHAIR-i": entry})):
        content = json.dumps(results | {"difference": differences})
        (tmp_path / "results" / f"captions_{name}.json").write_text(content)
    lines = report.worlds_block("results").splitlines()
    assert lines[0] == "| images | system | CIDEr-D | BLEU-4 | ROUGE-L | METEOR | vocabulary | CHAIR-i | CHAIR-s |"
    web, coco = (f"| {report.WORLDS[name]}, 1,009 images of validation |" for name in ("web", "coco"))
    assert [line.split(" | ")[1] for line in lines[2:]] == [
        *("BLIP", "BLIP-RBM", "BLIP-RBM minus BLIP"),
        *(f"0.1.0: {name}" for name in ("BLIP", "BLIP-RBM", "BLIP-RBM minus BLIP")),
        *("BLIP", "BLIP-RBM", "BLIP-RBM minus BLIP"),
    ]
    assert lines[4] == f"{web} BLIP-RBM minus BLIP |  |  |  |  |  | +6.0 [-1.0, +9.0] |  |"
    assert lines[8] == f"{coco} BLIP | 31.0 | 7.0 | 13.0 | 11.0 | 431 | 17.0 | 23.0 |"
    assert lines[10].startswith(f"{coco} BLIP-RBM minus BLIP | +6.0 [-1.0, +9.0] |  |")
    for name in ("web", "old_coco"):
        content = json.dumps(results | {"difference": {"CIDEr-D": entry}})
        (tmp_path / "results" / f"captions_{name}.json").write_text(content)
    lines = report.worlds_cider_block("results").splitlines()
    assert lines[2:5] == [
        "| 0.1.0: BLIP |  |  | 31.0 |",
        "| 0.1.0: BLIP-RBM |  |  | 37.0 |",
        "| 0.1.0: BLIP-RBM minus BLIP |  |  | +6.0 [-1.0, +9.0] |",
    ]
    assert lines[6] == "| BLIP-RBM |  | 37.0 | 37.0 |"


def test_every_block_is_used_in_a_document_and_every_document_has_one():
    texts = {name: (report.REPO / name).read_text() for name in report.DOCUMENTS}
    for name in report.blocks():
        assert any(f"<!-- {name} -->" in text or f"\n# {name}\n" in text for text in texts.values()), name


def unlike(best, low, high):
    """A results file in which the best score without an RBM has that difference to ours."""
    score = lambda name, value: {name: value, "low": value - 0.01, "high": value + 0.01}
    values = {"relative free energy": 0.7, "free energy": 0.97, "Mahalanobis distance": best, "confidence": 0.93}
    mean = {
        "auc": {name: score("auc", value) for name, value in values.items()},
        "difference": {
            name: {"difference": value - 0.7, "low": low, "high": high} for name, value in list(values.items())[1:]
        },
    }
    kinds = ("noise", "photographs of web", "blurred")
    return {
        "images": {"inside": 1103, "of_a_kind": 101, "compared_to": 2003},
        "inside": "photographs of flickr8k",
        "sorted_by": "relative free energy",
        "auc": {name: {kind: score("auc", value) for kind in kinds} for name, value in values.items()},
        "mean": {"photographs of flickr8k": mean, "photographs of web": mean},
    }


def test_table_of_unlike_images():
    lines = report.unlike_block(unlike(0.83, 0.11, 0.17)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:7]] == [
        "| noise",
        "| blurred",
        "| **mean of the above**",
        "| **mean, against photographs of web**",
        "| photographs of web",
    ]
    assert lines[2].split(" | ")[3] == "0.83 [0.82, 0.84]"
    assert "1,103 photographs of flickr8k against 101" in lines[-1] and "2,003 training" in lines[-1]


@pytest.mark.parametrize(
    "low, high, verdict", [(0.11, 0.17, "better"), (-0.2, -0.1, "worse"), (-0.1, 0.1, "no clear difference")]
)
def test_the_best_control_is_named_whichever_way_it_went(low, high, verdict):
    said = report.unlike_summary(unlike(0.83, low, high))
    assert "over 2 kinds" in said and "of the relative free energy" in said and "confidence" not in said
    assert f"web 0.70 [0.69, 0.71] (free energy 0.97) and 0.83 [0.82, 0.84] (Mahalanobis distance: {verdict})" in said
    assert said.count("against photographs of") == 2
