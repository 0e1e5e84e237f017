"""Speed, side by side with a reference in one run; never part of the tests."""
