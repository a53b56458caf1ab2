"""How much of each kind a client may send. Checked first, so that no message costs more than its bytes.

Each limit is far beyond what trainings use, and each is named in the error or the log line that enforces it. What is
too much of a metric or of `info` costs the client that metric, never its weights.

| what | limit |
| --- | --- |
| a contributor's name | `LONGEST_CONTRIBUTOR` characters, printable, see `fed_learn.contribution.check_contributor` |
| a variable's name | `LONGEST_NAME` characters |
| variables of a model | `MOST_VARIABLES` |
| metrics of a contribution, numbers and others | `MOST_METRICS`, their names `LONGEST_NAME` characters |
| a text in `info` | `LONGEST_INFO` characters |
| entries of `info`, all depths together | `MOST_INFO` |
| depth of `info` | `DEEPEST` |
| the header of an `.npy` file | `LONGEST_HEADER` bytes |
"""

LONGEST_CONTRIBUTOR = 200
LONGEST_NAME = 1000
MOST_VARIABLES = 1_000_000
MOST_METRICS = 1000
LONGEST_INFO = 10_000
MOST_INFO = 10_000
DEEPEST = 8
LONGEST_HEADER = 2000
