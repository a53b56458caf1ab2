"""How much of each kind a client may send. What a message costs grows with its bytes, and no faster.

Limits are checked first. Each is far beyond what trainings use, and is named in the error or the log line that enforces
it. What is too much of a metric or of `info` costs the client that metric, never its weights: it is left out, or
described in a few words, `info` says so under `LEFT_OUT`, and the log once for each client.

| what | limit | beyond it |
| --- | --- | --- |
| a contributor's name | `LONGEST_CONTRIBUTOR` characters, printable, no slash | refused |
| variables of a contribution | `MOST_VARIABLES` | refused |
| a variable's name | `LONGEST_NAME` characters | refused |
| the header of an `.npy` file | `LONGEST_HEADER` bytes | refused |
| metrics of a contribution, numbers and others | `MOST_METRICS` | the rest is left out |
| a metric's name | `LONGEST_NAME` characters | the metric is left out |
| a name in `Contribution.info` | `LONGEST_NAME` characters | its beginning and end are kept |
| a text in `Contribution.info` | `LONGEST_INFO` characters | its beginning and end are kept |
| entries of `Contribution.info`, of all depths | `MOST_INFO` | what does not fit is described, the rest left out |
| depth of `Contribution.info` | `DEEPEST` | what is deeper is described |
| names made up by a client that an error carries as `extra` | `MOST_NAMED` | counted in its text |
| the text of an error | `LONGEST_MESSAGE` characters | cut off |
| sentences on what clients send, each logged once in a job | `MOST_TOLD` | the log says that no more are told |
"""

LONGEST_CONTRIBUTOR = 200
LONGEST_NAME = 1000
MOST_VARIABLES = 1_000_000
MOST_METRICS = 1000
LONGEST_INFO = 10_000
MOST_INFO = 10_000
DEEPEST = 8
LONGEST_HEADER = 2000
MOST_NAMED = 100
LONGEST_MESSAGE = 10_000
MOST_TOLD = 10_000

LEFT_OUT = "fed_learn.left_out"
"""The entry of `Contribution.info` that says what of a client's metrics and `info` was left out."""
