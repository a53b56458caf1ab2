"""What must outlive a process for a job to go on: its state on disk, and digests of models.

`fed_learn.durable.values` says which values a state is made of, `StateStore` keeps states in a folder, `digest` names
the content of a weight dict. What a job's state is, the job knows.
"""

from fed_learn.durable.digests import digest
from fed_learn.durable.store import StateStore
from fed_learn.durable.values import Decoded, Encoded, decoded, encoded

__all__ = ["Decoded", "Encoded", "StateStore", "decoded", "digest", "encoded"]
