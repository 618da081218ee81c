"""The API's messages to the domain's types and back: what clients and server share."""
