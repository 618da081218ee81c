"""Job status for frameworks: each module imports its framework, which the extra of the same name installs.

They are built on the client alone: a task's job is a `track` block, entered and left by the framework's hooks.
"""
