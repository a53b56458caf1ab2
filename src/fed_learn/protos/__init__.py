"""The shapes of Clara Train's messages, at its import path; no protobuf is needed."""
