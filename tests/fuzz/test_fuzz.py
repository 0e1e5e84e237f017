"""At least 500 inputs, none wrong without a word, none hanging, none with a raw error."""

import pytest

from tests.fuzz.run import run_all, table


@pytest.mark.slow
def test_every_input_is_right_or_refused():
    counts, bad = run_all()
    print(table(counts))
    assert not bad, "\n".join(bad)
    assert sum(sum(ends.values()) for ends in counts.values()) >= 500
    assert all(
        ends["right"] and ends["refused"] for ends in counts.values()
    )  # an oracle that refuses all, or nothing, is none
