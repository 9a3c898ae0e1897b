"""What the ranks of a run did when.

`spans` says what a span is, `clock` collects a rank's (of these files it alone imports torch), `file` has the traced
steps of a run as data and as trace.json.
"""
