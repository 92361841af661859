"""The operators' API, `tandem.v1.Control` over gRPC: the server in the controller's process, and a client."""
