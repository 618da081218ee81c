"""Watches: from the change feed of the store to the streams of the watchers."""
