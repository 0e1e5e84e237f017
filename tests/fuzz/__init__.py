"""Bad input of every kind, and good input that looks bad: `make test-slow` runs it, `python -m tests.fuzz` prints the table.

Every case ends in one of these:

    right     the result is what was to be expected
    refused   an error of the kind that a caller can handle, which says what is wrong
    raw       another error: a user sees a traceback that says nothing
    silent    a wrong result without an error
    hanging   no result after a minute

The last three fail the test.
"""
