"""The gRPC server: from the bytes of a request to the service, and back."""
