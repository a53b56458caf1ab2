"""The client's side of a job."""

from fed_learn.client.fed_client import FederatedClient

__all__ = ["FederatedClient"]
