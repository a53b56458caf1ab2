"""The server's side of a job."""

from fed_learn.server.durable_job import load_state
from fed_learn.server.fed_server import FederatedServer
from fed_learn.server.job import Job
from fed_learn.server.result import JobResult

__all__ = ["FederatedServer", "Job", "JobResult", "load_state"]
