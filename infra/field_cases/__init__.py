"""Cases from the field: what went wrong at people who run such a system, tried on real workers and a real broker.

`python -m infra.field_cases` runs one case per row of a list of public bug reports of neighbouring systems. The number
of a case is the number of its row. A case does what a stranger would do to the system and judges by what a stranger can
see: topics, pages, logs, exit codes and commands.
"""
