"""`python -m jobstatus_grpc` is `jobstatus`."""

from jobstatus_grpc.cli import main

if __name__ == "__main__":
    main()
