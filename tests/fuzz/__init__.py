"""Fuzzers: many damaged inputs, each of which must end in an answer or in one sentence.

    python -m tests.fuzz --minutes 30            # all targets
    python -m tests.fuzz --only images,exif      # some of them

`frame.py` has the interface, `targets/` one file for each kind of input, `cases/` the inputs that
once failed.
"""
