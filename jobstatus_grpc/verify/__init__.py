"""Decide whether a server keeps the contract of jobstatus.v1: `jobstatus verify`."""
